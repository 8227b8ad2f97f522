"""Estimate of what a run takes: parameters, arithmetic, memory, time.

No weights are read. The trained model takes one step on the meta device, where tensors have sizes
but no contents. Shape letters as in `imprompt.training.features`.
"""

import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper
from torch.utils.weak import WeakIdKeyDictionary

from imprompt.adapter import LONG, IPAdapter
from imprompt.encoders.face_sources import open_face_source
from imprompt.families.base import find_family
from imprompt.families.published import BaseStructure, base_structure, encoder_structure
from imprompt.models import find_model
from imprompt.training.buckets import training_size
from imprompt.training.model import (
    DTYPES,
    enable_checkpointing,
    encoder_place,
    in_order,
    precision,
    start_adapter,
)
from imprompt.training.muon import weight_matrices
from imprompt.training.recipe import Recipe

# Share of the measured matrix rate that a whole step reaches; that of GPUs is assumed. On 2 CPU
# cores, SD 1.5 reached 0.45 in float32 and 0.3 in bfloat16, the emoji model less.
CPU_SHARE, GPU_SHARE = 0.3, 0.45
EIGHT_BIT = 2 + 2 * 4 / 256  # bytes of two numbers in 8 bits, with a scale for every 256
# Bytes that an optimizer keeps per parameter, in weight matrices and elsewhere: AdamW keeps two
# numbers, Muon one in matrices.
STATES = {"adamw": (8, 8), "adamw8bit": (EIGHT_BIT, EIGHT_BIT), "muon": (4, 8)}
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
FLASH = torch.ops.aten._scaled_dot_product_flash_attention
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward


