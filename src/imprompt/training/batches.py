"""Batches of a training step, made from samples.

Everything random about one draw of a sample is drawn here, from a seed for that draw.

Shape letters as in `imprompt.training.features`.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

from imprompt.encoders.preparation import side_of
from imprompt.training.buckets import Size
from imprompt.training.examples import bucket_of, read_example
from imprompt.training.features import FeatureEncoder
from imprompt.training.order import SampleIndex
from imprompt.training.recipe import Data
from imprompt.training.samples import BadSample, Source

Item = dict[str, Any]


class SampleReader(Protocol):
    """Samples by number, from pictures or from encoded features."""

    bucket: np.ndarray  # of every sample
    bad_shards: Sequence[BadSample]  # of the source

    @property
    def shards(self) -> Sequence[int]:
        """Number of samples in each shard, in order."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the sample's name for messages."""
        ...

    def read(self, index: int, flip: bool, pick: float) -> Item:
        """Return the sample, mirrored or not, with the reference that `pick` in [0, 1) selects.

        Raise BadSample if it cannot be used.
        """
        ...

    def blank(self, index: int) -> Item:
        """Return an item with the keys and shapes of `read` but without content."""
        ...


class PictureReader:
    """Pictures that are encoded in the step that trains on them."""

    def __init__(
        self, source: Source, sizes: Sequence[Size], processor: Any, unit: int, channels: int
    ) -> None:
        self.source, self.sizes, self.processor = source, sizes, processor
        self.unit, self.channels = unit, channels  # pixels a side per latent, and C
        self.shards, self.bad_shards = source.shards, source.bad_shards
        self.bucket = np.array([bucket_of(source, index, sizes) for index in range(len(source))])

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Return the sample's name in the source."""
        return self.source.name(index)

    def read(self, index: int, flip: bool, pick: float) -> Item:
        """Read a sample's pictures, caption and size conditions.

        "pixels" (3, H, W) in [-1, 1], "mask" (1, h, w) of 8 bits, "reference" (3, S, S), "caption",
        "time_ids" (6,), and "latent", the shape (C, h, w) of its latents. Raise BadSample.
        """
        example = read_example(
            self.source.read(index), self.sizes[self.bucket[index]], self.unit, self.processor, pick
        )
        pixels, mask = (part.flip(-1) if flip else part for part in (example.pixels, example.mask))
        return self._item(pixels, mask, example.references[0], example.text, example.time_ids)

    def blank(self, index: int) -> Item:
        """Return zeros and an empty caption, with the keys and shapes of `read`."""
        (wide, high), side = self.sizes[self.bucket[index]], side_of(self.processor)
        reference = torch.zeros(3, side, side)
        mask = torch.zeros(1, high // self.unit, wide // self.unit, dtype=torch.uint8)
        return self._item(torch.zeros(3, high, wide), mask, reference, "", torch.zeros(6))

    def _item(
        self, pixels: Tensor, mask: Tensor, reference: Tensor, caption: str, time_ids: Tensor
    ) -> Item:
        item = {
            "pixels": pixels,
            "mask": mask,
            "reference": reference,
            "caption": caption,
            "time_ids": time_ids,
        }
        return item | {"latent": (self.channels, *mask.shape[1:])}


def sample_rng(seed: int, draw: SampleIndex) -> torch.Generator:
    """Return the random generator of one draw, a function of seed, epoch and sample alone."""
    digest = hashlib.blake2b(f"{seed} {draw.epoch} {draw.sample}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


class AugmentedSamples(Dataset[Item]):
    """Samples with everything that is drawn at random for them, by `SampleIndex`."""

    def __init__(self, reader: SampleReader, data: Data, seed: int) -> None:
        self.reader, self.data, self.seed = reader, data, seed

    def __getitem__(self, draw: SampleIndex) -> Item:
        random = sample_rng(self.seed, draw)
        mirror, pick, drop, u = torch.rand(4, generator=random, dtype=torch.float64).tolist()
        bad = None
        try:
            item = self.reader.read(draw.sample, self.data.flip and mirror < 0.5, pick)
        except BadSample as error:
            item, bad = self.reader.blank(draw.sample), error
        shape = item.pop("latent", None) or item["mean"].shape
        image, both, text = accumulate(
            [self.data.drop_image, self.data.drop_both, self.data.drop_text]
        )
        return item | {
            "name": self.reader.name(draw.sample),
            "weight": float(bad is None),
            "bad": bad,
            "u": u,
            "no_image": drop < both,
            "no_text": image <= drop < text,
            "offset": torch.randn(shape[0], 1, 1, generator=random),
            "posterior": torch.randn(*shape, generator=random),
            "noise": torch.randn(*shape, generator=random),
        }


def collate(items: Sequence[Item]) -> Item:
    """Stack tensors, turn numbers into tensors and everything else into lists."""
    return {key: _together([item[key] for item in items]) for key in items[0]}


def _together(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.stack(values)
    return torch.tensor(values) if isinstance(values[0], (bool, float)) else values


class RankSlice(NamedTuple):
    """The part of every step's batch that a process takes, and its number of parts."""

    rank: int = 0
    ranks: int = 1
    parts: int = 1

    def of(self, draws: list[SampleIndex]) -> list[list[SampleIndex]]:
        """Return this process's parts of a batch."""
        size = len(draws) // (self.ranks * self.parts)
        mine = [draws[start : start + size] for start in range(0, len(draws), size)]
        return mine[self.rank :: self.ranks]


def loader(
    augmented: AugmentedSamples, steps: Iterator[list[SampleIndex]], share: RankSlice, workers: int
) -> Iterator[Item]:
    """Return an iterator over this process's parts of the batches.

    Each step has `share.parts` of them; `workers` processes read ahead.
    """
    parts = (part for draws in steps for part in share.of(draws))
    reading: dict[str, Any] = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
    return iter(
        DataLoader(
            augmented,
            batch_sampler=_Once(parts),  # pyright: ignore[reportArgumentType] - it takes any iterable of lists
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            **reading,
        )
    )


class _Once:
    """A sampler that is iterated once."""

    def __init__(self, parts: Iterator[list[SampleIndex]]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        return self.parts


@dataclass(frozen=True)
class Batch:
    """Input of the loss, on the device."""

    names: list[str]
    weight: Tensor  # (B,) 0 for a sample that could not be read
    latents: Tensor  # (B, C, h, w) scaled
    noise: Tensor  # (B, C, h, w)
    offset: Tensor  # (B, C, 1, 1)
    u: Tensor  # (B,) in [0, 1): selects the timestep
    image: Tensor  # image features
    # other inputs of the base model: `imprompt.families.base.Conditions`
    conditions: dict[str, Tensor]
    # (B, 1, h, w) in [0, 1]: where an error counts more; None for features without masks
    mask: Tensor | None = None

    def samples(self) -> Iterator["Batch"]:
        """Yield every sample as a batch of one."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for row, name in enumerate(self.names):
            one = tree_map_only(Tensor, itemgetter(slice(row, row + 1)), values)
            yield Batch(**one | {"names": [name]})


Encode = Callable[[Item], Item]


class Composer:
    """Converter of items into batches on the device.

    It encodes pictures, draws latents from their posterior and replaces dropped parts.
    """

    def __init__(self, nulls: dict[str, Tensor], device: torch.device, scaling: float, shift: float,
                 encoder: FeatureEncoder | None) -> None:  # fmt: skip
        self.nulls = {key: value.to(device).float() for key, value in nulls.items()}
        self.device, self.scaling, self.shift, self.encoder = device, scaling, shift, encoder

    def __call__(self, item: Item) -> Batch:
        """Return the batch of a collated item."""
        item = {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in item.items()
        }
        if self.encoder is not None:
            features = {
                **self.encoder.latents(item["pixels"]),
                **self.encoder.text(item["caption"]),
            }
            item |= features | {"image": self.encoder.image(item["reference"])}
        no_image, no_text = item["no_image"], item["no_text"]
        texts = [key for key in self.nulls if key != "image"]
        sizes = {key: item[key] for key in ("time_ids",) if key in item}
        latents = item["mean"].float() + item["spread"].float() * item["posterior"]
        return Batch(
            names=item["name"],
            weight=item["weight"].float(),
            latents=(latents - self.shift) * self.scaling,
            noise=item["noise"],
            offset=item["offset"],
            u=item["u"].float(),
            image=self._dropped(item, "image", no_image),
            conditions={key: self._dropped(item, key, no_text) for key in texts} | sizes,
            mask=item["mask"].float() / 255 if "mask" in item else None,
        )

    def _dropped(self, item: Item, key: str, which: Tensor) -> Tensor:
        """Return the feature (B, …), replaced by the null feature where it is dropped."""
        value = item[key].float()
        return torch.where(which.view(-1, *[1] * (value.ndim - 1)), self.nulls[key], value)
