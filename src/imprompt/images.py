"""Pictures from files, made safe and plain: RGB, upright, of a bearable size."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from imprompt.errors import ImageError

MAX_PIXELS = 100_000_000
PAPER = (255, 255, 255)  # what transparent parts are laid on


def open_image(source: str | Path | Image.Image, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture as upright 8-bit RGB; ImageError with one line if that cannot be.

    Animations give their first frame, transparency is laid on white, 16-bit values are scaled to 8.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    path = Path(source)
    if path.is_dir():
        raise ImageError(f"{path} is a folder; name one picture in it")
    if not path.exists():
        raise ImageError(f"{path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; the limit below decides
            with Image.open(path) as picture:
                if picture.width * picture.height > max_pixels:
                    raise ImageError(
                        f"{path} has {picture.width}×{picture.height} pixels, over the limit of {max_pixels // 1_000_000} million; "
                        "make it smaller first"
                    )
                picture.seek(0)
                return to_rgb(picture)
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{path} is far larger than the limit of {max_pixels // 1_000_000} million pixels; make it smaller first"
        ) from error
    except UnidentifiedImageError as error:
        kind = "is empty" if path.stat().st_size == 0 else "is not a picture in a format that is known (PNG, JPEG, WebP, …)"
        raise ImageError(f"{path} {kind}") from error
    except PermissionError as error:
        raise ImageError(f"{path} may not be read: permission denied") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on damaged data
        raise ImageError(f"{path} is damaged or truncated ({error})") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode of Pillow -> upright RGB."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = Image.fromarray(to_eight_bits(np.asarray(picture)))
    if picture.mode == "RGB":
        return picture.copy()
    if picture.mode in ("P", "PA", "LA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.mode == "RGBA":
        paper = Image.new("RGBA", picture.size, PAPER)
        return Image.alpha_composite(paper, picture).convert("RGB")
    return picture.convert("RGB")


def to_eight_bits(values: np.ndarray) -> np.ndarray:
    """16-bit and wider grey values (H, W) -> 8-bit; values that fit 8 bits already stay as they are."""
    high = float(values.max(initial=0))
    full = 255.0 if high <= 255 else 65535.0 if high <= 65535 else high
    return (np.clip(values.astype(np.float64), 0, None) / full * 255).round().astype(np.uint8)


def open_mask(source: str | Path | Image.Image) -> Image.Image:
    """A mask as 8-bit grey: white where the picture is to be painted anew."""
    return open_image(source).convert("L")


def grid(pictures: list[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """Pictures of one size, side by side on white."""
    columns = columns or max(1, round(len(pictures) ** 0.5 + 0.49))
    rows = -(-len(pictures) // columns)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), PAPER)
    for number, picture in enumerate(pictures):
        sheet.paste(picture, ((number % columns) * (width + gap), (number // columns) * (height + gap)))
    return sheet
