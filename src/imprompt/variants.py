"""The variants of the adapter: a row says which image feature it reads and which projection makes
it image tokens.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from imprompt.adapter import ImageProjection
from imprompt.errors import SettingError
from imprompt.projections.mlp import FaceProjection, FullProjection
from imprompt.projections.resampler import FacePlusProjection, FacePlusV2Projection, Resampler
from imprompt.validation import suggestions

ClipFeature = Literal["pooled", "penultimate"]
FaceFeature = Literal["face", "raw face", "face and crop", "raw face and square"]
Feature = ClipFeature | FaceFeature
Shapes = Mapping[str, Sequence[int]]
Projection = (
    type[ImageProjection]
    | type[FullProjection]
    | type[Resampler]
    | type[FaceProjection]
    | type[FacePlusProjection]
    | type[FacePlusV2Projection]
)

# What of an image encoder a feature needs; a face embedding alone needs none.
OF_CLIP: Mapping[Feature, ClipFeature] = {
    "pooled": "pooled",
    "penultimate": "penultimate",
    "face and crop": "penultimate",
    "raw face and square": "penultimate",
}


class CheckpointEvidence(NamedTuple):
    """What tells variants with the same projection apart."""

    projection: Shapes
    lora: bool  # whether the file has low-rank parts
    text_dim: int | None  # what W' reads; None if the file does not tell


@dataclass(frozen=True)
class Variant:
    """One row.

    feature      what its projection reads. Of a CLIP image encoder: its pooled, projected embedding
                 (B, E), or the hidden states before its last layer (B, patches, E). Of a face: its
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
    def clip_feature(self) -> ClipFeature | None:
        """What it reads of a CLIP image encoder."""
        return OF_CLIP.get(self.feature)


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
VARIANTS = (  # they read what a CLIP image encoder says of the whole picture
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
