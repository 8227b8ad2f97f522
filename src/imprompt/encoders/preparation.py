"""Prepare a picture for the image encoder, which sees only a square.

By default CLIP sees the central square, SigLIP the whole picture squashed to a square, DINOv2 the
middle of the central square. First the ignored part is covered at the picture's own size, then the
picture is cropped or fitted, and last it is sharpened at the encoder's own size. The encoder's own
preprocessing then leaves size and pixels as they are, or gets a square.
"""

from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field, InstanceOf

from imprompt.encoders.choices import Crop
from imprompt.errors import ImageError, MismatchError
from imprompt.images import BLACK, open_mask
from imprompt.validation import Validated

Colour = tuple[int, int, int]

WIDE, HIGH = 0, 1  # the axes of a picture's size
# axis, and 0 for its start or 1 for its end
EDGES = {"left": (WIDE, 0), "right": (WIDE, 1), "top": (HIGH, 0), "bottom": (HIGH, 1)}
MAX_TILES = 4
MAX_ASPECT = 2  # longer pictures are cut first if the encoder cuts out the middle


class Preparation(Validated, frozen=True):
    """Settings of how a picture is prepared for the image encoder.

    crop        None: the picture is left to the encoder's own preprocessing; "center": also left to
                it if it cuts out the middle, else the central square; "top", "bottom", "left",
                "right": the square at that edge; "pad": the whole on a square of the encoder's mean
                colour, which is neutral to it ("pad black": of black); "squash": the whole squashed
                to a square; "tiles": the overlapping squares that cover it, four at most, each a
                separate picture
    sharpening  0 (none) to 1, by `sharpened`
    ignore      mask: its white parts are covered with the encoder's mean colour, so that the
                encoder does not see them
    """

    crop: Crop | None = None
    sharpening: Annotated[float, Field(ge=0, le=1)] = 0.0
    ignore: Path | InstanceOf[Image.Image] | None = None


def prepare(image: Image.Image, preparation: Preparation, encoder: Any) -> list[Image.Image]:
    """Turn an RGB picture into RGB pictures for `encoder.features`: one, or one per tile.

    `encoder` has transformers' image processor as `.processor`, which is not read if the picture is
    left as it is. Raise ImageError if the mask is not a picture or its shape differs.
    """
    if preparation.ignore is not None:
        image = covered(image, open_mask(preparation.ignore), mean_colour(encoder.processor))
    pictures = CROPS[preparation.crop](image, preparation.crop, encoder)
    if not preparation.sharpening:
        return pictures
    return [
        framed(
            sharpened(encoder_square(picture, encoder.processor), preparation.sharpening),
            encoder.processor,
        )
        for picture in pictures
    ]


def encoder_square(image: Image.Image, processor: Any) -> Image.Image:
    """Return the S × S pixels that the encoder sees of an RGB picture, before normalisation."""
    pixels = processor(
        [without_ends(image, processor)], do_rescale=False, do_normalize=False, return_tensors="np"
    ).pixel_values[0]
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def without_ends(image: Image.Image, processor: Any) -> Image.Image:
    """Return the picture, its ends cut off if the processor cuts out the middle anyway."""
    return cut_ends(image) if processor.do_center_crop else image


def cut_ends(image: Image.Image) -> Image.Image:
    """Return the middle of a very wide or tall picture, at most 2 : 1.

    Resizing the whole by its short side could take gigabytes.
    """
    width, height = (
        min(image.width, MAX_ASPECT * image.height),
        min(image.height, MAX_ASPECT * image.width),
    )
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def framed(square: Image.Image, processor: Any) -> Image.Image:
    """Return a square picture with a border if the encoder would not see all of it.

    A processor that resizes to the size that it cuts out shows all of a square. For one that
    resizes to more (DINOv2's: 256 and 224), the square is placed, at the encoder's size, in the
    middle of a larger one of the mean colour.
    """
    side, short_side = side_of(processor), processor.size.get("shortest_edge")
    if short_side in (None, side):
        return square
    around = Image.new("RGB", (short_side, short_side), mean_colour(processor))
    start = (short_side - side) // 2
    around.paste(square.resize((side, side), processor.resample), (start, start))
    return around


def mean_colour(processor: Any) -> Colour:
    """Return the 8-bit colour that normalisation brings nearest to 0."""
    red, green, blue = (round(255 * mean) for mean in processor.image_mean)
    return red, green, blue


def covered(image: Image.Image, mask: Image.Image, colour: Colour) -> Image.Image:
    """Return `image` with `colour` where the mask is white; grey parts are mixed.

    Raise ImageError unless both have the same shape.
    """
    mask = fitted(mask, image)
    return Image.composite(Image.new("RGB", image.size, colour), image, mask)


