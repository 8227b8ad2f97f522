"""Models of a run: an adapter, new or given, the frozen base model and the frozen models around it.

Shape letters as in `imprompt.training.features`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imprompt.adapter import IPAdapter
from imprompt.attention.low_rank import RANK, AttentionLowRank, ModelLowRank
from imprompt.checkpoints.adapters import build_adapter, read_adapter
from imprompt.encoders.face_sources import open_face_source
from imprompt.encoders.matching import given_place
from imprompt.encoders.vision import open_encoder
from imprompt.errors import MismatchError, SettingError
from imprompt.families.autoencoders import Normalization, find_autoencoder
from imprompt.families.base import Conditions, Family, family_of
from imprompt.families.forms import NORMED, AttentionForm
from imprompt.families.published import model_parts
from imprompt.models import Location, find_adapter, find_model, open_pipeline, part_config
from imprompt.training.buckets import training_size
from imprompt.training.features import FeatureEncoder
from imprompt.training.recipe import Optimization, Recipe
from imprompt.variants import PARTS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class AdaptedModel(nn.Module):
    """The frozen base model, conditioned through the adapter.

    Only the adapter is registered, so only the adapter is trained and saved. The base computes in
    its configured precision, the adapter in float32 (its resampler's values exceed float16's
    range).
    """

    def __init__(self, base: nn.Module, adapter: IPAdapter) -> None:
        super().__init__()
        self.adapter = adapter.attach(base)
        self._base = (base.requires_grad_(False),)

    def forward(
        self, noisy: Tensor, timestep: Tensor, image: Mapping[str, Tensor], conditions: Conditions
    ) -> Tensor:
        """Predict (B, C, h, w) from noisy latents, timesteps, image features and conditions.

        Noisy latents are (B, C, h, w), timesteps (B,), image features (B, …) by part.
        """
        with torch.autocast(noisy.device.type, enabled=False):
            prompt = self.adapter.prompt(self.adapter.tokens(in_order(image)))
        return self.adapter.family.predict(self._base[0], prompt, noisy, timestep, conditions)


def in_order(image: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Return image features by part as a projection takes them."""
    return tuple(image[part] for part in PARTS if part in image)


def open_base(recipe: Recipe, device: torch.device, *, whole: bool) -> Any:
    """Open the recipe's model as a pipeline in the precision of the run.

    With `whole`, it includes all models that encode features.
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
        vae.float()  # SDXL's VAE overflows in float16
    return pipeline


def open_frozen(recipe: Recipe, pipeline: Any) -> FeatureEncoder:
    """Open the frozen models around the base, on the device of the pipeline's VAE."""
    device: torch.device = pipeline.vae.device
    dtype = pipeline.vae.dtype if device.type == "cuda" else torch.float32
    row, faces = recipe.adapter_variant, recipe.face_source
    source = None if faces is None else open_face_source(faces, row.feature)
    encoder = open_encoder(encoder_place(recipe), device, dtype) if row.image_feature else None
    return FeatureEncoder(pipeline, encoder, row, recipe.model, source)


def prepare_base(base: Any, plan: Optimization, device: torch.device) -> Any:
    """Move the base model to the device, in the form that trains fastest there.

    Raise SettingError if its activations cannot be computed again.
    """
    videos = any(weight.ndim == 5 for weight in base.parameters())  # have no such format
    base.to(device, memory_format=torch.preserve_format if videos else torch.channels_last)
    if device.type == "cpu":
        family_of(base).quicken(base)
    if plan.checkpointing:
        enable_checkpointing(base)
    if plan.compile:
        # To save memory, PyTorch 2.13 may read a gradient before it is written: see
        # `imprompt.training.compiled`.
        base.compile(options={"reorder_for_peak_memory": False} if device.type == "cpu" else None)
    return base


def enable_checkpointing(base: Any) -> None:
    """Let the base model compute its activations again; SettingError if it cannot."""
    if not base._supports_gradient_checkpointing:
        raise SettingError(
            f"optimization.checkpointing = true: a {type(base).__name__} does not support it; "
            "leave it out, and take more parts (optimization.accumulate) to save memory"
        )
    base.enable_gradient_checkpointing()


