"""Projections by a plain MLP. Shape letters as in `imprompt.adapter`; P patches."""

from collections.abc import Mapping, Sequence
from typing import Self

from torch import Tensor, nn


class FullProjection(nn.Module):
    """The full variant: every patch of the penultimate layer becomes one image token, (B, P, E) -> (B, P, D).

    Parameters are named as in the published full-face checkpoint.
    """

    def __init__(self, feature_dim: int, token_dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(feature_dim, feature_dim), nn.GELU(), nn.Linear(feature_dim, token_dim), nn.LayerNorm(token_dim)
        )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        token_dim, feature_dim = shapes["proj.2.weight"]
        return cls(feature_dim, token_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features)
