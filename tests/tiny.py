"""Tiny, seeded UNets, image encoders, projections and adapters, with inputs and prompts for them.

Their structure is that of the real ones; only widths shrink. Transformers are in `tests.zoo`,
autoencoders and texts in `tests.parts`, whole pipelines in `tests.tiny_pipelines`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.attention.low_rank import PARTS, AttentionLowRank, ModelLowRank
from imprompt.encoders.vision import VisionEncoder
from imprompt.families.base import family_of
from imprompt.families.published import SD1, SD2, SDXL
from imprompt.projections.mlp import (
    FaceProjection,
    FullProjection,
    TextProjection,
    TransposedProjection,
)
from imprompt.projections.resampler import FacePlusProjection, FacePlusV2Projection, Resampler
from imprompt.projections.timed import CharacterProjection, TimeResampler
from imprompt.prompt import ImagePrompt
from imprompt.variants import find_variant

# The UNets as published, but narrow.
POOLED_DIM = 16
UNETS: dict[str, dict[str, Any]] = {
    "sd1": SD1 | {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8},
    "sd2": SD2
    | {
        "block_out_channels": (16, 32, 64, 64),
        "norm_num_groups": 8,
        "attention_head_dim": (2, 4, 8, 8),
    },
    "sdxl": SDXL
    | {
        "block_out_channels": (16, 32, 64),
        "norm_num_groups": 8,
        "attention_head_dim": (2, 4, 8),
        "transformer_layers_per_block": (1, 1, 2),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + POOLED_DIM,
    },
}
TEXT_TOKENS = 11
FACE_DIM = 20
FEATURE_DIMS: dict[str, int] = {
    "pooled": 24,
    "penultimate": 32,
    "last": 32,
    "face": FACE_DIM,
    "raw face": FACE_DIM,
    "face and crop": 32,
    "raw face and square": 32,
    "character": 64,
}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside; the random state outside stays what it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def freeze(module: Any) -> Any:
    return module.eval().requires_grad_(False)


def awake(model: Any) -> Any:
    """The frozen model, with noise where weights start at zero, which would hide what happens."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.05)
    return freeze(model)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_unet(base: str = "sd1", seed: int = 0, **overrides: Any) -> UNet2DConditionModel:
    """A frozen UNet of the structure of `base`; its text is as wide as the real one's."""
    with seeded(seed):
        return freeze(UNet2DConditionModel(**UNETS[base] | overrides))


SMALLEST: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
}


def smallest_unet(base: str = "sd1", **overrides: Any) -> UNet2DConditionModel:
    """Four text cross-attentions, of the SDXL structure eight: for what is slow per layer."""
    more = (
        {"transformer_layers_per_block": (1, 2), "attention_head_dim": (2, 4)}
        if base == "sdxl"
        else {}
    )
    return tiny_unet(base, **SMALLEST | more | overrides)


def tiny_encoder(seed: int = 1) -> VisionEncoder:
    """A CLIP vision tower of 257 tokens, as ViT-H's.

    The pooled and the penultimate feature have different widths.
    """
    hidden, pooled = FEATURE_DIMS["penultimate"], FEATURE_DIMS["pooled"]
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=48,
        projection_dim=pooled,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=2,
    )
    with seeded(seed):
        model = CLIPVisionModelWithProjection(config)
    return VisionEncoder(
        model,
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )


