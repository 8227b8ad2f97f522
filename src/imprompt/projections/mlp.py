"""Projections by a plain MLP. Shape letters as in `imprompt.adapter`; P patches."""

from collections.abc import Mapping, Sequence
from typing import Self

from torch import Tensor, nn


class FullProjection(nn.Module):
    """The full variant: every patch of the penultimate layer becomes one image token, (B, P, E) ->
    (B, P, D).

    Parameters are named as in the published full-face checkpoint.
    """

    def __init__(self, feature_dim: int, token_dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(feature_dim, feature_dim),
            nn.GELU(),
            nn.Linear(feature_dim, token_dim),
            nn.LayerNorm(token_dim),
        )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        token_dim, feature_dim = shapes["proj.2.weight"]
        return cls(feature_dim, token_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features)


class FaceTokens(nn.Module):
    """A face embedding becomes N image tokens.

    Parameters are named as in the published FaceID checkpoints.
    """

    def __init__(
        self, face_dim: int, token_dim: int, tokens: int = 4, hidden: int | None = None
    ) -> None:
        super().__init__()
        hidden = hidden or 2 * face_dim
        self.tokens = tokens
        self.proj = nn.Sequential(
            nn.Linear(face_dim, hidden), nn.GELU(), nn.Linear(hidden, tokens * token_dim)
        )
        self.norm = nn.LayerNorm(token_dim)

    def of_face(self, face: Tensor) -> Tensor:
        """(B, E) -> (B, N, D)"""
        return self.norm(self.proj(face).unflatten(-1, (self.tokens, -1)))


class FaceProjection(FaceTokens):
    """The faceid and portrait variants: these tokens alone, (B, E) -> (B, N, D)."""

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        hidden, face_dim = shapes["proj.0.weight"]
        (token_dim,) = shapes["norm.weight"]
        return cls(face_dim, token_dim, shapes["proj.2.weight"][0] // token_dim, hidden)

    def forward(self, face: Tensor) -> Tensor:
        return self.of_face(face)
