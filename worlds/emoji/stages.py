"""The stages that make the world, and their command line, which the studies use too."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

from imprompt.errors import ImpromptError

from .train_utils import BUDGETS, World


@dataclass(frozen=True)
class Stage:
    """A function that takes a world, named as `module:function`.

    Its module is imported when the stage runs.
    """

    function: str
    seed_offset: int = 0  # added to the world's seed
    in_all: bool = True  # whether "all" runs this stage

    def run(self, world: World) -> None:
        """Import the function and call it with the world, its seed shifted by `seed_offset`."""
        module, _, function = self.function.partition(":")
        stage = getattr(import_module(module), function)
        stage(replace(world, seed=world.seed + self.seed_offset))


MAKING = {
    "vae": Stage("worlds.emoji.vae:train"),
    "decoder": Stage("worlds.emoji.vae:train_decoder"),
    "clip": Stage("worlds.emoji.clip:train"),
    "pool": Stage("worlds.emoji.pool:fill_pool"),
    "unet": Stage("worlds.emoji.base:train_unet"),
    "assemble": Stage("worlds.emoji.assemble:assemble"),
    "scenes": Stage("worlds.emoji.assemble:scenes"),
    "adapters": Stage("worlds.emoji.assemble:adapters"),
    "ship": Stage("worlds.emoji.assemble:ship"),
    "control": Stage("worlds.emoji.control:train"),
    "flat": Stage("worlds.emoji.style:train_flat"),
    "lines": Stage("worlds.emoji.style:train_lines"),
    "dit": Stage("worlds.emoji.base:train_dit", in_all=False),
    "mmdit": Stage("worlds.emoji.base:train_mmdit", in_all=False),
    "transformer-adapters": Stage("worlds.emoji.assemble:transformer_adapters", in_all=False),
}


def main(
    program: str,
    description: str | None,
    stages: Mapping[str, Stage],
    *,
    before: Mapping[str, Stage] | None = None,
    budgets: tuple[Path, ...] = (BUDGETS,),
) -> None:
    """Run the stage that the command line names, or "all": those of `before`, then of `stages`.

    Ends the process with the message of an ImpromptError.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("stage", choices=(*stages, "all"))
    parser.add_argument("--budget", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument(
        "--folder", type=Path, default=None, help="folder for states and models (runs/emoji-BUDGET)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--steps",
        type=int,
        default=None,
        help="maximum steps of any stage, for a rehearsal (make rehearse)",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
    folder = args.folder or Path("runs") / f"emoji-{args.budget}"
    world = World(args.budget, folder, most=args.steps, budgets=budgets)
    world.folder.mkdir(parents=True, exist_ok=True)
    wanted = [stages[args.stage]] if args.stage in stages else []
    if args.stage == "all":
        wanted = [one for one in (*(before or {}).values(), *stages.values()) if one.in_all]
    try:
        for stage in wanted:
            stage.run(world)
    except ImpromptError as error:
        raise SystemExit(str(error)) from error
