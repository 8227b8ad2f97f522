"""Two small diffusion transformers beside the UNet, on the same latents and captions.

The DiT is PixArt's: text is read by cross-attentions of its own. The MMDiT is Flux's: text and
picture are rows of one attention. Both match flows, and read words by a T5 encoder trained along.
"""

import re

from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextModel

from .text import build_t5, build_word_tokenizer, open_tokenizer, text_config
from .train_utils import World

# Where a transformer starts as the identity that predicts zero (Peebles & Xie 2022,
# arXiv 2212.09748, "adaLN-Zero"): its modulations, and its last layer.
ZERO = re.compile(
    r"(.*\.)?(adaln_single\.linear|norm(1|1_context|_out)?\.linear)\.(weight|bias)"
    r"|proj_out\.(weight|bias)|(.*\.)?scale_shift_table"
)


def start_at_zero(model: nn.Module) -> None:
    """Set the modulations and the last layer of a new transformer to zero."""
    for name, parameter in model.named_parameters():
        if ZERO.fullmatch(name):
            nn.init.zeros_(parameter)


def open_vae(world: World) -> AutoencoderKL:
    """Load the world's autoencoder; its configuration states that latents are not shifted."""
    vae = AutoencoderKL.from_pretrained(world.folder / "vae")
    vae.register_to_config(shift_factor=0.0)  # Flux's pipelines add it
    return vae


def build_dit(world: World) -> PixArtSigmaPipeline:
    """Build the untrained DiT's pipeline.

    PixArt's pipeline cannot use FlowMatchEulerDiscreteScheduler, which has no `scale_model_input`.
    DPM-Solver++ matches flows as well, as in SANA's pipelines.
    """
    plan = world["dit"]
    tokenizer = build_word_tokenizer(world)
    width = plan["heads"] * plan["head_width"]
    transformer = PixArtTransformer2DModel(
        sample_size=world.side // 8,
        patch_size=2,
        in_channels=world["vae"]["latent"],
        out_channels=world["vae"]["latent"],
        num_layers=plan["layers"],
        num_attention_heads=plan["heads"],
        attention_head_dim=plan["head_width"],
        cross_attention_dim=width,
        caption_channels=plan["text"]["width"],
        use_additional_conditions=False,
    )
    start_at_zero(transformer)
    if world.device == "cpu":
        transformer.set_attn_processor(AttnProcessor())  # twice as fast as the fused kernel
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=build_t5(plan["text"], tokenizer),
        vae=open_vae(world),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    )


def build_mmdit(world: World) -> FluxPipeline:
    """Build the untrained MMDiT's pipeline, with a small CLIP for the pooled text."""
    plan = world["mmdit"]
    words, tokenizer = build_word_tokenizer(world), open_tokenizer(world)
    pooled = {**world["text"], **plan["pooled"]}
    transformer = FluxTransformer2DModel(
        patch_size=1,  # the pipeline packs 2 × 2 latents into one row
        in_channels=4 * world["vae"]["latent"],
        num_layers=plan["layers"],
        num_single_layers=plan["single_layers"],
        num_attention_heads=plan["heads"],
        attention_head_dim=plan["head_width"],
        joint_attention_dim=plan["text"]["width"],
        pooled_projection_dim=pooled["width"],
        axes_dims_rope=plan["rotary"],
    )
    start_at_zero(transformer)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=open_vae(world),
        text_encoder=CLIPTextModel(text_config(pooled, tokenizer, pooled["width"])),
        tokenizer=tokenizer,
        text_encoder_2=build_t5(plan["text"], words),
        tokenizer_2=words,
        transformer=transformer,
    )
