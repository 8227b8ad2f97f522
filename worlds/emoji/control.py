"""An edge-map ControlNet for the world's base: the outline is given, the rest stays free (Zhang et
al. 2023, arXiv 2302.05543).

The base is frozen and no image-prompt adapter takes part: what the two do together was never
trained. Shape letters: N scenes, S pixels a side, C channels of a latent, h latent pixels a side.
"""

from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from .assemble import SHIPPED, report, tidy
from .edges import edges
from .pool import Pool, open_pool
from .scenes import render
from .train_utils import World, fit, rank
from .unet import NoisyBatch, loss, sample_batch

EDGES = SHIPPED / "controlnets" / "edges"
TEXT_DROP = 0.5  # half of the samples have no text, so that it works with an image prompt alone
# channels of the map's own convolutions, as many as the autoencoder has levels
EMBEDDING = (16, 32, 48, 64)


class FrozenBase:
    """The base model as a teacher of additions to it, and the samples that they learn from."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.pipe: Any = StableDiffusionPipeline.from_pretrained(SHIPPED)
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            part.requires_grad_(False).to(world.device)
        if world.device == "cpu":
            self.pipe.unet.set_attn_processor(AttnProcessor())  # see unet.py

    def sample_batch(
        self, pool: Pool, count: int, generator: torch.Generator, drop: float, power: float = 1.0
    ) -> tuple[NoisyBatch, Tensor]:
        """Samples of the pool, and their captions' text states (N, T, D), a share `drop` of which
        is of no text.
        """
        batch = sample_batch(
            self.world,
            pool,
            self.pipe.tokenizer,
            self.pipe.scheduler,
            count,
            generator,
            drop=drop,
            power=power,
        )
        with torch.no_grad():
            return batch, self.pipe.text_encoder(batch.ids).last_hidden_state


def build(base: FrozenBase) -> ControlNetModel:
    """The encoder half of the base, copied. What the map passes starts as large as what comes in:
    the zero convolutions behind it start at nothing, and eight convolutions as they are by
    default would leave nothing of the map.
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
    torch.manual_seed(world.seed + 5)
    plan, base, pool = world["control"], FrozenBase(world), open_pool(world)
    net = build(base)
    here = plan["batch"] // rank()[1]

    def losses(step: int) -> dict[str, Tensor]:
        # Noisier timesteps more often: where a shape lies is decided while there is most noise.
        batch, text = base.sample_batch(
            pool, here, world.generator(61, step, rank()[0]), TEXT_DROP, power=2.0
        )
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
