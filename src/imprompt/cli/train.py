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
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    from imprompt.cli import quiet
    from imprompt.training import loop

    quiet()

    class Bars(loop.Watcher):
        """Progress bars in the terminal."""

        def encoded(self, done: int, total: int) -> None:
            progress.update(encoding, completed=done, total=total)

        def stepped(self, step: int, steps: int, loss: float, rate: float) -> None:
            note = f"loss {loss:.4f}  {rate:.0f} samples/s"
            progress.update(training, completed=step, total=steps, note=note)
            if not console.is_terminal:
                print(f"step {step} of {steps}  {note}", flush=True)

        def saved(self, folder: Path) -> None:
            console.print(f"saved {folder}", soft_wrap=True, markup=False, highlight=False)

    console = Console()
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        encoding = progress.add_task("encoding pictures", total=None, note="")
        training = progress.add_task("training", total=None, note="")
        last = loop.train(plan, Bars())
    print(f"{last}  use it: imprompt generate IMAGE --model {plan.model} --adapter {last}")
