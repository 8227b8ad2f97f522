"""Models of the published sizes with random weights, and data for them.

Speed and memory depend on nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from imprompt.families.published import BASES, SD1, SDXL, BaseStructure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The noise schedule of every Stable Diffusion.
NOISE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class RandomModels:
    """A family's models as arguments of diffusers' and transformers' classes."""

    base: BaseStructure
    vae: Mapping[str, Any]
    texts: tuple[Mapping[str, Any], ...]  # one text encoder, or SDXL's two
    vision: Mapping[str, Any]
    image_side: int = 224  # pixels a side that the image encoder sees

    @property
    def pooled(self) -> int:
        """P: width of the pooled text that SDXL takes with the text; 0 for other models."""
        return self.texts[-1]["projection_dim"] if len(self.texts) > 1 else 0


VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
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
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TINY_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
}
NARROW_VAE = VAE | {"block_out_channels": (32, 32, 64, 64)}
NARROW_TEXT = {"intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
NARROW_VISION = SMALL | {"patch_size": 14, "projection_dim": 1024}
NARROW_SDXL = {
    "block_out_channels": (32, 64, 128),
    "attention_head_dim": (2, 4, 8),
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 6 * 32 + 64,
}
RANDOM_MODELS = {
    "sd15": RandomModels(BASES["sd15"], VAE | {"scaling_factor": 0.18215}, (CLIP_L,), VIT_H),
    "sdxl": RandomModels(BASES["sdxl"], VAE | {"scaling_factor": 0.13025}, (CLIP_L, BIG_G), VIT_H),
    # As many layers as the published models, so as many operators, at a tenth of the width.
    "sd15-narrow": RandomModels(
        BaseStructure(
            SD1 | {"block_out_channels": (32, 64, 128, 128), "attention_head_dim": 4}, 128
        ),
        NARROW_VAE | {"scaling_factor": 0.18215},
        (NARROW_TEXT | {"hidden_size": 768},),
        NARROW_VISION,
        image_side=28,
    ),
    "sdxl-narrow": RandomModels(
        BaseStructure(SDXL | NARROW_SDXL, 128),
        NARROW_VAE | {"scaling_factor": 0.13025},
        (
            NARROW_TEXT | {"hidden_size": 768},
            NARROW_TEXT | {"hidden_size": 1280, "projection_dim": 64},
        ),
        NARROW_VISION,
        image_side=28,
    ),
    # For the tests.
    "tiny": RandomModels(
        BaseStructure(TINY_UNET, 32),
        VAE
        | {
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "scaling_factor": 1.0,
        },
        (SMALL,),
        SMALL | {"patch_size": 14, "projection_dim": 24},
        image_side=28,
    ),
}


def vae(of: RandomModels, dtype: torch.dtype) -> Any:
    """Build a frozen VAE."""
    return frozen(AutoencoderKL(**of.vae), dtype)


def text_encoders(of: RandomModels, dtype: torch.dtype) -> list[Any]:
    """Build the frozen text encoders.

    The last one also gives the pooled text if the model takes it.
    """
    *first, last = (
        CLIPTextConfig(**text, max_position_embeddings=of.base.text_tokens) for text in of.texts
    )
    kind = CLIPTextModelWithProjection if of.pooled else CLIPTextModel
    return [*(frozen(CLIPTextModel(config), dtype) for config in first), frozen(kind(last), dtype)]


def image_encoder(of: RandomModels, dtype: torch.dtype) -> Any:
    """Build a frozen image encoder."""
    return frozen(
        CLIPVisionModelWithProjection(CLIPVisionConfig(**of.vision, image_size=of.image_side)),
        dtype,
    )


def unet(of: RandomModels, dtype: torch.dtype) -> Any:
    """Build a frozen UNet."""
    return frozen(UNet2DConditionModel(**of.base.config), dtype)


def pipeline(of: RandomModels, base: nn.Module, dtype: torch.dtype, *, sees: bool = True) -> Any:
    """Build diffusers' own pipeline around the UNet `base`, on the default device.

    sees  whether it has an image encoder
    """
    tokenizer = letters(of.base.text_tokens)
    encoders = text_encoders(of, dtype)
    parts: dict[str, Any] = {
        "vae": vae(of, dtype),
        "unet": base,
        "text_encoder": encoders[0],
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(
            **NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        "image_encoder": image_encoder(of, dtype) if sees else None,
        "feature_extractor": image_processor(of),
    }
    if of.pooled:
        second = {"text_encoder_2": encoders[1], "tokenizer_2": tokenizer, "add_watermarker": False}
        pipe = StableDiffusionXLPipeline(**parts, **second)
    else:
        pipe = StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_processor(of: RandomModels) -> Any:
    """Build the image processor for the image encoder's size."""
    side = of.image_side
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def letters(tokens: int) -> CLIPTokenizer:
    """Build a tokenizer that knows single letters only.

    It suffices, because the cost of a prompt depends on its padded length alone.
    """
    alphabet = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [
        *alphabet,
        *(f"{letter}</w>" for letter in alphabet),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        model_max_length=tokens,
    )


def frozen(model: nn.Module, dtype: torch.dtype) -> Any:
    """Cast a model to a dtype, in evaluation mode and without gradients."""
    # diffusers' own `to` gives warnings that do not matter here
    return nn.Module.to(model, dtype).eval().requires_grad_(False)
