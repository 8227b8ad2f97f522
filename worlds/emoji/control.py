"""An edge-map ControlNet for the world's base: the outline is given, the rest stays free (Zhang et al. 2023, arXiv 2302.05543).

The base is frozen and no image-prompt adapter takes part: what the two do together was never trained. Shape letters: N scenes, S
pixels a side, C channels of a latent, h latent pixels a side.
"""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from .assemble import SHIPPED, report, tidy
from .glyphs import Glyphs
from .stage import World, fit, rank
from .unet import latents_of, samples

EDGES = SHIPPED / "controlnets" / "edges"
TEXT_DROP = 0.5  # half of the samples have no text, so that it works beside an image prompt alone
EMBEDDING = (16, 32, 64)  # channels of the map's own convolutions; two strides of 2 lead from pixels to latents
WEAK, STRONG = 0.06, 0.30  # gradient (of 1) below which there is no edge, and above which an edge is full
SOBEL = ((1.0, 2.0, 1.0), (-1.0, 0.0, 1.0))  # smoothing across, difference along


def edges(pictures: Tensor) -> Tensor:
    """Pictures (N, 3, S, S) in [0, 1] -> edge maps (N, 3, S, S) in [0, 1], white on black, three equal channels.

    The Sobel gradient of each colour (a red edge on a green of the same grey is an edge), the strongest of the three, softly
    thresholded.
    """
    smooth, slope = pictures.new_tensor(SOBEL)
    kernels = torch.stack([torch.outer(smooth, slope), torch.outer(slope, smooth)])[:, None] / 4
    planes = F.pad(pictures.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    strength = F.conv2d(planes, kernels).square().sum(1).sqrt().view_as(pictures).amax(1, keepdim=True)
    return ((strength - WEAK) / (STRONG - WEAK)).clamp(0, 1).expand(-1, 3, -1, -1)


class Frozen:
    """The shipped base model as a teacher of additions to it, and the samples that they learn from."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.pipe: Any = StableDiffusionPipeline.from_pretrained(SHIPPED)
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            part.requires_grad_(False).to(world.device)
        for part in (self.pipe.unet, self.pipe.vae):
            part.to(memory_format=torch.channels_last)
        if world.device == "cpu":
            self.pipe.unet.set_attn_processor(AttnProcessor())  # see unet.py

    @cached_property
    def glyphs(self) -> Glyphs:
        return self.world.glyphs()

    def sample(self, count: int, generator: torch.Generator, drop: float) -> tuple[Tensor, Tensor]:
        """Pictures (N, 3, S, S) in [0, 1] and their captions' text states (N, T, D), a share `drop` of which is of no text."""
        pictures, ids = samples(self.world, self.glyphs, self.pipe.tokenizer, count, drop, generator)
        with torch.no_grad():
            return pictures, self.pipe.text_encoder(ids).last_hidden_state

    def noised(self, pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noised latents (N, C, h, h), their timesteps (N,) and the velocities to predict (N, C, h, h).

        Timesteps are drawn in proportion to themselves: where a shape lies is decided while there is most noise.
        """
        x = latents_of(self.pipe.vae, pictures)
        noise = torch.randn(x.shape, generator=generator).to(x)
        last = self.pipe.scheduler.config.num_train_timesteps - 1
        t = (torch.rand(len(x), generator=generator).sqrt() * last).round().long().to(x.device)
        return self.pipe.scheduler.add_noise(x, noise, t), t, self.pipe.scheduler.get_velocity(x, noise, t)


def build(base: Frozen) -> ControlNetModel:
    """The encoder half of the base, copied. The map's embedding starts away from zero: the zero convolutions behind it do."""
    net = ControlNetModel.from_unet(base.pipe.unet, conditioning_embedding_out_channels=EMBEDDING).requires_grad_(True)
    nn.init.kaiming_uniform_(net.controlnet_cond_embedding.conv_out.weight, nonlinearity="linear")
    if base.world.device == "cpu":
        net.set_attn_processor(AttnProcessor())
    return net.to(memory_format=torch.channels_last)


def train(world: World) -> None:
    torch.manual_seed(world.seed + 5)
    plan, base = world["control"], Frozen(world)
    net = build(base)
    here = plan["batch"] // rank()[1]

    def losses(step: int) -> dict[str, Tensor]:
        generator = world.generator(61, step, rank()[0])
        pictures, text = base.sample(here, generator, TEXT_DROP)
        x, t, velocity = base.noised(pictures, generator)
        down, mid = net(x, t, text, controlnet_cond=edges(pictures), return_dict=False)
        v = base.pipe.unet(x, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
        return {"v": F.mse_loss(v.float(), velocity)}

    modules = nn.ModuleDict({"control": net})
    fit(world, "control", modules, losses, steps=plan["steps"], lr=plan["lr"], batch=plan["batch"], average=0.998)
    if rank()[0] == 0:
        net.to("cpu", torch.float16, memory_format=torch.contiguous_format).save_pretrained(EDGES)
        tidy(EDGES / "config.json")
        report(SHIPPED)
