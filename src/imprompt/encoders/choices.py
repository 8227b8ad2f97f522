"""Choices for an image encoder's input, by name.

This module needs neither numpy nor Pillow.
"""

from typing import Annotated, Literal

from pydantic import Field

from imprompt.validation import Validated, one_of

CropName = Literal[
    "center", "top", "bottom", "left", "right", "pad", "pad black", "squash", "tiles"
]
Crop = Annotated[CropName, one_of(CropName)]
NoiseKind = Literal["fade", "dissolve", "gaussian", "shuffle"]


class Noise(Validated, frozen=True):
    """Noise made from a picture, as a negative image prompt.

    kind      a name that ComfyUI_IPAdapter_plus uses too: see `imprompt.encoders.noise.KINDS`
    strength  0 (the picture; for "shuffle", rotated by 180°) to 1
    blur      radius of a Gaussian blur afterwards, in pixels of the encoder's input
    """

    kind: Annotated[NoiseKind, one_of(NoiseKind)]
    strength: Annotated[float, Field(ge=0, le=1)] = 1.0
    blur: Annotated[float, Field(ge=0, le=100)] = 0.0
