"""Define `imprompt data encode`, which encodes a training set before training."""

import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imprompt.cli.recipes import AllowPipe, open_recipe
from imprompt.errors import ImpromptError, SettingError

if TYPE_CHECKING:
    from imprompt.training.feature_size import FeatureSize
    from imprompt.training.recipe import Recipe

PATIENCE = timedelta(days=7)  # how long a process waits for those with more to encode


def encode(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A TOML file, or recipes/NAME.toml of the package. Fills its data.features."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key, such as data.features=FOLDER.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--verify", help="Encode nothing; read a filled folder and name damaged files."
        ),
    ] = False,
    allow_pipe: AllowPipe = False,
) -> None:
    """Encode the pictures and captions of a training set once, as features for training.

    The same command again resumes. On several GPUs: torchrun --nproc-per-node 8 --no-python
    imprompt data encode RECIPE.
    """
    plan = open_recipe(recipe, overrides, allow_pipe)
    if plan.data.features is None:
        raise SettingError(
            f"{recipe} does not state where the features go: give --set data.features=FOLDER"
        )
    if check:
        verify(plan, plan.data.features)
    else:
        fill(plan, plan.data.features)


def verify(plan: "Recipe", folder: Path) -> None:
    """Read every file, of features and set; ImpromptError if one is not what it was."""
    from imprompt.training.cache import read_manifest
    from imprompt.training.cache import verify_folder as faults_of
    from imprompt.training.data_pipeline import refuse_edited

    if faults := faults_of(folder):
        raise ImpromptError(
            f"{'; '.join(faults)}. Remove what is damaged and run imprompt data encode again"
        )
    refuse_edited(plan, thorough=True)
    print(f"{folder}  {len(read_manifest(folder)['shards']):,} shards, none damaged")


def fill(plan: "Recipe", folder: Path) -> None:
    """Encode what is missing, together with the other processes of this launch."""
    import torch
    from accelerate import PartialState
    from rich.console import Console
    from rich.progress import Progress

    from imprompt.cli.console import quiet
    from imprompt.files import check_folder
    from imprompt.training.batches import RankSlice
    from imprompt.training.cache import read_manifest
    from imprompt.training.data_pipeline import encode_features
    from imprompt.training.endings import locked_features
    from imprompt.training.model import open_base, open_frozen
    from imprompt.training.sources import open_source

    start = time.monotonic()
    quiet()
    check_folder(folder)
    source = open_source(plan.data)  # its errors are raised before the models are loaded
    processes = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    device: Any = processes.device
    frozen = open_frozen(plan, open_base(plan, device, whole=True))
    console = Console(stderr=True)
    hidden = not (console.is_terminal and processes.is_main_process)
    with Progress(
        *Progress.get_default_columns(), console=console, transient=True, disable=hidden
    ) as progress:
        bar = progress.add_task("encoding", total=None)

        def on_done(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        def on_size(size: "FeatureSize") -> None:
            if processes.is_main_process:
                progress.console.print(f"{folder}  {size}", soft_wrap=True, markup=False)

        share = RankSlice(processes.process_index, processes.num_processes)
        with locked_features(folder, processes):
            encode_features(plan, source, frozen, share, on_done, on_size)
    if processes.is_main_process:
        totals = read_manifest(folder)["totals"]
        rows = (
            f"{totals['samples']:,} samples, {totals['bad']:,} bad, {totals['bytes'] / 1e6:,.1f} MB"
        )
        print(f"{folder}  {rows}, {time.monotonic() - start:.0f} s")
    processes.destroy_process_group()
