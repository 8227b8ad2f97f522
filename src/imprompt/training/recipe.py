"""A training run as a TOML file."""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from imprompt.errors import SettingError, first_line
from imprompt.variants import BY_NAME

Share = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Part):
    """A folder with metadata.jsonl, a line per picture: {"file_name": "0001.png", "text": "a cat"}."""

    folder: Path
    size: Annotated[int, Field(ge=8)] | None = None  # pixels a side; the model's own if not given
    drop_text: Share = 0.05  # the paper's drops (section 4.1): each alone, and both
    drop_image: Share = 0.05
    drop_both: Share = 0.05

    @model_validator(mode="after")
    def _drops_fit(self) -> Self:
        if self.drop_text + self.drop_image + self.drop_both > 1:
            raise ValueError("drop_text, drop_image and drop_both must not add up to more than 1")
        return self


class Optimization(Part):
    """AdamW with the paper's defaults."""

    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = 8  # over all processes
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0  # steps
    clip: Annotated[float, Field(gt=0)] = 1.0  # largest norm of the gradient
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the machine is fast at it


class Recipe(Part):
    """One run: what is trained, on what, how, and where its states go."""

    model: str
    variant: str = "base"
    tokens: Annotated[int, Field(ge=1)] | None = None  # the variant's own if not given
    depth: Annotated[int, Field(ge=1)] | None = None  # layers of the resampler (plus)
    encoder: str | None = None  # the model's default if not given
    output: Path
    seed: int = 0
    save_every: Annotated[int, Field(ge=1)] = 1000  # steps
    keep: Annotated[int, Field(ge=1)] = 2  # states
    licence: str = ""
    data: Data
    optimization: Optimization

    @model_validator(mode="after")
    def _variant_known(self) -> Self:
        if self.variant not in BY_NAME:
            raise ValueError(f"unknown variant {self.variant!r}; known: {', '.join(BY_NAME)}")
        if self.depth is not None and self.variant != "plus":
            raise ValueError("depth is of the plus variant's resampler")
        if self.tokens is not None and self.variant == "full":
            raise ValueError("the full variant has one token per patch: leave tokens out")
        return self


GROUPS = {"data": Data, "optimization": Optimization}


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with `key.sub=value` overrides; SettingError with one line that names the key."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        for override in overrides:
            _set(table, override)
        return Recipe.model_validate(table)
    except OSError as error:
        raise SettingError(f"no recipe {path} ({first_line(error)}); give a TOML file such as those in recipes/") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is no TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "recipe"
        if first["type"] == "extra_forbidden":
            raise SettingError(f"{path}: unknown key {name}{_meant(first['loc'])}") from error
        given = f" = {first['input']!r}" if first["type"] not in ("missing", "value_error") else ""
        raise SettingError(f"{path}: {name}{given}: {first['msg'].removeprefix('Value error, ')}") from error


def _set(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise SettingError(f"--set {override}: write key=value, such as optimization.steps=100")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a text
    groups, _, name = key.strip().rpartition(".")
    for group in filter(None, groups.split(".")):
        table = table.setdefault(group, {})
        if not isinstance(table, dict):
            raise SettingError(f"--set {override}: {group} is no group of keys")
    table[name] = value


def _meant(loc: tuple[str | int, ...]) -> str:
    """What an unknown key was probably meant to be; `loc` is (key,) or (group, key)."""
    group, key = str(loc[0]), str(loc[len(loc) - 1])
    known = (GROUPS.get(group, Recipe) if len(loc) > 1 else Recipe).model_fields
    near = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
