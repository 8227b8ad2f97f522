"""Data of a run: a set's pictures, or their features encoded once.

It decides which samples are trained on and which are held out, and records which are bad.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from imprompt.errors import ImpromptError, SettingError, first_line
from imprompt.files import atomic_write
from imprompt.training.augmented import (
    AugmentedSample,
    AugmentedSamples,
    PictureReader,
    SampleReader,
)
from imprompt.training.batches import Composer, RankSlice, loader
from imprompt.training.buckets import bucket_sizes
from imprompt.training.cache import (
    FeatureReader,
    open_features,
    read_manifest,
    refuse_others,
    shard_sizes,
    shard_tables,
)
from imprompt.training.contents import edited_samples
from imprompt.training.encoding import encode_set, source_origin
from imprompt.training.examples import Examples
from imprompt.training.feature_size import FeatureSize
from imprompt.training.features import FeatureEncoder, wanted_identity
from imprompt.training.model import Measures, encoder_place
from imprompt.training.order import Order, SampleIndex
from imprompt.training.recipe import Data, Recipe
from imprompt.training.samples import BadSample, Source
from imprompt.training.shards import KEEP
from imprompt.training.sources import is_local, open_source
from imprompt.untrusted import StoredTable, read_json_lines

# remote shards mixed at a time: slow processes may still read the window before
REMOTE_WINDOW = KEEP // 2


def have_features(recipe: Recipe) -> bool:
    """Return whether all features are encoded, so that their models are not needed."""
    return recipe.data.features is not None and (recipe.data.features / "manifest.json").exists()


def refuse_edited(recipe: Recipe, thorough: bool = False) -> None:
    """Raise SettingError if the set was edited since its features were encoded.

    A set that is not on this disk any more, or not at all, is not compared.

    thorough  whether to read files whose size and time have not changed
    """
    folder = recipe.data.features
    if folder is None or not have_features(recipe) or not is_local(recipe.data):
        return
    source, plan = open_source(recipe.data), read_manifest(folder)
    refuse_others(folder, {"samples": plan["samples"]}, {"samples": len(source)})
    try:
        tables = shard_tables(folder, plan)
    except (OSError, SettingError):  # reported when they are opened
        return
    edited: list[int] = []
    for number, (size, table) in enumerate(zip(shard_sizes(plan), tables, strict=True)):
        start = number * plan["shard"]
        edited += edited_samples(source, range(start, start + size), table, thorough)
    if edited:
        names = ", ".join(source.name(index) for index in edited[:5])
        raise SettingError(
            f"{folder} holds features of {len(edited):,} samples that were edited since ({names}): "
            "imprompt data encode RECIPE encodes them again"
        )


def encode_features(
    recipe: Recipe,
    source: Source,
    frozen: FeatureEncoder,
    share: RankSlice,
    on_done: Callable[[int, int], None],
    on_size: Callable[[FeatureSize], None] = lambda _size: None,
) -> None:
    """Encode this process's part of the recipe's features folder; see `encode_set`."""
    assert recipe.data.features is not None
    sizes = bucket_sizes(recipe.data, frozen.size(recipe.data))
    examples = Examples(source, sizes, frozen.unit, frozen.references)
    encode_set(
        recipe.data.features,
        source,
        examples,
        frozen,
        recipe.data,
        rank=share.rank,
        ranks=share.ranks,
        on_done=on_done,
        on_size=on_size,
    )


def read_features(recipe: Recipe, measured: Measures) -> FeatureReader:
    """Open the recipe's features; raise SettingError if its folder holds different ones."""
    assert recipe.data.features is not None
    variant = recipe.adapter_variant
    place = str(encoder_place(recipe)) if variant.image_feature else ""
    identity = wanted_identity(
        recipe.model, place, variant, recipe.data, measured.size, recipe.face_source
    )
    return open_features(recipe.data.features, {**identity, **source_origin(recipe.data)})


def read_pictures(
    recipe: Recipe, source: Source, measured: Measures, frozen: FeatureEncoder
) -> PictureReader:
    """Return a reader of the source's pictures in the sizes of the recipe's buckets."""
    sizes = bucket_sizes(recipe.data, measured.size)
    return PictureReader(source, sizes, frozen.references, measured.unit, measured.channels)


