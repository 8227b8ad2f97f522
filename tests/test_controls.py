"""The algebra of image prompts: what is said of weights, times, masks, scalings and batches is true
of the attention itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from imprompt.adapter import IPAdapter, decoupled_attention
from imprompt.attention.conditioning import images_of, masks_at, weights_at
from imprompt.encoders.choices import CropName, NoiseKind
from imprompt.encoders.noise import KINDS
from imprompt.encoders.preparation import CROPS
from imprompt.errors import MismatchError, SettingError
from imprompt.families.base import family_of, schedule_place
from imprompt.families.unet_layers import SD, SDXL, layer_names
from imprompt.generation.combine import (
    COMBINE,
    EASINGS,
    SCALINGS,
    as_mask,
    combine,
    concat,
    over_time,
    regions,
    scale_table,
    scaled,
    with_negative_layers,
)
from imprompt.generation.references import CombineName, EasingName, ScalingName
from imprompt.prompt import ImagePrompt, branches, stack_items
from tests.tiny import noise, noise_inputs, random_prompt, tiny_adapter, tiny_unet

QUICK = settings(max_examples=25, deadline=None)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
HEADS, WIDTH, LAYERS = 2, 4, 3
ALONE, GUIDED = (-1,), (0, -1)  # branches of guidance
ROWS, COLUMNS = 6, 4  # of the latents that a site sees

seeds = st.integers(0, 2**31)
weights = st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt_of(
    seed: int, batch: int = 1, tokens: int = 3, scale: Any = 1.0, **parts: Any
) -> ImagePrompt:
    """Random keys and values of SITES sites."""
    keys, values = (
        tuple(draw(seed + 10 * i + j, batch, HEADS, tokens, WIDTH) for i in range(LAYERS))
        for j in (0, 1)
    )
    return ImagePrompt(
        keys, values, torch.ones(LAYERS, 1), **{"branches": batch, **parts}
    ).with_scale(scale)


def from_tokens(tokens: Tensor, bias: Tensor | None = None) -> ImagePrompt:
    """Tokens (1, N, D) through fixed W' of SITES sites."""
    keys, values = (
        [(tokens @ draw(7 * i + j, tokens.shape[-1], HEADS * WIDTH)) for i in range(LAYERS)]
        for j in (0, 1)
    )
    split = [
        tuple(x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in states)
        for states in (keys, values)
    ]
    return ImagePrompt(*split, torch.ones(LAYERS, 1), bias=bias)


def at(timestep: float) -> Tensor:
    """Progress at a training timestep."""
    return 1 - torch.as_tensor(timestep) / 999


def attend(
    prompts: Sequence[ImagePrompt], items: Sequence[int] = (0,), timestep: Any = 500
) -> Tensor:
    """The decoupled attention of all sites, (sites, B, H, L, d), as a graft computes it.

    Each item has its queries and its text.
    """
    query, key, value = (
        torch.cat([draw(99 + 1000 * item + i, 1, HEADS, length, WIDTH) for item in items])
        for i, length in enumerate((ROWS * COLUMNS, 5, 5))
    )
    if not prompts:
        return decoupled_attention(query, key, value, None, [], torch.ones(0)).expand(
            LAYERS, -1, -1, -1, -1
        )
    weighed = weights_at(
        [p.scale for p in prompts],
        masks_at([p.mask for p in prompts], [(ROWS, COLUMNS)], query.dtype),
        lambda points: schedule_place(at(timestep), points),
        query.dtype,
    )
    by_layer = weighed[0 if 0 in weighed else ROWS * COLUMNS]
    images = images_of(prompts)
    return torch.stack(
        [
            decoupled_attention(query, key, value, None, images[layer], by_layer[layer])
            for layer in range(LAYERS)
        ]
    )


def image_part(prompt: ImagePrompt, timestep: int = 500) -> Tensor:
    return attend([prompt], timestep=timestep) - attend([])


# Several pictures as one.

UNORDERED = [how for how in COMBINE if how != "subtract"]


