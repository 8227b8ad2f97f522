"""Combine image prompts: several pictures as one prompt, and its strength by layer, time and place.

All of this is computed when a prompt is made; a sampling step still runs one attention for each
prompt.

Shape letters as in `imprompt.adapter`; K pictures, T timesteps of the noise schedule that the base
model was trained with.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from imprompt.adapter import KV, ImagePrompt
from imprompt.errors import MismatchError, SettingError
from imprompt.generation.blocks import BlockMap, Blocks, block_map, finite_number
from imprompt.generation.settings import OverlapName
from imprompt.images import open_mask
from imprompt.validation import suggestions

# When.

Curve = Sequence[Sequence[float]]  # [[progress, factor], ...]

# name -> factor at x, 0 where the window begins and 1 where it ends. "ease in" and "ease out" add
# up to 1, as do the last two: two pictures with these easings fade into one another.
EASINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "constant": np.ones_like,
    # from 0 to 1: slow at both ends
    "ease in": lambda x: np.sin(np.pi / 2 * x) ** 2,
    "ease out": lambda x: np.cos(np.pi / 2 * x) ** 2,  # from 1 to 0
    "ease in-out": lambda x: np.sin(np.pi * x) ** 2,  # 1 in the middle, 0 at both ends
    # 0 in the middle, 1 at both ends
    "reverse in-out": lambda x: np.cos(np.pi * x) ** 2,
}


POINTS = 1000  # points of the schedule at which a scale that changes with time is given


def over_time(
    start: float = 0, end: float = 1, easing: str | Curve = "constant", points: int = POINTS
) -> Tensor:
    """Return how strongly a prompt applies at `points` points of progress from 0 to 1, (points,).

    Progress is 0 at the noisiest timestep and 1 at the last, so the table fits any scheduler and
    any number of steps. A prompt applies while start <= progress < end; with an end of 1, until the
    last point. `easing` is one of EASINGS, over that window, or points (progress of the whole
    schedule, factor), joined by straight lines and constant before the first and after the last.
    Raise SettingError for other values.
    """
    if not 0 <= finite_number("start", start) < finite_number("end", end) <= 1:
        raise SettingError(
            f"start = {start}, end = {end}: give 0 <= start < end <= 1, fractions of the schedule"
        )
    progress = np.arange(points) / (points - 1)
    heard = (progress >= start) & ((progress < end) | (end == 1))
    if isinstance(easing, str):
        if easing not in EASINGS:
            raise SettingError(f"unknown easing {easing!r}{suggestions(easing, EASINGS)}")
        factors = EASINGS[easing](np.clip((progress - start) / (end - start), 0, 1))
    else:
        factors = np.interp(progress, *checked_points(easing))
    return torch.from_numpy(np.where(heard, factors, 0)).float()


def checked_points(points: Curve) -> tuple[list[float], list[float]]:
    """Return all progresses and all factors of an easing given as points; SettingError."""
    if not points or not all(isinstance(point, Sequence) and len(point) == 2 for point in points):
        raise SettingError(f"easing = {points!r}: give a name, or points [[progress, factor], ...]")
    times, factors = (
        [finite_number("easing", value) for value in values] for values in zip(*points, strict=True)
    )
    if times != sorted(times) or times[0] < 0 or times[-1] > 1:
        raise SettingError(
            f"easing: the points' progress is {times}; give rising numbers from 0 to 1"
        )
    return times, factors


def scale_table(
    layers: Sequence[str],
    scale: float = 1.0,
    blocks: Blocks = "linear",
    boost: float = 1.0,
    start: float = 0,
    end: float = 1,
    easing: str | Curve = "constant",
    points: int = POINTS,
) -> tuple[BlockMap, Tensor]:
    """Return the blocks, and scale × block × time as the table for `ImagePrompt.scale`.

    The table is (layers, 1), or (layers, 1, T) where the strength changes with time.
    """
    block = block_map(layers, blocks, boost)
    table = finite_number("scale", scale) * block.factors[:, None]
    if (start, end, easing) == (0, 1, "constant"):
        return block, table
    return block, table[..., None] * over_time(start, end, easing, points)


# Several pictures as one prompt.


class Combined(NamedTuple):
    """Features of one or more pictures after they were combined, and a weight for each."""

    features: Tensor | tuple[Tensor, ...]
    weights: list[float]


def mean(features: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean (1, ...) of features (K, ...) with weights (K, 1, ...)."""
    return (features * (weights / weights.sum())).sum(0, keepdim=True)


def norm_average(features: Tensor, weights: Tensor) -> Tensor:
    """Return the mean direction at the mean length.

    A plain average of different features is shorter than each of them.
    """
    lengths = features.norm(dim=-1, keepdim=True)
    return F.normalize(mean(F.normalize(features, dim=-1), weights), dim=-1) * mean(
        lengths, weights
    )


