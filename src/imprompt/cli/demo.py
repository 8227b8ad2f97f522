"""Define `imprompt demo`: one sheet of what the packaged model does with image prompts."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL import Image

SEED, RESULTS = 7, 4
TEXT = "an octopus"
ENLARGED = 2  # times

LABELS = {  # what a row shows -> its input pictures
    "the image prompt alone": ("demo.png",),
    f'with the text "{TEXT}", scale 0.5': ("demo.png",),
    "two image prompts, each in its half": ("demo.png", "demo-other.png"),
    "on these outlines, by a ControlNet, scale 0.4": ("demo.png", "demo-edges.png"),
}


def demo(out: Annotated[Path, typer.Option(help="Folder for the sheet.")] = Path("out")) -> None:
    """Make a sheet with the packaged model: image prompts alone, with text, regions, outlines."""
    from imprompt.cli.console import loading, quiet
    from imprompt.files import check_folder
    from imprompt.generation.pipeline import ImagePromptPipeline
    from imprompt.generation.request import save_new
    from imprompt.images import open_image
    from imprompt.models import PACKAGED

    start = time.monotonic()
    check_folder(out)
    print("Loading the packaged model ...", flush=True)
    with loading():
        quiet()
        pipeline = ImagePromptPipeline.from_pretrained("emoji", adapter="plus", controlnet="edges")
    pictures = {
        name: open_image(PACKAGED / "emoji" / name) for names in LABELS.values() for name in names
    }
    results = []
    for label, call in zip(LABELS, calls(pictures), strict=True):
        print(f"Making {RESULTS} pictures: {label} ...", flush=True)
        results.append(pipeline(**call, num_images=RESULTS, seed=SEED).images)
    rows = [
        ([pictures[name] for name in names], made)
        for names, made in zip(LABELS.values(), results, strict=True)
    ]
    out.mkdir(parents=True, exist_ok=True)
    path = save_new(demo_sheet(rows), out / "demo.png")
    print(
        f"{path}: {RESULTS * len(rows)} pictures in {time.monotonic() - start:.1f} s, model load "
        "included."
    )
    print("More: imprompt generate --help")


def calls(pictures: "dict[str, Image.Image]") -> list[dict[str, Any]]:
    """Return the arguments of the pipeline's calls, row by row."""
    from PIL import Image

    from imprompt.generation.references import Reference

    prompt, other, edges = (
        pictures[name] for name in ("demo.png", "demo-other.png", "demo-edges.png")
    )
    left, right = Image.new("L", prompt.size), Image.new("L", prompt.size, 255)
    box = (0, 0, prompt.width // 2, prompt.height)
    left.paste(255, box)
    right.paste(0, box)
    halves = [Reference(images=prompt, mask=left), Reference(images=other, mask=right)]
    return [
        {"image": prompt},
        {"image": prompt, "prompt": TEXT, "scale": 0.5},
        {"image": halves, "together": True},
        {"image": prompt, "control_image": edges, "scale": 0.4},
    ]


def demo_sheet(rows: "list[tuple[list[Image.Image], list[Image.Image]]]") -> "Image.Image":
    """Draw rows of inputs and results, enlarged, each under a line that states what it shows."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(20)
    side, gap, line = rows[0][1][0].width * ENLARGED, 8, 32
    columns = max(len(given) for given, _ in rows)
    pitch = side + gap
    page = Image.new(
        "RGB", ((columns + RESULTS) * pitch + gap, len(rows) * (pitch + line)), "white"
    )
    pen = ImageDraw.Draw(page)
    for row, (label, (given, made)) in enumerate(zip(LABELS, rows, strict=True)):
        top = row * (pitch + line)
        pen.text((gap, top + 5), label, "black", font)
        for column, picture in [*enumerate(given), *enumerate(made, columns)]:
            place = (gap * (1 + (column >= columns)) + column * pitch, top + line)
            page.paste(picture.resize((side, side), Image.Resampling.LANCZOS), place)
    return page
