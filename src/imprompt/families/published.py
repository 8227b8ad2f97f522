"""Sizes of published models.

What depends on sizes alone needs no download: plans, checks and tests.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imprompt.encoders.kinds import EncoderStructure
from imprompt.encoders.vision import describe_encoder
from imprompt.errors import SettingError
from imprompt.families.autoencoders import find_autoencoder
from imprompt.families.base import Family, pipeline_family
from imprompt.models import (
    BIG_G,
    CLIP_L,
    SIGLIP,
    VIT_H,
    KnownModel,
    Location,
    index_of,
    part_config,
)
from imprompt.variants import Feature, image_feature

# Settings of the published UNets that differ from diffusers' defaults.
SD1: dict[str, Any] = {
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
}
SD2 = SD1 | {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = {
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
}
# Settings of published transformers that differ from diffusers' defaults.
SD35_MEDIUM: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
PIXART_SIGMA: dict[str, Any] = {
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "use_additional_conditions": False,
}
SANA_06B: dict[str, Any] = {
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
WAN_13B: dict[str, Any] = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}


@dataclass(frozen=True)
class BaseStructure:
    """A base model's configuration, and the sizes of its inputs."""

    config: Mapping[str, Any]
    side: int  # pixels of the pictures that it was made for
    unit: int = 8  # pixels a side that one latent stands for
    text_tokens: int = 77
    family: str = "unet"


@dataclass(frozen=True)
class PublishedEncoder:
    """A published image encoder.

    alone  whether no other encoder that adapters were made for has these widths, so that the widths
           identify it
    """

    name: str
    place: Location  # a repository that has it
    structure: EncoderStructure
    alone: bool = True


BASES = {
    "sd15": BaseStructure(SD1, 512),
    "sdxl": BaseStructure(SDXL, 1024),
    "flux-dev": BaseStructure({"guidance_embeds": True}, 1024, 8, 512, "flux"),
    "sd35-medium": BaseStructure(SD35_MEDIUM, 1024, 8, 77 + 256, "sd3"),
    "pixart-sigma": BaseStructure(PIXART_SIGMA, 1024, 8, 300, "pixart"),
    "sana-06b": BaseStructure(SANA_06B, 1024, 32, 300, "sana"),
    "z-image": BaseStructure({}, 1024, 8, 512, "z-image"),
    "qwen-image": BaseStructure({}, 1024, 8, 512, "qwen-image"),
    "wan-13b": BaseStructure(WAN_13B, 640, 8, 512, "wan"),
}
ENCODERS = (
    # Another encoder for pictures of 336 px has these widths.
    PublishedEncoder(
        "CLIP ViT-L/14",
        CLIP_L,
        EncoderStructure(768, 1024, 24),
        alone=False,
    ),
    PublishedEncoder("OpenCLIP ViT-H/14", VIT_H, EncoderStructure(1024, 1280, 32)),
    PublishedEncoder("OpenCLIP ViT-bigG/14", BIG_G, EncoderStructure(1280, 1664, 48)),
    # There are others for pictures of 224 px, and SigLIP 2.
    PublishedEncoder(
        "SigLIP so400m/14",
        SIGLIP,
        EncoderStructure(1152, 1152, 27, 729, "SigLIP"),
        alone=False,
    ),
    # There is another with registers.
    PublishedEncoder(
        "DINOv2 giant/14",
        Location("facebook/dinov2-giant"),
        EncoderStructure(1536, 1536, 40, 257, "DINOv2"),
        alone=False,
    ),
)


def published_encoder(feature: Feature, width: int) -> PublishedEncoder | None:
    """Return the encoder whose feature has that width.

    Returns None for a face embedding, which comes from none of these encoders.
    """
    read = image_feature(feature)
    return next(
        (
            row
            for row in ENCODERS
            if read and row.structure.gives(read) and row.structure.shape(read)[-1] == width
        ),
        None,
    )


def base_structure(model: KnownModel) -> BaseStructure:
    """Return the structure of a base model.

    It is taken from the table for a published model, and from the configuration for another one, on
    this disk or from the Hub.
    """
    if model.name in BASES:
        return BASES[model.name]
    known = model_parts(model)[1]
    config, vae, text = (
        part_config(model, part) for part in (known.component, "vae", "text_encoder")
    )
    unit = find_autoencoder(vae["_class_name"]).unit(vae)
    side = known.native_latents(config) * unit
    return BaseStructure(config, side, unit, known.text_length(text), known.name)


def model_parts(model: KnownModel) -> tuple[list[str], Family]:
    """Read the names of a model's components, and its family, from its index alone."""
    saved = index_of(model)
    names, kind = [name for name in saved if not name.startswith("_")], saved["_class_name"]
    family = pipeline_family(kind, trained=True)
    if on := [name for name in family.unlike if saved.get(name)]:
        raise SettingError(
            f"{model.name}: adapters cannot be trained for a {kind} with {on[0]} = "
            f"{saved[on[0]]!r}, which calls its models in another way"
        )
    return names, family


def encoder_structure(place: Location) -> EncoderStructure:
    """Return the sizes of the image encoder at that location, read without its weights."""
    known = next((row for row in ENCODERS if row.place == place), None)
    return known.structure if known else describe_encoder(place).structure
