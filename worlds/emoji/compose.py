"""What prompts, regions, block maps, the ControlNet and the other base do together: `python -m worlds.emoji compose`.

Draws the contact sheets of docs/compose from the shipped weights and writes their numbers to results.json there.
Shape letters: N pictures, S pixels a side.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from .style import INK, PALE, ink

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


def bars(pictures: Tensor, band: int = 8) -> Tensor:
    """How much colour changes along x and along y in the picture's outer `band` pixels (N, 2): what a pattern is there."""
    rim = torch.ones(pictures.shape[-2:], dtype=torch.bool)
    rim[band:-band, band:-band] = False
    along_x, along_y = (F.pad(pictures.diff(dim=d), pad) for d, pad in ((3, (0, 1)), (2, (0, 0, 0, 1))))
    return torch.stack([step.abs().amax(1)[:, rim].mean(1) for step in (along_x, along_y)], 1)


def hue(pictures: Tensor, figures: Tensor) -> Tensor:
    """The figure's mean colour (N, 3)."""
    return (pictures * figures[:, None]).sum((2, 3)) / figures.sum((1, 2)).clamp(min=1)[:, None]


def carried(made: Tensor, real: Tensor, scenes: Scenes) -> dict[str, float]:
    """What of their prompts the results took over, as correlations over the scenes: 1 all, 0 nothing.

    Figures are looked for where the prompt's background is plain.
    """
    plain = scenes.pattern == 0
    found, true = (figure(x[plain], scenes[plain]) for x in (made, real))
    return {
        "background colour": correlation(*(rims(x, scenes)[0].mean(2) for x in (made, real))),
        "figure colour": correlation(hue(made[plain], found), hue(real[plain], true)),
        "pattern": correlation(bars(made), bars(real)),
        "figure place": correlation(middle(found), middle(true)),
        "figure size": correlation(found.mean((1, 2))[:, None], true.mean((1, 2))[:, None]),
    }


def blocks(studio: Studio, glyphs: Glyphs, world: World) -> dict[str, Any]:
    """Which sites carry what; then the style of one picture with the layout of another, as far as that goes here."""
    plain = plain_scenes(glyphs, world, 3, 2 * COUNT)
    scenes = joined(plain[:COUNT], patterned(plain[COUNT:]))
    real = render(scenes, glyphs, world.side)
    ways = {
        name: carried(studio.draw(len(real), Heard(real, block_map(studio.sites, on)), steps=SWEEP_STEPS), real, scenes)
        for name, on in GROUPS.items()
    }
    return {"what the maps carry": ways, "style and layout": style_and_layout(studio, glyphs, world)}


