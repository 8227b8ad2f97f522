"""Encoder of pictures and captions into latents, image features and text embeddings.

Shape letters as in `imprompt.adapter`; C latent channels, h and w their height and width, S the
encoder's input side, P the width of a pooled text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from imprompt.encoders.face import FaceFeatures
from imprompt.encoders.face_sources import FaceSource
from imprompt.encoders.vision import VisionEncoder, fingerprint
from imprompt.families.autoencoders import Autoencoder, find_autoencoder
from imprompt.families.base import Family, base_of, family_of
from imprompt.training.buckets import bucket_sizes, training_size
from imprompt.training.recipe import Data
from imprompt.training.references import FaceReferences, Parts, PictureReferences, References
from imprompt.variants import PARTS, Variant


@dataclass(frozen=True)
class FeatureEncoder:
    """The frozen models around the adapted one: VAE, image encoder and text encoders.

    encoder  None if the variant reads a face's embedding alone
    model    as the recipe names it
    faces    where faces come from, for a variant that reads them
    """

    pipeline: Any
    encoder: VisionEncoder | None
    variant: Variant
    model: str
    faces: FaceSource | None = None

    @cached_property
    def references(self) -> References:
        """Preparation of the pictures that prompt."""
        pictures = None if self.encoder is None else PictureReferences(self.encoder.processor)
        if self.faces is not None:
            return FaceReferences(self.faces, self.variant.feature, pictures)
        assert pictures is not None
        return pictures

    def reader(self, device: torch.device) -> VisionEncoder | FaceFeatures:
        """Return the encoder of prompts as generation uses it; of faces, given as `Face`."""
        if self.faces is not None:
            return FaceFeatures(None, self.encoder, width=self.faces.width, device=device)
        assert self.encoder is not None
        return self.encoder

    @cached_property
    def family(self) -> Family:
        """Family of the base model."""
        return family_of(base_of(self.pipeline))

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """Row of the pipeline's autoencoder."""
        return find_autoencoder(type(self.pipeline.vae).__name__)

    @property
    def unit(self) -> int:
        """Pixels a side that one latent stands for."""
        return self.autoencoder.unit(self.pipeline.vae.config)

    @property
    def channels(self) -> int:
        """C of the latents."""
        return self.autoencoder.channels(self.pipeline.vae.config)

    def size(self, data: Data) -> int:
        """Return the side of a training picture in pixels."""
        native = self.family.native_latents(base_of(self.pipeline).config) * self.unit
        return training_size(data, native, self.unit * self.family.grain)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> dict[str, Tensor]:
        """Encode pixels (B, 3, H, W) in [-1, 1] to the VAE's posterior.

        Return its "mean" and "spread" (B, C, h, w), as the row of the autoencoder gives them.
        """
        vae = self.pipeline.vae
        mean, spread = self.autoencoder.encode(vae, pixels.to(vae.device, vae.dtype))
        return {"mean": mean, "spread": spread}

    @torch.no_grad()
    def image(self, references: Parts) -> Parts:
        """Encode prepared references (B, …) to features, part by part.

        Pictures (B, 3, S, S) become (B, E) or (B, patches, E); face embeddings stay what they are.
        """
        if self.encoder is None or self.variant.image_feature is None:
            return references
        network = self.encoder.model
        pixels = references["image"].to(network.device, network.dtype)
        return references | {"image": self.encoder.features_of(pixels, self.variant.image_feature)}

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the text part of the base model's `Conditions`."""
        return self.family.encode_text(self.pipeline, captions)

    def nulls(self) -> dict[str, Tensor]:
        """Return the features that replace dropped ones.

        They are the parts of the image's (1, …) and the conditions of the empty caption.
        """
        nulls = self.reader(torch.device("cpu")).null_features(self.variant)
        values = nulls if isinstance(nulls, tuple) else (nulls,)
        return {**dict(zip(parts_of(self.variant), values, strict=True)), **self.text([""])}

    def identity(self, data: Data) -> dict[str, Any]:
        """Return what features depend on, as plain values.

        Features with another identity were made for another model, encoder or size.
        """
        texts = (
            part
            for name, part in self.pipeline.components.items()
            if name.startswith("text_encoder")
        )
        encoder, faces = self.encoder, self.faces
        wanted = wanted_identity(
            self.model,
            encoder.source if encoder is not None else "",
            self.variant,
            data,
            self.size(data),
            faces.name if faces is not None else None,
        )
        of_faces = (
            {}
            if faces is None
            else {"face_encoder": faces.encoder, "faces_fingerprint": faces.fingerprint}
        )
        return {
            **wanted,
            "vae_fingerprint": fingerprint(self.pipeline.vae),
            "encoder_fingerprint": encoder.fingerprint() if encoder is not None else "",
            **of_faces,
            "text_fingerprint": " ".join(fingerprint(part) for part in texts if part is not None),
        }


def packed_text(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a sample's features without the text's masked rows, which no attention reads.

    Text (T, D) becomes (rows of the caption, D) where the family has a "text_mask" (T,).
    """
    held = dict(features)
    if "text_mask" in held:
        held["text"] = held["text"][held["text_mask"].bool()]
    return held


def padded_text(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a sample's features with zeros as the text's masked rows: undo `packed_text`.

    Texts that hold all rows, as older versions stored them, stay what they are.
    """
    held = dict(features)
    mask = held.get("text_mask")
    if mask is not None and len(held["text"]) < len(mask):
        text = held["text"]
        held["text"] = text.new_zeros(len(mask), text.shape[1])
        held["text"][mask.bool()] = text
    return held


def parts_of(variant: Variant) -> tuple[str, ...]:
    """Return the names of the parts that a variant reads, in the order of its projection."""
    reads = {"face": variant.faces, "image": variant.image_feature}
    return tuple(part for part in PARTS if reads[part])


def wanted_identity(
    model: str, encoder: str, variant: Variant, data: Data, size: int, faces: str | None = None
) -> dict[str, Any]:
    """Return the part of the identity that is known without loading a model.

    encoder  location of the image encoder; "" for a variant that reads none
    faces    as the recipe states them, for a variant that reads faces
    """
    of_faces = {} if faces is None else {"faces": faces}
    return {
        "model": model,
        "encoder": encoder,
        "feature": variant.feature,
        "null": variant.null,
        "size": size,
        "buckets": [list(bucket) for bucket in bucket_sizes(data, size)],
        "flip": data.flip,
        **of_faces,
    }
