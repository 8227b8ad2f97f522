"""Define how pictures are made for an evaluation: named protocols and sweeps.

A protocol is a row of values that can be changed; a sweep varies some of them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from imprompt.errors import SettingError
from imprompt.evaluation.names import unique_names
from imprompt.generation.settings import Text
from imprompt.validation import Flag, Validated, one_of, suggestions

SchedulerName = Literal["default", "ddim"]


class Protocol(Validated, frozen=True):
    """Values that are equal for every item; `steps` and `guidance` of None are the model's own.

    The caption is used for the metrics whether it is given as the text or not. Picture k of item i
    has seed + i · seeds + k.
    """

    captions: Annotated[
        bool,
        Flag("--captions/--no-captions"),
        Field(description="Whether captions are given as text."),
    ] = True
    scale: Annotated[float, Field(ge=-10, le=10, description="Strength of the image prompt.")] = 1.0
    seeds: Annotated[int, Field(ge=1, description="Pictures per item.")] = 4
    scheduler: Annotated[
        SchedulerName,
        one_of(SchedulerName),
        Field(description="ddim, or default: the model's own."),
    ] = "default"
    steps: Annotated[int | None, Field(ge=1, description="Sampling steps.")] = None
    guidance: Annotated[float | None, Field(ge=0, le=1000, description="Guidance scale.")] = None
    negative_prompt: Annotated[
        Text, Flag("--negative"), Field(description="Text that guidance moves away from.")
    ] = ""
    limit: Annotated[int | None, Field(ge=1, description="Items, the first of the set.")] = None
    seed: Annotated[
        int,
        Field(
            ge=0, lt=2**62, description="Seed of the first picture; item i has seed + i × seeds."
        ),
    ] = 0
    batch_size: Annotated[
        int,
        Field(ge=1, description="Pictures made at once: another changes results by rounding."),
    ] = 4


# Section 4.1 of the paper (arXiv 2308.06721): COCO 2017 val, four pictures for each of 5,000, DDIM
# with 50 steps, guidance 7.5; the image prompt alone at scale 1. With a text it advises about 0.5.
PAPER = Protocol(
    captions=False, scale=1.0, seeds=4, scheduler="ddim", steps=50, guidance=7.5, limit=5000
)
CAPTIONED = PAPER.model_copy(update={"captions": True, "scale": 0.5})
PROTOCOLS = {
    "default": Protocol(scale=0.5),  # the model's own steps and guidance
    "paper": PAPER,
    "paper-captioned": CAPTIONED,
    "subjects": CAPTIONED.model_copy(update={"limit": None}),
}


def find_protocol(name: str, **changes: Any) -> Protocol:
    """Return the protocol of that name, with the changes that are not None applied.

    Raise SettingError for an unknown name or a wrong value.
    """
    if name not in PROTOCOLS:
        raise SettingError(f"unknown protocol {name!r}{suggestions(name, PROTOCOLS)}")
    return changed(
        PROTOCOLS[name], {key: value for key, value in changes.items() if value is not None}
    )


def changed(plan: Protocol, values: Mapping[str, Any]) -> Protocol:
    """Return the protocol with other values; SettingError."""
    whole: dict[str, Any] = {**plan.model_dump(), **values}
    return Protocol(**whole)


# Axes of a sweep, and the type of their values. The first three are fields of the protocol.
AXES: dict[str, Callable[[str], Any]] = {
    "scale": float,
    "guidance": float,
    "steps": int,
    "adapter": str,
    "blocks": str,
}
Sweep = Mapping[str, tuple[Any, ...]]


def read_sweep(lines: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Read ["scale=0,0.5,1", "steps=25,50"] as the values of every axis; SettingError."""
    sweep = {}
    for line in lines:
        name, _, values = line.partition("=")
        if name not in AXES:
            raise SettingError(f"--sweep {line}: unknown axis {name!r}{suggestions(name, AXES)}")
        if name in sweep:
            raise SettingError(
                f"--sweep {name} is given twice: give all its values at once, as {name}=A,B"
            )
        try:
            sweep[name] = tuple(
                AXES[name](value.strip()) for value in values.split(",") if value.strip()
            )
        except ValueError as error:
            raise SettingError(
                f"--sweep {line}: give numbers with commas between, such as {name}=1,2"
            ) from error
        if not sweep[name]:
            raise SettingError(f"--sweep {line}: give its values, such as {name}=1,2")
    return sweep


@dataclass(frozen=True)
class Setting:
    """One point of a sweep; its name is part of file names."""

    name: str
    axes: Mapping[str, Any]
    protocol: Protocol

    @property
    def adapter(self) -> str | None:
        """Adapter of the setting, None if the sweep does not vary it."""
        return self.axes.get("adapter")


def settings_of(plan: Protocol, sweep: Sweep) -> list[Setting]:
    """Return all points of a sweep, the last axis fastest.

    Without a sweep there is one point, called "all". Raise SettingError if a value is given twice.
    """
    for axis, values in sweep.items():
        value, often = Counter(values).most_common(1)[0]
        if often > 1:
            raise SettingError(
                f"--sweep: {axis}={value_name(value)} is given {often} times; give each value once"
            )
    points = [dict(zip(sweep, values, strict=True)) for values in product(*sweep.values())]
    names = unique_names(
        ",".join(f"{axis}={value_name(value)}" for axis, value in axes.items()) or "all"
        for axes in points
    )
    settings = []
    for name, axes in zip(names, points, strict=True):
        own = {axis: value for axis, value in axes.items() if axis in Protocol.model_fields}
        settings.append(Setting(name, axes, changed(plan, own)))
    return settings


def value_name(value: Any) -> str:
    """Return a value as a part of a setting's name.

    A number is as short as is exact; an absolute path is the name of its file or folder.
    """
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return Path(value).name if Path(str(value)).is_absolute() else str(value)
