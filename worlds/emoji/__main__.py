"""`python -m worlds.emoji STAGE --budget cpu|gpu`: from nothing to the shipped weights, a stage at
a time.
"""

import argparse
import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

from .stage import World

STAGES = {  # name -> module, function, and how far its seed is from the world's
    "vae": ("vae", "train", 0),
    "decoder": ("vae", "train_decoder", 0),
    "clip": ("clip", "train", 0),
    "judge": ("clip", "train_judge", 1000),
    "namer": ("namer", "train_namer", 2000),
    "hands": ("namer", "train_hands", 2000),
    "pool": ("pool", "fill_pool", 0),
    "unet": ("unet", "train", 0),
    "assemble": ("assemble", "assemble", 0),
    "probes": ("probes", "probe", 0),
    "scenes": ("assemble", "scenes", 0),
    "held-out": ("assemble", "held_out", 0),
    "adapters": ("assemble", "adapters", 0),
    "optimizers": ("optimizers", "compare", 0),
    "ship": ("assemble", "ship", 0),
    "evaluate": ("evaluate", "evaluate", 0),
    "control": ("control", "train", 0),
    "flat": ("style", "train_flat", 0),
    "lines": ("style", "train_lines", 0),
    "compose": ("compose", "compose", 0),
    "blind": ("blind", "blind", 0),
    "rivals": ("rivals", "train_all", 0),
    "claims": ("page", "measure_all", 0),
}

# studies, which make nothing that ships
APART = ("optimizers", "blind", "compose", "rivals", "claims")
ALL = [name for name in STAGES if name not in APART]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m worlds.emoji", description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--budget", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument(
        "--folder", type=Path, default=None, help="where states and models go (runs/emoji-BUDGET)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--steps",
        type=int,
        default=None,
        help="of any stage at most, for a rehearsal: make rehearse",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
    world = World(
        args.budget, args.folder or Path("runs") / f"emoji-{args.budget}", most=args.steps
    )
    world.folder.mkdir(parents=True, exist_ok=True)
    for name in ALL if args.stage == "all" else (args.stage,):
        module, function, apart = STAGES[name]
        stage = getattr(import_module(f".{module}", __package__), function)
        stage(replace(world, seed=world.seed + apart))


if __name__ == "__main__":
    main()
