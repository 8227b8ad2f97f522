"""What the shipped model can do, measured: `python -m worlds.emoji evaluate` prints the table that the model card holds.

The judge is an encoder of its own seed and size that never conditioned anything; colours and shapes are measured
against the scenes' own factors. Shape letters: N scenes, S pixels a side.
"""

import json
import re
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from imprompt.images import grid
from imprompt.sampling.generate import ImagePromptPipeline

from .assemble import ADAPTERS, SHIPPED
from .clip import preprocess
from .glyphs import Glyphs
from .scenes import Scenes, background, captions, render, sample_scenes, to_image
from .stage import HERE, World
from .vae import psnr, reconstruct

COUNT = 128
FRONT = "plus"  # the adapter whose results stand in the README
SETS = {  # label -> which glyphs and which palettes and patterns
    "seen glyphs, new compositions": (True, True),
    "unseen glyphs": (False, True),
    "unseen glyphs, palettes and pattern": (False, False),
}


@dataclass(frozen=True)
class Judge:
    """The measuring encoder: embeddings for retrieval, and which of the seen glyphs it sees."""

    encoder: CLIPVisionModelWithProjection
    weight: Tensor
    bias: Tensor

    @classmethod
    def load(cls) -> "Judge":
        heads = load_file(HERE / "judge" / "heads.safetensors")
        encoder = CLIPVisionModelWithProjection.from_pretrained(HERE / "judge", dtype=torch.float32).eval()
        return cls(encoder, heads["glyph.weight"].float(), heads["glyph.bias"].float())

    @torch.no_grad()
    def embed(self, pictures: Tensor) -> Tensor:
        """(N, 3, S, S) in [0, 1] -> unit embeddings (N, E)"""
        return F.normalize(self.encoder(preprocess(pictures)).image_embeds, dim=1)

    @torch.no_grad()
    def glyph(self, pictures: Tensor) -> Tensor:
        """(N, 3, S, S) -> the likeliest seen glyph (N,)"""
        return F.linear(self.encoder(preprocess(pictures)).image_embeds, self.weight, self.bias).argmax(1)


def to_tensor(images: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).float() / 255


def retrieval(found: Tensor, prompts: Tensor) -> float:
    """How often a result's nearest prompt, of all, is its own. Embeddings (N, E)."""
    return (found @ prompts.T).argmax(1).eq(torch.arange(len(found))).float().mean().item()


