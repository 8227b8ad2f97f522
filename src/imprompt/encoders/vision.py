"""CLIP's vision tower: a picture -> its image features, pooled (B, E) or penultimate (B, patches, E)."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from imprompt.variants import Feature, Variant


class VisionEncoder:
    """A `CLIPVisionModelWithProjection` and its image processor, for reading features."""

    def __init__(self, model: Any, processor: Any, source: str = "") -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.source = source  # repository or folder that it came from

    def feature_dim(self, feature: Feature) -> int:
        """E: the width of that feature."""
        config = self.model.config
        return config.projection_dim if feature == "pooled" else config.hidden_size

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """RGB pictures -> the encoder's input (B, 3, S, S): resized by the short side, centre-cropped, normalised."""
        pixels = self.processor(list(images), return_tensors="pt").pixel_values
        return pixels.to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def features_of(self, pixels: Tensor, feature: Feature) -> Tensor:
        if feature == "pooled":
            return self.model(pixels).image_embeds
        return self.model(pixels, output_hidden_states=True).hidden_states[-2]

    def features(self, images: Sequence[Image], feature: Feature) -> Tensor:
        return self.features_of(self.pixels(images), feature)

    def null_features(self, variant: Variant) -> Tensor:
        """What stands for "no image" (1, …): see `Variant.null`."""
        if variant.null == "zero embedding":
            return torch.zeros(1, self.feature_dim(variant.feature), device=self.model.device, dtype=self.model.dtype)
        side = self.model.config.image_size
        return self.features_of(torch.zeros(1, 3, side, side, device=self.model.device, dtype=self.model.dtype), variant.feature)

    def fingerprint(self) -> str:
        """A hash of the first 64 values of every weight as float16: equal for the same encoder in fp16 or fp32."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(weight.flatten()[:64].to("cpu", torch.float16).numpy().tobytes())
        return digest.hexdigest()[:16]
