"""CLIP's vision tower: a picture -> its image features, pooled (B, E) or penultimate (B, patches,
E).
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from imprompt.checkpoints.tensors import some
from imprompt.errors import CheckpointError, MismatchError, first_line
from imprompt.models import Location, collector_waits
from imprompt.variants import OF_CLIP, Feature, Variant

MAX_ASPECT = (
    2  # the encoder sees the central square: what lies far outside is cut off before resizing
)


class VisionEncoder:
    """A `CLIPVisionModelWithProjection` and its image processor, for reading features."""

    def __init__(self, model: Any, processor: Any, source: str = "") -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.source = source  # repository or folder that it came from

    def feature_dim(self, feature: Feature) -> int:
        """E: the width of that feature."""
        check_feature(feature)
        config = self.model.config
        return config.projection_dim if feature == "pooled" else config.hidden_size

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """RGB pictures -> the encoder's input (B, 3, S, S): resized by the short side,
        centre-cropped, normalised.
        """
        return preprocess(self.processor, images).to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def features_of(self, pixels: Tensor, feature: Feature) -> Tensor:
        check_feature(feature)
        if feature == "pooled":
            return self.model(pixels).image_embeds
        return self.model(pixels, output_hidden_states=True).hidden_states[-2]

    def features(self, images: Sequence[Image], feature: Feature) -> Tensor:
        """One by one, so that a picture's feature depends on no other picture."""
        return torch.cat([self.features_of(self.pixels([image]), feature) for image in images])

    def null_features(self, variant: Variant) -> Tensor:
        """What stands for "no image" (1, …): see `Variant.null`."""
        if variant.null == "zero embedding":
            return torch.zeros(
                1,
                self.feature_dim(variant.feature),
                device=self.model.device,
                dtype=self.model.dtype,
            )
        side = self.model.config.image_size
        return self.features_of(
            torch.zeros(1, 3, side, side, device=self.model.device, dtype=self.model.dtype),
            variant.feature,
        )

    def fingerprint(self) -> str:
        return fingerprint(self.model)


def check_feature(feature: Feature) -> None:
    """Raise MismatchError if a CLIP image encoder alone does not give it."""
    if OF_CLIP.get(feature) != feature:
        raise MismatchError(
            f"a CLIP image encoder gives no {feature}: imprompt.encoders.face has what FaceID "
            "adapters read"
        )


def fingerprint(model: Any) -> str:
    """A hash of the first 64 values of every weight as float16: equal for the same model in fp16 or
    fp32.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.flatten()[:64].to("cpu", torch.float16).numpy().tobytes())
    return digest.hexdigest()[:16]


def preprocess(processor: Any, images: Sequence[Image]) -> Tensor:
    """RGB pictures -> (B, 3, S, S) on the CPU, by a CLIP image processor."""
    return processor([cut_ends(image) for image in images], return_tensors="pt").pixel_values


def cut_ends(image: Image) -> Image:
    """The middle of a very long or tall picture: resizing the whole by its short side could take
    gigabytes.
    """
    width, height = (
        min(image.width, MAX_ASPECT * image.height),
        min(image.height, MAX_ASPECT * image.width),
    )
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@collector_waits()
def open_encoder(place: Location, device: str | torch.device, dtype: torch.dtype) -> VisionEncoder:
    """The image encoder in a folder or on the Hub; CheckpointError if there is none."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    source, subfolder = place.fetch_folder()
    try:
        told, _ = CLIPVisionConfig.get_config_dict(source, subfolder=subfolder or "")
        if (kind := told.get("model_type", "clip")) not in ("clip_vision_model", "clip"):
            raise ValueError(f"it holds a {kind}, not a CLIP image encoder")
        loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
            source, subfolder=subfolder or "", dtype=dtype, output_loading_info=True
        )
        network, report = loaded
    except Exception as error:  # a folder can be wrong in any way
        raise CheckpointError(
            f"no image encoder can be loaded from {place} ({first_line(error)})"
        ) from error
    if missing := sorted(report["missing_keys"]):  # these would be random
        raise CheckpointError(
            f"{place} holds no whole CLIP image encoder: {some(missing, 3)} missing"
        )
    network.to(device)  # pyright: ignore[reportArgumentType] - transformers' decorated `to` loses its signature
    return VisionEncoder(network, processor_of(network.config), str(place))


def processor_of(config: Any) -> Any:
    """CLIP's image processor for an encoder of this configuration."""
    from transformers import CLIPImageProcessorPil

    shortest: Any = {"shortest_edge": config.image_size}
    square: Any = {"height": config.image_size, "width": config.image_size}
    return CLIPImageProcessorPil(size=shortest, crop_size=square)
