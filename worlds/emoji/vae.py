"""Stage 1: the autoencoder, pictures (N, 3, S, S) in [-1, 1] <-> latents (N, C, S/4, S/4)."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .scenes import render, sample_scenes
from .stage import World, fit

KL_WEIGHT = 1e-6


def build(world: World) -> AutoencoderKL:
    plan = world["vae"]
    levels = len(plan["channels"])
    return AutoencoderKL(
        block_out_channels=plan["channels"],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=plan["latent"],
        norm_num_groups=plan["groups"],
        mid_block_add_attention=False,
        sample_size=world.side,
    )


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per picture; (N, 3, S, S) in [0, 1] -> (N,)."""
    return -10 * (a - b).square().flatten(1).mean(1).clamp(min=1e-10).log10()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    return (vae.decode(vae.encode(pictures * 2 - 1).latent_dist.mode()).sample / 2 + 0.5).clamp(0, 1)


def train(world: World) -> None:
    torch.manual_seed(world.seed)
    plan, glyphs = world["vae"], world.glyphs()
    vae = build(world)
    # Zero the last convolution of every residual block: each starts as the identity.
    for module in vae.modules():
        if type(module).__name__ == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
    vae.to(memory_format=torch.channels_last)

    def losses(step: int) -> dict[str, Tensor]:
        scenes = sample_scenes(glyphs, plan["batch"], world.generator(1, step))
        x = (render(scenes, glyphs, world.side) * 2 - 1).to(world.device, memory_format=torch.channels_last)
        latents = vae.encode(x).latent_dist
        y = vae.decode(latents.sample()).sample
        return {"l1": F.l1_loss(y, x), "mse": F.mse_loss(y, x), "kl": KL_WEIGHT * latents.kl().mean()}

    fit(world, "vae", nn.ModuleDict({"vae": vae}), losses, steps=plan["steps"], lr=plan["lr"], batch=plan["batch"], average=0.998)

    scenes = sample_scenes(glyphs, 256, world.generator(2))
    pictures = render(scenes, glyphs, world.side).to(world.device)
    # The scale that gives latents unit variance, so that the noise schedule fits them.
    with torch.no_grad():
        spread = vae.encode(pictures * 2 - 1).latent_dist.sample().std().item()
    vae.register_to_config(scaling_factor=round(1 / spread, 4))
    vae.save_pretrained(world.folder / "vae")
    for name, seen in (("seen", True), ("unseen", False)):
        scenes = sample_scenes(glyphs, 256, world.generator(3, seen), seen_glyphs=seen, seen_look=seen)
        pictures = render(scenes, glyphs, world.side).to(world.device)
        print(f"vae: {psnr(reconstruct(vae, pictures), pictures).mean():.2f} dB on new scenes, {name} glyphs and looks")
