"""The setup that claims share: scenes as image prompts, generators, measures, tables of intervals.

Samples are cached in the world's folder: an interrupted run continues, and claims share their
samples.

Shape letters: N pictures, I scenes, K seeds of each, S pixels a side.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from imprompt.evaluation.metrics import Interval, bootstrap_interval, difference
from imprompt.files import atomic_write
from worlds.emoji.assemble import SHIPPED
from worlds.emoji.glyphs import Glyphs
from worlds.emoji.scenes import Scenes, article, captions, render, sample_scenes, shuffled
from worlds.emoji.train_utils import World

from . import baselines
from .baselines import BASELINES, Base, ImageFeatures
from .markdown_tables import markdown_table
from .measures import (
    RIGHT,
    Classifier,
    background_error,
    colour_error,
    embed_pictures,
    embed_texts,
    figure,
    middle,
    outlines,
)
from .paths import REPORTS
from .sampler import GUIDANCE, Condition, Sampler
from .sheets import draw_sheet

PAGE = REPORTS / "claims.md"
SHEETS = PAGE.with_suffix("")
SCENES, SEEDS = 80, 2
STEPS = 25
DIVERSE = 6  # seeds of a scene where diversity is measured
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
SHOWN = 6  # rows of a sheet
# folders of the packaged model that a baseline is built from
PARTS = ("unet", "vae", "text_encoder", "image_encoder", "scheduler")
# prompts (N, 3, S, S), texts, scale -> results (N, 3, S, S)
Generate = Callable[[Tensor, Sequence[str], float], Tensor]
Measured = dict[str, Tensor]  # name -> a value a picture (N,), or a vector (N, …)


@dataclass
class Table:
    """A table whose cells are numbers, texts, or values with their confidence intervals."""

    columns: list[str]
    rows: dict[str, list[Interval | float | str]] = field(default_factory=dict)

    def markdown(self) -> str:
        """Write the table in Markdown."""
        return markdown_table(
            self.columns,
            {name: [shown(cell) for cell in cells] for name, cells in self.rows.items()},
        )


def shown(cell: Interval | float | str) -> str:
    """Format a cell: an interval as its value with the two ends, a number, or a text."""
    if isinstance(cell, str):
        return cell
    if not isinstance(cell, Interval):
        return f"{cell:.3g}"
    digits = 1 if abs(cell.value) >= 2 else 3
    low, high = cell.low, cell.high
    return f"{cell.value:.{digits}f}" + (
        "" if low is None or high is None else f" ({low:.{digits}f} to {high:.{digits}f})"
    )


@dataclass
class Claim:
    """One claim of the paper: how it is tested here, and the results."""

    title: str
    rule: str  # condition under which the claim holds
    tables: list[Table | str]
    pictures: tuple[str, ...] = ()  # names of files in SHEETS
    decides: Mapping[str, Interval] = field(default_factory=dict)  # differences
    above: float = 0.0  # the claim holds if all these intervals are completely above this
    stated: str = ""  # the verdict where no interval decides
    # digests of the drawn results -> seconds that each took
    drawn: Mapping[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Verdict by the intervals in `decides`: "yes", "no", "undecided" or "not measured"."""
        if self.stated or not self.decides:
            return self.stated or "not measured"
        if all(gap.low is not None and gap.low > self.above for gap in self.decides.values()):
            return "yes"
        return (
            "no"
            if any(gap.high is not None and gap.high <= self.above for gap in self.decides.values())
            else "undecided"
        )


