"""What a picture was made with: checked once, kept in the PNG, enough to make it again."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from imprompt.errors import SettingError

MAX_SIDE = 16_384  # pixels


class Settings(BaseModel, frozen=True):
    """The numbers and texts of one call. `steps`, `guidance`, `width` and `height` of None are the model's own."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = ""
    negative_prompt: str = ""
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
    overlap: Literal["add", "normalise"] = "add"  # where masks of one result's references overlap

    @classmethod
    def check(cls, **values: object) -> Self:
        """The settings, or SettingError with one line that names the first wrong value and what is allowed."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SettingError(one_line(error)) from error


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


def one_line(error: ValidationError, known: Iterable[str] = Settings.model_fields) -> str:
    """pydantic's first complaint as one sentence: name, value, what is allowed. `known`: the settings that could be meant."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"] if part != "settings") or "settings"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name.split(".")[-1], known, 1) or known
        return f"unknown setting {name!r}; known: {', '.join(near)}"
    return f"{name} = {reprlib.repr(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"
