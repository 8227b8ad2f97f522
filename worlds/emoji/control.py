"""An edge-map ControlNet for the world's base (Zhang et al. 2023, arXiv 2302.05543).

An edge map gives the outline, all else stays free. The base is frozen and no image-prompt adapter
takes part: the two are never trained together. Shape letters: N scenes, S pixels a side, C channels
of a latent, h latent pixels a side, T tokens of a text, D width of a text state.
"""

from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from imprompt.families.unet import UNET
from imprompt.training.objective import Objective
from imprompt.training.recipe import NoiseSettings

from .assemble import SHIPPED, report, tidy
from .base import NoisyBatch, loss, sample_batch
from .edges import edges
from .pool import Pool, open_pool
from .scenes import render
from .train_utils import World, fit, rank

EDGES = SHIPPED / "controlnets" / "edges"
TEXT_DROP = 0.5  # half of the samples have no text, so that it works with an image prompt alone
# channels of the map's own convolutions, one for each level of the autoencoder
EMBEDDING = (16, 32, 48, 64)


class FrozenBase:
    """The frozen base model, which additions to it are trained with, and their samples.

    power  1 draws timesteps uniformly; larger values draw noisier ones more often
    """

    def __init__(self, world: World, power: float = 1.0) -> None:
        self.world = world
        self.pipe: Any = StableDiffusionPipeline.from_pretrained(SHIPPED)
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            part.requires_grad_(False).to(world.device)
        if world.device == "cpu":
            self.pipe.unet.set_attn_processor(AttnProcessor())  # faster for attention this small
        self.objective = Objective(self.pipe.scheduler, NoiseSettings(power=power))

    def sample_batch(
        self, pool: Pool, count: int, generator: torch.Generator, drop: float
    ) -> tuple[NoisyBatch, Tensor]:
        """Draw samples of the pool, and their captions' text states (N, T, D).

        A share `drop` of the captions is empty.
        """
        batch = sample_batch(self.world, pool, self.objective, count, generator, drop=drop)
        with torch.no_grad():
            return batch, UNET.encode_text(self.pipe, batch.captions)["text"]


def build(base: FrozenBase) -> ControlNetModel:
    """Copy the encoder half of the base as a ControlNet.

    The map's own convolutions keep the scale of their input: with the default initialisation, eight
    of them would leave almost nothing of the map, and the zero convolutions after them start at
    zero.
    """
    net = ControlNetModel.from_unet(
        base.pipe.unet, conditioning_embedding_out_channels=EMBEDDING
    ).requires_grad_(True)
    for module in net.controlnet_cond_embedding.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    if base.world.device == "cpu":
        net.set_attn_processor(AttnProcessor())
    return net


def train(world: World) -> None:
    """Train the ControlNet on edge maps of the pool's scenes, and save it into the package."""
    torch.manual_seed(world.seed + 5)
    # noisier timesteps more often: the place of a shape is decided at high noise
    plan, base, pool = world["control"], FrozenBase(world, power=2.0), open_pool(world)
    net = build(base)
    here = plan["batch"] // rank()[1]

    def losses(step: int) -> dict[str, Tensor]:
        batch, text = base.sample_batch(pool, here, world.generator(61, step, rank()[0]), TEXT_DROP)
        maps = edges(render(pool.scenes[batch.index], pool.glyphs, world.side)).to(world.device)
        down, mid = net(batch.noisy, batch.t, text, controlnet_cond=maps, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        v = base.pipe.unet(batch.noisy, batch.t, text, **residuals).sample
        return {"v": loss(v, batch)}

    modules = nn.ModuleDict({"control": net})
    fit(
        world,
        "control",
        modules,
        losses,
        steps=plan["steps"],
        lr=plan["lr"],
        batch=plan["batch"],
        average=0.998,
    )
    if rank()[0] == 0:
        net.to("cpu", torch.float16).save_pretrained(EDGES)
        tidy(EDGES / "config.json")
        report(SHIPPED)
