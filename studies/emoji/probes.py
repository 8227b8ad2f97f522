"""Linear probes of the image encoder's embedding and patch grid: what they hold of a picture.

A probe is a ridge regression on features of new scenes, so it shows what an adapter's linear layers
can find. Glyphs that no training has seen are tested too: a probe is fitted to some of their scenes
and names them in others. Shape letters: N scenes, D width of a feature.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from imprompt.encoders.vision import VisionEncoder, open_encoder
from imprompt.models import Location
from worlds.emoji.assemble import SHIPPED
from worlds.emoji.clip import loosened
from worlds.emoji.glyphs import ENCODED, Glyphs
from worlds.emoji.scenes import Scenes, figures, render, sample_scenes, to_image
from worlds.emoji.train_utils import World

from .markdown_tables import fill_sections, markdown_table

FEATURES = {"embedding": "pooled", "grid": "penultimate"}
TRAIN, TEST = 3000, 600  # scenes that a probe is fitted to, and tested on
RIDGE = 1e-2  # as a share of the features' mean square
SHAPE = 8  # places a side of a figure's shape


def ridge(features: Tensor, targets: Tensor, asked: Tensor) -> Tensor:
    """Fit targets (N, K) to features (N, D), and predict those of `asked` (M, D): (M, K).

    The fit is a linear function with a ridge penalty.
    """
    mean, level = features.mean(0), targets.mean(0)
    x, y, z = features - mean, targets - level, asked - mean
    gram = x @ x.T
    weights = torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(x)), y)
    return z @ x.T @ weights + level


def explained(found: Tensor, true: Tensor) -> float:
    """Return the share of the targets' variance that is explained (R²)."""
    return 1 - ((found - true).square().sum() / (true - true.mean(0)).square().sum()).item()


def named(found: Tensor, true: Tensor) -> float:
    """Return how often the largest value is the right one."""
    return found.argmax(1).eq(true.argmax(1)).float().mean().item()


def one_hot(labels: Tensor) -> Tensor:
    """Convert labels (N,) to one-hot vectors, one column for each label that occurs."""
    _, places = labels.unique(return_inverse=True)
    return F.one_hot(places).float()


def shapes(scenes: Scenes, glyphs: Glyphs, side: int) -> Tensor:
    """Return how much of each of SHAPE² places the figure covers (N, SHAPE²)."""
    return torch.cat(
        [
            F.adaptive_avg_pool2d(figures(part, glyphs, side), SHAPE).flatten(1)
            for part in scenes.split(100)
        ]
    )


@dataclass(frozen=True)
class Reader:
    """The shipped image encoder, for pictures with this number of pixels a side."""

    side: int

    @cached_property
    def encoder(self) -> VisionEncoder:
        """The encoder, loaded on first use in float32 on the CPU."""
        return open_encoder(Location(str(SHIPPED / "image_encoder")), "cpu", torch.float32)

    def read(self, scenes: Scenes, glyphs: Glyphs) -> dict[str, Tensor]:
        """Draw scenes and return each of their features (N, D)."""
        images = [
            to_image(picture)
            for part in scenes.split(50)
            for picture in render(part, glyphs, self.side)
        ]
        return {
            name: torch.cat(
                [
                    self.encoder.features(images[i : i + 50], feature)
                    for i in range(0, len(images), 50)
                ]
            ).flatten(1)
            for name, feature in FEATURES.items()
        }


def answer(features: Tensor, targets: Tensor, score: Callable[[Tensor, Tensor], float]) -> str:
    """Return as text how well a probe of the first `TRAIN` scenes predicts the others' targets."""
    value = score(ridge(features[:TRAIN], targets[:TRAIN], features[TRAIN:]), targets[TRAIN:])
    return f"{value:.1%}" if score is named else f"{value:.3f}"


# Questions about scenes of one glyph: a function for the targets (N, K), and one for the score.
ASKED: dict[
    str, tuple[Callable[[Scenes, Glyphs, int], Tensor], Callable[[Tensor, Tensor], float]]
] = {
    "colour": (lambda scenes, _glyphs, _side: scenes.shade[:, 0], explained),
    "place": (lambda scenes, _glyphs, _side: scenes.centre[:, 0], explained),
    "size": (lambda scenes, _glyphs, _side: scenes.size[:, :1], explained),
    "shape": (shapes, explained),
    "glyph": (lambda scenes, _glyphs, _side: one_hot(scenes.glyph[:, 0]), named),
}


def of_glyphs(world: World, reader: Reader, seen: bool) -> dict[str, list[str]]:
    """Return, for each feature, an answer to each question in `ASKED`.

    The scenes have one glyph on one colour, without a pattern.
    """
    glyphs = world.glyphs()
    scenes = sample_scenes(
        glyphs, TRAIN + TEST, world.generator(48, seen), seen_glyphs=seen, pairs=0, core=1.0
    )
    scenes = loosened(
        replace(scenes, pattern=torch.zeros_like(scenes.pattern)), world.generator(49, seen)
    )
    targets = [(of(scenes, glyphs, world.side), score) for of, score in ASKED.values()]
    return {
        name: [answer(x, y, score) for y, score in targets]
        for name, x in reader.read(scenes, glyphs).items()
    }


def of_styles(world: World, reader: Reader) -> dict[str, str]:
    """Return, for each feature, how often it identifies a scene's drawing style."""
    styles = [world.glyphs(style) for style in ENCODED]
    share = (TRAIN + TEST) // len(styles)
    drawn = [
        sample_scenes(one, share, world.generator(50, number), pairs=0)
        for number, one in enumerate(styles)
    ]
    parts = [reader.read(scenes, one) for one, scenes in zip(styles, drawn, strict=True)]
    labels = one_hot(torch.arange(len(styles)).repeat_interleave(share))
    mixed = torch.randperm(len(labels), generator=world.generator(53))
    return {
        name: answer(torch.cat([part[name] for part in parts])[mixed], labels[mixed], named)
        for name in FEATURES
    }


def probe(world: World) -> None:
    """Measure all probes, print their table and write it into the model card."""
    world = replace(world, device="cpu")
    reader = Reader(world.side)
    rows = {
        f"{name}, {label} glyphs": cells
        for label, seen in (("seen", True), ("unseen", False))
        for name, cells in of_glyphs(world, reader, seen).items()
    }
    for name, cell in of_styles(world, reader).items():
        rows[f"{name}, seen glyphs"].append(cell)
        rows[f"{name}, unseen glyphs"].append("–")
    table = markdown_table([*ASKED, "style"], rows)
    print(table)
    fill_sections(SHIPPED / "README.md", {"probes": table})
