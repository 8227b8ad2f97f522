"""The low-rank part of FaceID adapters: a LoRA on every attention of the base model.

LoRA is due to Hu et al. 2021 (arXiv 2106.09685). The part is passed with the image prompt and added
in the projections of an attention, so the base model's own weights and the user's own LoRAs do not
change, and a call without the prompt computes what the base model computes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imprompt.adapter import KV, split_heads

PARTS = ("to_q", "to_k", "to_v", "to_out")
RANK = 128  # of the published FaceID adapters
Pair = tuple[Tensor, Tensor]  # down (r, in) and up (out, r)


class LowRankLayer(nn.Module):
    """The product up · down, of rank r, that is added to a matrix (out, in).

    It starts as in the paper's FaceID training: up is zero, so that nothing is added.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)


class LowRank(NamedTuple):
    """Low-rank matrices that are added to the projections of one attention."""

    to_q: Pair
    to_k: Pair
    to_v: Pair
    to_out: Pair


class AttentionLowRank(nn.Module):
    """The low-rank parts of one attention's query, key, value and output projections."""

    def __init__(self, sizes: Mapping[str, tuple[int, int, int]]) -> None:
        """Create the four parts.

        sizes  part -> (in, out, rank)
        """
        super().__init__()
        for part in PARTS:
            setattr(self, part, LowRankLayer(*sizes[part]))

    @classmethod
    def for_attention(cls, attention: Any, rank: int) -> Self:
        """Create new parts of that rank for one of diffusers' attentions."""
        layers = {part: getattr(attention, part) for part in PARTS[:3]}
        layers["to_out"] = attention.to_out[0]
        return cls(
            {part: (one.in_features, one.out_features, rank) for part, one in layers.items()}
        )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        """Build the parts for tensors of these shapes, by their names in a checkpoint."""
        downs, ups = (
            {part: shapes[f"{part}.{end}.weight"] for part in PARTS} for end in ("down", "up")
        )
        return cls({part: (downs[part][1], ups[part][0], downs[part][0]) for part in PARTS})

    def weights(self, strength: float, dtype: torch.dtype) -> LowRank:
        """Return the matrices at this strength and precision.

        They are the module's own tensors where nothing has to be changed.
        """
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
    """An `AttentionLowRank` for every attention of a base model, self-attentions too.

    They are in the order of the published checkpoints. `strength` multiplies what they add, in
    image prompts that are made after it was set.
    """

    strength = 1.0

    def weights(self, dtype: torch.dtype) -> tuple[LowRank, ...]:
        """Return the matrices of every attention.

        The result is the identical tuple as long as nothing has changed, so that several prompts of
        one adapter add it once. In training it is computed in every call and not kept: sharded
        weights change without a trace, see `version`.
        """
        parts: Any = self
        if torch.is_grad_enabled() and any(one.requires_grad for one in self.parameters()):
            self.__dict__.pop("_made", None)
            return tuple(part.weights(self.strength, dtype) for part in parts)
        versions = (
            self.strength,
            dtype,
            [(parameter.data_ptr(), version(parameter)) for parameter in self.parameters()],
        )
        found = self.__dict__.get("_made")
        if found is None or found[0] != versions:
            found = self.__dict__["_made"] = (
                versions,
                tuple(part.weights(self.strength, dtype) for part in parts),
            )
        return found[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_made"}


def version(tensor: Tensor) -> int | None:
    """Return how often the tensor was changed in place.

    The result is None where that is not counted (torch.inference_mode).
    """
    return None if tensor.is_inference() else tensor._version


def summed(loras: Sequence[LowRank]) -> LowRank:
    """Add several low-rank parts: the result is one part of higher rank."""
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
    """Apply the layer to x (B, L, in) and add the low-rank part -> (B, L, out)."""
    return layer(x) if pair is None else layer(x) + F.linear(F.linear(x, pair[0]), pair[1])


def project_text(attention: Any, text: Tensor, lora: LowRank | None) -> KV:
    """Project a text (B, T, D) to keys and values, each (B, H, T, d).

    A self-attention gets its own hidden states as the text.
    """
    key = project(attention.to_k, text, lora and lora.to_k)
    value = project(attention.to_v, text, lora and lora.to_v)
    return split_heads(key, attention.heads), split_heads(value, attention.heads)