def start_adapter(recipe: Recipe, base: Any, widths: Mapping[str, int]) -> IPAdapter:
    """Return the adapter that training starts from: `recipe.start`, or a new one.

    It is in float32 and not attached. Raise MismatchError if `recipe.start` does not fit the
    recipe, or the base model takes no such adapter.

    widths  of the image features, by part
    """
    family, row = family_of(base), recipe.adapter_variant
    feature_dim = widths.get("image") or widths["face"]
    face_dim = widths["face"] if row.image_feature and row.faces else None
    layers = family.layers(base)
    if recipe.start is None:
        token_dim = recipe.token_width or family.size(next(iter(layers.values()))).text
        given = {"tokens": recipe.tokens or row.tokens, "depth": recipe.depth, "face_dim": face_dim}
        sizes: Any = {key: value for key, value in given.items() if value is not None}
        torch.manual_seed(recipe.seed)
        projection = row.projection(feature_dim, token_dim, **sizes)
        low_rank = new_low_rank(family, base, recipe.rank or RANK) if row.lora else None
        form = form_for(recipe, family, base)
        return IPAdapter.for_model(base, projection, low_rank, form, recipe.token_width).float()
    file = read_adapter(find_adapter(find_model(recipe.model), recipe.start)[0])
    if (file.variant, file.feature_dim) != (row, feature_dim):
        raise MismatchError(
            f"start = {recipe.start!r} is a {file.variant.name} adapter of {file.feature_dim}-wide "
            "features; "
            f"this recipe trains a {row.name} one of {feature_dim}-wide features "
            f"({file.variant.feature} there, {row.feature} here)"
        )
    if row.faces and file.face_dim != widths["face"]:
        raise MismatchError(
            f"start = {recipe.start!r} reads {file.face_dim}-wide face embeddings; those of this "
            f"recipe are {widths['face']} wide"
        )
    if recipe.rank and file.ranks != [recipe.rank] * 2:
        raise MismatchError(
            f"start = {recipe.start!r} has a low-rank part of rank {file.ranks[-1]}; the recipe "
            f"asks for rank {recipe.rank}: leave rank out to keep it"
        )
    if recipe.token_width not in (None, file.token_dim):
        raise MismatchError(
            f"start = {recipe.start!r} has {file.token_dim}-wide image tokens; the recipe asks for "
            f"token_width = {recipe.token_width}: leave it out to keep them"
        )
    if recipe.qk_norm not in (None, file.form is NORMED):
        kind = "with" if file.form is NORMED else "without"
        raise MismatchError(
            f"start = {recipe.start!r} was trained {kind} qk_norm: leave qk_norm out to keep that"
        )
    adapter = build_adapter(file, family)
    adapter.check_fits(base)
    return adapter.float()


def form_for(recipe: Recipe, family: Family, base: Any) -> AttentionForm | None:
    """Return how a new adapter attends: with a norm of its own, or without one.

    Raise MismatchError if the recipe asks for a norm where there can be none.
    """
    norms = family.norms_queries(base)
    if recipe.qk_norm and norms is None:
        raise MismatchError(
            f"qk_norm = true is for transformers: in the {family.name} family the image's "
            "attention shares the text's queries; leave qk_norm out"
        )
    wanted = norms is False if recipe.qk_norm is None else recipe.qk_norm
    return NORMED if wanted else None


def new_low_rank(family: Family, base: Any, rank: int) -> ModelLowRank:
    """Return a new low-rank part for every attention of the base model; it adds nothing yet."""
    attentions = family.attentions(base).values()
    return ModelLowRank(AttentionLowRank.for_attention(one, rank) for one in attentions)


def encoder_place(recipe: Recipe) -> Location:
    """Return the location of the image encoder.

    It is the recipe's, else the first that the model's adapters name, else the model's folder
    "image_encoder".
    """
    model = find_model(recipe.model)
    if recipe.encoder is not None:
        return given_place(recipe.encoder)
    known = next((one.encoder for one in model.adapters.values() if one.encoder), None)
    return known or model.base.inside("image_encoder")


@dataclass(frozen=True)
class Measures:
    """Sizes of a recipe's pictures and latents, by the model's configuration alone."""

    size: int  # pixels a side
    unit: int  # pixels a side that one latent stands for
    channels: int  # C
    normalization: Normalization


def measure_model(recipe: Recipe) -> Measures:
    """Return the sizes of a recipe; raise SettingError if they do not fit the model."""
    model = find_model(recipe.model)
    vae, family = part_config(model, "vae"), model_parts(model)[1]
    kind = find_autoencoder(vae["_class_name"])
    unit = kind.unit(vae)
    native = family.native_latents(part_config(model, family.component)) * unit
    return Measures(
        training_size(recipe.data, native, unit * family.grain),
        unit,
        kind.channels(vae),
        kind.normalize(vae),
    )


def best_device() -> torch.device:
    """Return the accelerator if one is available, else the CPU.

    PyTorch built for CUDA names an accelerator also on machines without a driver.
    """
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return there or torch.device("cpu")


def precision(recipe: Recipe, device: torch.device) -> str:
    """Return the precision of the frozen base: the recipe's, or for "auto" bf16 where it is fast.

    Raise SettingError for fp16 on a CPU.
    """
    wanted = recipe.optimization.precision
    if wanted == "fp16" and device.type == "cpu":
        raise SettingError(
            "optimization.precision = 'fp16' needs a GPU; on a CPU bf16 or fp32 is allowed"
        )
    return wanted if wanted != "auto" else "bf16" if bf16_is_fast() else "fp32"


def bf16_is_fast() -> bool:
    """Return whether bf16 is fast: on any recent GPU, and on CPUs with instructions for it."""
    return torch.cuda.is_available() or bool(
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    )
