"""Time of a UNet step and images per second of whole pipelines: the cost of an image prompt.

    python -m benchmarks.step                     # on a GPU if there is one, else on the CPU
    python -m benchmarks.step --model sd15-narrow # a trial: printed, not recorded

Three implementations are interleaved around the same random weights: diffusers without an image
prompt, diffusers with its own IP-Adapter, ours. All use guidance. Whole pipelines encode the text,
sample and decode; the image prompt is given as an embedding, then as a picture.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import random_models
from benchmarks.implementations import (
    GUIDANCE,
    IMPLEMENTATIONS,
    IMPROMPT,
    PEER,
    TEXT,
    Scene,
    pipeline_arguments,
    prompt_arguments,
    scene,
    stepper,
)
from benchmarks.interleave import InThisProcess, interleave
from benchmarks.random_models import DTYPES, RANDOM_MODELS
from benchmarks.record import (
    Bar,
    Outcome,
    Record,
    join,
    left_out,
    matrix_rate,
    note,
    options,
    parsed,
    spread,
    table,
    verdicts,
)
from benchmarks.setting import PromptedSetting
from imprompt.encoders.vision import VisionEncoder
from imprompt.generation.compile import compile_base
from imprompt.generation.features import Reader
from imprompt.generation.pipeline import ImagePromptPipeline
from imprompt.generation.prepare import Attached
from imprompt.training.estimate import flash
from imprompt.variants import find_variant

TITLE = "Time of a step, images a second"
STEP, COMPILED = "a UNet step", "a UNet step, compiled"
EMBEDDING, PICTURE = "images, prompt as embedding", "images, prompt as picture"
FAST = "images, prompt as embedding, compiled"
Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Plan:
    """What is measured of one model."""

    model: str
    batches: tuple[int, ...]  # images at once
    what: tuple[str, ...] = (STEP, EMBEDDING, PICTURE)
    sampled: int = 50  # UNet steps of an image
    repeats: int = 1  # UNet steps in a round


PLANS = {
    "cuda": (
        Plan("sd15", (1, 4, 16), repeats=20),
        Plan("sdxl", (1, 4), (STEP, EMBEDDING), repeats=10),
        Plan("sd15-narrow", (1,), repeats=50),
        Plan("sd15", (1,), (COMPILED, FAST), repeats=20),
        Plan("sdxl", (1,), (COMPILED, FAST), repeats=10),
    ),
    "cpu": (
        Plan("sd15-narrow", (1, 4, 16), sampled=10, repeats=5),
        Plan("sd15", (1,), (STEP, EMBEDDING), sampled=3),
    ),
}
ABSENT = {
    "cpu": [
        ("SDXL at 1024 pixels", "too much for a CPU; --model sdxl asks for it"),
        ("compiled steps", "left out on a CPU; --compile asks for them"),
    ],
    "cuda": [],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, record and print; return the exit code 0."""
    args = parse(arguments)
    record = Record("step", arguments, args.device, args.record)
    for what, why in ABSENT[args.device]:
        record.skip(what, why)
    for plan in chosen(args):
        for found in run(plan, args):
            record.add(found.row(), bars_of(found))
    record.show(section(record.rows))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = options("step", __doc__)
    parser.add_argument(
        "--model",
        choices=RANDOM_MODELS,
        help="model to measure (default: those that suit the device)",
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", help="images at once (1, 4 and 16; on a CPU 1 for SD 1.5)"
    )
    parser.add_argument("--steps", type=int, help="UNet steps of an image (50; fewer on a CPU)")
    parser.add_argument("--pixels", type=int, help="pixels a side (default: the model's own)")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="measure compiled steps on a CPU too; on a GPU they always are",
    )
    return parsed(parser, arguments, narrows=("model", "batch", "pixels", "precision"))


