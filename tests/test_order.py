"""Which samples make which step, and what is drawn for a showing."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from imprompt.errors import SettingError
from imprompt.training.augmented import sample_rng
from imprompt.training.batches import RankSlice
from imprompt.training.buckets import bucket_sizes, fit, nearest, training_size
from imprompt.training.order import Order, SampleIndex
from imprompt.training.recipe import Data


def orders(sizes: list[int], batch: int, seed: int, kinds: int, window: int | None = None) -> Order:
    ends = np.cumsum(sizes)
    shards = np.split(np.arange(ends[-1]), ends[:-1])
    buckets = np.random.default_rng(seed).integers(0, kinds, ends[-1]) if kinds > 1 else None
    return Order(shards, batch, seed, buckets, window)


ANY = {
    "sizes": st.lists(st.integers(1, 9), min_size=1, max_size=4),
    "batch": st.integers(1, 7),
    "seed": st.integers(0, 5),
    "kinds": st.integers(1, 3),
}


@given(**ANY, window=st.integers(1, 4))
def test_every_epoch_shows_every_sample_once(
    sizes: list[int], batch: int, seed: int, kinds: int, window: int
) -> None:
    order, samples = orders(sizes, batch, seed, kinds, window), sum(sizes)
    epochs = 2 + batch * kinds  # by then all that waited of the first two has had its batch
    draws = [draw for step in islice(order.steps(), epochs * samples // batch) for draw in step]
    shown = Counter(draws)
    assert max(shown.values()) == 1
    assert all(
        shown[SampleIndex(epoch, sample)] == 1 for epoch in range(2) for sample in range(samples)
    )


@given(**ANY)
def test_every_batch_is_full_and_of_one_bucket(
    sizes: list[int], batch: int, seed: int, kinds: int
) -> None:
    order = orders(sizes, batch, seed, kinds)
    for step in islice(order.steps(), 12):
        assert len(step) == batch
        assert order.buckets is None or len({order.buckets[draw.sample] for draw in step}) == 1


@given(**ANY, start=st.integers(0, 20))
def test_a_resumed_run_goes_on_with_the_same_steps(
    sizes: list[int], batch: int, seed: int, kinds: int, start: int
) -> None:
    order = orders(sizes, batch, seed, kinds)
    assert list(islice(order.steps(start), 5)) == list(islice(order.steps(), start + 5))[start:]


def test_epochs_and_seeds_differ() -> None:
    order = orders([50], 5, 1, 1)
    assert not np.array_equal(order.epoch(0), order.epoch(1))
    assert not np.array_equal(order.epoch(0), orders([50], 5, 2, 1).epoch(0))


def test_a_window_of_shards_is_read_before_the_next() -> None:
    order = orders([10] * 6, 4, 3, 1, window=2)
    for part in np.split(order.epoch(0), 3):
        assert len(set(part // 10)) == 2


@given(ranks=st.integers(1, 4), parts=st.integers(1, 4), each=st.integers(1, 3))
def test_processes_share_a_batch_without_gap_or_overlap(ranks: int, parts: int, each: int) -> None:
    draws = [SampleIndex(0, number) for number in range(ranks * parts * each)]
    shares = [RankSlice(rank, ranks, parts).of(draws) for rank in range(ranks)]
    assert all(len(share) == parts and {len(part) for part in share} == {each} for share in shares)
    assert sorted(draw for share in shares for part in share for draw in part) == draws


def test_what_is_drawn_depends_on_seed_epoch_and_sample_alone() -> None:
    def numbers(seed: int, epoch: int, sample: int) -> torch.Tensor:
        return torch.randn(8, generator=sample_rng(seed, SampleIndex(epoch, sample)))

    own = numbers(1, 2, 3)
    torch.manual_seed(9)
    assert torch.equal(own, numbers(1, 2, 3))
    assert not any(
        torch.equal(own, numbers(*other)) for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2))
    )


@given(
    step=st.sampled_from([32, 64]), size=st.sampled_from([256, 512, 1024]), aspect=st.floats(1, 3)
)
def test_buckets_keep_area_steps_and_aspect(step: int, size: int, aspect: float) -> None:
    data = Data(source="x", buckets=True, bucket_step=step, max_aspect=aspect)
    found = bucket_sizes(data, size)
    assert (size, size) in found
    for wide, high in found:
        assert wide % step == high % step == 0
        assert wide * high <= size * size
        assert max(wide / high, high / wide) <= aspect


def test_a_picture_goes_to_the_bucket_of_its_shape() -> None:
    buckets = bucket_sizes(Data(source="x", buckets=True), 512)
    for size, bucket in zip(
        ((300, 300), (1000, 500), (500, 1000)), ((512, 512), (640, 384), (384, 640)), strict=True
    ):
        assert buckets[nearest([size], buckets)[0]] == bucket


def test_fitting_cuts_the_middle_and_says_where() -> None:
    stripes = np.zeros((40, 120, 3), np.uint8)
    stripes[:, 40:80, 0] = 255  # the middle third is red
    cut, told = fit(Image.fromarray(stripes), (20, 20))
    assert cut.size == (20, 20)
    assert (np.asarray(cut)[:, 2:-2, 0] > 240).all()
    assert told.tolist() == [40, 120, 0, 20, 20, 20]  # resized to 60 × 20, cut at 20 from the left


def test_a_size_that_the_vae_cannot_take_is_refused() -> None:
    with pytest.raises(SettingError, match=r"data\.size = 100: .* multiples of 8"):
        training_size(Data(source="x", size=100), 512, 8)
