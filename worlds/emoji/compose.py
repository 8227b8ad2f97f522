"""What prompts, regions, block maps, the ControlNet and the other base do together: `python -m worlds.emoji compose`.

Draws the contact sheets of docs/compose from the shipped weights and writes their numbers to results.json there.
Shape letters: N pictures, S pixels a side.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from imprompt import load_adapter
from imprompt.adapter import ImagePrompt
from imprompt.attention import family_of
from imprompt.encoders.vision import open_encoder
from imprompt.models import Place

from .assemble import SHIPPED
from .control import EDGES, edges
from .evaluate import Judge, colour_error, rims, to_tensor
from .glyphs import Glyphs
from .scenes import PATTERNS, Scenes, render, sample_scenes, to_image
from .stage import HERE, World
from .style import INK, ink

DOCS = HERE.parents[1] / "docs" / "compose"
FRONT = "plus"
COUNT = 32  # scenes that a number is measured on
SHOWN = 5  # rows of a sheet
STEPS, SWEEP_STEPS, GUIDANCE = 25, 10, 3.0
CELL = 112  # pixels of a cell of a sheet
LABEL = 20  # pixels of a line of labels


class Heard(NamedTuple):
    """An image prompt for each of N results."""

    pictures: Tensor  # (N, 3, S, S)
    scale: float | Tensor = 1.0  # or by site (sites,), the raw block map
    mask: Tensor | None = None  # (1, h, w)


class Studio:
    """A base in diffusers' own pipelines with the shipped adapter attached; of another drawing style if `style` is given."""

    def __init__(self, style: Path | None = None) -> None:
        self.pipe: Any = StableDiffusionPipeline.from_pretrained(SHIPPED)
        self.pipe.set_progress_bar_config(disable=True)
        if style is not None:
            self.pipe.load_lora_weights(style)
        self.encoder = open_encoder(Place(str(SHIPPED / "image_encoder")), "cpu", torch.float32)
        family = family_of(self.pipe.unet)
        self.sites = list(family.sites(self.pipe.unet))
        self.adapter, self.file = load_adapter(SHIPPED / "adapters" / f"{FRONT}.safetensors", family)
        self.adapter.attach(self.pipe.unet)

    @cached_property
    def controlled(self) -> Any:
        """diffusers' own ControlNet pipeline over the same components."""
        net = ControlNetModel.from_pretrained(EDGES)
        pipe = StableDiffusionControlNetPipeline(**self.pipe.components, controlnet=net, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def prompt(self, heard: Heard) -> ImagePrompt:
        images, feature = [to_image(picture) for picture in heard.pictures], self.file.variant.feature
        tokens = self.adapter.tokens(self.encoder.features(images, feature))
        null = self.adapter.tokens(self.encoder.null_features(self.file.variant))
        return self.adapter.prompt(tokens, null, heard.scale)._replace(mask=heard.mask)

    @torch.no_grad()
    def draw(self, count: int, *heard: Heard, texts: Sequence[str] = (), maps: Tensor | None = None, seed: int = 0,
             steps: int = STEPS) -> Tensor:  # fmt: skip
        """`count` results (N, 3, S, S); result i has seed + i. maps (N, 3, S, S): outlines to hold."""
        pipe = self.pipe if maps is None else self.controlled
        prompts = {"ip_hidden_states": [self.prompt(one) for one in heard]} if heard else None
        images = pipe(
            list(texts) or [""] * count,
            **({} if maps is None else {"image": maps}),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
            cross_attention_kwargs=prompts,
        ).images
        return to_tensor(images)


# Scenes, and what is measured on results


def plain_scenes(glyphs: Glyphs, world: World, salt: int, count: int) -> Scenes:
    """One glyph, off the middle, on one colour: the scenes whose palette and place are plainest."""
    scenes = sample_scenes(glyphs, 8 * count, world.generator(81, salt), pairs=0)
    away = (scenes.centre[:, 0].abs().amax(1) > 0.25) & (scenes.size[:, 0] < 0.7)
    scenes = scenes[away.nonzero().squeeze(1)[:count]]
    return replace(scenes, pattern=torch.zeros_like(scenes.pattern))


def patterned(scenes: Scenes) -> Scenes:
    """The same on stripes and checks by turns."""
    kinds = torch.tensor([PATTERNS.index("stripes"), PATTERNS.index("checks")])
    return replace(scenes, pattern=kinds[torch.arange(len(scenes)) % 2])


def shuffled(scenes: Scenes) -> Scenes:
    return scenes[torch.roll(torch.arange(len(scenes)), 1)]


def figure(pictures: Tensor, scenes: Scenes) -> Tensor:
    """What differs from the colour along the picture's edge: (N, S, S) of 0 and 1."""
    there, _ = rims(pictures, scenes)
    return ((pictures - there.median(2).values[:, :, None, None]).abs().amax(1) > 0.2).float()


def middle(figures: Tensor) -> Tensor:
    """The mean place of the figure's pixels, x and y in [-1, 1]: (N, 2)"""
    line = (torch.arange(figures.shape[-1]) + 0.5) / figures.shape[-1] * 2 - 1
    total = figures.sum((1, 2)).clamp(min=1)
    return torch.stack([(figures.sum(1) * line).sum(1) / total, (figures.sum(2) * line).sum(1) / total], 1)


def iou(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of masks (N, S, S), per picture (N,)."""
    return torch.minimum(one, other).sum((1, 2)) / torch.maximum(one, other).sum((1, 2)).clamp(min=1)


def outline_iou(pictures: Tensor, maps: Tensor) -> Tensor:
    """Of the pictures' own edges and the given ones, both widened by a pixel (N,)."""
    there, given = (F.max_pool2d((x[:, 0] > 0.5).float(), 3, 1, 1) for x in (edges(pictures), maps))
    return iou(there, given)


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's, over pictures, for each column (N, columns), and the columns' mean."""
    a, b = (x - x.mean(0) for x in (one.flatten(1), other.flatten(1)))
    return round((F.cosine_similarity(a, b, dim=0)).mean().item(), 3)


def means(**values: Tensor) -> dict[str, float]:
    return {name.replace("_", " "): round(value.mean().item(), 3) for name, value in values.items()}


# Sheets

Sheet = tuple[list[str], list[tuple[str, list[Tensor]]]]  # labels of the columns; rows: a label and pictures (3, S, S)


def draw_sheet(path: Path, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Tensor]]]) -> None:
    """Cells in rows under their columns' labels, each row with a label of its own beneath it if there is one."""
    font, pitch = ImageFont.load_default(12), CELL + 6
    height = CELL + 6 + (LABEL if any(label for label, _ in rows) else 0)
    page = Image.new("RGB", (len(columns) * pitch - 6, LABEL + len(rows) * height - 6), "white")
    pen = ImageDraw.Draw(page)
    for column, label in enumerate(columns):
        pen.text((column * pitch + 2, 3), label, "black", font)
    for row, (label, pictures) in enumerate(rows):
        top = LABEL + row * height
        for column, picture in enumerate(pictures):
            cell = to_image(picture).resize((CELL, CELL), Image.Resampling.LANCZOS)
            page.paste(cell, (column * pitch, top))
        pen.text((2, top + CELL + 3), label, "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, quality=86, optimize=True)


def half(side: int, *, left: bool) -> Tensor:
    """A mask (1, S, S) that is 1 in one half."""
    line = (torch.arange(side) < side // 2).float()
    return (line if left else 1 - line).expand(1, side, side)


def ground_error(pictures: Tensor, scenes: Scenes, *, left: bool) -> Tensor:
    """Mean difference, of 255, of a half's corner colours from the plain scenes' background (N,)."""
    side = pictures.shape[-1]
    columns = slice(0, side // 4) if left else slice(-side // 4, None)
    band = torch.cat([pictures[:, :, :4, columns], pictures[:, :, -4:, columns]], 2).flatten(2)
    return (band.median(2).values - scenes.shade[:, 0]).abs().mean(1) * 255


def regions(studio: Studio, glyphs: Glyphs, world: World) -> dict[str, Any]:
    """Two image prompts, one heard in the left half, one in the right."""
    one, other = (plain_scenes(glyphs, world, salt, COUNT) for salt in (1, 2))
    a, b = render(one, glyphs, world.side), render(other, glyphs, world.side)
    left, right = half(world.side, left=True), half(world.side, left=False)
    made = studio.draw(COUNT, Heard(a, mask=left), Heard(b, mask=right))
    swapped = studio.draw(SHOWN, Heard(a[:SHOWN], mask=right), Heard(b[:SHOWN], mask=left))
    rows = [("", [a[i], b[i], made[i], swapped[i]]) for i in range(SHOWN)]
    draw_sheet(DOCS / "regions.jpg", ["prompt A", "prompt B", "A left, B right", "B left, A right"], rows)
    return means(
        left_half_to_its_prompt=ground_error(made, one, left=True),
        left_half_to_the_other=ground_error(made, other, left=True),
        right_half_to_its_prompt=ground_error(made, other, left=False),
        right_half_to_the_other=ground_error(made, one, left=False),
    )


# Which sites of this UNet are heard: name of the map -> the blocks that are on
GROUPS = {
    "every site": ("",),
    "none": (),
    "down_blocks.0 (16x16)": ("down_blocks.0",),
    "up_blocks.2 (16x16)": ("up_blocks.2",),
    "the 8x8 sites": ("down_blocks.1", "up_blocks.1"),
    "the 4x4 sites": ("down_blocks.2", "mid_block", "up_blocks.0"),
    "all but up_blocks.2": ("down_blocks", "mid_block", "up_blocks.0", "up_blocks.1"),
}
STYLE, LAYOUT = GROUPS["up_blocks.2 (16x16)"], GROUPS["all but up_blocks.2"]


def block_map(sites: Sequence[str], blocks: Sequence[str]) -> Tensor:
    """1 for sites whose names begin so, else 0 (sites,)."""
    return torch.tensor([float(any(site.startswith(block) for block in blocks)) for site in sites])


def carried(made: Tensor, real: Tensor, scenes: Scenes, plain: slice, other: slice) -> dict[str, float]:
    """What of their prompts the results took over, as correlations over the scenes: 1 all, 0 nothing."""
    there, drawn = (rims(x, scenes)[0] for x in (made, real))
    found, true = (figure(x[plain], scenes[plain]) for x in (made, real))
    hue = [(x[plain] * mask[:, None]).sum((2, 3)) / mask.sum((1, 2))[:, None].clamp(min=1) for x, mask in ((made, found), (real, true))]
    bars = [edges(x[other])[:, 0] for x in (made, real)]
    rim = torch.ones(made.shape[-1], made.shape[-1], dtype=torch.bool)
    rim[8:-8, 8:-8] = False
    upright = [x[:, rim] for x in bars]
    return {
        "background colour": correlation(there.mean(2), drawn.mean(2)),
        "figure colour": correlation(*hue),
        "figure place": correlation(middle(found), middle(true)),
        "figure size": correlation(found.mean((1, 2))[:, None], true.mean((1, 2))[:, None]),
    }
