"""Compute metrics with pure functions on tensors; the models are in `metric_encoders`.

Shape letters: N pictures, R real ones, I items of a set, K pictures of one item, E and D widths of
an embedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RESAMPLES = 2000
SUBSETS, SUBSET_SIZE = 100, 1000  # the usual ones for the kernel distance


@dataclass(frozen=True)
class Metric:
    """A metric's title, its definition in one sentence, its better side and its digits.

    `higher_is_better` is None if neither side is better. Values of fewer than `least` pictures are
    not compared: a distance between few pictures says little.
    """

    title: str
    about: str
    higher_is_better: bool | None
    digits: int
    per_picture: bool = True  # it has a column in rows.jsonl
    least: int = 1


TARGET = "the picture that it should be like: its image prompt, where the set names no other"
METRICS = {
    "clip_i": Metric("CLIP-I", f"Cosine likeness, in CLIP's image space, to {TARGET}.", True, 4),
    "dino": Metric("DINO", f"Cosine likeness, in DINO's space, to {TARGET}.", True, 4),
    "clip_t": Metric("CLIP-T", "Cosine likeness to the caption, in CLIP's common space.", True, 4),
    "clip_t_photo": Metric(
        "CLIP-T, A photo depicts", "CLIP-T with “A photo depicts ” before the caption.", True, 4
    ),
    "clip_score": Metric("CLIPScore", "2.5 × max(CLIP-T, 0).", True, 4),
    "clip_score_photo": Metric(
        "CLIPScore, A photo depicts",
        "2.5 × max(CLIP-T, 0) with “A photo depicts ” before the caption.",
        True,
        4,
    ),
    "diversity": Metric(
        "Diversity",
        "1 − cosine likeness, in CLIP's image space, to the item's other pictures.",
        None,
        4,
    ),
    "fid": Metric(
        "FID",
        "Fréchet distance of the pictures' features to those of the set.",
        False,
        2,
        per_picture=False,
        least=2048,
    ),
    "kid": Metric(
        "KID × 1000",
        "Kernel distance (MMD², cubic kernel) of the same features, × 1000.",
        False,
        3,
        per_picture=False,
        least=SUBSET_SIZE,
    ),
}


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine similarity along the last dimension; the others broadcast."""
    return F.cosine_similarity(a.double(), b.double(), dim=-1)


def clip_score(likeness: Tensor) -> Tensor:
    """Return 2.5 · max(CLIP-T, 0), any shape (Hessel et al., arXiv 2104.08718, section 3)."""
    return 2.5 * likeness.clamp(min=0)


def diversity(embeddings: Tensor) -> Tensor:
    """Return how unlike each picture of an item is to the others: (K, E) -> (K,).

    It is the mean of 1 − cos to the others, NaN for a single picture. The mean over the pictures is
    the mean over all pairs.
    """
    apart = 1 - cosine(embeddings[:, None], embeddings[None])
    return apart.fill_diagonal_(0).sum(1) / (len(embeddings) - 1)


# Fréchet and kernel distance do not use torchmetrics: it would add a package for twenty lines,
# needs a module that takes pictures, draws subsets with torch's global seed and hides their values.
# Tests compare both.