@dataclass(frozen=True)
class Sizes:
    """Shapes of one sample's inputs."""

    latents: tuple[int, int, int]  # (C, h, w)
    image: Mapping[str, tuple[int, ...]]  # (E,) or (patches, E), by part
    conditions: Mapping[str, tuple[int, ...]]  # of `imprompt.families.base.Conditions`

    def encoded(self, flip: bool, masked: bool) -> int:
        """Return the bytes of the sample's encoded features.

        Latents as mean and spread, mirrored too with `flip`, image and text are in float16; a mask
        is in 8 bits, a face embedding in float32.
        """
        texts = sum(prod(shape) for name, shape in self.conditions.items() if name != "time_ids")
        images = sum((1 + (part == "face")) * prod(shape) for part, shape in self.image.items())
        features = 2 * (2 * (1 + flip) * prod(self.latents) + images + texts)
        return features + masked * prod(self.latents[1:])

    def batch(self, size: int) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return noisy latents, timesteps, image features and conditions of `size` samples.

        They are on the meta device.
        """
        with torch.device("meta"):
            noisy = torch.empty(size, *self.latents)
            image, conditions = (
                {name: torch.empty(size, *shape) for name, shape in shapes.items()}
                for shapes in (self.image, self.conditions)
            )
            return noisy, torch.empty(size), image, conditions


@dataclass(frozen=True)
class Estimate:
    """What one process of a run takes.

    `memory` is in bytes, by purpose, at the peak of a step. `flops` are those of one sample:
    forward, backward, and what checkpointing computes again.
    """

    trained: int  # parameters
    base: int
    flops: float
    memory: Mapping[str, int]
    a_step: int  # samples in a step
    steps: int
    # bytes of a sample's features on disk; None where they are computed in every step
    encoded: int | None
    device: torch.device
    rate: float  # of matrix products on the device, in FLOP/s

    @property
    def share(self) -> float:
        """Share of the matrix rate that a whole step reaches."""
        return CPU_SHARE if self.device.type == "cpu" else GPU_SHARE

    @property
    def seconds(self) -> float:
        """Seconds that a step takes."""
        return self.a_step * self.flops / (self.rate * self.share)


def estimate_run(recipe: Recipe, device: torch.device, processes: int = 1) -> Estimate:
    """Estimate what `recipe` takes on each of `processes` devices of that kind.

    Raise SettingError or CheckpointError as a run would.

    The configuration of a base model that is neither published (`imprompt.families.published`) nor
    on this disk comes from the Hub.
    """
    plan, dtype = recipe.optimization, DTYPES[precision(recipe, device)]
    structure = base_structure(find_model(recipe.model))
    base = blank_base(structure, dtype)
    sizes = sizes_of(recipe, base, structure)
    adapter = blank_adapter(recipe, base, sizes)
    if plan.checkpointing:
        enable_checkpointing(base)
    a_step = plan.batch_size // processes
    at_once = a_step // plan.accumulate
    flops, activations = one_step(base, adapter, sizes.batch(at_once), fused=device.type != "cpu")
    trained = sum(weight.numel() for weight in adapter.parameters())
    matrices = sum(weight.numel() for weight in weight_matrices(adapter))
    of_matrix, of_other = STATES[plan.optimizer]
    memory = {
        f"base weights, {str(dtype).removeprefix('torch.')}": sum(
            weight.nbytes for weight in base.parameters()
        ),
        "adapter weights, float32": 4 * trained,
        "their gradients": 4 * trained,
        f"states of {plan.optimizer}": round(
            of_matrix * matrices + of_other * (trained - matrices)
        ),
        "average of the weights": 4 * trained if plan.ema else 0,
        f"activations, {at_once} at once": activations,
    }
    return Estimate(
        trained=trained,
        base=sum(weight.numel() for weight in base.parameters()),
        flops=flops / at_once,
        memory={part: size for part, size in memory.items() if size},
        a_step=a_step,
        steps=plan.steps,
        encoded=sizes.encoded(recipe.data.flip, bool(recipe.data.columns.mask))
        if recipe.data.features
        else None,
        device=device,
        rate=matrix_rate(device, dtype),
    )


def blank_base(structure: BaseStructure, dtype: torch.dtype) -> Any:
    """Return the frozen base model on the meta device."""
    with torch.device("meta"):
        base: Any = find_family(structure.family).build(structure.config)
    # diffusers' `to` gives warnings that do not matter here
    return nn.Module.to(base, dtype).requires_grad_(False)


def blank_adapter(recipe: Recipe, base: Any, sizes: Sizes) -> IPAdapter:
    """Return a new adapter of the recipe on the meta device, attached to the base model."""
    with torch.device("meta"):
        widths = {part: shape[-1] for part, shape in sizes.image.items()}
        return start_adapter(recipe.model_copy(update={"start": None}), base, widths).attach(base)


def sizes_of(recipe: Recipe, base: Any, structure: BaseStructure) -> Sizes:
    """Return the shapes of one sample's inputs for the recipe and its base model."""
    of, unit = find_family(structure.family), structure.unit
    side = training_size(recipe.data, structure.side, unit * of.grain) // unit
    row, faces, image = recipe.adapter_variant, recipe.face_source, {}
    if faces is not None:
        image["face"] = (open_face_source(faces, row.feature).width,)
    if row.image_feature is not None:
        image["image"] = encoder_structure(encoder_place(recipe)).shape(row.image_feature)
    latents = of.latent_channels(base.config), side, side
    return Sizes(latents, image, of.condition_shapes(base.config, structure.text_tokens))


def one_step(base: Any, adapter: IPAdapter, batch: tuple[Any, ...], fused: bool) -> tuple[int, int]:
    """Return the FLOPs of a forward and backward pass, and its peak memory in bytes.

    The memory excludes weights and their gradients. With `fused`, attention does not keep its L×T
    scores. The kernel computes them again for the backward pass, which is not counted because it
    depends on the kernel.
    """
    noisy, timestep, image, conditions = batch
    for parameter in adapter.parameters():
        parameter.grad = torch.empty_like(parameter)
    given = [weight for model in (base, adapter) for weight in model.parameters()]
    live = LiveBytes([*given, *(weight.grad for weight in given if weight.grad is not None)])
    counter = Flops()
    # on the meta device torch would choose the implementation
    attend = mock.patch.object(F, "scaled_dot_product_attention", flash if fused else written_out)
    with counter, live, attend:
        prompt = adapter.prompt(adapter.tokens(in_order(image)))
        prediction = adapter.family.predict(base, prompt, noisy, timestep, conditions)
        loss = (prediction.float() - noisy).square().mean()
        del prompt, prediction
        loss.backward()
    return counter.total, live.peak


