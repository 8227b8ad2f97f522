"""Stage 3: the base model, a latent diffusion UNet and its text encoder, trained together (v-prediction, zero-SNR)."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from .glyphs import Glyphs
from .scenes import captions, render, sample_scenes
from .stage import World, fit, rank

TEXT_DROP = 0.12  # for classifier-free guidance
QUIET = 0.35  # share of the timesteps at which shapes are plain to see


def build_scheduler() -> DDIMScheduler:
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
    plan = world["unet"]
    levels = len(plan["channels"])
    return UNet2DConditionModel(
        sample_size=world.side // 4,
        in_channels=world["vae"]["latent"],
        out_channels=world["vae"]["latent"],
        block_out_channels=plan["channels"],
        layers_per_block=plan["layers"],
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=world["text"]["width"],
        attention_head_dim=plan["heads"],
        norm_num_groups=plan["groups"],
    )


def samples(world: World, glyphs: Glyphs, tokenizer: Any, count: int, share: float,
            generator: torch.Generator) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pictures (N, 3, S, S) in [0, 1] and the tokens (N, T) of their captions, of which that share is empty."""
    scenes = sample_scenes(glyphs, count, generator)
    words = captions(scenes, glyphs, generator)
    dropped = torch.rand(count, generator=generator) < share
    words = ["" if drop else word for drop, word in zip(dropped, words, strict=True)]
    ids = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(world.device)
    return render(scenes, glyphs, world.side).to(world.device, memory_format=torch.channels_last), ids


@torch.no_grad()
def latents_of(vae: Any, pictures: Tensor) -> Tensor:
    """Pictures (N, 3, S, S) in [0, 1] -> latents (N, C, h, h)."""
    return vae.encode(pictures * 2 - 1).latent_dist.mode().float() * vae.config.scaling_factor


def timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """(N,) four fifths of them from the noisier two thirds: where so few latent pixels still have a shape to be found."""
    share = torch.rand(count, generator=generator)
    noisy = torch.rand(count, generator=generator) < 0.8
    return (torch.where(noisy, QUIET + share * (1 - QUIET), share * QUIET) * total).long().clamp(max=total - 1)


def train(world: World) -> None:
    torch.manual_seed(world.seed + 3)
    plan, glyphs, scheduler = world["unet"], world.glyphs(), build_scheduler()
    vae = (
        AutoencoderKL.from_pretrained(world.folder / "vae")
        .to(world.device, memory_format=torch.channels_last)
        .requires_grad_(False)
    )
    tokenizer = CLIPTokenizer.from_pretrained(world.folder / "clip" / "tokenizer")  # built again it would number ties otherwise
    text = CLIPTextModel.from_pretrained(world.folder / "clip" / "text_encoder").float()  # it goes on learning
    unet = build_unet(world).to(memory_format=torch.channels_last)
    if world.device == "cpu":
        unet.set_attn_processor(AttnProcessor())  # for attentions this small, 1.7 times faster there than the fused kernel
    compiled: Any = torch.compile(unet)  # 1.4 times faster on a CPU, minutes later
    here = plan["batch"] // rank()[1]

    def losses(step: int) -> dict[str, Tensor]:
        generator = world.generator(21, step, rank()[0])
        pictures, ids = samples(world, glyphs, tokenizer, here, TEXT_DROP, generator)
        x = latents_of(vae, pictures)
        noise = torch.randn(x.shape, generator=generator).to(x)
        t = timesteps(here, scheduler.config.num_train_timesteps, generator).to(x.device)
        v = compiled(scheduler.add_noise(x, noise, t), t, text(ids).last_hidden_state, return_dict=False)[0]
        return {"v": F.mse_loss(v.float(), scheduler.get_velocity(x, noise, t))}

    modules = nn.ModuleDict({"unet": unet, "text": text})
    fit(world, "unet", modules, losses, steps=plan["steps"], lr=plan["lr"], batch=plan["batch"], average=0.999)
    if rank()[0] == 0:
        pipeline = StableDiffusionPipeline(vae, text.float(), tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
        pipeline.save_pretrained(world.folder / "base")
        print("unet: the base model is saved")
