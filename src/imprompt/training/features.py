"""Encoder of pictures and captions into latents, image features and text embeddings.

Shape letters as in `imprompt.adapter`; C latent channels, h and w their height and width, S the
encoder's input side, P the width of a pooled text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from imprompt.encoders.vision import VisionEncoder, fingerprint
from imprompt.families.base import Family, pipeline_family
from imprompt.training.buckets import bucket_sizes, training_size
from imprompt.training.recipe import Data
from imprompt.variants import Variant


@dataclass(frozen=True)
class FeatureEncoder:
    """The frozen models around the adapted one: VAE, image encoder and text encoders."""

    pipeline: Any
    encoder: VisionEncoder
    variant: Variant
    model: str  # as the recipe names it

    @cached_property
    def family(self) -> Family:
        """Family of the base model."""
        return pipeline_family(type(self.pipeline).__name__)

    @property
    def unit(self) -> int:
        """Pixels a side that one latent stands for."""
        return self.pipeline.vae_scale_factor

    def size(self, data: Data) -> int:
        """Return the side of a training picture in pixels."""
        return training_size(
            data, self.family.native_side(self.pipeline), self.unit * self.family.grain
        )

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> dict[str, Tensor]:
        """Encode pixels (B, 3, H, W) in [-1, 1] to the VAE's posterior.

        Return its "mean" and "spread" (B, C, h, w), unscaled.
        """
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return {"mean": posterior.mean, "spread": posterior.std}

    @torch.no_grad()
    def image(self, pixels: Tensor) -> Tensor:
        """Encode preprocessed pictures (B, 3, S, S) to features (B, E) or (B, patches, E)."""
        network = self.encoder.model
        return self.encoder.features_of(
            pixels.to(network.device, network.dtype), self.variant.feature
        )

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the text part of the base model's `Conditions`."""
        return self.family.encode_text(self.pipeline, captions)

    def nulls(self) -> dict[str, Tensor]:
        """Return the features that replace dropped ones.

        They are "image" (1, …) and the conditions of the empty caption.
        """
        return {"image": self.encoder.null_features(self.variant), **self.text([""])}

    def identity(self, data: Data) -> dict[str, Any]:
        """Return what features depend on, as plain values.

        Features with another identity were made for another model, encoder or size.
        """
        texts = (
            part
            for name, part in self.pipeline.components.items()
            if name.startswith("text_encoder")
        )
        return {
            **wanted_identity(self.model, self.encoder.source, self.variant, data, self.size(data)),
            "vae_fingerprint": fingerprint(self.pipeline.vae),
            "encoder_fingerprint": self.encoder.fingerprint(),
            "text_fingerprint": " ".join(fingerprint(part) for part in texts if part is not None),
        }


def wanted_identity(
    model: str, encoder: str, variant: Variant, data: Data, size: int
) -> dict[str, Any]:
    """Return the part of the identity that is known without loading a model."""
    return {
        "model": model,
        "encoder": encoder,
        "feature": variant.feature,
        "null": variant.null,
        "size": size,
        "buckets": [list(bucket) for bucket in bucket_sizes(data, size)],
        "flip": data.flip,
    }
