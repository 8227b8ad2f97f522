"""Where the time of our training and sampling steps goes, by kind of operator.

python -m benchmarks.profile                  # SD 1.5 at 512 pixels
python -m benchmarks.profile --model tiny     # a trial: printed, not recorded
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.implementations import IMPROMPT, scene
from benchmarks.our_loop import OurLoop
from benchmarks.random_models import RANDOM_MODELS
from benchmarks.record import Record, join, note, options, parsed, table
from benchmarks.setting import PromptedSetting, TrainingSetting
from benchmarks.step import unet_steps

TITLE = "Where the time goes"
# An operator or kernel has the first kind whose pattern matches its name.
KINDS = {
    "convolutions": r"conv|cudnn|winograd|implicit_gemm",
    "attention": r"flash|attention|softmax|fmha|Blockwise|::bmm|baddbmm"
    r"|forward_kernel|query_kernel|image_kernel",
    "matrix products": r"::mm|addmm|matmul|linear|gemm|cutlass|nvjet",
    "norms": r"norm",
    "optimizer": r"fused_adam|foreach|multi_tensor|lerp",
    "copies": r"copy|::cat|contiguous|clone|fill|zero_|memcpy|memset|upsample",
}
OTHER = "the rest, one number at a time"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, record and print; return the exit code 0."""
    parser = options("profile", __doc__, rounds=1)
    parser.add_argument("--model", choices=RANDOM_MODELS, default="sd15")
    args = parsed(parser, arguments, narrows=("model",))
    record = Record("profile", arguments, args.device, args.record, ("torch", "diffusers"))
    for what, make in STEPS.items():
        run = make(args.device, args.model)
        run()
        note(what)
        shares = shares_of(run, args.device, args.rounds)
        record.add({"what": what, "model": args.model, "shares": shares})
    record.show(section(record.rows))
    return 0


def training_step(device: str, model: str) -> Callable[[], Any]:
    """Return a call that takes one step of our training loop."""
    of = RANDOM_MODELS[model]
    loop = OurLoop(
        TrainingSetting(device, model, 1 if device == "cpu" else 8, of.base.side, "bf16")
    )
    return lambda: loop.run(1)


def sampling_step(device: str, model: str) -> Callable[[], Any]:
    """Return a call that takes one guided step of a UNet with our image prompt."""
    of = scene(PromptedSetting(device, model, 1, RANDOM_MODELS[model].base.side, "bf16"))
    return unet_steps(of, 1)[IMPROMPT]


STEPS = {
    "a training step on encoded features": training_step,
    "a UNet step with an image prompt, guided": sampling_step,
}


def shares_of(run: Callable[[], Any], device: str, rounds: int) -> dict[str, float]:
    """Return the share of each kind in the operators' own time on the CPU or GPU."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities, acc_events=True) as profiled:
        for _ in range(rounds):
            run()
    spent: Counter[str] = Counter()
    for event in profiled.key_averages():
        spent[kind_of(event.key)] += (
            event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        )
    return {kind: spent[kind] / spent.total() for kind in (*KINDS, OTHER)}


def kind_of(name: str) -> str:
    """Return the kind of an operator or kernel, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), OTHER)


def section(rows: Mapping[str, Any]) -> str:
    """Return a record's table in Markdown."""
    found = rows["outcomes"]
    lines = [[kind, *(f"{row['shares'][kind]:.1%}" for row in found)] for kind in (*KINDS, OTHER)]
    return join(
        table(["kind of operator", *(f"{row['what']} ({row['model']})" for row in found)], lines)
    )


if __name__ == "__main__":
    sys.exit(main())