class Harness:
    """Scenes as image prompts, with functions that draw results and measure them."""

    def __init__(self, world: World) -> None:
        self.world = replace(world, device="cpu")
        self.drawn: dict[str, float] = {}
        self.glyphs: Glyphs = self.world.glyphs()
        self.classifier = Classifier.load()
        generator = self.world.generator(101)
        self.scenes = repeated(
            sample_scenes(self.glyphs, SCENES, generator, pairs=0, core=1.0), SEEDS
        )
        self.items = torch.arange(len(self.scenes)) // SEEDS
        self.pictures = render(self.scenes, self.glyphs, self.world.side)
        self.captions = captions(self.scenes, self.glyphs, generator)
        other = torch.randint(
            1, self.glyphs.core, (SCENES,), generator=generator
        ).repeat_interleave(SEEDS)
        self.named = (self.scenes.glyph[:, 0] + other) % self.glyphs.core
        self.texts = [article(self.glyphs.names[g]) for g in self.named.tolist()]
        self.names = embed_texts([article(name) for name in self.glyphs.names[: self.glyphs.core]])
        self.no_texts = [""] * len(self.scenes)
        self.another = shuffled(self.scenes, SEEDS)
        self.too_wrong = RIGHT * colour_error(self.pictures, self.another).mean()

    @cached_property
    def base(self) -> Base:
        """The frozen base model and image encoder, for the baselines."""
        return Base(self.world)

    @cached_property
    def of_prompts(self) -> Measured:
        """Measures of the prompts themselves, which results are compared with."""
        return {
            "image": embed_pictures(self.pictures),
            "caption": embed_texts(self.captions),
            "outlines": outlines(self.pictures),
            "middle": middle(figure(self.pictures, self.scenes)),
        }

    def shipped(self, name: str, style: Path | None = None, maps: Tensor | None = None) -> Generate:
        """Return a function that draws results with the packaged adapter called `name`.

        style  folder of a LoRA that the base draws in
        maps   edge maps (N, 3, S, S) of the outlines that the ControlNet keeps
        """
        opened = cache(lambda: Sampler(style, name))  # loaded only if a sample is not cached

        def draw(prompts: Tensor, texts: Sequence[str], scale: float) -> Tensor:
            def part_of(part: range) -> Tensor:
                rows = slice(part.start, part.stop)
                return opened().sample(
                    len(part),
                    Condition(prompts[rows], scale),
                    texts=texts[rows],
                    maps=None if maps is None else maps[rows],
                    seed=part.start,
                    steps=STEPS,
                )

            return in_parts(part_of, len(prompts))

        return self.cached(draw, SHIPPED, name, style and style.name, maps)

    def baseline(self, name: str) -> Generate:
        """Return a function that draws results with the trained baseline called `name`."""
        opened = cache(lambda: baselines.load(self.world, self.base, name))

        def draw(prompts: Tensor, texts: Sequence[str], scale: float) -> Tensor:
            def part_of(part: range) -> Tensor:
                part_texts = texts[part.start : part.stop]
                text = self.base.encode_texts(part_texts)
                if not BASELINES[name].reads_text and not any(part_texts):
                    text = text[:, :0]
                seen: ImageFeatures = self.base.encode_images(prompts[part.start : part.stop])
                return baselines.sample(
                    self.base,
                    opened(),
                    text,
                    seen,
                    scale=scale,
                    guidance=GUIDANCE,
                    steps=STEPS,
                    seed=part.start,
                )

            return in_parts(part_of, len(prompts))

        return self.cached(
            draw, *(SHIPPED / part for part in PARTS), baselines.file_of(self.world, name)
        )

    def cached(self, draw: Generate, *of: object) -> Generate:
        """Wrap `draw` so that its results are stored in files as bytes.

        A file is named by a digest of the weights `of` which the results depend and of all other
        inputs.
        """

        def drawn(prompts: Tensor, texts: Sequence[str], scale: float) -> Tensor:
            name = digest(*of, prompts, list(texts), float(scale), STEPS, GUIDANCE)
            path = self.world.folder / "claims" / f"{name}.safetensors"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                started = time.monotonic()
                pictures = (draw(prompts, texts, scale) * 255).round().byte()
                with atomic_write(path) as temporary:
                    save_file(
                        {"pictures": pictures.contiguous()},
                        temporary,
                        {"seconds": f"{time.monotonic() - started:.1f}"},
                    )
            with safe_open(path, "pt") as file:
                self.drawn[name] = float(file.metadata()["seconds"])
                return file.get_tensor("pictures").float() / 255

        return drawn

    @property
    def trained(self) -> list[str]:
        """Names of the baselines that are trained in this world's folder."""
        return [name for name in BASELINES if baselines.file_of(self.world, name).exists()]

    def measure(self, made: Tensor) -> Measured:
        """Compare results (N, 3, S, S) with their prompts, and with the glyphs that texts named."""
        seen, named = embed_pictures(made), self.classifier.classify(made)
        prompts = self.of_prompts
        place = (middle(figure(made, self.scenes)) - prompts["middle"]).norm(dim=1)
        colour = colour_error(made, self.scenes)
        palette, text = (colour < self.too_wrong).float(), named.eq(self.named).float()
        likest = (seen @ self.names.T).argmax(1)
        return {
            "CLIP-I": (seen * prompts["image"]).sum(1),
            "CLIP-T": (seen * prompts["caption"]).sum(1),
            "found again": (seen @ prompts["image"][::SEEDS].T).argmax(1).eq(self.items).float(),
            "colour error": colour,
            "own glyph": named.eq(self.scenes.glyph[:, 0]).float(),
            "background error": background_error(made, self.scenes),
            "outline likeness": (outlines(made) * prompts["outlines"]).sum(1),
            "place error": torch.where(self.scenes.pattern == 0, place, torch.nan),
            "text's glyph": text,
            "text's glyph, metric encoder": likest.eq(self.named).float(),
            "own glyph, metric encoder": likest.eq(self.scenes.glyph[:, 0]).float(),
            "image's palette": palette,
            "both": palette * text,
        }

    def interval(self, values: Tensor) -> Interval:
        """Return the mean with its bootstrap interval over scenes; NaN values are left out."""
        there = ~values.isnan()
        return bootstrap_interval(values[there], self.items[there])

    def apart(self, one: Tensor, other: Tensor) -> Interval:
        """Return the mean difference of two measures with its interval; NaN values are left out."""
        there = ~(one.isnan() | other.isnan())
        return difference(one[there], self.items[there], other[there], self.items[there])

    def row(self, measured: Measured, names: Sequence[str]) -> list[Interval | float | str]:
        """Return the intervals of the named measures, as a table's row."""
        return [self.interval(measured[name]) for name in names]

    def sheet(
        self, name: str, columns: Mapping[str, Tensor], labels: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """Draw a contact sheet of the first scenes: the image prompt, then each column's results.

        Returns the file's name in a tuple.
        """
        rows = [
            (
                labels[i] if labels else "",
                [self.pictures[i], *(made[i] for made in columns.values())],
            )
            for i in range(0, SHOWN * SEEDS, SEEDS)
        ]
        draw_sheet(SHEETS / f"{name}.jpg", ["image prompt", *columns], rows)
        return (f"{name}.jpg",)


FIDELITY = (
    "CLIP-I",
    "CLIP-T",
    "found again",
    "colour error",
    "background error",
    "own glyph",
    "own glyph, metric encoder",
    "outline likeness",
    "place error",
)


def digest(*parts: object) -> str:
    """Compute a digest of numbers, texts, tensors, and of weights and configurations in files.

    A path is a file, or a folder whose .json and .safetensors files count.
    """
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            files = sorted(
                path
                for path in (part, *part.rglob("*"))
                if path.suffix in (".json", ".safetensors")
            )
            data = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)
        else:
            data = part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode()
        whole.update(hashlib.sha256(data).digest())
    return whole.hexdigest()[:32]


def repeated(scenes: Scenes, times: int) -> Scenes:
    """Repeat each scene `times` times in a row."""
    return scenes[torch.arange(len(scenes)).repeat_interleave(times)]


def in_parts(draw: Callable[[range], Tensor], count: int, size: int = 32) -> Tensor:
    """Draw `count` results in parts of at most `size`, and join them."""
    return torch.cat(
        [draw(range(start, min(start + size, count))) for start in range(0, count, size)]
    )
