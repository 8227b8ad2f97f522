"""Pictures and captions -> the features that training reads, encoded once.

Shape letters as in `imprompt.adapter`; C latent channels, h and w their height and width.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from imprompt.encoders.vision import VisionEncoder
from imprompt.errors import ImageError, SettingError
from imprompt.images import open_image
from imprompt.training.recipe import Data
from imprompt.variants import Variant

CHUNK = 64  # pictures encoded at once
OnPicture = Callable[[int, int], None]  # (done, in all)


@dataclass(frozen=True)
class Features:
    """What the models made of every picture and caption, in float16 on the CPU."""

    mean: Tensor  # (samples, C, h, w) of the VAE's posterior, unscaled
    spread: Tensor  # (samples, C, h, w) its standard deviation
    image: Tensor  # (samples, E) or (samples, patches, E)
    text: Tensor  # (captions, T, D) of the different captions; the last is the empty one
    caption: Tensor  # (samples,) row of `text`
    null_image: Tensor  # (1, E) or (1, patches, E)

    def __len__(self) -> int:
        return len(self.caption)


def read_metadata(folder: Path) -> list[tuple[Path, str]]:
    """(picture, caption) of every line of metadata.jsonl; SettingError, with the line's number, if it is wrong."""
    listing = folder / "metadata.jsonl"
    if not listing.exists():
        raise SettingError(f'{folder} holds no metadata.jsonl, one line per picture: {{"file_name": "0001.png", "text": "a cat"}}')
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise SettingError(f"{listing} is no UTF-8 text") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((folder / row["file_name"], str(row.get("text") or "")))
        except (ValueError, KeyError, TypeError) as error:
            raise SettingError(f'{listing}, line {number}: not of the form {{"file_name": …, "text": …}}') from error
    if not rows:
        raise SettingError(f"{listing} is empty")
    return rows


@torch.no_grad()
def encode(data: Data, pipeline: Any, encoder: VisionEncoder, variant: Variant, on_picture: OnPicture) -> Features:
    """Run the VAE, the image encoder and the text encoder once over the whole set."""
    rows = read_metadata(data.folder)
    size = data.size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    parts: dict[str, list[Tensor]] = {"mean": [], "spread": [], "image": []}
    for start in range(0, len(rows), CHUNK):
        pictures = list(load_pictures([path for path, _ in rows[start : start + CHUNK]]))
        pixels = pipeline.image_processor.preprocess([ImageOps.fit(p, (size, size), Image.Resampling.LANCZOS) for p in pictures])
        posterior = pipeline.vae.encode(pixels.to(pipeline.vae.device, pipeline.vae.dtype)).latent_dist
        for key, value in (
            ("mean", posterior.mean),
            ("spread", posterior.std),
            ("image", encoder.features(pictures, variant.feature)),
        ):
            parts[key].append(value.to("cpu", torch.float16))
        on_picture(min(start + CHUNK, len(rows)), len(rows))
    captions = [*dict.fromkeys(text for _, text in rows if text), ""]
    row_of = {text: row for row, text in enumerate(captions)}
    return Features(
        **{key: torch.cat(values) for key, values in parts.items()},
        text=encode_text(pipeline, captions),
        caption=torch.tensor([row_of[text] for _, text in rows]),
        null_image=encoder.null_features(variant).to("cpu", torch.float16),
    )


def load_pictures(paths: Sequence[Path]) -> Iterator[Image.Image]:
    for path in paths:
        try:
            yield open_image(path)
        except ImageError as error:
            raise SettingError(f"the training set cannot be used: {error}") from error


def encode_text(pipeline: Any, captions: Sequence[str]) -> Tensor:
    """Captions -> (captions, T, D), by the pipeline's own text encoding."""
    parts = []
    for start in range(0, len(captions), CHUNK):
        chunk = list(captions[start : start + CHUNK])
        embeddings, _ = pipeline.encode_prompt(chunk, pipeline.device, 1, False)
        parts.append(embeddings.to("cpu", torch.float16))
    return torch.cat(parts)


@dataclass(frozen=True)
class Batch:
    """What one step reads: scaled latents (B, C, h, w), image features, text embeddings (B, T, D)."""

    latents: Tensor
    image: Tensor
    text: Tensor


def batch_rows(step: int, size: int, samples: int, seed: int) -> Tensor:
    """The rows of one step (size,): every epoch is a new order of all samples; a function of step and seed alone."""
    positions = torch.arange(step * size, (step + 1) * size)
    rows = torch.empty(size, dtype=torch.long)
    for epoch in (positions // samples).unique().tolist():
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        here = positions // samples == epoch
        rows[here] = order[positions[here] % samples]
    return rows


def take(features: Features, rows: Tensor, data: Data, scaling: float, generator: torch.Generator) -> Batch:
    """The batch of these rows: latents drawn from their posterior; text, image or both dropped as the recipe says."""
    mean, spread = features.mean[rows].float(), features.spread[rows].float()
    latents = (mean + spread * torch.randn(mean.shape, generator=generator)) * scaling
    draw = torch.rand(len(rows), generator=generator)
    no_image = draw < data.drop_image + data.drop_both
    no_text = (draw >= data.drop_image) & (draw < data.drop_image + data.drop_both + data.drop_text)
    image = features.image[rows].float()
    image[no_image] = features.null_image.float()
    caption = features.caption[rows].masked_fill(no_text, len(features.text) - 1)
    return Batch(latents, image, features.text[caption].float())
