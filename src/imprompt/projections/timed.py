"""Projections to image tokens that depend on the time: see `imprompt.families.timed`.

They are the resampler of InstantX' adapter for SD3.5, and InstantCharacter's projection, which ends
in one. What does not depend on the time is computed once, by `forward`, the rest at each step, by
`at`. Shape letters as in `imprompt.projections.resampler`. Parameters are named as in the published
checkpoints.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imprompt.adapter import split_heads
from imprompt.projections.resampler import HEAD_DIM, Resampler, perceiver_sizes

PERIOD = 10_000  # longest of the sinusoids, as in the transformer's positions


class TimeEmbedding(nn.Module):
    """Embedding of timesteps, from 1000 to 0: sinusoids, then an MLP."""

    def __init__(self, sinusoids: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(sinusoids, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        """Embed timesteps (B,) to (B, W)."""
        weight = self.linear_1.weight
        half = weight.shape[1] // 2
        exponent = -math.log(PERIOD) * torch.arange(half, device=time.device) / half
        angle = time[:, None].float() * exponent.exp()
        sinusoids = torch.cat([angle.cos(), angle.sin()], -1).to(weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class TimeResampler(Resampler):
    """Resampler that is told the time: patches (B, P, E) -> image tokens (B, N, D) at a time.

    The time's embedding is added to the patches, and modulates the norms of the latents.
    """

    def __init__(
        self, feature_dim: int, token_dim: int, *, sinusoids: int = 320, **sizes: Any
    ) -> None:
        super().__init__(feature_dim, token_dim, **sizes)
        width = self.latents.shape[-1]
        self.time_embedding = TimeEmbedding(sinusoids, width)
        for layer in self.layers:
            layer.append(nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width)))  # pyright: ignore

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], head_dim: int = HEAD_DIM) -> Self:
        """Build a projection for tensors of these shapes, by their names in a checkpoint."""
        return cls(**time_resampler_sizes(shapes), head_dim=head_dim)

    @property
    def count(self) -> int:
        """Number N of image tokens."""
        return self.latents.shape[1]

    @property
    def time_dim(self) -> int:
        """Width W of the embedded time."""
        return self.latents.shape[-1]

    def forward(self, features: Tensor) -> Tensor:
        """Project features (B, P, E) to what each step reads, (B, P, W)."""
        return self.proj_in(features)

    def at(self, patches: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return image tokens (B, N, D) at the timesteps (B,), and their embedding (B, W)."""
        moment = self.time_embedding(time)
        patches = patches + moment[:, None]
        latents = self.latents.expand(len(patches), -1, -1)
        for attention, feed, modulation in self.layers:  # pyright: ignore[reportGeneralTypeIssues]
            shift, scale, feed_shift, feed_scale = modulation(moment)[:, None].chunk(4, -1)
            latents = latents + attention(patches, latents, shift, scale)
            latents = latents + feed[1:](feed[0](latents) * (1 + feed_scale) + feed_shift)
        return self.norm_out(self.proj_out(latents)), moment


def time_resampler_sizes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the arguments of `TimeResampler` for the shapes of a checkpoint."""
    _, tokens, width = shapes["latents"]
    sinusoids = shapes["time_embedding.linear_1.weight"][1]
    own = {"tokens": tokens, "width": width, "sinusoids": sinusoids}
    return perceiver_sizes(shapes) | own


class Mlp(nn.Module):
    """Two linear layers, named as timm names them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layers, (B, P, E) -> (B, P, E)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FeatureAttention(nn.Module):
    """Attention of features (B, P, E) to others (B, P', E) -> (B, P, E)."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.heads = width // head_dim
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """Compute the attention of x to the other features."""
        projected = self.to_q(x), self.to_k(other), self.to_v(other)
        query, key, value = (split_heads(part, self.heads) for part in projected)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """Linear layer of which a half gates the other."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Project (..., E) to (..., hidden)."""
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeatureBlock(nn.Module):
    """Transformer block: features (B, P, E) attend to themselves, then to others (B, P', E)."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.of_own = FeatureAttention(width, head_dim)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.of_others = FeatureAttention(width, head_dim)
        self.norm3 = nn.LayerNorm(width, eps=1e-6)
        layers = Gated(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        self.ff = nn.ModuleDict({"net": nn.Sequential(*layers)})

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """Compute the block."""
        own = self.norm1(x)
        x = x + self.of_own(own, own)
        x = x + self.of_others(self.norm2(x), other)
        return x + self.ff["net"](self.norm3(x))


class CharacterProjection(nn.Module):
    """Projection of InstantCharacter: features of three kinds -> image tokens (B, N, D) at a time.

    Deep features of the whole picture attend to its shallow ones, of several levels, and to deep
    ones of its tiles. A resampler reads both results.
    """

    def __init__(
        self,
        feature_dim: int,
        token_dim: int,
        *,
        mlp: int | None = None,
        layers: tuple[int, int] = (4, 4),
        head_dim: int = HEAD_DIM,
        **resampler: Any,
    ) -> None:
        """Build the projection.

        mlp        width inside its MLPs
        layers     numbers of blocks that read shallow features, and features of tiles
        resampler  sizes of its resampler, as for `TimeResampler`
        """
        super().__init__()
        if feature_dim % head_dim:
            raise ValueError(f"{feature_dim}-wide features are no multiple of heads' {head_dim}")
        self.cross_layer_blocks, self.cross_scale_blocks = (
            nn.ModuleList(FeatureBlock(feature_dim, head_dim) for _ in range(count))
            for count in layers
        )
        mlp = mlp or 2 * feature_dim
        self.proj = Mlp(feature_dim, mlp)
        self.proj_cross_layer = Mlp(feature_dim, mlp)
        self.proj_cross_scale = Mlp(feature_dim, mlp)
        self.resampler = TimeResampler(feature_dim, token_dim, head_dim=head_dim, **resampler)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], head_dim: int = HEAD_DIM) -> Self:
        """Build a projection for tensors of these shapes, by their names in a checkpoint."""
        prefix = "resampler."
        inside = {k.removeprefix(prefix): v for k, v in shapes.items() if k.startswith(prefix)}

        def blocks(of: str) -> int:
            start = f"cross_{of}_blocks."
            return 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith(start))

        return cls(
            **time_resampler_sizes(inside),
            mlp=shapes["proj.fc1.weight"][0],
            layers=(blocks("layer"), blocks("scale")),
            head_dim=head_dim,
        )

    @property
    def count(self) -> int:
        """Number N of image tokens."""
        return self.resampler.count

    def forward(self, shallow: Tensor, deep: Tensor, tiles: Tensor) -> Tensor:
        """Project features to what each step reads, (B, 2·P, W).

        shallow  of the whole picture, of several levels (B, levels · P, E)
        deep     of the whole picture (B, P, E)
        tiles    deep ones of its tiles (B, tiles · P, E)
        """
        layers = scales = deep
        for block in self.cross_layer_blocks:
            layers = block(layers, shallow)
        for block in self.cross_scale_blocks:
            scales = block(scales, tiles)
        joined = [self.proj(deep) + self.proj_cross_scale(scales), self.proj_cross_layer(layers)]
        return self.resampler(torch.cat(joined, 1))

    def at(self, patches: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return image tokens (B, N, D) at the timesteps (B,), and their embedding (B, W)."""
        return self.resampler.at(patches, time)