@pytest.mark.parametrize("how", UNORDERED)
@given(
    seeds,
    st.lists(weights, min_size=1, max_size=5),
    st.data(),
)
@QUICK
def test_the_order_of_pictures_means_nothing(
    how: str, seed: int, given_weights: list[float], data: Any
) -> None:
    """Check all but subtract, which takes from the first.

    Concat's tokens come in another order, and have the same effect.
    """
    features = draw(seed, len(given_weights), 3, 8)
    order = data.draw(st.permutations(range(len(given_weights))))
    there = combine(features, how, given_weights)
    back = combine(features[list(order)], how, [given_weights[i] for i in order])
    if how == "concat":
        here, now = (attend([from_tokens(*concat(c.features, c.weights))]) for c in (there, back))
        torch.testing.assert_close(here, now, **CLOSE)
    else:
        torch.testing.assert_close(there.features, back.features, **CLOSE)
        assert there.features.shape == (1, 3, 8)


def attend_to(features: Tensor, how: str, given_weights: Sequence[float] | None) -> Tensor:
    """What the attention makes of combined features that are tokens themselves."""
    combined = combine(features, how, given_weights)
    return attend([from_tokens(*concat(combined.features, combined.weights))])


@pytest.mark.parametrize("how", COMBINE)
@given(
    seeds,
    st.lists(weights, min_size=2, max_size=4),
    st.integers(0, 3),
)
@QUICK
def test_weight_0_is_as_absent(how: str, seed: int, given_weights: list[float], at: int) -> None:
    features = draw(seed, len(given_weights) + 1, 3, 8)
    at = min(at, len(given_weights))
    others = torch.cat([features[:at], features[at + 1 :]])
    with_zero = [*given_weights[:at], 0, *given_weights[at:]]
    assert torch.equal(attend_to(features, how, with_zero), attend_to(others, how, given_weights))


@pytest.mark.parametrize("how", UNORDERED)
@given(
    seeds,
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
@QUICK
def test_a_whole_weight_is_as_so_many_pictures(how: str, seed: int, times: list[int]) -> None:
    features = draw(seed, len(times), 3, 8)
    repeated = features.repeat_interleave(torch.tensor(times), 0)
    torch.testing.assert_close(
        attend_to(features, how, times), attend_to(repeated, how, None), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("how", COMBINE)
@given(seeds)
@QUICK
def test_one_picture_is_itself(how: str, seed: int) -> None:
    features = draw(seed, 1, 3, 8)
    combined = combine(features, how)
    torch.testing.assert_close(combined.features, features, **CLOSE)
    assert combined.weights == [1.0]
    tokens, bias = concat(features)
    assert torch.equal(tokens, features)
    assert bias is None


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (CombineName, COMBINE),
        (ScalingName, SCALINGS),
        (EasingName, EASINGS),
        (CropName, CROPS),
        (NoiseKind, KINDS),
    ],
)
def test_what_can_be_asked_for_is_what_there_is(names: Any, table: Mapping[str, Any]) -> None:
    assert {*get_args(names)} == {*table} - {None}


def test_what_the_ways_to_combine_compute() -> None:
    features = torch.tensor([[3.0, 4.0], [0.0, 10.0], [8.0, 6.0]])
    expected = {
        "add": [3 + 2 * 0 + 8 * 1, 4 + 2 * 10 + 6],
        "subtract": [3 - 8 / 3, 4 - (20 + 6) / 3],
        "average": [11 / 4, 30 / 4],
        "max": [8, 10],
        "min": [0, 4],
    }
    for how, vector in expected.items():
        torch.testing.assert_close(
            combine(features, how, [1, 2, 1]).features, torch.tensor([vector], dtype=torch.float32)
        )
    normed = combine(features, "norm-average", [1, 2, 1]).features
    assert normed.norm().item() == pytest.approx((5 + 2 * 10 + 10) / 4)
    direction = torch.tensor([0.6 + 0.8, 0.8 + 2 + 0.6])
    torch.testing.assert_close(normed / normed.norm(), (direction / direction.norm())[None])
    assert torch.equal(combine(features, "add", [1, 0, -0.5]).features, torch.tensor([[-1.0, 1.0]]))


def test_features_in_parts_are_combined_equally() -> None:
    """FaceID-plus has a face embedding and a picture's hidden states."""
    parts = draw(1, 3, 8), draw(2, 3, 5, 6)
    both = combine(parts, "average", [1, 2, 0])
    assert isinstance(both.features, tuple)
    for part, combined in zip(parts, both.features, strict=True):
        assert torch.equal(combined, combine(part, "average", [1, 2, 0]).features)
    assert combine(parts, "concat", [1, 2, 0]).weights == [1, 2]


