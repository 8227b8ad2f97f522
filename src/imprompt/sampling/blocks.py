"""Which cross-attentions hear an image prompt: a map, pattern -> factor, and the presets that are known by name on top of it.

A pattern is a dotted beginning of a site's name, with `*` for any one part: "up_blocks.0.attentions.1", "down_blocks", "*". Of the
patterns that match a site the longest counts, in parts; then the one of the fewest stars. What none matches hears nothing.
"""

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imprompt.checked import near
from imprompt.errors import SettingError
from imprompt.layouts import SD, SDXL, site_names

Map = Mapping[str, float]  # pattern -> factor
Blocks = str | float | Mapping[str, Any]  # a preset's name, one factor for all, a map, or diffusers' nested dictionary
NOTHING: Map = MappingProxyType({})


class BlockMap(NamedTuple):
    """How strongly each site hears an image prompt, and in which half of guidance."""

    factors: Tensor  # (sites,)
    away: Tensor  # (sites,) bool: the unconditional half hears the picture instead, so that guidance pushes away from it


class Strengths(NamedTuple):
    """What a preset says. factors: pattern -> factor; boosted: the same, times the caller's boost; away: see `BlockMap`."""

    factors: Map
    boosted: Map = NOTHING
    away: Map = NOTHING  # pattern -> 1 or 0


class Tables(NamedTuple):
    """A preset whose blocks are known for two structures of base model."""

    sd: Strengths
    sdxl: Strengths


class Preset(NamedTuple):
    """One row. A function of depth, 0 at the first transformer and 1 after the last, is for any UNet."""

    meaning: str
    heard: Strengths | Callable[[float], float] | Tables


# What the node packs found: in SDXL layout and style live in one transformer each, in SD 1.x they are spread.
LAYOUT, STYLE = "down_blocks.2.attentions.1", "up_blocks.0.attentions.1"
SD_LAYOUT = {"down_blocks.2.attentions.0": 0.25, "down_blocks.2.attentions.1": 1.0}
SD_STYLE = {"down_blocks.0": 1.0, "down_blocks.1": 1.0, "up_blocks.1.attentions.2": 1.0, "up_blocks.2": 1.0, "up_blocks.3": 1.0}
SD_FAINT = {"mid_block": 0.1, "up_blocks.1.attentions.0": 0.1, "up_blocks.1.attentions.1": 0.1}
SD_DEEP = {"down_blocks.2": 1.0, "mid_block": 1.0}  # InstantStyle's layout
ALL = {"*": 1.0}

