"""Small training runs: sets of a few pictures, tiny models saved as folders, and what a run
leaves.
"""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from imprompt.checkpoints.adapters import read_adapter
from imprompt.encoders.embedding_files import Embedding, save_embedding
from imprompt.files import sha256
from imprompt.projections.resampler import FacePlusProjection, Perceiver
from imprompt.training.loop import Run
from imprompt.training.recipe import Recipe
from imprompt.training.setup import set_up
from imprompt.training.watch import Metrics, Watcher
from imprompt.variants import TRAINABLE
from tests.tiny_pipelines import PIPELINES

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange")


def picture_folder(folder: Path) -> Path:
    """Seven pictures of different shapes, and their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, colour in enumerate(COLOURS):
        picture = Image.new("RGB", (80 + 16 * (number % 3), 64), colour)
        ImageDraw.Draw(picture).rectangle((20, 20, 40, 50), fill=COLOURS[number - 1])
        picture.save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a {colour} picture"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def stored_faces(folder: Path, feature: str = "raw face", width: int = 20) -> Path:
    """A file of random face embeddings of a folder's pictures, beside the folder."""
    hashes = tuple(sha256(path) for path in sorted(folder.glob("*.png")))
    faces = 5 * torch.randn(len(hashes), width, generator=torch.Generator().manual_seed(8))
    path = folder.with_name(f"{folder.name}-faces.safetensors")
    save_embedding(path, Embedding(faces, feature, "our-faces", "", hashes))
    return path


def of_variant(name: str, folder: Path) -> dict[str, Any]:
    """Keys of a recipe for a small adapter of that variant; faces are stored beside the set."""
    row = TRAINABLE[name]
    given = {
        "depth": 1 if issubclass(row.projection, Perceiver | FacePlusProjection) else None,
        "rank": 4 if row.lora else None,
        "faces": str(stored_faces(folder)) if row.faces else None,
    }
    return {"variant": name} | {key: value for key, value in given.items() if value is not None}


def saved_pipeline(folder: Path, base: str) -> Path:
    """A tiny model of that structure, with its image encoder, as a user's folder."""
    pipeline = PIPELINES[base]()
    pipeline.save_pretrained(folder)
    return folder


def recipe(source: Path | str, output: Path, steps: int = 6, **changes: Any) -> Recipe:
    """A run of the packaged model that logs every step.

    `changes` are keys of the recipe, groups merged.
    """
    values: dict[str, Any] = {
        "model": "emoji",
        "output": output,
        "save_every": 2,
        "check_base": False,  # most bases of tests are untrained
        "data": {
            "source": str(source),
            "drop_text": 0.2,
            "drop_image": 0.2,
            "drop_both": 0.2,
            "workers": 0,
        },
        # One precision for all tests: accelerate keeps one state per process.
        "optimization": {
            "steps": steps,
            "batch_size": 3,
            "learning_rate": 1e-3,
            "precision": "fp32",
        },
        "validation": {"shuffled_every": 0},
        "logging": {"every": 1, "to": []},
    }
    for key, change in changes.items():
        values[key] = values.get(key, {}) | change if isinstance(change, dict) else change
    return Recipe.model_validate(values)


def begun(recipe: Recipe) -> Run:
    """A run that is put together and has taken no step."""
    return Run(set_up(recipe, Watcher().encoded), Watcher())


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in Metrics(run).read() if "loss" in row]


def tensors(folder: Path) -> list[Tensor]:
    return read_adapter(folder).tensors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")
