"""Stage 2: a small CLIP, and the judge: another of its kind, trained apart on other seeds, used for measuring only."""

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

from .scenes import captions, render, sample_scenes
from .stage import World, fit
from .text import build_tokenizer, text_config

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own
THUMBNAIL = 16


def preprocess(pictures: Tensor) -> Tensor:
    """(N, 3, S, S) in [0, 1] -> the encoder's input. What the saved image processor does, for tensors of the right size."""
    mean, std = (torch.tensor(v, device=pictures.device).view(3, 1, 1) for v in (MEAN, STD))
    return (pictures - mean) / std


def whole(vision: CLIPVisionModelWithProjection, text: CLIPTextModelWithProjection, log_scale: float) -> CLIPModel:
    """The two towers as one CLIP, as other programs read it. `log_scale`: the logarithm of the likeness's factor in training."""
    width = vision.config.projection_dim
    clip = CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=vision.config.to_dict(), projection_dim=width))
    clip.load_state_dict({**vision.state_dict(), **text.state_dict(), "logit_scale": torch.tensor(log_scale)})
    return clip


def train(world: World, name: str = "clip") -> None:
    torch.manual_seed(world.seed)
    plan, glyphs = world[name], world.glyphs()
    tokenizer = build_tokenizer(world["text"]["tokens"])
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=plan["width"],
            intermediate_size=4 * plan["width"],
            num_hidden_layers=plan["layers"],
            num_attention_heads=plan["heads"],
            patch_size=plan["patch"],
            image_size=world.side,
            projection_dim=plan["projection"],
        )
    )
    text = CLIPTextModelWithProjection(text_config(world, tokenizer, plan["projection"]))
    # Heads for training only: which glyphs, and a thumbnail. They bring shape, palette and layout into the embedding.
    heads = nn.ModuleDict(
        {
            "glyph": nn.Linear(plan["projection"], glyphs.seen),
            "thumbnail": nn.Linear(plan["projection"], 3 * THUMBNAIL**2),
        }
    )
    temperature = nn.Linear(1, 1, bias=False)
    nn.init.constant_(temperature.weight, 2.6)
    modules = nn.ModuleDict({"vision": vision, "text": text, "heads": heads, "temperature": temperature})

    def losses(step: int) -> dict[str, Tensor]:
        generator = world.generator(11, step)
        scenes = sample_scenes(glyphs, plan["batch"], generator)
        pictures = render(scenes, glyphs, world.side)
        tokens = tokenizer(captions(scenes, glyphs, generator), padding="max_length", truncation=True, return_tensors="pt").to(
            world.device
        )
        shown = (
            torch.zeros(len(scenes), glyphs.seen + 1).scatter_(1, scenes.glyph % (glyphs.seen + 1), 1.0)[:, :-1].to(world.device)
        )
        pictures = pictures.to(world.device)
        image = vision(preprocess(pictures)).image_embeds.float()
        words = text(tokens.input_ids).text_embeds.float()
        likeness = F.normalize(image, dim=1) @ F.normalize(words, dim=1).T * temperature.weight.squeeze().exp().clamp(max=100)
        same = torch.arange(len(image), device=world.device)
        return {
            "contrast": (F.cross_entropy(likeness, same) + F.cross_entropy(likeness.T, same)) / 2,
            "glyph": 10 * F.binary_cross_entropy_with_logits(heads["glyph"](image), shown),
            "thumbnail": 10 * F.mse_loss(heads["thumbnail"](image), F.adaptive_avg_pool2d(pictures, THUMBNAIL).flatten(1)),
        }

    fit(world, name, modules, losses, steps=plan["steps"], lr=plan["lr"], batch=plan["batch"], average=0.998)
    folder = world.folder / name
    vision.save_pretrained(folder / "image_encoder")
    text.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    whole(vision, text, temperature.weight.item()).save_pretrained(folder / "whole")
    CLIPImageProcessorPil(size={"shortest_edge": world.side}, crop_size=world.side).save_pretrained(folder / "feature_extractor")
    for label, seen in (("seen", True), ("unseen", False)):
        found = retrieval(world, vision, glyphs, seen=seen)
        print(f"{name}: {found:.1%} of 256 {label} scenes found again after noise, from their embedding")


def train_judge(world: World) -> None:
    train(world, "judge")


@torch.no_grad()
def retrieval(world: World, vision: CLIPVisionModelWithProjection, glyphs, *, seen: bool) -> float:
    """How often a scene with noise (sigma 0.1) is nearest to itself among 256: does the embedding tell scenes apart?"""
    generator = world.generator(12, seen)
    pictures = render(sample_scenes(glyphs, 256, generator, seen_glyphs=seen, seen_look=seen), glyphs, world.side)
    noisy = (pictures + 0.1 * torch.randn(pictures.shape, generator=generator).to(pictures)).clamp(0, 1)
    a, b = (F.normalize(vision(preprocess(p.to(world.device))).image_embeds, dim=1) for p in (pictures, noisy))
    return (a @ b.T).argmax(0).eq(torch.arange(256, device=a.device)).float().mean().item()
