"""Measure what a world's model can do: `python -m studies.emoji evaluate`, and `transformers`.

The first prints the table that the model card contains, the second that of the two transformers in
the world's folder. The metric encoder has a seed and a size of its own
and never conditioned anything; colours and shapes are compared with the scenes' own factors. Shape
letters: N scenes, S pixels a side.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from imprompt.evaluation.metrics import Interval, bootstrap_interval
from imprompt.generation.pipeline import ImagePromptPipeline
from worlds.emoji.assemble import ADAPTERS, SHIPPED, TRANSFORMERS, weights_in
from worlds.emoji.glyphs import Glyphs
from worlds.emoji.scenes import (
    COLOUR_NAMES,
    PALETTE,
    UNSEEN_COLOURS,
    Scenes,
    article,
    moved,
    render,
    sample_scenes,
    shuffled,
    to_image,
)
from worlds.emoji.train_utils import World
from worlds.emoji.vae import psnr, reconstruct

from .markdown_tables import fill_sections, markdown_table
from .measures import (
    RIGHT,
    Classifier,
    colour_error,
    embed_pictures,
    figure,
    middle,
    outlines,
    retrieval,
    to_tensor,
)
from .paths import REPORTS
from .sampler import FRONT, GUIDANCE, STEPS
from .sheets import draw_sheet, sheet

SHEETS = REPORTS / "emoji"
COUNT = 128
SCALES = (0.3, 0.4, 0.5, 0.6, 0.7)  # of an image prompt with a text


class Kind(NamedTuple):
    """A kind of scenes to measure on."""

    glyphs_seen: bool = True
    look_seen: bool = True
    core: float = 1.0

    def scenes(
        self, glyphs: Glyphs, count: int, generator: torch.Generator, pairs: float = 0.1
    ) -> Scenes:
        """Draw `count` scenes of this kind, a share `pairs` of them with two glyphs."""
        return sample_scenes(
            glyphs,
            count,
            generator,
            seen_glyphs=self.glyphs_seen,
            seen_look=self.look_seen,
            core=self.core,
            pairs=pairs,
        )


SETS = {
    "core glyphs, new compositions": Kind(),
    "other seen glyphs": Kind(core=0.0),
    "unseen glyphs": Kind(glyphs_seen=False),
    "unseen glyphs, palettes and pattern": Kind(glyphs_seen=False, look_seen=False),
}
Row = dict[str, Interval | float]


@dataclass(frozen=True)
class Model:
    """A model to measure, by the options with which it makes pictures."""

    name: str  # of the package, or a folder
    adapters: Mapping[str, str]  # name in the tables -> adapter
    options: Mapping[str, Any] = field(default_factory=dict)  # of diffusers' pipeline

    def open(self, adapter: str) -> ImagePromptPipeline:
        """Open the model with one of its adapters, on the CPU."""
        return ImagePromptPipeline.from_pretrained(
            self.name, adapter=self.adapters[adapter], device="cpu"
        )

    def make(
        self,
        pipe: ImagePromptPipeline,
        prompts: Tensor,
        texts: Sequence[str] | str = "",
        scale: float = 1.0,
    ) -> Tensor:
        """Make a result (N, 3, S, S) for each image prompt (N, 3, S, S); number i has seed i."""
        side = prompts.shape[-1]
        result = pipe(
            [to_image(prompt) for prompt in prompts],
            texts,
            scale=scale,
            seed=0,
            batch_size=32,
            width=side,
            height=side,
            steps=STEPS,
            guidance=GUIDANCE,
            pipeline_options=dict(self.options),
        )
        return to_tensor(result.images)


PACKAGED = Model("emoji", {name: name for name in ADAPTERS})
# options that guide the transformers by the negative text, each in its pipeline's words
GUIDED = {"dit": {}, "mmdit": {"true_cfg_scale": GUIDANCE}}


def means(values: Mapping[str, Tensor]) -> Row:
    """Return the means of values by picture (N,) with their intervals; NaN values are left out.

    A mean is NaN if no value is left.
    """
    there = {name: value[~value.isnan()] for name, value in values.items()}
    return {
        name: bootstrap_interval(value, torch.arange(len(value))) if len(value) else float("nan")
        for name, value in there.items()
    }


def follow(
    model: Model,
    pipe: ImagePromptPipeline,
    world: World,
    glyphs: Glyphs,
    scenes: Scenes,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Measure whether results at scale 1 follow their own image prompt and not another's.

    There is no text. Returns values by picture (N,), the prompts and the results.
    """
    prompts = render(scenes, glyphs, world.side)
    made = model.make(pipe, prompts)
    return measured(prompts, made, glyphs, scenes, generator), prompts, made


