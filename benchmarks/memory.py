"""Peak memory of making a picture in each mode, and the size of our prepared keys and values.

    python -m benchmarks.memory

Each measurement runs in a process of its own.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import random_models
from benchmarks.implementations import (
    IMPLEMENTATIONS,
    IMPROMPT,
    TEXT,
    pipeline_arguments,
    prompt_arguments,
    scene,
    with_imprompt,
)
from benchmarks.interleave import Measured, Worker, interleave
from benchmarks.random_models import DTYPES, RANDOM_MODELS
from benchmarks.record import Outcome, Record, join, left_out, note, options, parsed, table
from benchmarks.setting import PromptedSetting
from imprompt.cli.console import quiet
from imprompt.errors import ImpromptError
from imprompt.generation.memory import quantize

TITLE = "Peak memory of making a picture"
SAMPLED = 2  # UNet steps of a picture: the peak does not depend on their number
PLAIN = "as it is"


@dataclass(frozen=True)
class MemorySetting(PromptedSetting):
    """A setting of pictures made from image prompts, with a way to save memory."""

    mode: str = PLAIN  # a name in MODES


def nothing(_: Any) -> None:
    """Leave a model or pipeline unchanged."""


@dataclass(frozen=True)
class Mode:
    """A way to save memory."""

    unet: Callable[[Any], object] = nothing  # applied to the UNet before adapters are attached
    pipe: Callable[[Any], object] = nothing  # applied to diffusers' pipeline around that UNet
    offloads: bool = False  # whether models start on the CPU, and move to the GPU in turn


def tiled(pipe: Any) -> None:
    """Enable slicing and tiling of a pipeline's VAE."""
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()


def cast(pipe: Any) -> None:
    """Store the UNet's weights as fp8 and cast them layer by layer when they are used."""
    pipe.unet.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=pipe.unet.dtype
    )


MODES = {
    PLAIN: Mode(),
    "VAE sliced and tiled": Mode(pipe=tiled),
    "attention weights int8 (torchao)": Mode(unet=lambda unet: quantize(unet, "int8")),
    "attention weights fp8 (torchao)": Mode(unet=lambda unet: quantize(unet, "fp8")),
    "UNet weights fp8 (diffusers' casting)": Mode(pipe=cast),
    "model CPU offload": Mode(pipe=lambda pipe: pipe.enable_model_cpu_offload(), offloads=True),
    "sequential CPU offload": Mode(
        pipe=lambda pipe: pipe.enable_sequential_cpu_offload(), offloads=True
    ),
}
# by device: the models and their modes
MODELS = {"cuda": {"sd15": (PLAIN,), "sdxl": MODES}, "cpu": {"sd15": MODES}}


