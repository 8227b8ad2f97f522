"""Model inputs of a sample: cropped picture, image encoder's input, SDXL's conditions.

Shape letters as in `imprompt.training.features`; H and W the bucket's height and width, R the
references.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imprompt.training.buckets import Size, fit, nearest, to_latents, to_pixels
from imprompt.training.references import Parts, References
from imprompt.training.samples import BadSample, Sample, Source


@dataclass(frozen=True)
class Example:
    """Model inputs of one sample.

    The mirrored example has `pixels.flip(-1)` and `mask.flip(-1)`. Its references are not mirrored.
    """

    name: str
    pixels: Tensor  # (3, H, W) in [-1, 1]
    references: Parts  # each (R, …): see `imprompt.training.references`
    text: str
    time_ids: Tensor  # (6,): see `imprompt.training.buckets.fit`
    mask: Tensor  # (1, h, w) of 8 bits; black, which counts evenly, where the sample has none


def read_example(
    sample: Sample, bucket: Size, unit: int, references: References, pick: float | None = None
) -> Example:
    """Open and crop a sample's pictures: all references, or the one that `pick` in [0, 1) selects.

    Raise BadSample if one of them cannot be used.

    unit        pixels a side that one latent stands for
    references  prepares the pictures that prompt
    """
    picture = sample.picture()
    mask = sample.checked_mask(picture)
    chosen = (
        sample.references
        if pick is None
        else [sample.references[int(pick * len(sample.references))]]
    )
    opened = [(one, picture if one is sample.picture else one()) for one in chosen]
    cut, time_ids = fit(picture, bucket)
    wide, high = (side // unit for side in bucket)
    small = (
        torch.zeros(1, high, wide, dtype=torch.uint8)
        if mask is None
        else to_latents(fit(mask, bucket)[0], unit)
    )
    return Example(
        sample.name,
        to_pixels(cut),
        references.prepare(sample.name, opened),
        sample.text,
        time_ids,
        small,
    )


def bucket_of(source: Source, index: int, sizes: Sequence[Size]) -> int:
    """Return the number of a sample's bucket.

    0 if its size cannot be read; reading the picture raises the error.
    """
    if len(sizes) == 1:
        return 0
    try:
        return int(nearest([source.size(index)], sizes)[0])
    except BadSample:
        return 0


@dataclass(frozen=True)
class Examples:
    """A source's samples as examples, by number; it is sent to reading processes."""

    source: Source
    sizes: Sequence[Size]
    unit: int
    references: References

    def __call__(self, index: int) -> Example:
        """Return the example of a sample number; raise BadSample if it cannot be used."""
        bucket = self.sizes[bucket_of(self.source, index, self.sizes)]
        return read_example(self.source.read(index), bucket, self.unit, self.references)
