"""Pictures before the encoder: what is cut, filled, tiled, sharpened and covered, pixel by pixel.

And noise negatives.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from imprompt.encoders.noise import KINDS, Noise, noise_negative
from imprompt.encoders.preparation import (
    MAX_TILES,
    Preparation,
    encoder_square,
    mean_colour,
    prepare,
    sharpened,
)
from imprompt.encoders.vision import VisionEncoder, preprocess
from imprompt.errors import ImageError, SettingError
from tests.tiny import pictures, tiny_encoder

ENCODER = tiny_encoder()  # sees 32 × 32
SIDE = 32
MEAN = (123, 117, 104)  # CLIP's mean colour, 255 × (0.4815, 0.4578, 0.4082)
LENGTHS = st.integers(1, 300)


def numbered(width: int, height: int) -> Image.Image:
    """Every pixel tells its place: (x, y, 7)."""
    y, x = np.indices((height, width))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 7)], -1).astype(np.uint8))


def place(image: Image.Image) -> tuple[tuple[int, int], tuple[int, int]]:
    """(x, y) of the first pixel and of the last, of a part of a numbered picture."""
    pixels = np.asarray(image).tolist()
    return tuple(pixels[0][0][:2]), tuple(pixels[-1][-1][:2])


def blank_mask(size: tuple[int, int], grey: int = 0) -> Image.Image:
    return Image.new("L", size, grey)


# Crops


@pytest.mark.parametrize(
    ("crop", "size", "expected"),
    [
        ("left", (50, 20), ((0, 0), (19, 19))),
        ("right", (50, 20), ((30, 0), (49, 19))),
        ("top", (20, 50), ((0, 0), (19, 19))),
        ("bottom", (20, 50), ((0, 30), (19, 49))),
        ("center", (50, 20), ((0, 0), (49, 19))),  # for the encoder's own processor to cut
        ("left", (20, 50), ((0, 0), (19, 49))),  # nothing to choose: as "center"
        ("right", (20, 50), ((0, 0), (19, 49))),
        ("top", (50, 20), ((0, 0), (49, 19))),
        ("bottom", (20, 20), ((0, 0), (19, 19))),
    ],
)
def test_the_square_at_an_edge(crop: str, size: tuple[int, int], expected: object) -> None:
    (made,) = prepare(numbered(*size), Preparation(crop=crop), ENCODER)
    assert place(made) == expected


def test_by_default_nothing_changes_and_the_encoder_is_not_asked() -> None:
    image = pictures(1)[0]
    (made,) = prepare(image, Preparation(), object())
    assert made is image


@pytest.mark.parametrize(("crop", "colour"), [("pad", MEAN), ("pad black", (0, 0, 0))])
@pytest.mark.parametrize("size", [(64, 32), (20, 80), (1, 500), (2_000, 3)])
def test_padding(crop: str, colour: tuple[int, int, int], size: tuple[int, int]) -> None:
    """The whole picture stands in the middle, exactly.

    All around it is the one colour, also as the encoder sees it.
    """
    (made,) = prepare(Image.new("RGB", size, (200, 10, 60)), Preparation(crop=crop), ENCODER)
    width, height = (max(1, round(SIDE * length / max(size))) for length in size)
    expected = np.full((SIDE, SIDE, 3), colour)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    expected[top : top + height, left : left + width] = (200, 10, 60)
    assert np.array_equal(made, expected)
    assert np.array_equal(encoder_square(made, ENCODER.processor), expected)


def test_padding_says_nothing() -> None:
    """Normalised it is 0, but for the rounding of the mean colour to 8 bits."""
    (made,) = prepare(Image.new("RGB", (SIDE, SIDE // 2)), Preparation(crop="pad"), ENCODER)
    assert preprocess(ENCODER.processor, [made])[0, :, : SIDE // 4].abs().max() < 0.5 / 255 / 0.26
    assert mean_colour(ENCODER.processor) == MEAN


def test_squashing_shows_all_of_the_picture() -> None:
    image = Image.new("RGB", (96, 32), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 48, 32))
    (made,) = prepare(image, Preparation(crop="squash"), ENCODER)
    pixels = np.asarray(made)
    assert made.size == (SIDE, SIDE)
    assert (pixels[:, :14] == (255, 0, 0)).all()
    assert (pixels[:, 18:] == (0, 0, 255)).all()


@given(LENGTHS, LENGTHS)
@settings(max_examples=60)
def test_tiles_are_the_fewest_squares_that_cover_a_picture(width: int, height: int) -> None:
    long, short = max(width, height), min(width, height)
    y, x = np.indices((height, width), dtype=np.uint16)
    along = x if width >= height else y
    image = Image.fromarray(np.stack([along // 256, along % 256, along * 0], -1).astype(np.uint8))
    made = prepare(image, Preparation(crop="tiles"), ENCODER)
    assert all(tile.size == (short, short) for tile in made)
    assert len(made) == min(-(-long // short), MAX_TILES)
    firsts = [tile.getpixel((0, 0)) for tile in made]
    starts = [first[0] * 256 + first[1] for first in firsts if isinstance(first, tuple)]
    assert starts[0] == 0
    assert starts[-1] == (long - short if len(made) > 1 else 0)
    steps = [after - before for before, after in pairwise(starts)]
    assert max(steps, default=0) - min(steps, default=0) <= 1
    if long <= MAX_TILES * short:
        assert {start + i for start in starts for i in range(short)} == set(range(long))


def test_a_square_is_its_own_tile() -> None:
    image = numbered(40, 40)
    assert prepare(image, Preparation(crop="tiles"), ENCODER) == [image]


@pytest.mark.parametrize("crop", ["center", "top", "left", "pad", "pad black", "squash", "tiles"])
@pytest.mark.parametrize("size", [(1, 1), (5_000, 2), (3, 900), (31, 33)])
def test_pictures_of_any_shape_become_features(crop: str, size: tuple[int, int]) -> None:
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )
    ways = Preparation(crop=crop, sharpening=0.5, ignore=blank_mask(size, 100))
    made = prepare(image, ways, ENCODER)
    again = prepare(image, ways, ENCODER)
    assert [tile.tobytes() for tile in made] == [tile.tobytes() for tile in again]
    features = ENCODER.features(made, "pooled")
    assert features.shape == (len(made), 24)
    assert features.isfinite().all()


# Sharpening


def cas(pixels: np.ndarray, amount: float) -> np.ndarray:
    """The formula pixel by pixel and channel by channel, in float64."""
    height, width, channels = pixels.shape
    made = np.zeros_like(pixels)
    for y, x, c in np.ndindex(height, width, channels):
        rows, columns = (
            [min(max(at + d, 0), end - 1) for d in (-1, 0, 1)]
            for at, end in ((y, height), (x, width))
        )
        nine = pixels[np.ix_(rows, columns, [c])][..., 0]
        cross = [nine[0, 1], nine[1, 0], nine[1, 1], nine[1, 2], nine[2, 1]]
        low, high = min(cross) + nine.min(), max(cross) + nine.max()
        room = min(max(min(low, 2 - high) / high, 0), 1) if high else 0
        weight = -amount / 5 * room**0.5
        made[y, x, c] = (nine[1, 1] + weight * (sum(cross) - nine[1, 1])) / (1 + 4 * weight)
    return made.clip(0, 1)


@given(st.integers(0, 1000), st.floats(0, 1))
def test_sharpening_is_the_published_formula(seed: int, amount: float) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    made = np.asarray(sharpened(Image.fromarray(pixels), amount)).astype(float)
    assert np.abs(made - cas(pixels / 255, amount) * 255).max() <= 0.501  # rounded to 8 bits
    if amount == 0:
        assert np.array_equal(made, pixels)


@given(st.tuples(*[st.integers(0, 255)] * 3), st.floats(0, 1))
def test_a_plain_picture_stays_plain(colour: tuple[int, int, int], amount: float) -> None:
    assert np.array_equal(
        sharpened(Image.new("RGB", (4, 3), colour), amount), np.full((3, 4, 3), colour)
    )


def test_sharpening_raises_contrast_more_the_more_there_is_of_it() -> None:
    soft = Image.fromarray(
        np.tile(np.linspace(60, 190, 32).astype(np.uint8)[None, :, None], (32, 1, 3))
    )
    soft.paste((160, 160, 160), (0, 0, 16, 16))
    soft = soft.filter(ImageFilter.GaussianBlur(1.5))
    contrast = [
        np.diff(np.asarray(sharpened(soft, amount), float), axis=1).std()
        for amount in (0, 0.3, 0.6, 1)
    ]
    assert contrast == sorted(contrast)
    assert contrast[-1] > 1.1 * contrast[0]


@pytest.mark.parametrize("size", [(56, 40), (32, 32), (40, 300)])
def test_sharpening_works_on_what_the_encoder_sees(size: tuple[int, int]) -> None:
    """Resized first, as the encoder does it, and the encoder then leaves its pixels alone."""
    image = pictures(1)[0].resize(size)
    (made,) = prepare(image, Preparation(sharpening=0.7), ENCODER)
    expected = sharpened(encoder_square(image, ENCODER.processor), 0.7)
    assert made.size == (SIDE, SIDE)
    assert np.array_equal(encoder_square(made, ENCODER.processor), expected)
    (least,) = prepare(image, Preparation(sharpening=1e-9), ENCODER)
    assert torch.equal(
        preprocess(ENCODER.processor, [least]), preprocess(ENCODER.processor, [image])
    )


# Ignoring


@pytest.mark.parametrize("crop", ["center", "pad", "tiles"])
def test_what_is_ignored_changes_no_feature(encoder: VisionEncoder, crop: str) -> None:
    first, other = pictures(2)
    mask = blank_mask(first.size)
    mask.paste(255, (10, 5, 50, 30))
    changed = first.copy()
    changed.paste(other.crop((10, 5, 50, 30)), (10, 5))
    ways = Preparation(crop=crop, ignore=mask, sharpening=0.4)
    features = [
        encoder.features(prepare(image, ways, encoder), "penultimate")
        for image in (first, changed, other)
    ]
    assert torch.equal(features[0], features[1])
    assert not torch.equal(features[0], features[2])


def test_ignoring_everything_is_the_mean_colour_and_nothing_is_nothing() -> None:
    image = pictures(1)[0]
    (made,) = prepare(image, Preparation(ignore=blank_mask(image.size, 255)), ENCODER)
    assert np.array_equal(made, np.full((40, 56, 3), MEAN))
    (made,) = prepare(image, Preparation(ignore=blank_mask(image.size, 0)), ENCODER)
    assert np.array_equal(made, image)


def test_a_grey_mask_ignores_in_part() -> None:
    image = Image.new("RGB", (8, 8), (23, 217, 4))
    (made,) = prepare(image, Preparation(ignore=blank_mask((8, 8), 51)), ENCODER)  # a fifth
    assert made.getpixel((3, 3)) == (43, 197, 24)


def test_a_mask_file_of_another_size(tmp_path: Path) -> None:
    mask = blank_mask((20, 10))
    mask.paste(255, (0, 0, 10, 10))
    mask.save(tmp_path / "mask.png")
    (made,) = prepare(
        Image.new("RGB", (200, 99), "red"), Preparation(ignore=tmp_path / "mask.png"), ENCODER
    )
    pixels = np.asarray(made)
    assert (pixels[:, :90] == MEAN).all()
    assert (pixels[:, 110:] == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("picture", "mask", "fits"),
    [
        ((1000, 667), (500, 333), True),
        ((1000, 667), (500, 334), True),
        ((1000, 1000), (500, 504), True),  # 1 %
        ((1000, 1000), (500, 520), False),
        ((100, 1000), (3, 30), True),
        ((64, 64), (1, 1), True),
        ((64, 32), (2, 2), False),
        ((64, 32), (32, 64), False),
        ((40, 30), (30, 40), False),
    ],
)
def test_a_mask_must_have_the_pictures_shape(
    picture: tuple[int, int], mask: tuple[int, int], fits: bool
) -> None:
    image, ways = Image.new("RGB", picture), Preparation(ignore=blank_mask(mask, 255))
    if fits:
        assert prepare(image, ways, ENCODER)[0].getpixel((0, 0)) == MEAN
        return
    with pytest.raises(ImageError, match=r"{}×{} .*{}×{}".format(*mask, *picture)):
        prepare(image, ways, ENCODER)


# Noise negatives


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("image", [None, pictures(1)[0]], ids=["no picture", "picture"])
def test_noise_is_of_the_encoders_size_and_repeatable(
    kind: str, strength: float, image: Image.Image | None
) -> None:
    noise = Noise(kind=kind, strength=strength, blur=0.5)
    made, again, other = (noise_negative(image, noise, ENCODER, seed) for seed in (3, 3, 4))
    assert (made.mode, made.size) == ("RGB", (SIDE, SIDE))
    assert np.array_equal(made, again)
    plain = image is None or kind != "shuffle"  # even the mildest shuffle displaces a picture
    assert np.array_equal(made, other) == (strength == 0 and plain)


@pytest.mark.parametrize("kind", ["fade", "dissolve", "gaussian"])
def test_noise_of_strength_0_is_the_picture(kind: str) -> None:
    image = pictures(1)[0]
    square = encoder_square(image, ENCODER.processor)
    assert np.array_equal(noise_negative(image, Noise(kind=kind, strength=0), ENCODER), square)
    blurred = square.filter(ImageFilter.GaussianBlur(2))
    assert np.array_equal(
        noise_negative(image, Noise(kind=kind, strength=0, blur=2), ENCODER), blurred
    )
    assert np.array_equal(
        noise_negative(None, Noise(kind=kind, strength=0), ENCODER), np.full((SIDE, SIDE, 3), MEAN)
    )


def test_noise_of_strength_1() -> None:
    """Fade and dissolve forget the picture; all values are as likely as any other."""
    black, white = (Image.new("RGB", (SIDE, SIDE), colour) for colour in ("black", "white"))
    for kind in ("fade", "dissolve"):
        noise = Noise(kind=kind)
        made = np.asarray(noise_negative(black, noise, ENCODER, 1))
        assert np.array_equal(made, noise_negative(white, noise, ENCODER, 1))
        assert np.histogram(made, 8, (0, 256))[0] == pytest.approx([made.size / 8] * 8, rel=0.2)


def test_half_a_noise() -> None:
    """Half of the values are replaced; half of their distance is faded.

    A normal step of a tenth is added.
    """
    image = Image.new("RGB", (SIDE, SIDE), (102, 102, 102))
    pixels = {
        kind: np.asarray(noise_negative(image, Noise(kind=kind, strength=0.5), ENCODER))
        for kind in KINDS
    }
    assert (pixels["dissolve"] == 102).mean() == pytest.approx(0.5, abs=0.04)
    assert (pixels["fade"].min(), pixels["fade"].max()) == (51, 178)
    mild = np.asarray(noise_negative(image, Noise(kind="gaussian", strength=0.1), ENCODER)).astype(
        float
    )
    assert mild.mean() == pytest.approx(102, abs=2)
    assert mild.std() == pytest.approx(25.5, rel=0.05)


def test_shuffling_turns_and_displaces() -> None:
    """Strength 0: turned by half and gently bent, so the upper part's colour is found below; 1: its
    places are lost.
    """
    image = Image.new("RGB", (SIDE, SIDE), (250, 0, 0))
    image.paste((0, 0, 250), (0, SIDE // 2, SIDE, SIDE))
    mild = np.asarray(noise_negative(image, Noise(kind="shuffle", strength=0), ENCODER)).astype(
        float
    )
    assert (mild[: SIDE // 4, :, 2] > 240).mean() > 0.9
    assert (mild[-SIDE // 4 :, :, 0] > 240).mean() > 0.9
    assert set(np.unique(mild[..., 1])) == {0}
    assert not np.array_equal(mild, np.asarray(image)[::-1, ::-1])


# Requests


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (Preparation, {"crop": "centre"}, "crop = 'centre': unknown; near: center"),
        (
            Preparation,
            {"crop": "zoom"},
            " known: center, top, bottom, left, right, pad, pad black, squash, tiles",
        ),
        (Preparation, {"crop": ["top"]}, "crop = ['top']: unknown"),
        (
            Preparation,
            {"sharpening": 1.5},
            "sharpening = 1.5: input should be less than or equal to 1",
        ),
        (Preparation, {"sharpening": float("nan")}, "sharpening = nan"),
        (Preparation, {"sharpen": 0.5}, "unknown setting 'sharpen'; near: sharpening"),
        (Preparation, {"ignore": 5}, "ignore"),
        (Noise, {"kind": "disolve"}, "kind = 'disolve': unknown; near: dissolve"),
        (
            Noise,
            {"kind": "fade", "strength": -0.1},
            "strength = -0.1: input should be greater than or equal to 0",
        ),
        (Noise, {"kind": "fade", "blur": -1}, "blur = -1"),
        (Noise, {}, "kind: field required"),
    ],
)
def test_wrong_settings_are_reported_in_one_line(
    kind: type[Preparation | Noise], values: dict[str, object], words: str
) -> None:
    with pytest.raises(SettingError) as caught:
        kind(**values)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_go_through_json() -> None:
    ways = Preparation(crop="tiles", sharpening=0.5, ignore=Path("mask.png"))
    assert Preparation.model_validate_json(ways.model_dump_json()) == ways
    noise = Noise(kind="shuffle", strength=0.25, blur=3)
    assert Noise.model_validate_json(noise.model_dump_json()) == noise


def test_an_unreadable_mask_is_reported() -> None:
    with pytest.raises(ImageError, match=r"nowhere\.png does not exist"):
        prepare(pictures(1)[0], Preparation(ignore=Path("nowhere.png")), ENCODER)