class PictureLoop:
    """Pictures made by diffusers' pipeline from an embedding as image prompt.

    Implements `benchmarks.interleave.Loop`.
    """

    def __init__(self, name: str, setting: MemorySetting) -> None:
        quiet()
        mode, stage = MODES[setting.mode], scene(setting)
        mode.unet(stage.base)
        stage.base = IMPLEMENTATIONS[name](
            stage
        ).unet  # so the UNet that it was made from is released
        # release our adapters for diffusers, whose UNet has their weights
        stage.adapters = stage.adapters if name == IMPROMPT else []
        with torch.device(setting.device):
            pipe = random_models.pipeline(setting.models, stage.base, stage.base.dtype, sees=False)
        if mode.offloads:
            pipe.to("cpu")
            torch.cuda.empty_cache()
        mode.pipe(pipe)
        self.call = lambda: pipe(
            **pipeline_arguments(setting, SAMPLED), **prompt_arguments(stage, name)
        )

    def run(self, steps: int) -> None:
        """Make `steps` pictures."""
        for _ in range(steps):
            self.call()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, record and print; return the exit code 0."""
    args = parse(arguments)
    record = Record("memory", arguments, args.device, args.record)
    for model, modes in {args.model: MODES}.items() if args.model else MODELS[args.device].items():
        pixels = args.pixels or RANDOM_MODELS[model].base.side
        for name in args.modes or modes:
            setting = MemorySetting(args.device, model, 1, pixels, args.precision, mode=name)
            if MODES[name].offloads and args.device == "cpu":
                record.skip(
                    f"{model}, {name}",
                    "models are offloaded from a GPU to the CPU; there is no GPU here",
                )
            elif loops := measured(setting, args.rounds, record):
                record.add(
                    Outcome(asdict(setting), loops).row() | {"held": prepared_bytes(setting)}
                )
    record.show(section(record.rows))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = options("memory", __doc__, rounds=1)
    parser.add_argument(
        "--model",
        choices=RANDOM_MODELS,
        help="model to measure (default: sd15, on a GPU also sdxl)",
    )
    parser.add_argument("--modes", choices=MODES, nargs="+", help="modes to measure (default: all)")
    parser.add_argument("--pixels", type=int, help="pixels a side (default: the model's own)")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    return parsed(parser, arguments, narrows=("model", "modes", "pixels", "precision"))


def measured(setting: MemorySetting, rounds: int, record: Record) -> dict[str, Measured]:
    """Measure each implementation, by name; a failed one is noted in the record and left out."""
    found = {}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(partial(PictureLoop, name), setting))
            for name in IMPLEMENTATIONS
        }
        for name, worker in workers.items():
            what = f"{setting.model}, {setting.mode}, {name}"
            try:
                found |= interleave({name: worker}, rounds, 1, lambda *_: None)
                note(what, f"{found[name].peak:.2f} GB")
            except ImpromptError as error:
                record.skip(what, str(error))
    return found


@torch.no_grad()
def prepared_bytes(setting: PromptedSetting) -> dict[str, int]:
    """Count the bytes of our prepared keys and values in sampling, on the meta device."""
    of = scene(
        PromptedSetting("meta", setting.model, setting.batch, setting.pixels, setting.precision)
    )
    joined = with_imprompt(of)
    joined(of.latents, torch.empty(1, dtype=torch.long, device="meta"))
    prompt = joined.arguments["cross_attention_kwargs"]["ip_hidden_states"]
    return {"text": of.adapters[0].injection.cached_bytes(), "image": prompt.bytes}


def section(rows: Mapping[str, Any]) -> str:
    """Return a record's tables in Markdown."""
    lines, prepared = [], {}
    for row in rows["outcomes"]:
        found = Outcome.read(row)
        setting = found.setting
        prepared[setting["model"]] = row["held"]
        for name, loop in found.loops.items():
            more = f"{loop.peak - found.loops[TEXT].peak:+.2f}" if TEXT in found.loops else "-"
            seconds = f"{loop.seconds[0]:.3g}"
            what = f"{setting['model']}, {setting['pixels']} pixels, {setting['precision']}"
            lines.append(
                (
                    what,
                    setting["mode"],
                    name,
                    f"{loop.peak:.2f}",
                    more,
                    f"{loop.reserved:.2f}",
                    seconds,
                )
            )
    heads = (
        "what",
        "how",
        "who",
        "peak GB",
        "more than text only",
        "reserved GB",
        f"s a picture of {SAMPLED} steps",
    )
    sizes = "\n".join(
        f"- {model}: keys and values that ours prepares once for a guided picture: "
        f"{size['text'] / 1e6:.1f} MB of the text, "
        f"{size['image'] / 1e6:.1f} MB of the image prompt"
        for model, size in prepared.items()
    )
    spoken_of = [line[1] for line in lines] + [row["what"] for row in rows["skipped"]]
    cut_off = "\n".join(
        f"- not measured: {mode}: the run ended before"
        for mode in MODES
        if not any(mode in what for what in spoken_of)
    )
    return join(table(heads, lines) if lines else "", sizes, left_out(rows), cut_off)


if __name__ == "__main__":
    sys.exit(main())