# how -> (features (K, ..., E), positive weights (K, 1, ...)) -> (1, ..., E). Max and min only use
# whether a weight is 0.
COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # all tokens are concatenated and weighted in the attention: see `concat`
    "concat": lambda features, _: features,
    "add": lambda features, weights: (features * weights).sum(0, keepdim=True),
    "subtract": lambda features, weights: (
        features[:1] * weights[:1] - (mean(features[1:], weights[1:]) if len(features) > 1 else 0)
    ),
    "average": mean,
    "norm-average": norm_average,
    "max": lambda features, _: features.amax(0, keepdim=True),
    "min": lambda features, _: features.amin(0, keepdim=True),
}
SIGNED = ("add",)  # these allow weights below 0


def combine(
    features: Tensor | tuple[Tensor, ...],
    how: str = "concat",
    weights: Sequence[float] | None = None,
) -> Combined:
    """Combine features (K, ..., E) of several pictures to one, or for "concat" to several.

    "concat" keeps all pictures that have a weight, and returns their weights. Each part of a tuple
    is combined in the same way. A picture of weight 0 counts as absent for every `how`. Raise
    SettingError for an unknown `how`, a number of weights that is not that of the pictures, all
    weights 0, or a weight below 0 where that has no meaning.
    """
    if how not in COMBINE:
        raise SettingError(f"combine = {how!r} is unknown{suggestions(how, COMBINE)}")
    several = features if isinstance(features, tuple) else (features,)
    given = checked_weights(len(several[0]), weights, signed=how in SIGNED, of=how)
    present = [i for i, weight in enumerate(given) if weight]
    left = [given[i] for i in present]
    combined = tuple(
        COMBINE[how](f[present], f.new_tensor(left).view(-1, *[1] * (f.ndim - 1))) for f in several
    )
    return Combined(
        combined if isinstance(features, tuple) else combined[0], left if how == "concat" else [1.0]
    )


def concat(tokens: Tensor, weights: Sequence[float] | None = None) -> tuple[Tensor, Tensor | None]:
    """Join image tokens (K, N, D) of K pictures to (1, K·N, D), and return their bias or None.

    The bias, for `ImagePrompt.bias`, holds the logarithms of the weights, (1, K·N); equal weights
    need none. A picture of weight 2 counts as if it were given twice, one of weight 0 as if it were
    not given.
    """
    given = checked_weights(len(tokens), weights, signed=False, of="concat")
    present = [i for i, weight in enumerate(given) if weight]
    bias = token_bias([given[i] for i in present], tokens.shape[1])
    joined = tokens[present].flatten(0, 1)[None]
    return joined, None if bias is None else bias.to(tokens)


def token_bias(weights: Sequence[float], count: int) -> Tensor | None:
    """Return the bias (1, K·N) of pictures with these weights, each of N = `count` image tokens.

    It is None if all have the same weight.
    """
    if len({*weights}) == 1:
        return None
    logarithms = torch.tensor([math.log(weight) for weight in weights], dtype=torch.float64)
    return logarithms.repeat_interleave(count)[None]


def checked_weights(
    pictures: int, weights: Sequence[float] | None, signed: bool, of: str
) -> list[float]:
    """Return one weight for each picture, 1 if none is given; SettingError."""
    if weights is None:
        return [1.0] * pictures
    if len(weights) != pictures:
        raise SettingError(f"{len(weights)} weights for {pictures} pictures: give one for each")
    given = [finite_number("weight", weight) for weight in weights]
    if not any(given):
        raise SettingError(
            "all weights are 0: no picture is left; leave the image prompt out, or give one a "
            "weight"
        )
    if min(given) < 0 and not signed:
        raise SettingError(
            f"weight {min(given)}: {of} takes none below 0; to take a picture away use "
            '"subtract", or "add"'
        )
    return given


# How a scale acts.


class Scaling(NamedTuple):
    """Rule for what a prompt's weight multiplies: keys and values, or keys and the values' mean."""

    apply: Callable[[Tensor, Tensor, Tensor], KV]
    penalty: bool  # narrow layers get less: w·C/1280, C the width of the layer


def by_both(key: Tensor, value: Tensor, weight: Tensor) -> KV:
    """Multiply keys and values by the weight."""
    return key * weight, value * weight


def by_mean(key: Tensor, value: Tensor, weight: Tensor) -> KV:
    """Multiply the keys and the mean of the values over tokens by the weight."""
    average = value.mean(2, keepdim=True)
    return key * weight, value - average + average * weight


WIDEST = 1280  # width of the widest layers of SD 1.x and SDXL

# The embeds scalings of ComfyUI_IPAdapter_plus. "V only" is the paper's equation 8, which scales
# the attention's result: nothing to do.
SCALINGS: dict[str, Scaling | None] = {
    "V only": None,
    "K+V": Scaling(by_both, penalty=False),
    "K+V w/ C penalty": Scaling(by_both, penalty=True),
    "K+mean(V) w/ C penalty": Scaling(by_mean, penalty=True),
}


