"""Features that InstantCharacter reads: of SigLIP and DINOv2, of a picture and of its tiles.

`ImagePromptPipeline` loads one image encoder, so these are made by hand:

>>> features = character_features(picture, siglip, dinov2)
>>> prompt = adapter.prompt(adapter.tokens(features), scale=0.8)

Shape letters as in `imprompt.adapter`; P patches of one picture as an encoder sees it, E the
encoders' widths together.
"""

import copy
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from imprompt.encoders.kinds import short_side_and_crop
from imprompt.encoders.preparation import side_of
from imprompt.encoders.vision import VisionEncoder
from imprompt.errors import MismatchError
from imprompt.variants import Feature, levels_of

CHARACTER = "character"  # the feature's name
READ_LEVELS = ("levels 7,13,26", "levels 9,19,29")  # of SigLIP so400m and of DINOv2 giant
TILES = 2  # along each side


def character_features(
    picture: Image.Image,
    siglip: VisionEncoder,
    dinov2: VisionEncoder,
    levels: tuple[Feature, Feature] = READ_LEVELS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return shallow (1, 3·P, E), deep (1, P, E) and tiles' deep features (1, 4·P, E).

    DINOv2 sees pictures as large as SigLIP's. Raise MismatchError if the two then have other
    numbers of patches.
    """
    side = side_of(siglip.processor)
    encoders = siglip, at_side(dinov2, side)
    square = squashed(picture.convert("RGB"), max(picture.size))
    whole, large = squashed(square, side), squashed(square, TILES * side)
    corners = [(x * side, y * side) for y in range(TILES) for x in range(TILES)]
    tiles = [large.crop((x, y, x + side, y + side)) for x, y in corners]

    def deep(pictures: Sequence[Image.Image]) -> Tensor:
        seen = [patches_of(encoder, pictures, "last") for encoder in encoders]
        return together([patches.flatten(0, 1)[None] for patches in seen])

    whole_deep = deep([whole])
    by_level = map(levels_in_rows, encoders, (whole, whole), levels)
    return together([*by_level]), whole_deep, deep(tiles)


def squashed(picture: Image.Image, side: int) -> Image.Image:
    """Return a picture squashed to a square."""
    return picture.resize((side, side))


def at_side(encoder: VisionEncoder, side: int) -> VisionEncoder:
    """Return an encoder that sees the middle square of pictures at that side, not smaller."""
    processor = copy.copy(encoder.processor)
    for name, value in short_side_and_crop(side, side).items():
        setattr(processor, name, value)
    return VisionEncoder(encoder.model, processor, encoder.source)


def patches_of(encoder: VisionEncoder, pictures: Sequence[Image.Image], feature: Feature) -> Tensor:
    """Return a feature's rows (B, P, E) that are patches."""
    first = encoder.kind.class_rows(encoder.model.config)
    return encoder.features_of(encoder.pixels(pictures), feature)[:, first:]


def levels_in_rows(encoder: VisionEncoder, picture: Image.Image, levels: Feature) -> Tensor:
    """Return the patches of several levels (1, levels · P, E), one level after the other."""
    joined = patches_of(encoder, [picture], levels)
    return torch.cat(joined.chunk(len(levels_of(levels)), -1), 1)


def together(features: Sequence[Tensor]) -> Tensor:
    """Join the features (1, rows, E') of both encoders; MismatchError if their rows differ."""
    rows = [feature.shape[1] for feature in features]
    if len({*rows}) > 1:
        raise MismatchError(
            f"SigLIP gives {rows[0]} patches and DINOv2 {rows[1]}: InstantCharacter needs encoders "
            "of one patch size"
        )
    return torch.cat([feature.to(features[0]) for feature in features], -1)
