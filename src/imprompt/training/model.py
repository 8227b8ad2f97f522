"""What a run trains: a new or given adapter beside a frozen base model, and the frozen models
around that.

Shape letters as in `imprompt.training.features`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imprompt.adapter import IPAdapter
from imprompt.checkpoints.adapters import build_adapter, read_adapter
from imprompt.encoders.clip import open_encoder
from imprompt.encoders.matching import given_place
from imprompt.errors import MismatchError, SettingError
from imprompt.families.base import Conditions, family_of
from imprompt.families.published import model_parts
from imprompt.models import Location, find_adapter, find_model, open_pipeline, part_config
from imprompt.training.buckets import training_size
from imprompt.training.features import FeatureEncoder
from imprompt.training.recipe import Optimization, Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class AdaptedModel(nn.Module):
    """The frozen base model heard through the adapter. Only the adapter is registered: it alone is
    trained and saved.

    The base computes in its own precision, the adapter in float32 (its resampler's values leave
    float16's range).
    """

    def __init__(self, base: nn.Module, adapter: IPAdapter) -> None:
        super().__init__()
        self.adapter = adapter.attach(base)
        self._base = (base.requires_grad_(False),)

    def forward(
        self, noisy: Tensor, timestep: Tensor, image: Tensor, conditions: Conditions
    ) -> Tensor:
        """Return the prediction (B, C, h, w) for noisy latents of that shape, timesteps (B,) and
        image features.
        """
        with torch.autocast(noisy.device.type, enabled=False):
            prompt = self.adapter.prompt(self.adapter.tokens(image))
        return self.adapter.family.predict(self._base[0], prompt, noisy, timestep, conditions)


def open_base(recipe: Recipe, device: torch.device, *, whole: bool) -> Any:
    """The recipe's model as a pipeline in the precision of the run.

    `whole` with all that features come from.
    """
    dtype = DTYPES[precision(recipe, device)]
    model = find_model(recipe.model)
    parts, family = model_parts(model)
    without = (
        () if whole else [part for part in parts if part not in (family.component, "scheduler")]
    )
    pipeline = open_pipeline(model, device, dtype=dtype, without=without)
    vae = getattr(pipeline, "vae", None)
    if vae is not None and vae.config.get("force_upcast") and dtype == torch.float16:
        vae.float()  # SDXL's overflows in float16
    return pipeline


def open_frozen(recipe: Recipe, pipeline: Any) -> FeatureEncoder:
    """The frozen models around the base, where the pipeline's others are."""
    device: torch.device = pipeline.vae.device
    dtype = pipeline.vae.dtype if device.type == "cuda" else torch.float32
    encoder = open_encoder(encoder_place(recipe), device, dtype)
    return FeatureEncoder(pipeline, encoder, recipe.adapter_variant, recipe.model)


def prepare_base(base: Any, plan: Optimization, device: torch.device) -> Any:
    """The base model on the device, as it trains fastest there."""
    base.to(device, memory_format=torch.channels_last)
    if device.type == "cpu":
        family_of(base).quicken(base)
    if plan.checkpointing:
        base.enable_gradient_checkpointing()
    if plan.compile:
        # To save memory, PyTorch 2.13 may read a gradient before it is written: see
        # `imprompt.training.compiled`.
        base.compile(options={"reorder_for_peak_memory": False} if device.type == "cpu" else None)
    return base


def start_adapter(recipe: Recipe, base: Any, feature_dim: int) -> IPAdapter:
    """The adapter that training starts from: `recipe.start`, or a new one.

    In float32, attached to nothing.
    """
    family, row = family_of(base), recipe.adapter_variant
    layers = family.layers(base)
    if recipe.start is None:
        token_dim = family.size(next(iter(layers.values()))).text
        sizes = {
            key: value
            for key, value in (("tokens", recipe.tokens), ("depth", recipe.depth))
            if value is not None
        }
        torch.manual_seed(recipe.seed)
        return IPAdapter.for_model(base, row.projection(feature_dim, token_dim, **sizes)).float()
    file = read_adapter(find_adapter(find_model(recipe.model), recipe.start)[0])
    if (file.variant, file.feature_dim) != (row, feature_dim):
        raise MismatchError(
            f"start = {recipe.start!r} is a {file.variant.name} adapter of {file.feature_dim}-wide "
            "features; "
            f"this recipe trains a {row.name} one of {feature_dim}-wide features "
            f"({file.variant.feature} there, {row.feature} here)"
        )
    adapter = build_adapter(file, family)
    adapter.check_fits(base)
    return adapter.float()


def encoder_place(recipe: Recipe) -> Location:
    """The recipe's image encoder, or that of the model's first adapter, or the one beside the
    model.
    """
    model = find_model(recipe.model)
    if recipe.encoder is not None:
        return given_place(recipe.encoder)
    known = next((one.encoder for one in model.adapters.values() if one.encoder), None)
    return known or model.base.inside("image_encoder")


@dataclass(frozen=True)
class Measures:
    """What a recipe's pictures become, told by the model's configuration alone."""

    size: int  # pixels a side
    unit: int  # pixels a side that one latent stands for
    channels: int  # C
    scaling: float  # latents are (what the VAE gives - shift) · scaling
    shift: float


def measure_model(recipe: Recipe) -> Measures:
    """SettingError if the model cannot take pictures of the recipe's size."""
    model = find_model(recipe.model)
    vae, family = part_config(model, "vae"), model_parts(model)[1]
    unit = 2 ** (len(vae["block_out_channels"]) - 1)
    native = family.native_latents(part_config(model, family.component)) * unit
    return Measures(
        training_size(recipe.data, native, unit * family.grain),
        unit,
        vae["latent_channels"],
        vae.get("scaling_factor", 0.18215),
        vae.get("shift_factor") or 0.0,
    )


def best_device() -> torch.device:
    """The accelerator if there is one that computes, else the CPU: torch built for CUDA names one
    on machines without a driver.
    """
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return there or torch.device("cpu")


def precision(recipe: Recipe, device: torch.device) -> str:
    """Of the frozen base: bf16 where the machine is fast at it, if the recipe leaves it open."""
    wanted = recipe.optimization.precision
    if wanted == "fp16" and device.type == "cpu":
        raise SettingError(
            "optimization.precision = 'fp16' needs a GPU; on a CPU bf16 or fp32 is allowed"
        )
    return wanted if wanted != "auto" else "bf16" if bf16_is_fast() else "fp32"


def bf16_is_fast() -> bool:
    """On any recent GPU, and on CPUs with its instructions."""
    return torch.cuda.is_available() or bool(
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    )
