"""What the image encoder's features tell of a picture: linear probes of its embedding and of its patch grid.

A probe is a ridge regression on features of new scenes, so that it tells what an adapter's linear layers can find. Glyphs that no
training has seen are asked for too: from some of their scenes a probe learns to name them in others.
Shape letters: N scenes, D width of a feature.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from imprompt.encoders.vision import open_encoder
from imprompt.models import Place

from .assemble import SHIPPED
from .clip import loosened
from .glyphs import ENCODED, Glyphs
from .marks import fill, lines
from .scenes import Scenes, figures, render, sample_scenes, to_image
from .stage import World

FEATURES = {"embedding": "pooled", "grid": "penultimate"}
TRAIN, TEST = 3000, 600  # scenes a probe learns from, and is asked on
RIDGE = 1e-2  # of the features' mean square
SHAPE = 8  # places a side of a figure's shape


def ridge(features: Tensor, targets: Tensor, asked: Tensor) -> Tensor:
    """Targets (N, K) of features (N, D), as a linear function of them tells those of `asked` (M, D): (M, K)."""
    mean, level = features.mean(0), targets.mean(0)
    x, y, z = features - mean, targets - level, asked - mean
    gram = x @ x.T
    weights = torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(x)), y)
    return z @ x.T @ weights + level


def explained(found: Tensor, true: Tensor) -> float:
    """The share of the targets' variance that is told (R²)."""
    return 1 - ((found - true).square().sum() / (true - true.mean(0)).square().sum()).item()


def named(found: Tensor, true: Tensor) -> float:
    """How often the largest is the right one."""
    return found.argmax(1).eq(true.argmax(1)).float().mean().item()


def one_hot(labels: Tensor) -> Tensor:
    _, places = labels.unique(return_inverse=True)
    return F.one_hot(places).float()


def shapes(scenes: Scenes, glyphs: Glyphs, side: int) -> Tensor:
    """How much of each of SHAPE² places the figure covers (N, SHAPE²)."""
    return torch.cat([F.adaptive_avg_pool2d(figures(part, glyphs, side), SHAPE).flatten(1) for part in scenes.split(100)])


# What is asked of scenes of one glyph: its targets (N, K), and how well they were found.
ASKED: dict[str, tuple[Callable[[Scenes, Glyphs, int], Tensor], Callable[[Tensor, Tensor], float]]] = {
    "colour": (lambda scenes, _glyphs, _side: scenes.shade[:, 0], explained),
    "place": (lambda scenes, _glyphs, _side: scenes.centre[:, 0], explained),
    "size": (lambda scenes, _glyphs, _side: scenes.size[:, :1], explained),
    "shape": (lambda scenes, glyphs, side: shapes(scenes, glyphs, side), explained),
    "glyph": (lambda scenes, _glyphs, _side: one_hot(scenes.glyph[:, 0]), named),
}


def probe(world: World) -> None:
    world = replace(world, device="cpu")
    encoder = open_encoder(Place(str(SHIPPED / "image_encoder")), "cpu", torch.float32)

    def read(pictures: Tensor) -> dict[str, Tensor]:
        images = [to_image(picture) for picture in pictures]
        return {name: encoder.features(images, feature).flatten(1) for name, feature in FEATURES.items()}

    rows: dict[str, list[str]] = {}
    glyphs, count = world.glyphs(), TRAIN + TEST
    for label, seen in (("seen", True), ("unseen", False)):
        scenes = sample_scenes(glyphs, count, world.generator(48, seen), seen_glyphs=seen, pairs=0, core=1.0)
        scenes = loosened(replace(scenes, pattern=torch.zeros_like(scenes.pattern)), world.generator(49, seen))
        parts = [read(render(part, glyphs, world.side)) for part in scenes.split(50)]
        for name in FEATURES:
            x = torch.cat([part[name] for part in parts])
            cells = []
            for targets, score in ASKED.values():
                y = targets(scenes, glyphs, world.side)
                value = score(ridge(x[:TRAIN], y[:TRAIN], x[TRAIN:]), y[TRAIN:])
                cells.append(f"{value:.1%}" if score is named else f"{value:.3f}")
            rows[f"{name}, {label} glyphs"] = cells
    styles = [world.glyphs(style) for style in ENCODED]
    share = count // len(styles)
    drawn = [sample_scenes(one, share, world.generator(50, number), pairs=0) for number, one in enumerate(styles)]
    parts = [read(render(p, one, world.side)) for one, scenes in zip(styles, drawn, strict=True) for p in scenes.split(50)]
    y = one_hot(torch.arange(len(styles)).repeat_interleave(share))
    mixed = torch.randperm(len(y), generator=world.generator(53))
    for name in FEATURES:
        x = torch.cat([part[name] for part in parts])[mixed]
        found = named(ridge(x[:TRAIN], y[mixed][:TRAIN], x[TRAIN:]), y[mixed][TRAIN:])
        rows[f"{name}, seen glyphs"].append(f"{found:.1%}")
        rows[f"{name}, unseen glyphs"].append("–")
    table = lines([*ASKED, "style"], rows)
    print(table)
    fill(SHIPPED / "README.md", {"probes": table})