def measured(
    prompts: Tensor, made: Tensor, glyphs: Glyphs, scenes: Scenes, generator: torch.Generator
) -> dict[str, Tensor]:
    """Measure what results (N, 3, S, S) took from their prompts (N, 3, S, S), by picture (N,).

    A value is NaN where it cannot be measured.
    """
    other = shuffled(scenes)
    # The upper limit: another real picture of the same scene.
    again = render(moved(scenes, generator), glyphs, prompts.shape[-1])
    shapes, prompt_shapes, ceiling = outlines(made), outlines(prompts), outlines(again)
    named = Classifier.load().classify(made)[:, None].eq(scenes.glyph).any(1).float()
    alone = (scenes.glyph[:, 1] < 0) & (scenes.pattern == 0)  # where a figure's middle can be found
    place = (middle(figure(made, scenes)) - middle(figure(prompts, scenes))).norm(dim=1)
    return {
        "retrieval": retrieval(embed_pictures(made), embed_pictures(prompts)),
        "own glyph": named.where((scenes.glyph < glyphs.seen).all(1), torch.nan),
        "colour error": colour_error(made, scenes),
        "another's": colour_error(made, other),
        "place error": place.where(alone, torch.nan),
        "outline likeness": (shapes * prompt_shapes).sum(1),
        "another's outline": (shapes * prompt_shapes.roll(1, 0)).sum(1),
        "outline drawn again": (ceiling * prompt_shapes).sum(1),
    }


def count_of(world: World) -> int:
    """Return the number of scenes to measure on, fewer in a rehearsal."""
    return COUNT if world.most is None else min(COUNT, 2 * world.most)


def with_text(
    model: Model, pipe: ImagePromptPipeline, glyphs: Glyphs, world: World, scale: float
) -> tuple[Row, Tensor, Tensor]:
    """Measure results whose text names one glyph and whose image prompt shows another.

    A result is right if it has the text's glyph in the image's palette. Returns the measures, the
    prompts and the results.
    """
    generator, count = world.generator(43), count_of(world)
    scenes = SETS["core glyphs, new compositions"].scenes(glyphs, count, generator, pairs=0)
    named = (
        scenes.glyph[:, 0] + 1 + torch.randint(glyphs.core - 1, (count,), generator=generator)
    ) % glyphs.core
    prompts = render(scenes, glyphs, world.side)
    texts = [article(glyphs.names[g]) for g in named.tolist()]
    made = model.make(pipe, prompts, texts, scale)
    error, other = colour_error(made, scenes), colour_error(made, shuffled(scenes))
    found = Classifier.load().classify(made)
    glyph, palette = found.eq(named), error < RIGHT * other.mean()
    values = {
        "text's glyph": glyph,
        "image's glyph": found.eq(scenes.glyph[:, 0]),
        "image's palette": palette,
        "both right": glyph & palette,
    }
    return means({name: value.float() for name, value in values.items()}), prompts, made


def by_text(
    model: Model, pipe: ImagePromptPipeline, glyphs: Glyphs, world: World, folder: Path
) -> dict[str, Row]:
    """Measure the base alone: whether the text's glyph and background colour are in the results.

    At scale 0 the results are the base's own.
    """
    rows, count = {}, count_of(world)
    blank = torch.ones(count, 3, world.side, world.side)
    for label, ids in {
        "core glyphs": range(glyphs.core),
        "other seen glyphs": range(glyphs.core, glyphs.seen),
    }.items():
        generator = world.generator(46, len(ids))
        named = torch.tensor(ids)[torch.randint(len(ids), (count,), generator=generator)]
        colours = torch.randint(len(PALETTE) - UNSEEN_COLOURS, (count,), generator=generator)
        texts = [
            f"{article(glyphs.names[g])} on {article(COLOUR_NAMES[c])} background"
            for g, c in zip(named.tolist(), colours.tolist(), strict=True)
        ]
        made = model.make(pipe, blank, texts, scale=0.0)
        ground = torch.tensor(list(PALETTE.values()))[colours]
        edge = torch.cat([made[:, :, :6].flatten(2), made[:, :, -6:].flatten(2)], 2).mean(2)
        rows[label] = means(
            {
                "text's glyph": Classifier.load().classify(made).eq(named).float(),
                "colour error to the text's": (edge - ground).abs().mean(1) * 255,
            }
        )
        draw_sheet(
            folder / f"text-{label.replace(' ', '-')}.jpg",
            [""] * 8,
            [("", [*made[i : i + 8]]) for i in range(0, min(48, count), 8)],
        )
    return rows


def check_metric_encoder(glyphs: Glyphs, world: World) -> Row:
    """Measure the metric encoder and the classifier on real scenes.

    A scene drawn again should be found, and its glyph named.
    """
    generator = world.generator(44)
    scenes = sample_scenes(glyphs, count_of(world), generator, pairs=0)
    pictures, redrawn = (
        render(drawn, glyphs, world.side) for drawn in (scenes, moved(scenes, generator))
    )
    return {
        "scene drawn again found": retrieval(embed_pictures(redrawn), embed_pictures(pictures))
        .mean()
        .item(),
        "glyph named": Classifier.load()
        .classify(pictures)
        .eq(scenes.glyph[:, 0])
        .float()
        .mean()
        .item(),
    }


