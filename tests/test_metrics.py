"""Metrics against values computed by hand, and against torchmetrics on the same features."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imprompt.evaluation.metric_encoders import open_clip
from imprompt.evaluation.metrics import (
    METRICS,
    bootstrap_interval,
    clip_score,
    cosine,
    difference,
    diversity,
    frechet_distance,
    kernel_distances,
)
from tests.judges import tiny_clip
from tests.tiny import pictures, seeded


def features(count: int, width: int, shift: float = 0.0, seed: int = 0) -> Tensor:
    """Correlated ones, (count, width)."""
    with seeded(seed):
        return (
            torch.randn(count, width) @ (torch.eye(width) + 0.3 * torch.randn(width, width)) + shift
        )


def test_cosine_and_clip_score_by_hand() -> None:
    a, b = (
        torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]]),
        torch.tensor([[4.0, 3.0], [0.0, 5.0], [-1.0, 0.0]]),
    )
    likeness = cosine(a, b)
    assert likeness.tolist() == pytest.approx([0.96, 0, -1])
    assert clip_score(likeness).tolist() == pytest.approx([2.4, 0, 0])


def test_diversity_by_hand() -> None:
    east, north, west = [2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
    apart = diversity(torch.tensor([east, north, west]))
    # to the two others: 1 and 2, 1 and 1, 2 and 1
    assert apart.tolist() == pytest.approx([1.5, 1, 1.5])
    assert apart.mean().item() == pytest.approx((1 + 2 + 1) / 3)  # of the three pairs
    assert diversity(torch.tensor([east, east])).tolist() == [0, 0]
    assert math.isnan(diversity(torch.tensor([east])).item())


def test_frechet_distance_by_hand() -> None:
    """Of diagonal covariances it is |μ − μ'|² + Σ (σ − σ')²."""
    # variance 4/3 in each direction
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    moved = corners * torch.tensor([3.0, 1.0]) + torch.tensor([3.0, 4.0])
    assert frechet_distance(corners, moved) == pytest.approx(25 + (4 / 3) * (3 - 1) ** 2)
    assert frechet_distance(corners, corners) == pytest.approx(0, abs=1e-12)
    line = torch.tensor([[0.0], [2.0]])  # mean 1, variance 2
    assert frechet_distance(line, 2 * line) == pytest.approx(1 + (8**0.5 - 2**0.5) ** 2)
    with pytest.raises(ValueError, match="two"):
        frechet_distance(line[:1], line)


def test_kernel_distance_by_hand() -> None:
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    # k(1, 2) = 27 within x, k(0, 1) = 1 within y; k = 1, 8, 1, 27 across.
    assert kernel_distances(x, y, subsets=3).tolist() == pytest.approx(
        [27 + 1 - 2 * (1 + 8 + 1 + 27) / 4] * 3
    )
    with pytest.raises(ValueError, match="two"):
        kernel_distances(x[:1], y)


class AsTheyAre(nn.Module):
    """In Inception's place: features are given as pictures."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, given: Tensor) -> Tensor:
        return given


def told_by(metric: Any, real: Tensor, made: Tensor) -> Any:
    metric.update(real, real=True)
    metric.update(made, real=False)
    return metric.compute()