def scaled(prompt: ImagePrompt, how: str) -> ImagePrompt:
    """Return the prompt with its scale moved into keys and values by one of SCALINGS; SettingError.

    A scale that changes with time still does: its greatest magnitude over time goes into keys and
    values, and the ratio to that remains as the scale. At a scale of 0 the prompt has no effect.
    """
    if how not in SCALINGS:
        raise SettingError(f"unknown scaling {how!r}{suggestions(how, SCALINGS)}")
    if (row := SCALINGS[how]) is None:
        return prompt
    scale = prompt.scale
    most = (
        scale if scale.ndim == 2 else scale.gather(2, scale.abs().argmax(2, keepdim=True))[..., 0]
    )
    states = []
    for key, value, weight in zip(prompt.keys, prompt.values, most, strict=True):
        width = key.shape[1] * key.shape[3]
        states.append(
            row.apply(
                key,
                value,
                (weight * (width / WIDEST if row.penalty else 1)).to(key)[:, None, None, None],
            )
        )
    keys, values = zip(*states, strict=True)
    ratio = scale / torch.where(most == 0, 1, most).view(*most.shape, *[1] * (scale.ndim - 2))
    return prompt._replace(keys=keys, values=values, scale=ratio)


def with_negative_layers(prompt: ImagePrompt, negative: Tensor, guided: bool) -> ImagePrompt:
    """Return the prompt so that guidance moves away from it at the layers `negative` (layers,).

    There the unconditional half is conditioned on what the conditional half would have been, and
    the conditional half on nothing. Without guidance there are no halves, and these layers are
    inactive. Mask and bias stay, because they must be equal in both halves.
    """
    if not negative.any():
        return prompt
    turned = negative.to(prompt.scale.device).view(-1, *[1] * (prompt.scale.ndim - 1))
    if not guided:
        return prompt._replace(scale=prompt.scale.masked_fill(turned, 0))
    first, second = guidance_halves(prompt.scale, 1)
    scale = torch.cat([torch.where(turned, second, first), second.masked_fill(turned, 0)], 1)

    def heard(states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        pairs = zip(states, negative.tolist(), strict=True)
        return tuple(
            torch.cat([guidance_halves(state)[1]] * 2)
            if turn
            else torch.cat(guidance_halves(state))
            for state, turn in pairs
        )

    return prompt._replace(keys=heard(prompt.keys), values=heard(prompt.values), scale=scale)


def guidance_halves(x: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """Split a batch into its unconditional and its conditional half.

    A batch of one counts as both halves.
    """
    if x.shape[axis] == 1:
        return x, x
    first, second = x.chunk(2, axis)
    return first, second


# Where.


def as_mask(mask: Any) -> Tensor:
    """Return a mask (1, h, w) with values from 0 to 1 from any kind of mask; MismatchError.

    `mask` is a picture (the prompt applies where it is white), a file, or an array or tensor (h, w)
    or (1, h, w) with values from 0 to 1.
    """
    if isinstance(mask, str | Path | Image.Image):
        mask = np.asarray(open_mask(mask), dtype=np.float32) / 255
    found = (
        mask.float()
        if isinstance(mask, Tensor)
        else torch.from_numpy(np.array(mask, dtype=np.float32))
    )
    if found.ndim < 2 or found.shape[:-2] not in ((), (1,)) or not found.numel():
        raise MismatchError(
            f"mask of shape {list(found.shape)}: give rows and columns, (h, w) or (1, h, w)"
        )
    found = found.view(1, *found.shape[-2:])
    if not (found.min() >= 0 and found.max() <= 1):
        raise MismatchError(
            f"mask with values from {found.min():g} to {found.max():g}: give 0 (no effect) to 1"
        )
    if not found.any():
        raise MismatchError("a mask that is 0 everywhere: the image prompt would apply nowhere")
    return found


def regions(masks: Sequence[Any], overlap: str = "add") -> list[Tensor | None]:
    """Return the masks of several prompts, each (1, h, w) as from `as_mask`, None for everywhere.

    Where they overlap, each prompt applies in full ("add"), or they share ("normalise": divided by
    their sum where that is above 1). Raise SettingError for another `overlap`.
    """
    if overlap not in OVERLAPS:
        raise SettingError(f"unknown overlap {overlap!r}{suggestions(overlap, OVERLAPS)}")
    given = [None if mask is None else as_mask(mask) for mask in masks]
    sizes = [mask.shape[1:] for mask in given if mask is not None]
    size = tuple(max(sides) for sides in zip(*sizes, strict=True)) if sizes else (1, 1)
    given_masks = [
        torch.ones(1, *size) if mask is None else F.interpolate(mask[None], size, mode="area")[0]
        for mask in given
    ]
    total = torch.stack(given_masks).sum(0) if given_masks else torch.zeros(1)
    return (
        given
        if overlap == "add" or total.max() <= 1
        else [mask / total.clamp(min=1) for mask in given_masks]
    )


OVERLAPS = get_args(OverlapName)