WRONG_WEIGHTS: list[tuple[str, list[Any], str]] = [
    ("average", [1, 2], "2 weights for 3 pictures: give one for each"),
    ("average", [0, 0, 0], "all weights are 0"),
    (
        "concat",
        [1, -1, 1],
        'concat takes none below 0; to take a picture away use "subtract", or "add"',
    ),
    ("subtract", [1, -1, 1], "weight -1.0: subtract takes none below 0"),
    ("average", [1, "2", 1], "weight = '2': give a number"),
    ("mean", [1, 1, 1], "combine = 'mean' is unknown; known: concat, add,"),
]


@pytest.mark.parametrize(("how", "given_weights", "said"), WRONG_WEIGHTS)
def test_wrong_weights_are_reported(how: str, given_weights: list[Any], said: str) -> None:
    with pytest.raises(SettingError) as error:
        combine(torch.ones(3, 4), how, given_weights)
    assert said in str(error.value)
    if how == "concat":
        with pytest.raises(SettingError, match="takes none below 0"):
            concat(torch.ones(3, 2, 4), given_weights)


# When.


def test_the_whole_window_is_none() -> None:
    assert torch.equal(over_time(0, 1), torch.ones(1000))
    layers = layer_names(SD)
    assert scale_table(layers, 0.5)[1].shape == (16, 1)
    table = scale_table(layers, 0.5, easing=[[0, 1]])[1]
    assert torch.equal(table, torch.full((16, 1, 1000), 0.5))


@given(
    st.lists(st.floats(0.001, 0.999), min_size=1, max_size=4, unique=True),
    st.sampled_from([10, 50, 1000]),
)
@QUICK
def test_windows_side_by_side_share_the_schedule(cuts: list[float], points: int) -> None:
    bounds = [0, *sorted(cuts), 1]
    windows = [over_time(a, b, points=points) for a, b in pairwise(bounds)]
    assert torch.equal(sum(windows), torch.ones(points))


def test_a_window_is_read_by_progress() -> None:
    half = over_time(0, 0.5)
    assert half[0] == half[499] == 1  # noisy
    assert half[500] == half[999] == 0
    assert over_time(0.5, 1)[999] == 1  # the last one too
    prompt = prompt_of(1, scale=over_time(0, 0.5).expand(LAYERS, 1, -1))
    assert torch.equal(attend([prompt], timestep=800), attend([prompt_of(1)], timestep=800))
    assert torch.equal(attend([prompt], timestep=200), attend([]))


def test_easings_come_and_go_as_they_say() -> None:
    at = {name: over_time(0.2, 0.6, name, points=1001) for name in EASINGS}
    ends = {
        name: [round(table[t].item(), 4) for t in (200, 300, 400, 500, 599)]
        for name, table in at.items()
    }
    assert ends == {
        "constant": [1, 1, 1, 1, 1],
        "ease in": [0, 0.1464, 0.5, 0.8536, 1],
        "ease out": [1, 0.8536, 0.5, 0.1464, 0],
        "ease in-out": [0, 0.5, 1, 0.5, 0.0001],
        "reverse in-out": [1, 0.5, 0, 0.5, 0.9999],
    }
    for table in at.values():
        assert not table[:200].any()
        assert not table[600:].any()
    assert torch.allclose(at["ease in"] + at["ease out"], at["constant"])
    assert torch.allclose(at["ease in-out"] + at["reverse in-out"], at["constant"])


def test_points_are_joined_by_straight_lines() -> None:
    found = over_time(0.1, 1, [[0.2, 1.0], [0.4, 0.5], [0.4, 0.0], [1.0, 2.0]], points=1001)
    assert found[[50, 150, 200, 300, 500, 700, 1000]].tolist() == pytest.approx(
        [0, 1, 1, 0.75, 1 / 3, 1, 2], abs=1e-6
    )


WRONG_TIMES: list[tuple[dict[str, Any], str]] = [
    ({"start": 0.5, "end": 0.5}, "start = 0.5, end = 0.5: give 0 <= start < end <= 1"),
    ({"start": -0.1}, "start = -0.1, end = 1"),
    ({"end": 20}, "start = 0, end = 20"),
    ({"end": "1"}, "end = '1': give a number"),
    ({"easing": "ease"}, "unknown easing 'ease'; near: ease in"),
    ({"easing": []}, "give a name, or points"),
    ({"easing": [0, 1]}, "give a name, or points"),
    ({"easing": [[0.5, 1], [0.2, 1]]}, "give rising numbers from 0 to 1"),
    ({"easing": [[0, 1], [20, 1]]}, "give rising numbers from 0 to 1"),
]


