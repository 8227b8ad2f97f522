"""Kinds of image encoder, a row each: how it is loaded, its preprocessing and its features.

A feature that is not pooled has a row for each token of the network, in the network's own order:
CLIP's and DINOv2's class token first, then DINOv2's registers if it has any, then the patches.
SigLIP has only patches. No row is left out, because the paper's plus adapters read CLIP's class
token too. Shape letters as in `imprompt.adapter`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from imprompt.errors import MismatchError
from imprompt.variants import BESIDE_A_FACE, Feature, levels_of

DINOV2_SIDE = 224  # published preprocessing: short side 256, then the middle 224 × 224
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class EncoderStructure:
    """Sizes of an image encoder, which determine the shapes of its features.

    pooled       width of its pooled embedding; 0 if it gives none
    penultimate  width of its hidden states
    layers       number of its layers
    patches      number of rows of its hidden states: class token, registers, patches
    kind         name of its kind
    """

    pooled: int
    penultimate: int
    layers: int
    patches: int = 257
    kind: str = "CLIP"

    @property
    def named(self) -> dict[Feature, tuple[int, ...]]:
        """Features that the encoder gives, except levels, with their hidden states."""
        pooled = {"pooled": ()} if self.pooled else {}
        return {**pooled, "penultimate": (self.layers - 1,), "last": ()}

    def gives(self, feature: Feature) -> bool:
        """Return whether the encoder gives that feature."""
        return feature in self.named or -1 < max(levels_of(feature), default=-1) <= self.layers

    def levels(self, feature: Feature) -> tuple[int, ...]:
        """Return which hidden states a feature is made of; none for "pooled" and "last".

        Raise MismatchError, with what the encoder gives, if it does not give the feature.
        """
        if not self.gives(feature):
            hint = (
                "; what FaceID adapters read is in imprompt.encoders.face"
                if feature in BESIDE_A_FACE
                else ""
            )
            raise MismatchError(
                f"a {self.kind} image encoder gives no {feature}: this one gives "
                f"{', '.join(self.named)} and levels 0 to {self.layers}{hint}"
            )
        return self.named.get(feature) or levels_of(feature)

    def shape(self, feature: Feature) -> tuple[int, ...]:
        """Return the shape of one picture's feature: (E,) or (patches, E).

        Raise MismatchError if the encoder does not give it.
        """
        levels = self.levels(feature)
        if feature == "pooled":
            return (self.pooled,)
        return self.patches, self.penultimate * max(1, len(levels))


@dataclass(frozen=True)
class EncoderKind:
    """Kind of image encoder.

    A configuration is transformers' configuration of the vision model alone.

    name         name in messages
    model        transformers' class of the vision model
    processor    transformers' class of the image processor
    settings     configuration -> settings of the image processor if the weights come without them
    pooled       name of the pooled embedding among the model's outputs
    pooled_dim   configuration -> width of the pooled embedding; 0 if the model gives none
    class_rows   configuration -> number of rows of the hidden states that are not patches
    any_side     whether it reads pictures of another side than its configuration's
    """

    name: str
    model: str
    processor: str
    settings: Callable[[Any], dict[str, Any]]
    pooled: str
    pooled_dim: Callable[[Any], int]
    class_rows: Callable[[Any], int]
    any_side: bool = False

    def structure(self, config: Any, side: int) -> EncoderStructure:
        """Return the sizes of an encoder that reads pictures of `side` × `side` pixels.

        Raise MismatchError if it cannot read them.
        """
        if side != config.image_size and not self.any_side:
            raise MismatchError(
                f"its image processor makes pictures of {side} × {side} pixels; it reads "
                f"{config.image_size} × {config.image_size}"
            )
        return EncoderStructure(
            self.pooled_dim(config),
            config.hidden_size,
            config.num_hidden_layers,
            self.class_rows(config) + (side // config.patch_size) ** 2,
            self.name,
        )


def short_side_and_crop(side: int, short_side: int) -> dict[str, Any]:
    """Return settings that resize by the short side, then cut out the middle `side` × `side`."""
    return {"size": {"shortest_edge": short_side}, "crop_size": {"height": side, "width": side}}


def clip_settings(config: Any) -> dict[str, Any]:
    """Return the settings for CLIP, which sees the central square."""
    return short_side_and_crop(config.image_size, config.image_size)


def siglip_settings(config: Any) -> dict[str, Any]:
    """Return the settings for SigLIP, which sees the whole picture squashed to a square."""
    return {"size": {"height": config.image_size, "width": config.image_size}}


def dinov2_settings(config: Any) -> dict[str, Any]:
    """Return the settings for DINOv2, which sees the middle of the central square.

    It is seven eighths of the square's side. The configurations state 518 pixels, from the
    last stage of training; DINOv2 is used at 224.
    """
    side = min(config.image_size, DINOV2_SIDE)
    return short_side_and_crop(side, side * 8 // 7) | IMAGENET


CLIP = EncoderKind(
    "CLIP",
    model="CLIPVisionModelWithProjection",
    processor="CLIPImageProcessorPil",
    settings=clip_settings,
    pooled="image_embeds",
    pooled_dim=lambda config: config.projection_dim,
    class_rows=lambda _: 1,
)
SIGLIP = EncoderKind(
    "SigLIP",
    model="SiglipVisionModel",
    processor="SiglipImageProcessorPil",
    settings=siglip_settings,
    pooled="pooler_output",
    pooled_dim=lambda config: config.hidden_size * getattr(config, "vision_use_head", True),
    class_rows=lambda _: 0,
)
DINOV2 = EncoderKind(
    "DINOv2",
    model="Dinov2Model",
    processor="BitImageProcessorPil",
    settings=dinov2_settings,
    pooled="pooler_output",
    pooled_dim=lambda config: config.hidden_size,
    class_rows=lambda _: 1,
    any_side=True,
)
DINOV2_WITH_REGISTERS = replace(
    DINOV2,
    model="Dinov2WithRegistersModel",
    class_rows=lambda config: 1 + config.num_register_tokens,
)

# By model_type of a configuration, with or without a text model; a fixed-size SigLIP 2 is a siglip.
KINDS: Mapping[str, EncoderKind] = {
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2_WITH_REGISTERS,
}


def find_kind(model_type: str) -> EncoderKind:
    """Return the kind of a `model_type`; MismatchError, with the known kinds, if there is none."""
    if model_type not in KINDS:
        *names, last = dict.fromkeys(kind.name for kind in KINDS.values())
        raise MismatchError(
            f"it holds a {model_type}, not a {', '.join(names)} or {last} image encoder"
        )
    return KINDS[model_type]
