"""Scenes: one or two glyphs on a background, drawn in torch from their factors, with captions.

Captions state only some of the factors. Shape letters: N scenes, G glyph slots (2), S pixels a
side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .glyphs import Glyphs

PALETTE = {
    "red": (0.85, 0.15, 0.15),
    "orange": (0.95, 0.55, 0.15),
    "yellow": (0.97, 0.87, 0.30),
    "green": (0.25, 0.65, 0.30),
    "mint": (0.65, 0.92, 0.75),
    "blue": (0.20, 0.40, 0.85),
    "sky blue": (0.60, 0.82, 0.97),
    "navy": (0.10, 0.15, 0.40),
    "purple": (0.50, 0.25, 0.65),
    "brown": (0.48, 0.32, 0.20),
    "beige": (0.93, 0.87, 0.75),
    "white": (0.97, 0.97, 0.97),
    "gray": (0.55, 0.55, 0.57),
    "black": (0.08, 0.08, 0.09),
    "pink": (0.97, 0.62, 0.75),
    "teal": (0.08, 0.55, 0.55),  # held out
}
UNSEEN_COLOURS = 2
PATTERNS = ("solid", "gradient", "stripes", "checks", "dots", "rings")
UNSEEN_PATTERNS = 1
PATTERN_ODDS = (0.52, 0.26, 0.08, 0.07, 0.07)
CORE = 0.5  # share of the glyphs that come from the core, where there is one
# share of the one-glyph scenes in which the glyph is large and in the middle; its size there
PORTRAITS, PORTRAIT = (0.8, 0.8125)
SMALL = 0.5  # size of a glyph elsewhere, and of each of two glyphs
# centres along x and y: whole latent pixels apart, so that the shapes in latents repeat
PLACES = (-0.5, 0.0, 0.5)
COLOUR_NAMES = tuple(PALETTE)


@dataclass
class Scenes:
    """The factors of N scenes, which determine each picture completely."""

    glyph: Tensor  # (N, G) index, -1 for an empty slot
    centre: Tensor  # (N, G, 2) x, y in [-1, 1]
    size: Tensor  # (N, G) share of the picture's side
    hue: Tensor  # (N, G) radians, 0 for the glyph's own colours
    pattern: Tensor  # (N,) index into PATTERNS
    colour: Tensor  # (N, 2) index into PALETTE
    shade: Tensor  # (N, 2, 3) the exact colours, RGB
    wave: Tensor  # (N, 3) direction, count and phase of the pattern

    def __len__(self) -> int:
        return len(self.pattern)

    def __getitem__(self, index) -> "Scenes":
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def split(self, size: int) -> list["Scenes"]:
        """Split into parts of at most `size` scenes."""
        return [self[rows] for rows in torch.arange(len(self)).split(size)]

    @classmethod
    def cat(cls, parts: Sequence["Scenes"]) -> "Scenes":
        """Concatenate parts."""
        return cls(
            **{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)}
        )

    def to(self, device: torch.device) -> "Scenes":
        """Move all factors to a device."""
        return Scenes(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def sample_scenes(
    glyphs: Glyphs,
    count: int,
    generator: torch.Generator,
    *,
    seen_glyphs: bool = True,
    seen_look: bool = True,
    pairs: float = 0.1,
    core: float = CORE,
) -> Scenes:
    """Draw `count` random scenes.

    seen_glyphs  whether glyphs are the training ones or the held-out ones
    seen_look    whether palette and pattern are the training ones or the held-out ones
    pairs        share of the scenes that have two glyphs
    core         share of the seen glyphs that come from the core; 1 for these alone
    """

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    def index(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    ids = glyphs.ids(seen=seen_glyphs)
    glyph = index(ids.start, ids.stop, count, 2)
    if seen_glyphs and glyphs.core:
        glyph = torch.where(
            uniform(count, 2) < core,
            index(0, glyphs.core, count, 2),
            index(glyphs.core, glyphs.seen, count, 2),
        )
    pair = uniform(count) < pairs
    portrait = ~pair & (uniform(count) < PORTRAITS)
    size = torch.where(portrait, PORTRAIT, SMALL)[:, None].expand(-1, 2)
    centre = torch.tensor(PLACES)[index(0, len(PLACES), count, 2, 2)]
    centre = torch.where(portrait[:, None, None], torch.zeros(()), centre)
    side = torch.where(uniform(count) < 0.5, -1.0, 1.0)
    # Pairs are apart along one axis: side by side, or one above the other.
    axis = index(0, 2, count)
    apart = torch.stack([side, -side], 1) / 2
    rows = torch.arange(count)
    paired = centre.clone()
    paired[rows, :, axis] = apart
    centre = torch.where(pair[:, None, None], paired, centre)
    glyph[:, 1] = torch.where(pair, glyph[:, 1], -1)

    seen_colours = len(PALETTE) - UNSEEN_COLOURS
    colours = (0, seen_colours) if seen_look else (seen_colours, len(PALETTE))
    first = index(*colours, count)
    second = (
        (first + index(1, seen_colours, count)) % seen_colours
        if seen_look
        else index(0, seen_colours, count)
    )
    colour = torch.stack([first, second], 1)
    centres = torch.tensor(list(PALETTE.values()))
    shade = (centres[colour] + torch.randn(count, 2, 3, generator=generator) * 0.03).clamp(0, 1)
    odds = torch.tensor(PATTERN_ODDS)
    pattern = torch.multinomial(odds, count, replacement=True, generator=generator)
    if not seen_look:
        pattern = torch.full((count,), len(PATTERNS) - UNSEEN_PATTERNS)
    wave = torch.stack(
        [uniform(count, high=torch.pi), index(2, 4, count).float(), index(0, 4, count) / 4], 1
    )
    # Stripes are horizontal or vertical; gradients have any direction.
    upright = torch.where(uniform(count) < 0.5, 0.0, torch.pi / 2)
    wave[:, 0] = torch.where(pattern == PATTERNS.index("gradient"), wave[:, 0], upright)
    return Scenes(
        glyph=glyph,
        centre=centre,
        size=size,
        hue=torch.where(
            uniform(count, 2) < 0.1, uniform(count, 2, low=0.8, high=5.4), torch.zeros(count, 2)
        ),
        pattern=pattern,
        colour=colour,
        shade=shade,
        wave=wave,
    )


def portrait(glyphs: Glyphs, name: str, colour: str) -> Scenes:
    """Return one scene: the named glyph, large and in the middle, on one colour."""
    number = COLOUR_NAMES.index(colour)
    return Scenes(
        glyph=torch.tensor([[glyphs.names.index(name), -1]]),
        centre=torch.zeros(1, 2, 2),
        size=torch.full((1, 2), PORTRAIT),
        hue=torch.zeros(1, 2),
        pattern=torch.tensor([PATTERNS.index("solid")]),
        colour=torch.tensor([[number, number]]),
        shade=torch.tensor([[PALETTE[colour]] * 2]),
        wave=torch.tensor([[0.0, 2.0, 0.0]]),
    )


def background(scenes: Scenes, side: int) -> Tensor:
    """Draw backgrounds (N, 3, S, S): two colours mixed by the pattern."""
    line = (torch.arange(side, device=scenes.shade.device) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    direction, count, phase = (c[:, None, None] for c in scenes.wave.unbind(1))
    along = x * direction.cos() + y * direction.sin()  # (N, S, S)
    sharp = side / (2 * torch.pi * count)  # one pixel of soft edge

    def step(wave: Tensor) -> Tensor:
        return (wave * sharp + 0.5).clamp(0, 1)

    turns = torch.pi * count
    grid_x, grid_y = torch.sin(turns * x + 6.28 * phase), torch.sin(turns * y + 6.28 * phase)
    mixes = {
        "solid": torch.zeros_like(along),
        "gradient": (along / 1.4 + 1) / 2,
        "stripes": step(torch.sin(turns * along + 6.28 * phase)),
        "checks": step(grid_x * grid_y * 1.5),
        "dots": step((grid_x + grid_y) / 2 - 0.5),
        "rings": step(torch.sin(turns * (x**2 + y**2).sqrt() * 1.5 + 6.28 * phase)),
    }
    rows = torch.arange(len(scenes), device=line.device)
    mix = torch.stack([mixes[name] for name in PATTERNS], 1)[rows, scenes.pattern]
    first, second = (c[:, :, None, None] for c in scenes.shade.unbind(1))
    return first + (second - first) * mix[:, None]


def turn_hue(rgb: Tensor, hue: Tensor, alpha: Tensor) -> Tensor:
    """Rotate colours about the grey axis.

    rgb (N, 3, S, S) is premultiplied, hue (N,), alpha (N, 1, S, S).
    """
    cos, sin = hue.cos(), hue.sin()
    a, b = (1 - cos) / 3, sin / 3**0.5
    matrix = torch.stack(
        [cos + a, a - b, a + b, a + b, cos + a, a - b, a - b, a + b, cos + a], 1
    ).view(-1, 3, 3)
    return torch.minimum(torch.einsum("nij,njhw->nihw", matrix, rgb).clamp(min=0), alpha)


def layers(scenes: Scenes, glyphs: Glyphs, side: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield for each glyph slot its scenes and their placed glyphs.

    These are the indices of the scenes that fill the slot (n,), the glyphs as premultiplied colours
    (n, 3, S, S) and alpha (n, 1, S, S).
    """
    for slot in range(scenes.glyph.shape[1]):
        use = (scenes.glyph[:, slot] >= 0).nonzero().squeeze(1)
        if not len(use):
            continue
        part = scenes[use]
        # Output place -> atlas place: undo the shift, then scale back.
        linear = torch.eye(2, device=glyphs.atlas.device) / part.size[:, slot, None, None]
        shift = -(linear @ part.centre[:, slot, :, None])
        grid = F.affine_grid(
            torch.cat([linear, shift], 2), [len(use), 4, side, side], align_corners=False
        )
        layer = F.grid_sample(glyphs.atlas[part.glyph[:, slot]], grid, align_corners=False)
        rgb, alpha = layer.split([3, 1], 1)
        yield use, turn_hue(rgb, part.hue[:, slot], alpha), alpha


