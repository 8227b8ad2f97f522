"""Our training loop and the paper's: samples per second, peak memory, share of the ceiling.

    python -m benchmarks.training                  # SD 1.5 at 512 pixels, on a GPU or else the CPU
    python -m benchmarks.training --device cuda    # and SDXL's memory at 1024 pixels

Both train on data that is already in memory. README.md describes what is compared and how; the
ceiling is the rate of a large matrix product.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from benchmarks.interleave import Loop, measure
from benchmarks.our_loop import CompiledLoop, OurLoop
from benchmarks.paper import PaperLoop
from benchmarks.random_models import DTYPES, RANDOM_MODELS
from benchmarks.record import (
    Bar,
    Outcome,
    Record,
    join,
    matrix_rate,
    note,
    options,
    parsed,
    spread,
    table,
    verdicts,
)
from benchmarks.setting import TrainingSetting
from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.errors import ImpromptError
from imprompt.families.base import find_family
from imprompt.training.estimate import Sizes, blank_base, one_step

TITLE = "Training"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "ip-adapter")
PAPER, OUR_LOOP, COMPILED = "the paper's", "ours", "ours, compiled"
LOOPS: dict[str, Callable[[TrainingSetting], Loop]] = {
    PAPER: PaperLoop,
    OUR_LOOP: OurLoop,
    COMPILED: CompiledLoop,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, record and print; return the exit code, 1 if a loop fails."""
    args = parse(arguments)
    record = Record("training", arguments, args.device, args.record, PACKAGES)
    try:
        for found in run(args):
            record.add(row(found), bars_of(found))
    except ImpromptError as error:
        print(error, file=sys.stderr)
        return 1
    record.show(section(record.rows))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line and set the device's defaults."""
    parser = options("training", __doc__)
    parser.add_argument(
        "--model",
        choices=RANDOM_MODELS,
        help="model to measure (default: sd15, and on a GPU also SDXL's memory)",
    )
    parser.add_argument(
        "--batch", type=int, help="samples a step (8, as in the paper's script; 1 on a CPU)"
    )
    parser.add_argument("--pixels", type=int, help="pixels a side (default: the model's own)")
    parser.add_argument("--steps", type=int, help="steps in a round (10; 1 on a CPU)")
    parser.add_argument(
        "--precision",
        choices=DTYPES,
        default="bf16",
        help="precision of the frozen models and of the paper's autocast (bf16)",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also measure our loop compiled (default: on a GPU)",
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="use gradient checkpointing in our loop"
    )
    args = parsed(
        parser, arguments, narrows=("model", "batch", "pixels", "precision", "checkpointing")
    )
    cpu = args.device == "cpu"
    args.batch = args.batch or (1 if cpu else 8)
    args.steps = args.steps or (1 if cpu else 10)
    args.compile = not cpu if args.compile is None else args.compile
    return args


def run(args: argparse.Namespace) -> Iterator[Outcome]:
    """Measure both loops; on a GPU, unless a model is named, also our loop on SDXL."""
    model = args.model or "sd15"
    setting = TrainingSetting(
        device=args.device,
        model=model,
        batch=args.batch,
        pixels=args.pixels or RANDOM_MODELS[model].base.side,
        precision=args.precision,
        checkpointing=args.checkpointing,
    )
    names = [PAPER, OUR_LOOP] + [COMPILED] * args.compile
    yield outcome(setting, names, args.rounds, args.steps)
    if args.device == "cuda" and args.model is None:
        sdxl = TrainingSetting("cuda", "sdxl", 1, 1024, args.precision, args.checkpointing)
        yield outcome(sdxl, [OUR_LOOP], args.rounds, args.steps)


def outcome(setting: TrainingSetting, names: list[str], rounds: int, steps: int) -> Outcome:
    """Measure the named loops at a setting."""

    def on_run(name: str, seconds: float) -> None:
        note(setting.model, f"{name}: {seconds:.3f} s a step")

    ceiling = matrix_rate(
        setting.device, setting.precision, side=64 if setting.model == "tiny" else 0
    )
    loops = measure({name: LOOPS[name] for name in names}, setting, rounds, steps, on_run)
    return Outcome(asdict(setting), loops, flops(setting), ceiling)


