"""The variants of the adapter: a row says which image feature it reads and which projection makes it image tokens."""

from dataclasses import dataclass
from typing import Literal

from imprompt.adapter import ImageProjection
from imprompt.errors import SettingError
from imprompt.projections.mlp import FullProjection
from imprompt.projections.resampler import Resampler

Feature = Literal["pooled", "penultimate"]
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
    """

    name: str
    feature: Feature
    null: Literal["zero embedding", "zero picture"]
    projection: Projection
    signature: str
    feature_key: str


# In the order in which signatures are tried.
VARIANTS = (
    Variant("base", "pooled", "zero embedding", ImageProjection, "proj.weight", "proj.weight"),
    Variant("full", "penultimate", "zero picture", FullProjection, "proj.3.weight", "proj.0.weight"),
    Variant("plus", "penultimate", "zero picture", Resampler, "latents", "proj_in.weight"),
)
BY_NAME = {row.name: row for row in VARIANTS}


def variant(name: str) -> Variant:
    """The row of that name; SettingError if none."""
    if name not in BY_NAME:
        raise SettingError(f"unknown variant {name!r}; known: {', '.join(BY_NAME)}")
    return BY_NAME[name]
