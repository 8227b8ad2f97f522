"""A picture made ready for the image encoder, which itself sees nothing but the central square.

What is to be ignored is covered at the picture's own size, then the picture is cut or fitted, and
sharpened last, at the encoder's own size. The encoder's own resizing then leaves its size and
pixels as they are, or finds a square.
"""

from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field, InstanceOf

from imprompt.encoders.choices import Crop
from imprompt.errors import ImageError
from imprompt.images import BLACK, open_mask
from imprompt.validation import Validated

Colour = tuple[int, int, int]

WIDE, HIGH = 0, 1  # the axes of a picture's size
# axis, and at its start or end
EDGES = {"left": (WIDE, 0), "right": (WIDE, 1), "top": (HIGH, 0), "bottom": (HIGH, 1)}
MAX_TILES = 4


class Preparation(Validated, frozen=True):
    """How a picture is made ready.

    crop        "center": as CLIP's own processor does it, the picture is left as it is; "top",
                "bottom", "left", "right": the square at that edge; "pad": the whole on a square of
                the encoder's mean colour, which says nothing ("pad black": of black); "squash": the
                whole pressed into a square; "tiles": as many overlapping squares as cover it, four
                at most, each of them a picture of its own
    sharpening  0 (none) to 1, by `sharpened`
    ignore      a mask: what is white there is not seen, for it is covered with the encoder's mean
                colour
    """

    crop: Crop = "center"
    sharpening: Annotated[float, Field(ge=0, le=1)] = 0.0
    ignore: Path | InstanceOf[Image.Image] | None = None


def prepare(image: Image.Image, preparation: Preparation, encoder: Any) -> list[Image.Image]:
    """An RGB picture -> RGB pictures for `encoder.features`: one, or one a tile.

    `encoder` has the CLIP image processor as `.processor`; it is looked at only where size or mean
    colour matter. ImageError if the mask is no picture, or of another shape than this one.
    """
    if preparation.ignore is not None:
        image = covered(image, open_mask(preparation.ignore), mean_colour(encoder.processor))
    pictures = CROPS[preparation.crop](image, preparation.crop, encoder)
    if not preparation.sharpening:
        return pictures
    return [
        sharpened(encoder_square(picture, encoder.processor), preparation.sharpening)
        for picture in pictures
    ]


def encoder_square(image: Image.Image, processor: Any) -> Image.Image:
    """The square of S × S pixels that the encoder sees of an RGB picture, before they are
    normalised.
    """
    from imprompt.encoders.clip import cut_ends  # and with it torch: a request is read without

    pixels = processor(
        [cut_ends(image)], do_rescale=False, do_normalize=False, return_tensors="np"
    ).pixel_values[0]
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def mean_colour(processor: Any) -> Colour:
    """What becomes 0 when it is normalised, as nearly as 8 bits can say it."""
    red, green, blue = (round(255 * mean) for mean in processor.image_mean)
    return red, green, blue


def covered(image: Image.Image, mask: Image.Image, colour: Colour) -> Image.Image:
    """`image` with `colour` where the mask is white; grey is between.

    ImageError unless both have one shape.
    """
    mask = fitted(mask, image)
    return Image.composite(Image.new("RGB", image.size, colour), image, mask)


def fitted(mask: Image.Image, image: Image.Image) -> Image.Image:
    """The mask at the picture's size.

    Their aspects may differ by 1 %, or by what rounding to whole pixels makes of them.
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


def _at_edge(image: Image.Image, crop: str, _: Any) -> list[Image.Image]:
    """The square at an edge.

    The picture itself where it has nothing to cut off in that direction.
    """
    axis, at_end = EDGES[crop]
    spare = image.size[axis] - min(image.size)
    return [_square(image, axis, at_end * spare) if spare else image]


def _tiles(image: Image.Image, *_: Any) -> list[Image.Image]:
    """The fewest squares that cover a picture, evenly spaced from end to end.

    Of one longer than 4 : 1 there are gaps between.
    """
    side, length = min(image.size), max(image.size)
    count = min(ceil(length / side), MAX_TILES)
    axis = image.size.index(length)
    return (
        [
            _square(image, axis, round(number * (length - side) / (count - 1)))
            for number in range(count)
        ]
        if count > 1
        else [image]
    )


def _square(image: Image.Image, axis: int, start: int) -> Image.Image:
    """The square that begins at `start` along the long axis."""
    side = min(image.size)
    left, top = (start, 0) if axis == WIDE else (0, start)
    return image.crop((left, top, left + side, top + side))


def _padded(image: Image.Image, crop: str, encoder: Any) -> list[Image.Image]:
    """The whole picture in the middle of a square, at the encoder's size, so that no resizing blurs
    its edges afterwards.
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
    return [square]


def _squashed(image: Image.Image, _: str, encoder: Any) -> list[Image.Image]:
    side = side_of(encoder.processor)
    return [image.resize((side, side), Image.Resampling.BICUBIC)]


def side_of(processor: Any) -> int:
    """S: how wide and high the encoder sees."""
    return processor.crop_size["height"]


CROPS: dict[str, Callable[[Image.Image, str, Any], list[Image.Image]]] = {
    "center": lambda image, *_: [image],
    **dict.fromkeys(EDGES, _at_edge),
    **dict.fromkeys(("pad", "pad black"), _padded),
    "squash": _squashed,
    "tiles": _tiles,
}


def sharpened(image: Image.Image, amount: float) -> Image.Image:
    """Contrast-adaptive sharpening (AMD FidelityFX CAS, 2019), per channel, on the values as they
    are stored.

    Each pixel e goes away from its four neighbours: e' = (e + w·Σ) / (1 + 4w). The weight w =
    −amount/5 · √a is small where the nine pixels around already differ much, by a = min(m, 2 − M) /
    M of their lowest and highest values (m and M are sums over the cross and over all nine, so that
    2 is white). Amount 1 is AMD's sharpest, 0.625 its mildest, 0 leaves all as it is.
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
