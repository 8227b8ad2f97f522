"""Stages between the trainings: assemble the model, write the training set, ship the adapters."""

import json
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from imprompt.checkpoints.adapters import read_adapter, write_adapter
from imprompt.models import PACKAGED
from imprompt.training.loop import train
from imprompt.training.recipe import RECIPES, read_recipe

from .edges import edges
from .scenes import captions, figures, portrait, render, sample_scenes, to_image
from .train_utils import World

SHIPPED = PACKAGED / "emoji"
ADAPTERS = ("base", "plus")
TRANSFORMERS = ("dit", "mmdit")  # stages, with an adapter each
OWN_RECIPES = Path(__file__).parent / "recipes"  # of what the package does not contain
DEMO = {
    "demo.png": ("fox", "mint"),
    "demo-other.png": ("rocket", "yellow"),
    "demo-edges.png": ("butterfly", "white"),
}
# share of the scenes with core glyphs: adapters learn shapes from all glyphs
CORE = 0.3
LIMIT = 55e6  # bytes: the wheel has room for 60 MB


def assemble(world: World) -> None:
    """Save the base model and the image encoder as float16, in diffusers' folder layout.

    The adapters are trained on this model, and it ships with the package.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(world.folder / "base", dtype=torch.float16)
    encoder = CLIPVisionModelWithProjection.from_pretrained(
        world.folder / "clip" / "image_encoder", dtype=torch.float16
    )
    processor = CLIPImageProcessorPil.from_pretrained(world.folder / "clip" / "feature_extractor")
    # the decoder may have been trained further since the base was saved
    vae = AutoencoderKL.from_pretrained(world.folder / "vae", dtype=torch.float16)
    pipeline.register_modules(vae=vae, image_encoder=encoder, feature_extractor=processor)
    for part in (
        "vae",
        "unet",
        "text_encoder",
        "tokenizer",
        "scheduler",
        "image_encoder",
        "feature_extractor",
    ):
        shutil.rmtree(SHIPPED / part, ignore_errors=True)
    pipeline.save_pretrained(SHIPPED)
    for path in SHIPPED.rglob("*.json"):
        tidy(path)
    draw_demo(replace(world, device="cpu"))
    report(SHIPPED)


def draw_demo(world: World) -> None:
    """Draw the pictures of `imprompt demo`: two image prompts, and the edges of a third scene."""
    glyphs = world.glyphs()
    for name, (glyph, colour) in DEMO.items():
        picture = render(portrait(glyphs, glyph, colour), glyphs, world.side)
        shown = edges(picture) if "edges" in name else picture
        to_image(shown[0]).save(SHIPPED / name, optimize=True)


def tidy(path: Path) -> None:
    """Remove the paths of this machine from a model's config.json.

    Also sets its dtype to float32, which plain `from_pretrained` gives, though the weights are
    stored as float16.
    """
    facts = json.loads(path.read_text())
    facts.pop("_name_or_path", None)
    if "dtype" in facts:
        facts["dtype"] = "float32"
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def report(folder: Path) -> None:
    """Print the sizes of the shipped files.

    Ends the process with an error if their sum is over the limit.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    for path in sorted(files, key=lambda p: -p.stat().st_size)[:8]:
        print(f"{path.stat().st_size / 1e6:7.2f} MB  {path.relative_to(folder)}")
    print(f"{total / 1e6:7.2f} MB  in all")
    if total > LIMIT:
        raise SystemExit(f"over the limit of {LIMIT / 1e6:.0f} MB in all")


def weights_in(path: Path) -> int:
    """Count the numbers in a file of weights."""
    with safe_open(path, "pt") as file:
        names = file.keys()
        return sum(prod(file.get_slice(name).get_shape()) for name in names)


def scenes(world: World) -> None:
    """Write the adapters' training set into the world's folder."""
    write_scenes(world, world.folder / "scenes", world["prompts"], 31)


def write_scenes(world: World, folder: Path, count: int, salt: int) -> None:
    """Write pictures, masks of their figures and metadata.jsonl, as in a user's own folder."""
    glyphs = replace(world, device="cpu").glyphs()
    folder.mkdir(exist_ok=True)
    lines = []
    for start in range(0, count, 1000):
        generator = world.generator(salt, start)
        chunk = sample_scenes(glyphs, min(1000, count - start), generator, core=CORE)
        drawn = (
            torch.cat([draw(part, glyphs, world.side) for part in chunk.split(50)])
            for draw in (render, figures)
        )
        pictures, masks = (
            (part * 255).round().byte().permute(0, 2, 3, 1).numpy() for part in drawn
        )
        texts = captions(chunk, glyphs, generator)
        for number, (picture, mask, text) in enumerate(
            zip(pictures, masks, texts, strict=True), start
        ):
            name, mask_name = f"{number:06d}.png", f"{number:06d}-figure.png"
            Image.fromarray(picture).save(folder / name, compress_level=1)
            Image.fromarray(mask[..., 0]).save(folder / mask_name, compress_level=1)
            lines.append(json.dumps({"file_name": name, "text": text, "mask": mask_name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    print(f"scenes: {len(lines)} pictures in {folder}")


def adapters(world: World) -> None:
    """Train the adapters by their recipes, in this world's folder."""
    for name in ADAPTERS:
        train(read_recipe(RECIPES / f"emoji-{name}.toml", recipe_changes(world, name)))


def transformer_adapters(world: World) -> None:
    """Train an adapter of each transformer by its recipe, in this world's folder."""
    for name in TRANSFORMERS:
        model = f'model="{world.folder}/{name}"'
        train(read_recipe(OWN_RECIPES / f"{name}.toml", [model, *recipe_changes(world, name)]))


def recipe_changes(world: World, name: str) -> list[str]:
    """Return the changes to a recipe: this world's folders, and its limit of steps if any.

    A base that was trained for a few steps only knows no more than a constant.
    """
    limited = [f"optimization.steps={world.most}", "data.held_out=16", "check_base=false"]
    steps = [] if world.most is None else limited
    return [
        *steps,
        f'output="{world.folder}/adapter-{name}"',
        f'data.source="{world.folder}/scenes"',
        f'data.features="{world.folder}/features-{name}"',
    ]


def ship(world: World) -> None:
    """Copy the trained adapters into the package, as float16."""
    for name in ADAPTERS:
        file = read_adapter(world.folder / f"adapter-{name}" / "latest")
        projection = {key: value.half() for key, value in file.projection.items()}
        half = replace(file, projection=projection, kv=[(k.half(), v.half()) for k, v in file.kv])
        (SHIPPED / "adapters").mkdir(exist_ok=True)
        write_adapter(SHIPPED / "adapters" / f"{name}.safetensors", half)
    report(SHIPPED)