def rims(pictures: Tensor, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Along the edge of the picture, after a 5-pixel blur: what is there and the true background, (N, 3, places)."""
    side = pictures.shape[-1]
    rim = torch.ones(side, side, dtype=torch.bool)
    rim[3:-3, 3:-3] = False
    there, true = (F.avg_pool2d(x, 5, 1, 2)[..., rim] for x in (pictures, background(scenes, side)))
    return there, true


def background_error(pictures: Tensor, scenes: Scenes) -> Tensor:
    """Mean absolute difference, of 255, from the true background, place by place (N,)."""
    there, true = rims(pictures, scenes)
    return (there - true).abs().mean((1, 2)) * 255


def colour_error(pictures: Tensor, scenes: Scenes) -> Tensor:
    """The same of the mean colour: a pattern that lies otherwise is no error (N,)."""
    there, true = rims(pictures, scenes)
    return (there.mean(2) - true.mean(2)).abs().mean(1) * 255


def outlines(pictures: Tensor) -> Tensor:
    """Edge strength by place and direction, (N, 8·8·8) unit vectors: a histogram of oriented gradients."""
    grey = pictures.mean(1, keepdim=True)
    dx = F.pad(grey[..., 1:] - grey[..., :-1], (0, 1, 0, 0))
    dy = F.pad(grey[..., 1:, :] - grey[..., :-1, :], (0, 0, 0, 1))
    turn = ((torch.atan2(dy, dx) / torch.pi) % 1 * 8).floor().clamp(max=7).long()
    strength = (dx**2 + dy**2).sqrt()
    bins = torch.zeros(len(pictures), 8, *grey.shape[-2:]).scatter_(1, turn, strength)
    return F.normalize(F.adaptive_avg_pool2d(bins, 8).flatten(1), dim=1)


def follow(
    pipe: ImagePromptPipeline, judge: Judge, glyphs: Glyphs, scenes: Scenes, generator: torch.Generator
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Image prompt alone, scale 1: does the result follow its own prompt and not another's?"""
    side = pipe.pipeline.unet.config.sample_size * pipe.pipeline.vae_scale_factor
    prompts = render(scenes, glyphs, side)
    made = to_tensor(pipe([to_image(p) for p in prompts], seed=0, batch_size=32).images)
    other = torch.roll(torch.arange(len(scenes)), 1)
    # The ceiling: another real picture of the same scene, a little moved.
    again = Scenes(**{**vars(scenes), "centre": scenes.centre + 0.03 * torch.randn(scenes.centre.shape, generator=generator)})
    shapes, prompt_shapes, ceiling = outlines(made), outlines(prompts), outlines(render(again, glyphs, side))
    own_glyph = judge.glyph(made).eq(scenes.glyph[:, 0]) | judge.glyph(made).eq(scenes.glyph[:, 1])
    row = {
        "retrieval": retrieval(judge.embed(made), judge.embed(prompts)),
        "background error, own": background_error(made, scenes).mean().item(),
        "background error, shuffled": background_error(made, scenes[other]).mean().item(),
        "colour error, own": colour_error(made, scenes).mean().item(),
        "colour error, shuffled": colour_error(made, scenes[other]).mean().item(),
        "outline likeness, own": (shapes * prompt_shapes).sum(1).mean().item(),
        "outline likeness, shuffled": (shapes * prompt_shapes[other]).sum(1).mean().item(),
        "outline likeness, ceiling": (ceiling * prompt_shapes).sum(1).mean().item(),
        "PSNR to the prompt": psnr(made, prompts).mean().item(),
    }
    row["own glyph"] = own_glyph.float().mean().item() if bool((scenes.glyph < glyphs.seen).all()) else float("nan")
    return row, prompts, made


@torch.no_grad()
def with_text(
    pipe: ImagePromptPipeline, judge: Judge, glyphs: Glyphs, world: World, scale: float
) -> tuple[dict[str, float], Tensor, Tensor]:
    """A text that names one glyph, an image prompt that shows another: is the text's glyph there, in the image's palette?"""
    generator = world.generator(43)
    scenes = sample_scenes(glyphs, COUNT, generator, pairs=0)
    named = (scenes.glyph[:, 0] + 1 + torch.randint(glyphs.seen - 1, (COUNT,), generator=generator)) % glyphs.seen
    texts = captions(Scenes(**{**vars(scenes), "glyph": torch.stack([named, -torch.ones_like(named)], 1)}), glyphs, generator)
    texts = [text.split(" on ")[0].split(" at ")[0].split(" in the ")[0] for text in texts]
    prompts = render(scenes, glyphs, world.side)
    made, null = [], pipe.first.tokens(pipe.first.reader.null_features())
    for start in range(0, COUNT, 32):  # the façade takes one text a call; diffusers' own call takes many
        chunk = range(start, start + 32)
        tokens = pipe.first.tokens(pipe.first.reader.picture_features([to_image(prompts[i]) for i in chunk]))
        made += pipe.pipeline(
            [texts[i] for i in chunk],
            num_inference_steps=pipe.model.steps,
            guidance_scale=pipe.model.guidance,
            generator=[torch.Generator().manual_seed(i) for i in chunk],
            cross_attention_kwargs={"ip_hidden_states": pipe.first.adapter.prompt(tokens, null, scale)},
        ).images
    made = to_tensor(made)
    error, other = background_error(made, scenes), background_error(made, scenes[torch.roll(torch.arange(COUNT), 1)])
    glyph, palette = judge.glyph(made).eq(named), error < 0.25 * other.mean()
    return (
        {
            "text's glyph": glyph.float().mean().item(),
            "image's glyph": judge.glyph(made).eq(scenes.glyph[:, 0]).float().mean().item(),
            "image's palette": palette.float().mean().item(),
            "both right": (glyph & palette).float().mean().item(),
        },
        prompts,
        made,
    )


def sheet(prompts: Tensor, made: Tensor, path: Path, pairs: int = 24, columns: int = 6) -> None:
    """Prompt and result side by side, enlarged twice."""
    cells = [to_image(torch.cat([prompts[i], made[i]], 2)) for i in range(pairs)]
    picture = grid(cells, columns=columns, gap=6)
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.LANCZOS).save(path, quality=88)


