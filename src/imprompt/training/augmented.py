"""Training samples: the content that is read, and the random values that are drawn for it.

Everything random about one draw of a sample comes from a generator for that draw. Shape letters as
in `imprompt.training.features`.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from imprompt.training.buckets import Size
from imprompt.training.examples import bucket_of, read_example
from imprompt.training.order import SampleIndex
from imprompt.training.recipe import Data
from imprompt.training.references import Parts, References
from imprompt.training.samples import BadSample, Source


class Stackable:
    """Dataclass of one sample's values, or of several samples' values, stacked."""

    @classmethod
    def stack(cls, ones: Sequence[Self]) -> Self:
        """Stack samples: tensors on a new first axis, lists concatenated."""
        columns = {field.name: [getattr(one, field.name) for one in ones] for field in fields(cls)}  # pyright: ignore[reportArgumentType] - subclasses are dataclasses
        return cls(**{name: stack_values(values) for name, values in columns.items()})

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with `change` applied to every tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # pyright: ignore[reportArgumentType] - subclasses are dataclasses
        return type(self)(**{name: map_value(value, change) for name, value in values.items()})

    def pin_memory(self) -> Self:
        """Return a copy in page-locked memory; a data loader calls this."""
        return self.map_tensors(lambda tensor: tensor.pin_memory())


def stack_values(values: list[Any]) -> Any:
    """Stack one value of several samples: tensors on a new first axis, lists concatenated."""
    first = values[0]
    if isinstance(first, Stackable):
        return type(first).stack(values)
    if isinstance(first, dict):
        return {key: stack_values([value[key] for value in values]) for key in first}
    if isinstance(first, Tensor):
        return torch.stack(values)
    return None if first is None else list(chain.from_iterable(values))


def map_value(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a value with `change` applied to every tensor in it."""
    if isinstance(value, Stackable):
        return value.map_tensors(change)
    if isinstance(value, dict):
        return {key: map_value(part, change) for key, part in value.items()}
    return change(value) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class PictureContent(Stackable):
    """Pictures of a sample, which the training step encodes."""

    pixels: Tensor  # (3, H, W) in [-1, 1]
    reference: Parts  # one prepared picture: see `imprompt.training.references`
    captions: list[str]
    conditions: dict[str, Tensor]  # "time_ids" (6,)
    mask: Tensor  # (1, h, w) of 8 bits


@dataclass(frozen=True)
class FeatureContent(Stackable):
    """Features of a sample, encoded before training."""

    mean: Tensor  # (C, h, w) of the VAE's posterior, unscaled
    spread: Tensor  # (C, h, w), the posterior's standard deviation
    image: Parts  # image features (E,) or (patches, E), by part
    conditions: dict[str, Tensor]  # the text's, and "time_ids" (6,)
    mask: Tensor | None = None  # (1, h, w) of 8 bits; None where none were encoded


Content = PictureContent | FeatureContent


@dataclass(frozen=True)
class AugmentedSample(Stackable):
    """Sample with the random values that are drawn for it; or several samples, stacked.

    names              the sample's name, in a list as are captions and errors
    no_image, no_text  whether that part is dropped
    bad                why the sample could not be read; then its content is blank
    """

    names: list[str]
    content: Content
    weight: Tensor  # () 1, or 0 where the content is blank
    u: Tensor  # () in [0, 1), which selects the timestep
    no_image: Tensor  # () bool
    no_text: Tensor  # () bool
    offset: Tensor  # (C, 1, 1)
    posterior: Tensor  # (C, h, w)
    noise: Tensor  # (C, h, w)
    bad: list[BadSample]