# more than dimensions, and fewer
@pytest.mark.parametrize(("count", "other"), [(200, 300), (20, 12)])
def test_frechet_distance_is_torchmetrics(count: int, other: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, made = features(count, 24), features(other, 24, 0.2, seed=1)
    theirs = told_by(
        FrechetInceptionDistance(AsTheyAre(24)).set_dtype(torch.float64),
        real.double(),
        made.double(),
    )
    assert frechet_distance(real, made) == pytest.approx(theirs.item(), rel=1e-5)


def test_kernel_distance_is_torchmetrics() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    real, made = features(60, 24), features(60, 24, 0.2, seed=1)
    with warnings.catch_warnings(), seeded(0):
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the features
        whole = told_by(
            KernelInceptionDistance(AsTheyAre(24), subsets=1, subset_size=60),
            real.double(),
            made.double(),
        )
        drawn = told_by(
            KernelInceptionDistance(AsTheyAre(24), subsets=2000, subset_size=20),
            real.double(),
            made.double(),
        )
    assert kernel_distances(real, made, subsets=1).item() == pytest.approx(
        whole[0].item(), rel=1e-9
    )
    ours = kernel_distances(real, made, subsets=2000, size=20)
    # two deviations of a difference of two such means
    error = 2 * (2 * drawn[1].item() ** 2 / 2000) ** 0.5
    assert ours.mean().item() == pytest.approx(drawn[0].item(), abs=error)
    assert ours.std().item() == pytest.approx(drawn[1].item(), rel=0.1)
    assert torch.equal(ours, kernel_distances(real, made, subsets=2000, size=20))
    assert not torch.equal(ours, kernel_distances(real, made, subsets=2000, size=20, seed=1))


def test_clip_score_is_torchmetrics(tmp_path: Path) -> None:
    """With the same CLIP, from pictures and texts to the score, which torchmetrics gives as 100 ·
    max(cos, 0).
    """
    import numpy as np
    from torchmetrics.multimodal.clip_score import CLIPScore
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tiny_clip(tmp_path / "clip")
    shown, texts = (
        pictures(6),
        ["a cat", "dog", "A photo depicts a tree", "x", "blue sky at noon", "z z z"],
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    tokenizer: Any = CLIPTokenizer.from_pretrained(folder)

    class Processor:
        def __call__(self, text: Any = None, images: Any = None, **options: Any) -> Any:
            options = {"return_tensors": "pt"} | (
                {"padding": options["padding"]} if text is not None else {}
            )
            return (
                tokenizer(text, **options) if images is None else image_processor(images, **options)
            )

    network = CLIPModel.from_pretrained(folder).eval()
    network.get_image_features, network.get_text_features = (
        plain(network.get_image_features),
        plain(network.get_text_features),
    )
    metric = CLIPScore(lambda: (network, Processor()))
    clip = open_clip(str(folder), "cpu")
    assert clip.texts is not None
    ours = cosine(clip.images(shown), clip.texts(texts))
    assert ours.min() < 0 < ours.max()  # both sides of the cut
    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in shown]
    theirs = (
        torch.tensor(
            [metric(tensor, text).item() for tensor, text in zip(tensors, texts, strict=True)]
        )
        / 100
    )
    assert torch.allclose(clip_score(ours).float(), 2.5 * theirs.clamp(min=0), atol=1e-5)


def plain(method: Callable[..., Any]) -> Callable[..., Tensor]:
    """Features as a tensor, as transformers gave them when torchmetrics was written."""

    def called(*args: Any, **kwargs: Any) -> Tensor:
        given = method(*args, **kwargs)
        return given if isinstance(given, Tensor) else given.pooler_output

    return called


def test_an_interval_is_of_items_not_of_pictures() -> None:
    with seeded(0):
        of_item = torch.randn(400)
    items = torch.arange(400).repeat_interleave(5)
    alone, often = (
        bootstrap_interval(of_item, torch.arange(400)),
        bootstrap_interval(of_item.repeat_interleave(5), items),
    )
    assert often == pytest.approx(alone)  # five times the same picture tells nothing new
    assert alone.value == pytest.approx(of_item.mean().item())
    half = 1.96 * of_item.std().item() / 20
    assert alone.low == pytest.approx(alone.value - half, abs=0.15 * half)
    assert alone.high == pytest.approx(alone.value + half, abs=0.15 * half)
    naive = bootstrap_interval(of_item.repeat_interleave(5), torch.arange(2000))
    assert naive.high - naive.low == pytest.approx((often.high - often.low) / 5**0.5, rel=0.1)
    assert bootstrap_interval(of_item, torch.arange(400)) == alone
    assert bootstrap_interval(of_item, torch.arange(400), seed=1) != alone


def test_items_of_unlike_counts_weigh_as_they_are_many() -> None:
    values, items = torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.tensor([7, 7, 7, 2])
    told = bootstrap_interval(values, items)
    assert told == (2, 1, 5)  # either item can be all that is drawn


def test_a_difference_is_of_the_same_items() -> None:
    with seeded(0):
        hard, noise = torch.randn(300) * 10, torch.randn(300) * 0.1
    items = torch.arange(300)
    a, b = hard + 0.5 + noise, hard
    told = difference(a, items, b, items)
    assert told.value == pytest.approx(0.5 + noise.mean().item(), abs=1e-6)
    assert told.high - told.low < 0.03  # though each mean alone is known to ± 1
    whole = difference(a, items, b[100:], items[100:])  # what only one has is left out
    assert whole == difference(a[100:], items[100:], b[100:], items[100:])
    turned = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert difference(a[turned], items[turned], b, items) == pytest.approx(told)
    with pytest.raises(ValueError, match="no item"):
        difference(a, items, b, items + 300)


def test_every_metric_says_what_it_is() -> None:
    assert all(metric.about.endswith(".") and metric.title for metric in METRICS.values())
    assert [key for key, metric in METRICS.items() if not metric.per_picture] == ["fid", "kid"]


def test_one_item_has_no_interval() -> None:
    values, items = torch.tensor([0.4, 0.6]), torch.zeros(2, dtype=torch.long)
    assert bootstrap_interval(values, items) == (pytest.approx(0.5), None, None)
    assert difference(values, items, values + 0.1, items) == (pytest.approx(-0.1), None, None)
