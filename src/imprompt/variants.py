"""Variants of the adapter, a row each: the feature that it reads and its projection to tokens."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from imprompt.adapter import ImageProjection
from imprompt.errors import SettingError
from imprompt.projections.mlp import (
    FaceProjection,
    FullProjection,
    TextProjection,
    TransposedProjection,
)
from imprompt.projections.resampler import FacePlusProjection, FacePlusV2Projection, Resampler
from imprompt.projections.timed import CharacterProjection, TimeResampler
from imprompt.validation import suggestions

# Of pictures "pooled", "penultimate", "last" or "levels 7,13,26"; of faces a key of BESIDE_A_FACE;
# "character": of two encoders, see `imprompt.encoders.character`.
Feature = str
Shapes = Mapping[str, Sequence[int]]
Projection = (
    type[ImageProjection]
    | type[FullProjection]
    | type[Resampler]
    | type[FaceProjection]
    | type[TransposedProjection]
    | type[TextProjection]
    | type[TimeResampler]
    | type[CharacterProjection]
    | type[FacePlusProjection]
    | type[FacePlusV2Projection]
)

# The image encoder's feature that is read together with a face's embedding.
BESIDE_A_FACE: Mapping[Feature, Feature | None] = {
    "face": None,
    "raw face": None,
    "face and crop": "penultimate",
    "raw face and square": "penultimate",
}
# Parts of what an adapter reads, in the order in which its projection takes them.
PARTS = ("face", "image")
# insightface's packages of weights, all of ArcFace embeddings
PACKS = ("buffalo_l", "antelopev2", "buffalo_m", "buffalo_s", "buffalo_sc")
FACE_DIM = 512  # of ArcFace's embeddings
LEVELS = re.compile(r"levels (0|[1-9]\d*)(,(0|[1-9]\d*))*")


def image_feature(feature: Feature) -> Feature | None:
    """Return the image encoder's part of a feature; None for a face embedding alone."""
    return BESIDE_A_FACE.get(feature, feature)