def frechet_distance(real: Tensor, made: Tensor) -> float:
    """Return |μ − μ'|² + tr(Σ + Σ' − 2 (Σ Σ')^½) of features (R, D) and (N, D).

    Heusel et al., arXiv 1706.08500, equation 6. With fewer pictures than D it is far too high.
    Raise ValueError for fewer than two.
    """
    if min(len(real), len(made)) < 2:
        raise ValueError("a covariance needs at least two pictures")
    (mean, root), (other_mean, other_root) = (
        _moments(features.double()) for features in (real, made)
    )
    # Σ = A Aᵀ and Σ' = B Bᵀ: the eigenvalues of Σ Σ' are the squared singular values of Aᵀ B,
    # without a root's rounding.
    overlap = torch.linalg.svdvals(root.T @ other_root).sum()
    return (
        (mean - other_mean).square().sum()
        + root.square().sum()
        + other_root.square().sum()
        - 2 * overlap
    ).item()


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) of features (N, D), and a root A (D, min(N, D)) of their covariance.

    A Aᵀ is the unbiased covariance.
    """
    mean = features.mean(0)
    centred = (features - mean) / (len(features) - 1) ** 0.5
    return mean, (
        torch.linalg.qr(centred, mode="r").R if len(features) > features.shape[1] else centred
    ).T


def kernel_distances(
    real: Tensor, made: Tensor, *, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0
) -> Tensor:
    """Return the unbiased MMD² of random subsets of features (R, D) and (N, D): (subsets,).

    Bińkowski et al., arXiv 1801.01401. The kernel is (x·y / D + 1)³, and the mean of the result is
    KID. `size` is limited to the number of pictures; ValueError for fewer than two.
    """
    size = min(size, len(real), len(made))
    if size < 2:
        raise ValueError("an unbiased kernel distance needs at least two pictures")
    generator = torch.Generator().manual_seed(seed)

    def drawn(features: Tensor) -> Tensor:
        return features[
            torch.randperm(len(features), generator=generator)[:size].to(features.device)
        ].double()

    return torch.stack([_mmd(drawn(real), drawn(made)) for _ in range(subsets)])


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased MMD² of (M, D) and (M, D): the paper's equation 4, cubic kernel."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    m = len(x)
    within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y)))
    return within / (m * (m - 1)) - 2 * kernel(x, y).mean()


class Interval(NamedTuple):
    """A mean with its 95 % interval; low and high are None if there is only one item."""

    value: float
    low: float | None
    high: float | None


def bootstrap_interval(values: Tensor, items: Tensor, *, seed: int = 0) -> Interval:
    """Return the mean of `values` (N,) and its bootstrap interval over items.

    The pictures of one item are resampled together.

    items  (N,) of integers: which item each value is of
    """
    sums, counts = _by_item(values, items)
    if len(sums) < 2:
        return Interval(values.double().mean().item(), None, None)
    means = torch.cat(
        [sums[drawn].sum(1) / counts[drawn].sum(1) for drawn in _resamples(len(sums), seed)]
    )
    return Interval(values.double().mean().item(), *_central(means))


def difference(
    a: Tensor, a_items: Tensor, b: Tensor, b_items: Tensor, *, seed: int = 0
) -> Interval:
    """Return mean(a) − mean(b) over the items that both have, and its bootstrap interval.

    The same items are drawn for both. a, a_items and b, b_items as in `bootstrap_interval`; equal
    integers are equal items. Raise ValueError if there is no such item.
    """
    shared = torch.as_tensor(sorted({*a_items.tolist()} & {*b_items.tolist()}), dtype=torch.long)
    if not len(shared):
        raise ValueError("no item is in both")
    pair = []
    for values, items in ((a, a_items), (b, b_items)):
        kept = torch.isin(items, shared)
        pair.append(_by_item(values[kept], torch.searchsorted(shared, items[kept])))
    (sums, counts), (other_sums, other_counts) = pair
    value = (sums.sum() / counts.sum() - other_sums.sum() / other_counts.sum()).item()
    if len(shared) < 2:
        return Interval(value, None, None)
    drawn_means = [
        sums[drawn].sum(1) / counts[drawn].sum(1)
        - other_sums[drawn].sum(1) / other_counts[drawn].sum(1)
        for drawn in _resamples(len(shared), seed)
    ]
    return Interval(value, *_central(torch.cat(drawn_means)))


def _by_item(values: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum and count of the values of every item that occurs, (I,) each."""
    _, place = items.unique(return_inverse=True)
    empty = values.new_zeros(int(place.max()) + 1, dtype=torch.float64)
    return empty.index_add(0, place, values.double()), empty.index_add(
        0, place, torch.ones_like(values, dtype=torch.float64)
    )


def _resamples(count: int, seed: int) -> Iterator[Tensor]:
    """Yield indices of items drawn with replacement, (200, I) at a time.

    All of them at once could take gigabytes.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(RESAMPLES // 200):
        yield torch.randint(count, (200, count), generator=generator)


def _central(means: Tensor) -> tuple[float, float]:
    """Return the percentiles between which 95 % of the means lie."""
    low, high = means.quantile(means.new_tensor([0.025, 0.975])).tolist()
    return low, high
