"""The plus variant's projection: learned queries read the patch grid (after Flamingo's perceiver resampler).

Shape letters as in `imprompt.adapter`; P patches, W width inside. Parameters are named as in the published checkpoints.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imprompt.adapter import split_heads

HEAD_DIM = 64  # of every published checkpoint; not readable from the shapes
WIDEST = 1280  # of the published resamplers; SDXL's tokens are wider


class PerceiverAttention(nn.Module):
    """The queries attend to the patches and to themselves: (B, P, W) and (B, N, W) -> (B, N, W)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.heads = inner // HEAD_DIM
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, patches: Tensor, latents: Tensor) -> Tensor:
        patches, latents = self.norm1(patches), self.norm2(latents)
        query = self.to_q(latents)
        key, value = self.to_kv(torch.cat([patches, latents], 1)).chunk(2, -1)
        query, key, value = (split_heads(x, self.heads) for x in (query, key, value))
        return self.to_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Penultimate hidden states of the image encoder (B, P, E) -> N image tokens (B, N, D)."""

    def __init__(self, feature_dim: int, token_dim: int, *, tokens: int = 16, width: int | None = None, inner: int | None = None,
                 hidden: int | None = None, depth: int = 4) -> None:  # fmt: skip
        super().__init__()
        width = width or min(token_dim, WIDEST)
        inner, hidden = inner or max(width // HEAD_DIM, 1) * HEAD_DIM, hidden or 4 * width
        if inner % HEAD_DIM:
            raise ValueError(f"the resampler's attention is {inner} wide, no multiple of its heads' {HEAD_DIM}")
        self.latents = nn.Parameter(torch.empty(1, tokens, width).normal_(std=width**-0.5))
        self.proj_in = nn.Linear(feature_dim, width)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, inner), feed_forward(width, hidden)]) for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, token_dim)
        self.norm_out = nn.LayerNorm(token_dim)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        _, tokens, width = shapes["latents"]
        return cls(
            shapes["proj_in.weight"][1],
            shapes["proj_out.weight"][0],
            tokens=tokens,
            width=width,
            inner=shapes["layers.0.0.to_q.weight"][0],
            hidden=shapes["layers.0.1.1.weight"][0],
            depth=1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("layers.")),
        )

    def forward(self, features: Tensor) -> Tensor:
        patches = self.proj_in(features)
        latents = self.latents.expand(len(patches), -1, -1)
        for attention, feed in self.layers:  # pyright: ignore[reportGeneralTypeIssues]
            latents = latents + attention(patches, latents)
            latents = latents + feed(latents)
        return self.norm_out(self.proj_out(latents))


def feed_forward(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False))
