"""Which cross-attentions hear an image prompt: a map, pattern -> factor, and the presets that are
known by name on top of it.

A pattern is a dotted beginning of a site's name, with `*` for any one part:
"up_blocks.0.attentions.1", "down_blocks", "*". Of the patterns that match a site the longest
counts, in parts; then the one of the fewest stars. What none matches hears nothing.
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
    """How strongly each site hears an image prompt, and in which half of guidance."""

    factors: Tensor  # (sites,)
    # (sites,) bool: the unconditional half hears the picture instead, so that guidance pushes away
    # from it
    negative: Tensor


def presets() -> dict[str, str]:
    """name -> what it means, in a line"""
    return {name: row.meaning for name, row in PRESETS.items()}


def block_map(layers: Sequence[str], blocks: Blocks = "linear", boost: float = 1.0) -> BlockMap:
    """How strongly each of these sites (names of cross-attentions, in the base model's order) hears
    an image prompt.

    `blocks` is a preset's name, one factor for all, a map, or diffusers' nested dictionary of
    "down", "mid" and "up" (a list has a factor for each `attentions.j`; what is not named is 0).
    `boost` multiplies what `presets()` says. SettingError for an unknown preset, one without a
    table for this model or without a use for `boost`, and for a pattern that matches no site.
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
    """The number that the pattern which counts gives each site, 0 where none matches: (sites,)"""
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
    """Of the patterns that match one site the greatest counts; no two are equal."""
    named = [part != "*" for part in pattern.split(".")]
    return len(named), sum(named), named


def matches(pattern: str, layer: str) -> bool:
    parts, own = pattern.split("."), layer.split(".")
    return len(parts) <= len(own) and all(
        part in ("*", name) for part, name in zip(parts, own, strict=False)
    )


def transformers(layers: Iterable[str]) -> list[str]:
    """The transformers that the sites stand in, such as "mid_block.attentions.0", in the order in
    which the model runs them.
    """
    found = dict.fromkeys(layer.split(".transformer_blocks.")[0] for layer in layers)
    # down, mid, up; registered as down, up, mid
    return sorted(found, key=lambda name: name.split("_")[0])


def preset_for(name: str, layers: Sequence[str]) -> Strengths:
    """What the preset of that name says about these sites."""
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
    """A user's own map, after its patterns and numbers were looked at."""
    if not isinstance(blocks, Mapping):
        return {"*": finite_number("blocks", blocks)}
    own = unnested(blocks, layers) if NESTED.keys() & blocks else blocks
    for pattern in own:
        if not any(matches(pattern, layer) for layer in layers):
            raise SettingError(
                f"blocks {pattern!r}: no cross-attention's name begins "
                f"so{suggestions(pattern, beginnings(layers))}"
            )
    return {
        pattern: finite_number(f"blocks {pattern!r}", factor) for pattern, factor in own.items()
    }


NESTED = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}


def unnested(blocks: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """diffusers' nested dictionary as a map from transformers.

    Its meaning is that of `set_ip_adapter_scale`.
    """
    flat: dict[str, Any] = {}
    for part, given in blocks.items():
        if part not in NESTED:
            raise SettingError(
                f"blocks {part!r} beside {' and '.join(NESTED.keys() & blocks)}: known are "
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
                    f"blocks {part!r}: no cross-attention in {block!r}, there are in "
                    f"{', '.join(members) or 'none'}"
                )
            flat |= dict(zip(members[block], one_each(factors, members[block]), strict=True))
    return flat


def one_each(factors: Any, names: Sequence[str]) -> Sequence[Any]:
    given = factors if isinstance(factors, list | tuple) else [factors]
    if len(given) not in (1, len(names)):
        raise SettingError(
            f"blocks: {len(given)} factors for the {len(names)} attentions {', '.join(names)}"
        )
    return given if len(given) == len(names) else [*given] * len(names)


def finite_number(what: str, value: Any) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond any float
        pass
    raise SettingError(f"{what} = {reprlib.repr(value)}: give a number")


def beginnings(layers: Iterable[str]) -> dict[str, None]:
    """All that a pattern could be, without stars and transformer blocks."""
    parts = [name.split(".") for name in transformers(layers)]
    return dict.fromkeys(
        ".".join(name[:length]) for name in parts for length in range(1, len(name) + 1)
    )
