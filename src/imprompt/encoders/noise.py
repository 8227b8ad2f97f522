"""Make noise from a picture, for use as a negative image prompt."""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from imprompt.encoders.choices import Noise, NoiseKind
from imprompt.encoders.preparation import encoder_square, framed, mean_colour, side_of

Pixels = np.ndarray  # (S, S, 3) float64, of 0 to 1


def noise_negative(
    image: Image.Image | None, noise: Noise, encoder: Any, seed: int = 0
) -> Image.Image:
    """Make noise from the square that the encoder sees of an RGB picture.

    Without a picture, it is made from the encoder's mean colour. `encoder` has transformers' image
    processor as `.processor`. The same seed gives the same noise.
    """
    processor = encoder.processor
    side = side_of(processor)
    square = (
        Image.new("RGB", (side, side), mean_colour(processor))
        if image is None
        else encoder_square(image, processor)
    )
    made = KINDS[noise.kind](np.asarray(square) / 255, noise.strength, np.random.default_rng(seed))
    picture = Image.fromarray((made.clip(0, 1) * 255).round().astype(np.uint8))
    blurred = picture.filter(ImageFilter.GaussianBlur(noise.blur)) if noise.blur else picture
    return framed(blurred, processor)


def _faded(pixels: Pixels, strength: float, draw: np.random.Generator) -> Pixels:
    """Mix the picture with uniform noise."""
    return pixels * (1 - strength) + draw.random(pixels.shape) * strength


def _dissolved(pixels: Pixels, strength: float, draw: np.random.Generator) -> Pixels:
    """Replace each value by uniform noise with probability `strength`."""
    return np.where(draw.random(pixels.shape) < strength, draw.random(pixels.shape), pixels)


def _gaussian(pixels: Pixels, strength: float, draw: np.random.Generator) -> Pixels:
    """Add normal noise."""
    return pixels + strength * draw.standard_normal(pixels.shape)


def _shuffled(pixels: Pixels, strength: float, draw: np.random.Generator) -> Pixels:
    """Displace the pixels elastically, rotate the picture by 180° and blend it with normal noise.

    The blend is x·(1 − n) + n with n = 0.75·strength·normal. So the colours stay, the positions do
    not. The displacement (Simard et al. 2003) is uniform noise of a sixth of the side, smoothed by
    a Gaussian whose sigma falls from a 64th of the side at strength 0 to 0 at strength 1.
    """
    side = len(pixels)
    away = [
        _smooth(draw.uniform(-1, 1, (side, side)), (1 - strength) * side / 64) * side / 6
        for _ in range(2)
    ]
    rows, columns = np.indices((side, side))
    turned = _sampled(pixels, rows + away[0], columns + away[1])[::-1, ::-1]
    mixed = 0.75 * strength * draw.standard_normal(pixels.shape)
    return turned * (1 - mixed) + mixed


def _smooth(field: np.ndarray, sigma: float) -> np.ndarray:
    """Blur a field (S, S) by a Gaussian of `sigma` pixels; its edge values continue outside."""
    reach = round(4 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-6)) ** 2)
    kernel /= kernel.sum()
    for axis in range(2):
        around = np.pad(
            field, [(reach, reach) if axis == other else (0, 0) for other in range(2)], "edge"
        )
        field = np.lib.stride_tricks.sliding_window_view(around, len(kernel), axis) @ kernel
    return field


def _sampled(pixels: Pixels, rows: np.ndarray, columns: np.ndarray) -> Pixels:
    """Return the pixels at these rows and columns, both (S, S), with bilinear interpolation.

    Positions outside the picture take the nearest edge.
    """
    side = len(pixels)
    rows, columns = rows.clip(0, side - 1), columns.clip(0, side - 1)
    top, left = (np.floor(place).astype(int) for place in (rows, columns))
    down, right = ((rows - top)[..., None], (columns - left)[..., None])
    bottom, beyond = (np.minimum(place + 1, side - 1) for place in (top, left))
    upper = pixels[top, left] * (1 - right) + pixels[top, beyond] * right
    lower = pixels[bottom, left] * (1 - right) + pixels[bottom, beyond] * right
    return upper * (1 - down) + lower * down


KINDS: dict[NoiseKind, Callable[[Pixels, float, np.random.Generator], Pixels]] = {
    "fade": _faded,
    "dissolve": _dissolved,
    "gaussian": _gaussian,
    "shuffle": _shuffled,
}
