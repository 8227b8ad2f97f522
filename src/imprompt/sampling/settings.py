"""What a picture was made with: checked once, kept in the PNG, enough to make it again."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from imprompt.checked import Checked, one_of

MAX_SIDE = 16_384  # pixels
Precision = Literal["float32", "float16", "bfloat16"]


def _text(value: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise PydanticCustomError("no_text", "it is no Unicode text")
    return value


def _prompt(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_prompt, value))
    if isinstance(value, str):
        return _text(value)
    raise PydanticCustomError("string_type", "Input should be a valid string")


Text = Annotated[str, AfterValidator(_text)]
Prompt = Annotated[Any, PlainValidator(_prompt)]  # a text, or several as a tuple
OverlapName = Literal["add", "normalise"]
Overlap = Annotated[OverlapName, one_of(OverlapName)]


class Settings(Checked, frozen=True):
    """The numbers and texts of one call. `steps`, `guidance`, `width` and `height` of None are the model's own.

    prompt  one for all results, or one for each image prompt
    """

    prompt: Prompt = ""
    negative_prompt: Text = ""
    scale: Annotated[float, Field(ge=-10, le=10)] = 1.0
    num_images: Annotated[int, Field(ge=1, le=10_000)] = 1
    steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    guidance: Annotated[float, Field(ge=0, le=1000)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63 - 10_000)] | None = None
    width: Annotated[int, Field(ge=8, le=MAX_SIDE)] | None = None
    height: Annotated[int, Field(ge=8, le=MAX_SIDE)] | None = None
    strength: Annotated[float, Field(gt=0, le=1)] = 0.8
    together: bool = False
    image_guidance: Annotated[float, Field(ge=0, le=1000)] | None = None  # of the image alone, beside `guidance` of the text
    control_scale: Annotated[float, Field(ge=0, le=10)] = 1.0  # of ControlNet, where there is one
    overlap: Overlap = "add"  # where masks of one result's references overlap


class Resolved(Settings, frozen=True):
    """Settings with every default filled in."""

    steps: int = 50
    guidance: float = 7.5
    seed: int = 0
    width: int = 512
    height: int = 512

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height
