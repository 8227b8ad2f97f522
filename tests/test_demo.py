"""`imprompt demo`: what it writes is a sheet of the world's own pictures that follow their
prompts.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imprompt.cli.demo import LABELS, RESULTS, calls, demo_sheet
from imprompt.generation.pipeline import ImagePromptPipeline
from imprompt.images import open_image
from imprompt.models import PACKAGED

PICTURES = {
    name: open_image(PACKAGED / "emoji" / name) for names in LABELS.values() for name in names
}


@pytest.fixture(scope="module")
def made() -> list[list[Image.Image]]:
    pipe = ImagePromptPipeline.from_pretrained(
        "emoji", adapter="plus", controlnet="edges", device="cpu"
    )
    return [pipe(**call, num_images=1, seed=7, steps=12).images for call in calls(PICTURES)]


def ground(picture: Image.Image, left: float = 0.0, right: float = 1.0) -> np.ndarray:
    """The median colour of the outermost rows, from and to these shares of the width."""
    pixels = np.asarray(picture.convert("RGB")).astype(float)
    columns = slice(round(left * pixels.shape[1]), round(right * pixels.shape[1]))
    return np.median(
        np.concatenate([pixels[:6, columns], pixels[-6:, columns]]).reshape(-1, 3), axis=0
    )


def away(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())


def test_all_rows_take_the_prompts_ground(made: list[list[Image.Image]]) -> None:
    own, other = (ground(PICTURES[name]) for name in ("demo.png", "demo-other.png"))
    for row in (0, 1, 3):
        assert away(ground(made[row][0]), own) < 30 < away(ground(made[row][0]), other)


def test_in_two_halves_each_gets_its_own(made: list[list[Image.Image]]) -> None:
    left, right = ground(made[2][0], 0, 0.3), ground(made[2][0], 0.7, 1)
    own, other = (ground(PICTURES[name]) for name in ("demo.png", "demo-other.png"))
    assert away(left, own) < away(left, other)
    assert away(right, other) < away(right, own)


def test_the_sheet_has_a_row_a_kind(made: list[list[Image.Image]], tmp_path: Path) -> None:
    rows = [
        ([PICTURES[name] for name in names], row * RESULTS)
        for names, row in zip(LABELS.values(), made, strict=True)
    ]
    demo_sheet(rows).save(tmp_path / "demo.png")
    page = open_image(tmp_path / "demo.png")
    side = 2 * made[0][0].width
    assert page.width > (2 + RESULTS) * side
    assert page.height > len(LABELS) * side