def chosen(args: argparse.Namespace) -> list[Plan]:
    """Return the device's plans, changed by the options that are given."""
    plans = [plan for plan in PLANS[args.device] if args.model in (None, plan.model)]
    if args.model and not plans:
        plans = [Plan(args.model, (1,))]
    if args.compile and args.device == "cpu":
        plans += [replace(plans[0], what=(COMPILED,))]
    if args.batch:
        plans = [replace(plan, batches=tuple(args.batch)) for plan in plans]
    return [replace(plan, sampled=args.steps) if args.steps else plan for plan in plans]


def run(plan: Plan, args: argparse.Namespace) -> Iterator[Outcome]:
    """Measure each batch size and each kind of work of a plan."""
    of, base = RANDOM_MODELS[plan.model], None
    ceiling = matrix_rate(args.device, args.precision, side=64 if plan.model == "tiny" else 0)
    for batch in plan.batches:
        setting = PromptedSetting(
            args.device, plan.model, batch, args.pixels or of.base.side, args.precision
        )
        stage = scene(setting, base=base)
        base = stage.base
        for what in plan.what:
            whole = what in (EMBEDDING, PICTURE, FAST)
            steps, repeats = (plan.sampled, 1) if whole else (1, plan.repeats)
            timed = {
                name: InThisProcess(call, args.device)
                for name, call in MAKERS[what](stage, steps).items()
            }
            loops = interleave(timed, args.rounds, repeats, noting(f"{plan.model} x{batch} {what}"))
            flops = steps * unet_flops(setting) / batch
            yield Outcome({**asdict(setting), "what": what, "steps": steps}, loops, flops, ceiling)


def noting(what: str) -> Callable[[str, float], None]:
    """Return a callback for `interleave` that prints the time of each run."""
    return lambda name, seconds: note(what, f"{name}: {seconds:.4f} s")


def unet_steps(of: Scene, _: int) -> Calls:
    """Return by name a call that predicts the noise once."""
    return {name: stepper(of, make(of)) for name, make in IMPLEMENTATIONS.items()}


def compiled_steps(of: Scene, _: int) -> Calls:
    """Return by name a call that predicts the noise once, with the UNet's forward pass compiled.

    It is compiled as the package compiles it, on a GPU with CUDA graphs.
    """
    joined = {name: make(of) for name, make in IMPLEMENTATIONS.items()}
    for implementation in joined.values():
        compile_base(implementation.unet)
    return {name: stepper(of, implementation) for name, implementation in joined.items()}


def from_embeddings(of: Scene, steps: int, ready: Callable[[Any], None] = lambda _: None) -> Calls:
    """Return by name a call that makes the scene's images from an embedding.

    All go through diffusers' pipeline.

    ready  called with each UNet before it is used
    """
    pipes, arguments = pipelines(of, sees=False), pipeline_arguments(of.setting, steps)
    for pipe in pipes.values():
        ready(pipe.unet)
    return {
        name: lambda name=name: pipes[name](**arguments, **prompt_arguments(of, name))
        for name in pipes
    }


def from_pictures(of: Scene, steps: int) -> Calls:
    """Return by name a call that makes the scene's images from a picture.

    Ours goes through the package's own pipeline, the others through diffusers'.
    """
    pipes, arguments, picture = (
        pipelines(of, sees=True),
        pipeline_arguments(of.setting, steps),
        Image.new("RGB", (256, 256), "orange"),
    )
    encoder = VisionEncoder(pipes[IMPROMPT].image_encoder, pipes[IMPROMPT].feature_extractor)
    whole = ImagePromptPipeline(
        pipes[IMPROMPT], Attached(of.adapters[0], Reader(encoder, find_variant(of.setting.variant)))
    )
    setting = of.setting
    same: dict[str, Any] = {
        "width": setting.pixels,
        "height": setting.pixels,
        "steps": steps,
        "guidance": GUIDANCE,
    }
    several = {"num_images": setting.batch, "batch_size": setting.batch}
    return {
        TEXT: lambda: pipes[TEXT](**arguments),
        PEER: lambda: pipes[PEER](**arguments, ip_adapter_image=picture),
        IMPROMPT: lambda: whole(picture, arguments["prompt"], **several, **same),
    }


