"""The variants of the adapter: a row says which image feature it reads and which projection makes it image tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from imprompt.adapter import ImageProjection
from imprompt.errors import SettingError
from imprompt.projections.mlp import FullProjection
from imprompt.projections.resampler import Resampler

Feature = Literal["pooled", "penultimate"]
Shapes = Mapping[str, Sequence[int]]
Projection = type[ImageProjection] | type[FullProjection] | type[Resampler]


@dataclass(frozen=True)
class Variant:
    """One row.

    feature      what the image encoder gives: its pooled, projected embedding (B, E), or the hidden states
                 before its last layer (B, patches, E)
    null         what stands for "no image" in guidance and in training's drops: a zero embedding, or the features of
                 an all-zero preprocessed picture (the encoder's mean colour)
    projection   features -> image tokens
    signature    the key by which the paper's checkpoints tell this variant from the others
    feature_key  the key whose last dimension is the feature's width
    token_shape  shapes of the projection's tensors -> (N, D) of its image tokens; N is None where every patch becomes one
    """

    name: str
    feature: Feature
    null: Literal["zero embedding", "zero picture"]
    projection: Projection
    signature: str
    feature_key: str
    token_shape: Callable[[Shapes], tuple[int | None, int]]


# In the order in which signatures are tried.
# fmt: off
VARIANTS = (
    Variant("base", "pooled", "zero embedding", ImageProjection, "proj.weight", "proj.weight",
            lambda shapes: (shapes["proj.weight"][0] // shapes["norm.weight"][0], shapes["norm.weight"][0])),
    Variant("full", "penultimate", "zero picture", FullProjection, "proj.3.weight", "proj.0.weight",
            lambda shapes: (None, shapes["proj.3.weight"][0])),
    Variant("plus", "penultimate", "zero picture", Resampler, "latents", "proj_in.weight",
            lambda shapes: (shapes["latents"][1], shapes["norm_out.weight"][0])),
)
# fmt: on
BY_NAME = {row.name: row for row in VARIANTS}


def variant(name: str) -> Variant:
    """The row of that name; SettingError if none."""
    if name not in BY_NAME:
        raise SettingError(f"unknown variant {name!r}; known: {', '.join(BY_NAME)}")
    return BY_NAME[name]
