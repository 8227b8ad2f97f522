"""Compare AdamW and Muon for adapters, with and without a loss weighted to the figure.

The question is which way learns more from the same samples, and in less time. Every way trains the
plus adapter by its recipe from three seeds. Learning rates are chosen first, for each optimizer, on
another seed. Writes a table and a figure for docs/training.md.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

from imprompt.evaluation.metrics import bootstrap_interval
from imprompt.training.loop import train
from imprompt.training.recipe import RECIPES, read_recipe
from imprompt.training.watch import Metrics
from worlds.emoji.assemble import recipe_changes
from worlds.emoji.train_utils import World

from .evaluate import PACKAGED, SETS, follow
from .markdown_tables import fill_sections, markdown_table
from .paths import DOCS, REPORTS

GUIDE = DOCS / "training.md"
VARIANT = "plus"
STEPS, EVERY, SEEDS = 300, 75, (1, 2, 3)
SCENES = 64  # on which results are measured
RATES = {"adamw": (5e-4, 1e-3, 2e-3, 4e-3), "muon": (1e-3, 2e-3, 4e-3, 8e-3)}
WEIGHTS = {"": 0.0, ", figure weighs 4": 3.0}
MEASURES = ("own glyph", "colour error", "outline likeness")
FIGURE = REPORTS / "training" / "optimizers.png"


class Curve(NamedTuple):
    """Held-out losses, unweighted, with the samples and seconds of training before each."""

    samples: list[float]
    seconds: list[float]
    losses: list[float]

    def reaches(self, loss: float) -> tuple[float, float] | None:
        """Return the interpolated samples and seconds after which the loss first falls to `loss`.

        None if it never does.
        """
        before = (0.0, 0.0, float("inf"))
        for now in zip(*self, strict=True):
            if now[2] <= loss:
                share = (
                    (before[2] - loss) / (before[2] - now[2]) if before[2] < float("inf") else 1.0
                )
                return tuple(a + share * (b - a) for a, b in zip(before[:2], now[:2], strict=True))
            before = now
        return None


def run(world: World, optimizer: str, rate: float, weight: float, seed: int) -> Path:
    """Return the folder of a run with these settings; first train or resume it if needed."""
    steps = min(STEPS, world.most or STEPS)
    output = world.folder / "optimizers" / f"{optimizer}-{rate:g}-{weight:g}-{seed}-{steps}"
    changes = [
        *recipe_changes(world, VARIANT),
        f'output="{output}"',
        f'optimization.optimizer="{optimizer}"',
        f"optimization.learning_rate={rate}",
        f"optimization.steps={steps}",
        f"noise.mask_weight={weight}",
        f"seed={seed}",
        f"save_every={EVERY}",
        "keep=1",
        "validation={}",
    ]
    recipe = read_recipe(RECIPES / f"emoji-{VARIANT}.toml", changes)
    if not (output / f"step-{steps:07d}").exists():
        train(recipe)
    return output


def curve(world: World, folder: Path, step_seconds: float = 0.0) -> Curve:
    """Read a run's log; its seconds are computed as if every step took `step_seconds`."""
    batch = read_recipe(
        RECIPES / f"emoji-{VARIANT}.toml", recipe_changes(world, VARIANT)
    ).optimization.batch_size
    rows = [row for row in Metrics(folder).read() if "held_out_loss" in row]
    steps = [float(row["step"]) for row in rows]
    return Curve(
        [step * batch for step in steps],
        [step * step_seconds for step in steps],
        [row["held_out_loss"] for row in rows],
    )


def quickest(folders: Iterable[Path]) -> float:
    """Return the shortest time of a step, in seconds, in the runs' logs.

    This leaves out the delays by other work on the machine.
    """
    return min(
        row["step_seconds"]
        for folder in folders
        for row in Metrics(folder).read()
        if "step_seconds" in row
    )


def measured(world: World, folder: Path) -> dict[str, torch.Tensor]:
    """Measure what results take from their prompts, by picture (N,)."""
    glyphs, generator = world.glyphs(), world.generator(47)
    scenes = SETS["core glyphs, new compositions"].scenes(glyphs, SCENES, generator)
    model = replace(PACKAGED, adapters={"tried": str(folder / "latest")})
    values, _, _ = follow(model, model.open("tried"), world, glyphs, scenes, generator)
    return {name: values[name] for name in MEASURES}


def best_rate(world: World, optimizer: str) -> float:
    """Return the learning rate with the lowest held-out loss, of those tried on a separate seed."""
    losses = {
        rate: curve(world, run(world, optimizer, rate, 0.0, 0)).losses[-1]
        for rate in RATES[optimizer]
    }
    print(optimizer, losses, flush=True)
    return min(losses, key=lambda rate: losses[rate])


def compare(world: World) -> None:
    """Run all ways; print their results, and write the table and the figure."""
    rates = {optimizer: best_rate(world, optimizer) for optimizer in RATES}
    ways = {
        f"{optimizer}, {rate:g}{words}": [
            run(world, optimizer, rate, weight, seed) for seed in SEEDS
        ]
        for optimizer, rate in rates.items()
        for words, weight in WEIGHTS.items()
    }
    curves = {
        name: [curve(world, folder, quickest(folders)) for folder in folders]
        for name, folders in ways.items()
    }
    # the loss that the first way reaches from every seed
    goal = max(one.losses[-1] for one in curves[next(iter(curves))])
    rows = {}
    for name, folders in ways.items():
        reached = [one.reaches(goal) for one in curves[name]]
        cells = [f"{fmean(one.losses[-1] for one in curves[name]):.4f}"]
        for part in range(2):
            values = [found[part] for found in reached if found is not None]
            cells.append(
                f"{fmean(values):,.0f} ({len(values)} of {len(SEEDS)})" if values else "not reached"
            )
        results = [measured(world, folder) for folder in folders]
        for measure in MEASURES:
            values = torch.stack([result[measure] for result in results]).nanmean(0)
            there = values[~values.isnan()]
            value, low, high = bootstrap_interval(there, torch.arange(len(there)))
            cells.append(f"{value:.3g} ({low:.3g} to {high:.3g})")
        rows[name] = cells
        print(name, cells, flush=True)
    columns = [
        "held-out loss at the end",
        f"samples to {goal:.4f}",
        f"seconds to {goal:.4f}",
        *MEASURES,
    ]
    draw(curves)
    fill_sections(GUIDE, {"optimizers": markdown_table(columns, rows)})


def draw(curves: Mapping[str, list[Curve]]) -> None:
    """Draw held-out losses against samples and against seconds, a line for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, along in zip(figure.subplots(1, 2, sharey=True), ("samples", "seconds"), strict=True):
        for number, (name, runs) in enumerate(curves.items()):
            for seed, one in enumerate(runs):
                axes.plot(
                    getattr(one, along),
                    one.losses,
                    color=f"C{number}",
                    alpha=0.8,
                    label=None if seed else name,
                )
        axes.set_xlabel(along)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("held-out loss, unweighted")
    figure.axes[1].legend(frameon=False)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)
