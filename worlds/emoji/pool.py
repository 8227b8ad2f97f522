"""Stage "pool": scenes whose latents are encoded once, for all that trains on the base's latents.

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
# pictures encoded together: 50 no longer fit a CPU's cache, and take three times as long each
AT_ONCE = 10


@dataclass(frozen=True)
class Pool:
    """Scenes with their encoded latents.

    `latents` (N, C, h, h) are scaled for the base; `figures` (N, 1, h, h) is the share of each
    latent pixel that a figure covers.
    """

    glyphs: Glyphs
    scenes: Scenes
    latents: Tensor
    figures: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the indices of `count` random scenes (count,)."""
        return torch.randint(len(self), (count,), generator=generator)

    def captions(self, index: Tensor, drop: float, generator: torch.Generator) -> list[str]:
        """Write captions of the scenes at `index`, a random share `drop` of them empty."""
        words = captions(self.scenes[index], self.glyphs, generator)
        dropped = (torch.rand(len(index), generator=generator) < drop).tolist()
        return ["" if gone else word for gone, word in zip(dropped, words, strict=True)]


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encode pictures (N, 3, S, S) in [0, 1] to latents (N, C, h, h)."""
    with torch.autocast(pictures.device.type, torch.bfloat16, enabled=bf16_is_fast()):
        modes = [vae.encode(part * 2 - 1).latent_dist.mode() for part in pictures.split(AT_ONCE)]
    return torch.cat(modes).float() * vae.config.scaling_factor


def fill_pool(world: World, style: str = OWN) -> None:
    """Draw and encode the scenes that the pool of a drawing style does not have yet.

    Each process encodes its part of the files. An interrupted run continues with the missing files.
    """
    glyphs = world.glyphs(style)
    vae = AutoencoderKL.from_pretrained(world.folder / "vae").to(world.device)
    shrink = 2 ** (len(vae.config.block_out_channels) - 1)
    # fewer training steps use the pools of the other styles
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
    """Load the pool of one drawing style; fill it first if scenes are missing."""
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
