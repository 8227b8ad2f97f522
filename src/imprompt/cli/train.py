"""`imprompt train`."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(train)


def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML file: see recipes/.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change a key, such as optimization.steps=100.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and touch nothing.")] = False,
) -> None:
    """Train an adapter. The same command again resumes; RUN/latest is a loadable adapter at any time."""
    from imprompt.training.recipe import read_recipe

    plan = read_recipe(recipe, overrides or [])
    if dry_run:
        print(plan.model_dump_json(indent=2))
        return
    from rich.progress import Progress, TextColumn

    from imprompt.cli import quiet
    from imprompt.training import loop

    quiet()

    class Bars(loop.Watcher):
        """Progress bars in the terminal."""

        def encoded(self, done: int, total: int) -> None:
            progress.update(encoding, completed=done, total=total)

        def stepped(self, step: int, steps: int, loss: float, rate: float) -> None:
            progress.update(training, completed=step, total=steps, note=f"loss {loss:.4f}  {rate:.0f} samples/s")

        def saved(self, folder: Path) -> None:
            progress.console.print(f"saved {folder}")

    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}")) as progress:
        encoding = progress.add_task("encoding pictures", total=None, note="")
        training = progress.add_task("training", total=None, note="")
        last = loop.train(plan, Bars())
    print(f"{last}  use it: imprompt generate IMAGE --model {plan.model} --adapter {last}")
