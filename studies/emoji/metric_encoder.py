"""The metric encoder: a CLIP like the world's own, of another seed and size.

It only measures; it conditions nothing.
"""

import shutil

import torch
from transformers import CLIPModel

from worlds.emoji import clip
from worlds.emoji.train_utils import World

from .paths import METRIC_ENCODER

NAME = "metric-encoder"


def train(world: World) -> None:
    """Train the metric encoder, and save it as float16 into the studies' weights."""
    clip.train(world, NAME)
    folder = world.folder / NAME
    whole = CLIPModel.from_pretrained(folder / "whole", dtype=torch.float16)
    whole.save_pretrained(METRIC_ENCODER)
    for part in ("tokenizer", "feature_extractor"):
        shutil.copytree(folder / part, METRIC_ENCODER, dirs_exist_ok=True)
