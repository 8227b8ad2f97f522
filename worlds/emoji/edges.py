"""Edge maps: outlines for the ControlNet and for measures.

Shape letters: N pictures, S pixels a side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# gradients (of 1): below the first there is no edge, above the second an edge is fully white
WEAK, STRONG = (0.06, 0.30)
SOBEL = ((1.0, 2.0, 1.0), (-1.0, 0.0, 1.0))  # smoothing across, difference along


def edges(pictures: Tensor) -> Tensor:
    """Compute edge maps (N, 3, S, S) in [0, 1] of pictures (N, 3, S, S) in [0, 1].

    Edges are white on black, in three equal channels: the Sobel gradient of each colour, the
    strongest of the three, softly thresholded. So a red edge on a green of the same grey is an
    edge.
    """
    smooth, slope = pictures.new_tensor(SOBEL)
    kernels = torch.stack([torch.outer(smooth, slope), torch.outer(slope, smooth)])[:, None] / 4
    planes = F.pad(pictures.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    strength = (
        F.conv2d(planes, kernels).square().sum(1).sqrt().view_as(pictures).amax(1, keepdim=True)
    )
    return ((strength - WEAK) / (STRONG - WEAK)).clamp(0, 1).expand(-1, 3, -1, -1)
