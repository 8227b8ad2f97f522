"""Sheets for a person who does not know the prompts, to name glyphs and drawing styles.

`python -m studies.emoji blind` writes two numbered sheets and, separately, their keys. The person
writes the answers, one a line, into glyphs.txt and styles.txt in the same folder. Running the stage
again compares them with the keys.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from worlds.emoji.glyphs import CUSTOM, Glyphs
from worlds.emoji.scenes import article, render, sample_scenes, to_image
from worlds.emoji.style import STYLES_FOLDER
from worlds.emoji.train_utils import World

from .sampler import Condition, Sampler

RESULTS, DRAWN = 48, 20  # results of image prompts; pictures of each style
COLUMNS, CELL, LABEL = 8, 128, 18


def numbered(pictures: Tensor, path: Path) -> None:
    """Draw a sheet of pictures (N, 3, S, S) with only their numbers, from 1."""
    rows = -(-len(pictures) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (CELL + 6), rows * (CELL + LABEL)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for index, picture in enumerate(pictures):
        x, y = index % COLUMNS * (CELL + 6), index // COLUMNS * (CELL + LABEL)
        pen.text((x + 2, y), str(index + 1), "black", font)
        page.paste(to_image(picture).resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y + LABEL))
    page.save(path)


def prompted(world: World, glyphs: Glyphs) -> tuple[Tensor, list[str]]:
    """Sample results of image prompts of core glyphs, without text, with the glyphs' names."""
    scenes = sample_scenes(glyphs, RESULTS, world.generator(54), pairs=0, core=1.0)
    made = Sampler().sample(RESULTS, Condition(render(scenes, glyphs, world.side)))
    return made, [glyphs.names[g] for g in scenes.glyph[:, 0].tolist()]


def in_styles(world: World, glyphs: Glyphs) -> tuple[Tensor, list[str]]:
    """Sample pictures by text alone in each of the other styles, mixed, with the styles' names."""
    made, names = [], []
    for number, style in enumerate(CUSTOM):
        chosen = torch.randperm(glyphs.core, generator=world.generator(55, number))[:DRAWN].tolist()
        made.append(
            Sampler(STYLES_FOLDER / style).sample(
                DRAWN, texts=[article(glyphs.names[g]) for g in chosen], seed=100 * number
            )
        )
        names += [style] * DRAWN
    order = torch.randperm(len(names), generator=world.generator(56))
    return torch.cat(made)[order], [names[i] for i in order.tolist()]


def blind(world: World) -> None:
    """Write the sheets and keys, and print the key next to the answers that are there."""
    world = replace(world, device="cpu")
    glyphs, folder = world.glyphs(), world.folder / "blind"
    folder.mkdir(exist_ok=True)
    for name, show in {"glyphs": prompted, "styles": in_styles}.items():
        key = folder / f"{name}-key.json"
        if not key.exists():
            pictures, truth = show(world, glyphs)
            numbered(pictures, folder / f"{name}.png")
            key.write_text(json.dumps(truth))
        answers_file = folder / f"{name}.txt"
        if not answers_file.exists():
            print(
                f"look at {folder / f'{name}.png'}, write what you see into {answers_file}, "
                "a line a picture, and run this again"
            )
            continue
        truth, answers = json.loads(key.read_text()), answers_file.read_text().splitlines()
        for number, (true, answer) in enumerate(zip(truth, answers, strict=True), 1):
            print(f"{number:3d}  {true:32s} {answer}")
