"""Stage: a pool of scenes whose latents are encoded once, for all that trains on the base's
latents.

Encoding a scene costs about as much as a training step on it. Shape letters: N scenes, C channels
of a latent, h latent pixels a side, S pixels a side.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from imprompt.files import atomic_write
from imprompt.training.model import bf16_is_fast

from .glyphs import OWN, Glyphs
from .scenes import Scenes, captions, figures, render, sample_scenes
from .train_utils import World, rank

CHUNK = 4000  # scenes a file
# pictures that are encoded together: 50 take three times as long each on a CPU, whose cache they
# leave
AT_ONCE = 10


@dataclass(frozen=True)
class Pool:
    """Scenes, their latents (N, C, h, h) scaled for the base, and how much of each latent pixel is
    figure (N, 1, h, h).
    """

    glyphs: Glyphs
    scenes: Scenes
    latents: Tensor
    figures: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` of the scenes by number (count,)"""
        return torch.randint(len(self), (count,), generator=generator)

    def captions(self, index: Tensor, drop: float, generator: torch.Generator) -> list[str]:
        """Captions of scenes by number, a share `drop` of which is empty."""
        words = captions(self.scenes[index], self.glyphs, generator)
        dropped = (torch.rand(len(index), generator=generator) < drop).tolist()
        return ["" if gone else word for gone, word in zip(dropped, words, strict=True)]


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures (N, 3, S, S) in [0, 1] -> latents (N, C, h, h)."""
    with torch.autocast(pictures.device.type, torch.bfloat16, enabled=bf16_is_fast()):
        modes = [vae.encode(part * 2 - 1).latent_dist.mode() for part in pictures.split(AT_ONCE)]
    return torch.cat(modes).float() * vae.config.scaling_factor


def fill_pool(world: World, style: str = OWN) -> None:
    """Draw and encode what the pool of that style lacks yet, this process's part of it.

    A stopped run goes on.
    """
    glyphs = world.glyphs(style)
    vae = AutoencoderKL.from_pretrained(world.folder / "vae").to(world.device)
    shrink = 2 ** (len(vae.config.block_out_channels) - 1)
    # fewer steps learn from another style's
    count = world["pool"] if style == OWN else world["pool"] // 2
    chunk = min(CHUNK, count)
    for number in range(rank()[0] * chunk, count, rank()[1] * chunk):
        path = world.folder / f"pool-{style}-{number:06d}.pt"
        if path.exists():
            continue
        generator = world.generator(25, number)
        parts = []
        for part in torch.arange(chunk).split(50):
            scenes = sample_scenes(glyphs, len(part), generator)
            latents = latents_of(vae, render(scenes, glyphs, world.side))
            parts.append(
                (
                    scenes,
                    latents.cpu().half(),
                    F.avg_pool2d(figures(scenes, glyphs, world.side), shrink).cpu().half(),
                )
            )
        scenes, latents, where = zip(*parts, strict=True)
        with atomic_write(path) as temporary:
            torch.save(
                {
                    "scenes": vars(Scenes.cat(scenes)),
                    "latents": torch.cat(latents),
                    "figures": torch.cat(where),
                },
                temporary,
            )
        print(f"pool: {number + chunk} scenes in the style {style}", flush=True)


def open_pool(world: World, style: str = OWN) -> Pool:
    """The pool of one drawing style, filled first where it is not."""
    fill_pool(world, style)
    if rank()[1] > 1:
        dist.barrier()
    parts = [
        torch.load(path, weights_only=True)
        for path in sorted(world.folder.glob(f"pool-{style}-*.pt"))
    ]
    return Pool(
        world.glyphs(style),
        Scenes.cat([Scenes(**part["scenes"]) for part in parts]),
        torch.cat([part["latents"] for part in parts]),
        torch.cat([part["figures"] for part in parts]),
    )