def flops(setting: TrainingSetting) -> float:
    """Count the FLOPs of one training sample, which are the same for all loops.

    They are counted on the meta device.
    """
    of = setting.models
    base = blank_base(of.base, DTYPES[setting.precision])
    embedding, token_dim = of.vision["projection_dim"], base.config.cross_attention_dim
    with torch.device("meta"):
        adapter = IPAdapter.for_model(base, ImageProjection(embedding, token_dim)).attach(base)
    conditions = find_family(of.base.family).condition_shapes(base.config, of.base.text_tokens)
    sizes = Sizes((4, setting.side, setting.side), {"image": (embedding,)}, conditions)
    return one_step(base, adapter, sizes.batch(1), fused=True)[0]


def bars_of(found: Outcome) -> list[Bar]:
    """Return the bars of each of our loops at this device, model and size."""
    setting, our_loops = found.setting, [name for name in found.loops if name != PAPER]
    device, model, pixels = setting["device"], setting["model"], setting["pixels"]
    bars = []
    for name in our_loops:
        if (device, model, pixels) == ("cpu", "sd15", 512):
            bars.append(
                Bar(f"samples/s, {name} over the paper's", median(found.times(name, PAPER)), 1.7)
            )
        if (device, model, pixels) == ("cuda", "sd15", 512):
            memory = found.loops[name].peak / found.loops[PAPER].peak
            bars += [
                Bar(f"samples/s, {name} over the paper's", median(found.times(name, PAPER)), 2.5),
                Bar(f"peak memory, {name} over the paper's", memory, 0.6, most=True),
                Bar(f"share of the ceiling, {name}", found.share(name), 0.45),
            ]
        if (device, model, pixels, setting["batch"]) == ("cuda", "sdxl", 1024, 1):
            bars.append(
                Bar(
                    f"GB reserved for SDXL at batch 1, {name}",
                    found.loops[name].reserved,
                    24,
                    most=True,
                )
            )
    return bars


def row(found: Outcome) -> dict[str, Any]:
    """Return an outcome as a row for JSON, with rates, shares and ratios."""
    return {
        **found.row(),
        "samples_per_second": {name: found.rate(name) for name in found.loops},
        "share_of_ceiling": {name: found.share(name) for name in found.loops},
        "times_the_papers": {name: found.times(name, PAPER) for name in found.loops}
        if PAPER in found.loops
        else {},
    }


def section(rows: Mapping[str, Any]) -> str:
    """Return a record's tables in Markdown."""
    return join(*(outcome_table(Outcome.read(row)) for row in rows["outcomes"]), verdicts(rows))


def outcome_table(found: Outcome) -> str:
    """Return the table of one outcome in Markdown."""
    setting, lines = found.setting, []
    for name, loop in found.loops.items():
        times = spread(found.times(name, PAPER), ".2f") if PAPER in found.loops else "-"
        rate, share = f"{found.rate(name):.3f}", f"{found.share(name):.1%}"
        lines.append((name, spread(loop.seconds, ".3f"), rate, times, f"{loop.peak:.2f}", share))
    what = (
        f"{setting['model']}, {setting['pixels']} pixels, batch {setting['batch']}, "
        f"{setting['precision']}"
    )
    arithmetic = (
        f"{found.flops / 1e12:.3f} TFLOP a sample, ceiling {found.ceiling / 1e12:.2f} TFLOP/s"
    )
    heads = (
        "loop",
        "s a step (range)",
        "samples/s",
        "× the paper's (range)",
        "peak GB",
        "share of ceiling",
    )
    return f"{what}; {arithmetic}\n\n{table(heads, lines)}"


if __name__ == "__main__":
    sys.exit(main())
