"""Check of a training set before training: every sample is read once, as training reads it."""

import hashlib
import os
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from imprompt.training.samples import BadSample, Size, Source

CHUNK = 1024  # samples given to the threads at a time
# pixels: the edges between rows of the histogram
SHORT_SIDES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
SIDE_ROWS = [
    f"below {SHORT_SIDES[0]}",
    *(f"{low} to {high - 1}" for low, high in pairwise(SHORT_SIDES)),
    f"{SHORT_SIDES[-1]} and more",
]
ASPECTS = (1 / 2, 3 / 4, 4 / 3, 2 / 1)  # width:height: the edges between rows
ASPECT_ROWS = ["narrower than 1:2", "1:2 to 3:4", "3:4 to 4:3", "4:3 to 2:1", "2:1 and wider"]


@dataclass(frozen=True)
class Finding:
    """Number of samples that have one property, and the first of them."""

    count: int
    examples: list[str]

    @classmethod
    def of(cls, lines: Iterable[str], most: int) -> Self:
        """Count the lines, and keep the first `most` as examples."""
        lines = list(lines)
        return cls(len(lines), lines[:most])


@dataclass(frozen=True)
class SetReport:
    """Findings of `check_set`.

    Sizes are those of the usable upright target pictures, in pixels.
    """

    samples: int  # in the shards that could be opened
    usable: int
    # else only headers were read, which show neither damage after them nor duplicates
    every_pixel: bool
    unusable: dict[str, Finding]  # by kind
    bad_shards: Finding
    uncaptioned: Finding  # usable, as captions are optional
    smallest: str | None  # by short side
    largest: str | None
    short_sides: dict[str, int]  # histogram
    aspects: dict[str, int]  # histogram of width:height
    too_small: Finding | None  # with a short side below the training size, if one was given
    duplicates: Finding | None  # all pixels equal those of an earlier picture
    repeated_captions: Finding  # an earlier sample has the same caption

    @property
    def fine(self) -> bool:
        """Whether every sample and shard can be used."""
        return not (self.unusable or self.bad_shards.count)


@dataclass(frozen=True, slots=True)
class Look:
    """Facts about one sample."""

    name: str
    text: str = ""
    size: Size = (0, 0)
    digest: bytes = b""  # of size and pixels, where they were decoded
    bad: BadSample | None = None

    @property
    def short_side(self) -> int:
        """Shorter side of the picture in pixels."""
        return min(self.size)

    def __str__(self) -> str:
        return f"{self.name} ({self.size[0]}×{self.size[1]})"


def look_at(source: Source, index: int, every_pixel: bool) -> Look:
    """Read a sample and all its pictures, or only the target picture's header."""
    try:
        sample = source.read(index)
        if not every_pixel:
            return Look(sample.name, sample.text, source.size(index))
        picture = sample.picture()
        sample.checked_mask(picture)
        for reference in sample.references:
            if reference is not sample.picture:
                reference()
    except BadSample as error:
        return Look(error.name, bad=error)
    digest = hashlib.blake2b(picture.tobytes(), digest_size=16, person=b"%dx%d" % picture.size)
    return Look(sample.name, sample.text, picture.size, digest.digest())


def looks(source: Source, every_pixel: bool) -> Iterator[Look]:
    """Yield the facts about all samples in order, read by several threads.

    Pillow decodes outside the interpreter's lock.
    """
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 2))) as pool,
    ):
        # opening a picture changes and restores the filters, which the threads share
        warnings.simplefilter("ignore")
        for start in range(0, len(source), CHUNK):
            part = range(start, min(start + CHUNK, len(source)))
            yield from pool.map(lambda index: look_at(source, index, every_pixel), part)


def check_set(
    source: Source,
    every_pixel: bool = True,
    on_sample: Callable[[int, int], None] | None = None,
    *,
    training_size: int | None = None,
    examples: int = 5,
) -> SetReport:
    """Read the whole set and report on it, with up to `examples` names for each finding.

    `on_sample` is called with (samples done, samples in all).
    """
    bad: list[BadSample] = []
    good: list[Look] = []
    for done, seen in enumerate(looks(source, every_pixel), 1):
        if seen.bad:
            bad.append(seen.bad)
        else:
            good.append(seen)
        if on_sample:
            on_sample(done, len(source))
    small = [str(seen) for seen in good if training_size and seen.short_side < training_size]
    return SetReport(
        samples=len(source),
        usable=len(good),
        every_pixel=every_pixel,
        unusable={
            kind: Finding.of(map(str, part), examples) for kind, part in by_kind(bad).items()
        },
        bad_shards=Finding.of(map(str, source.bad_shards), examples),
        uncaptioned=Finding.of((seen.name for seen in good if not seen.text), examples),
        smallest=str(min(good, key=lambda seen: seen.short_side)) if good else None,
        largest=str(max(good, key=lambda seen: seen.short_side)) if good else None,
        short_sides=histogram((seen.short_side for seen in good), SHORT_SIDES, SIDE_ROWS),
        aspects=histogram((seen.size[0] / seen.size[1] for seen in good), ASPECTS, ASPECT_ROWS),
        too_small=Finding.of(small, examples) if training_size else None,
        duplicates=Finding.of(duplicates(good), examples) if every_pixel else None,
        repeated_captions=repeated_captions(good, examples),
    )


def by_kind(bad: Sequence[BadSample]) -> dict[str, list[BadSample]]:
    """Group bad samples by kind, the most frequent kind first."""
    counts = Counter(error.kind for error in bad)
    return {
        kind: [error for error in bad if error.kind == kind] for kind, _ in counts.most_common()
    }


def histogram(
    values: Iterable[float], edges: Sequence[float], rows: Sequence[str]
) -> dict[str, int]:
    """Count the values that fall into each row; rows without a value are left out."""
    counts = Counter(bisect_right(edges, value) for value in values)
    return {row: counts[number] for number, row in enumerate(rows) if counts[number]}


def duplicates(good: Iterable[Look]) -> Iterator[str]:
    """Yield a line for every picture whose pixels all equal those of an earlier one."""
    first: dict[bytes, Look] = {}
    for seen in good:
        if (same := first.setdefault(seen.digest, seen)) is not seen:
            yield f"{seen.name} equals {same.name}"


def repeated_captions(good: Iterable[Look], examples: int) -> Finding:
    """Count the samples that have the caption of an earlier one.

    The examples are the most frequent captions.
    """
    repeated = [
        (text, count)
        for text, count in Counter(seen.text for seen in good if seen.text).most_common()
        if count > 1
    ]
    return Finding(
        sum(count - 1 for _, count in repeated),
        [f"{count} times {text!r}" for text, count in repeated[:examples]],
    )
