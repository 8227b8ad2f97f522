"""Time and peak memory of a transformer's step: the cost of an image prompt.

    python -m benchmarks.transformers           # on a GPU the published sizes, on a CPU tiny ones
    python -m benchmarks.transformers --dry     # tiny sizes anywhere: does every part run?

The base alone, diffusers' own adapter where it has one (XLabs' for Flux, InstantX' for Stable
Diffusion 3) and ours are interleaved around the same random weights. Flux is guidance-distilled, a
batch of one; the others run both branches of guidance. With --compile a step is also compiled.
Tiny sizes show that all runs, and say nothing of speed.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.implementations import IMPROMPT, TEXT
from benchmarks.interleave import InThisProcess, interleave
from benchmarks.random_models import DTYPES
from benchmarks.record import (
    RESULTS,
    Bar,
    Outcome,
    Record,
    join,
    left_out,
    note,
    options,
    parsed,
    spread,
    table,
    verdicts,
)
from benchmarks.transformer_models import PEER, TRANSFORMERS, Call, TransformerScene
from imprompt.training.watch import GB

TITLE = "Time and memory of a transformer's step"
STEP, COMPILED = "a step", "a step, compiled"
TINY = tuple(name for name in TRANSFORMERS if name.endswith("-tiny"))
PLANS = {  # device -> models, largest first: the most important one is measured if time runs out
    "cuda": ("flux-dev", "sd3.5-medium", "pixart-sigma"),
    "cpu": TINY,
}
REPEATS = {"cuda": 10, "cpu": 2}  # steps in a round
AT_MOST = 1.05  # time of ours over the base alone, on a GPU


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, record and print; return the exit code 0."""
    args = parse(arguments)
    record = Record("transformers", arguments, args.device, args.record)
    if args.device == "cpu":
        record.skip("the published sizes", "too much for a CPU; they need a GPU")
        record.skip("peak memory", "tensors are counted on a GPU only")
    for model in args.model or (TINY if args.dry else PLANS[args.device]):
        for found in run(model, args):
            record.add(found.row(), bars_of(found))
    record.show(section(record.rows))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = options("transformers", __doc__)
    parser.add_argument("--model", choices=TRANSFORMERS, nargs="+", help="models to measure")
    parser.add_argument("--dry", action="store_true", help="tiny sizes instead of the published")
    parser.add_argument("--compile", action="store_true", help="measure compiled steps too")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    args = parsed(parser, arguments, narrows=("model", "dry", "compile", "precision"))
    if args.device == "cpu" and args.record is not None and args.record.parent == RESULTS:
        args.record = None  # tiny sizes say nothing
    return args


def run(model: str, args: argparse.Namespace) -> Iterator[Outcome]:
    """Measure a step of every implementation, and a compiled step where it is asked for."""
    scene = TransformerScene(model, args.device, DTYPES[args.precision])
    setting = {"device": args.device, "model": model, "batch": scene.of.batch}
    setting |= {"pixels": 8 * scene.of.side, "precision": args.precision, "steps": 1}
    peaks = {name: peak(make, args.device) for name, make in scene.calls().items()}
    for what in (STEP, COMPILED) if args.compile else (STEP,):
        steps = {name: make(what == COMPILED) for name, make in scene.calls().items()}
        timed = {name: InThisProcess(step, args.device) for name, step in steps.items()}
        loops = interleave(
            timed,
            args.rounds,
            REPEATS[args.device],
            lambda name, seconds, what=what: note(model, what, f"{name}: {seconds:.4f} s"),
        )
        if what == STEP:
            for name, loop in loops.items():
                loop.peak = peaks[name]
        yield Outcome({**setting, "what": what}, loops)


def peak(make: Callable[[], Call], device: str) -> float:
    """Return the most memory of an implementation's step, built alone, in 1e9 bytes; 0 on a CPU.

    It counts all tensors on a GPU: those of the base, of the adapter, and of the step.
    """
    if device != "cuda":
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    step = make()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / GB


def bars_of(found: Outcome) -> list[Bar]:
    """Return the bars for a published size on a GPU."""
    setting = found.setting
    if setting["device"] != "cuda" or setting["model"] in TINY:
        return []
    what = f"{setting['model']}, {setting['what']}: time, ours over"
    others = {TEXT: AT_MOST, PEER: 1.0}
    return [
        Bar(f"{what} {name}", 1 / median(found.times(IMPROMPT, name)), most, most=True)
        for name, most in others.items()
        if name in found.loops
    ]


def section(rows: Mapping[str, Any]) -> str:
    """Return a record's table in Markdown."""
    lines = []
    for row in rows["outcomes"]:
        found = Outcome.read(row)
        setting = found.setting
        for name, loop in found.loops.items():
            others = [
                spread(found.times(name, other), ".2f") if other in found.loops else "-"
                for other in (TEXT, PEER)
            ]
            memory = f"{loop.peak:.2f}" if loop.peak else "-"
            lines.append(
                (
                    f"{setting['model']}, {setting['pixels']} pixels, batch {setting['batch']}",
                    f"{setting['what']}, {setting['precision']}",
                    name,
                    spread(loop.seconds, ".4g"),
                    *others,
                    memory,
                )
            )
    heads = ("model", "what", "who", "s (range)", "× text only", f"× {PEER}", "peak GB")
    return join(table(heads, lines) if lines else "", verdicts(rows), left_out(rows))


if __name__ == "__main__":
    sys.exit(main())
