"""Define `imprompt data check`, which reads a training set before training."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imprompt.cli.recipes import AllowPipe, open_recipe

if TYPE_CHECKING:
    from imprompt.training.check import Finding, SetReport
    from imprompt.training.recipe import Data

Row = tuple[str, str, list[str]]  # what, how many, examples


class Captions(StrEnum):
    """Rule for samples without a caption."""

    required = "required"
    optional = "optional"


def check(
    source: Annotated[
        str,
        typer.Argument(
            help="A source as in a recipe's data.source (a folder, list.json, …), or a recipe.toml."
        ),
    ],
    root: Annotated[
        Path | None,
        typer.Option(help="Where the pictures of a JSON list are; its own folder if not given."),
    ] = None,
    captions: Annotated[
        Captions | None, typer.Option(help="Whether a sample without a caption is unusable.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Training size in pixels, to count smaller pictures.")
    ] = None,
    headers: Annotated[
        bool,
        typer.Option("--headers", help="Read the pictures' headers only: quicker, finds less."),
    ] = False,
    examples: Annotated[int, typer.Option(min=0, help="Names to show for each finding.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    allow_pipe: AllowPipe = False,
) -> None:
    """Read a training set and report unusable samples, picture sizes and duplicates.

    Exit code 0 if all of it can be used, 1 if not.
    """
    from rich.console import Console
    from rich.progress import Progress

    from imprompt.training import check as checking
    from imprompt.training.sources import open_source

    given = {"root": root, "captions": captions and captions.value, "size": size}
    data = data_of(source, allow_pipe).model_copy(
        update={key: value for key, value in given.items() if value is not None}
    )
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reading", total=None)
        report = checking.check_set(
            open_source(data),
            not headers,
            lambda done, total: progress.update(bar, completed=done, total=total),
            training_size=data.size,
            examples=examples,
        )
    print(
        json.dumps(asdict(report), ensure_ascii=False, indent=2)
        if as_json
        else table(finding_rows(report, data.size))
    )
    if not report.fine:
        raise typer.Exit(1)


def data_of(source: str, allow_pipe: bool) -> "Data":
    """Return the data of a recipe, or the data for a bare source."""
    from imprompt.training.recipe import Data

    if source.endswith(".toml"):
        return open_recipe(Path(source), None, allow_pipe).data
    return Data(source=source)


def finding_rows(report: "SetReport", size: int | None) -> list[Row]:
    """Return the report line by line."""

    def row(what: str, finding: "Finding | None") -> Row:
        return (
            (what, f"{finding.count:,}", finding.examples)
            if finding
            else (what, "not looked for", [])
        )

    def plain(what: str, count: int) -> Row:
        return what, f"{count:,}", []

    few = ((f"smaller than {size}", report.too_small), ("without a caption", report.uncaptioned))
    return [
        plain("samples", report.samples),
        plain("usable", report.usable),
        *(row(f"unusable: {kind}", finding) for kind, finding in report.unusable.items()),
        *([row("unusable shards", report.bad_shards)] if report.bad_shards.count else []),
        *(row(what, finding) for what, finding in few if finding and finding.count),
        row("duplicate pictures", report.duplicates),
        row("repeated captions", report.repeated_captions),
        *(
            [("smallest", report.smallest or "", []), ("largest", report.largest or "", [])]
            if report.usable
            else []
        ),
        *(plain(f"short side {side}", count) for side, count in report.short_sides.items()),
        *(plain(f"aspect {aspect}", count) for aspect, count in report.aspects.items()),
    ]


def table(lines: list[Row]) -> str:
    """Return rows as text in columns, with examples below each."""
    wide = max(len(what) for what, _, _ in lines)
    return "\n".join(
        "\n".join(
            [f"{what:{wide}}  {value}", *(f"{'':{wide}}    {example}" for example in examples)]
        )
        for what, value, examples in lines
    )