MAKERS: Mapping[str, Callable[[Scene, int], Calls]] = {
    STEP: unet_steps,
    COMPILED: compiled_steps,
    EMBEDDING: from_embeddings,
    FAST: partial(from_embeddings, ready=compile_base),
    PICTURE: from_pictures,
}


def pipelines(of: Scene, sees: bool) -> dict[str, Any]:
    """Return by name diffusers' pipeline around each UNet; they share all other models.

    sees  whether they have an image encoder
    """
    with torch.device(of.setting.device):
        first = random_models.pipeline(of.setting.models, of.base, of.base.dtype, sees=sees)
    pipes = {}
    for name, make in IMPLEMENTATIONS.items():
        pipes[name] = copy.copy(first)
        pipes[name].unet = make(of).unet
    return pipes


@cache
@torch.no_grad()
def unet_flops(setting: PromptedSetting) -> int:
    """Count the FLOPs of a guided step without an image prompt, on the meta device.

    So an implementation's share of the ceiling does not grow by additional work.
    """
    of = scene(replace(setting, device="meta"))
    with (
        mock.patch.object(F, "scaled_dot_product_attention", flash),
        FlopCounterMode(display=False) as counter,
    ):
        IMPLEMENTATIONS[TEXT](of)(of.latents, torch.empty(1, dtype=torch.long, device="meta"))
    return counter.get_total_flops()


def bars_of(found: Outcome) -> list[Bar]:
    """Return the bars for this outcome's device, model, batch size and work."""
    setting = found.setting
    what = f"{setting['model']}, batch {setting['batch']}, {setting['what']}"
    over_text = Bar(
        f"{what}: time, ours over text only",
        1 / median(found.times(IMPROMPT, TEXT)),
        1.0,
        most=True,
    )
    over_peer = Bar(
        f"{what}: ours over diffusers + IP-Adapter", median(found.times(IMPROMPT, PEER)), 1.25
    )
    if setting["device"] == "cpu":
        return [replace(over_peer, bar=1.0)]
    if setting["batch"] > 1 or setting["model"] not in ("sd15", "sdxl"):
        return []
    return [
        {STEP: over_text, COMPILED: replace(over_text, bar=1.01)}.get(setting["what"], over_peer)
    ]


def section(rows: Mapping[str, Any]) -> str:
    """Return a record's tables in Markdown."""
    found = [Outcome.read(row) for row in rows["outcomes"]]
    models = dict.fromkeys(outcome.setting["model"] for outcome in found)
    tables = (
        model_table([outcome for outcome in found if outcome.setting["model"] == model])
        for model in models
    )
    return join(*tables, verdicts(rows), left_out(rows))


def model_table(outcomes: Sequence[Outcome]) -> str:
    """Return the table of one model in Markdown."""
    first, lines = outcomes[0].setting, []
    for found in outcomes:
        setting = found.setting
        what = setting["what"] + (f", {setting['steps']} steps" if setting["steps"] > 1 else "")
        for name, loop in found.loops.items():
            times = [spread(found.times(name, other), ".2f") for other in (TEXT, PEER)]
            rate, share = (
                f"{found.rate(name):.3g}" if setting["steps"] > 1 else "-",
                f"{found.share(name):.1%}",
            )
            lines.append(
                (
                    what,
                    str(setting["batch"]),
                    name,
                    spread(loop.seconds, ".4g"),
                    rate,
                    *times,
                    share,
                )
            )
    heads = (
        "what",
        "batch",
        "who",
        "s (range)",
        "images/s",
        "× text only",
        f"× {PEER}",
        "share of ceiling",
    )
    what = (
        f"{first['model']}, {first['pixels']} pixels, {first['precision']}; ceiling "
        f"{outcomes[0].ceiling / 1e12:.3g} TFLOP/s"
    )
    return f"{what}\n\n{table(heads, lines)}"


if __name__ == "__main__":
    sys.exit(main())