def flash_backward(_: Any, query: Any, key: Any, *__: Any, **___: Any) -> int:
    """Return the FLOPs of four products of L×T×d; shapes (B, H, L, d) and (B, H, T, d)."""
    return 4 * 2 * prod(query) * key[2]


def flash(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Compute attention by one kernel, as on a GPU.

    (B, H, L, d), (B, H, T, d) and (B, H, T, d) -> (B, H, L, d).
    """
    return FLASH(query, key, value)[0]


def written_out(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Compute attention as training does on a CPU, where only long score matrices are not kept.

    (B, H, L, d), (B, H, T, d) and (B, H, T, d) -> (B, H, L, d).
    """
    if key.shape[2] >= LONG:
        return flash(query, key, value)
    return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1) @ value


class Flops(TorchDispatchMode):
    """Counter of the FLOPs of matrix products, convolutions and attention.

    PyTorch's own keeps what checkpointing computes again alive until it is collected as garbage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.formulas = {**flop_registry, FLASH_BACKWARD: shape_wrapper(flash_backward)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := self.formulas.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of all live tensors except the `given` ones, with their peak.

    Views are not counted.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in given})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self.known:
                self.known[storage] = True
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return out

    def _change(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the FLOP/s of matrix products on the device, measured for about `seconds`."""
    side, wait = (
        (1024, lambda: None) if device.type == "cpu" else (4096, torch.accelerator.synchronize)
    )
    left, right = torch.ones(2, side, side, dtype=dtype, device=device)
    product = left @ right  # the first product initializes the library
    wait()
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        torch.mm(left, right, out=product)
        wait()
        done += 1
    return done * 2 * side**3 / (time.perf_counter() - start)


def estimate_rows(found: Estimate) -> list[tuple[str, str]]:
    """Return labels and values that show the estimate to a person."""
    name, there, caveat = "CPU", "", ""
    if found.device.type != "cpu":
        name, caveat = found.device.type.upper(), " (assumed)"
    if found.device.type == "cuda":
        properties = torch.cuda.get_device_properties(found.device)
        name, there = properties.name, f" of {si(properties.total_memory, 'B')}"
    features = (
        "made in every step, by models that are not counted here; data.features = FOLDER makes "
        "them once"
    )
    if found.encoded is not None:
        features = f"{si(found.encoded, 'B')} a sample on disk"
    reached = (
        f"if {found.share:.0%}{caveat} of the {si(found.rate, 'FLOP/s')} that this {name} "
        "multiplies matrices with are reached"
    )
    return [
        ("trained parameters", f"{found.trained:,}"),
        ("base parameters", f"{found.base:,}, frozen"),
        ("features", features),
        ("arithmetic", f"{si(found.flops, 'FLOP')} a sample, forward and backward"),
        (
            "memory",
            f"{si(sum(found.memory.values()), 'B')}{there}, not counting CUDA and the libraries",
        ),
        *((f"  {part}", si(size, "B")) for part, size in found.memory.items()),
        ("step", f"{found.seconds:,.2f} s for {found.a_step} samples, {reached}"),
        ("run", f"{span(found.seconds * found.steps)} for {found.steps:,} steps"),
    ]


def si(value: float, unit: str) -> str:
    """Format a value with four digits and an SI prefix, such as 1.663 TFLOP."""
    step, prefix = next(((step, prefix) for step, prefix in PREFIXES if value >= step), (1, ""))
    return f"{value / step:.4g} {prefix}{unit}"


def span(seconds: float) -> str:
    """Format a duration, in days if it is two days or longer."""
    days = seconds / 86400
    return f"{days:,.1f} days" if days >= 2 else str(timedelta(seconds=round(seconds)))
