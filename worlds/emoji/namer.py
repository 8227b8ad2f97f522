"""The namer: which of the seen glyphs a picture shows. A small ResNet for measuring only, trained apart."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from .assemble import NAMER
from .clip import preprocess
from .glyphs import Glyphs
from .scenes import render, sample_scenes
from .stage import World, fit

WIDTHS = [32, 64, 96, 160]


def seen_by_it(world: World, glyphs: Glyphs, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, S, S) of one glyph, sharp, blurred and noisy by chance as results of a model are, and the glyphs (N,)."""
    scenes = sample_scenes(glyphs, count, generator, pairs=0)
    pictures = render(scenes, glyphs, world.side)
    blur, noise = (torch.rand(count, 1, 1, 1, generator=generator).to(pictures) for _ in range(2))
    pictures = torch.where(blur < 0.5, pictures, F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1))
    strength = (noise - 0.5).clamp(min=0) * 0.2
    return (pictures + strength * torch.randn(pictures.shape, generator=generator).to(pictures)).clamp(0, 1), scenes.glyph[:, 0]


def train(world: World) -> None:
    torch.manual_seed(world.seed)
    plan, glyphs = world["namer"], world.glyphs()
    config = ResNetConfig(
        embedding_size=WIDTHS[0],
        hidden_sizes=WIDTHS,
        depths=[1] * len(WIDTHS),
        layer_type="basic",
        id2label=dict(enumerate(glyphs.names[: glyphs.seen])),
    )
    network = ResNetForImageClassification(config).to(memory_format=torch.channels_last)

    def losses(step: int) -> dict[str, Tensor]:
        pictures, truth = seen_by_it(world, glyphs, plan["batch"], world.generator(91, step))
        named = network(preprocess(pictures.to(world.device, memory_format=torch.channels_last))).logits
        return {"glyph": F.cross_entropy(named.float(), truth.to(world.device))}

    fit(world, "namer", nn.ModuleDict({"namer": network}), losses, steps=plan["steps"], lr=plan["lr"], batch=plan["batch"])
    network.to("cpu", torch.float16, memory_format=torch.contiguous_format).save_pretrained(NAMER)
    pictures, truth = seen_by_it(world, glyphs, 512, world.generator(92))
    with torch.no_grad():
        right = network.float().eval()(preprocess(pictures.cpu())).logits.argmax(1).eq(truth)
    print(f"namer: {right.float().mean():.1%} of 512 new scenes named")
