"""Pictures from files, made safe and plain: RGB, upright, of a bearable size."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from imprompt.errors import ImageError, first_line

MAX_PIXELS = 100_000_000
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
# Of Pillow's formats those that decode here and now: EPS and the like would start other programs.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "DIB", "PPM", "TGA", "ICO", "JPEG2000")


def open_image(
    source: str | Path | Image.Image, *, max_pixels: int = MAX_PIXELS, paper: tuple[int, int, int] = WHITE
) -> Image.Image:
    """A picture as upright 8-bit RGB; ImageError with one line if that cannot be.

    Animations give their first frame, transparency is laid on `paper`, 16-bit values are scaled to 8.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source, paper)
    path = Path(source)
    if path.is_dir():
        raise ImageError(f"{path} is a folder; name one picture in it")
    if not path.is_file():
        raise ImageError(f"{path} is no file, but a device or a pipe" if path.exists() else f"{path} does not exist")
    too_large = f"over the limit of {max_pixels:,} pixels; make it smaller first"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; the limit below decides
            with Image.open(path) as picture:
                if picture.format not in FORMATS:
                    raise ImageError(f"{path}: {picture.format} files are not read; give a PNG, JPEG, WebP, GIF, TIFF or the like")
                if picture.width * picture.height > max_pixels:
                    raise ImageError(f"{path} has {picture.width}×{picture.height} pixels, {too_large}")
                picture.seek(0)
                return to_rgb(picture, paper)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is far {too_large}") from error
    except UnidentifiedImageError as error:
        kind = "is not a picture of a known format (PNG, JPEG, WebP, …), or damaged from its start"
        raise ImageError(f"{path} {kind if path.stat().st_size else 'is empty'}") from error
    except PermissionError as error:
        raise ImageError(f"{path} may not be read: permission denied") from error
    except Exception as error:  # damaged data makes Pillow's decoders raise nearly anything
        raise ImageError(f"{path} is damaged, truncated or of a kind that is not read ({first_line(error)})") from error


def to_rgb(picture: Image.Image, paper: tuple[int, int, int] = WHITE) -> Image.Image:
    """Any mode of Pillow -> upright RGB."""
    picture = upright(picture)
    if not picture.width * picture.height:
        raise ImageError(f"a picture of {picture.width}×{picture.height} pixels shows nothing")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray(to_eight_bits(np.asarray(picture), 65535))
    elif picture.mode in ("I", "F"):
        picture = Image.fromarray(to_eight_bits(np.asarray(picture)))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in picture.info:
        whole = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, paper), whole).convert("RGB")
    return picture.convert("RGB")


def upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF says; as it is where that is damaged."""
    picture.load()
    try:
        picture.getexif()
    except Exception:
        return picture
    return ImageOps.exif_transpose(picture)


def to_eight_bits(values: np.ndarray, full: float | None = None) -> np.ndarray:
    """Grey values (H, W) of 0 to `full` -> 8-bit. Without `full` they are taken for those of 8 bits, 16 bits or what they fill."""
    finite = np.where(np.isfinite(values), values, 0).clip(0, None).astype(np.float32)
    high = float(finite.max())
    full = full or next((bound for bound in (255, 65535) if high <= bound), high)
    return (finite / full * 255).round().astype(np.uint8)


def open_mask(source: str | Path | Image.Image) -> Image.Image:
    """A mask as 8-bit grey: white where the picture is to be painted anew, black or transparent where not."""
    return open_image(source, paper=BLACK).convert("L")


def grid(pictures: list[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """Pictures of one size, side by side on white."""
    columns = columns or max(1, round(len(pictures) ** 0.5 + 0.49))
    rows = -(-len(pictures) // columns)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), WHITE)
    for number, picture in enumerate(pictures):
        sheet.paste(picture, ((number % columns) * (width + gap), (number // columns) * (height + gap)))
    return sheet
