"""Pictures from files, checked and normalised: RGB, upright, of limited size."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError

from imprompt.errors import ImageError, first_line

MAX_PIXELS = 100_000_000
ORIENTATION = ExifTags.Base.Orientation
Trouble = Literal["absent", "empty", "damaged", "no picture", "too large", "not readable"]
ROUNDING = 1  # error of a colour that passes through a profile that changes nothing
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
# Pillow's formats that are decoded in this process: EPS and the like would start other programs.
FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "WEBP",
    "GIF",
    "AVIF",
    "TIFF",
    "BMP",
    "DIB",
    "PPM",
    "TGA",
    "ICO",
    "JPEG2000",
)


class UnusableImage(ImageError):
    """A picture file that cannot be used: its name, the reason, and the kind of the fault."""

    def __init__(self, name: str, why: str, kind: Trouble) -> None:
        super().__init__(name, why, kind)
        self.why, self.kind = why, kind

    def __str__(self) -> str:
        return f"{self.args[0]} {self.why}"


def open_image(
    source: str | Path | bytes | Image.Image,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    paper: tuple[int, int, int] = WHITE,
) -> Image.Image:
    """Load a picture as upright 8-bit RGB, from a file or the bytes of a file.

    Raises ImageError, one line about `name`, if that is impossible. An animation gives its first
    frame, transparency is laid on `paper`, and 16-bit values are scaled to 8 bits.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source, paper)
    if not isinstance(source, str | Path | bytes):
        raise ImageError(
            f"a {type(source).__name__} is not a picture: give a path or a Pillow image"
        )
    with _opened(source, name, max_pixels) as picture:
        picture.seek(0)
        return to_rgb(picture, paper)


def image_size(source: str | Path | bytes, *, name: str | None = None) -> tuple[int, int]:
    """Read (width, height) of the upright picture from its header alone.

    Raises UnusableImage if that is impossible.
    """
    with _opened(source, name, MAX_PIXELS) as picture:
        width, height = picture.size
        return (height, width) if _lies(picture) else (width, height)


def _lies(picture: Image.Image) -> bool:
    """Return whether the stored rows are the picture's columns, according to EXIF."""
    if picture.format == "TIFF":  # Pillow gives the upright size
        return False
    try:
        # PNG's own getexif would decode all pixels
        return Image.Image.getexif(picture).get(ORIENTATION) in (5, 6, 7, 8)
    except Exception:  # damaged EXIF is treated as absent
        return False


@contextmanager
def _opened(source: str | Path | bytes, name: str | None, max_pixels: int) -> Iterator[Image.Image]:
    """Yield the picture with its header read.

    Any error in reading the header, or in the `with` block, is raised as UnusableImage.
    """
    held = source if isinstance(source, bytes) else Path(source)
    name = name or (str(held) if isinstance(held, Path) else "the picture")
    too_large = f"over the limit of {max_pixels:,} pixels; make it smaller first"
    if isinstance(held, Path):
        _check_file(held, name)
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures; the limit below decides
            warnings.simplefilter("ignore")
            with Image.open(held if isinstance(held, Path) else io.BytesIO(held)) as picture:
                if picture.format not in FORMATS:
                    instead = "give a PNG, JPEG, WebP, GIF, TIFF or the like"
                    raise UnusableImage(
                        name,
                        f"cannot be used: {picture.format} files are not read; {instead}",
                        "no picture",
                    )
                if picture.width * picture.height > max_pixels:
                    raise UnusableImage(
                        name,
                        f"has {picture.width}×{picture.height} pixels, {too_large}",
                        "too large",
                    )
                yield picture
    except UnusableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnusableImage(name, f"is far {too_large}", "too large") from error
    except UnidentifiedImageError as error:
        if not (held.stat().st_size if isinstance(held, Path) else held):
            raise UnusableImage(name, "is empty", "empty") from error
        why = "is not a picture of a known format (PNG, JPEG, WebP, …), or damaged from its start"
        raise UnusableImage(name, why, "no picture") from error
    except PermissionError as error:
        raise UnusableImage(name, "may not be read: permission denied", "not readable") from error
    except Exception as error:  # damaged data makes Pillow's decoders raise nearly anything
        why = f"is damaged, truncated or of a kind that is not read ({first_line(error)})"
        raise UnusableImage(name, why, "damaged") from error