@dataclass
class DataPipeline:
    """Batches of a reader's samples for this process."""

    reader: SampleReader
    data: Data
    seed: int
    share: RankSlice
    batch: int
    compose: Composer
    held_out: np.ndarray = field(init=False)  # sample numbers
    order: Order = field(init=False)

    def __post_init__(self) -> None:
        count, kept = len(self.reader), self.data.held_out
        if count - kept < 1:
            raise ImpromptError(
                f"the set has {count:,} samples and data.held_out = {kept:,} of them are held out: "
                "none is left"
            )
        ends, window = np.cumsum(self.reader.shards), self._window()
        # Few remote shards hold the held-out samples, because every saved state reads them.
        pool = count if window is None else int(ends[np.searchsorted(ends, min(2 * kept, count))])
        self.held_out = np.sort(np.random.default_rng((self.seed, count)).permutation(pool)[:kept])
        shards = [
            np.setdiff1d(part, self.held_out) for part in np.split(np.arange(count), ends[:-1])
        ]
        self.order = Order(
            [shard for shard in shards if len(shard)],
            self.batch,
            self.seed,
            self.reader.bucket,
            window,
        )

    def _window(self) -> int | None:
        return (
            REMOTE_WINDOW
            if getattr(getattr(self.reader, "source", None), "remote", False)
            else None
        )

    @property
    def samples(self) -> int:
        """Number of samples that are trained on in an epoch."""
        return len(self.reader) - len(self.held_out)

    def samples_from(self, start: int) -> Iterator[AugmentedSample]:
        """Return an iterator over this process's parts of the batches from step `start` on."""
        return loader(
            AugmentedSamples(self.reader, self.data, self.seed),
            self.order.steps(start),
            self.share,
            self.data.workers,
        )

    def held_out_samples(self) -> Iterator[tuple[np.ndarray, AugmentedSample]]:
        """Yield batches of held-out samples with their numbers among the held-out ones."""
        return self.fixed_samples(self.held_out)

    def first_samples(self, count: int) -> np.ndarray:
        """Return the numbers of the `count` samples that are trained on first."""
        drawn = islice(chain.from_iterable(self.order.steps(0)), count)
        return np.unique([draw.sample for draw in drawn])

    def fixed_samples(self, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, AugmentedSample]]:
        """Yield batches of the chosen samples with their places in `chosen`.

        Nothing is dropped or mirrored, and the noise is always the same.
        """
        plain = self.data.model_copy(
            update={"flip": False, "drop_text": 0.0, "drop_image": 0.0, "drop_both": 0.0}
        )
        augmented = AugmentedSamples(self.reader, plain, self.seed)
        size = max(1, self.batch // (self.share.ranks * self.share.parts))
        numbers = np.arange(len(chosen))
        of = self.reader.bucket[chosen]
        for bucket in np.unique(of):
            here = numbers[of == bucket]
            for part in np.split(here, range(size, len(here), size)):
                drawn = [SampleIndex(-1, int(chosen[number])) for number in part]
                yield part, AugmentedSample.stack([augmented[index] for index in drawn])


class FoundBad(StoredTable):
    """A line of bad.jsonl."""

    step: int
    name: str
    why: str
    samples: int


class Bad:
    """Samples and shards that could not be used, listed in RUN/bad.jsonl.

    Each is listed once, with the step at which it was found.
    """

    def __init__(
        self, run: Path, allowed: float, reader: SampleReader, step: int, *, write: bool
    ) -> None:
        """Read what was found up to `step`.

        A run that resumes after `step` finds later ones again, if they are still bad.

        allowed  share of the samples
        write    whether this process writes the file
        """
        self.file, self.allowed, self.write = run / "bad.jsonl", allowed, write
        self.samples = len(reader) + sum(shard.samples for shard in reader.bad_shards)
        try:
            rows = read_json_lines(self.file, FoundBad) if self.file.exists() else []
        except (OSError, SettingError) as error:
            raise SettingError(
                f"{self.file} is damaged ({first_line(error)}): remove it, and what it lists is "
                "found again"
            ) from error
        self._written: dict[str, dict[str, Any]] = {row["name"]: row for row in rows}
        self.known = {name: row for name, row in self._written.items() if row["step"] <= step}

    @property
    def count(self) -> int:
        """Number of bad samples, including those of bad shards."""
        return sum(row["samples"] for row in self.known.values())

    def add(self, found: Iterable[BadSample], step: int) -> list[BadSample]:
        """Add what all processes found up to `step`, and return what is new.

        Raise ImpromptError, with names, if more samples are bad than is allowed.
        """
        new = {error.name: error for error in found if error.name not in self.known}
        self.known |= {
            e.name: {"step": step, "name": e.name, "why": e.why, "samples": e.samples}
            for e in new.values()
        }
        if self.write and self.known != self._written:
            self._write()
        if self.count > self.allowed * self.samples:
            first = "; ".join(
                f"{row['name']}: {row['why']}" for row in list(self.known.values())[:5]
            )
            raise ImpromptError(
                f"{self.count:,} of {self.samples:,} samples cannot be used, more than "
                f"data.max_bad = {self.allowed:g} "
                f"allows; all of them are in {self.file}, the first: {first}"
            )
        return list(new.values())

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.file) as temporary:
            temporary.write_text(
                "".join(json.dumps(row) + "\n" for row in self.known.values()), encoding="utf-8"
            )
        self._written = dict(self.known)


def bad_of(samples: Sequence[AugmentedSample]) -> list[BadSample]:
    """Return the errors of the samples that could not be read."""
    return [error for part in samples for error in part.bad]