def levels_of(feature: Feature) -> tuple[int, ...]:
    """Return the levels that a feature such as "levels 7,13,26" names; () for another feature.

    Level 0 is the first layer's input, level n the output of layer n before any last norm. Levels
    rise, so that one feature has one name. Raise SettingError if they are written otherwise.
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
    """Evidence in a file that distinguishes variants with the same projection."""

    projection: Shapes
    lora: bool  # whether the file has low-rank parts
    text_dim: int | None  # width that W' reads; None if it is not known


@dataclass(frozen=True)
class Variant:
    """Variant of the adapter.

    feature          what its projection reads. Of an image encoder: its pooled embedding (B, E),
                     projected if it is CLIP's, or the hidden states before its last layer
                     (B, patches, E), instead of which an adapter may read others: see `reading`.
                     Of a face: its ArcFace embedding (B, 512), "raw" as the face encoder gives it,
                     otherwise of unit length; for some variants a pair, whose second part is the
                     penultimate hidden states of the aligned face ("crop") or of the square around
                     its box ("square")
    null             what stands for "no image" in guidance and in training's drops: a zero
                     embedding, or the features of an all-zero preprocessed picture (the encoder's
                     mean colour) or of a black picture, or no tokens at all. A face's embedding is
                     always zero then, and `null` describes the hidden states of the pair
    projection       features -> image tokens
    signature        key in the paper's checkpoints that distinguishes this variant's projection
    feature_key      key whose last dimension is the feature's width; of a pair, the hidden states'
    token_shape      shapes of the projection's tensors -> (N, D) of its image tokens; N is None if
                     every patch becomes a token
    where            whether a file with that signature is of this variant
    lora             whether its files also hold a low-rank part for every attention
    widened          whether its tokens pass the base model's own projection of text (Kolors)
                     before W'
    equivalent_to    published kinds whose tensors look like this variant's and that compute the
                     same
    ambiguous_with   kinds whose tensors look like this variant's but that compute something else,
                     if they are not in the table
    faces            insightface's package of weights whose embedding it was trained with
    tokens           number of image tokens of the published files, where it is not the projection's
                     default
    own_encoder      image encoder that it was trained with, where that is no known one although
                     another has its widths
    """

    name: str
    feature: Feature
    null: Literal["zero embedding", "zero picture", "black picture", "no tokens"]
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
    tokens: int | None = None
    own_encoder: str = ""

    @property
    def image_feature(self) -> Feature | None:
        """Image encoder's part of the feature; None for a face embedding alone."""
        return image_feature(self.feature)

    def reading(self, feature: Feature | None) -> "Variant":
        """Return the variant with another feature; None or "" leaves its own.

        A variant that reads hidden states can read the last ones, or those of several levels
        concatenated. Raise SettingError if the projection cannot read the feature.
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
    """Return the last dimension of the tensor `key`; 0 if there is no such tensor."""
    return tuple(shapes.get(key) or (0,))[-1]


def by_linear(shapes: Shapes) -> tuple[int, int]:
    """Return (N, D) of a linear projection: it gives N·D, its norm has the width D."""
    return shapes["proj.weight"][0] // shapes["norm.weight"][0], shapes["norm.weight"][0]


def by_norm(shapes: Shapes) -> tuple[int, int]:
    """Return (N, D) of a face projection: its last layer gives N·D, its norm has the width D."""
    return shapes["proj.2.weight"][0] // shapes["norm.weight"][0], shapes["norm.weight"][0]


def by_latents(shapes: Shapes) -> tuple[int, int]:
    """Return (N, D) of a resampler: N latents, and D the width of its last norm."""
    return shapes["latents"][1], shapes["norm_out.weight"][0]


STATES = "perceiver_resampler.proj_in.weight"


def of_kolors(seen: CheckpointEvidence) -> bool:
    """Return whether a file is of Kolors' FaceID, by its low-rank part and its widths.

    It has no low-rank part. Its tokens are as wide as Kolors' text before the base model's own
    projection, and W' reads text after it, so that the two widths differ. A file that lacks a width
    is not.
    """
    widths = {width(seen.projection, "norm.weight"), seen.text_dim} - {0, None}
    return not seen.lora and len(widths) == 2


# Both tables are in the order in which signatures are tried.
VARIANTS = (  # they read features of the whole picture
    Variant(
        "base",
        "pooled",
        "zero embedding",
        ImageProjection,
        "proj.weight",
        "proj.weight",
        by_linear,
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
FACES = (  # they read features of a face
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
        tokens=6,
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
        tokens=16,
    ),
)
TRANSFORMERS = (  # of published adapters for transformers: see `imprompt.checkpoints.published`
    Variant(
        "xlabs",
        "pooled",
        "black picture",
        ImageProjection,
        "proj.weight",
        "proj.weight",
        by_linear,
        lambda _: False,
    ),
    Variant(
        "instantx",
        "pooled",
        "zero embedding",
        FaceProjection,
        "proj.2.weight",
        "proj.0.weight",
        by_norm,
        lambda _: False,
    ),
    Variant(
        "hunyuandit",
        "pooled",
        "zero embedding",
        TransposedProjection,
        "proj.weight",
        "proj.weight",
        by_linear,
        lambda _: False,
        own_encoder="HunyuanDiT's own CLIP ViT-H/14",
    ),
    # It was trained with noise of any strength for "no image", of which black is the weakest.
    Variant(
        "ai-toolkit",
        "penultimate",
        "black picture",
        Resampler,
        "latents",
        "proj_in.weight",
        by_latents,
        lambda _: False,
    ),
    Variant(
        "lynx",
        "face",
        "zero embedding",
        Resampler,
        "latents",
        "proj_in.weight",
        by_latents,
        lambda _: False,
        faces="facexlib's arcface",
        tokens=16,
    ),
    Variant(
        "redux",
        "last",
        "no tokens",
        TextProjection,
        "up.weight",
        "up.weight",
        lambda shapes: (None, shapes["down.weight"][0]),
        lambda _: False,
    ),
)
TIMED = (  # of those whose tokens depend on the time: see `imprompt.families.timed`
    Variant(
        "instantx-sd3",
        "penultimate",
        "zero embedding",
        TimeResampler,
        "time_embedding.linear_1.weight",
        "proj_in.weight",
        by_latents,
        lambda _: False,
    ),
    Variant(
        "instantcharacter",
        "character",
        "zero embedding",
        CharacterProjection,
        "proj_cross_layer.fc1.weight",
        "proj.fc1.weight",
        lambda shapes: (
            shapes["resampler.latents"][1],
            shapes["resampler.norm_out.weight"][0],
        ),
        lambda _: False,
    ),
)
BY_NAME = {row.name: row for row in (*VARIANTS, *FACES, *TRANSFORMERS, *TIMED)}
# Kolors, whose text projection the tokens of its FaceID pass, is no family that can be trained on.
TRAINABLE = {row.name: row for row in (*VARIANTS, *FACES) if not row.widened}


OF_WEIGHTS = ("fp16", "bf16", "fp32", "ema", "non_ema")  # which diffusers calls variants


def find_variant(name: str) -> Variant:
    """Return the variant of that name; SettingError, with similar names, if there is none."""
    if name in OF_WEIGHTS:
        raise SettingError(
            f"variant = {name!r}: it is the adapter's variant here, such as faceid; files of "
            f"{name} weights are found by themselves where there are no others, so leave it out"
        )
    if name not in BY_NAME:
        raise SettingError(f"unknown variant {name!r}{suggestions(name, BY_NAME)}")
    return BY_NAME[name]


def bearing(keys: Collection[str]) -> tuple[Variant, ...]:
    """Return the variants whose projection has tensors of these names.

    The first signature that is among the names decides; projections that depend on the time come
    first, because they have tensors of others' names too.
    """
    rows = (*TIMED, *BY_NAME.values())
    signature = next((row.signature for row in rows if row.signature in keys), None)
    return tuple(row for row in BY_NAME.values() if row.signature == signature)
