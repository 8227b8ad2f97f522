"""Order of training: which samples make which step, a function of seed and step alone.

It does not depend on the processes and workers that read them. So a run resumes exactly where it
stopped, also with another number of processes, and only the step has to be saved.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np


class SampleIndex(NamedTuple):
    """One draw of a sample.

    What is random about it (noise, drops, …) is drawn from these two numbers and the seed.
    """

    epoch: int
    sample: int


class Order:
    """Batches of one bucket each; an epoch takes all samples once, in a new order.

    A sample waits until its bucket has a complete batch, if necessary into the next epoch: none is
    left out or drawn twice.

    shards   the samples' numbers, shard by shard
    batch    samples in a step, over all processes
    buckets  the bucket of every sample number; None: all have one
    window   number of shards mixed at a time (all if None), so that only these remote shards are
             needed at once
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        batch: int,
        seed: int,
        buckets: np.ndarray | None = None,
        window: int | None = None,
    ) -> None:
        self.shards, self.batch, self.seed, self.buckets = shards, batch, seed, buckets
        self.window = window or len(shards)

    def epoch(self, number: int) -> np.ndarray:
        """Return the samples in the order of that epoch (samples,)."""
        random = np.random.default_rng((self.seed, number))
        order = random.permutation(len(self.shards))
        windows = [
            order[start : start + self.window] for start in range(0, len(order), self.window)
        ]
        return np.concatenate(
            [
                random.permutation(np.concatenate([self.shards[shard] for shard in part]))
                for part in windows
            ]
        )

    def steps(self, start: int = 0) -> Iterator[list[SampleIndex]]:
        """Yield the batches from step `start` on, without end."""
        waiting: dict[int, np.ndarray] = {}  # bucket -> rows of (epoch, index)
        passed = 0
        for number in count():
            batches = self._fill(waiting, number)
            for batch in batches[max(0, start - passed) :]:
                yield [SampleIndex(*row) for row in batch.tolist()]
            passed += len(batches)

    def _fill(self, waiting: dict[int, np.ndarray], number: int) -> list[np.ndarray]:
        """Return the batches that an epoch completes, in the order in which they become complete.

        Samples that are left over stay in `waiting`.
        """
        order = self.epoch(number)
        of = np.zeros_like(order) if self.buckets is None else self.buckets[order]
        # (position in the epoch at which the batch is complete, its rows)
        found: list[tuple[int, np.ndarray]] = []
        for bucket in np.unique(of).tolist():
            places = np.flatnonzero(of == bucket)
            fresh = np.stack([np.full(len(places), number), order[places]], 1)
            before = waiting.get(bucket, fresh[:0])
            rows = np.concatenate([before, fresh])
            whole = len(rows) // self.batch
            ends = np.arange(1, whole + 1) * self.batch - 1 - len(before)
            found += zip(
                places[ends].tolist(),
                np.split(rows[: whole * self.batch], whole) if whole else [],
                strict=True,
            )
            waiting[bucket] = rows[whole * self.batch :]
        return [rows for _, rows in sorted(found, key=lambda pair: pair[0])]
