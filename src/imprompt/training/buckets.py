"""Aspect-ratio buckets: pictures keep their shape, batches have one size.

Sizes are (width, height) in pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imprompt.errors import SettingError
from imprompt.training.recipe import Data

Size = tuple[int, int]


def bucket_sizes(data: Data, size: int) -> tuple[Size, ...]:
    """The sizes that pictures are brought to: the square alone, or with `data.buckets` every width
    in steps with the height that keeps within the square's area, up to `data.max_aspect`.
    """
    if not data.buckets:
        return ((size, size),)
    step, found = data.bucket_step, set()
    for width in range(step, int(size * data.max_aspect**0.5) + step, step):
        height = size * size // width // step * step
        if height and max(width / height, height / width) <= data.max_aspect:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found)) or ((size, size),)


def training_size(data: Data, native: int, unit: int) -> int:
    """Pixels a side of training pictures: the recipe's, or the model's own.

    SettingError unless the VAE takes all buckets.
    """
    size = data.size or native
    for wide, high in bucket_sizes(data, size):
        if wide % unit or high % unit:
            raise SettingError(
                f"data.size = {size}: this model's VAE takes multiples of {unit}, not {wide}×{high}"
            )
    return size


def nearest(sizes: Sequence[Size], buckets: Sequence[Size]) -> np.ndarray:
    """For every picture the number of the bucket whose aspect ratio is nearest to its own
    (samples,).
    """
    own, theirs = (np.log([width / height for width, height in part]) for part in (sizes, buckets))
    return np.abs(own[:, None] - theirs[None]).argmin(1)


def fit(picture: Image.Image, bucket: Size) -> tuple[Image.Image, Tensor]:
    """Cover the bucket and cut the middle out.

    And SDXL's micro-conditioning of that (section 2.2 of arXiv 2307.01952):

    original height and width, top and left of the cut in the resized picture, the bucket's height
    and width (6,).
    """
    (width, height), (wide, high) = picture.size, bucket
    scale = max(wide / width, high / height)
    # in the original, so that it is resized once
    left, top = ((width - wide / scale) / 2, (height - high / scale) / 2)
    box = (left, top, left + wide / scale, top + high / scale)
    cut = picture.resize(bucket, Image.Resampling.LANCZOS, box)
    return cut, torch.tensor(
        [height, width, round(top * scale), round(left * scale), high, wide], dtype=torch.float32
    )


def to_pixels(picture: Image.Image) -> Tensor:
    """RGB -> (3, H, W) in [-1, 1], as the VAE takes it."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def to_latents(mask: Image.Image, unit: int) -> Tensor:
    """Grey (W, H) -> (1, h, w) of 8 bits: for each latent the mean of the `unit` × `unit` pixels
    that it stands for.
    """
    return torch.from_numpy(np.array(mask.reduce(unit)))[None]
