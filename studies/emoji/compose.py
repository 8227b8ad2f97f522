"""Combine prompts, regions, block maps, the ControlNet and another base on the shipped weights.

`python -m studies.emoji compose` draws the contact sheets of docs/reports/compose and writes their
numbers to results.json there. Shape letters: N pictures, S pixels a side.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from worlds.emoji.edges import edges
from worlds.emoji.glyphs import Glyphs
from worlds.emoji.scenes import PATTERNS, PORTRAIT, Scenes, article, render, sample_scenes, shuffled
from worlds.emoji.style import STYLES_FOLDER
from worlds.emoji.train_utils import World

from .markdown_tables import fill_sections, number_table
from .measures import (
    Classifier,
    bars,
    colour_error,
    correlation,
    figure,
    hue,
    in_style,
    iou,
    middle,
    outline_iou,
    rims,
)
from .paths import DOCS, REPORTS
from .sampler import Condition, Sampler
from .sheets import draw_sheet

GUIDE, SHEETS = DOCS / "compose.md", REPORTS / "compose"
COUNT = 32  # scenes that a number is measured on
SHOWN = 5  # rows of a sheet
SWEEP_STEPS = 10
STYLE_SHOWN = "flat"


# Scenes, and measures of results


def plain_scenes(glyphs: Glyphs, world: World, salt: int, count: int) -> Scenes:
    """Draw `count` scenes of one glyph on one colour.

    Palette and place are easiest to measure in them. In turn the glyph is large and in the middle,
    or small and elsewhere.
    """
    scenes = sample_scenes(glyphs, 8 * count, world.generator(81, salt), pairs=0, core=1.0)
    large, away = scenes.size[:, 0] == PORTRAIT, scenes.centre[:, 0].abs().amax(1) > 0
    scenes = scenes[
        torch.stack(
            [kind.nonzero().squeeze(1)[: count // 2] for kind in (large, away)], 1
        ).flatten()
    ]
    return replace(scenes, pattern=torch.zeros_like(scenes.pattern))


def patterned(scenes: Scenes) -> Scenes:
    """Replace the backgrounds of scenes by stripes and checks in turn."""
    kinds = torch.tensor([PATTERNS.index("stripes"), PATTERNS.index("checks")])
    return replace(scenes, pattern=kinds[torch.arange(len(scenes)) % 2])


def means(**values: Tensor) -> dict[str, float]:
    """Return the rounded mean of each measure, with spaces for the underscores in its name."""
    return {name.replace("_", " "): round(value.mean().item(), 3) for name, value in values.items()}


def half(side: int, *, left: bool) -> Tensor:
    """Return a mask (1, S, S) that is 1 in one half."""
    line = (torch.arange(side) < side // 2).float()
    return (line if left else 1 - line).expand(1, side, side)


def ground_error(pictures: Tensor, scenes: Scenes, *, left: bool) -> Tensor:
    """Return the difference, of 255, of a half's corner colours from the plain background (N,)."""
    side = pictures.shape[-1]
    columns = slice(0, side // 4) if left else slice(-side // 4, None)
    band = torch.cat([pictures[:, :, :4, columns], pictures[:, :, -4:, columns]], 2).flatten(2)
    return (band.median(2).values - scenes.shade[:, 0]).abs().mean(1) * 255


def regions(sampler: Sampler, glyphs: Glyphs, world: World) -> dict[str, Any]:
    """Sample two image prompts, one applied in the left half and one in the right.

    Draws a sheet and returns the colour errors of both halves.
    """
    one, other = (plain_scenes(glyphs, world, salt, COUNT) for salt in (1, 2))
    a, b = render(one, glyphs, world.side), render(other, glyphs, world.side)
    left, right = half(world.side, left=True), half(world.side, left=False)
    made = sampler.sample(COUNT, Condition(a, mask=left), Condition(b, mask=right))
    swapped = sampler.sample(
        SHOWN, Condition(a[:SHOWN], mask=right), Condition(b[:SHOWN], mask=left)
    )
    rows = [("", [a[i], b[i], made[i], swapped[i]]) for i in range(SHOWN)]
    draw_sheet(
        SHEETS / "regions.jpg", ["prompt A", "prompt B", "A left, B right", "B left, A right"], rows
    )
    sides = {"left half": (one, other, True), "right half": (other, one, False)}
    return {
        name: means(
            colour_error_to_its_prompt=ground_error(made, own, left=here),
            to_the_other=ground_error(made, strange, left=here),
        )
        for name, (own, strange, here) in sides.items()
    }


# Layers that an image prompt applies to: name of the map -> the UNet's active blocks
GROUPS = {
    "every layer": ("",),
    "none": (),
    "down_blocks.1 (8x8)": ("down_blocks.1",),
    "up_blocks.1 (8x8)": ("up_blocks.1",),
    "the 4x4 layers": ("down_blocks.2", "mid_block", "up_blocks.0"),
    "all but up_blocks.1": ("down_blocks", "mid_block", "up_blocks.0"),
}
STYLE, LAYOUT = GROUPS["up_blocks.1 (8x8)"], GROUPS["all but up_blocks.1"]


def block_map(layers: Sequence[str], blocks: Sequence[str]) -> Tensor:
    """Return 1 for layers whose names start with one of `blocks`, else 0 (layers,)."""
    return torch.tensor(
        [float(any(layer.startswith(block) for block in blocks)) for layer in layers]
    )


def carried(made: Tensor, real: Tensor, scenes: Scenes) -> dict[str, float]:
    """Measure what results took from their prompts, as correlations over the scenes.

    1 means all, 0 nothing. Figures are searched where the prompt's background is plain.
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


def blocks(sampler: Sampler, glyphs: Glyphs, world: World) -> dict[str, Any]:
    """Measure which layers carry which properties of an image prompt.

    Also combines the style of one picture with the layout of another, as far as this model allows
    it.
    """
    plain = plain_scenes(glyphs, world, 3, 2 * COUNT)
    scenes = joined(plain[:COUNT], patterned(plain[COUNT:]))
    real = render(scenes, glyphs, world.side)
    ways = {
        name: carried(
            sampler.sample(
                len(real), Condition(real, block_map(sampler.layers, on)), steps=SWEEP_STEPS
            ),
            real,
            scenes,
        )
        for name, on in GROUPS.items()
    }
    return {
        "what the maps carry": ways,
        "style and layout": style_and_layout(sampler, glyphs, world),
    }


def style_and_layout(sampler: Sampler, glyphs: Glyphs, world: World) -> dict[str, Any]:
    """Sample the palette of B, by a map of the style's layers, with the layout of A.

    The layout is given by a map of all other layers, and by A's outlines. Draws a sheet.
    """
    manner = plain_scenes(glyphs, world, 4, COUNT)
    form = patterned(plain_scenes(glyphs, world, 5, COUNT))
    form = joined(
        form[: COUNT // 2], replace(form, pattern=torch.zeros_like(form.pattern))[COUNT // 2 :]
    )
    a, b = render(form, glyphs, world.side), render(manner, glyphs, world.side)
    palette, layout = (
        Condition(b, block_map(sampler.layers, STYLE)),
        Condition(a, block_map(sampler.layers, LAYOUT)),
    )
    results = {
        "B, style map": sampler.sample(COUNT, palette),
        "A, layout map": sampler.sample(COUNT, layout),
        "both maps": sampler.sample(COUNT, palette, layout),
        "A's edges, B's style": sampler.sample(COUNT, palette, maps=edges(a)),
    }
    shown = [*range(2), *range(COUNT // 2, COUNT // 2 + SHOWN - 2)]
    rows = [("", [a[i], b[i], *(made[i] for made in results.values())]) for i in shown]
    draw_sheet(SHEETS / "style-and-layout.jpg", ["layout of A", "style of B", *results], rows)
    return {
        name: {
            "background colour of B": correlation(
                rims(made, manner)[0].mean(2), rims(b, manner)[0].mean(2)
            ),
            "pattern of A": correlation(bars(made), bars(a)),
            "edges of A, IoU": means(iou=outline_iou(made, edges(a)))["iou"],
            "place of A's figure": carried(made, a, form)["figure place"],
        }
        for name, made in results.items()
    }


def joined(one: Scenes, other: Scenes) -> Scenes:
    """Concatenate two sets of scenes."""
    return Scenes(
        **{name: torch.cat([value, getattr(other, name)]) for name, value in vars(one).items()}
    )


def outlines(sampler: Sampler, glyphs: Glyphs, world: World) -> dict[str, Any]:
    """Sample with A's outline by the ControlNet and B's palette by the image prompt.

    The two were never trained together. Draws a sheet.
    """
    form, manner = (plain_scenes(glyphs, world, salt, COUNT) for salt in (6, 7))
    a, b = render(form, glyphs, world.side), render(manner, glyphs, world.side)
    maps, true = edges(a), figure(a, form)
    results = {
        **{
            f"edges + B, scale {scale}": sampler.sample(COUNT, Condition(b, scale), maps=maps)
            for scale in (1.0, 0.5, 0.35)
        },
        "B without edges": sampler.sample(COUNT, Condition(b)),
        "edges alone": sampler.sample(COUNT, maps=maps),
    }
    rows = [
        ("", [maps[i], b[i], *(made[i] for made in results.values())]) for i in range(SHOWN + 2)
    ]
    draw_sheet(SHEETS / "outlines.jpg", ["edges of A", "prompt B", *results], rows)
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


def styles(sampler: Sampler, glyphs: Glyphs, world: World) -> dict[str, Any]:
    """Sample on a base of another drawing style, with the same adapter, prompts and seeds.

    Draws a sheet.
    """
    other = Sampler(STYLES_FOLDER / STYLE_SHOWN)
    scenes = plain_scenes(glyphs, world, 8, COUNT)
    real, redrawn = (
        render(scenes, drawn, world.side) for drawn in (glyphs, world.glyphs(STYLE_SHOWN))
    )
    names = [article(glyphs.names[g]) for g in scenes.glyph[:, 0].tolist()]
    results = {
        "base": sampler.sample(COUNT, Condition(real)),
        STYLE_SHOWN: other.sample(COUNT, Condition(real)),
        f"{STYLE_SHOWN}, text alone": other.sample(COUNT, texts=names),
        f"{STYLE_SHOWN} + edges": other.sample(COUNT, Condition(real), maps=edges(real)),
    }
    rows = [
        ("", [real[i], redrawn[i], *(made[i] for made in results.values())])
        for i in range(SHOWN + 1)
    ]
    draw_sheet(SHEETS / "style.jpg", ["prompt", f"(as {STYLE_SHOWN})", *results], rows)
    real_ones = {"real scenes": real, f"real scenes as {STYLE_SHOWN}": redrawn}
    return {
        name: means(
            drawn_by_that_hand=in_style(made, STYLE_SHOWN),
            colour_error=colour_error(made, scenes),
            colour_error_to_another=colour_error(made, shuffled(scenes)),
        )
        for name, made in (real_ones | results).items()
    }


SCALES = (0.0, 0.1, 0.25, 0.5, 1.0)
TEXTS = ("", "a red apple", "a frog on a blue background", "a sunflower on red and white stripes")


def sweep(sampler: Sampler, glyphs: Glyphs, world: World) -> dict[str, Any]:
    """Sample one image prompt under several texts and scales, and draw a sheet.

    Also measures over many pairs how much of text and image shows in the results.
    """
    scenes = plain_scenes(glyphs, world, 9, COUNT)
    real = render(scenes, glyphs, world.side)
    rows = []
    for text in TEXTS:
        cells = [
            sampler.sample(1, Condition(real[:1], scale), texts=[text], seed=3)[0]
            for scale in SCALES
        ]
        rows.append((f"text: {text or '(none)'}", [real[0], *cells]))
    draw_sheet(
        SHEETS / "scale-and-text.jpg", ["prompt", *(f"scale {scale}" for scale in SCALES)], rows
    )
    named = (scenes.glyph[:, 0] + 7) % glyphs.core
    texts = [article(glyphs.names[g]) for g in named.tolist()]
    table = {}
    for scale in SCALES:
        made = sampler.sample(COUNT, Condition(real, scale), texts=texts, steps=SWEEP_STEPS)
        table[f"scale {scale}"] = means(
            text_glyph_named=Classifier.load().classify(made).eq(named).float(),
            colour_error=colour_error(made, scenes),
            colour_error_shuffled=colour_error(made, shuffled(scenes)),
        )
    return table


PICTURES: dict[str, Callable[[Sampler, Glyphs, World], dict[str, Any]]] = {
    "regions": regions,
    "blocks": blocks,
    "outlines": outlines,
    "sweep": sweep,
    "style": styles,
}


def compose(world: World) -> None:
    """Run all combinations; write their numbers into results.json and the guide."""
    world = replace(world, device="cpu")  # fast enough, and the same pictures on every machine
    glyphs, sampler, results = world.glyphs(), Sampler(), {}
    for name, picture in PICTURES.items():
        results[name] = picture(sampler, glyphs, world)
        print(name, json.dumps(results[name], indent=1), flush=True)
    (SHEETS / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    blocks = results.pop("blocks")
    fill_sections(
        GUIDE,
        {name: number_table(rows) for name, rows in (blocks | results).items()},
    )
