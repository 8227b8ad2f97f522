"""`python -m worlds.emoji STAGE --budget cpu|gpu`: from nothing to the shipped weights, a stage at a time."""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

from . import clip, unet, vae
from .stage import World

STAGES = {
    "vae": vae.train,
    "clip": clip.train,
    "judge": lambda world: clip.train(World(world.budget, world.folder, seed=world.seed + 1000), "judge"),
    "unet": unet.train,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m worlds.emoji", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--budget", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--folder", type=Path, default=None, help="where states and models go (runs/emoji-BUDGET)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
    world = World(args.budget, args.folder or Path("runs") / f"emoji-{args.budget}")
    world.folder.mkdir(parents=True, exist_ok=True)
    STAGES[args.stage](world)


if __name__ == "__main__":
    main()
