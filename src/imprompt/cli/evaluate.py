"""Define `imprompt evaluate`, which measures an adapter."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imprompt.cli.console import Force

if TYPE_CHECKING:
    from imprompt.cli.flags import GivenFields


WITHOUT_FLAG = {  # fields that have no flag, and why
    "Plan": {
        "path": "it is the command's argument",
        "out": "it is a parameter of the command",
        "protocol_name": "--protocol gives it",
        "protocol": "its own fields are flags",
        "sweep": "--sweep is read first",
    },
    "Protocol": {},
}


def evaluate_command() -> Callable[..., None]:
    """Return `evaluate_set` with its flags."""
    from imprompt.cli.flags import flags_of, with_flags
    from imprompt.evaluation.plan import Plan
    from imprompt.evaluation.protocols import Protocol

    of_plan = flags_of(Plan, WITHOUT_FLAG["Plan"])
    of_protocol = (
        flag._replace(own=False) for flag in flags_of(Protocol, WITHOUT_FLAG["Protocol"])
    )
    return with_flags(evaluate_set, [*of_plan, *of_protocol])


def evaluate_set(
    given_fields: "GivenFields",
    pictures: Annotated[
        Path,
        typer.Argument(
            metavar="SET",
            help="Folder: with metadata.jsonl, COCO's, or subjects.",
            show_default=False,
        ),
    ],
    protocol: Annotated[
        str,
        typer.Option(help="default, paper, paper-captioned or subjects; other options change it."),
    ] = "default",
    out: Annotated[
        Path, typer.Option(help="The run's folder; the same command again resumes it.")
    ] = Path("evaluation"),
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="scale=0,0.5,1 (also guidance, steps, adapter, blocks); several give all pairs."
        ),
    ] = None,
) -> None:
    """Make pictures for every item of a set and measure them."""
    from rich.console import Console
    from rich.progress import Progress

    from imprompt.cli.console import loading, quiet
    from imprompt.errors import SettingError
    from imprompt.evaluation.plan import Plan
    from imprompt.evaluation.protocols import Protocol, find_protocol, read_sweep, settings_of

    points, given = read_sweep(sweep or []), given_fields[Plan] | given_fields[Protocol]
    if twice := next((axis for axis in points if axis in given), ""):
        raise SettingError(f"--{twice} and --sweep {twice} are both given: give one of them")
    how = find_protocol(protocol, **given_fields[Protocol])
    settings_of(how, points)  # its errors are raised before torch is imported
    points_and_protocol = {"protocol_name": protocol, "protocol": how, "sweep": points}
    plan = Plan(path=pictures, out=out, **points_and_protocol, **given_fields[Plan])
    with loading():
        from imprompt.evaluation.run import evaluate

        quiet()
    main = not int(os.environ.get("RANK", "0"))  # only one process prints
    console = Console(stderr=True)
    visible = main and console.is_terminal
    with Progress(console=console, transient=True, disable=not visible) as progress:
        bar = progress.add_task("evaluating", total=None)

        def on_done(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        summary = evaluate(plan, on_done)
    if main:
        print_summary(summary)
        print(f"{out / 'summary.json'}  see it: imprompt evaluate report {out}")


def print_summary(summary: dict[str, Any]) -> None:
    """Print a row for every setting, with a column for every metric."""
    from rich.console import Console
    from rich.table import Table

    from imprompt.evaluation.metrics import METRICS

    there = [
        key for key in METRICS if any(key in setting["metrics"] for setting in summary["settings"])
    ]
    table = Table(
        "setting", "pictures", *(METRICS[key].title for key in there), box=None, pad_edge=False
    )
    for setting in summary["settings"]:
        cells = [interval_text(setting["metrics"].get(key), METRICS[key].digits) for key in there]
        table.add_row(setting["name"], f"{setting['count']:,}", *cells)
    width: dict[str, Any] = {} if os.isatty(1) else {"width": 250}
    Console(**width).print(table)
    for note in summary["notes"]:
        print(note)


def interval_text(interval: dict[str, float | None] | None, digits: int) -> str:
    """Return a value and half the width of its interval as text."""
    if interval is None or interval["value"] is None:
        return ""
    value, low, high = interval["value"], interval["low"], interval["high"]
    reach = "" if low is None or high is None else f" ± {(high - low) / 2:.{digits}f}"
    return f"{value:.{digits}f}{reach}"


PicturesNow = Annotated[
    Path | None,
    typer.Option("--set", help="The set's folder, if it is not where the run names it."),
]


def report(
    out: Annotated[Path, typer.Argument(help="A run's folder.")], pictures: PicturesNow = None
) -> None:
    """Write a run's tables, plots and pictures as one page, OUT/report.html."""
    from imprompt.evaluation.report import write_report

    print(write_report(out, pictures))


def compare(
    first: Annotated[Path, typer.Argument(help="A run's folder.")],
    second: Annotated[Path, typer.Argument(help="Another run's folder.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("comparison.html"),
    pictures: PicturesNow = None,
    force: Force = False,
) -> None:
    """Write a page that compares two runs over the items that both have, with intervals."""
    from imprompt.evaluation.page import is_page
    from imprompt.evaluation.report import write_comparison
    from imprompt.files import check_output

    # an older page of ours may be replaced: the same command writes it again
    check_output(out, [], force or (out.is_file() and is_page(out)))
    print(write_comparison(first, second, out, pictures))
