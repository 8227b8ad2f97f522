"""Pictures from files: what every kind becomes, and how what is none is refused."""

import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from imprompt.errors import ImageError
from imprompt.images import BLACK, MAX_PIXELS, WHITE, grid, open_image, open_mask

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
# two wide, three high, every value another
UPRIGHT = np.arange(18, dtype=np.uint8).reshape(3, 2, 3) * 14
Make = Callable[[Path], object]


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    """Row by row."""
    return [tuple(pixel) for row in np.asarray(image).tolist() for pixel in row]


def of(mode: str, *values: object, **options: object) -> Make:
    """Saves a row of these pixels."""

    def make(path: Path) -> None:
        image = Image.new(mode, (len(values), 1))
        for x, value in enumerate(values):
            image.putpixel((x, 0), value)  # pyright: ignore[reportArgumentType]
        image.save(path, **options)

    return make


def of_array(dtype: str, *values: float) -> Make:
    return lambda path: Image.fromarray(np.array([values], dtype)).save(path)


def palette(**options: object) -> Make:
    """Saves red, green and a half-way grey by number."""

    def make(path: Path) -> None:
        image = Image.new("P", (3, 1))
        image.putpalette([*RED, *GREEN, 100, 100, 100])
        for x in range(3):
            image.putpixel((x, 0), x)
        image.save(path, **options)

    return make


def animation(**options: object) -> Make:
    def make(path: Path) -> None:
        frames = [Image.new("RGB", (1, 1), colour) for colour in (RED, BLUE, GREEN)]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **options)

    return make


