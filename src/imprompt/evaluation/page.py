"""Fill the templates of the pages: numbers as text, plots, and a run's facts as lines."""

import json
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from imprompt.errors import SettingError, first_line
from imprompt.evaluation.contact import MISSING, Thumbnails
from imprompt.evaluation.metrics import METRICS
from imprompt.evaluation.plots import curve, dots, drawable, trade
from imprompt.evaluation.results import Setting, axes_of, axis_values, known, numeric_axes, word
from imprompt.files import atomic_write
from imprompt.generation.record import recorded_path

NONE = "–"
GENERATOR = b'<meta name="generator" content="imprompt">'
VERSIONS = ("imprompt", "torch", "diffusers", "transformers", "device", "dtype")
HEADLINE = ("clip_i", "clip_t")
DRAWN = (*HEADLINE, "dino", "diversity", "fid", "kid")  # the others follow CLIP-T


class Figure(NamedTuple):
    """Plots that are shown together, under a title."""

    title: str
    panels: list[Markup]


def write_page(path: Path, template: str, thumbnails: Thumbnails, **values: Any) -> Path:
    """Write a page from a template of `pages/`; everything except our own SVG is escaped.

    Raise SettingError if the page cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("imprompt.evaluation", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": metric_text, "change": change}
    named = [
        said.replace(place, recorded_path(Path(place), path.parent).as_posix())
        for place, said in thumbnails.missing.items()
    ]
    text = environment.get_template(template).render(
        METRICS=METRICS, NONE=NONE, missing=named, MISSING=MISSING, **values
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            # file names need not be Unicode
            temporary.write_text(text, "utf-8", errors="backslashreplace")
    except OSError as error:
        raise SettingError(
            f"{path} cannot be written ({first_line(error)}); give another place"
        ) from error
    return path


def is_page(path: Path) -> bool:
    """Return whether a file is a page that `write_page` wrote."""
    with path.open("rb") as file:
        return GENERATOR in file.read(1000)


def metric_text(value: object, key: str) -> str:
    """Return a metric's value with its digits, or a dash if it is missing or not a number."""
    return f"{value:.{METRICS[key].digits}f}" if known(value) else NONE


def change(value: object, key: str) -> str:
    """Return a metric's difference with its sign (a real minus) and digits, or a dash."""
    return f"{value:+.{METRICS[key].digits}f}".replace("-", "−") if known(value) else NONE


def measured(settings: list[Setting]) -> list[str]:
    """Return the metrics that at least one setting has, in the order of the table."""
    return [key for key in METRICS if drawable(settings, key)]


def figures(settings: list[Setting]) -> list[Figure]:
    """Return curves of the metrics along every numeric axis, and CLIP-T against CLIP-I.

    If no axis is numeric, return the metrics by setting; for one setting, nothing.
    """
    drawn = [key for key in DRAWN if drawable(settings, key)]
    if len(settings) < 2:
        return []
    axes = numeric_axes(settings)
    if not axes:
        return [
            Figure(
                "By setting, with 95 % intervals", [Markup(dots(settings, key)) for key in drawn]
            )
        ]
    return [
        Figure(
            ", ".join((f"Over {axis}", *also)) + ", with 95 % intervals",
            list(map(Markup, _along(part, drawn, axis, axis == axes[0]))),
        )
        for axis in axes
        for also, part in _parts(settings, axis)
    ]


def _parts(settings: list[Setting], axis: str) -> Iterator[tuple[list[str], list[Setting]]]:
    """Yield groups of settings for one plot each, with the values that they share.

    The lines of a plot vary in the last axis other than `axis`; all further axes are fixed.
    """
    further = [name for name in axes_of(settings) if name != axis][:-1]
    for values in product(*(axis_values(settings, name) for name in further)):
        wanted = dict(zip(further, values, strict=True))
        part = [
            one
            for one in settings
            if all(one["axes"].get(name) == value for name, value in wanted.items())
        ]
        if len(axis_values(part, axis)) > 1:
            yield [f"{name} {word(value)}" for name, value in wanted.items()], part


def _along(settings: list[Setting], drawn: list[str], axis: str, first: bool) -> Iterator[str]:
    yield from (curve(settings, key, axis) for key in drawn if key in HEADLINE)
    if first and set(HEADLINE) <= set(drawn):  # along another axis they would be the same points
        yield trade(settings, *HEADLINE, axis)
    yield from (curve(settings, key, axis) for key in drawn if key not in HEADLINE)


def run_facts(run: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Return what was run: a title -> lines of names and values."""
    rows = {
        name: lines_of(value)
        for name, value in run.items()
        if name not in VERSIONS and value not in ({}, [], None)
    }
    versions = {name: str(run[name]) for name in VERSIONS if name in run}
    return rows | ({"made with": [versions]} if versions else {})


def lines_of(value: Any) -> list[dict[str, str]]:
    """Return nested values as lines of names and values."""
    if isinstance(value, list):
        return [line for one in value for line in lines_of(one)]
    if isinstance(value, Mapping):
        return [{str(name): as_text(one) for name, one in value.items() if one not in (None, "")}]
    return [{"": as_text(value)}]


def as_text(value: Any) -> str:
    """Return a value as text: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def dotted(value: Any, name: str = "") -> dict[str, str]:
    """Flatten nested settings to a mapping from dotted name to value."""
    parts = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    found = {
        key: text
        for part, one in parts
        for key, text in dotted(one, f"{name}.{part}" if name else str(part)).items()
    }
    return found or {name: as_text(value)}


def display_name(value: Any) -> str:
    """Return the name of a model, an adapter or a set, or of several."""
    if isinstance(value, list):
        return ", ".join(map(display_name, value))
    title = (
        (value.get("name") or value.get("path") or "")
        if isinstance(value, Mapping)
        else value or ""
    )
    return Path(str(title)).name
