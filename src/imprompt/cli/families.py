"""`imprompt families`: the base models that take image prompts."""

from typing import Annotated

import typer


def families_command(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the whole table, as docs/families.md has it.")
    ] = False,
) -> None:
    """List the base models that take image prompts, and how each is used."""
    from imprompt.cli.console import print_rows, quiet
    from imprompt.families.table import as_markdown, family_lines, refusal_lines

    quiet()
    if markdown:
        typer.echo(as_markdown(), nl=False)
        return
    print_rows(
        [
            (
                line.family,
                f"{line.model}; guidance in {line.guidance}; trains: {line.train}; "
                f"pipelines: {len(line.whole)} whole, {len(line.attached)} by adapter.using, "
                f"{len(line.not_run)} not run, {len(line.refused)} refused",
            )
            for line in family_lines()
        ]
    )
    print_rows([(name.strip("`"), why) for name, why in refusal_lines()])  # fmt: skip
