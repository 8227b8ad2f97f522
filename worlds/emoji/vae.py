"""Stage 1: the autoencoder, pictures (N, 3, S, S) in [-1, 1] <-> latents (N, C, S/8, S/8).

It is trained on crops of scenes of every drawing style. Crops suffice, because what it learns is
local, and cost a quarter of whole pictures.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .glyphs import STYLES, Glyphs
from .scenes import render, sample_scenes
from .train_utils import World, fit

KL_WEIGHT = 1e-6
CROP = 64  # pixels
# share of the scenes with core glyphs: small, since all glyphs must look equally good
CORE = 0.1
WHOLE = {"l1": 1.0, "mse": 1.0, "slopes": 2.0}  # weights of the errors
# weights while only the decoder is trained: large errors count more
LAST = {"l1": 1.0, "mse": 10.0, "slopes": 1.0}


def build(world: World) -> AutoencoderKL:
    """Build an untrained autoencoder.

    Its residual blocks start as the identity and its latents start nearly without noise.
    """
    plan = world["vae"]
    levels = len(plan["channels"])
    vae = AutoencoderKL(
        block_out_channels=plan["channels"],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=plan["latent"],
        norm_num_groups=plan["groups"],
        mid_block_add_attention=False,
        sample_size=world.side,
    )
    for module in vae.modules():
        if type(module).__name__ == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
    moments = vae.quant_conv
    assert moments is not None
    assert moments.bias is not None
    with torch.no_grad():
        moments.weight[plan["latent"] :].zero_()
        moments.bias[plan["latent"] :].fill_(-6.0)
    return vae


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Compute each picture's peak signal-to-noise ratio in dB: (N, 3, S, S) in [0, 1] -> (N,)."""
    return -10 * (a - b).square().flatten(1).mean(1).clamp(min=1e-10).log10()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encode and decode pictures (N, 3, S, S) in [0, 1]."""
    parts = [
        vae.decode(vae.encode(part * 2 - 1).latent_dist.mode()).sample
        for part in pictures.split(32)
    ]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def crops(
    world: World, styles: list[Glyphs], count: int, generator: torch.Generator, core: float = CORE
) -> Tensor:
    """Draw `count` crops (N, 3, CROP, CROP) in [-1, 1] of scenes in one random drawing style.

    The first style, the world's own, has probability one half.
    """
    number = int(torch.randint(2 * (len(styles) - 1), (), generator=generator))
    glyphs = styles[number + 1] if number + 1 < len(styles) else styles[0]
    scenes = sample_scenes(glyphs, count, generator, core=core)
    pictures = render(scenes, glyphs, world.side)
    places = torch.randint(world.side - CROP + 1, (count, 2), generator=generator).tolist()
    return (
        torch.stack(
            [p[:, y : y + CROP, x : x + CROP] for p, (y, x) in zip(pictures, places, strict=True)]
        )
        * 2
        - 1
    )


def slopes(pictures: Tensor) -> Tensor:
    """Return the differences of neighbouring pixels along x and along y, flattened."""
    return torch.cat([pictures.diff(dim=3).flatten(), pictures.diff(dim=2).flatten()])


def errors(
    vae: AutoencoderKL, latents: Tensor, x: Tensor, weights: dict[str, float]
) -> dict[str, Tensor]:
    """Measure the errors of decoded latents (N, C, h, h) against the pictures x (N, 3, S, S).

    Returns each kind of error times its weight.
    """
    y = vae.decode(latents).sample.float()
    found = {
        "l1": F.l1_loss(y, x),
        "mse": F.mse_loss(y, x),
        "slopes": F.l1_loss(slopes(y), slopes(x)),
    }
    return {name: weights[name] * error for name, error in found.items()}


def train(world: World) -> None:
    """Train the autoencoder, set its scaling factor, save it and print its quality."""
    torch.manual_seed(world.seed)
    plan = world["vae"]
    styles = [world.glyphs(style) for style in STYLES]
    vae = build(world)

    def losses(step: int) -> dict[str, Tensor]:
        x = crops(world, styles, plan["batch"], world.generator(1, step)).to(world.device)
        latents = vae.encode(x).latent_dist
        return errors(vae, latents.sample(), x, WHOLE) | {
            "kl": KL_WEIGHT * latents.kl().float().mean()
        }

    fit(
        world,
        "vae",
        nn.ModuleDict({"vae": vae}),
        losses,
        steps=plan["steps"],
        lr=plan["lr"],
        batch=plan["batch"],
        average=0.998,
    )

    pictures = render(
        sample_scenes(styles[0], 256, world.generator(2), core=CORE), styles[0], world.side
    ).to(world.device)
    # The scale that gives latents unit variance, so that the noise schedule fits them.
    with torch.no_grad():
        std = (
            torch.cat(
                [vae.encode(part * 2 - 1).latent_dist.sample() for part in pictures.split(32)]
            )
            .std()
            .item()
        )
    vae.register_to_config(scaling_factor=round(1 / std, 4))
    vae.save_pretrained(world.folder / "vae")
    report_quality(world, vae, styles[0])


def train_decoder(world: World) -> None:
    """Train the decoder further with a frozen encoder, so that encoded latents stay valid."""
    torch.manual_seed(world.seed + 1)
    plan = world["decoder"]
    styles = [world.glyphs(style) for style in STYLES]
    vae = AutoencoderKL.from_pretrained(world.folder / "vae").requires_grad_(False)
    parts = nn.ModuleDict(
        {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    ).requires_grad_(True)

    def losses(step: int) -> dict[str, Tensor]:
        x = crops(world, styles, plan["batch"], world.generator(4, step), core=0.5).to(world.device)
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.sample()
        return errors(vae, latents, x, LAST)

    fit(
        world,
        "decoder",
        parts,
        losses,
        steps=plan["steps"],
        lr=plan["lr"],
        batch=plan["batch"],
        average=0.998,
    )
    vae.save_pretrained(world.folder / "vae")
    report_quality(world, vae, styles[0])


def report_quality(world: World, vae: AutoencoderKL, glyphs: Glyphs) -> None:
    """Print the PSNR of reconstructed new scenes, of seen and of unseen glyphs and looks."""
    for name, seen in (("seen", True), ("unseen", False)):
        scenes = sample_scenes(
            glyphs, 256, world.generator(3, seen), seen_glyphs=seen, seen_look=seen
        )
        pictures = render(scenes, glyphs, world.side).to(world.device)
        print(
            f"vae: {psnr(reconstruct(vae, pictures), pictures).mean():.2f} dB on new scenes, "
            f"{name} glyphs and looks",
            flush=True,
        )
