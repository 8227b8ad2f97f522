"""What can be asked of an image encoder's input, by name. Needs neither numpy nor Pillow."""

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

    kind      by the names of ComfyUI_IPAdapter_plus: see `imprompt.encoders.noise.KINDS`
    strength  0 (the picture; turned, for "shuffle") to 1
    blur      radius of a Gaussian blur afterwards, in pixels of the encoder's input
    """

    kind: Annotated[NoiseKind, one_of(NoiseKind)]
    strength: Annotated[float, Field(ge=0, le=1)] = 1.0
    blur: Annotated[float, Field(ge=0, le=100)] = 0.0
