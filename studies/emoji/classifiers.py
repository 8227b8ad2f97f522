"""Classifiers for measuring only: which seen glyph a picture shows, and in which drawing style.

They are small ResNets, trained separately.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from worlds.emoji.clip import CORE, loosened, preprocess
from worlds.emoji.glyphs import OWN, STYLES, Glyphs
from worlds.emoji.scenes import render, sample_scenes
from worlds.emoji.train_utils import World, fit

from .paths import GLYPH_CLASSIFIER, STYLE_CLASSIFIER

WIDTHS = [32, 64, 128, 192]


def seen_by_it(
    world: World, glyphs: Glyphs, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw pictures (N, 3, S, S) of one glyph each, and return them with the glyphs (N,).

    At random they are sharp, blurred or noisy, as results of a model are.
    """
    scenes = loosened(sample_scenes(glyphs, count, generator, pairs=0, core=CORE), generator)
    pictures = render(scenes, glyphs, world.side)
    blur, noise = (torch.rand(count, 1, 1, 1, generator=generator).to(pictures) for _ in range(2))
    pictures = torch.where(
        blur < 0.5, pictures, F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    )
    strength = (noise - 0.5).clamp(min=0) * 0.2
    return (
        pictures + strength * torch.randn(pictures.shape, generator=generator).to(pictures)
    ).clamp(0, 1), scenes.glyph[:, 0]


def named(
    world: World, styles: list[Glyphs], count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw pictures in the world's own style, and return them with their glyphs (N,)."""
    return seen_by_it(world, styles[0], count, generator)


def signed(
    world: World, styles: list[Glyphs], count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw pictures in all styles, and return them with the styles' numbers (N,)."""
    share = count // len(styles)
    pictures = torch.cat([seen_by_it(world, glyphs, share, generator)[0] for glyphs in styles])
    return pictures, torch.arange(len(styles)).repeat_interleave(share)


TASKS = {  # name -> function that draws labelled pictures, their styles, the network's folder
    "glyph-classifier": (named, (OWN,), GLYPH_CLASSIFIER),
    "style-classifier": (signed, tuple(STYLES), STYLE_CLASSIFIER),
}


def train(world: World, name: str) -> None:
    """Train the classifier `name`, save it as float16 and print its accuracy on new pictures."""
    torch.manual_seed(world.seed)
    plan = world[name]
    show, names, folder = TASKS[name]
    styles = [world.glyphs(style) for style in names]
    labels = names if len(names) > 1 else styles[0].names[: styles[0].seen]
    config = ResNetConfig(
        embedding_size=WIDTHS[0],
        hidden_sizes=WIDTHS,
        depths=[1] * len(WIDTHS),
        layer_type="basic",
        id2label=dict(enumerate(labels)),
    )
    network = ResNetForImageClassification(config).to(memory_format=torch.channels_last)

    def losses(step: int) -> dict[str, Tensor]:
        pictures, truth = show(world, styles, plan["batch"], world.generator(91, step))
        logits = network(
            preprocess(pictures.to(world.device, memory_format=torch.channels_last))
        ).logits
        return {name: F.cross_entropy(logits.float(), truth.to(world.device))}

    fit(
        world,
        name,
        nn.ModuleDict({"classifier": network}),
        losses,
        steps=plan["steps"],
        lr=plan["lr"],
        batch=plan["batch"],
    )
    network.to("cpu", torch.float16, memory_format=torch.contiguous_format).save_pretrained(folder)
    pictures, truth = show(world, styles, 500, world.generator(92))
    with torch.no_grad():
        right = network.float().eval()(preprocess(pictures.cpu())).logits.argmax(1).eq(truth)
    print(f"{name}: {right.float().mean():.1%} of 500 new pictures named")


train_glyphs = partial(train, name="glyph-classifier")
train_styles = partial(train, name="style-classifier")
