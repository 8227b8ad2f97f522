"""Train a faceid adapter on this world, which has no faces, and measure whether it learns.

The glyph classifier's embedding, 192 numbers, stands for a face encoder's 512: it tells which glyph
a picture shows, as a face encoder tells who is in it. The set is the adapters' own. Writes a table
for docs/faces.md.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from imprompt.encoders.embedding_files import Embedding, save_embedding
from imprompt.encoders.face import Face
from imprompt.files import sha256
from imprompt.generation.pipeline import ImagePromptPipeline
from imprompt.training.loop import train
from imprompt.training.recipe import Recipe, read_recipe
from worlds.emoji.scenes import article, render, sample_scenes, shuffled, to_image
from worlds.emoji.train_utils import World

from .evaluate import count_of, means, shown
from .markdown_tables import fill_sections, markdown_table
from .measures import Classifier, colour_error, embed_pictures, embed_texts, to_tensor
from .paths import DOCS, REPORTS, STUDIES
from .sheets import draw_sheet

GUIDE = DOCS / "faces.md"
SHEET = REPORTS / "training" / "identities.jpg"
ENCODER = "glyph-classifier"
SCENES = 12_000  # of the adapters' training set
SHOWN = 6  # rows of the sheet
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Identities:
    """Face encoder of this world: a picture's glyph, embedded by the glyph classifier."""

    classifier: Classifier

    def encode_face(self, image: Image.Image, face: object = None) -> Face:  # noqa: ARG002
        """Embed a picture; the picture itself stands for the crop."""
        return Face(self.classifier.embed(to_tensor([image]))[0], crop=image, square=image)


def folder_of(world: World) -> Path:
    """Return the folder of the embeddings, features and states."""
    return world.folder / "identities"


def write_set(world: World) -> None:
    """List the first scenes of the adapters' set, and write the embeddings of their pictures."""
    folder, scenes = folder_of(world), world.folder / "scenes"
    faces, listing = folder / "identities.safetensors", folder / "scenes.json"
    if faces.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    count = SCENES if world.most is None else 16 * world.most
    lines = (scenes / "metadata.jsonl").read_text().splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    named = [{"image_file": row.pop("file_name"), **row} for row in rows]
    listing.write_text(json.dumps(named))
    files = [scenes / row["image_file"] for row in named]
    embeddings = torch.cat(list(embedded(files)))
    pictures = {sha256(file): row for row, file in enumerate(files)}  # equal ones once
    held = embeddings[list(pictures.values())]
    save_embedding(faces, Embedding(held, "face", ENCODER, "", tuple(pictures)))


def embedded(files: Sequence[Path], size: int = 256) -> Iterator[Tensor]:
    """Yield the embeddings (N, E) of pictures, of unit length, in parts."""
    for start in range(0, len(files), size):
        images = [Image.open(file).convert("RGB") for file in files[start : start + size]]
        yield torch.nn.functional.normalize(Classifier.load().embed(to_tensor(images)), dim=1)


def recipe_of(world: World) -> Recipe:
    """Return the recipe with this world's folders, and its limit of steps if any."""
    folder = folder_of(world)
    steps = [] if world.most is None else [f"optimization.steps={world.most}", "data.held_out=16"]
    return read_recipe(
        STUDIES / "identities.toml",
        [
            *steps,
            f'output="{folder}/adapter"',
            f'faces="{folder}/identities.safetensors"',
            f'data.source="{folder}/scenes.json"',
            f'data.root="{world.folder}/scenes"',
            f'data.features="{folder}/features"',
        ],
    )


def measure(world: World) -> None:
    """Train the adapter, or resume its training; measure it on new scenes and write the table."""
    write_set(world)
    latest = train(recipe_of(world))
    world = replace(world, device="cpu")
    glyphs, generator, count = world.glyphs(), world.generator(61), count_of(world)
    scenes = sample_scenes(glyphs, count, generator, pairs=0, core=1.0)
    prompts, other = render(scenes, glyphs, world.side), shuffled(scenes)
    pipe = ImagePromptPipeline.from_pretrained(
        "emoji", adapter=str(latest), device="cpu", faces=Identities(Classifier.load())
    )
    pictures = [to_image(prompt) for prompt in prompts]
    made = {
        scale: to_tensor(pipe(pictures, scale=scale, seed=0, batch_size=32).images)
        for scale in (1.0, 0.0)
    }
    names = embed_texts([article(name) for name in glyphs.names[: glyphs.core]])

    def values(results: Tensor, of: Tensor, colours: Tensor) -> Values:
        likest = (embed_pictures(results) @ names.T).argmax(1)
        return {
            "own glyph": Classifier.load().classify(results).eq(of).float(),
            "own glyph, metric encoder": likest.eq(of).float(),
            "colour error": colours,
        }

    own, shuffled_ = scenes.glyph[:, 0], other.glyph[:, 0]
    rows = {
        "scale 1, own identity": values(made[1.0], own, colour_error(made[1.0], scenes)),
        "scale 1, another's identity": values(made[1.0], shuffled_, colour_error(made[1.0], other)),
        "scale 0": values(made[0.0], own, colour_error(made[0.0], scenes)),
        "the prompts themselves": values(prompts, own, colour_error(prompts, scenes)),
    }
    cells = {
        label: [shown(name, value) for name, value in means(row).items()]
        for label, row in rows.items()
    }
    table = markdown_table(list(rows["scale 0"]), cells)
    print(table)
    draw_sheet(
        SHEET,
        ["identity", "scale 1", "scale 0"],
        [("", [prompts[i], made[1.0][i], made[0.0][i]]) for i in range(min(SHOWN, count))],
    )
    fill_sections(GUIDE, {"identities": table})
