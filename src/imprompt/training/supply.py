"""What a run reads: a set's pictures, or their features encoded once; which are trained on, which are held out, which are bad."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from imprompt.errors import ImpromptError
from imprompt.files import written_whole
from imprompt.training.batches import Composer, Item, PictureReader, Reader, Share, Shown, collate, loader
from imprompt.training.buckets import bucket_sizes
from imprompt.training.cache import FeatureReader, open_features
from imprompt.training.encoding import encode, origin
from imprompt.training.examples import Examples
from imprompt.training.features import FeatureEncoder, wanted
from imprompt.training.model import Measures, encoder_place
from imprompt.training.order import Draw, Order
from imprompt.training.recipe import Data, Recipe
from imprompt.training.sources import BadSample, Source
from imprompt.variants import variant

REMOTE_WINDOW = 8  # shards that are mixed at a time where they have to be fetched


def have_features(recipe: Recipe) -> bool:
    """Whether all features are encoded, so that the models that make them are not needed."""
    return recipe.data.features is not None and (recipe.data.features / "manifest.json").exists()


def encode_features(
    recipe: Recipe, source: Source, frozen: FeatureEncoder, share: Share, on_done: Callable[[int, int], None]
) -> None:
    """Fill the recipe's features folder, this process's part of it."""
    assert recipe.data.features is not None
    sizes = bucket_sizes(recipe.data, frozen.size(recipe.data))
    examples = Examples(source, sizes, frozen.encoder.processor)
    encode(recipe.data.features, source, examples, frozen, recipe.data, rank=share.rank, ranks=share.ranks, on_done=on_done)


def read_features(recipe: Recipe, measured: Measures) -> FeatureReader:
    """The recipe's features; SettingError if those in its folder are others."""
    assert recipe.data.features is not None
    place = str(encoder_place(recipe))
    asked = wanted(recipe.model, place, variant(recipe.variant), recipe.data, measured.size)
    return open_features(recipe.data.features, {**asked, **origin(recipe.data)})


def read_pictures(recipe: Recipe, source: Source, measured: Measures, frozen: FeatureEncoder) -> PictureReader:
    sizes = bucket_sizes(recipe.data, measured.size)
    return PictureReader(source, sizes, frozen.encoder.processor, measured.unit, measured.channels)


@dataclass
class Supply:
    """Batches of a reader's samples for this process."""

    reader: Reader
    data: Data
    seed: int
    share: Share
    batch: int
    compose: Composer
    held_out: np.ndarray = field(init=False)  # sample numbers
    order: Order = field(init=False)

    def __post_init__(self) -> None:
        count, kept = len(self.reader), self.data.held_out
        if count - kept < 1:
            raise ImpromptError(f"the set has {count:,} samples and data.held_out = {kept:,} of them are held out: none is left")
        chosen = np.random.default_rng((self.seed, count)).permutation(count)
        self.held_out = np.sort(chosen[:kept])
        ends = np.cumsum(self.reader.shards)[:-1]
        shards = [np.setdiff1d(part, self.held_out) for part in np.split(np.arange(count), ends)]
        self.order = Order([shard for shard in shards if len(shard)], self.batch, self.seed, self.reader.bucket, self._window())

    def _window(self) -> int | None:
        return REMOTE_WINDOW if getattr(getattr(self.reader, "source", None), "remote", False) else None

    @property
    def samples(self) -> int:
        """How many are trained on in an epoch."""
        return len(self.reader) - len(self.held_out)

    def items(self, start: int) -> Iterator[Item]:
        """This process's parts of the batches from step `start` on."""
        return loader(Shown(self.reader, self.data, self.seed), self.order.steps(start), self.share, self.data.workers)

    def held_out_items(self) -> Iterator[tuple[np.ndarray, Item]]:
        """The held-out samples as they are, undropped and unmirrored, with noise that is always the same, and their numbers."""
        plain = self.data.model_copy(update={"flip": False, "drop_text": 0.0, "drop_image": 0.0, "drop_both": 0.0})
        shown, size = Shown(self.reader, plain, self.seed), max(1, self.batch // (self.share.ranks * self.share.parts))
        numbers = np.arange(len(self.held_out))
        of = self.reader.bucket[self.held_out]
        for bucket in np.unique(of):
            here = numbers[of == bucket]
            for part in np.split(here, range(size, len(here), size)):
                yield part, collate([shown[Draw(-1, int(self.held_out[number]))] for number in part])


@dataclass
class Bad:
    """The samples that could not be used: in RUN/bad.jsonl, each once."""

    run: Path
    allowed: float  # share of the samples
    samples: int
    known: dict[str, str] = field(default_factory=dict)  # name -> why

    def __post_init__(self) -> None:
        if self._file.exists():
            self.known = {row["name"]: row["why"] for row in map(json.loads, self._file.read_text().splitlines())}

    @property
    def _file(self) -> Path:
        return self.run / "bad.jsonl"

    def add(self, found: Iterable[BadSample], *, write: bool) -> list[BadSample]:
        """Take in what all processes found since the last time; give what is new. ImpromptError, with names, if it is too much."""
        new = {error.name: error for error in found if error.name not in self.known}
        self.known |= {name: error.why for name, error in new.items()}
        if new and write:
            self.run.mkdir(parents=True, exist_ok=True)
            with written_whole(self._file) as aside:
                aside.write_text(
                    "".join(json.dumps({"name": n, "why": w}, ensure_ascii=False) + "\n" for n, w in self.known.items())
                )
        if len(self.known) > self.allowed * self.samples:
            first = "; ".join(f"{name}: {why}" for name, why in list(self.known.items())[:5])
            raise ImpromptError(
                f"{len(self.known):,} of {self.samples:,} samples cannot be used, more than data.max_bad = {self.allowed:g} "
                f"allows; all of them are in {self._file}, the first: {first}"
            )
        return list(new.values())


def bad_of(items: Sequence[Item]) -> list[BadSample]:
    return [error for item in items for error in item["bad"] if error is not None]
