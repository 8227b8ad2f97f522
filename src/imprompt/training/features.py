"""Pictures and captions -> what training reads of them: latents, image features, text embeddings.

Shape letters as in `imprompt.adapter`; C latent channels, h and w their height and width, S the encoder's input side,
P the width of SDXL's pooled text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imprompt.encoders.vision import VisionEncoder, fingerprint
from imprompt.errors import SettingError
from imprompt.training.buckets import bucket_sizes, training_size
from imprompt.training.recipe import Data
from imprompt.variants import Variant

Texts = dict[str, Tensor]  # "text" (B, T, D), and for SDXL "pooled" (B, P)


def sd_text(pipeline: Any, captions: Sequence[str]) -> Texts:
    text, _ = pipeline.encode_prompt(list(captions), pipeline.device, 1, False)
    return {"text": text}


def sdxl_text(pipeline: Any, captions: Sequence[str]) -> Texts:
    text, _, pooled, _ = pipeline.encode_prompt(list(captions), device=pipeline.device, do_classifier_free_guidance=False)
    return {"text": text, "pooled": pooled}


# How the text of a class of pipelines is encoded.
TEXT: dict[str, Callable[[Any, Sequence[str]], Texts]] = {
    "StableDiffusionPipeline": sd_text,
    "StableDiffusionXLPipeline": sdxl_text,
}


@dataclass(frozen=True)
class FeatureEncoder:
    """The frozen models beside the one that is adapted: VAE, image encoder and text encoders."""

    pipeline: Any
    encoder: VisionEncoder
    variant: Variant
    model: str  # as the recipe names it

    def __post_init__(self) -> None:
        if (kind := type(self.pipeline).__name__) not in TEXT:
            raise SettingError(f"{self.model} is a {kind}; training knows {', '.join(TEXT)}")

    @property
    def unit(self) -> int:
        """Pixels a side that one latent stands for."""
        return self.pipeline.vae_scale_factor

    def size(self, data: Data) -> int:
        """Pixels a side of a training picture."""
        return training_size(data, (self.pipeline.unet.config.sample_size or 64) * self.unit, self.unit)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> "mean" and "spread" (B, C, h, w) of the VAE's posterior, unscaled."""
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return {"mean": posterior.mean, "spread": posterior.std}

    @torch.no_grad()
    def image(self, pixels: Tensor) -> Tensor:
        """The encoder's input (B, 3, S, S) -> image features (B, E) or (B, patches, E)."""
        network = self.encoder.model
        return self.encoder.features_of(pixels.to(network.device, network.dtype), self.variant.feature)

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Texts:
        return TEXT[type(self.pipeline).__name__](self.pipeline, captions)

    def nulls(self) -> dict[str, Tensor]:
        """What stands in for what is dropped: "image" (1, …), "text" (1, T, D) of the empty caption, for SDXL "pooled" (1, P)."""
        return {"image": self.encoder.null_features(self.variant), **self.text([""])}

    def identity(self, data: Data) -> dict[str, Any]:
        """What features depend on, as plain values: others were made for another model, encoder or size."""
        texts = (getattr(self.pipeline, name, None) for name in ("text_encoder", "text_encoder_2"))
        return {
            **wanted(self.model, self.encoder.source, self.variant, data, self.size(data)),
            "vae_fingerprint": fingerprint(self.pipeline.vae),
            "encoder_fingerprint": self.encoder.fingerprint(),
            "text_fingerprint": " ".join(fingerprint(part) for part in texts if part is not None),
        }


def wanted(model: str, encoder: str, variant: Variant, data: Data, size: int) -> dict[str, Any]:
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
