"""Write a finished run as one page, and as a table for the terminal."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imprompt.evaluation import contact
from imprompt.evaluation.comparison import write_comparison
from imprompt.evaluation.contact import Card, Thumbnails, contact_sheet, evenly_spread, extremes
from imprompt.evaluation.metrics import METRICS
from imprompt.evaluation.page import (
    NONE,
    display_name,
    figures,
    measured,
    metric_text,
    run_facts,
    write_page,
)
from imprompt.evaluation.results import Results, Setting, known, label_of, read_results

__all__ = ["report_table", "write_comparison", "write_report"]


def write_report(folder: Path, pictures: Path | None = None) -> Path:
    """Write `folder`/report.html, which needs no other file.

    Raise SettingError if `folder` does not hold a finished run.

    pictures  folder of the set, if it is not where the run names it
    """
    results = read_results(folder, pictures)
    thumbnails = Thumbnails()
    return write_page(
        folder / "report.html",
        "report.html.jinja",
        thumbnails,
        title=title_of(results),
        notes=[*results.notes, *filter(None, [results.unseen])],
        facts=run_facts(results.run),
        run=json.dumps(results.run, indent=2, ensure_ascii=False),
        settings=[(label_of(setting), setting) for setting in results.settings],
        metrics=measured(results.settings),
        best=best(results.settings),
        figures=figures(results.settings),
        sheet=contact_sheet(results, thumbnails),
        sheet_rule=sheet_rule(results),
        extremes=all_extremes(results, thumbnails),
        rule={"extremes": contact.EXTREMES, "seeds": contact.SEEDS},
    )


def title_of(results: Results) -> str:
    """Return a title such as "emoji + base on scenes", or the folder's name if nothing is known."""
    run = results.run
    what = " + ".join(
        filter(
            None,
            (
                display_name(run.get("model")),
                display_name(run.get("adapters") or run.get("adapter")),
            ),
        )
    )
    where = display_name(run.get("set"))
    return " on ".join(filter(None, (what, where))) or results.folder.resolve().name


def best(settings: list[Setting]) -> dict[str, float]:
    """Return the best value of each metric that has a better side and more than one value.

    None is the best where one of them is of too few pictures: see `Metric.least`.
    """
    found: dict[str, float] = {}
    for key, metric in METRICS.items():
        values = [
            one["metrics"][key]["value"]
            for one in settings
            if known(one["metrics"].get(key, {}).get("value"))
        ]
        if metric.higher_is_better is None or len(values) < 2:
            continue
        if all(one["count"] >= metric.least for one in settings):
            found[key] = (max if metric.higher_is_better else min)(values)
    return found


def sheet_rule(results: Results) -> str:
    """Return a sentence that states which pictures the contact sheet shows."""
    settings = len(results.settings)
    items = len({item for rows in results.rows.values() for item in rows})
    sheet_count = min(items, contact.sheet_items(settings))
    what = (
        "All items"
        if sheet_count == items
        else f"{sheet_count} of {items:,} items, evenly spread over the set"
    )
    seeds = contact.sheet_seeds(settings)
    by = "the first seed" if seeds == 1 else f"the first {seeds} seeds at most"
    columns = (
        f"{contact.COLUMNS} of {settings} settings, evenly spread"
        if settings > contact.COLUMNS
        else "every setting"
    )
    return f"{what}; {by} of {columns}. Not chosen by how they look."


def all_extremes(
    results: Results, thumbnails: Thumbnails
) -> list[tuple[str, list[Card], list[Card]]]:
    """Return (label, best cards, worst cards) of settings that have CLIP-I and two items.

    At most DETAILED settings are shown, evenly spread.
    """
    with_both = [
        one for one in results.settings if len(contact.ranked(results.rows[one["name"]])) > 1
    ]
    return [
        (label_of(one), *extremes(results, one, thumbnails))
        for one in evenly_spread(with_both, contact.DETAILED)
    ]


def report_table(summary: Mapping[str, Any]) -> str:
    """Return settings and metrics as a Markdown table with aligned columns.

    Each value has its 95 % interval.
    """
    settings = summary["settings"]
    keys = measured(settings)
    lines = [["setting", "pictures", *(METRICS[key].title for key in keys)]]
    for one in settings:
        lines.append(
            [
                label_of(one).replace("|", "\\|"),
                f"{one['count']:,}",
                *(_cell(one["metrics"].get(key), key) for key in keys),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(_straight(line, widths))} |" for line in lines)


def _straight(cells: list[str], widths: list[int]) -> list[str]:
    """Align the first cell to the left of its column and the others to the right."""
    return [
        cells[0].ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
    ]


def _cell(found: Mapping[str, Any] | None, key: str) -> str:
    if not found or not known(found["value"]):
        return NONE
    within = (
        f" ({metric_text(found['low'], key)} to {metric_text(found['high'], key)})"
        if known(found["low"])
        else ""
    )
    return metric_text(found["value"], key) + within
