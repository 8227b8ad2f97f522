"""Batches of a training step, made from augmented samples.

Shape letters as in `imprompt.training.features`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from imprompt.families.autoencoders import Normalization
from imprompt.training.augmented import (
    AugmentedSample,
    AugmentedSamples,
    Content,
    FeatureContent,
)
from imprompt.training.features import FeatureEncoder
from imprompt.training.order import SampleIndex
from imprompt.training.signals import ignore_signals


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
) -> Iterator[AugmentedSample]:
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
            collate_fn=AugmentedSample.stack,
            worker_init_fn=ignore_signals,
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
    image: dict[str, Tensor]  # image features by part
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


class Composer:
    """Converter of stacked samples into batches on the device.

    It encodes pictures, draws latents from their posterior and replaces dropped parts.
    """

    def __init__(self, nulls: dict[str, Tensor], device: torch.device,
                 normalization: Normalization, encoder: FeatureEncoder | None) -> None:  # fmt: skip
        self.nulls = {key: value.to(device).float() for key, value in nulls.items()}
        self.shift, self.scaling = (
            torch.tensor(numbers, device=device).view(-1, 1, 1) for numbers in normalization
        )
        self.device, self.encoder = device, encoder

    def __call__(self, samples: AugmentedSample) -> Batch:
        """Return the batch of stacked samples."""
        samples = samples.map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True))
        read = self._encoded(samples.content)
        latents = read.mean.float() + read.spread.float() * samples.posterior
        return Batch(
            names=samples.names,
            weight=samples.weight,
            latents=(latents - self.shift) * self.scaling,
            noise=samples.noise,
            offset=samples.offset,
            u=samples.u,
            image={
                key: self._dropped(key, value, samples.no_image)
                for key, value in read.image.items()
            },
            conditions={
                key: self._dropped(key, value, samples.no_text) if key in self.nulls else value
                for key, value in read.conditions.items()
            },
            mask=None if read.mask is None else read.mask.float() / 255,
        )

    def _encoded(self, content: Content) -> FeatureContent:
        """Return the content's features, made from its pictures where it holds those."""
        if isinstance(content, FeatureContent):
            return content
        encoder = self.encoder
        assert encoder is not None
        return FeatureContent(
            **encoder.latents(content.pixels),
            image=encoder.image(content.reference),
            conditions=encoder.text(content.captions) | content.conditions,
            mask=content.mask,
        )

    def _dropped(self, key: str, value: Tensor, which: Tensor) -> Tensor:
        """Return the feature (B, …), replaced by the null feature where it is dropped."""
        value = value.float()
        return torch.where(which.view(-1, *[1] * (value.ndim - 1)), self.nulls[key], value)
