"""Which cross-attentions hear a prompt: patterns, diffusers' dictionaries, and every preset against
numbers written by hand.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from imprompt.errors import SettingError
from imprompt.families.unet_layers import SD, SDXL, layer_names
from imprompt.families.unet_presets import PRESETS
from imprompt.generation.blocks import block_map, presets, transformers
from tests.tiny import smallest_unet, tiny_unet

LAYERS = {"SD 1.x": layer_names(SD), "SDXL": layer_names(SDXL)}
GROUPS = {"SD 1.x": 16, "SDXL": 11}

# The transformers in the order in which a UNet runs them, as the published tables number them.
SD_ORDER = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)] + [
    "mid_block.attentions.0"
]
SD_ORDER += [f"up_blocks.{i}.attentions.{j}" for i in (1, 2, 3) for j in range(3)]
SDXL_ORDER = [f"down_blocks.{i}.attentions.{j}" for i in (1, 2) for j in range(2)] + [
    "mid_block.attentions.0"
]
SDXL_ORDER += [f"up_blocks.{i}.attentions.{j}" for i in (0, 1) for j in range(3)]
ORDER = {"SD 1.x": SD_ORDER, "SDXL": SDXL_ORDER}

B = 0.6  # the boost in the tables below
# fmt: off
# preset: (factor of transformer 0, 1, ... of SD 1.x, of SDXL)
TABLES: dict[str, tuple[list[float], list[float]]] = {
    "linear": ([1] * 16, [1] * 11),
    "ease in": ([1, .940625, .88125, .821875, .7625, .703125, .64375, .584375, .525, .465625,
        .40625, .346875, .2875, .228125,
                 .16875, .109375],
                [1, .9136364, .8272727, .7409091, .6545455, .5681818, .4818182, .3954545, .3090909,
                .2227273, .1363636]),
    "ease out": ([.05, .109375, .16875, .228125, .2875, .346875, .40625, .465625, .525, .584375,
        .64375, .703125, .7625, .821875,
                  .88125, .940625],
                 [.05, .1363636, .2227273, .3090909, .3954545, .4818182, .5681818, .6545455,
                 .7409091, .8272727, .9136364]),
    "ease in-out": ([.05, .16875, .2875, .40625, .525, .64375, .7625, .88125, 1, .88125, .7625,
        .64375, .525, .40625, .2875,
                     .16875],
                    [.05, .2227273, .3954545, .5681818, .7409091, .9136364, .9136364, .7409091,
                    .5681818, .3954545, .2227273]),
    "reverse in-out": ([1, .88125, .7625, .64375, .525, .40625, .2875, .16875, .05, .16875, .2875,
        .40625, .525, .64375, .7625,
                        .88125],
                       [1, .8272727, .6545455, .4818182, .3090909, .1363636, .1363636, .3090909,
                       .4818182, .6545455, .8272727]),
    "weak input": ([.2] * 6 + [1] * 10, [.2] * 4 + [1] * 7),
    "weak middle": ([1] * 6 + [.2] + [1] * 9, [1] * 4 + [.2] + [1] * 6),
    "weak output": ([1] * 7 + [.2] * 9, [1] * 5 + [.2] * 6),
    "strong middle": ([.2] * 6 + [1] + [.2] * 9, [.2] * 4 + [1] + [.2] * 6),
    # d0    d1    d2       m  u1       u2       u3          d1    d2    m  u0       u1
    "style transfer":                   ([1, 1, 1, 1, 0, 0,    0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0,
        0, 0, 0, 0, 1, 0, 0, 0, 0]),
    "composition":                      ([0, 0, 0, 0, .25, 1,  0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0,
        0, 1, 0, 0, 0, 0, 0, 0, 0]),
    "strong style transfer":            ([1, 1, 1, 1, 0, 0,    1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1,
        1, 0, 1, 1, 1, 1, 1, 1, 1]),
    "style and composition":            ([1, 1, 1, 1, .15, B,  0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0,
        0, B, 0, 0, 1, 0, 0, 0, 0]),
    "strong style and composition":     ([1, 1, 1, 1, B, B,    1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1,
        1, B, 1, 1, 1, 1, 1, 1, 1]),
    "style transfer precise":           ([1, 1, 1, 1, .15, B,  0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0,
        0, B, 0, 0, 1, 0, 0, 0, 0]),
    "composition precise":              ([B, B, B, B, .25, 1,  .06, .06, .06, B, B, B, B, B, B, B],
                                         [.06, .06, .06, 1, .06, .06, B, .06, .06, .06, .06]),
    "instantstyle style":               ([0, 0, 0, 0, 0, 0,    0, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0,
        0, 0, 0, 0, 1, 0, 0, 0, 0]),
    "instantstyle layout":              ([0, 0, 0, 0, 1, 1,    1, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0,
        0, 1, 0, 0, 0, 0, 0, 0, 0]),
    "instantstyle style and layout":    ([0, 0, 0, 0, B, B,    B, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0,
        0, B, 0, 0, 1, 0, 0, 0, 0]),
    "invokeai style strong":            ([1, 1, 1, 1, 0, 0,    0, 1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1,
        1, 0, 0, 1, 1, 1, 1, 1, 1]),
    "invokeai style precise":           ([0, 0, 0, 0, B, B,    B, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0,
        0, B, 0, 0, 1, 0, 0, 0, 0]),
}
# preset: transformers where the unconditional half hears the picture
AWAY: dict[str, tuple[set[int], set[int]]] = {
    "style transfer precise": ({4, 5}, {3}),
    "composition precise": ({0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {0, 1, 2, 4, 5, 6, 7,
        8, 9, 10}),
    "invokeai style precise": ({4, 5, 6}, {3}),
}
# fmt: on
BOOSTED = [
    "style and composition",
    "strong style and composition",
    "style transfer precise",
    "composition precise",
    "instantstyle style and layout",
    "invokeai style precise",
]


def by_transformer(numbers: Tensor, layers: tuple[str, ...], order: list[str]) -> list[Any]:
    """One number for each transformer, after a check that all its sites have the same."""
    found = []
    for transformer in order:
        own = {
            number.item()
            for layer, number in zip(layers, numbers, strict=True)
            if layer.startswith(f"{transformer}.")
        }
        assert len(own) == 1, transformer
        found.append(own.pop())
    return found


@pytest.mark.parametrize("structure", LAYERS)
@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_published_numbers(name: str, structure: str) -> None:
    which = list(LAYERS).index(structure)
    found = block_map(LAYERS[structure], name, boost=B if name in BOOSTED else 1.0)
    factors = by_transformer(found.factors, LAYERS[structure], ORDER[structure])
    assert factors == pytest.approx(TABLES[name][which], abs=1e-6)
    negative = by_transformer(found.negative, LAYERS[structure], ORDER[structure])
    assert {i for i, turned in enumerate(negative) if turned} == AWAY.get(name, (set(), set()))[
        which
    ]


def test_every_published_name_is_there() -> None:
    assert set(TABLES) == set(PRESETS) == set(presets())
    assert all(line and "\n" not in line for line in presets().values())


@pytest.mark.parametrize("structure", LAYERS)
def test_transformers_are_numbered_as_the_unet_runs(structure: str) -> None:
    assert transformers(LAYERS[structure]) == ORDER[structure]
    assert len(ORDER[structure]) == GROUPS[structure]


def factors(blocks: Any, structure: str = "SDXL", **options: Any) -> dict[str, float]:
    found = block_map(LAYERS[structure], blocks, **options).factors
    return dict(
        zip(
            ORDER[structure],
            by_transformer(found, LAYERS[structure], ORDER[structure]),
            strict=True,
        )
    )


def strengths(blocks: Any, structure: str = "SDXL") -> dict[str, float]:
    """Those that hear anything."""
    return {name: factor for name, factor in factors(blocks, structure).items() if factor}


def test_the_longest_pattern_counts() -> None:
    found = strengths(
        {
            "*": 0.5,
            "up_blocks": 0,
            "up_blocks.0": 0.25,
            "up_blocks.0.attentions.1": 1,
            "up_blocks.*.attentions.1": 2,
        }
    )
    assert {name: found.get(name, 0) for name in SDXL_ORDER if name.startswith("up")} == {
        "up_blocks.0.attentions.0": 0.25,
        "up_blocks.0.attentions.1": 1,  # as long as the pattern with a star, which is less
        "up_blocks.0.attentions.2": 0.25,
        "up_blocks.1.attentions.0": 0,
        "up_blocks.1.attentions.1": 2,
        "up_blocks.1.attentions.2": 0,
    }
    assert found["mid_block.attentions.0"] == found["down_blocks.1.attentions.0"] == 0.5


def test_of_patterns_of_one_length_the_one_of_the_fewest_stars_counts() -> None:
    found = factors({"*.0.attentions.1": 1, "up_blocks.*.*.1": 2})
    assert (found["up_blocks.0.attentions.1"], found["up_blocks.1.attentions.1"]) == (1, 2)


def test_a_pattern_reaches_a_single_layers() -> None:
    name = "up_blocks.0.attentions.1.transformer_blocks.3.attn2"
    found = block_map(LAYERS["SDXL"], {name: 0.5}).factors
    assert found[LAYERS["SDXL"].index(name)] == found.sum() == 0.5


def test_a_pattern_ends_where_a_part_ends() -> None:
    """`up_blocks.1` is not the beginning of `up_blocks.10`."""
    layers = [
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2",
        "up_blocks.10.attentions.0.transformer_blocks.0.attn2",
    ]
    assert block_map(layers, {"up_blocks.1": 1}).factors.tolist() == [1, 0]


@given(
    st.permutations(
        [
            "*",
            "up_blocks",
            "*.1",
            "up_blocks.*.attentions",
            "up_blocks.1",
            "*.*.*.1",
            "up_blocks.1.*.1",
        ]
    )
)
@settings(max_examples=25, deadline=None)
def test_the_order_of_a_map_means_nothing(patterns: list[str]) -> None:
    numbers = {
        "*": 1,
        "up_blocks": 2,
        "*.1": 3,
        "up_blocks.*.attentions": 4,
        "up_blocks.1": 5,
        "*.*.*.1": 6,
        "up_blocks.1.*.1": 7,
    }
    found = block_map(LAYERS["SD 1.x"], {pattern: numbers[pattern] for pattern in patterns}).factors
    assert torch.equal(found, block_map(LAYERS["SD 1.x"], numbers).factors)
    # the others have a longer one, or one with fewer stars, everywhere
    assert set(found.tolist()) == {1, 3, 4, 6, 7}


def test_a_number_is_for_all() -> None:
    assert list(factors(0.3).values()) == pytest.approx([0.3] * 11)
    assert factors({}) == dict.fromkeys(SDXL_ORDER, 0)


NESTED: list[tuple[str, Mapping[str, Any], Mapping[str, float]]] = [
    ("SDXL", {"up": {"block_0": [0.0, 1.0, 0.0]}}, {"up_blocks.0.attentions.1": 1}),
    (
        "SDXL",
        {"down": {"block_2": [0.0, 1.0]}, "mid": [0.5]},
        {"down_blocks.2.attentions.1": 1, "mid_block.attentions.0": 0.5},
    ),
    ("SDXL", {"down": 2, "mid": 0.0, "up": {"block_1": [3]}}, {"down_blocks": 2, "up_blocks.1": 3}),
    (
        "SD 1.x",
        {"up": [1, 2, 3]},
        {f"up_blocks.*.attentions.{number - 1}": number for number in (1, 2, 3)},
    ),
    ("SD 1.x", {"down": {"block_1": 0.5}, "up": 1.0}, {"down_blocks.1": 0.5, "up_blocks": 1}),
]


@pytest.mark.parametrize(("structure", "nested", "plain"), NESTED)
def test_nested_dictionaries_mean_what_diffusers_means(
    structure: str, nested: Mapping[str, Any], plain: Mapping[str, float]
) -> None:
    """Against diffusers itself: tests/parity/test_diffusers_controls.py."""
    assert factors(nested, structure) == factors(plain, structure)


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    ("style transfers", {}, "unknown blocks 'style transfers'; near: style transfer,"),
    ("xyz", {}, "unknown blocks 'xyz'; known: linear, ease in"),
    (
        "style transfer",
        {"boost": 2.0},
        "boost = 2.0 has nothing to multiply here; it is for 'style and composition'",
    ),
    ({"*": 1}, {"boost": 0.5}, "boost = 0.5 has nothing to multiply here"),
    ("composition precise", {"boost": "high"}, "boost = 'high': give a number"),
    (
        {"up_block.0": 1},
        {},
        "blocks 'up_block.0': no cross-attention layer's name begins with it; near: up_blocks.0",
    ),
    ({"output": 1}, {}, "blocks 'output': no cross-attention layer's name begins with it"),
    ({"mid_block": "much"}, {}, "blocks 'mid_block' = 'much': give a number"),
    (float("nan"), {}, "blocks = nan: give a number"),
    (True, {}, "blocks = True: give a number"),
    (
        {"up": {"block_2": 1.0}},
        {},
        "blocks 'up': no cross-attention in 'block_2'; blocks that have one: block_0, block_1",
    ),
    ({"up": {"block_0": [1, 2]}}, {}, "2 factors for the 3 attentions up_blocks.0.attentions.0"),
    ({"mid": [1, 2]}, {}, "2 factors for the 1 attentions mid_block.attentions.0"),
    (
        {"up": 1.0, "up_blocks.0": 1.0},
        {},
        "blocks 'up_blocks.0' together with up: known are down, mid, up",
    ),
    (
        {"up": {"block_0": [[1, 2], 0, 0]}},
        {},
        "blocks 'up_blocks.0.attentions.0' = [1, 2]: give a number",
    ),
]


@pytest.mark.parametrize(("blocks", "options", "said"), WRONG)
def test_wrong_use_is_reported_in_one_line(blocks: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError) as error:
        block_map(LAYERS["SDXL"], blocks, **options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_another_structure_has_formulas_but_no_tables() -> None:
    unet = smallest_unet()
    layers = [
        name.removesuffix(".processor")
        for name in unet.attn_processors
        if name.endswith("attn2.processor")
    ]
    # down, up, up, mid
    assert block_map(layers, "ease out").factors.tolist() == pytest.approx(
        [0.05, 0.525, 0.7625, 0.2875]
    )
    assert block_map(layers, "weak middle").factors.tolist() == pytest.approx([1, 1, 1, 0.2])
    with pytest.raises(
        SettingError,
        match=r"'style transfer' are known for SD 1.x and SDXL only; for this model give a map",
    ):
        block_map(layers, "style transfer")


@pytest.mark.parametrize(
    ("base", "structure"), [("sd1", "SD 1.x"), ("sd2", "SD 1.x"), ("sdxl", "SDXL")]
)
def test_tables_are_for_every_unet_of_the_structure(base: str, structure: str) -> None:
    """Also where the transformers have another number of blocks, as in distilled SDXL models."""
    names = [
        name.removesuffix(".processor")
        for name in tiny_unet(base).attn_processors
        if name.endswith("attn2.processor")
    ]
    assert by_transformer(
        block_map(names, "composition").factors, tuple(names), ORDER[structure]
    ) == pytest.approx(TABLES["composition"][list(LAYERS).index(structure)])
