"""Factors that set how strongly an image prompt applies in each cross-attention layer.

They are a map from patterns to factors, or a preset: a map that is known by name.

A pattern is a dotted beginning of a layer's name, with `*` for any one part:
"up_blocks.0.attentions.1", "down_blocks", "*". Of the patterns that match a layer, the one with the
most parts counts; among equals, the one with the fewest stars. A layer that no pattern matches has
factor 0.
"""

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imprompt.errors import SettingError
from imprompt.families.unet_layers import SD, SDXL, layer_names
from imprompt.families.unet_presets import PRESETS, Map, Strengths, Tables
from imprompt.validation import suggestions

# a preset's name, one factor for all, a map, or diffusers' nested dictionary
Blocks = str | float | Mapping[str, Any]


class BlockMap(NamedTuple):
    """Factor of an image prompt in each layer, and whether guidance moves away from it there."""

    factors: Tensor  # (layers,)
    # (layers,) bool: the picture conditions the unconditional half instead, so that guidance moves
    # away from it
    negative: Tensor


def presets() -> dict[str, str]:
    """Return a mapping from each preset's name to a one-line description."""
    return {name: row.meaning for name, row in PRESETS.items()}


def block_map(layers: Sequence[str], blocks: Blocks = "linear", boost: float = 1.0) -> BlockMap:
    """Return how strongly an image prompt applies in each of these layers.

    `layers` are names of cross-attention layers, in the base model's order. `blocks` is a preset's
    name, one factor for all, a map, or diffusers' nested dictionary of "down", "mid" and "up" (a
    list has a factor for each `attentions.j`; what is not named is 0). `boost` multiplies the
    factors that `presets()` describes as boosted. Raise SettingError for an unknown preset, a
    preset without a table for this model or without a use for `boost`, and a pattern that matches
    no layer.
    """
    strengths = (
        preset_for(blocks, layers)
        if isinstance(blocks, str)
        else Strengths(checked_map(blocks, layers))
    )
    if finite_number("boost", boost) != 1 and not strengths.boosted:
        with_boost = (
            name
            for name, row in PRESETS.items()
            if isinstance(row.strengths, Tables) and row.strengths.sdxl.boosted
        )
        raise SettingError(
            f"boost = {boost} has nothing to multiply here; it is for "
            f"{', '.join(map(repr, with_boost))}"
        )
    factors = {
        **strengths.factors,
        **{pattern: factor * boost for pattern, factor in strengths.boosted.items()},
    }
    return BlockMap(for_layers(factors, layers), for_layers(strengths.negative, layers) > 0)


def for_layers(pattern_map: Map, layers: Sequence[str]) -> Tensor:
    """Return for each layer the number of its best pattern, (layers,); 0 where none matches."""
    ranked = sorted(pattern_map, key=rank, reverse=True)
    return torch.tensor(
        [
            next(
                (float(pattern_map[pattern]) for pattern in ranked if matches(pattern, layer)), 0.0
            )
            for layer in layers
        ]
    )


def rank(pattern: str) -> tuple[int, int, list[bool]]:
    """Return a sort key: of all patterns that match a layer, the one with the greatest counts."""
    named = [part != "*" for part in pattern.split(".")]
    return len(named), sum(named), named


def matches(pattern: str, layer: str) -> bool:
    """Return whether a layer's name begins with a pattern, part by part."""
    parts, own = pattern.split("."), layer.split(".")
    return len(parts) <= len(own) and all(
        part in ("*", name) for part, name in zip(parts, own, strict=False)
    )


# parts of a model that it runs in another order than they are registered in
ORDER = {"down": 0, "mid": 1, "up": 2}


def transformers(layers: Iterable[str]) -> list[str]:
    """Return the transformers that contain the layers, such as "mid_block.attentions.0".

    They are in the order in which the model runs them.
    """
    found = dict.fromkeys(layer.split(".transformer_blocks.")[0] for layer in layers)
    return sorted(found, key=lambda name: ORDER.get(name.split("_")[0], 0))


def preset_for(name: str, layers: Sequence[str]) -> Strengths:
    """Return the factors of the preset of that name for these layers; SettingError."""
    if name not in PRESETS:
        raise SettingError(f"unknown blocks {name!r}{suggestions(name, PRESETS)}")
    strengths, found = PRESETS[name].strengths, transformers(layers)
    if isinstance(strengths, Strengths):
        return strengths
    if isinstance(strengths, Tables):
        for structure, table in zip((SD, SDXL), strengths, strict=True):
            if found == transformers(layer_names(structure)):
                return table
        raise SettingError(
            f"blocks {name!r} are known for SD 1.x and SDXL only; for this model give a map, such "
            f"as {{{found[-1]!r}: 1.0}}"
        )
    return Strengths(
        {transformer: strengths(index / len(found)) for index, transformer in enumerate(found)}
    )


def checked_map(blocks: float | Mapping[str, Any], layers: Sequence[str]) -> Map:
    """Return a user's blocks as a map with checked patterns and numbers; SettingError."""
    if not isinstance(blocks, Mapping):
        return {"*": finite_number("blocks", blocks)}
    own = unnested(blocks, layers) if NESTED.keys() & blocks else blocks
    for pattern in own:
        if not any(matches(pattern, layer) for layer in layers):
            raise SettingError(
                f"blocks {pattern!r}: no cross-attention layer's name begins "
                f"with it{suggestions(pattern, beginnings(layers))}"
            )
    return {
        pattern: finite_number(f"blocks {pattern!r}", factor) for pattern, factor in own.items()
    }


NESTED = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}


def unnested(blocks: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """Convert diffusers' nested dictionary to a map from transformers to factors.

    It means what it means in diffusers' `set_ip_adapter_scale`.
    """
    flat: dict[str, Any] = {}
    for part, given in blocks.items():
        if part not in NESTED:
            raise SettingError(
                f"blocks {part!r} together with {' and '.join(NESTED.keys() & blocks)}: known are "
                f"{', '.join(NESTED)}"
            )
        members: dict[str, list[str]] = {}
        for name in transformers(layers):
            head, index = name.split(".")[:2]
            if head == NESTED[part]:
                members.setdefault(f"block_{index}" if index.isdigit() else part, []).append(name)
        for block, factors in (
            given if isinstance(given, Mapping) else dict.fromkeys(members, given)
        ).items():
            if block not in members:
                raise SettingError(
                    f"blocks {part!r}: no cross-attention in {block!r}; blocks that "
                    f"have one: {', '.join(members) or 'none'}"
                )
            flat |= dict(zip(members[block], one_each(factors, members[block]), strict=True))
    return flat


def one_each(factors: Any, names: Sequence[str]) -> Sequence[Any]:
    """Return one factor for each name: a single factor is repeated; SettingError."""
    given = factors if isinstance(factors, list | tuple) else [factors]
    if len(given) not in (1, len(names)):
        raise SettingError(
            f"blocks: {len(given)} factors for the {len(names)} attentions {', '.join(names)}"
        )
    return given if len(given) == len(names) else [*given] * len(names)


def finite_number(what: str, value: Any) -> float:
    """Return `value` as a float; SettingError, naming `what`, unless it is a finite number."""
    try:
        if not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond any float
        pass
    raise SettingError(f"{what} = {reprlib.repr(value)}: give a number")


def beginnings(layers: Iterable[str]) -> dict[str, None]:
    """Return every possible pattern without stars and transformer blocks, in order."""
    parts = [name.split(".") for name in transformers(layers)]
    return dict.fromkeys(
        ".".join(name[:length]) for name in parts for length in range(1, len(name) + 1)
    )
