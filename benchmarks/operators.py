"""Operators and arithmetic of a step: what an image prompt adds on any machine.

    python -m benchmarks.operators

Operators are the ATen calls that compute (no views), counted on the meta device: all of diffusers'
and our code runs, at full width, on tensors without contents. Fused attention is one operator, as
on a GPU, and so is our own kernel.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import prod
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.implementations import (
    IMPLEMENTATIONS,
    IMPROMPT,
    PEER,
    TEXT,
    Implementation,
    Scene,
    scene,
)
from benchmarks.random_models import RANDOM_MODELS
from benchmarks.record import Bar, Record, join, left_out, note, options, parsed, table, verdicts
from benchmarks.setting import PromptedSetting
from benchmarks.transformer_models import OURS_AS_PEER, TransformerScene
from imprompt.attention.low_rank import PARTS, AttentionLowRank, LowRank, ModelLowRank
from imprompt.families.base import family_of
from imprompt.training.estimate import flash

TITLE = "Operators and arithmetic of a step"
MODELS = ("sd15", "sdxl")
TRANSFORMERS = ("flux-dev", "sd3.5-medium", "pixart-sigma")
ADDED = 2  # operators of ours for each layer of a transformer: the attention, and its sum
LARGEST = {"sd15": 711, "sdxl": 1793}  # operators of ours with one image prompt
FUSED = "ours, fused kernel"  # used on GPUs where it is faster
RANK = 128  # of the published FaceID adapters
CHOICE = {IMPROMPT: "never", FUSED: "always"}  # values of IMPROMPT_KERNEL


@dataclass(frozen=True)
class Case:
    """A way to give image prompts."""

    name: str
    variant: str = "base"
    adapters: int = 1
    masks: bool = False  # each prompt applies to a part of the picture
    blocks: bool = False  # a different scale for every cross-attention layer
    window: bool = False  # applies from timestep 800 to 200
    weighed: bool = False  # the tokens of its pictures have weights
    lora: bool = False  # adds a part of rank 128 to every attention's projections, as FaceID does


BASE, PLUS, TWO = Case("base"), Case("plus", variant="plus"), Case("two adapters", adapters=2)
MASKS = Case("two adapters, masks", adapters=2, masks=True)
BLOCKS, WINDOW = Case("base, block map", blocks=True), Case("base, time window", window=True)
WEIGHED, LORA = (
    Case("base, weighted pictures", weighed=True),
    Case("base, low-rank part (FaceID)", lora=True),
)
CASES = (BASE, PLUS, TWO, MASKS, BLOCKS, WINDOW, WEIGHED, LORA)


class Operators(TorchDispatchMode):
    """A dispatch mode that counts the operators that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += not (func.is_view or func.overloadpacket is torch.ops.aten._unsafe_view)
        return func(*args, **(kwargs or {}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, record and print; return the exit code 0."""
    args = parse(arguments)
    os.environ["TRITON_INTERPRET"] = "1"  # so the kernel is counted without compiling it
    record = Record("operators", arguments, "cpu", args.record)
    if not find_spec("triton"):
        record.skip(FUSED, "Triton is not installed")
    models = args.model or (*MODELS, *TRANSFORMERS)
    for found in run([model for model in models if model in MODELS]):
        record.add(found, bars_of(found))
    for model in models:
        if model in TRANSFORMERS:
            found = transformer_counts(model)
            record.add(found, transformer_bars(found))
    record.show(section(record.rows))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = options("operators", __doc__)
    parser.set_defaults(device="cpu")  # even with a GPU: nothing is timed
    parser.add_argument(
        "--model",
        choices=(*MODELS, *TRANSFORMERS),
        nargs="+",
        help="models to count (default: all)",
    )
    return parsed(parser, arguments, narrows=("model",))


def run(models: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Count operators and FLOPs in every case of every model."""
    for model in models:
        bases = {
            precision: scene(setting_of(model, BASE, precision)).base
            for precision in ("fp32", "bf16")
        }
        for case in CASES:
            found = {
                name: counts(name, model, case, bases[precision])
                for name, precision in counted(case).items()
            }
            note(
                model, case.name, *(f"{name} {count['operators']}" for name, count in found.items())
            )
            yield {"model": model, "case": asdict(case), "counts": found}


def transformer_counts(model: str) -> dict[str, Any]:
    """Count operators and FLOPs of a transformer's step, for each implementation.

    The image prompt of ours is made before; diffusers' adapters project theirs in every step.
    """
    scene, found = TransformerScene(model, "meta", torch.bfloat16), {}
    layers = len(family_of(scene.base).layers(scene.base))
    with mock.patch.object(F, "scaled_dot_product_attention", flash):
        for name, make in scene.calls().items():
            step = make()
            first, later = (counting(Operators(), step).count for _ in range(2))
            flops = counting(FlopCounterMode(display=False), step).get_total_flops()
            found[name] = {"first": first, "operators": later, "flops": flops}
            note(model, f"{name} {later}")
    return {"model": model, "layers": layers, "rows": scene.of.batch, "counts": found}


def counting(mode: Any, step: Callable[[], Any]) -> Any:
    """Take a step under a counting mode, and return the mode."""
    with mode:
        step()
    return mode


def counted(case: Case) -> dict[str, str]:
    """Return the implementations that are counted in a case, with their precision.

    Our kernel takes low precisions only. Diffusers has no time windows or weights, its LoRA for
    faces is PEFT's, and text alone has none of all this.
    """
    names = [TEXT] * (case == BASE) + [PEER] * (case not in (WINDOW, WEIGHED, LORA)) + [IMPROMPT]
    return dict.fromkeys(names, "fp32") | ({FUSED: "bf16"} if find_spec("triton") else {})


def setting_of(model: str, case: Case, precision: str) -> PromptedSetting:
    """Return the setting of a case on the meta device, with one image."""
    return PromptedSetting(
        "meta",
        model,
        1,
        RANDOM_MODELS[model].base.side,
        precision,
        case.variant,
        prompts=case.adapters,
    )


@torch.no_grad()
def counts(name: str, model: str, case: Case, base: Any) -> dict[str, float]:
    """Count the operators of the first step and of a later one, and FLOPs of a later one."""
    # as after from_pretrained: for frozen weights torch uses other operators
    base.requires_grad_(True)
    of = scene(
        setting_of(model, case, "fp32" if base.dtype == torch.float32 else "bf16"),
        case.adapters,
        base,
    )
    timestep = torch.empty(1, dtype=torch.long, device="meta")
    joined = with_case(IMPLEMENTATIONS.get(name, IMPLEMENTATIONS[IMPROMPT])(of), name, case)
    with (
        # on the meta device torch would choose another attention
        mock.patch.object(F, "scaled_dot_product_attention", flash),
        mock.patch.dict(os.environ, {"IMPROMPT_KERNEL": CHOICE.get(name, "never")}),
    ):
        first, later = (seen_by(Operators(), joined, of, timestep).count for _ in range(2))
        own = {torch.ops.imprompt.decoupled_attention: kernel_flops} if name == FUSED else {}
        counter = FlopCounterMode(display=False, custom_mapping=own)
        return {
            "first": first,
            "operators": later,
            "flops": seen_by(counter, joined, of, timestep).get_total_flops(),
        }


def seen_by(mode: Any, joined: Implementation, of: Scene, timestep: torch.Tensor) -> Any:
    """Predict the noise once under a counting mode, and return the mode."""
    with mode:
        joined(of.latents, timestep)
    return mode


def kernel_flops(query: Any, key: Any, _: Any, image_key: Any, *__: Any, **___: Any) -> int:
    """Count the FLOPs of our kernel: two products of L×T×d and of L×N×d each.

    The shapes are (B, H, L, d), (B, H, T, d) and (B, H, N, d).
    """
    return 2 * 2 * prod(query) * (key[2] + image_key[2])


def with_case(joined: Implementation, name: str, case: Case) -> Implementation:
    """Apply the case's masks, block maps, windows, weights and low-rank parts."""
    given = joined.arguments.setdefault("cross_attention_kwargs", {})
    if name == PEER:
        if case.masks:
            given["ip_adapter_masks"] = [torch.ones(1, 1, 64, 64, device="meta")] * case.adapters
        layers = [
            processor
            for processor in joined.unet.attn_processors.values()
            if hasattr(processor, "to_k_ip")
        ]
        for number, layer in enumerate(layers if case.blocks else ()):
            layer.scale = [(number + 1) / len(layers)] * case.adapters
    elif name != TEXT:
        prompts = given["ip_hidden_states"]
        given["ip_hidden_states"] = [
            shaped(prompt, case) for prompt in (prompts if isinstance(prompts, list) else [prompts])
        ]
        if case.lora:
            given["ip_hidden_states"] = [
                prompt._replace(low_rank=lora_for(joined.unet))
                for prompt in given["ip_hidden_states"]
            ]
    return joined


def shaped(prompt: Any, case: Case) -> Any:
    """Return our image prompt with the case's changes."""
    layers = len(prompt.keys)
    if case.masks:
        prompt = prompt._replace(mask=torch.ones(1, 64, 64, device="meta"))
    if case.blocks:
        prompt = prompt.with_scale(torch.arange(1, layers + 1) / layers)
    if case.weighed:
        prompt = prompt._replace(bias=torch.zeros(1, prompt.keys[0].shape[2], device="meta"))
    if case.window:
        times = 999 - torch.arange(1000)  # the noisiest first
        prompt = prompt.with_scale(((times > 200) & (times < 800)).float().expand(layers, 1, -1))
    return prompt


def lora_for(unet: Any) -> tuple[LowRank, ...]:
    """Build a low-rank part for every attention of `unet`, and make the UNet apply it."""
    family = family_of(unet)
    family.inject(unet, True)
    parts = []
    with torch.device("meta"):
        for attention in family.attentions(unet).values():
            layers = zip(
                PARTS,
                (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]),
                strict=True,
            )
            parts.append(
                AttentionLowRank(
                    {part: (layer.in_features, layer.out_features, RANK) for part, layer in layers}
                )
            )
    return ModelLowRank(parts).weights(unet.dtype)


def bars_of(found: Mapping[str, Any]) -> list[Bar]:
    """Return the bars on the operators of our implementations, in the cases that have one."""
    model, case = found["model"], Case(**found["case"])
    counts_to_meet = {
        name: count["operators"]
        for name, count in found["counts"].items()
        if name in CHOICE and case in (BASE, PLUS)
    }
    what, most = f"operators of a step, {model}, {case.name}", LARGEST[model]
    return [
        Bar(f"{what}, {name}", count, most, most=True) for name, count in counts_to_meet.items()
    ]


def transformer_bars(found: Mapping[str, Any]) -> list[Bar]:
    """Return the bars on the operators that our adapters add to a transformer's step."""
    counts_of, layers = found["counts"], found["layers"]
    return [
        Bar(
            f"operators that {name} adds to a step, {found['model']}, {layers} layers",
            counts_of[name]["operators"] - counts_of[TEXT]["operators"],
            ADDED * layers,
            most=True,
        )
        for name in (IMPROMPT, OURS_AS_PEER)
        if name in counts_of
    ]


def section(rows: Mapping[str, Any]) -> str:
    """Return a record's tables in Markdown."""
    parts = [
        model_table(model, [row for row in rows["outcomes"] if row["model"] == model])
        for model in MODELS
    ]
    transformers = [row for row in rows["outcomes"] if row["model"] in TRANSFORMERS]
    return join(*parts, transformer_table(transformers), verdicts(rows), left_out(rows))


def transformer_table(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the transformers in Markdown, empty if none was counted."""
    lines = []
    for row in outcomes:
        bare = row["counts"][TEXT]
        for name, count in row["counts"].items():
            more = count["operators"] - bare["operators"]
            lines.append(
                (
                    f"{row['model']}, {row['layers']} layers, batch {row['rows']}",
                    name,
                    f"{count['operators']:,}",
                    "-" if name == TEXT else f"{more:+,} ({more / row['layers']:.2f} a layer)",
                    f"{count['flops'] / 1e12:.3f} ({count['flops'] / bare['flops'] - 1:+.2%})",
                )
            )
    if not lines:
        return ""
    heads = ("transformer", "who", "operators a step", "more than text only", "TFLOP a step")
    return f"Transformers, 1024 pixels, one image prompt\n\n{table(heads, lines)}"


def model_table(model: str, outcomes: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of one model in Markdown, empty if nothing was counted."""
    if not outcomes:
        return ""
    bare = next((row["counts"][TEXT] for row in outcomes if TEXT in row["counts"]), None)
    lines = []
    for row in outcomes:
        for name, count in row["counts"].items():
            more = f"{count['operators'] / bare['operators'] - 1:+.1%}" if bare else "-"
            arithmetic = f"{count['flops'] / 1e12:.4f}" + (
                f" ({count['flops'] / bare['flops'] - 1:+.2%})" if bare else ""
            )
            case = "-" if name == TEXT else row["case"]["name"]
            lines.append(
                (case, name, f"{count['operators']:,}", more, f"{count['first']:,}", arithmetic)
            )
    heads = (
        "image prompt",
        "who",
        "operators a step",
        "more than text only",
        "in the first step",
        "TFLOP a step",
    )
    return (
        f"{model}, {RANDOM_MODELS[model].base.side} pixels, one image with guidance (batch "
        f"2)\n\n{table(heads, lines)}"
    )


if __name__ == "__main__":
    sys.exit(main())