@pytest.mark.parametrize(("times", "said"), WRONG_TIMES)
def test_wrong_times_are_reported(times: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError) as error:
        over_time(**times)
    assert said in str(error.value)


def test_a_table_is_scale_by_block_by_time() -> None:
    layers = layer_names(SDXL)
    block, table = scale_table(layers, 0.5, "style and composition", boost=0.4, end=0.5)
    assert table.shape == (70, 1, 1000)
    assert torch.equal(table[:, 0, 99], 0.5 * block.factors)
    assert not table[..., 899].any()
    assert {round(number, 6) for number in table[:, 0, 99].tolist()} == {0, 0.2, 0.5}
    with pytest.raises(SettingError, match="scale = nan: give a number"):
        scale_table(layers, float("nan"))


# How a scale acts.


def test_v_only_changes_nothing() -> None:
    prompt = prompt_of(1, scale=0.5)
    assert scaled(prompt, "V only") is prompt
    with pytest.raises(SettingError, match="unknown scaling 'v only'; near: V only"):
        scaled(prompt, "v only")


@pytest.mark.parametrize("how", [how for how in SCALINGS if how != "V only"])
def test_scalings_are_the_published_formulas(how: str) -> None:
    """k·w and v·w, w' = w·C/1280, v = (v − mean) + mean·w', one w for each site and item."""
    w = torch.tensor([[0.5, 2.0], [-1.0, 0.25], [1.0, 0.0]])
    found = scaled(prompt_of(1, batch=2, scale=w), how)
    plain = prompt_of(1, batch=2)
    for layer in range(LAYERS):
        for item in range(2):
            weight = w[layer, item] * (HEADS * WIDTH / 1280 if "C penalty" in how else 1)
            value = plain.values[layer][item]
            average = value.mean(1, keepdim=True)
            torch.testing.assert_close(found.keys[layer][item], plain.keys[layer][item] * weight)
            expected = value - average + average * weight if "mean" in how else value * weight
            torch.testing.assert_close(found.values[layer][item], expected)
    assert torch.equal(found.scale, (w != 0).float())


@given(seeds, st.sampled_from(list(SCALINGS)), st.floats(-2, 2))
@QUICK
def test_a_scale_over_time_acts_on_what_is_applied(seed: int, how: str, weight: float) -> None:
    fading = scaled(
        prompt_of(seed, scale=(weight * over_time(0, 0.5, [[0, 1], [1, 0]])).expand(LAYERS, 1, -1)),
        how,
    )
    steady = scaled(prompt_of(seed, scale=weight), how)
    full, part, inactive = (image_part(fading, t) for t in (999, 600, 400))
    torch.testing.assert_close(full, image_part(steady), **CLOSE)
    torch.testing.assert_close(part, full * (600 / 999), rtol=1e-4, atol=1e-5)
    assert not inactive.any()


def test_pushed_away() -> None:
    negative = torch.tensor([False, True, False])
    prompt = prompt_of(1, batch=2, scale=torch.tensor([[0.5, 0.7]] * LAYERS))
    turned = with_negative_layers(prompt, negative, guided=True)
    assert torch.equal(turned.scale, torch.tensor([[0.5, 0.7], [0.7, 0.0], [0.5, 0.7]]))
    for layer in range(LAYERS):
        assert torch.equal(turned.keys[layer][0], prompt.keys[layer][1 if negative[layer] else 0])
        assert torch.equal(
            turned.values[layer][0], prompt.values[layer][1 if negative[layer] else 0]
        )
        assert torch.equal(turned.keys[layer][1], prompt.keys[layer][1])
    assert (
        with_negative_layers(prompt, torch.zeros(LAYERS, dtype=torch.bool), guided=True) is prompt
    )
    assert with_negative_layers(prompt_of(1, scale=0.5), negative, guided=False).scale[
        :, 0
    ].tolist() == [
        0.5,
        0,
        0.5,
    ]
    timed = with_negative_layers(
        prompt._replace(scale=over_time(0, 0.5).expand(LAYERS, 1, -1)), negative, guided=True
    )
    assert timed.scale[:, :, 0].tolist() == [[1, 1], [1, 0], [1, 1]]
    for how in SCALINGS:  # in whichever order the two are asked for
        first, last = (
            scaled(turned, how),
            with_negative_layers(scaled(prompt, how), negative, guided=True),
        )
        torch.testing.assert_close(attend([first], items=(0, 1)), attend([last], items=(0, 1)))


