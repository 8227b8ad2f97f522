"""Projections whose queries attend to the patches (after Flamingo's perceiver resampler).

The queries are learned in plus, and a face's own tokens in faceid-plus. Shape letters as in
`imprompt.adapter`; P patches, W width inside. Parameters are named as in the published checkpoints.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imprompt.adapter import split_heads
from imprompt.projections.mlp import FaceTokens

HEAD_DIM = 64  # of every published checkpoint; the shapes do not determine it
PUBLISHED = (768, 1280, 2048)  # widths of all heads together in the published checkpoints
WIDEST = 1280  # of the published resamplers; SDXL's tokens are wider


class PerceiverAttention(nn.Module):
    """Attention of the queries to the patches and to themselves.

    Patches (B, P, W) and queries (B, N, W) -> (B, N, W).
    """

    def __init__(self, width: int, inner: int, head_dim: int) -> None:
        super().__init__()
        self.heads = inner // head_dim
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(
        self, patches: Tensor, latents: Tensor, shift: Tensor | float = 0, scale: Tensor | float = 0
    ) -> Tensor:
        """Compute the attention of latents (B, N, W) to patches (B, P, W) and latents.

        shift, scale  of the latents after their norm, (B, 1, W)
        """
        patches, latents = self.norm1(patches), self.norm2(latents) * (1 + scale) + shift
        query = self.to_q(latents)
        key, value = self.to_kv(torch.cat([patches, latents], 1)).chunk(2, -1)
        query, key, value = (split_heads(x, self.heads) for x in (query, key, value))
        return self.to_out(
            F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        )


class Perceiver(nn.Module):
    """Stack of attention and feed-forward layers, by which queries read the image encoder's states.

    Queries (B, N, W) and penultimate hidden states (B, P, E) -> image tokens (B, N, D).
    """

    def __init__(
        self,
        feature_dim: int,
        token_dim: int,
        *,
        width: int,
        inner: int,
        hidden: int,
        depth: int,
        head_dim: int = HEAD_DIM,
    ) -> None:
        super().__init__()
        if inner % head_dim:
            raise ValueError(
                f"the resampler's attention is {inner} wide, which is not a multiple "
                f"of its heads' {head_dim}"
            )
        self.head_dim = head_dim
        self.proj_in = nn.Linear(feature_dim, width)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, inner, head_dim), feed_forward(width, hidden)])
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, token_dim)
        self.norm_out = nn.LayerNorm(token_dim)

    def read(self, queries: Tensor, features: Tensor) -> Tensor:
        """Project queries (B, N, W) and features (B, P, E) to image tokens (B, N, D)."""
        patches = self.proj_in(features)
        for attention, feed in self.layers:  # pyright: ignore[reportGeneralTypeIssues]
            queries = queries + attention(patches, queries)
            queries = queries + feed(queries)
        return self.norm_out(self.proj_out(queries))


def perceiver_sizes(shapes: Mapping[str, Sequence[int]], prefix: str = "") -> dict[str, Any]:
    """Return the arguments of `Perceiver` for the shapes of a checkpoint.

    prefix  what the names of its tensors begin with
    """
    layers = [key.removeprefix(prefix) for key in shapes if key.startswith(f"{prefix}layers.")]
    width, feature_dim = shapes[f"{prefix}proj_in.weight"]
    return {
        "feature_dim": feature_dim,
        "token_dim": shapes[f"{prefix}proj_out.weight"][0],
        "width": width,
        "inner": shapes[f"{prefix}layers.0.0.to_q.weight"][0],
        "hidden": shapes[f"{prefix}layers.0.1.1.weight"][0],
        "depth": 1 + max(int(key.split(".")[1]) for key in layers),
    }


class Resampler(Perceiver):
    """Projection of the plus variant: learned queries read the patches, (B, P, E) -> (B, N, D).

    In portrait-unnorm it reads a face embedding, (B, E).
    """

    def __init__(
        self,
        feature_dim: int,
        token_dim: int,
        *,
        tokens: int = 16,
        width: int | None = None,
        inner: int | None = None,
        hidden: int | None = None,
        depth: int = 4,
        head_dim: int = HEAD_DIM,
    ) -> None:
        width = width or min(token_dim, WIDEST)
        inner, hidden = inner or max(width // head_dim, 1) * head_dim, hidden or 4 * width
        latents = torch.empty(1, tokens, width).normal_(std=width**-0.5)
        super().__init__(
            feature_dim,
            token_dim,
            width=width,
            inner=inner,
            hidden=hidden,
            depth=depth,
            head_dim=head_dim,
        )
        self.latents = nn.Parameter(latents)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], head_dim: int = HEAD_DIM) -> Self:
        """Build a projection for tensors of these shapes, by their names in a checkpoint."""
        _, tokens, width = shapes["latents"]
        own = perceiver_sizes(shapes) | {"tokens": tokens, "width": width}
        return cls(**own, head_dim=head_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Project patches (B, P, E), or a face embedding (B, E), to image tokens (B, N, D)."""
        if features.ndim == 2:  # one face embedding is read as one patch
            features = features[:, None]
        return self.read(self.latents.expand(len(features), -1, -1), features)


