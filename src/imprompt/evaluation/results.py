"""Read a finished run's folder for the pages."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from imprompt.errors import SettingError, first_line
from imprompt.untrusted import StoredTable, checked, read_json, read_json_lines

Row = dict[str, Any]  # one picture, as in rows.jsonl
Setting = dict[str, Any]  # name, axes, count, items, metrics, as in summary.json


class PictureRow(StoredTable):
    """A line of rows.jsonl: one picture, with its metrics as further keys."""

    __pydantic_extra__: dict[str, str | float | None]  # pyright: ignore[reportIncompatibleVariableOverride]
    setting: str
    item: str
    group: str = ""
    caption: str = ""
    seed: int
    image: str
    reference: str


class MetricSummary(StoredTable, extra="forbid"):
    """Mean of a metric in summary.json: the fields of `metrics.Interval`."""

    value: float | None
    low: float | None
    high: float | None


class SettingSummary(StoredTable):
    """A setting in summary.json."""

    name: str
    axes: dict[str, Any]
    count: int
    items: int
    metrics: dict[str, MetricSummary]


class RunFacts(StoredTable):
    """Content of run.json; a page shows what else there is."""

    set: dict[str, Any] | None = None
    judges: list[dict[str, Any]] | None = None


class Summary(StoredTable):
    """Content of summary.json."""

    run: RunFacts
    settings: list[SettingSummary]
    notes: tuple[str, ...] | list[str] = ()


@dataclass(frozen=True)
class Results:
    """Contents of a run's folder.

    `run` is run.json; `rows` are by setting and by item, in the order of the files.
    """

    folder: Path
    run: dict[str, Any]
    settings: list[Setting]
    notes: list[str]
    rows: dict[str, dict[str, list[Row]]]


def read_results(folder: Path) -> Results:
    """Read the folder of a finished run; SettingError if it is not one."""
    summary = _read(folder, "summary.json", read_json, Summary)
    lines = _read(folder, "rows.jsonl", read_json_lines, list[PictureRow])
    rows: dict[str, dict[str, list[Row]]] = {}
    for row in lines:
        rows.setdefault(row["setting"], {}).setdefault(row["item"], []).append(row)
    unmade = [setting["name"] for setting in summary["settings"] if setting["name"] not in rows]
    results = Results(folder, summary["run"], summary["settings"], summary.get("notes", []), rows)
    if unmade or not results.settings:
        raise SettingError(
            f"{folder} is not a finished run: "
            f"no pictures of {unmade[0] if unmade else 'any setting'} are in rows.jsonl"
        )
    return results


def _read(folder: Path, name: str, read: Callable[..., Any], form: Any) -> Any:
    """Return the content of a file that has the form of a type; else raise SettingError."""
    try:
        content = read(folder / name, lenient=True)
    except FileNotFoundError as error:
        raise SettingError(
            f"{folder} is not a finished run: it has no {name}; `imprompt evaluate run` writes it "
            "at its end"
        ) from error
    except (OSError, SettingError) as error:
        raise SettingError(
            f"{folder / name} cannot be read ({first_line(error)}); run the evaluation again"
        ) from error
    try:
        return checked(content, form, f"its {name}")
    except SettingError as error:
        raise SettingError(
            f"{folder} is not a finished run: {error}; run the evaluation again"
        ) from error


def known(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def cluster(row: Row) -> str:
    """Return the key of the pictures that are resampled together.

    They are the pictures of a subject if the set has subjects, otherwise those of an item.
    """
    return row.get("group") or row["item"]


def mean_of(rows: list[Row], key: str) -> float | None:
    """Return the mean of a metric over an item's pictures; None if none has it."""
    values = [row[key] for row in rows if known(row.get(key))]
    return fmean(values) if values else None


def axis_values(settings: list[Setting], axis: str) -> list[Any]:
    """Return the values of an axis in the order in which they occur, each once."""
    return list(
        {
            word(setting["axes"].get(axis)): setting["axes"].get(axis) for setting in settings
        }.values()
    )


def axes_of(settings: list[Setting]) -> list[str]:
    """Return the axes on which the settings differ."""
    names = list(dict.fromkeys(name for setting in settings for name in setting["axes"]))
    return [name for name in names if len(axis_values(settings, name)) > 1]


def numeric_axes(settings: list[Setting]) -> list[str]:
    """Return the axes that can be the x axis of a plot; the scale first."""
    found = [name for name in axes_of(settings) if all(map(known, axis_values(settings, name)))]
    return sorted(found, key=lambda name: name != "scale")


def word(value: Any, longest: int = 40) -> str:
    """Return a value of an axis as a label.

    A long one, which is usually a path, is cut at its start.
    """
    if known(value):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= longest else f"…{text[1 - longest :]}"


def label_of(setting: Mapping[str, Any]) -> str:
    """Return a label such as "scale 0.5 · guidance 3", or the name if nothing was swept."""
    return " · ".join(f"{name} {word(value)}" for name, value in setting["axes"].items()) or word(
        setting["name"]
    )