# fmt: off
PRESETS: dict[str, Preset] = {
    # The weight types of ComfyUI_IPAdapter_plus, under its names.
    "linear": Preset("every block alike", Strengths(ALL)),
    "ease in": Preset("strong in the first blocks, fading to the last", lambda x: 0.05 + 0.95 * (1 - x)),
    "ease out": Preset("weak in the first blocks, growing to the last", lambda x: 0.05 + 0.95 * x),
    "ease in-out": Preset("strong in the middle", lambda x: 0.05 + 0.95 * (1 - abs(2 * x - 1))),
    "reverse in-out": Preset("strong at both ends", lambda x: 0.05 + 0.95 * abs(2 * x - 1)),
    "weak input": Preset("a fifth in the down blocks", Strengths(ALL | {"down_blocks": 0.2})),
    "weak middle": Preset("a fifth in the mid block", Strengths(ALL | {"mid_block": 0.2})),
    "weak output": Preset("a fifth in the up blocks", Strengths(ALL | {"up_blocks": 0.2})),
    "strong middle": Preset("a fifth outside the mid block", Strengths({"*": 0.2, "mid_block": 1.0})),
    "style transfer": Preset("colours, material and manner, not the layout", Tables(
        sd=Strengths(SD_STYLE), sdxl=Strengths({STYLE: 1.0}))),
    "composition": Preset("the layout alone", Tables(
        sd=Strengths(SD_LAYOUT), sdxl=Strengths({LAYOUT: 1.0}))),
    "strong style transfer": Preset("everything but the layout", Tables(
        sd=Strengths(ALL | {"down_blocks.2": 0.0}), sdxl=Strengths(ALL | {LAYOUT: 0.0}))),
    "style and composition": Preset("style transfer, and composition times boost", Tables(
        sd=Strengths(SD_STYLE, SD_LAYOUT), sdxl=Strengths({STYLE: 1.0}, {LAYOUT: 1.0}))),
    "strong style and composition": Preset("every block, those of the layout times boost", Tables(
        sd=Strengths(ALL, {"down_blocks.2": 1.0}), sdxl=Strengths(ALL, {LAYOUT: 1.0}))),
    "style transfer precise": Preset("style transfer, pushed away from the picture's layout (times boost)", Tables(
        sd=Strengths(SD_STYLE, SD_LAYOUT, {"down_blocks.2": 1}), sdxl=Strengths({STYLE: 1.0}, {LAYOUT: 1.0}, {LAYOUT: 1}))),
    "composition precise": Preset("composition, pushed away from the picture's style (times boost)", Tables(
        sd=Strengths(SD_LAYOUT, ALL | SD_FAINT, {"*": 1, "down_blocks.2": 0}),
        sdxl=Strengths({LAYOUT: 1.0}, {"*": 0.1, STYLE: 1.0}, {"*": 1, LAYOUT: 0}))),
    # InstantStyle's (arXiv 2404.02733); those for SD 1.x are its authors' experiment. InvokeAI calls them style and composition.
    "instantstyle style": Preset("InstantStyle's style blocks", Tables(
        sd=Strengths({"up_blocks.1": 1.0}), sdxl=Strengths({STYLE: 1.0}))),
    "instantstyle layout": Preset("InstantStyle's layout blocks", Tables(
        sd=Strengths(SD_DEEP), sdxl=Strengths({LAYOUT: 1.0}))),
    "instantstyle style and layout": Preset("both, the layout times boost", Tables(
        sd=Strengths({"up_blocks.1": 1.0}, SD_DEEP), sdxl=Strengths({STYLE: 1.0}, {LAYOUT: 1.0}))),
    # InvokeAI's, where no other has the same blocks.
    "invokeai style strong": Preset("InvokeAI's style_strong: most blocks, not the layout's", Tables(
        sd=Strengths({"down_blocks.0": 1.0, "down_blocks.1": 1.0, "up_blocks.1": 1.0, "up_blocks.2": 1.0}),
        sdxl=Strengths({"down_blocks.1": 1.0, "down_blocks.2.attentions.0": 1.0, "up_blocks": 1.0}))),
    "invokeai style precise": Preset("InvokeAI's style_precise: InstantStyle's style, pushed away from its layout (times boost)",
        Tables(sd=Strengths({"up_blocks.1": 1.0}, SD_DEEP, SD_DEEP),
                     sdxl=Strengths({STYLE: 1.0}, {LAYOUT: 1.0}, {LAYOUT: 1}))),
}
# fmt: on


def presets() -> dict[str, str]:
    """name -> what it means, in a line"""
    return {name: row.meaning for name, row in PRESETS.items()}


def block_map(sites: Sequence[str], blocks: Blocks = "linear", boost: float = 1.0) -> BlockMap:
    """How strongly each of these sites (names of cross-attentions, in the base model's order) hears an image prompt.

    `blocks` is a preset's name, one factor for all, a map, or diffusers' nested dictionary of "down", "mid" and "up" (a list has a
    factor for each `attentions.j`; what is not named is 0). `boost` multiplies what `presets()` says. SettingError for an unknown
    preset, one without a table for this UNet or without a use for `boost`, and for a pattern that matches no site.
    """
    heard = preset_for(blocks, sites) if isinstance(blocks, str) else Strengths(checked(blocks, sites))
    if number("boost", boost) != 1 and not heard.boosted:
        with_boost = (name for name, row in PRESETS.items() if isinstance(row.heard, Tables) and row.heard.sdxl.boosted)
        raise SettingError(f"boost = {boost} has nothing to multiply here; it is for {', '.join(map(repr, with_boost))}")
    factors = {**heard.factors, **{pattern: factor * boost for pattern, factor in heard.boosted.items()}}
    return BlockMap(for_sites(factors, sites), for_sites(heard.away, sites) > 0)


