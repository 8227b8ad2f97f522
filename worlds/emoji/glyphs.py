"""Glyphs: emoji drawn once into an atlas, in one of several drawing styles, with names and splits.

The drawings are SVGs of npm packages (`package.json`), installed with `npm install --prefix
worlds/emoji`.
"""

import io
import json
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor

HERE = Path(__file__).parent
PACKS = HERE / "node_modules" / "@iconify-json"


class DrawingStyle(NamedTuple):
    """The source of a drawing style."""

    package: str  # npm package under @iconify-json
    backed: bool = False  # whether it is lines alone, which need paper behind them


STYLES = {
    "noto": DrawingStyle("noto"),  # Apache-2.0
    "blobs": DrawingStyle("noto-v1"),  # Apache-2.0
    "twemoji": DrawingStyle("twemoji"),  # CC-BY-4.0
    "flat": DrawingStyle("fluent-emoji-flat"),  # MIT
    "lines": DrawingStyle("fluent-emoji-high-contrast", backed=True),  # MIT
}
OWN = "noto"  # what the base draws
ENCODED = ("noto", "blobs", "twemoji", "flat")  # what image encoders see
CUSTOM = ("flat", "lines")  # what the base is fine-tuned to; no adapter is trained on them
PAPER = 0.04  # how far paper extends beyond lines, as a share of the picture's side


@dataclass(frozen=True)
class Glyphs:
    """Names and pictures of glyphs.

    `atlas` is (glyphs, 4, side, side) in [0, 1], premultiplied RGB and alpha. The first `core`
    glyphs are drawn more often in training, the first `seen` are for training, the rest are held
    out.
    """

    names: tuple[str, ...]
    atlas: Tensor
    seen: int
    core: int = 0

    def ids(self, *, seen: bool) -> range:
        """Return the indices of the glyphs for training, or of the held-out ones."""
        return range(self.seen) if seen else range(self.seen, len(self.names))


@cache
def lists() -> dict[str, list[str]]:
    """Read the names in `glyphs.toml`: core, more, held_out."""
    return {
        key: text.split() for key, text in tomllib.loads((HERE / "glyphs.toml").read_text()).items()
    }


def english_name(slug: str) -> str:
    """Return a slug's words, separated by spaces."""
    return slug.replace("-", " ")


@cache
def pack(package: str) -> dict[str, Any]:
    """Read the drawings of a package.

    Ends the process with an error if the package is not installed.
    """
    path = PACKS / package / "icons.json"
    if not path.exists():
        raise SystemExit(f"no drawings at {path}; run: npm install --prefix worlds/emoji")
    return json.loads(path.read_text())


def svg(style: str, slug: str, side: int) -> str | None:
    """Return one drawing as SVG, or None if the style does not have the glyph."""
    drawings = pack(STYLES[style].package)
    icon = drawings["icons"].get(drawings.get("aliases", {}).get(slug, {}).get("parent", slug))
    if icon is None:
        return None
    box = (
        icon.get("left", 0),
        icon.get("top", 0),
        *(icon.get(key, drawings.get(key, 16)) for key in ("width", "height")),
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(map(str, box))}" width="{side}" height="{side}">{icon["body"]}</svg>'
    )


def draw(style: str, slug: str, side: int) -> Image.Image | None:
    """Draw one glyph (side × side, RGBA), cropped to its visible part and centred on a square.

    None if the style does not have it.
    """
    import resvg_py

    picture = svg(style, slug, 2 * side)
    if picture is None:
        return None
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=picture)))).convert("RGBA")
    if STYLES[style].backed:
        drawn = backed(drawn)
    box = drawn.getbbox()
    if box is None:
        return None
    ink = drawn.crop(box)
    longest = max(ink.size)
    square = Image.new("RGBA", (longest, longest))
    square.paste(ink, ((longest - ink.width) // 2, (longest - ink.height) // 2))
    return square.resize((side, side), Image.Resampling.LANCZOS)


def backed(picture: Image.Image) -> Image.Image:
    """Put white paper behind lines (RGBA): on all that they enclose, and on a rim around them."""
    rim = 2 * round(PAPER * picture.width) + 1
    canvas = ImageOps.expand(picture, rim)
    inked = (
        canvas.getchannel("A")
        .filter(ImageFilter.MaxFilter(rim))
        .point(lambda alpha: 255 * (alpha > 64))
    )
    ImageDraw.floodfill(inked, (0, 0), 128)  # what lies outside
    paper = inked.point(lambda value: 255 * (value != 128)).filter(ImageFilter.GaussianBlur(1))
    sheet = Image.new("RGBA", canvas.size, "white")
    sheet.putalpha(paper)
    return Image.alpha_composite(sheet, canvas)


def premultiplied(picture: Image.Image) -> Tensor:
    """Convert an RGBA picture to premultiplied values (4, S, S) in [0, 1]."""
    rgba = np.asarray(picture, np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return torch.from_numpy(rgba).permute(2, 0, 1)


def load_glyphs(style: str, side: int) -> Glyphs:
    """Draw all glyphs of one style at `side` pixels.

    A glyph that the style does not have is drawn in the world's own style. Ends the process with an
    error if that does not have it either.
    """
    groups = lists()
    slugs = groups["core"] + groups["more"] + groups["held_out"]
    pictures = [draw(style, slug, side) or draw(OWN, slug, side) for slug in slugs]
    lost = [slug for slug, picture in zip(slugs, pictures, strict=True) if picture is None]
    if lost:
        raise SystemExit(f"{OWN} does not draw {', '.join(lost)}: take them out of glyphs.toml")
    atlas = torch.stack([premultiplied(picture) for picture in pictures if picture is not None])
    core = len(groups["core"])
    return Glyphs(
        tuple(map(english_name, slugs)), atlas, seen=core + len(groups["more"]), core=core
    )