def pictures(count: int, seed: int = 2) -> list[Image.Image]:
    """Noise, wider than high."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 40, 56, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def tiny_projection(name: str, token_dim: int) -> nn.Module:
    """Of the shapes that other implementations can read too: 4 tokens for base, 4 layers and
    64-wide heads for plus.
    """
    feature_dim = FEATURE_DIMS[find_variant(name).feature]
    if name in ("plus", "portrait-unnorm", "ai-toolkit", "lynx"):
        return Resampler(feature_dim, token_dim, tokens=5, width=128)
    if name == "instantx-sd3":
        return TimeResampler(feature_dim, token_dim, tokens=5, width=128, sinusoids=32)
    if name == "instantcharacter":
        return CharacterProjection(
            feature_dim, token_dim, tokens=5, width=128, sinusoids=32, layers=(1, 2)
        )
    if name.startswith("faceid-plus"):
        kind = FacePlusProjection if name == "faceid-plus" else FacePlusV2Projection
        return kind(
            feature_dim, token_dim, face_dim=FACE_DIM, tokens=6 if name.endswith("kolors") else 4
        )
    if name == "portrait":
        return FaceProjection(feature_dim, token_dim, tokens=7)
    kinds = {
        "base": ImageProjection,
        "xlabs": ImageProjection,
        "full": FullProjection,
        "redux": TextProjection,
        "hunyuandit": TransposedProjection,
    }
    return kinds.get(name, FaceProjection)(feature_dim, token_dim)


def tiny_lora(model: UNet2DConditionModel, rank: int = 3) -> ModelLowRank:
    """For every attention, as FaceID adapters have it."""

    def sizes(attention: Any) -> dict[str, tuple[int, int, int]]:
        layers = {part: getattr(attention, part) for part in PARTS[:3]} | {
            "to_out": attention.to_out[0]
        }
        return {
            part: (layer.in_features, layer.out_features, rank) for part, layer in layers.items()
        }

    return ModelLowRank(
        AttentionLowRank(sizes(attention))
        for attention in family_of(model).attentions(model).values()
    )


def tiny_adapter(model: UNet2DConditionModel, name: str = "base", seed: int = 3) -> IPAdapter:
    """An adapter of variant `name` beside `model`, as if trained: every parameter is away from
    where it starts.
    """
    with seeded(seed):
        row = find_variant(name)
        width = model.config.encoder_hid_dim if row.widened else model.config.cross_attention_dim
        adapter = IPAdapter.for_model(model, tiny_projection(name, width))
        if row.lora:
            adapter.low_rank = tiny_lora(model)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += torch.randn_like(parameter) * (
                    0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
                )
            for (
                name,
                parameter,
            ) in adapter.named_parameters():
                # what a low-rank part adds is small beside what is there
                parameter *= 0.3 if name.endswith(".up.weight") else 1
    return adapter


def noise_inputs(model: UNet2DConditionModel, batch: int, seed: int = 4) -> dict[str, Any]:
    """Arguments of one noise prediction.

    Latents are higher than wide, and each item has its own timestep.
    """
    with seeded(seed):
        inputs = {
            "sample": torch.randn(batch, 4, 16, 8),
            "timestep": torch.randint(1000, (batch,)),
            "encoder_hidden_states": torch.randn(
                batch, TEXT_TOKENS, model.config.cross_attention_dim
            ),
        }
        if model.config.addition_embed_type == "text_time":
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.randn(batch, POOLED_DIM),
                "time_ids": torch.full((batch, 6), 32.0),
            }
    return inputs


def noise(model: nn.Module, inputs: dict[str, Any], prompt: Any = None) -> Tensor:
    """The noise that `model` predicts, with or without an image prompt."""
    return model(
        **inputs,
        cross_attention_kwargs={"ip_hidden_states": prompt} if prompt is not None else None,
    ).sample


def random_prompt(
    adapter: IPAdapter, batch: int, scale: float | Tensor = 1.0, seed: int = 5
) -> ImagePrompt:
    """A prompt from random image tokens; the adapter must be attached."""
    with seeded(seed):
        tokens = torch.randn(
            batch, 3, adapter.image_kv[0].to_k.in_features, dtype=next(adapter.parameters()).dtype
        )
    return adapter.prompt(tokens, scale=scale)


def paper_layout(adapter: IPAdapter) -> dict[str, dict[str, Tensor]]:
    """The adapter's weights as the paper's checkpoints hold them: cross-attention i is attention
    processor 2i + 1.
    """
    ip_adapter = {}
    for number, kv in enumerate(adapter.image_kv):
        ip_adapter[f"{2 * number + 1}.to_k_ip.weight"] = kv.to_k.weight.detach()
        ip_adapter[f"{2 * number + 1}.to_v_ip.weight"] = kv.to_v.weight.detach()
    for number, parts in enumerate(adapter.low_rank or ()):
        for name, weight in parts.state_dict().items():
            ip_adapter[f"{number}.{name.replace('.', '_lora.', 1)}"] = weight.detach()
    return {"image_proj": dict(adapter.projection.state_dict()), "ip_adapter": ip_adapter}