class SampleReader(Protocol):
    """Reader of samples by number, from pictures or from encoded features."""

    bucket: np.ndarray  # bucket number of every sample
    bad_shards: Sequence[BadSample]  # damaged shards of the source

    @property
    def shards(self) -> Sequence[int]:
        """Number of samples in each shard, in order."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the sample's name for messages."""
        ...

    def latent_shape(self, index: int) -> tuple[int, int, int]:
        """Return (C, h, w) of a sample's latent."""
        ...

    def read(self, index: int, flip: bool, pick: float) -> Content:
        """Return the sample, mirrored or not, with the reference that `pick` in [0, 1) selects.

        Raise BadSample if it cannot be used.
        """
        ...

    def blank(self, index: int) -> Content:
        """Return blank content, with the shapes of `read`."""
        ...


class PictureReader:
    """Reader of pictures, which the training step encodes."""

    def __init__(
        self,
        source: Source,
        sizes: Sequence[Size],
        references: References,
        unit: int,
        channels: int,
    ) -> None:
        self.source, self.sizes, self.references = source, sizes, references
        self.unit, self.channels = unit, channels  # pixels per latent, and C
        self.shards, self.bad_shards = source.shards, source.bad_shards
        self.bucket = np.array([bucket_of(source, index, sizes) for index in range(len(source))])

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Return the sample's name in the source."""
        return self.source.name(index)

    def latent_shape(self, index: int) -> tuple[int, int, int]:
        """Return (C, h, w) of a sample's latent."""
        wide, high = self.sizes[self.bucket[index]]
        return self.channels, high // self.unit, wide // self.unit

    def read(self, index: int, flip: bool, pick: float) -> PictureContent:
        """Return a sample's pictures, mirrored or not, with the reference that `pick` selects.

        Raise BadSample if they cannot be read.
        """
        size = self.sizes[self.bucket[index]]
        example = read_example(self.source.read(index), size, self.unit, self.references, pick)
        pixels, mask = (part.flip(-1) if flip else part for part in (example.pixels, example.mask))
        sizes = {"time_ids": example.time_ids}
        reference = {part: value[0] for part, value in example.references.items()}
        return PictureContent(pixels, reference, [example.text], sizes, mask)

    def blank(self, index: int) -> PictureContent:
        """Return zeros and an empty caption, with the shapes of `read`."""
        wide, high = self.sizes[self.bucket[index]]
        return PictureContent(
            torch.zeros(3, high, wide),
            self.references.blank(),
            [""],
            {"time_ids": torch.zeros(6)},
            torch.zeros(1, *self.latent_shape(index)[1:], dtype=torch.uint8),
        )


def sample_rng(seed: int, draw: SampleIndex) -> torch.Generator:
    """Return the random generator of one draw, which depends only on seed, epoch and sample."""
    digest = hashlib.blake2b(f"{seed} {draw.epoch} {draw.sample}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


class AugmentedSamples(Dataset[AugmentedSample]):
    """Dataset of samples with the random values drawn for them, indexed by `SampleIndex`."""

    def __init__(self, reader: SampleReader, data: Data, seed: int) -> None:
        self.reader, self.data, self.seed = reader, data, seed

    def __getitem__(self, draw: SampleIndex) -> AugmentedSample:
        random = sample_rng(self.seed, draw)
        mirror, pick, drop, u = torch.rand(4, generator=random, dtype=torch.float64).tolist()
        bad = []
        try:
            content = self.reader.read(draw.sample, self.data.flip and mirror < 0.5, pick)
        except BadSample as error:
            content, bad = self.reader.blank(draw.sample), [error]
        shape = self.reader.latent_shape(draw.sample)
        image, both, text = accumulate(
            [self.data.drop_image, self.data.drop_both, self.data.drop_text]
        )
        return AugmentedSample(
            names=[self.reader.name(draw.sample)],
            content=content,
            weight=torch.tensor(0.0 if bad else 1.0),
            u=torch.tensor(u),
            no_image=torch.tensor(drop < both),
            no_text=torch.tensor(image <= drop < text),
            offset=torch.randn(shape[0], 1, 1, generator=random),
            posterior=torch.randn(*shape, generator=random),
            noise=torch.randn(*shape, generator=random),
            bad=bad,
        )
