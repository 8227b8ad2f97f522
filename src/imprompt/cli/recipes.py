"""Read the recipes that commands are given."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from imprompt.training.recipe import Recipe

AllowPipe = Annotated[
    bool,
    typer.Option("--allow-pipe", help="Run the shell command of a pipe: source in the recipe."),
]


def open_recipe(path: Path, overrides: list[str] | None, allow_pipe: bool) -> "Recipe":
    """Read a recipe with overrides.

    Raise SettingError if its training set comes from shell commands and these are not allowed.
    """
    from imprompt.training.recipe import read_recipe
    from imprompt.training.sources import refuse_commands

    recipe = read_recipe(path, overrides or [])
    if not allow_pipe:
        refuse_commands(recipe.data)
    return recipe
