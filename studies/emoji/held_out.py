"""A set for `imprompt evaluate`: scenes that are not used in any training."""

from worlds.emoji.assemble import write_scenes
from worlds.emoji.train_utils import World

from .paths import HELD_OUT

COUNT = 32


def held_out(world: World) -> None:
    """Write the set into the studies' folder."""
    write_scenes(world, HELD_OUT, COUNT, 52)
