"""What a step takes as there is more of something: image prompts, image tokens, pixels, images at
once.

    python -m benchmarks.growth

Ours and diffusers' IP-Adapter, which has an adapter loaded for each prompt, so that both compute
the same sum. All guided.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS, OURS, PEER, Contender, Scene, scene, stepper
from benchmarks.record import Outcome, Record, join, left_out, note, options, parsed, spread, table
from benchmarks.setting import PromptedSetting
from benchmarks.stand_ins import DTYPES, STAND_INS
from benchmarks.turns import Here, Measured, forget_peak, held_gb, take_turns
from imprompt.errors import first_line
from imprompt.training.estimate import LiveBytes
from imprompt.training.watch import GB, peak_memory_gb

TITLE = "Growth"
MODEL = {"cuda": "sd15", "cpu": "sd15-narrow"}
# What grows: the setting's field, what it is called, and its values.
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
    args = parse(arguments)
    record = Record("growth", arguments, args.device, args.record)
    model = args.model or MODEL[args.device]
    start = PromptedSetting(args.device, model, 1, STAND_INS[model].base.side, args.precision)
    if args.device == "cpu":
        record.skip(
            "SD 1.5 at its full width", "that many steps are for a GPU; --model sd15 asks for them"
        )
    for found in run(args, start, record):
        record.add(found)
    record.tell(section(record.rows))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options("growth", __doc__, rounds=3)
    parser.add_argument("--model", choices=STAND_INS, help="sd15; on a CPU its narrow stand-in")
    parser.add_argument(
        "--axes", choices=[field for field, *_ in AXES["cuda"]], nargs="+", help="all, if not given"
    )
    parser.add_argument("--most", type=int, help="leave out values beyond it")
    parser.add_argument("--steps", type=int, default=2, help="in a turn (2)")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    return parsed(parser, arguments, narrows=("model", "axes", "most", "precision"))


@torch.no_grad()
def run(
    args: argparse.Namespace, start: PromptedSetting, record: Record
) -> Iterator[dict[str, Any]]:
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
    """By contender: the time of a step, and the most memory that it takes beside the weights."""
    joined = {name: CONTENDERS[name](of) for name in (PEER, OURS)}
    calls = {name: stepper(of, contender) for name, contender in joined.items()}
    turns = {name: Here(call, args.device) for name, call in calls.items()}
    found = take_turns(turns, args.rounds, args.steps, lambda *_: None)
    for name, call in calls.items():
        kept = kept_bytes(of) if name == OURS else 0
        found[name].peak = taken_gb(call, joined[name], of) + kept / GB
    return found


def kept_bytes(of: Scene) -> int:
    """Keys and values that ours has prepared: of the text and of every image prompt."""
    return of.adapters[0].injection.cached_bytes() + sum(
        of.prompt(adapter).bytes for adapter in of.adapters_in_use()
    )


def taken_gb(call: Callable[[], Any], contender: Contender, of: Scene) -> float:
    """The most that one step holds beside what was there before: PyTorch's on a GPU, all tensors'
    on a CPU.
    """
    device = torch.device(of.setting.device)
    if device.type == "cuda":
        forget_peak(device)
        before = held_gb(device)
        call()
        return peak_memory_gb(device) - before
    live = LiveBytes([*contender.unet.parameters(), of.latents, of.text])
    with live:
        call()
    return live.peak / GB


def section(rows: Mapping[str, Any]) -> str:
    """A record's tables in markdown."""
    found = [Outcome.read(row) for row in rows["outcomes"]]
    if not found:
        return left_out(rows)
    first, lines = found[0].setting, []
    for outcome in found:
        setting, loops = outcome.setting, [outcome.loops[name] for name in (PEER, OURS)]
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
                spread(outcome.times(OURS, PEER), ".2f"),
                *memory,
            )
        )
    heads = ("what grows", "to", f"{PEER}, ms", "ours, ms", "× (range)", f"{PEER}, MB", "ours, MB")
    pixels = min(outcome.setting["pixels"] for outcome in found)
    what = (
        f"{first['model']}, {first['precision']}; where nothing else is said 1 image prompt of "
        f"{TOKENS} tokens, 1 image at once, "
        f"{pixels} pixels. ms: of a step, for each image. MB: the most that a step takes beside "
        "the weights, "
        "ours with the keys and values that it has prepared."
    )
    return join(what, table(heads, lines), left_out(rows))


if __name__ == "__main__":
    sys.exit(main())
