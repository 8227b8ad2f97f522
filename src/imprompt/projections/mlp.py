"""Projections by a plain MLP.

Shape letters as in `imprompt.adapter`; P patches.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from imprompt.adapter import ImageProjection


class FullProjection(nn.Module):
    """Projection of the full variant: every patch becomes one image token, (B, P, E) -> (B, P, D).

    It reads the penultimate layer. Parameters are named as in the published full-face checkpoint.
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
        """Build a projection for tensors of these shapes, by their names in a checkpoint."""
        token_dim, feature_dim = shapes["proj.2.weight"]
        return cls(feature_dim, token_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Project patches (B, P, E) to image tokens (B, P, D)."""
        return self.proj(features)


class TextProjection(nn.Module):
    """Projection of FLUX.1 Redux: every patch becomes a row of the text, (B, P, E) -> (B, P, D).

    It reads the last layer. Parameters are named as in the published file, without the prefix.
    """

    def __init__(self, feature_dim: int, token_dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or 3 * token_dim
        self.up = nn.Linear(feature_dim, hidden)
        self.down = nn.Linear(hidden, token_dim)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        """Build a projection for tensors of these shapes, by their names in a checkpoint."""
        hidden, feature_dim = shapes["up.weight"]
        return cls(feature_dim, shapes["down.weight"][0], hidden)

    def forward(self, features: Tensor) -> Tensor:
        """Project patches (B, P, E) to image tokens (B, P, D)."""
        return self.down(F.silu(self.up(features)))


class TransposedProjection(ImageProjection):
    """Projection of HunyuanDiT's adapter: an image embedding (B, E) to N image tokens (B, N, D).

    The embedding is brought to unit length. The linear layer gives (B, D, N): a token's numbers are
    not next to each other.
    """

    def forward(self, embedding: Tensor) -> Tensor:
        """Project an image embedding (B, E) to image tokens (B, N, D)."""
        spread = self.proj(F.normalize(embedding, dim=-1))
        return self.norm(spread.unflatten(-1, (-1, self.tokens)).mT)


class FaceTokens(nn.Module):
    """Projection of a face embedding to N image tokens.

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
        """Project a face embedding (B, E) to image tokens (B, N, D)."""
        return self.norm(self.proj(face).unflatten(-1, (self.tokens, -1)))


class FaceProjection(FaceTokens):
    """Projection of the faceid and portrait variants: a face embedding alone."""

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        """Build a projection for tensors of these shapes, by their names in a checkpoint."""
        hidden, face_dim = shapes["proj.0.weight"]
        (token_dim,) = shapes["norm.weight"]
        return cls(face_dim, token_dim, shapes["proj.2.weight"][0] // token_dim, hidden)

    def forward(self, face: Tensor) -> Tensor:
        """Project a face embedding (B, E) to image tokens (B, N, D)."""
        return self.of_face(face)