def for_sites(told: Map, sites: Sequence[str]) -> Tensor:
    """The number that the pattern which counts gives each site, 0 where none matches: (sites,)"""
    ranked = sorted(told, key=rank, reverse=True)
    return torch.tensor([next((float(told[pattern]) for pattern in ranked if matches(pattern, site)), 0.0) for site in sites])


def rank(pattern: str) -> tuple[int, int, list[bool]]:
    """Of the patterns that match one site the greatest counts; no two are equal."""
    named = [part != "*" for part in pattern.split(".")]
    return len(named), sum(named), named


def matches(pattern: str, site: str) -> bool:
    parts, own = pattern.split("."), site.split(".")
    return len(parts) <= len(own) and all(part in ("*", name) for part, name in zip(parts, own, strict=False))


def transformers(sites: Iterable[str]) -> list[str]:
    """The transformers that the sites stand in, such as "mid_block.attentions.0", in the order in which a UNet runs them."""
    found = dict.fromkeys(site.split(".transformer_blocks.")[0] for site in sites)
    return sorted(found, key=lambda name: name.split("_")[0])  # down, mid, up; registered as down, up, mid


def preset_for(name: str, sites: Sequence[str]) -> Strengths:
    """What the preset of that name says about these sites."""
    if name not in PRESETS:
        raise SettingError(f"unknown blocks {name!r}{near(name, PRESETS)}")
    heard, found = PRESETS[name].heard, transformers(sites)
    if isinstance(heard, Strengths):
        return heard
    if isinstance(heard, Tables):
        for structure, table in zip((SD, SDXL), heard, strict=True):
            if found == transformers(site_names(structure)):
                return table
        raise SettingError(
            f"blocks {name!r} are known for SD 1.x and SDXL only; for this UNet give a map, such as {{{found[-1]!r}: 1.0}}"
        )
    return Strengths({transformer: heard(index / len(found)) for index, transformer in enumerate(found)})


def checked(blocks: float | Mapping[str, Any], sites: Sequence[str]) -> Map:
    """A user's own map, after its patterns and numbers were looked at."""
    if not isinstance(blocks, Mapping):
        return {"*": number("blocks", blocks)}
    own = unnested(blocks, sites) if NESTED.keys() & blocks else blocks
    for pattern in own:
        if not any(matches(pattern, site) for site in sites):
            raise SettingError(f"blocks {pattern!r}: no cross-attention's name begins so{near(pattern, beginnings(sites))}")
    return {pattern: number(f"blocks {pattern!r}", factor) for pattern, factor in own.items()}


NESTED = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}


def unnested(blocks: Mapping[str, Any], sites: Sequence[str]) -> dict[str, Any]:
    """diffusers' nested dictionary as a map from transformers; its meaning is that of `set_ip_adapter_scale`."""
    flat: dict[str, Any] = {}
    for part, given in blocks.items():
        if part not in NESTED:
            raise SettingError(f"blocks {part!r} beside {' and '.join(NESTED.keys() & blocks)}: known are {', '.join(NESTED)}")
        members: dict[str, list[str]] = {}
        for name in transformers(sites):
            head, index = name.split(".")[:2]
            if head == NESTED[part]:
                members.setdefault(f"block_{index}" if index.isdigit() else part, []).append(name)
        for block, factors in (given if isinstance(given, Mapping) else dict.fromkeys(members, given)).items():
            if block not in members:
                raise SettingError(f"blocks {part!r}: no cross-attention in {block!r}, there are in {', '.join(members) or 'none'}")
            flat |= dict(zip(members[block], one_each(factors, members[block]), strict=True))
    return flat


def one_each(factors: Any, names: Sequence[str]) -> Sequence[Any]:
    given = factors if isinstance(factors, list | tuple) else [factors]
    if len(given) not in (1, len(names)):
        raise SettingError(f"blocks: {len(given)} factors for the {len(names)} attentions {', '.join(names)}")
    return given if len(given) == len(names) else [*given] * len(names)


def number(what: str, value: Any) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond any float
        pass
    raise SettingError(f"{what} = {reprlib.repr(value)}: give a number")


def beginnings(sites: Iterable[str]) -> dict[str, None]:
    """All that a pattern could be, without stars and transformer blocks."""
    parts = [name.split(".") for name in transformers(sites)]
    return dict.fromkeys(".".join(name[:length]) for name in parts for length in range(1, len(name) + 1))