# Where.

masks = st.integers(0, 2**31).map(lambda seed: (draw(seed, ROWS, COLUMNS).sigmoid() > 0.5).float())


@given(seeds, st.sampled_from([(6, 4), (13, 7), (1, 1), (64, 64)]))
@QUICK
def test_a_mask_of_ones_is_none(seed: int, size: tuple[int, int]) -> None:
    (mask,) = regions([torch.ones(size)])
    assert torch.equal(attend([prompt_of(seed, mask=mask)]), attend([prompt_of(seed)]))


@given(seeds, masks)
@QUICK
def test_two_regions_have_a_picture_each(seed: int, mask: Tensor) -> None:
    """At one attention exactly, for masks of the latents' size that are 0 or 1."""
    both = [prompt_of(seed, mask=mask[None]), prompt_of(seed + 1, mask=1 - mask[None])]
    inside = mask.flatten().bool()
    together = attend(both)
    assert torch.equal(together[..., inside, :], attend([prompt_of(seed)])[..., inside, :])
    assert torch.equal(together[..., ~inside, :], attend([prompt_of(seed + 1)])[..., ~inside, :])


@given(seeds)
@QUICK
def test_soft_masks_are_not_made_hard(seed: int) -> None:
    soft = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    (mask,) = regions([soft])
    by_pixel = soft.flatten()[:, None]
    torch.testing.assert_close(
        image_part(prompt_of(seed, mask=mask)), image_part(prompt_of(seed)) * by_pixel, **CLOSE
    )


@given(st.lists(st.tuples(seeds, st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4))
@QUICK
def test_normalised_regions_share_where_they_overlap(shapes: list[tuple[int, int, int]]) -> None:
    given_masks = [
        torch.rand(h, w, generator=torch.Generator().manual_seed(seed)).clamp(min=1e-3)
        for seed, h, w in shapes
    ]
    found = [mask for mask in regions(given_masks, "normalise") if mask is not None]
    size = [max(sides) for sides in zip(*(mask.shape[1:] for mask in found), strict=True)]
    total = torch.stack([F.interpolate(mask[None], size, mode="area") for mask in found]).sum(0)
    assert len(found) == len(shapes)
    assert total.max() <= 1 + 1e-6
    full = torch.stack(
        [F.interpolate(mask[None, None], size, mode="area") for mask in given_masks]
    ).sum(0)
    torch.testing.assert_close(total, full.clamp(max=1), **CLOSE)


def test_regions_keep_what_does_not_overlap() -> None:
    left = torch.tensor([[1.0, 0.5, 0.0]])
    right = torch.tensor([[0.0, 0.5, 1.0]])
    assert [mask.tolist() for mask in regions([left, right], "normalise") if mask is not None] == [
        [left.tolist()],
        [right.tolist()],
    ]
    everywhere = regions([left, None], "normalise")
    expected = torch.tensor([[[[0.5, 1 / 3, 0.0]]], [[[0.5, 2 / 3, 1.0]]]])
    torch.testing.assert_close(
        torch.stack([mask for mask in everywhere if mask is not None]), expected
    )
    assert regions([None, None]) == [None, None]
    assert regions([None], "normalise") == [None]
    with pytest.raises(SettingError, match="unknown overlap 'multiply'; known: add, normalise"):
        regions([left], "multiply")


def test_what_can_be_a_mask() -> None:
    picture = Image.new("L", (4, 2))
    picture.paste(255, (0, 0, 2, 2))
    expected = torch.tensor([[[1.0, 1.0, 0.0, 0.0]] * 2])
    assert torch.equal(as_mask(picture), expected)
    for mask in (
        expected,
        expected[0],
        expected[0].numpy(),
        expected[0].bool(),
        expected[0].tolist(),
        np.uint8(expected[0]),
    ):
        assert torch.equal(as_mask(mask), expected)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (
            torch.ones(2, 4, 4),
            "mask of shape [2, 4, 4]: give rows and columns, (h, w) or (1, h, w)",
        ),
        (torch.ones(4), "mask of shape [4]"),
        (torch.ones(0, 4), "mask of shape [0, 4]"),
        (
            np.full((4, 4), 255, np.uint8),
            "mask with values from 255 to 255: give 0 (no effect) to 1",
        ),
        (torch.full((4, 4), float("nan")), "mask with values from nan"),
        (torch.zeros(4, 4), "a mask that is 0 everywhere"),
        (Image.new("L", (4, 4)), "a mask that is 0 everywhere"),
    ],
)
def test_wrong_masks_are_reported(mask: Any, said: str) -> None:
    with pytest.raises(MismatchError) as error:
        regions([mask])
    assert said in str(error.value)


