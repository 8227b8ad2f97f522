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
    """Return the sizes that pictures are resized to.

    That is the square alone, or with `data.buckets` every width in steps of `data.bucket_step`,
    with the height that keeps within the square's area, up to `data.max_aspect`.
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
    """Return the side of training pictures in pixels: the recipe's, or the model's own.

    Raise SettingError unless the VAE accepts the sizes of all buckets.
    """
    size = data.size or native
    for wide, high in bucket_sizes(data, size):
        if wide % unit or high % unit:
            raise SettingError(
                f"data.size = {size}: this model's VAE takes multiples of {unit}, not {wide}×{high}"
            )
    return size


def nearest(sizes: Sequence[Size], buckets: Sequence[Size]) -> np.ndarray:
    """Return for every picture the number of the bucket nearest in aspect ratio (samples,)."""
    own, theirs = (np.log([width / height for width, height in part]) for part in (sizes, buckets))
    return np.abs(own[:, None] - theirs[None]).argmin(1)


def fit(picture: Image.Image, bucket: Size) -> tuple[Image.Image, Tensor]:
    """Resize a picture to cover the bucket, and crop the middle.

    Return it with SDXL's micro-conditioning (6,) (section 2.2 of arXiv 2307.01952): original height
    and width, top and left of the crop in the resized picture, height and width of the bucket.
    """
    (width, height), (wide, high) = picture.size, bucket
    scale = max(wide / width, high / height)
    # the crop in the original picture, so that it is resized only once
    left, top = ((width - wide / scale) / 2, (height - high / scale) / 2)
    box = (left, top, left + wide / scale, top + high / scale)
    cut = picture.resize(bucket, Image.Resampling.LANCZOS, box)
    return cut, torch.tensor(
        [height, width, round(top * scale), round(left * scale), high, wide], dtype=torch.float32
    )


def to_pixels(picture: Image.Image) -> Tensor:
    """Convert an RGB picture to (3, H, W) in [-1, 1], the VAE's input."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def to_latents(mask: Image.Image, unit: int) -> Tensor:
    """Average a grey mask (W, H) over the pixels of each latent: (1, h, w) of 8 bits.

    A latent stands for `unit` × `unit` pixels.
    """
    return torch.from_numpy(np.array(mask.reduce(unit)))[None]
