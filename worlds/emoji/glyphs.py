"""Glyphs: emoji of the Noto Color Emoji font, drawn once into an atlas, with their English names and splits."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import emoji

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian: fonts-noto-color-emoji (OFL)
FONT_SIZE = 109  # the one bitmap size that the font holds

# The `cpu` budget: simple, colourful glyphs whose silhouettes differ.
CPU_SEEN = (
    "🍎🍏🍊🍋🍌🍉🍇🍓🍒🍍🍅🍆🥕🌽🍄🥑🍔🍕🍩🍪🍦🧀🐸🐼🐷🐱🐶🦊🐵🐔🐧🐤🦋🐢🐟🐙🐞🦀🌳🌵🌻🌷🌹🍁🍀⭐🌙🔥🌈💧"
    "⚽🏀🎈🎁🔑🔔🚗🚌🚀⛵⏰👑💎🏆🏠😀😎👻👽💀🎃💙"
)
# Never seen by any model in training: not by the VAE, CLIP, the base model or the adapters.
CPU_UNSEEN = "🍑🍐🥝🍭🐯🐬🌲🎾🐰🌼🚕😡🤖🍬🐳📷"


@dataclass(frozen=True)
class Glyphs:
    """Names and pictures. `atlas` is (glyphs, 4, side, side) in [0, 1], premultiplied RGB and alpha."""

    names: tuple[str, ...]
    atlas: torch.Tensor
    seen: int  # the first `seen` glyphs are for training, the rest are held out

    def ids(self, *, seen: bool) -> range:
        return range(self.seen) if seen else range(self.seen, len(self.names))


def english_name(char: str) -> str:
    """The Unicode short name, spaced and lower-cased: 🍎 -> "red apple"."""
    return emoji.demojize(char, language="en").strip(":").replace("_", " ").replace("-", " ").replace("’", "").lower()


def every_glyph() -> tuple[list[str], list[str]]:
    """All one-character emoji but flags, keycaps and skin tones; every tenth by name is held out."""
    chars = {
        english_name(char): char
        for char, data in emoji.EMOJI_DATA.items()
        if data["status"] == emoji.STATUS["fully_qualified"] and len(char) == 1
    }
    ordered = [chars[name] for name in sorted(chars)]
    return [c for i, c in enumerate(ordered) if i % 10], [c for i, c in enumerate(ordered) if not i % 10]


def draw(char: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One glyph, cropped to its ink and centred on a square of the font's height."""
    canvas = Image.new("RGBA", (180, 180))
    ImageDraw.Draw(canvas).text((20, 20), char, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font draws nothing for {char!r}")
    ink = canvas.crop(box)
    side = max(ink.size)
    square = Image.new("RGBA", (side, side))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square


def load_glyphs(which: str, side: int) -> Glyphs:
    """Draw the glyph set `cpu` or `all` at `side` pixels."""
    seen, unseen = (list(CPU_SEEN), list(CPU_UNSEEN)) if which == "cpu" else every_glyph()
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    pictures = []
    for char in seen + unseen:
        rgba = np.asarray(draw(char, font).resize((side, side), Image.Resampling.LANCZOS), np.float32) / 255
        rgba[..., :3] *= rgba[..., 3:]
        pictures.append(torch.from_numpy(rgba).permute(2, 0, 1))
    return Glyphs(tuple(map(english_name, seen + unseen)), torch.stack(pictures), len(seen))
