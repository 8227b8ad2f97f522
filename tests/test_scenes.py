"""The emoji world's scenes, on glyphs drawn here: no drawings are needed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from worlds.emoji.base import relaxed
from worlds.emoji.clip import cells, loosened, shares
from worlds.emoji.glyphs import Glyphs, lists
from worlds.emoji.scenes import (
    PALETTE,
    PATTERNS,
    UNSEEN_COLOURS,
    Scenes,
    background,
    captions,
    figures,
    render,
    sample_scenes,
)
from worlds.emoji.train_utils import World, learning_rate


@pytest.fixture(scope="module")
def glyphs() -> Glyphs:
    """Four squares, two of them held out; premultiplied colour and alpha."""
    atlas = torch.zeros(4, 4, 16, 16)
    for number in range(4):
        atlas[number, number % 3, 4:12, 4:12] = 1
        atlas[number, 3, 4:12, 4:12] = 1
    return Glyphs(("apple", "pear", "plum", "fig"), atlas, seen=2)


def scenes(glyphs: Glyphs, count: int = 200, seed: int = 0, **options: object) -> Scenes:
    return sample_scenes(glyphs, count, torch.Generator().manual_seed(seed), **options)  # pyright: ignore[reportArgumentType]


def test_the_same_seed_draws_the_same(glyphs: Glyphs) -> None:
    first, second, other = (render(scenes(glyphs, seed=s), glyphs, 32) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == (200, 3, 32, 32)
    assert 0 <= first.min() <= first.max() <= 1


@pytest.mark.parametrize("seen", [True, False])
def test_held_out_glyphs_and_looks_never_meet_the_seen(glyphs: Glyphs, seen: bool) -> None:
    drawn = scenes(glyphs, seen_glyphs=seen, seen_look=seen)
    shown = drawn.glyph[drawn.glyph >= 0]
    assert bool((shown < glyphs.seen).all()) == seen
    assert bool((drawn.colour[:, 0] < len(PALETTE) - UNSEEN_COLOURS).all()) == seen
    assert bool((drawn.pattern < len(PATTERNS) - 1).all()) == seen


def test_glyphs_stand_inside_where_they_say(glyphs: Glyphs) -> None:
    drawn = scenes(glyphs, pairs=0)
    bare = render(drawn, glyphs, 64, with_background=False)
    ink = (bare - 0.5).abs().amax(1) > 0.3
    line = (torch.arange(64) + 0.5) / 32 - 1
    weight = ink.float()
    found = (
        torch.stack([(weight * line).sum((1, 2)), (weight * line[:, None]).sum((1, 2))], 1)
        / weight.sum((1, 2))[:, None]
    )
    assert (found - drawn.centre[:, 0]).abs().max() < 0.05


def test_a_turned_hue_changes_colour_and_not_shape(glyphs: Glyphs) -> None:
    plain = scenes(glyphs, 8, pairs=0)
    plain.hue[:] = 0
    turned = Scenes(**{**vars(plain), "hue": torch.full_like(plain.hue, 2.0)})
    a, b = (render(s, glyphs, 32, with_background=False) for s in (plain, turned))
    changed = (a - b).abs().amax(1) > 0.05
    assert bool(changed.flatten(1).any(1).all())
    assert not bool((changed & ((a - 0.5).abs().amax(1) < 1e-4)).any())


def test_backgrounds_hold_their_two_colours(glyphs: Glyphs) -> None:
    drawn = scenes(glyphs)
    ground = background(drawn, 32)
    low, high = (op(drawn.shade, 1).values[..., None, None] for op in (torch.min, torch.max))
    assert bool((ground >= low - 1e-5).all() and (ground <= high + 1e-5).all())
    solid = drawn.pattern == 0
    assert ground[solid].flatten(2).std(2).max() < 1e-5


def test_captions_name_the_glyphs_and_only_part_of_the_rest(glyphs: Glyphs) -> None:
    drawn = scenes(glyphs)
    texts = captions(drawn, glyphs, torch.Generator().manual_seed(0))
    for text, pair in zip(texts, drawn.glyph.tolist(), strict=True):
        assert all(glyphs.names[g] in text for g in pair if g >= 0)
    said = sum(" on " in text for text in texts)
    assert 60 < said < 140


def test_the_seed_of_a_step_depends_on_step_and_rank(tmp_path: Path) -> None:
    world = World("cpu", tmp_path)
    draws = {
        tuple(torch.rand(2, generator=world.generator(*salt)).tolist())
        for salt in ((1,), (2,), (1, 1), (1, 2), (1,))
    }
    assert len(draws) == 4


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] < 0.1
    assert max(rates) > 0.98
    # level until the last third, so that a longer run is the same until then
    assert rates[600] == 1.0
    assert rates[-1] < 5e-3


def test_the_lists_of_glyphs_are_large_and_apart() -> None:
    groups = lists()
    names = [name for group in groups.values() for name in group]
    assert len(names) == len(set(names))
    assert len(groups["core"]) == 72
    assert len(groups["core"] + groups["more"]) >= 400
    assert len(groups["held_out"]) >= 60


def test_a_core_is_drawn_as_often_as_is_said(glyphs: Glyphs) -> None:
    cored = replace(glyphs, core=1)
    for share in (0.0, 0.3, 1.0):
        drawn = scenes(cored, 2000, core=share)
        assert abs((drawn.glyph[:, 0] == 0).float().mean().item() - share) < 0.05


def test_figures_are_where_glyphs_cover_the_background(glyphs: Glyphs) -> None:
    drawn = scenes(glyphs, 50, pairs=0.5)
    where = figures(drawn, glyphs, 32)
    bare, ground = render(drawn, glyphs, 32), background(drawn, 32)
    assert where.shape == (50, 1, 32, 32)
    assert torch.allclose(bare.where(where > 0, ground), bare)
    assert (where == 1).flatten(1).any(1).all()


def test_loosened_scenes_keep_all_but_sizes_and_places(glyphs: Glyphs) -> None:
    drawn = scenes(glyphs)
    loose = loosened(drawn, torch.Generator().manual_seed(0))
    assert all(
        torch.equal(getattr(drawn, name), getattr(loose, name))
        for name in ("glyph", "hue", "pattern", "shade", "wave")
    )
    same = (loose.size == drawn.size).all(1)
    assert 0.3 < same.float().mean() < 0.7
    assert torch.equal(loose.centre[same], drawn.centre[same])


def test_shares_of_a_pair_are_halves(glyphs: Glyphs) -> None:
    drawn = scenes(glyphs, 3, pairs=1)
    drawn.glyph[:] = torch.tensor([[0, 1], [1, -1], [1, 1]])
    assert shares(drawn, glyphs.seen).tolist() == [[0.5, 0.5], [0, 1], [0, 1]]


def test_cells_are_the_patches_pixels_in_order() -> None:
    pictures = torch.arange(64.0).view(1, 1, 8, 8)
    assert cells(pictures, 2)[0, 1].tolist() == pictures[0, 0, :4, 4:].flatten().tolist()


def test_a_rehearsal_has_few_steps_and_scenes(tmp_path: Path) -> None:
    whole, few = (World("cpu", tmp_path, most=most) for most in (None, 20))
    assert {
        value["steps"]
        for value in few.plan.values()
        if isinstance(value, dict) and "steps" in value
    } == {20}
    assert few["pool"] == 320 < whole["pool"]
    assert few["unet"]["channels"] == whole["unet"]["channels"]


def test_the_figures_weight_is_relaxed_in_the_last_third() -> None:
    assert [relaxed(step, 900, 3.0, 1.0) for step in (0, 600, 750, 900)] == [3.0, 3.0, 2.0, 1.0]