def render(scenes: Scenes, glyphs: Glyphs, side: int, *, with_background: bool = True) -> Tensor:
    """Draw scenes as pictures (N, 3, S, S) in [0, 1], on the atlas's device.

    Without a background the glyphs are drawn on grey (for measures of shape).
    """
    scenes = scenes.to(glyphs.atlas.device)
    picture = (
        background(scenes, side)
        if with_background
        else scenes.shade.new_full((len(scenes), 3, side, side), 0.5)
    )
    for use, rgb, alpha in layers(scenes, glyphs, side):
        picture[use] = picture[use] * (1 - alpha) + rgb
    return picture.clamp(0, 1)


def figures(scenes: Scenes, glyphs: Glyphs, side: int) -> Tensor:
    """Draw masks (N, 1, S, S) in [0, 1] of where a glyph covers the background."""
    scenes = scenes.to(glyphs.atlas.device)
    bare = scenes.shade.new_ones((len(scenes), 1, side, side))
    for use, _, alpha in layers(scenes, glyphs, side):
        bare[use] *= 1 - alpha
    return 1 - bare.clamp(0, 1)


def to_image(picture: Tensor) -> Image.Image:
    """Convert a tensor (3, S, S) in [0, 1] to a picture."""
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())


def moved(scenes: Scenes, generator: torch.Generator) -> Scenes:
    """Return the scenes with their glyphs moved a little.

    Measures of such pairs show the best value that a result can reach.
    """
    return replace(
        scenes, centre=scenes.centre + 0.03 * torch.randn(scenes.centre.shape, generator=generator)
    )


