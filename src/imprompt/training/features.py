"""Pictures and captions -> what training reads of them: latents, image features, text embeddings.

Shape letters as in `imprompt.adapter`; C latent channels, h and w their height and width, S the
encoder's input side, P the width of a pooled text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from imprompt.encoders.clip import VisionEncoder, fingerprint
from imprompt.families.base import Family, pipeline_family
from imprompt.training.buckets import bucket_sizes, training_size
from imprompt.training.recipe import Data
from imprompt.variants import Variant


@dataclass(frozen=True)
class FeatureEncoder:
    """The frozen models beside the one that is adapted: VAE, image encoder and text encoders."""

    pipeline: Any
    encoder: VisionEncoder
    variant: Variant
    model: str  # as the recipe names it

    @cached_property
    def family(self) -> Family:
        """The base model's family."""
        return pipeline_family(type(self.pipeline).__name__)

    @property
    def unit(self) -> int:
        """Pixels a side that one latent stands for."""
        return self.pipeline.vae_scale_factor

    def size(self, data: Data) -> int:
        """Pixels a side of a training picture."""
        return training_size(
            data, self.family.native_side(self.pipeline), self.unit * self.family.grain
        )

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> "mean" and "spread" (B, C, h, w) of the VAE's posterior,
        unscaled.
        """
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return {"mean": posterior.mean, "spread": posterior.std}

    @torch.no_grad()
    def image(self, pixels: Tensor) -> Tensor:
        """The encoder's input (B, 3, S, S) -> image features (B, E) or (B, patches, E)."""
        network = self.encoder.model
        return self.encoder.features_of(
            pixels.to(network.device, network.dtype), self.variant.feature
        )

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the text part of the base model's `Conditions`."""
        return self.family.encode_text(self.pipeline, captions)

    def nulls(self) -> dict[str, Tensor]:
        """Return what stands in for what is dropped: "image" (1, …), and the empty caption's
        conditions.
        """
        return {"image": self.encoder.null_features(self.variant), **self.text([""])}

    def identity(self, data: Data) -> dict[str, Any]:
        """What features depend on, as plain values: others were made for another model, encoder or
        size.
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
    """The part of the identity that can be told without loading anything."""
    return {
        "model": model,
        "encoder": encoder,
        "feature": variant.feature,
        "null": variant.null,
        "size": size,
        "buckets": [list(bucket) for bucket in bucket_sizes(data, size)],
        "flip": data.flip,
    }