def evaluate(world: World) -> None:
    """Measure the shipped model; write results.json, the sheets and the model card's tables."""
    world = replace(world, device="cpu")  # fast enough, and the same numbers on every machine
    glyphs = world.glyphs()
    SHEETS.mkdir(parents=True, exist_ok=True)
    results: dict[str, Row] = {"metric encoder": check_metric_encoder(glyphs, world)}
    vae = AutoencoderKL.from_pretrained(SHIPPED / "vae")
    for number, (label, kind) in enumerate(SETS.items()):
        pictures = render(kind.scenes(glyphs, 256, world.generator(41, number)), glyphs, world.side)
        results[f"autoencoder: {label}"] = means(
            {"PSNR": psnr(reconstruct(vae, pictures), pictures)}
        )
    results |= measure_model(PACKAGED, world, glyphs, SHEETS)
    (SHEETS / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    fill_sections(SHIPPED / "README.md", {"parts": parts(), "measured": table(results)})
    print(table(results))


def measure_model(model: Model, world: World, glyphs: Glyphs, folder: Path) -> dict[str, Row]:
    """Measure a model by text alone, by its adapters, and by both; draw sheets into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Row] = {}
    for name in model.adapters:
        pipe = model.open(name)
        if not results:
            texts = by_text(model, pipe, glyphs, world, folder)
            results |= {f"text alone: {label}": row for label, row in texts.items()}
        for number, (label, kind) in enumerate(SETS.items()):
            generator = world.generator(42, number)
            scenes = kind.scenes(glyphs, count_of(world), generator)
            values, prompts, made = follow(model, pipe, world, glyphs, scenes, generator)
            results[f"{name}: {label}"] = means(values)
            sheet(prompts, made, folder / f"{name}-{label.replace(',', '').replace(' ', '-')}.jpg")
            print(name, label, results[f"{name}: {label}"], flush=True)
            if name == FRONT and not number:
                sheet(prompts, made, folder / "prompts-and-results.jpg", pairs=15, columns=5)
        for scale in SCALES:
            row, prompts, made = with_text(model, pipe, glyphs, world, scale)
            results[f"{name}: text and image, scale {scale}"] = row
            print(name, "text", scale, row, flush=True)
            if scale == 0.5:
                sheet(prompts, made, folder / f"{name}-with-text.jpg")
    return results


def evaluate_transformers(world: World) -> None:
    """Measure the transformers in the world's folder; write their results, sheets and tables."""
    world = replace(world, device="cpu")
    glyphs = world.glyphs()
    for name in TRANSFORMERS:
        adapters = {name: str(world.folder / f"adapter-{name}")}
        model = Model(str(world.folder / name), adapters, GUIDED[name])
        results = measure_model(model, world, glyphs, SHEETS / name)
        (SHEETS / name / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (SHEETS / name / "results.md").write_text(table(results) + "\n")
        print(table(results))


def parts() -> str:
    """Write a table row for each part that ships: its class and number of parameters."""
    rows = []
    for path in sorted(SHIPPED.rglob("*.safetensors")):
        config = path.parent / "config.json"
        facts = json.loads(config.read_text()) if config.exists() else {}
        bare = "LoRA" if path.parent.parent.name == "styles" else "IPAdapter"
        kind = facts.get("_class_name") or next(iter(facts.get("architectures", [bare])))
        label = path.stem if path.parent.name == "adapters" else path.parent.name
        rows.append(f"| {label} | {kind} | {weights_in(path):,} |")
    return "\n".join(rows)


PERCENT = {
    "retrieval",
    "own glyph",
    "own glyph, metric encoder",
    "text's glyph",
    "image's glyph",
    "image's palette",
    "both right",
    "scene drawn again found",
    "glyph named",
}


def shown(measure: str, value: Interval | float) -> str:
    """Format a mean with its 95 % interval in brackets, or a dash for NaN."""
    numbers = (
        [value] if isinstance(value, float) else [number for number in value if number is not None]
    )
    if numbers[0] != numbers[0]:  # NaN: the classifier knows the seen glyphs only
        return "–"
    form = (
        "{:.1%}"
        if measure in PERCENT
        else "{:.2f}"
        if "outline" in measure or "place" in measure
        else "{:.1f}"
    )
    mean, *ends = (form.format(number) for number in numbers)
    return f"{mean} ({' to '.join(ends)})" if ends else mean


def table(results: Mapping[str, Row]) -> str:
    """Write the results in Markdown: a table for each set of measures, a row for each result."""
    tables: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for label, row in results.items():
        tables.setdefault(tuple(row), {})[label] = [
            shown(measure, value) for measure, value in row.items()
        ]
    return "\n\n".join(markdown_table(columns, rows) for columns, rows in tables.items())
