"""Stage 2: a small CLIP.

Its image encoder conditions the adapters, its text encoder is the base's first. It is trained on
scenes of several drawing styles, their glyphs of any size and in any place, since an image prompt
may differ from what the base draws. Shape letters: N scenes, S pixels a side, P patches along a
side of the encoder's grid.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from .glyphs import ENCODED, Glyphs
from .scenes import Scenes, captions, figures, render, sample_scenes
from .text import open_tokenizer, text_config
from .train_utils import World, fit

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own
# pixels a side that heads predict: of the picture from the embedding, of a patch from its feature
THUMBNAIL, CELL = (16, 4)
PICTURED = 50  # weight of squared errors in these pixels
CORE = 0.2  # share of the scenes with core glyphs


def preprocess(pictures: Tensor, side: int | None = None) -> Tensor:
    """Resize pictures (N, 3, S, S) in [0, 1] to `side` pixels and normalise them for the encoder.

    This does for tensors what the saved image processor does.
    """
    if side is not None and side != pictures.shape[-1]:
        pictures = F.interpolate(pictures, size=side, mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(v, device=pictures.device).view(3, 1, 1) for v in (MEAN, STD))
    return (pictures - mean) / std


def whole(
    vision: CLIPVisionModelWithProjection, text: CLIPTextModelWithProjection, log_scale: float
) -> CLIPModel:
    """Join the two towers to one CLIP, the format that other programs read.

    log_scale  logarithm of the factor that similarities are multiplied by in training
    """
    width = vision.config.projection_dim
    clip = CLIPModel(
        CLIPConfig(
            text_config=text.config.to_dict(),
            vision_config=vision.config.to_dict(),
            projection_dim=width,
        )
    )
    clip.load_state_dict(
        {**vision.state_dict(), **text.state_dict(), "logit_scale": torch.tensor(log_scale)}
    )
    return clip


def loosened(scenes: Scenes, generator: torch.Generator) -> Scenes:
    """Change the size and place of the glyphs in half of the scenes, at random."""
    n, slots = scenes.size.shape
    keep = torch.rand(n, generator=generator) < 0.5
    size = scenes.size * (0.5 + 0.7 * torch.rand(n, slots, generator=generator))
    centre = scenes.centre + 0.5 * (torch.rand(n, slots, 2, generator=generator) - 0.5)
    return replace(
        scenes,
        size=torch.where(keep[:, None], scenes.size, size),
        centre=torch.where(keep[:, None, None], scenes.centre, centre),
    )


def shares(scenes: Scenes, seen: int) -> Tensor:
    """Return which glyphs each scene shows, as shares that sum to one (N, seen)."""
    shown = torch.zeros(len(scenes), seen + 1).scatter_(1, scenes.glyph % (seen + 1), 1.0)[:, :seen]
    return shown / shown.sum(1, keepdim=True)


def heads_for(world: World, name: str, glyphs: Glyphs) -> nn.ModuleDict:
    """Build heads for training only.

    They bring identity, palette, place and shape into the embedding and into the grid.
    """
    plan = world[name]
    return nn.ModuleDict(
        {
            "glyph": nn.Linear(plan["projection"], glyphs.seen),
            "thumbnail": nn.Linear(plan["projection"], 3 * THUMBNAIL**2),
            "cell": nn.Linear(plan["width"], 4 * CELL**2),  # colours, and where the figure is
        }
    )


def cells(pictures: Tensor, patches: int) -> Tensor:
    """Reduce pictures (N, C, S, S) to CELL² pixels of each patch, in order: (N, P², C · CELL²)."""
    small = F.adaptive_avg_pool2d(pictures, patches * CELL)
    return F.unfold(small, CELL, stride=CELL).transpose(1, 2)


def train(world: World, name: str = "clip") -> None:
    """Train the CLIP whose sizes the budget has under `name`; save it into the world's folder."""
    torch.manual_seed(world.seed)
    plan = world[name]
    styles = [world.glyphs(style) for style in ENCODED]
    glyphs, patches = styles[0], plan["side"] // plan["patch"]
    tokenizer = open_tokenizer(world)
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=plan["width"],
            intermediate_size=4 * plan["width"],
            num_hidden_layers=plan["layers"],
            num_attention_heads=plan["heads"],
            patch_size=plan["patch"],
            image_size=plan["side"],
            projection_dim=plan["projection"],
            attn_implementation="eager",  # on a CPU twice as fast as the fused kernel
        )
    )
    text = CLIPTextModelWithProjection(text_config(world["text"], tokenizer, plan["projection"]))
    temperature = nn.Linear(1, 1, bias=False)
    nn.init.constant_(temperature.weight, 2.6)
    heads = heads_for(world, name, glyphs)
    modules = nn.ModuleDict(
        {"vision": vision, "text": text, "heads": heads, "temperature": temperature}
    )

    def losses(step: int) -> dict[str, Tensor]:
        generator = world.generator(11, step)
        drawn = styles[int(torch.randint(len(styles), (), generator=generator))]
        scenes = loosened(sample_scenes(drawn, plan["batch"], generator, core=CORE), generator)
        words = captions(scenes, drawn, generator)
        ids = tokenizer(
            words, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(world.device)
        pictures, where = (
            draw(scenes, drawn, world.side).to(world.device) for draw in (render, figures)
        )
        seen = vision(preprocess(pictures, plan["side"]), output_hidden_states=True)
        image, read = seen.image_embeds.float(), text(ids).text_embeds.float()
        likeness = (
            F.normalize(image, dim=1)
            @ F.normalize(read, dim=1).T
            * temperature.weight.squeeze().exp().clamp(max=100)
        )
        same = torch.arange(len(image), device=world.device)
        grid = heads["cell"](seen.hidden_states[-2][:, 1:])
        return {
            "contrast": (F.cross_entropy(likeness, same) + F.cross_entropy(likeness.T, same)) / 2,
            "glyph": F.cross_entropy(
                heads["glyph"](image).float(), shares(scenes, glyphs.seen).to(world.device)
            ),
            "thumbnail": PICTURED
            * F.mse_loss(
                heads["thumbnail"](image), F.adaptive_avg_pool2d(pictures, THUMBNAIL).flatten(1)
            ),
            "cell": PICTURED * F.mse_loss(grid, cells(torch.cat([pictures, where], 1), patches)),
        }

    fit(
        world,
        name,
        modules,
        losses,
        steps=plan["steps"],
        lr=plan["lr"],
        batch=plan["batch"],
        average=0.998,
    )
    folder = world.folder / name
    vision.save_pretrained(folder / "image_encoder")
    text.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    whole(vision, text, temperature.weight.item()).save_pretrained(folder / "whole")
    CLIPImageProcessorPil(
        size={"shortest_edge": plan["side"]}, crop_size=plan["side"]
    ).save_pretrained(folder / "feature_extractor")
    for label, seen in (("seen", True), ("unseen", False)):
        found = retrieval(world, vision, glyphs, seen=seen)
        print(
            f"{name}: {found:.1%} of 256 {label} scenes found again after noise, from their "
            "embedding"
        )


@torch.no_grad()
def retrieval(
    world: World, vision: CLIPVisionModelWithProjection, glyphs: Glyphs, *, seen: bool
) -> float:
    """Return how often a scene with noise (sigma 0.1) is nearest to itself among 256 scenes.

    This shows whether the embedding distinguishes scenes.
    """
    generator = world.generator(12, seen)
    pictures = render(
        sample_scenes(glyphs, 256, generator, seen_glyphs=seen, seen_look=seen), glyphs, world.side
    )
    noisy = (pictures + 0.1 * torch.randn(pictures.shape, generator=generator).to(pictures)).clamp(
        0, 1
    )
    side = vision.config.image_size
    a, b = (
        F.normalize(vision(preprocess(p.to(world.device), side)).image_embeds, dim=1)
        for p in (pictures, noisy)
    )
    return (a @ b.T).argmax(0).eq(torch.arange(256, device=a.device)).float().mean().item()
