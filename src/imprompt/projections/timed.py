"""Projections to image tokens that depend on the time: see `imprompt.families.timed`.

What does not depend on the time is computed once, by `forward`, the rest at each step, by `at`.
Shape letters as in `imprompt.projections.resampler`. Parameters are named as in the published
checkpoints.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

    def __init__(self, feature_dim: int, token_dim: int, *, sinusoids: int, **sizes: Any) -> None:
        super().__init__(feature_dim, token_dim, **sizes)
        width = self.latents.shape[-1]
        self.time_embedding = TimeEmbedding(sinusoids, width)
        for layer in self.layers:
            layer.append(nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width)))  # pyright: ignore

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], head_dim: int = HEAD_DIM) -> Self:
        """Build a projection for tensors of these shapes, by their names in a checkpoint."""
        _, tokens, width = shapes["latents"]
        own = perceiver_sizes(shapes) | {"tokens": tokens, "width": width}
        sinusoids = shapes["time_embedding.linear_1.weight"][1]
        return cls(**own, head_dim=head_dim, sinusoids=sinusoids)

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
