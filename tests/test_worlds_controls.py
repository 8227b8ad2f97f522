"""The emoji world's edge ControlNet and its other drawing styles, as they ship: what they were made
for holds, a little at least.

Their inputs are drawn here: no font is needed.
"""

from functools import cache

import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image, ImageDraw
from torch import Tensor

pytest.importorskip("peft", reason="diffusers loads LoRAs through it")

from imprompt.families.published import base_structure
from imprompt.models import MODELS, PACKAGED
from studies.emoji.measures import in_style, outline_iou, to_tensor
from studies.emoji.sampler import Condition, Sampler
from worlds.emoji.control import EDGES
from worlds.emoji.edges import edges
from worlds.emoji.glyphs import CUSTOM
from worlds.emoji.style import STYLES_FOLDER

SIDE, STEPS = base_structure(MODELS["emoji"]).side, 8
UNIT = SIDE // 64  # pixels
LIMIT, LIMIT_IN_ALL = 16e6, 55e6  # bytes: the wheel has room for 60 MB
BOXES = ((6, 10, 34, 38), (26, 6, 58, 38), (14, 26, 50, 58), (30, 28, 60, 58))  # in units


def drawn(grounds: tuple[str, ...], inks: tuple[str, ...], turn: int = 0) -> Tensor:
    """Disks and boxes of four colours on four others, (4, 3, S, S)."""
    pictures = []
    for number, (ground, colour) in enumerate(zip(grounds, inks, strict=True)):
        picture = Image.new("RGB", (SIDE, SIDE), ground)
        pen = ImageDraw.Draw(picture)
        (pen.ellipse, pen.rectangle)[number % 2](
            [UNIT * place for place in BOXES[(number + turn) % 4]], fill=colour
        )
        pictures.append(picture)
    return to_tensor(pictures)


SHAPES = drawn(
    ("#f0e0c0", "#3366cc", "#40a050", "#f5f5f5"), ("#c03030", "#f0d040", "#f8f8f8", "#7040a0")
)
PALETTES = drawn(
    ("#f8e050", "#98d0f8", "#f09030", "#a0e8c0"),
    ("#d02020", "#f09020", "#3060d0", "#8040a0"),
    turn=2,
)


@cache
def sampler(style: str = "") -> Sampler:
    return Sampler(STYLES_FOLDER / style if style else None)


def ground(pictures: Tensor) -> Tensor:
    """The median colour of a picture's outermost rows (N, 3)."""
    rows = torch.cat([pictures[:, :, : 3 * UNIT], pictures[:, :, -3 * UNIT :]], 2)
    return rows.flatten(2).median(2).values


def ground_errors(pictures: Tensor, wanted: Tensor) -> tuple[float, float]:
    """The mean difference of the ground from the wanted one and from another's, of 1."""
    found = ground(pictures)
    return (found - wanted).abs().mean().item(), (found - wanted.roll(1, 0)).abs().mean().item()


def size(folder: object) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # pyright: ignore[reportAttributeAccessIssue]


def test_what_ships_is_small() -> None:
    assert size(EDGES) < LIMIT
    assert size(STYLES_FOLDER) < LIMIT
    assert size(PACKAGED / "emoji") < LIMIT_IN_ALL


def test_edges_are_of_colour_and_lie_where_the_shape_ends() -> None:
    maps = edges(SHAPES)
    assert maps.shape == SHAPES.shape
    assert (maps.min(), maps.max()) == (0, 1)
    assert maps[0, 0, 24 * UNIT, 5 * UNIT : 8 * UNIT].max() > 0.9  # the disk's left end
    assert maps[0, 0, 24 * UNIT, 20 * UNIT] == 0  # its inside
    grey = torch.full((1, 3, 64, 64), 0.5)
    grey[:, 0, :, 32:], grey[:, 1, :, 32:] = 0.9, 0.1  # as bright as before, another colour
    assert edges(grey)[0, 0, 32, 31:33].min() > 0.9


def test_the_controlnet_holds_outlines_and_the_image_prompt_the_palette() -> None:
    assert isinstance(sampler().controlled.controlnet, ControlNetModel)
    maps = edges(SHAPES)
    held = sampler().sample(4, Condition(PALETTES), maps=maps, steps=STEPS)
    free = sampler().sample(4, Condition(PALETTES), steps=STEPS)
    assert outline_iou(held, maps).mean() > outline_iou(free, maps).mean() + 0.15
    own, shuffled = ground_errors(held, ground(PALETTES))
    assert own < 0.5 * shuffled


@pytest.mark.parametrize("style", CUSTOM)
def test_a_style_is_another_base_and_the_same_adapter_drives_it(style: str) -> None:
    plain = sampler().sample(4, texts=["a red apple"] * 4, steps=STEPS)
    styled = sampler(style).sample(4, texts=["a red apple"] * 4, steps=STEPS)
    assert (plain - styled).abs().mean() > 0.02
    assert in_style(styled, style).mean() > in_style(plain, style).mean()
    silent = sampler(style).sample(
        4, Condition(PALETTES, 0.0), texts=["a red apple"] * 4, steps=STEPS
    )
    assert torch.equal(styled, silent)  # scale 0 is that base itself
    made = sampler(style).sample(4, Condition(PALETTES), steps=STEPS)
    own, shuffled = ground_errors(made, ground(PALETTES))
    assert own < 0.5 * shuffled