def style_and_layout(studio: Studio, glyphs: Glyphs, world: World) -> dict[str, Any]:
    """Palette of B by a map of the style's sites; layout of A by a map of all others, and by its outlines."""
    manner = plain_scenes(glyphs, world, 4, COUNT)
    form = patterned(plain_scenes(glyphs, world, 5, COUNT))
    form = joined(form[: COUNT // 2], replace(form, pattern=torch.zeros_like(form.pattern))[COUNT // 2 :])
    a, b = render(form, glyphs, world.side), render(manner, glyphs, world.side)
    palette, layout = Heard(b, block_map(studio.sites, STYLE)), Heard(a, block_map(studio.sites, LAYOUT))
    results = {
        "B, style map": studio.draw(COUNT, palette),
        "A, layout map": studio.draw(COUNT, layout),
        "both maps": studio.draw(COUNT, palette, layout),
        "A's edges, B's style": studio.draw(COUNT, palette, maps=edges(a)),
    }
    shown = [*range(2), *range(COUNT // 2, COUNT // 2 + SHOWN - 2)]
    rows = [("", [a[i], b[i], *(made[i] for made in results.values())]) for i in shown]
    draw_sheet(DOCS / "style-and-layout.jpg", ["layout of A", "style of B", *results], rows)
    return {
        name: {
            "background colour of B": correlation(rims(made, manner)[0].mean(2), rims(b, manner)[0].mean(2)),
            "pattern of A": correlation(bars(made), bars(a)),
            "edges of A, IoU": means(iou=outline_iou(made, edges(a)))["iou"],
            "place of A's figure": carried(made, a, form)["figure place"],
        }
        for name, made in results.items()
    }


def joined(one: Scenes, other: Scenes) -> Scenes:
    return Scenes(**{name: torch.cat([value, getattr(other, name)]) for name, value in vars(one).items()})


def outlines(studio: Studio, glyphs: Glyphs, world: World) -> dict[str, Any]:
    """The ControlNet holds A's outline, the image prompt gives B's palette; the two never met in training."""
    form, manner = (plain_scenes(glyphs, world, salt, COUNT) for salt in (6, 7))
    a, b = render(form, glyphs, world.side), render(manner, glyphs, world.side)
    maps, true = edges(a), figure(a, form)
    results = {
        "edges + B": studio.draw(COUNT, Heard(b), maps=maps),
        "B without edges": studio.draw(COUNT, Heard(b)),
        "edges alone": studio.draw(COUNT, maps=maps),
    }
    rows = [("", [maps[i], b[i], *(made[i] for made in results.values())]) for i in range(SHOWN + 2)]
    draw_sheet(DOCS / "outlines.jpg", ["edges of A", "prompt B", *results], rows)
    return {
        name: means(
            edge_IoU=outline_iou(made, maps),
            edge_IoU_shuffled=outline_iou(made, maps.roll(1, 0)),
            silhouette_IoU=iou(figure(made, form), true),
            silhouette_IoU_shuffled=iou(figure(made, form), true.roll(1, 0)),
            colour_error=colour_error(made, manner),
            colour_error_shuffled=colour_error(made, shuffled(manner)),
        )
        for name, made in results.items()
    }


def paled(scenes: Scenes) -> Scenes:
    """As `ink` leaves their backgrounds."""
    return replace(scenes, shade=scenes.shade + (1 - scenes.shade) * PALE)


def inked(pictures: Tensor) -> Tensor:
    """The share of its edges at which there is a dark line (N,)."""
    dark = F.max_pool2d((pictures.mean(1, keepdim=True) < 0.35).float(), 3, 1, 1)
    edge = (edges(pictures)[:, :1] > 0.5).float()
    return (dark * edge).sum((1, 2, 3)) / edge.sum((1, 2, 3)).clamp(min=1)


def styles(studio: Studio, glyphs: Glyphs, world: World) -> dict[str, Any]:
    """The other base, the same adapter, the same prompts and seeds."""
    other = Studio(INK)
    scenes = plain_scenes(glyphs, world, 8, 2 * COUNT)
    scenes = scenes[(scenes.shade[:, 0].mean(1) > 0.4).nonzero().squeeze(1)[:COUNT]]  # on dark grounds dark lines are no news
    real, count = render(scenes, glyphs, world.side), len(scenes)
    names = [glyphs.names[g] for g in scenes.glyph[:, 0].tolist()]
    results = {
        "base": studio.draw(count, Heard(real)),
        "ink": other.draw(count, Heard(real)),
        "ink, text alone": other.draw(count, texts=names),
        "ink + edges": other.draw(count, Heard(real), maps=edges(real)),
    }
    rows = [("", [real[i], ink(real[i : i + 1])[0], *(made[i] for made in results.values())]) for i in range(SHOWN + 1)]
    draw_sheet(DOCS / "ink.jpg", ["prompt", "(as ink)", *results], rows)
    real_ones = {"real scenes": real, "real scenes as ink": ink(real)}
    return {
        name: means(
            edges_with_a_dark_line=inked(made),
            colour_error=colour_error(made, scenes),
            colour_error_to_the_paled_prompt=colour_error(made, paled(scenes)),
            colour_error_to_another_paled_prompt=colour_error(made, shuffled(paled(scenes))),
        )
        for name, made in (real_ones | results).items()
    }


SCALES = (0.0, 0.1, 0.25, 0.5, 1.0)
TEXTS = ("", "a red apple", "a frog on a blue background", "a sunflower on red and white stripes")


def sweep(studio: Studio, glyphs: Glyphs, world: World) -> dict[str, Any]:
    """Scale × text: one image prompt under several texts; and over many pairs, how much of each is heard."""
    scenes = plain_scenes(glyphs, world, 9, COUNT)
    real, judge = render(scenes, glyphs, world.side), Judge.load()
    rows = []
    for text in TEXTS:
        cells = [studio.draw(1, Heard(real[:1], scale), texts=[text], seed=3)[0] for scale in SCALES]
        rows.append((f"text: {text or '(none)'}", [real[0], *cells]))
    draw_sheet(DOCS / "scale-and-text.jpg", ["prompt", *(f"scale {scale}" for scale in SCALES)], rows)
    named = (scenes.glyph[:, 0] + 7) % glyphs.seen
    texts = ["a " + glyphs.names[g] for g in named.tolist()]
    table = {}
    for scale in SCALES:
        made = studio.draw(COUNT, Heard(real, scale), texts=texts, steps=SWEEP_STEPS)
        table[f"scale {scale}"] = means(
            text_glyph_named=judge.glyph(made).eq(named).float(),
            colour_error=colour_error(made, scenes),
            colour_error_shuffled=colour_error(made, shuffled(scenes)),
        )
    return table


PICTURES: dict[str, Callable[[Studio, Glyphs, World], dict[str, Any]]] = {
    "regions": regions,
    "blocks": blocks,
    "outlines": outlines,
    "sweep": sweep,
    "ink": styles,
}


def compose(world: World) -> None:
    world = replace(world, device="cpu")  # small enough, and the same pictures everywhere
    glyphs, studio, results = world.glyphs(), Studio(), {}
    for name, picture in PICTURES.items():
        results[name] = picture(studio, glyphs, world)
        print(name, json.dumps(results[name], indent=1), flush=True)
    (DOCS / "results.json").write_text(json.dumps(results, indent=1) + "\n")
