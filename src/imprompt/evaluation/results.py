"""Read a finished run's folder for the pages."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field

from imprompt.errors import SettingError, first_line
from imprompt.files import sha256
from imprompt.generation.record import recorded_path
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
    sha256: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """Contents of a run's folder.

    `run` is run.json, without the user's folders; `rows` are by setting and by item, in the order
    of the files. `pictures` is the folder from which rows name their image prompts; `unseen` says
    what to do if there is none.
    """

    folder: Path
    run: dict[str, Any]
    settings: list[Setting]
    notes: list[str]
    rows: dict[str, dict[str, list[Row]]]
    pictures: Path
    unseen: str = ""


def read_results(folder: Path, pictures: Path | None = None) -> Results:
    """Read the folder of a finished run; SettingError if it is not one.

    pictures  folder of the set, if it is not where run.json names it
    """
    if pictures is not None and not pictures.is_dir():
        raise SettingError(f"--set {pictures}: there is no such folder; give that of the run's set")
    summary = _read(folder, "summary.json", read_json, Summary)
    lines = _read(folder, "rows.jsonl", read_json_lines, list[PictureRow])
    rows: dict[str, dict[str, list[Row]]] = {}
    _check_hash(folder, summary)
    for row in lines:
        rows.setdefault(row["setting"], {}).setdefault(row["item"], []).append(row)
    unmade = [setting["name"] for setting in summary["settings"] if setting["name"] not in rows]
    run = without_folders(summary["run"], folder)
    settings = _named_from(folder, summary["settings"])
    named = str((run.get("set") or {}).get("path", ""))
    found = pictures or find_set(named, folder)
    results = Results(
        folder,
        run,
        settings,
        summary.get("notes", []),
        rows,
        found or folder,
        "" if found else not_found(named),
    )
    if unmade or not results.settings:
        raise SettingError(
            f"{folder} is not a finished run: "
            f"no pictures of {unmade[0] if unmade else 'any setting'} are in rows.jsonl"
        )
    return results


def not_found(named: str) -> str:
    """Return a note for a page whose image prompts are in a set that was not found."""
    return f"The set {named!r} was not found: give its folder as --set to show the image prompts."


def find_set(named: str, folder: Path) -> Path | None:
    """Return the folder of a set that the run in `folder` names, if it is there."""
    places = (folder / named, Path(named))
    return next((place for place in places if place.is_dir()), None)


def without_folders(value: Any, folder: Path, root: str = "") -> Any:
    """Return values of a run's record with paths from `folder`, or names, for absolute paths.

    root  folder of the set, which is left out of texts
    """
    if isinstance(value, Mapping):
        place = value.get("path")
        inside = place if isinstance(place, str) else root
        return {name: without_folders(one, folder, inside) for name, one in value.items()}
    if isinstance(value, list):
        return [without_folders(one, folder, root) for one in value]
    if not isinstance(value, str):
        return value
    if Path(value).is_absolute():
        return recorded_path(Path(value), folder).as_posix()
    return value.replace(f"{root}/", "") if root else value


def _named_from(folder: Path, settings: list[Setting]) -> list[Setting]:
    """Return settings whose axes name no folder of the user, if this keeps them apart."""
    shown = [one | {"axes": without_folders(one["axes"], folder)} for one in settings]
    return shown if len({label_of(one) for one in shown}) == len(shown) else settings


def _check_hash(folder: Path, summary: Mapping[str, Any]) -> None:
    """Raise SettingError if the rows are not those that the summary is of, by their hash."""
    wanted = summary.get("sha256", {}).get("rows.jsonl")
    if wanted and wanted != sha256(folder / "rows.jsonl"):
        raise SettingError(
            f"{folder / 'rows.jsonl'} was changed since the run: the same `imprompt evaluate run` "
            "writes it again"
        )


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
