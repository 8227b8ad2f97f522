"""Edge maps: what an outline is, for the ControlNet and for measures. Shape letters: N pictures, S
pixels a side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# gradient (of 1) below which there is no edge, and above which an edge is full
WEAK, STRONG = (0.06, 0.30)
SOBEL = ((1.0, 2.0, 1.0), (-1.0, 0.0, 1.0))  # smoothing across, difference along


def edges(pictures: Tensor) -> Tensor:
    """Pictures (N, 3, S, S) in [0, 1] -> edge maps (N, 3, S, S) in [0, 1], white on black, three
    equal channels.

    The Sobel gradient of each colour (a red edge on a green of the same grey is an edge), the
    strongest of the three, softly thresholded.
    """
    smooth, slope = pictures.new_tensor(SOBEL)
    kernels = torch.stack([torch.outer(smooth, slope), torch.outer(slope, smooth)])[:, None] / 4
    planes = F.pad(pictures.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    strength = (
        F.conv2d(planes, kernels).square().sum(1).sqrt().view_as(pictures).amax(1, keepdim=True)
    )
    return ((strength - WEAK) / (STRONG - WEAK)).clamp(0, 1).expand(-1, 3, -1, -1)
