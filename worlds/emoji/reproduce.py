"""Are the shipped adapters what their recipes make? After the stage `adapters`: a table for docs/training.md."""

import tempfile

from imprompt.sampling.generate import ImagePromptPipeline
from imprompt.training.loop import Run
from imprompt.training.recipe import read_recipe
from imprompt.training.watch import Watcher

from .assemble import ADAPTERS, RECIPES, places
from .evaluate import COUNT, SETS, follow
from .marks import fill
from .scenes import sample_scenes
from .stage import HERE, World

GUIDE = HERE.parents[1] / "docs" / "training.md"
MEASURES = ("retrieval", "colour error, own", "outline likeness, own")


def reproduce(world: World) -> None:
    rows = ["| adapter | held-out loss | retrieval among 128 | colour error | outline likeness |", "|---|---|---|---|---|"]
    glyphs = world.glyphs()
    for name in ADAPTERS:
        for label, adapter in (("shipped", name), ("by its recipe", str(world.folder / f"adapter-{name}" / "latest"))):
            scenes = sample_scenes(glyphs, COUNT, world.generator(42, *SETS["seen glyphs, new compositions"]))
            pipe = ImagePromptPipeline.from_pretrained("emoji", adapter=adapter, device="cpu")
            row, _, _ = follow(pipe, glyphs, scenes, world.generator(45))
            retrieval, colour, outline = (row[measure] for measure in MEASURES)
            loss = held_out_loss(world, name, adapter)
            rows.append(f"| {name}, {label} | {loss:.4f} | {retrieval:.1%} | {colour:.1f} | {outline:.2f} |")
            print(rows[-1], flush=True)
    fill(GUIDE, {"reproduced": "\n".join(rows)})


def held_out_loss(world: World, name: str, adapter: str) -> float:
    """Of an adapter, on the samples that its recipe holds out."""
    with tempfile.TemporaryDirectory() as folder:
        changes = [
            *places(world, name),
            f'start="{adapter}"',
            f'output="{folder}"',
            "validation={}",
            'optimization.precision="fp32"',
        ]
        run = Run(read_recipe(RECIPES / f"emoji-{name}.toml", changes), Watcher())
        return run.held_out_loss()