def _check_file(path: Path, name: str) -> None:
    if path.is_dir():
        raise UnusableImage(name, "is a folder; name one picture in it", "no picture")
    if not path.is_file():
        if path.exists():
            raise UnusableImage(name, "is not a file but a device or a pipe", "no picture")
        raise UnusableImage(name, "does not exist", "absent")


def to_rgb(picture: Image.Image, paper: tuple[int, int, int] = WHITE) -> Image.Image:
    """Convert a picture of any Pillow mode to upright RGB, in sRGB colours."""
    stored = picture.format  # which a changed picture forgets
    picture = upright(picture)
    if not picture.width * picture.height:
        raise ImageError(f"a picture of {picture.width}×{picture.height} pixels shows nothing")
    if picture.mode == "La":  # grey multiplied by its alpha, which can only be converted to LA
        picture = picture.convert("LA")
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        full = full_scale(picture, stored)
        picture = Image.fromarray(to_eight_bits(np.asarray(picture), full))
    picture = in_srgb(picture)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in picture.info:
        whole = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, paper), whole).convert("RGB")
    return picture.convert("RGB")


def full_scale(picture: Image.Image, stored: str | None) -> float | None:
    """Return the value of white in a grey picture of more than 8 bits; None if its values tell it.

    stored  format of its file; None if it is in memory only

    Raises ImageError where it cannot be told: a picture in memory of integers up to 255 is of 8
    bits, or a dark one of 16 bits.
    """
    if picture.mode.startswith("I;16") or (picture.mode == "I" and stored == "PPM"):
        return 65535  # Pillow scales a PPM's values of more than 8 bits to 16 bits
    high = np.asarray(picture).max()
    if picture.mode == "I" and stored is None and 1 < high <= 255:
        raise ImageError(
            f"a picture of mode I whose values reach {high} is of 8 bits, or a dark one of 16: "
            "convert it to mode L or I;16, or give its file"
        )
    return None


def in_srgb(picture: Image.Image) -> Image.Image:
    """Convert a picture from its embedded colour profile to sRGB.

    Returns the picture unchanged if it has no profile, or a damaged one.
    """
    held = picture.info.get("icc_profile")
    if not held:
        return picture
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(held))
        whole = (
            picture.convert("RGBA" if "transparency" in picture.info else "RGB")
            if picture.mode == "P"
            else picture
        )
        colours = whole.convert(whole.mode.removesuffix("A"))
        converted = ImageCms.profileToProfile(
            colours, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        # the profile is damaged, or for another colour space than the picture's
        return picture
    assert converted is not None
    if (
        np.asarray(ImageChops.difference(converted, colours.convert("RGB"))).max(initial=0)
        <= ROUNDING
    ):
        return picture  # its colours are sRGB already
    if whole.mode in ("RGBA", "LA"):
        converted.putalpha(whole.getchannel("A"))
    return converted


def upright(picture: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF data states; damaged EXIF data is ignored."""
    picture.load()
    try:
        picture.getexif()
    except Exception:
        return picture
    return ImageOps.exif_transpose(picture)


def to_eight_bits(values: np.ndarray, full: float | None = None) -> np.ndarray:
    """Scale grey values (H, W) from 0 to `full` to 8 bits.

    Without `full`, the range is 8 or 16 bits, whichever holds the values, or else up to their
    maximum; for real numbers up to 1 it is 1.
    """
    finite = np.where(np.isfinite(values), values, 0).clip(0, None).astype(np.float32)
    high = float(finite.max())
    bounds = (1, 255, 65535) if np.issubdtype(values.dtype, np.floating) else (255, 65535)
    full = full or next((bound for bound in bounds if high <= bound), high)
    return (finite / full * 255).round().astype(np.uint8)


def open_mask(source: str | Path | bytes | Image.Image, *, name: str | None = None) -> Image.Image:
    """Load a mask as 8-bit grey: white where it applies, black or transparent where it does not.

    Raises ImageError as `open_image` does. A mask whose only values are 0 and 1 applies where it is
    1.
    """
    mask = open_image(source, name=name, paper=BLACK).convert("L")
    return mask.point(lambda value: 255 * value) if mask.getextrema()[1] == 1 else mask


def grid(pictures: list[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """Arrange pictures of one size in a grid on white."""
    columns = columns or max(1, round(len(pictures) ** 0.5 + 0.49))
    rows = -(-len(pictures) // columns)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), WHITE)
    for number, picture in enumerate(pictures):
        sheet.paste(
            picture, ((number % columns) * (width + gap), (number // columns) * (height + gap))
        )
    return sheet
