"""Define `imprompt train`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from imprompt.cli.recipes import AllowPipe, open_recipe


def train_command(
    recipe: Annotated[
        Path, typer.Argument(help="A TOML file, or recipes/NAME.toml of the package.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key, such as optimization.steps=100."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved recipe, sizes, memory and time; touch nothing."
        ),
    ] = False,
    allow_pipe: AllowPipe = False,
) -> None:
    """Train an adapter.

    The same command again resumes. RUN/latest is a loadable adapter at any time. Ctrl-C saves a
    state first; a second Ctrl-C ends at once.
    """
    plan = open_recipe(recipe, overrides, allow_pipe)
    if dry_run:
        from imprompt.cli.console import print_rows
        from imprompt.training.estimate import estimate_rows, estimate_run
        from imprompt.training.model import best_device

        print(plan.model_dump_json(indent=2))
        print_rows(estimate_rows(estimate_run(plan, best_device())))
        return
    from imprompt.cli.console import quiet
    from imprompt.training.loop import train
    from imprompt.training.watch import ProgressWatcher, Watcher

    quiet()
    if int(os.environ.get("RANK", "0")):  # only one process prints
        train(plan, Watcher())
        return
    with ProgressWatcher(plan.optimization.steps) as watcher:
        last = train(plan, watcher)
    encoder = f" --encoder {plan.encoder}" if plan.encoder else ""
    print(f"{last}  use it: imprompt generate IMAGE --model {plan.model} --adapter {last}{encoder}")
