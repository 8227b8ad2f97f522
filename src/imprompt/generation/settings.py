"""Define the settings of a call: checked once, stored in the PNG, enough to repeat the picture."""

from typing import Annotated, Any, ClassVar, Literal, TypedDict

from pydantic import AfterValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from imprompt.validation import Flag, Validated, one_of

MAX_SIDE = 16_384  # pixels
Precision = Literal["float32", "float16", "bfloat16"]


def _text(value: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise PydanticCustomError("no_text", "it is not Unicode text")
    return value


def _prompt(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_prompt, value))
    if isinstance(value, str):
        return _text(value)
    raise PydanticCustomError("string_type", "Input should be a valid string")


Text = Annotated[str, AfterValidator(_text)]
Prompt = Annotated[Any, PlainValidator(_prompt)]  # a text, or several as a tuple
ADAPTER = "base, plus, a file, a training run's state, or a Hub file."
ModelName = Annotated[
    str,
    Field(description="emoji, sd15, flux or another of `imprompt models`, a folder or a Hub id."),
]
EncoderName = Annotated[
    str | None,
    Field(description="Folder or Hub id of the image encoder, if the adapter does not name it."),
]
VariantName = Annotated[
    str | None,
    Field(description="Variant, if the adapter's tensors do not show it, such as faceid-plus-v2."),
]
PrecisionName = Annotated[
    Precision | None,
    Field(description="float32, float16 or bfloat16; by the device if not given."),
]
OverlapName = Literal["add", "normalise"]
Overlap = Annotated[OverlapName, one_of(OverlapName)]


OWN_NAMES = {  # argument of a diffusers pipeline's call -> its name here
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "num_images_per_prompt": "num_images",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "generator": "seed, a whole number",
    "width": "width",
    "height": "height",
    "strength": "strength",
    "callback_on_step_end": "on_step",
    "callback": "on_step",
    "callback_steps": "on_step",
    "controlnet_conditioning_scale": "control_scale",
}


class Settings(Validated, frozen=True):
    """Numbers and texts of one call, each with its flag of `imprompt generate`.

    `steps` and `guidance` of None are usual for the adapter, else for the model, as `scale` is for
    the adapter; `width` and `height` of None are the model's own. `prompt` is one text for
    all results, or one for each image prompt.
    """

    familiar: ClassVar = OWN_NAMES

    prompt: Annotated[Prompt, Field(description="Text that goes with the image prompt.")] = ""
    negative_prompt: Annotated[
        Text, Flag("--negative"), Field(description="Text that guidance moves away from.")
    ] = ""
    scale: Annotated[
        float | None,
        Field(
            ge=-10,
            le=10,
            description="Strength of the image prompt, about 0.5 with a text; if not given, the "
            "adapter's usual one, mostly 1.",
        ),
    ] = None
    num_images: Annotated[
        int, Flag(short="-n"), Field(ge=1, le=10_000, description="Results per image prompt.")
    ] = 1
    steps: Annotated[
        int | None,
        Field(ge=1, le=10_000, description="Sampling steps; the model's own if not given."),
    ] = None
    guidance: Annotated[
        float | None,
        Field(ge=0, le=1000, description="Guidance scale; the model's own if not given."),
    ] = None
    seed: Annotated[
        int | None,
        Field(ge=0, lt=2**63 - 10_000, description="Result i has seed + i; random if not given."),
    ] = None
    width: Annotated[
        int | None,
        Field(ge=8, le=MAX_SIDE, description="Pixels; the model's own if not given."),
    ] = None
    height: Annotated[
        int | None,
        Field(ge=8, le=MAX_SIDE, description="Pixels; the model's own if not given."),
    ] = None
    strength: Annotated[
        float, Field(gt=0, le=1, description="How much of --init is redrawn, to 1: all.")
    ] = 0.8
    together: Annotated[
        bool, Field(description="Let every result follow all image prompts at once.")
    ] = False
    image_guidance: Annotated[
        float | None,
        Field(
            ge=0,
            le=1000,
            description="Guidance scale of the image; --guidance then applies to the text only.",
        ),
    ] = None
    control_scale: Annotated[
        float, Field(ge=0, le=10, description="Strength of the ControlNet.")
    ] = 1.0
    overlap: Annotated[
        Overlap,
        Field(description="Where the regions of one result overlap: add, or normalise."),
    ] = "add"


class SettingValues(TypedDict, total=False):
    """Types of the fields of `Settings` other than `prompt`, for editors and type checkers."""

    negative_prompt: str
    scale: float | None
    num_images: int
    steps: int | None
    guidance: float | None
    seed: int | None
    width: int | None
    height: int | None
    strength: float
    together: bool
    image_guidance: float | None
    control_scale: float
    overlap: OverlapName


class Resolved(Settings, frozen=True):
    """Settings with every default filled in.

    A scale of None is that of each adapter, where several have different ones.
    """

    steps: int = 50
    guidance: float = 7.5
    seed: int = 0
    width: int = 512
    height: int = 512

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height