class FacePlusProjection(FaceTokens):
    """Projection of the faceid-plus variant: a face embedding's tokens read that face's picture.

    Parameters are named as in the published FaceID-Plus checkpoints.
    """

    def __init__(
        self,
        feature_dim: int,
        token_dim: int,
        *,
        face_dim: int = 512,
        tokens: int = 4,
        face_hidden: int | None = None,
        inner: int | None = None,
        hidden: int | None = None,
        depth: int = 4,
        head_dim: int = HEAD_DIM,
    ) -> None:
        super().__init__(face_dim, token_dim, tokens, face_hidden)
        inner, hidden = inner or max(token_dim // head_dim, 1) * head_dim, hidden or 4 * token_dim
        self.perceiver_resampler = Perceiver(
            feature_dim,
            token_dim,
            width=token_dim,
            inner=inner,
            hidden=hidden,
            depth=depth,
            head_dim=head_dim,
        )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], head_dim: int = HEAD_DIM) -> Self:
        """Build a projection for tensors of these shapes, by their names in a checkpoint."""
        face_hidden, face_dim = shapes["proj.0.weight"]
        (token_dim,) = shapes["norm.weight"]
        tokens = shapes["proj.2.weight"][0] // token_dim
        own = perceiver_sizes(shapes, "perceiver_resampler.") | {"token_dim": token_dim}
        del own["width"]  # as wide as the tokens
        faces = {"face_dim": face_dim, "face_hidden": face_hidden}
        return cls(**own, **faces, tokens=tokens, head_dim=head_dim)

    def forward(self, face: Tensor, states: Tensor) -> Tensor:
        """Project face (B, 512) and hidden states (B, P, E) to image tokens (B, N, D)."""
        return self.perceiver_resampler.read(self.of_face(face), states)


class FacePlusV2Projection(FacePlusProjection):
    """Projection of the faceid-plus-v2 variant, and of Kolors.

    The result of the perceiver is added to the face's own tokens.
    """

    def forward(self, face: Tensor, states: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """Project face (B, 512) and hidden states (B, P, E) to image tokens (B, N, D).

        strength  one number or one per item: the weight of the face's picture relative to its
                  embedding
        """
        tokens = self.of_face(face)
        if isinstance(strength, Tensor):
            strength = strength.view(-1, 1, 1)
        return tokens + strength * self.perceiver_resampler.read(tokens, states)


def head_dim_of(projection: nn.Module) -> int | None:
    """Return the width of a projection's attention heads; None if it has none."""
    own = [part.head_dim for part in projection.modules() if isinstance(part, Perceiver)]
    return own[0] if own else None


def feed_forward(width: int, hidden: int) -> nn.Sequential:
    """Return the feed-forward layers of a perceiver: a layer norm and an MLP without bias."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, hidden, bias=False),
        nn.GELU(),
        nn.Linear(hidden, width, bias=False),
    )
