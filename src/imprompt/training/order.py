"""Which samples make which step: a function of seed and step alone, whatever processes and workers
read them.

So a run goes on exactly where it stopped, also with another number of processes, and no position
has to be saved but the step.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np


class SampleIndex(NamedTuple):
    """One showing of a sample: what is random about it (noise, drops, …) is drawn from these two
    and the seed.
    """

    epoch: int
    sample: int


class Order:
    """Every epoch all samples once, in a new order; every batch of one bucket.

    A sample waits until its bucket has a whole batch, if need be into the next epoch: none is left
    out or shown twice.

    shards   the samples' numbers, shard by shard
    batch    samples a step, over all processes
    buckets  the bucket of every sample number; None: all alike
    window   how many shards are mixed at a time (all if None), so that of remote shards only these
             are needed at once
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
        """The samples in the order of that epoch (samples,)."""
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
        """The batches from step `start` on, without end."""
        waiting: dict[int, np.ndarray] = {}  # bucket -> rows of (epoch, index)
        passed = 0
        for number in count():
            batches = self._fill(waiting, number)
            for batch in batches[max(0, start - passed) :]:
                yield [SampleIndex(*row) for row in batch.tolist()]
            passed += len(batches)

    def _fill(self, waiting: dict[int, np.ndarray], number: int) -> list[np.ndarray]:
        """The batches that an epoch completes, each when its last sample comes.

        What is left over stays in `waiting`.
        """
        order = self.epoch(number)
        of = np.zeros_like(order) if self.buckets is None else self.buckets[order]
        found: list[
            tuple[int, np.ndarray]
        ] = []  # (place in the epoch at which the batch is full, its rows)
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
