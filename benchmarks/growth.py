"""Time and memory of a step as image prompts, image tokens, pixels or images at once grow.

    python -m benchmarks.growth

Compares ours and diffusers' IP-Adapter, which has an adapter loaded for each prompt, so that both
compute the same sum. All use guidance.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.implementations import (
    IMPLEMENTATIONS,
    IMPROMPT,
    PEER,
    Implementation,
    Scene,
    scene,
    stepper,
)
from benchmarks.interleave import InThisProcess, Measured, forget_peak, interleave, memory_gb
from benchmarks.random_models import DTYPES, RANDOM_MODELS
from benchmarks.record import Outcome, Record, join, left_out, note, options, parsed, spread, table
from benchmarks.setting import PromptedSetting
from imprompt.errors import first_line
from imprompt.training.estimate import LiveBytes
from imprompt.training.watch import GB, peak_memory_gb

TITLE = "Growth"
MODEL = {"cuda": "sd15", "cpu": "sd15-narrow"}
# What grows: the setting's field, its name in tables, and its values.
AXES = {
    "cuda": (
        ("prompts", "image prompts", (1, 2, 4, 8, 16)),
        ("pictures", "image tokens of a prompt", (1, 4, 16, 64, 256)),
        ("pixels", "pixels a side", (512, 768, 1024, 1536, 2048)),
        ("batch", "images at once", (1, 4, 16, 64)),
    ),
    "cpu": (
        ("prompts", "image prompts", (1, 2, 4, 8, 16)),
        ("pictures", "image tokens of a prompt", (1, 4, 16, 64, 256)),
        ("pixels", "pixels a side", (128, 256, 512)),
        ("batch", "images at once", (1, 4, 16, 64)),
    ),
}
TOKENS = 4  # of a picture


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, record and print; return the exit code 0."""
    args = parse(arguments)
    record = Record("growth", arguments, args.device, args.record)
    model = args.model or MODEL[args.device]
    start = PromptedSetting(args.device, model, 1, RANDOM_MODELS[model].base.side, args.precision)
    if args.device == "cpu":
        record.skip(
            "SD 1.5 at its full width", "that many steps are for a GPU; --model sd15 asks for them"
        )
    for found in run(args, start, record):
        record.add(found)
    record.show(section(record.rows))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = options("growth", __doc__, rounds=3)
    parser.add_argument(
        "--model", choices=RANDOM_MODELS, help="model to measure (sd15; on a CPU sd15-narrow)"
    )
    parser.add_argument(
        "--axes",
        choices=[field for field, *_ in AXES["cuda"]],
        nargs="+",
        help="axes to measure (default: all)",
    )
    parser.add_argument("--most", type=int, help="largest value of an axis to measure")
    parser.add_argument("--steps", type=int, default=2, help="steps in a round (2)")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    return parsed(parser, arguments, narrows=("model", "axes", "most", "precision"))


@torch.no_grad()
def run(
    args: argparse.Namespace, start: PromptedSetting, record: Record
) -> Iterator[dict[str, Any]]:
    """Measure every value of every axis; values that exceed the GPU's memory are skipped."""
    base = scene(start).base
    axes = [row for row in AXES[args.device] if args.axes is None or row[0] in args.axes]
    for field, axis, values in axes:
        for value in (value for value in values if args.most is None or value <= args.most):
            of = scene(replace(start, **{field: value}), base=base)
            try:
                loops = measured(of, args)
            except torch.OutOfMemoryError as error:
                record.skip(f"{value} {axis}", first_line(error))
                continue
            note(value, axis, *(f"{name} {loop.seconds[0]:.4f} s" for name, loop in loops.items()))
            shown = value * TOKENS if field == "pictures" else value
            yield Outcome({**asdict(of.setting), "axis": axis, "value": shown}, loops).row()


def measured(of: Scene, args: argparse.Namespace) -> dict[str, Measured]:
    """Measure each implementation's time of a step, and its memory in addition to the weights."""
    joined = {name: IMPLEMENTATIONS[name](of) for name in (PEER, IMPROMPT)}
    calls = {name: stepper(of, implementation) for name, implementation in joined.items()}
    timed = {name: InThisProcess(call, args.device) for name, call in calls.items()}
    found = interleave(timed, args.rounds, args.steps, lambda *_: None)
    for name, call in calls.items():
        prepared = prepared_bytes(of) if name == IMPROMPT else 0
        found[name].peak = taken_gb(call, joined[name], of) + prepared / GB
    return found


def prepared_bytes(of: Scene) -> int:
    """Count the bytes of our prepared keys and values, of the text and every image prompt."""
    return of.adapters[0].injection.cached_bytes() + sum(
        of.prompt(adapter).bytes for adapter in of.prompt_adapters()
    )


def taken_gb(call: Callable[[], Any], implementation: Implementation, of: Scene) -> float:
    """Measure the most memory that one step takes in addition to what was in use before.

    This is PyTorch's memory on a GPU, all tensors' on a CPU.
    """
    device = torch.device(of.setting.device)
    if device.type == "cuda":
        forget_peak(device)
        before = memory_gb(device)
        call()
        return peak_memory_gb(device) - before
    live = LiveBytes([*implementation.unet.parameters(), of.latents, of.text])
    with live:
        call()
    return live.peak / GB


def section(rows: Mapping[str, Any]) -> str:
    """Return a record's tables in Markdown."""
    found = [Outcome.read(row) for row in rows["outcomes"]]
    if not found:
        return left_out(rows)
    first, lines = found[0].setting, []
    for outcome in found:
        setting, loops = outcome.setting, [outcome.loops[name] for name in (PEER, IMPROMPT)]
        each = (
            spread([1000 * seconds / setting["batch"] for seconds in loop.seconds], ",.1f")
            for loop in loops
        )
        memory = (f"{loop.peak * 1000:,.1f}" for loop in loops)
        lines.append(
            (
                setting["axis"],
                f"{setting['value']:,}",
                *each,
                spread(outcome.times(IMPROMPT, PEER), ".2f"),
                *memory,
            )
        )
    heads = ("what grows", "to", f"{PEER}, ms", "ours, ms", "× (range)", f"{PEER}, MB", "ours, MB")
    pixels = min(outcome.setting["pixels"] for outcome in found)
    what = (
        f"{first['model']}, {first['precision']}; if not stated otherwise, 1 image prompt of "
        f"{TOKENS} tokens, 1 image at once, "
        f"{pixels} pixels. ms: of a step, for each image. MB: the most that a step takes "
        "in addition to the weights, "
        "ours with the keys and values that it has prepared."
    )
    return join(what, table(heads, lines), left_out(rows))


if __name__ == "__main__":
    sys.exit(main())