def check_judge(judge: Judge, glyphs: Glyphs, world: World) -> dict[str, float]:
    """The ruler itself, on real scenes: can it find a scene drawn again, and name its glyph?"""
    generator = world.generator(44)
    scenes = sample_scenes(glyphs, COUNT, generator, pairs=0)
    again = Scenes(**{**vars(scenes), "centre": scenes.centre + 0.03 * torch.randn(scenes.centre.shape, generator=generator)})
    pictures, redrawn = render(scenes, glyphs, world.side), render(again, glyphs, world.side)
    return {
        "scene drawn again found": retrieval(judge.embed(redrawn), judge.embed(pictures)),
        "glyph named": judge.glyph(pictures).eq(scenes.glyph[:, 0]).float().mean().item(),
    }


def evaluate(world: World) -> None:
    world = replace(world, device="cpu")  # small enough, and the same numbers everywhere
    glyphs, judge, docs = world.glyphs(), Judge.load(), HERE.parents[1] / "docs" / "emoji"
    docs.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, float]] = {"judge": check_judge(judge, glyphs, world)}
    vae = AutoencoderKL.from_pretrained(SHIPPED / "vae")
    for label, (glyphs_seen, look_seen) in SETS.items():
        scenes = sample_scenes(
            glyphs, 256, world.generator(41, glyphs_seen, look_seen), seen_glyphs=glyphs_seen, seen_look=look_seen
        )
        pictures = render(scenes, glyphs, world.side)
        results[f"VAE: {label}"] = {"PSNR": psnr(reconstruct(vae, pictures), pictures).mean().item()}
    for name in ADAPTERS:
        pipe = ImagePromptPipeline.from_pretrained("emoji", adapter=name)
        for label, (glyphs_seen, look_seen) in SETS.items():
            generator = world.generator(42, glyphs_seen, look_seen)
            scenes = sample_scenes(glyphs, COUNT, generator, seen_glyphs=glyphs_seen, seen_look=look_seen)
            row, prompts, made = follow(pipe, judge, glyphs, scenes, generator)
            results[f"{name}: {label}"] = row
            sheet(prompts, made, docs / f"{name}-{label.split(',')[0].replace(' ', '-')}{'' if look_seen else '-and-looks'}.jpg")
            print(name, label, row, flush=True)
            if name == FRONT and glyphs_seen:
                sheet(prompts, made, docs / "prompts-and-results.jpg", pairs=15, columns=5)
        for scale in (0.5,):
            row, prompts, made = with_text(pipe, judge, glyphs, world, scale)
            results[f"{name}: text and image, scale {scale}"] = row
            sheet(prompts, made, docs / f"{name}-with-text.jpg")
            print(name, "text", row, flush=True)
    (docs / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_card({"parts": parts(), "measured": table(results)})
    print(table(results))


def parts() -> str:
    """A row per part that ships: class and number of parameters."""
    rows = []
    for path in sorted(SHIPPED.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            count = sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 - no dict
        config = path.parent / "config.json"
        facts = json.loads(config.read_text()) if config.exists() else {}
        bare = "LoRA" if path.parent.parent.name == "styles" else "IPAdapter"
        kind = facts.get("_class_name") or next(iter(facts.get("architectures", [bare])))
        name = path.stem if path.parent.name == "adapters" else path.parent.name
        rows.append(f"| {name} | {kind} | {count:,} |")
    return "\n".join(rows)


def write_card(sections: dict[str, str]) -> None:
    """Put each section between its marks in the model card."""
    card = SHIPPED / "README.md"
    text = card.read_text()
    for name, section in sections.items():
        text = re.sub(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, s=section: f"{m[1]}{s}\n{m[2]}", text, flags=re.DOTALL)
    card.write_text(text)


PERCENT = {
    "retrieval",
    "own glyph",
    "text's glyph",
    "image's glyph",
    "image's palette",
    "both right",
    "scene drawn again found",
    "glyph named",
}


def shown(measure: str, value: float) -> str:
    if value != value:  # not a number: the judge knows the seen glyphs only
        return "–"
    return f"{value:.1%}" if measure in PERCENT else f"{value:.2f}" if "likeness" in measure else f"{value:.1f}"


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as Markdown: a table for each set of measures, a row for each thing measured."""
    tables: dict[tuple[str, ...], list[str]] = {}
    for label, row in results.items():
        rows = tables.setdefault(tuple(row), [f"| | {' | '.join(row)} |", "|---" * (len(row) + 1) + "|"])
        rows.append(f"| {label} | {' | '.join(shown(measure, value) for measure, value in row.items())} |")
    return "\n\n".join("\n".join(rows) for rows in tables.values())
