"""`imprompt` commands as processes of their own, which end by themselves or are killed, also in the middle of saving."""

import json
import multiprocessing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from transformers import CLIPImageProcessorPil, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from imprompt.training.recipe import Recipe
from tests.tiny import pipeline_parts, quiet, seeded, smallest_unet, tiny_text_encoder

# Processes are forked from one that has imported everything, and holds nothing of the tests that ran before.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
# Functions by which files come, go and reach the disk.
DISK = {"open", "mkdir", "fsync", "rename", "replace", "symlink", "unlink", "rmdir"}


def smallest_model(folder: Path) -> Path:
    """A pipeline whose UNet has four cross-attentions and whose image encoder has five tokens, as a user's folder."""
    parts = pipeline_parts("sd1") | {"unet": smallest_unet()}
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, projection_dim=24, num_hidden_layers=1, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    with seeded(1):
        parts["image_encoder"] = CLIPVisionModelWithProjection(config)
    side = config.image_size
    parts["feature_extractor"] = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    text_encoder = tiny_text_encoder(CLIPTextModel, parts["tokenizer"], 32, seed=7)
    pipeline = StableDiffusionPipeline(**parts, text_encoder=text_encoder, safety_checker=None, requires_safety_checker=False)
    quiet(pipeline).save_pretrained(folder)
    return folder


def written(plan: Recipe, path: Path) -> Path:
    """The recipe as a TOML file."""
    path.write_text("\n".join(toml(plan.model_dump(mode="json", exclude_none=True))))
    return path


def toml(group: Mapping[str, Any], name: str = "") -> Iterator[str]:
    """The lines of a table: its own values, then its groups. What JSON calls them TOML does, but for null."""
    if name:
        yield f"[{name}]"
    groups = {key: value for key, value in group.items() if isinstance(value, dict)}
    yield from (f"{key} = {json.dumps(value)}" for key, value in group.items() if key not in groups)
    for key, value in groups.items():
        yield from toml(value, f"{name}.{key}" if name else key)
