"""The variants of the adapter: a row says which image feature it reads and which projection makes
it image tokens.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from imprompt.adapter import ImageProjection
from imprompt.errors import SettingError
from imprompt.projections.mlp import FaceProjection, FullProjection
from imprompt.projections.resampler import FacePlusProjection, FacePlusV2Projection, Resampler
from imprompt.validation import suggestions

# Of an image encoder "pooled", "penultimate", "last" or "levels 7,13,26" (see `levels_of`); of a
# face one of `BESIDE_A_FACE`.
Feature = str
Shapes = Mapping[str, Sequence[int]]
Projection = (
    type[ImageProjection]
    | type[FullProjection]
    | type[Resampler]
    | type[FaceProjection]
    | type[FacePlusProjection]
    | type[FacePlusV2Projection]
)

# What of an image encoder goes with a face's embedding.
BESIDE_A_FACE: Mapping[Feature, Feature | None] = {
    "face": None,
    "raw face": None,
    "face and crop": "penultimate",
    "raw face and square": "penultimate",
}
LEVELS = re.compile(r"levels (0|[1-9]\d*)(,(0|[1-9]\d*))*")


def image_feature(feature: Feature) -> Feature | None:
    """Return what of an image encoder a feature needs; None for a face embedding alone."""
    return BESIDE_A_FACE.get(feature, feature)


def levels_of(feature: Feature) -> tuple[int, ...]:
    """Return the levels that a feature such as "levels 7,13,26" names; () for another feature.

    Level 0 is what the first layer reads, level n what layer n gives, before any last norm. Levels
    rise, so that one feature has one name; SettingError if they are written otherwise.
    """
    if not feature.startswith("levels"):
        return ()
    found = LEVELS.fullmatch(feature) and tuple(map(int, feature.split()[1].split(",")))
    if not found or list(found) != sorted({*found}):
        raise SettingError(
            f"feature = {feature!r}: write levels as rising numbers, such as 'levels 7,13,26'"
        )
    return found


class CheckpointEvidence(NamedTuple):
    """What tells variants with the same projection apart."""

    projection: Shapes
    lora: bool  # whether the file has low-rank parts
    text_dim: int | None  # what W' reads; None if the file does not tell


@dataclass(frozen=True)
class Variant:
    """One row.

    feature      what its projection reads. Of an image encoder: its pooled embedding (B, E), of
                 CLIP projected, or the hidden states before its last layer (B, patches, E), in
                 place of which an adapter may read others: see `reading`. Of a face: its
                 ArcFace embedding (B, 512), "raw" as the face encoder gives it and else of unit
                 length; then perhaps, as the second of a pair, the penultimate hidden states of the
                 aligned face ("crop") or of the square round its box ("square")
    null         what stands for "no image" in guidance and in training's drops: a zero embedding,
                 or the features of an all-zero preprocessed picture (the encoder's mean colour). Of
                 a face the embedding is zero in any case, and this is about the hidden states
                 beside it
    projection   features -> image tokens
    signature    the key by which the paper's checkpoints tell this variant's projection from the
                 others
    feature_key  the key whose last dimension is the feature's width; of a pair the hidden states'
    token_shape  shapes of the projection's tensors -> (N, D) of its image tokens; N is None where
                 every patch becomes one
    where        among the variants with that signature it is this one if the file looks so
    lora         whether its files hold a low-rank part for every attention too
    widened      whether its tokens go through the base model's own projection of text (Kolors)
                 before W'
    alike        published kinds that its tensors cannot tell from it, and that compute the same
    rivals       others that its tensors cannot tell from it and that do not compute the same,
                 beside those of the table
    faces        insightface's package of weights whose embedding it was trained with
    """

    name: str
    feature: Feature
    null: Literal["zero embedding", "zero picture"]
    projection: Projection
    signature: str
    feature_key: str
    token_shape: Callable[[Shapes], tuple[int | None, int]]
    where: Callable[[CheckpointEvidence], bool] = lambda _: True
    lora: bool = False
    widened: bool = False
    equivalent_to: tuple[str, ...] = ()
    ambiguous_with: tuple[str, ...] = ()
    faces: str = ""

    @property
    def image_feature(self) -> Feature | None:
        """What it reads of an image encoder; None where it reads a face's embedding alone."""
        return image_feature(self.feature)

    def reading(self, feature: Feature | None) -> "Variant":
        """Return the row with another feature; None or "" leaves its own.

        What reads hidden states can read the last ones, or those of levels side by side.
        SettingError if the projection cannot read the feature.
        """
        if not feature or feature == self.feature:
            return self
        if self.feature != "penultimate":
            raise SettingError(
                f"feature = {feature!r}: the {self.name} variant reads {self.feature} and no other"
            )
        if feature != "last" and not levels_of(feature):
            raise SettingError(
                f"feature = {feature!r}: the {self.name} variant reads penultimate, last or levels "
                "such as 'levels 7,13,26'"
            )
        return replace(self, feature=feature)


def width(shapes: Shapes, key: str) -> int:
    """The last dimension of that tensor; 0 if it has none."""
    return tuple(shapes.get(key) or (0,))[-1]


def by_norm(shapes: Shapes) -> tuple[int, int]:
    return shapes["proj.2.weight"][0] // shapes["norm.weight"][0], shapes["norm.weight"][0]


def by_latents(shapes: Shapes) -> tuple[int, int]:
    return shapes["latents"][1], shapes["norm_out.weight"][0]


FACE_DIM = 512  # of ArcFace's embeddings
STATES = "perceiver_resampler.proj_in.weight"


def of_kolors(seen: CheckpointEvidence) -> bool:
    """Its tokens are as wide as Kolors' text before the base model's own projection, and W' reads
    it after.
    """
    return not seen.lora and width(seen.projection, "norm.weight") != seen.text_dim


# Each in the order in which signatures are tried.
VARIANTS = (  # they read what an image encoder says of the whole picture
    Variant(
        "base",
        "pooled",
        "zero embedding",
        ImageProjection,
        "proj.weight",
        "proj.weight",
        lambda shapes: (
            shapes["proj.weight"][0] // shapes["norm.weight"][0],
            shapes["norm.weight"][0],
        ),
        equivalent_to=("light", "light-v11"),
    ),
    Variant(
        "full",
        "penultimate",
        "zero picture",
        FullProjection,
        "proj.3.weight",
        "proj.0.weight",
        lambda shapes: (None, shapes["proj.3.weight"][0]),
    ),
    Variant(
        "plus",
        "penultimate",
        "zero picture",
        Resampler,
        "latents",
        "proj_in.weight",
        by_latents,
        lambda seen: width(seen.projection, "proj_in.weight") != FACE_DIM,
        equivalent_to=("plus-face", "composition"),
    ),
)
FACES = (  # they read a face
    Variant(
        "portrait-unnorm",
        "raw face",
        "zero embedding",
        Resampler,
        "latents",
        "proj_in.weight",
        by_latents,
        lambda seen: width(seen.projection, "proj_in.weight") == FACE_DIM,
        ambiguous_with=("InstantID",),
        faces="buffalo_l",
    ),
    Variant(
        "faceid-plus",
        "face and crop",
        "zero picture",
        FacePlusProjection,
        STATES,
        STATES,
        by_norm,
        lambda seen: not of_kolors(seen),
        lora=True,
        faces="buffalo_l",
    ),
    Variant(
        "faceid-plus-v2",
        "face and crop",
        "zero picture",
        FacePlusV2Projection,
        STATES,
        STATES,
        by_norm,
        lambda seen: not of_kolors(seen),
        lora=True,
        faces="buffalo_l",
    ),
    Variant(
        "faceid-plus-kolors",
        "raw face and square",
        "zero embedding",
        FacePlusV2Projection,
        STATES,
        STATES,
        by_norm,
        of_kolors,
        widened=True,
        faces="antelopev2",
    ),
    Variant(
        "faceid",
        "face",
        "zero embedding",
        FaceProjection,
        "proj.2.weight",
        "proj.0.weight",
        by_norm,
        lambda seen: seen.lora,
        lora=True,
        faces="buffalo_l",
    ),
    Variant(
        "portrait",
        "face",
        "zero embedding",
        FaceProjection,
        "proj.2.weight",
        "proj.0.weight",
        by_norm,
        lambda seen: not seen.lora,
        faces="buffalo_l",
    ),
)
TRAINABLE = {row.name: row for row in VARIANTS}
BY_NAME = {row.name: row for row in (*VARIANTS, *FACES)}


def find_variant(name: str) -> Variant:
    """The row of that name; SettingError, with the names like it, if none."""
    if name not in BY_NAME:
        raise SettingError(f"unknown variant {name!r}{suggestions(name, BY_NAME)}")
    return BY_NAME[name]


def bearing(keys: Collection[str]) -> tuple[Variant, ...]:
    """The rows whose projection has tensors of these names, judged by the first signature that is
    among them.
    """
    signature = next((row.signature for row in BY_NAME.values() if row.signature in keys), None)
    return tuple(row for row in BY_NAME.values() if row.signature == signature)
