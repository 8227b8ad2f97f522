"""What the shipped model can do, measured: `python -m worlds.emoji evaluate` prints the table that the model card holds.

The judge is an encoder of its own seed and size that never conditioned anything; colours and shapes are measured
against the scenes' own factors. Shape letters: N scenes, S pixels a side.
"""

import json
from dataclasses import replace

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from imprompt.sampling.generate import ImagePromptPipeline

from .assemble import ADAPTERS, SHIPPED, weights_in
from .glyphs import Glyphs
from .marks import fill, lines
from .measures import Namer, background_error, colour_error, embed, outlines, retrieval, to_tensor
from .scenes import Scenes, captions, moved, render, sample_scenes, shuffled, to_image
from .sheets import sheet
from .stage import HERE, World
from .vae import psnr, reconstruct

COUNT = 128
FRONT = "plus"  # the adapter whose results stand in the README
SETS = {  # label -> which glyphs and which palettes and patterns
    "seen glyphs, new compositions": (True, True),
    "unseen glyphs": (False, True),
    "unseen glyphs, palettes and pattern": (False, False),
}


def follow(
    pipe: ImagePromptPipeline, glyphs: Glyphs, scenes: Scenes, generator: torch.Generator
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Image prompt alone, scale 1: does the result follow its own prompt and not another's?"""
    side = pipe.pipeline.unet.config.sample_size * pipe.pipeline.vae_scale_factor
    prompts = render(scenes, glyphs, side)
    made = to_tensor(pipe([to_image(p) for p in prompts], seed=0, batch_size=32).images)
    other = shuffled(scenes)
    # The ceiling: another real picture of the same scene.
    shapes, prompt_shapes, ceiling = outlines(made), outlines(prompts), outlines(render(moved(scenes, generator), glyphs, side))
    own_glyph = Namer.load().glyph(made)[:, None].eq(scenes.glyph).any(1)
    row = {
        "retrieval": retrieval(embed(made), embed(prompts)),
        "background error, own": background_error(made, scenes).mean().item(),
        "background error, shuffled": background_error(made, other).mean().item(),
        "colour error, own": colour_error(made, scenes).mean().item(),
        "colour error, shuffled": colour_error(made, other).mean().item(),
        "outline likeness, own": (shapes * prompt_shapes).sum(1).mean().item(),
        "outline likeness, shuffled": (shapes * prompt_shapes.roll(1, 0)).sum(1).mean().item(),
        "outline likeness, ceiling": (ceiling * prompt_shapes).sum(1).mean().item(),
        "PSNR to the prompt": psnr(made, prompts).mean().item(),
    }
    row["own glyph"] = own_glyph.float().mean().item() if bool((scenes.glyph < glyphs.seen).all()) else float("nan")
    return row, prompts, made


def with_text(pipe: ImagePromptPipeline, glyphs: Glyphs, world: World, scale: float) -> tuple[dict[str, float], Tensor, Tensor]:
    """A text that names one glyph, an image prompt that shows another: is the text's glyph there, in the image's palette?"""
    generator = world.generator(43)
    scenes = sample_scenes(glyphs, COUNT, generator, pairs=0)
    named = (scenes.glyph[:, 0] + 1 + torch.randint(glyphs.seen - 1, (COUNT,), generator=generator)) % glyphs.seen
    texts = captions(replace(scenes, glyph=torch.stack([named, -torch.ones_like(named)], 1)), glyphs, generator)
    texts = [text.split(" on ")[0].split(" at ")[0].split(" in the ")[0] for text in texts]
    prompts = render(scenes, glyphs, world.side)
    made = to_tensor(pipe([to_image(p) for p in prompts], texts, scale=scale, seed=0, batch_size=32).images)
    error, other = background_error(made, scenes), background_error(made, shuffled(scenes))
    seen = Namer.load().glyph(made)
    glyph, palette = seen.eq(named), error < 0.25 * other.mean()
    return (
        {
            "text's glyph": glyph.float().mean().item(),
            "image's glyph": seen.eq(scenes.glyph[:, 0]).float().mean().item(),
            "image's palette": palette.float().mean().item(),
            "both right": (glyph & palette).float().mean().item(),
        },
        prompts,
        made,
    )


def check_judge(glyphs: Glyphs, world: World) -> dict[str, float]:
    """The ruler itself, on real scenes: can it find a scene drawn again, and name its glyph?"""
    generator = world.generator(44)
    scenes = sample_scenes(glyphs, COUNT, generator, pairs=0)
    pictures, redrawn = (render(drawn, glyphs, world.side) for drawn in (scenes, moved(scenes, generator)))
    return {
        "scene drawn again found": retrieval(embed(redrawn), embed(pictures)),
        "glyph named": Namer.load().glyph(pictures).eq(scenes.glyph[:, 0]).float().mean().item(),
    }


def evaluate(world: World) -> None:
    world = replace(world, device="cpu")  # small enough, and the same numbers everywhere
    glyphs, docs = world.glyphs(), HERE.parents[1] / "docs" / "emoji"
    docs.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, float]] = {"judge": check_judge(glyphs, world)}
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
            row, prompts, made = follow(pipe, glyphs, scenes, generator)
            results[f"{name}: {label}"] = row
            sheet(prompts, made, docs / f"{name}-{label.split(',')[0].replace(' ', '-')}{'' if look_seen else '-and-looks'}.jpg")
            print(name, label, row, flush=True)
            if name == FRONT and glyphs_seen:
                sheet(prompts, made, docs / "prompts-and-results.jpg", pairs=15, columns=5)
        for scale in (0.5,):
            row, prompts, made = with_text(pipe, glyphs, world, scale)
            results[f"{name}: text and image, scale {scale}"] = row
            sheet(prompts, made, docs / f"{name}-with-text.jpg")
            print(name, "text", row, flush=True)
    (docs / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    fill(SHIPPED / "README.md", {"parts": parts(), "measured": table(results)})
    print(table(results))


def parts() -> str:
    """A row per part that ships: class and number of parameters."""
    rows = []
    for path in sorted(SHIPPED.rglob("*.safetensors")):
        config = path.parent / "config.json"
        facts = json.loads(config.read_text()) if config.exists() else {}
        bare = "LoRA" if path.parent.parent.name == "styles" else "IPAdapter"
        kind = facts.get("_class_name") or next(iter(facts.get("architectures", [bare])))
        label = path.stem if path.parent.name == "adapters" else path.parent.name
        rows.append(f"| {label} | {kind} | {weights_in(path):,} |")
    return "\n".join(rows)


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
    tables: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for label, row in results.items():
        tables.setdefault(tuple(row), {})[label] = [shown(measure, value) for measure, value in row.items()]
    return "\n\n".join(lines(columns, rows) for columns, rows in tables.items())
