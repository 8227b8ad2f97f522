"""The UNet that the package contains: it predicts v with a zero-SNR schedule."""

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel

from .text import open_tokenizer
from .train_utils import World


def build_scheduler() -> DDIMScheduler:
    """Return the base's DDIM scheduler: v-prediction, zero SNR at the last timestep."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def build_unet(world: World) -> UNet2DConditionModel:
    """Build an untrained UNet with attention at the levels that the budget names.

    At the finest level, attention would cost as much as the whole rest.
    """
    plan = world["unet"]
    unet = UNet2DConditionModel(
        sample_size=world.side // 8,
        in_channels=world["vae"]["latent"],
        out_channels=world["vae"]["latent"],
        block_out_channels=plan["channels"],
        layers_per_block=plan["layers"],
        down_block_types=[("DownBlock2D", "CrossAttnDownBlock2D")[on] for on in plan["attention"]],
        up_block_types=[
            ("UpBlock2D", "CrossAttnUpBlock2D")[on] for on in reversed(plan["attention"])
        ],
        cross_attention_dim=world["text"]["width"],
        attention_head_dim=plan["heads"],
        norm_num_groups=plan["groups"],
    )
    if world.device == "cpu":
        # attention this small is a third faster on a CPU without the fused kernel
        unet.set_attn_processor(AttnProcessor())
    return unet


def build_unet_pipeline(world: World) -> StableDiffusionPipeline:
    """Build the untrained UNet's pipeline, with the text encoder of the world's CLIP.

    The text encoder is trained further, with the UNet.
    """
    tokenizer = open_tokenizer(world)
    text = CLIPTextModel.from_pretrained(world.folder / "clip" / "text_encoder").float()
    unet, vae = build_unet(world), AutoencoderKL.from_pretrained(world.folder / "vae")
    return StableDiffusionPipeline(
        vae, text, tokenizer, unet, build_scheduler(), None, None, requires_safety_checker=False
    )