def stored(orientation: int) -> Make:
    """Saves UPRIGHT as a camera held so would store it, and says so in EXIF."""
    sideways = UPRIGHT.transpose(1, 0, 2)
    turned = {
        1: UPRIGHT,
        2: UPRIGHT[:, ::-1],
        3: UPRIGHT[::-1, ::-1],
        4: UPRIGHT[::-1],
        5: sideways,
        6: sideways[::-1],
        7: sideways[::-1, ::-1],
        8: sideways[:, ::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    return lambda path: Image.fromarray(np.ascontiguousarray(turned[orientation])).save(
        path, exif=exif
    )


def grey(*values: int) -> list[tuple[int, ...]]:
    return [(value,) * 3 for value in values]


def srgb(*, swapped: bool) -> bytes:
    """The profile of sRGB, or one of screens whose red and green are swapped."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    if swapped:
        entries = {
            bytes(profile[at : at + 4]): at
            for at in range(132, 132 + 12 * int.from_bytes(profile[128:132]), 12)
        }
        red, green = (slice(entries[tag] + 4, entries[tag] + 12) for tag in (b"rXYZ", b"gXYZ"))
        profile[red], profile[green] = profile[green], profile[red]
    return bytes(profile)


SRGB, SWAPPED = srgb(swapped=False), srgb(swapped=True)
# mode, what is stored under the swapped profile, and what that shows
IN_PROFILE: list[tuple[str, tuple[object, ...], list[tuple[int, ...]]]] = [
    ("RGB", (RED, (9, 200, 30)), [GREEN, (200, 9, 30)]),
    ("RGBA", ((*RED, 255), (*RED, 0)), [GREEN, WHITE]),
]
TURNED = [tuple(pixel) for pixel in UPRIGHT.reshape(-1, 3).tolist()]
# (what, ending, how it is made, its pixels)
GOOD: list[tuple[str, str, Make, list[tuple[int, ...]]]] = [
    *(
        (f"{end} of RGB", end, of("RGB", RED, (9, 8, 7)), [RED, (9, 8, 7)])
        for end in ("png", "bmp", "tiff", "tga", "ppm")
    ),
    ("lossless WebP", "webp", of("RGB", RED, BLUE, lossless=True), [RED, BLUE]),
    ("animated GIF", "gif", animation(), [RED]),
    ("animated WebP", "webp", animation(lossless=True), [RED]),
    ("animated PNG", "png", animation(), [RED]),
    ("TIFF of pages", "tiff", animation(), [RED]),
    ("black and white", "png", of("1", 0, 1), grey(0, 255)),
    ("grey", "png", of("L", 0, 7, 255), grey(0, 7, 255)),
    ("palette", "png", palette(), [RED, GREEN, (100, 100, 100)]),
    (
        "palette with a transparent colour",
        "png",
        palette(transparency=1),
        [RED, WHITE, (100, 100, 100)],
    ),
    (
        "palette with alpha",
        "png",
        palette(transparency=bytes([255, 0, 51])),
        [RED, WHITE, (224, 224, 224)],
    ),
    (
        "GIF with a transparent colour",
        "gif",
        palette(transparency=1),
        [RED, WHITE, (100, 100, 100)],
    ),
    ("RGB with a transparent colour", "png", of("RGB", RED, BLUE, transparency=BLUE), [RED, WHITE]),
    ("grey with a transparent value", "png", of("L", 5, 9, transparency=9), grey(5, 255)),
    (
        "RGBA",
        "png",
        of("RGBA", (*RED, 255), (*BLUE, 0), (*BLACK, 51)),
        [RED, WHITE, (204, 204, 204)],
    ),
    ("LA", "png", of("LA", (5, 255), (5, 0), (0, 51)), grey(5, 255, 204)),
    (
        "CMYK",
        "tiff",
        of("CMYK", (0, 255, 255, 0), (255, 255, 0, 0), (0, 0, 0, 255)),
        [RED, BLUE, BLACK],
    ),
    ("16-bit PNG", "png", of_array("<u2", 0, 100 * 257, 65535), grey(0, 100, 255)),
    ("16-bit TIFF", "tiff", of_array("<u2", 0, 100 * 257, 65535), grey(0, 100, 255)),
    (
        "16-bit TIFF, the other byte order",
        "tiff",
        of_array(">u2", 0, 100 * 257, 65535),
        grey(0, 100, 255),
    ),
    ("16-bit PNG, all dark", "png", of_array("<u2", 0, 100, 255), grey(0, 0, 1)),
    (
        "32-bit TIFF of 16-bit values",
        "tiff",
        of_array("<i4", -5, 100 * 257, 65535),
        grey(0, 100, 255),
    ),
    ("32-bit TIFF of 8-bit values", "tiff", of_array("<i4", 0, 100, 255), grey(0, 100, 255)),
    (
        "32-bit TIFF of larger values",
        "tiff",
        of_array("<i4", 0, 10**6, 2 * 10**6),
        grey(0, 128, 255),
    ),
    (
        "TIFF of real numbers",
        "tiff",
        of_array("<f4", -1.0, 100.2, 254.9, np.nan, np.inf),
        grey(0, 100, 255, 0, 0),
    ),
    ("TIFF of shares of white", "tiff", of_array("<f4", 0.0, 0.4, 1.0), grey(0, 102, 255)),
    ("16-bit PGM, all dark", "ppm", of_array("<i4", 0, 100, 255), grey(0, 0, 1)),
    *(
        (f"{mode} in a profile", "png", of(mode, *stored, icc_profile=SWAPPED), shown)
        for mode, stored, shown in IN_PROFILE
    ),
    ("palette in a profile", "png", palette(icc_profile=SWAPPED), [GREEN, RED, (100, 100, 100)]),
    ("RGB in the profile sRGB", "png", of("RGB", (60, 150, 60), icc_profile=SRGB), [(60, 150, 60)]),
    (
        "a damaged profile",
        "png",
        of("RGB", (60, 150, 60), icc_profile=b"no profile"),
        [(60, 150, 60)],
    ),
    ("a profile of other colours", "png", of("L", 7, icc_profile=SWAPPED), grey(7)),
    *((f"EXIF orientation {n}", "png", stored(n), TURNED) for n in range(1, 9)),
    ("damaged EXIF", "png", of("RGB", RED, exif=b"Exif\0\0no such thing"), [RED]),
    ("one pixel", "png", of("RGB", (1, 2, 3)), [(1, 2, 3)]),
]


@pytest.mark.parametrize(
    ("ending", "make", "expected"), [row[1:] for row in GOOD], ids=[row[0] for row in GOOD]
)
def test_a_picture_becomes_upright_rgb(
    ending: str, make: Make, expected: list[tuple[int, ...]], tmp_path: Path
) -> None:
    make(tmp_path / f"a.{ending}")
    for image in (open_image(tmp_path / f"a.{ending}"), open_image(str(tmp_path / f"a.{ending}"))):
        assert image.mode == "RGB"
        assert pixels(image) == expected


@pytest.mark.parametrize(
    ("mode", "colour"), [("RGB", (200, 30, 30)), ("CMYK", (0, 220, 220, 55)), ("L", 100)]
)
def test_jpegs(mode: str, colour: object, tmp_path: Path) -> None:
    Image.new(mode, (16, 16), colour).save(tmp_path / "a.jpg")  # pyright: ignore[reportArgumentType]
    expected = {"RGB": (200, 30, 30), "CMYK": (200, 27, 27), "L": (100, 100, 100)}[mode]
    assert np.abs(np.asarray(open_image(tmp_path / "a.jpg")).astype(int) - expected).max() <= 4


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_turned_jpeg(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (32, 16), RED).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == {3: (32, 16), 6: (16, 32)}[orientation]


def test_a_very_long_picture(tmp_path: Path) -> None:
    Image.new("RGB", (20_000, 10), BLUE).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").size == (20_000, 10)


def test_pictures_in_memory_are_not_touched() -> None:
    ours = Image.new("RGBA", (1, 1), (*BLUE, 0))
    assert pixels(open_image(ours)) == [WHITE]
    assert ours.mode == "RGBA"
    plain = Image.new("RGB", (1, 1), RED)
    copy = open_image(plain)
    copy.putpixel((0, 0), BLUE)
    assert plain.getpixel((0, 0)) == RED
    with pytest.raises(ImageError, match="0×5 pixels shows nothing"):
        open_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (of("RGBA", (*WHITE, 255), (*WHITE, 0), (*BLACK, 255), (*BLACK, 0)), [255, 0, 0, 0]),
        (of("1", 0, 1), [0, 255]),
        (of_array("<u2", 0, 65535), [0, 255]),
        (of("RGB", WHITE, BLACK, (128, 128, 128)), [255, 0, 128]),
    ],
    ids=["transparent is black", "1-bit", "16-bit", "RGB"],
)
def test_masks(make: Make, expected: list[int], tmp_path: Path) -> None:
    make(tmp_path / "a.png")
    mask = open_mask(tmp_path / "a.png")
    assert mask.mode == "L"
    assert np.asarray(mask)[0].tolist() == expected


# What is refused


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def claims(width: int, height: int) -> Make:
    """Saves a PNG of a few bytes that says it is that large."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )
    return lambda path: path.write_bytes(data)


def holding(data: bytes) -> Make:
    return lambda path: path.write_bytes(data)


def noise(path: Path) -> None:
    """Sixty-four wide and high, so that every format has data to lose."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        path
    )


def cut(share: float) -> Make:
    def make(path: Path) -> None:
        noise(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return make


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
# (what, ending, how it is made, words of the refusal)
BAD: list[tuple[str, str, Make, str]] = [
    ("missing", "png", lambda _: None, "does not exist"),
    ("folder", "png", Path.mkdir, "is a folder; name one picture in it"),
    ("empty", "png", Path.touch, "is empty"),
    ("text", "png", holding(b"no picture at all"), "is not a picture of a known format"),
    ("another program's format", "eps", holding(EPS), "EPS files are not read; give a PNG"),
    *(
        (f"half a {end}", end, cut(0.5), "is damaged, truncated")
        for end in ("png", "jpg", "gif", "bmp")
    ),
    *((f"half a {end}", end, cut(0.5), "damaged") for end in ("webp", "tiff", "ppm", "tga")),
    ("only the header", "png", cut(0.001), "is not a picture of a known format"),
    (
        "bomb",
        "png",
        claims(100_000, 100_000),
        f"is far over the limit of {MAX_PIXELS:,} pixels; make it smaller",
    ),
    (
        "too large",
        "png",
        claims(10_001, 10_000),
        f"has 10001×10000 pixels, over the limit of {MAX_PIXELS:,} pixels",
    ),
    ("pipe", "png", os.mkfifo, "is not a file but a device or a pipe"),
]


@pytest.mark.parametrize(
    ("ending", "make", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_what_is_no_picture_is_refused_in_one_line(
    ending: str, make: Make, words: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{ending}"
    make(path)
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"
)
def test_a_picture_that_may_not_be_read(tmp_path: Path) -> None:
    noise(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(ImageError, match="permission denied"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
def test_damage_never_escapes_as_another_error(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    noise(path)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 3, 30))):
            damaged[draw.randrange(min(len(damaged), draw.choice((64, 10**6))))] = draw.randrange(
                256
            )
        path.write_bytes(damaged)
        try:
            assert open_image(path).mode == "RGB"
        except ImageError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either is right


@pytest.mark.parametrize(
    ("count", "columns", "size"),
    [
        (1, None, (4, 3)),
        (2, None, (12, 3)),
        (4, None, (12, 10)),
        (5, None, (20, 10)),
        (3, 1, (4, 17)),
    ],
)
def test_grid(count: int, columns: int | None, size: tuple[int, int]) -> None:
    sheet = grid([Image.new("RGB", (4, 3), (n, 0, 0)) for n in range(count)], columns)
    assert sheet.size == size
    wide = (size[0] + 4) // 8
    for n in range(count):
        assert sheet.getpixel((n % wide * 8 + 3, n // wide * 7 + 2)) == (n, 0, 0)
    assert {pixel for pixel in pixels(sheet) if pixel[1]} <= {WHITE}


@pytest.mark.parametrize(
    ("what", "values"),
    [
        ("bool", [False, True]),
        ("uint8", [0, 1]),
        ("uint8", [0, 255]),
        ("int32", [0, 1]),
        ("uint16", [0, 65535]),
        ("float32", [0, 1]),
    ],
)
@pytest.mark.parametrize("stored", [False, True])
def test_a_mask_applies_where_it_is_one_or_white(
    what: str, values: list[int], stored: bool, tmp_path: Path
) -> None:
    mask: Image.Image = Image.fromarray(np.array([values], what))
    if stored:
        mask.save(tmp_path / "mask.tiff")
    assert np.asarray(open_mask(tmp_path / "mask.tiff" if stored else mask)).tolist() == [[0, 255]]


def test_greys_of_a_mask_stay() -> None:
    assert np.asarray(open_mask(Image.fromarray(np.array([[0, 1, 2]], "uint8")))).tolist() == [
        [0, 1, 2]
    ]


def test_grey_multiplied_by_its_alpha() -> None:
    picture = Image.new("LA", (2, 1), (200, 255))
    picture.putpixel((1, 0), (200, 0))
    assert pixels(open_image(picture.convert("La"))) == [(200, 200, 200), WHITE]


def test_dark_integers_in_memory_are_of_8_bits_or_of_16(tmp_path: Path) -> None:
    of_array("<i4", 0, 100, 189)(tmp_path / "dark.ppm")
    with Image.open(tmp_path / "dark.ppm") as picture:
        copy = picture.copy()  # forgets that its file was of 16 bits
        assert pixels(open_image(picture)) == grey(0, 0, 1)
    with pytest.raises(ImageError, match="mode I whose values reach 189 is of 8 bits, or a dark"):
        open_image(copy)
    assert pixels(open_image(copy.convert("L"))) == grey(0, 100, 189)
    assert pixels(open_image(copy.convert("I;16"))) == grey(0, 0, 1)
    bright: Image.Image = Image.fromarray(np.array([[0, 65535]], np.int32))
    assert pixels(open_image(bright)) == [BLACK, WHITE]