def shuffled(scenes: Scenes, by: int = 1) -> Scenes:
    """Give each picture another's scene: the one `by` places before it."""
    return scenes[torch.arange(len(scenes)).roll(by)]


def article(name: str) -> str:
    """Put "a" or "an" before a name."""
    return ("an " if name[0] in "aeiou" else "a ") + name


def place_words(x: float, y: float) -> str:
    """Describe a place, x and y in [-1, 1], in words such as "at the top left"."""
    row = "top" if y < -0.25 else "bottom" if y > 0.25 else ""
    column = "left" if x < -0.25 else "right" if x > 0.25 else ""
    return f"at the {row} {column}".replace("  ", " ").strip() if row or column else "in the middle"


def captions(scenes: Scenes, glyphs: Glyphs, generator: torch.Generator) -> list[str]:
    """Write English captions: always the glyphs' names, each other factor only sometimes.

    Hue and exact shade are never stated.
    """
    coins = torch.rand(len(scenes), 3, generator=generator).tolist()
    texts = []
    for n, (say_place, say_background, say_pattern) in enumerate(coins):
        names = [article(glyphs.names[g]) for g in scenes.glyph[n].tolist() if g >= 0]
        text = " and ".join(names)
        if len(names) == 1 and say_place < 0.2:
            text += " " + place_words(*scenes.centre[n, 0].tolist())
        if say_background < 0.5:
            first, second = (COLOUR_NAMES[c] for c in scenes.colour[n].tolist())
            pattern = PATTERNS[int(scenes.pattern[n])]
            if pattern == "solid" or say_pattern < 0.5:
                text += f" on {article(first)} background"
            else:
                text += f" on {first} and {second} {pattern}"
        texts.append(text)
    return texts