# Items of one batch.

Item = list[ImagePrompt]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "more tokens": {"tokens": 5},
    "masked": {"mask": torch.linspace(0, 1, ROWS * COLUMNS).view(1, ROWS, COLUMNS)},
    "otherwise masked": {"mask": torch.tensor([[[0.3, 1.0]]])},
    "weighed": {"bias": torch.tensor([[0.0, 0.7, -1.0]])},
    "windowed": {"scale": over_time(0.2, 0.7, "ease in").expand(LAYERS, 1, -1)},
    "by site": {"scale": torch.tensor([0.0, -0.5, 2.0])},
}


@st.composite
def items(draw_from: st.DrawFn, guided: bool) -> list[Item]:
    """One to three items of no to three prompts of any kind; a prompt's two halves differ."""
    lists = draw_from(
        st.lists(
            st.lists(st.tuples(seeds, st.sampled_from(list(KINDS))), max_size=3),
            min_size=1,
            max_size=3,
        )
    )
    halved = draw_from(st.booleans())
    return [
        [prompt_of(seed, batch=1 + (guided and halved), **KINDS[kind]) for seed, kind in item]
        for item in lists
    ]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """How sums are split among threads depends on the batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("timestep", [700, 100])
@given(items(guided=False))
@QUICK
def test_an_item_of_a_batch_is_the_item_alone(timestep: int, given_items: list[Item]) -> None:
    """To the bit, with any other items beside it."""
    together = attend(stack_items(given_items, ALONE), range(len(given_items)), timestep)
    for number, item in enumerate(given_items):
        assert torch.equal(together[:, number], attend(item, [number], timestep)[:, 0]), number


@given(items(guided=True))
@QUICK
def test_so_are_its_halves_with_guidance(given_items: list[Item]) -> None:
    """First every unconditional half, then every conditional one."""
    count = len(given_items)
    together = attend(stack_items(given_items, GUIDED), range(2 * count))
    for number, item in enumerate(given_items):
        both = [number, number + count]
        assert torch.equal(together[:, both], attend(item, both)), number


def test_a_batch_has_no_more_attentions_than_needed() -> None:
    plain, longer, masked = prompt_of(1), prompt_of(2, tokens=5), prompt_of(3, **KINDS["masked"])
    assert stack_items([], ALONE) == stack_items([[], []], GUIDED) == []
    # a prompt without a mask takes a mask of ones
    assert len(stack_items([[plain], [masked], []], GUIDED)) == 1
    assert len(stack_items([[plain, longer], [masked, longer], [longer]], ALONE)) == 2
    # an item adds up in its own order
    assert len(stack_items([[plain, longer], [longer, plain]], ALONE)) == 3
    (found,) = stack_items([[plain], [masked], []], GUIDED)
    assert found.keys[0].shape[0] == len(found.scale[0]) == 6
    assert found.scale[0].tolist() == [1, 1, 0, 1, 1, 0]
    assert not found.keys[0][[2, 5]].any()
    assert not found.values[0][[2, 5]].any()


def test_what_cannot_be_batched_is_reported() -> None:
    low_rank = (object(),)
    with pytest.raises(
        MismatchError, match="an image prompt for a batch of 2: give the rows of one item, 1"
    ):
        stack_items([[prompt_of(1, batch=2, branches=1)]], ALONE)
    with pytest.raises(
        MismatchError, match="an image prompt for a batch of 3: give the rows of one item, 2"
    ):
        stack_items([[prompt_of(1, batch=3, branches=1)]], GUIDED)
    with pytest.raises(
        MismatchError, match="an image prompt for a batch of 2: give the rows of one item, 1"
    ):
        stack_items([[prompt_of(1, scale=torch.ones(LAYERS, 2))]], ALONE)
    with pytest.raises(MismatchError, match="low-rank part acts on a whole batch"):
        stack_items([[prompt_of(1, low_rank=low_rank)], [prompt_of(2)]], ALONE)
    (found,) = stack_items(
        [[prompt_of(1, low_rank=low_rank)], [prompt_of(2, low_rank=low_rank)]], ALONE
    )
    assert found.low_rank is low_rank


# In a whole UNet.


@pytest.fixture(scope="module")
def joined() -> Iterator[tuple[UNet2DConditionModel, IPAdapter]]:
    unet = tiny_unet("sd1")
    with tiny_adapter(unet).attached(unet) as adapter:
        yield unet, adapter


def part_of(inputs: dict[str, Any], items: list[int]) -> dict[str, Any]:
    return {name: value[items] for name, value in inputs.items()}


@torch.no_grad()
def test_other_items_change_nothing_in_a_whole_unet(
    joined: tuple[UNet2DConditionModel, IPAdapter],
) -> None:
    """A UNet of one batch size gives an item the same bits, whatever image prompts the others have.

    With another batch size its matrix products differ in their last bits, with image prompts as
    without.
    """
    unet, adapter = joined
    first, second, third = (random_prompt(adapter, 1, seed=seed) for seed in (5, 6, 7))
    window = over_time(0, 0.5).expand(16, 1, -1)
    given_items = [
        [first],
        [second.with_scale(0.5)._replace(mask=as_mask(torch.rand(9, 9))), third.with_scale(window)],
        [],
    ]
    inputs = noise_inputs(unet, 3)
    together = noise(unet, inputs, stack_items(given_items, ALONE))
    for number, item in enumerate(given_items):
        lonely = stack_items([item if i == number else [] for i in range(3)], ALONE)
        assert torch.equal(noise(unet, inputs, lonely)[number], together[number])
        alone = noise(unet, part_of(inputs, [number]), item or None)[0]
        torch.testing.assert_close(alone, together[number], rtol=0, atol=1e-5)
    assert (together - noise(unet, inputs)).abs().amax((1, 2, 3))[:2].min() > 1e-2


@torch.no_grad()
def test_regions_of_a_picture_larger_than_the_latents(
    joined: tuple[UNet2DConditionModel, IPAdapter],
) -> None:
    """At the UNet's first cross-attention, away from the edge between two regions, each is heard as
    if it were alone.
    """
    unet, adapter = joined
    first = next(iter(family_of(unet).layers(unet).values()))
    seen: list[Tensor] = []
    hook = first.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    # 8 × 16 latents: cells of 6.25 × 4.8 pixels, the edge is inside the fourth column
    picture = Image.new("L", (50, 77))
    picture.paste(255, (0, 0, 22, 77))
    a, b = random_prompt(adapter, 1, seed=5), random_prompt(adapter, 1, seed=6)
    left, right = regions([picture, 1 - as_mask(picture)])
    inputs = noise_inputs(unet, 1)
    for prompts in ([a], [b], [a._replace(mask=left), b._replace(mask=right)]):
        noise(unet, inputs, prompts)
    hook.remove()
    only_a, only_b, both = (output.unflatten(1, (16, 8)) for output in seen)
    assert torch.equal(both[:, :, :3], only_a[:, :, :3])
    assert torch.equal(both[:, :, 4:], only_b[:, :, 4:])
    assert not torch.allclose(both[:, :, 3], only_a[:, :, 3], atol=1e-3)
    assert not torch.allclose(both[:, :, 3], only_b[:, :, 3], atol=1e-3)


def test_branches_are_parts_of_the_rows() -> None:
    rows = torch.arange(24.0).view(4, 6)
    first, second = branches(rows, 2, 0)
    assert torch.equal(first, rows[:2])
    assert torch.equal(second, rows[2:])
    assert all(torch.equal(part, rows[:1]) for part in branches(rows[:1], 3, 0))
    assert [tuple(part.shape) for part in branches(rows, 3, 1)] == [(4, 2)] * 3
