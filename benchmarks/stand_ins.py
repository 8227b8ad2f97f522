"""Models of the published sizes with random weights, and data for them: speed and memory depend on nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from imprompt.structures import BASES, BaseStructure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of every Stable Diffusion.
NOISE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class StandIn:
    """A family's models as arguments of diffusers' and transformers' classes."""

    base: BaseStructure
    vae: Mapping[str, Any]
    texts: tuple[Mapping[str, Any], ...]  # one text encoder, or SDXL's two
    vision: Mapping[str, Any]
    image_side: int = 224  # pixels a side that the image encoder sees

    @property
    def pooled(self) -> int:
        """P: width of the pooled text that SDXL takes beside the text; 0 for others."""
        return self.texts[-1]["projection_dim"] if len(self.texts) > 1 else 0


VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
}
STAND_INS = {
    "sd15": StandIn(BASES["sd15"], VAE | {"scaling_factor": 0.18215}, (CLIP_L,), VIT_H),
    "sdxl": StandIn(BASES["sdxl"], VAE | {"scaling_factor": 0.13025}, (CLIP_L, BIG_G), VIT_H),
    # For the tests.
    "tiny": StandIn(
        BaseStructure(TINY_UNET, 32),
        VAE | {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 1.0},
        (SMALL,),
        SMALL | {"patch_size": 14, "projection_dim": 24},
        image_side=28,
    ),
}


def vae(of: StandIn, dtype: torch.dtype) -> Any:
    return frozen(AutoencoderKL(**of.vae), dtype)


def text_encoders(of: StandIn, dtype: torch.dtype) -> list[Any]:
    """The last one also gives the pooled text where the model takes that."""
    *first, last = (CLIPTextConfig(**text, max_position_embeddings=of.base.text_tokens) for text in of.texts)
    kind = CLIPTextModelWithProjection if of.pooled else CLIPTextModel
    return [*(frozen(CLIPTextModel(config), dtype) for config in first), frozen(kind(last), dtype)]


def image_encoder(of: StandIn, dtype: torch.dtype) -> Any:
    return frozen(CLIPVisionModelWithProjection(CLIPVisionConfig(**of.vision, image_size=of.image_side)), dtype)


def unet(of: StandIn, dtype: torch.dtype) -> Any:
    return frozen(UNet2DConditionModel(**of.base.unet), dtype)


def frozen(model: nn.Module, dtype: torch.dtype) -> Any:
    return nn.Module.to(model, dtype).eval().requires_grad_(False)  # diffusers' own `to` warns of what does not matter here
