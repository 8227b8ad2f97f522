"""The low-rank part of FaceID adapters: a LoRA (Hu et al. 2021, arXiv 2106.09685) on every
attention of the base model.

It travels with the image prompt and is added where an attention projects, so that the base model's
own weights, and the user's own LoRAs, stay as they are, and a call without the prompt is the base
model's.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imprompt.adapter import KV, split_heads

PARTS = ("to_q", "to_k", "to_v", "to_out")
Pair = tuple[Tensor, Tensor]  # down (r, in) and up (out, r)


class LowRankLayer(nn.Module):
    """up · down, of rank r: what is added to a matrix (out, in)."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)


class LowRank(NamedTuple):
    """What is added to the projections of one attention."""

    to_q: Pair
    to_k: Pair
    to_v: Pair
    to_out: Pair


class AttentionLowRank(nn.Module):
    """The low-rank parts of one attention's query, key, value and output projections."""

    def __init__(self, sizes: Mapping[str, tuple[int, int, int]]) -> None:
        """sizes  part -> (in, out, rank)"""
        super().__init__()
        for part in PARTS:
            setattr(self, part, LowRankLayer(*sizes[part]))

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        downs, ups = (
            {part: shapes[f"{part}.{end}.weight"] for part in PARTS} for end in ("down", "up")
        )
        return cls({part: (downs[part][1], ups[part][0], downs[part][0]) for part in PARTS})

    def weights(self, strength: float, dtype: torch.dtype) -> LowRank:
        """At this strength; the module's own tensors where nothing is to be changed."""
        pairs = [
            (layer.down.weight.to(dtype), layer.up.weight.to(dtype))
            for layer in (getattr(self, part) for part in PARTS)
        ]
        return (
            LowRank(*pairs)
            if strength == 1
            else LowRank(*((down, up * strength) for down, up in pairs))
        )


class ModelLowRank(nn.ModuleList):
    """An `AttentionLowRank` for every attention of a base model, self-attentions too, in the order
    of the published checkpoints.

    `strength` multiplies what it adds, in image prompts that are made after it was set.
    """

    strength = 1.0

    def weights(self, dtype: torch.dtype) -> tuple[LowRank, ...]:
        """By attention.

        The very same tuple as long as nothing has changed, so that several prompts of one adapter
        add it once.
        """
        versions = (
            self.strength,
            dtype,
            [(parameter.data_ptr(), version(parameter)) for parameter in self.parameters()],
        )
        found = self.__dict__.get("_made")
        trained = torch.is_grad_enabled() and any(
            parameter.requires_grad for parameter in self.parameters()
        )
        if found is None or found[0] != versions or trained:
            parts: Any = self
            found = self.__dict__["_made"] = (
                versions,
                tuple(part.weights(self.strength, dtype) for part in parts),
            )
        return found[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_made"}


def version(tensor: Tensor) -> int | None:
    """How often it was changed in place; None where that is not counted (torch.inference_mode)."""
    return None if tensor.is_inference() else tensor._version


def summed(loras: Sequence[LowRank]) -> LowRank:
    """The sum of several, as one of higher rank."""
    if len(loras) == 1:
        return loras[0]
    parts = zip(*loras, strict=True)
    return LowRank(
        *(
            (torch.cat([down for down, _ in part]), torch.cat([up for _, up in part], 1))
            for part in parts
        )
    )


def project(layer: Any, x: Tensor, pair: Pair | None) -> Tensor:
    """What the layer makes of x (B, L, in), with the low-rank part added -> (B, L, out)."""
    return layer(x) if pair is None else layer(x) + F.linear(F.linear(x, pair[0]), pair[1])


def project_text(attention: Any, text: Tensor, lora: LowRank | None) -> KV:
    """Keys and values of a text (B, T, D), or of a self-attention's own hidden states, each (B, H,
    T, d).
    """
    key = project(attention.to_k, text, lora and lora.to_k)
    value = project(attention.to_v, text, lora and lora.to_v)
    return split_heads(key, attention.heads), split_heads(value, attention.heads)