def fitted(mask: Image.Image, image: Image.Image) -> Image.Image:
    """Return the mask at the picture's size; raise ImageError if their shapes differ.

    Their aspects may differ by 1 %, or by as much as rounding to whole pixels causes.
    """
    if mask.size == image.size:
        return mask
    (width, height), (mask_width, mask_height) = image.size, mask.size
    if abs(mask_width * height - mask_height * width) >= max(
        width, height, 0.01 * mask_width * height
    ):
        raise ImageError(
            f"a mask of {mask_width}×{mask_height} pixels does not fit a picture of "
            f"{width}×{height}: give one of that shape"
        )
    return mask.resize(image.size, Image.Resampling.BILINEAR)


def _centered(image: Image.Image, _: str, encoder: Any) -> list[Image.Image]:
    """Return the central square, or the picture itself if the encoder's preprocessing cuts it."""
    if encoder.processor.do_center_crop:
        return [image]
    long = max(image.size)
    return [_square(image, image.size.index(long), (long - min(image.size)) // 2)]


def _at_edge(image: Image.Image, crop: str, encoder: Any) -> list[Image.Image]:
    """Return the square at an edge, or as for "center" if nothing is to be cut on that axis."""
    axis, at_end = EDGES[crop]
    spare = image.size[axis] - min(image.size)
    if not spare:
        return _centered(image, crop, encoder)
    return [framed(_square(image, axis, at_end * spare), encoder.processor)]


def _tiles(image: Image.Image, _: str, encoder: Any) -> list[Image.Image]:
    """Return the fewest squares that cover a picture, evenly spaced from end to end.

    There are at most four; between those of a picture longer than 4 : 1 there are gaps.
    """
    side, length = min(image.size), max(image.size)
    count = min(ceil(length / side), MAX_TILES)
    axis = image.size.index(length)
    return (
        [
            framed(
                _square(image, axis, round(number * (length - side) / (count - 1))),
                encoder.processor,
            )
            for number in range(count)
        ]
        if count > 1
        else [image]
    )


def _square(image: Image.Image, axis: int, start: int) -> Image.Image:
    """Return the square that begins at `start` along the long axis."""
    side = min(image.size)
    left, top = (start, 0) if axis == WIDE else (0, start)
    return image.crop((left, top, left + side, top + side))


def _padded(image: Image.Image, crop: str, encoder: Any) -> list[Image.Image]:
    """Return the whole picture in the middle of a square, at the encoder's size.

    So no later resizing blurs its edges.
    """
    side = side_of(encoder.processor)
    width, height = (max(1, round(side * length / max(image.size))) for length in image.size)
    square = Image.new(
        "RGB", (side, side), BLACK if crop == "pad black" else mean_colour(encoder.processor)
    )
    square.paste(
        image.resize((width, height), Image.Resampling.BICUBIC),
        ((side - width) // 2, (side - height) // 2),
    )
    return [framed(square, encoder.processor)]


def _squashed(image: Image.Image, _: str, encoder: Any) -> list[Image.Image]:
    side = side_of(encoder.processor)
    pressed = image.resize((side, side), Image.Resampling.BICUBIC)
    return [framed(pressed, encoder.processor)]


def side_of(processor: Any) -> int:
    """Return the side S of the encoder's input; MismatchError if the input is not a square."""
    seen = processor.crop_size if processor.do_center_crop else processor.size
    if not seen["height"] or seen["height"] != seen["width"]:
        raise MismatchError("its image processor does not make squares of one size")
    return seen["height"]


CROPS: dict[str | None, Callable[[Image.Image, Any, Any], list[Image.Image]]] = {
    None: lambda image, *_: [image],
    "center": _centered,
    **dict.fromkeys(EDGES, _at_edge),
    **dict.fromkeys(("pad", "pad black"), _padded),
    "squash": _squashed,
    "tiles": _tiles,
}


def sharpened(image: Image.Image, amount: float) -> Image.Image:
    """Sharpen by local contrast (AMD FidelityFX CAS, 2019), per channel, on the stored values.

    Each pixel e moves away from its four neighbours: e' = (e + w·Σ) / (1 + 4w). The weight w =
    −amount/5 · √a is small where the nine pixels around already differ much, by a = min(m, 2 − M) /
    M of their lowest and highest values (m and M are sums over the cross and over all nine, so that
    2 is white). Amount 1 is AMD's sharpest, 0.625 its mildest, 0 changes nothing.
    """
    around = np.pad(np.asarray(image, np.float32) / 255, ((1, 1), (1, 1), (0, 0)), "edge")
    height, width = image.height, image.width
    near = [around[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    cross = [near[1], near[3], near[4], near[5], near[7]]
    low = np.minimum.reduce(cross) + np.minimum.reduce(near)
    high = np.maximum.reduce(cross) + np.maximum.reduce(near)
    room = np.minimum(low, 2 - high) / np.maximum(high, 1e-6)
    weight = np.sqrt(room.clip(0, 1)) * np.float32(-amount / 5)
    pixels = (near[4] + weight * (near[1] + near[3] + near[5] + near[7])) / (1 + 4 * weight)
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))
