"""A picture -> its image features: pooled (B, E), or hidden states (B, patches, E).

What differs between kinds of image encoder stands in `imprompt.encoders.kinds`. Shape letters as in
`imprompt.adapter`; S the encoder's input side.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from imprompt.checkpoints.tensors import some
from imprompt.encoders.kinds import EncoderKind, EncoderStructure, find_kind
from imprompt.encoders.preparation import side_of, without_ends
from imprompt.errors import CheckpointError, first_line
from imprompt.models import Location, collector_waits
from imprompt.variants import Feature, Variant

# Either may say how pictures are made ready.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class VisionEncoder:
    """A vision model of one of `imprompt.encoders.kinds` and its image processor, both of
    transformers, for reading features.
    """

    def __init__(self, model: Any, processor: Any, source: str = "") -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.source = source  # repository or folder that it came from

    @cached_property
    def kind(self) -> EncoderKind:
        """The row of its kind."""
        return find_kind(self.model.config.model_type)

    @cached_property
    def structure(self) -> EncoderStructure:
        """The sizes of its features."""
        return self.kind.structure(self.model.config, side_of(self.processor))

    def feature_dim(self, feature: Feature) -> int:
        """E: the width of that feature; MismatchError if the encoder does not give it."""
        return self.structure.shape(feature)[-1]

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """RGB pictures -> the encoder's input (B, 3, S, S), made ready by its own processor."""
        return preprocess(self.processor, images).to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def features_of(self, pixels: Tensor, feature: Feature) -> Tensor:
        """The encoder's input -> (B, E) or (B, patches, E).

        MismatchError if the encoder does not give that feature.
        """
        levels = self.structure.levels(feature)
        seen = self.model(pixels, output_hidden_states=bool(levels))
        if levels:
            return torch.cat([seen.hidden_states[level] for level in levels], -1)
        return getattr(seen, self.kind.pooled if feature == "pooled" else "last_hidden_state")

    def features(self, images: Sequence[Image], feature: Feature) -> Tensor:
        """One by one, so that a picture's feature depends on no other picture."""
        return torch.cat([self.features_of(self.pixels([image]), feature) for image in images])

    def null_features(self, variant: Variant) -> Tensor:
        """What stands for "no image" (1, …): see `Variant.null`."""
        if variant.null == "zero embedding":
            return torch.zeros(
                1,
                *self.structure.shape(variant.feature),
                device=self.model.device,
                dtype=self.model.dtype,
            )
        side = side_of(self.processor)
        return self.features_of(
            torch.zeros(1, 3, side, side, device=self.model.device, dtype=self.model.dtype),
            variant.feature,
        )

    def fingerprint(self) -> str:
        return fingerprint(self.model)


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
    """RGB pictures -> (B, 3, S, S) on the CPU, by an image processor of transformers."""
    seen = [without_ends(image, processor) for image in images]
    return processor(seen, return_tensors="pt").pixel_values


class EncoderDescription(NamedTuple):
    """What a folder's configuration says of the image encoder in it."""

    kind: EncoderKind
    structure: EncoderStructure
    processor: Any  # transformers', of Pillow's kind


def describe_encoder(place: Location) -> EncoderDescription:
    """Read what there is in a folder or on the Hub, without the weights.

    Its own image processor if it brings one, else the kind's. CheckpointError if there is no
    encoder of a known kind.
    """
    import transformers

    source, subfolder = place.fetch_folder()
    inside: Any = {"subfolder": subfolder or ""}
    with as_checkpoint_error(place):
        config, _ = transformers.PreTrainedConfig.get_config_dict(source, **inside)
        kind = find_kind(config.get("model_type", "clip"))
        config = getattr(transformers, kind.model).config_class.from_pretrained(source, **inside)
        processor_class = getattr(transformers, kind.processor)
        processor = (
            processor_class.from_pretrained(source, **inside)
            if any(has_file(source, name, **inside) for name in PROCESSOR_FILES)
            else processor_class(**kind.settings(config))
        )
        structure = kind.structure(config, side_of(processor))
    return EncoderDescription(kind, structure, processor)


@contextmanager
def as_checkpoint_error(place: Location) -> Iterator[None]:
    """Whatever fails inside becomes a CheckpointError, one line: a folder can be wrong in any
    way.
    """
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"no image encoder can be loaded from {place} ({first_line(error)})"
        ) from error


def has_file(source: str, name: str, subfolder: str) -> bool:
    """Whether a folder, or a repository of the Hub as far as can be told, holds that file."""
    from transformers.utils.hub import cached_file

    return bool(
        cached_file(
            source,
            name,
            subfolder=subfolder,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    )


@collector_waits()
def open_encoder(place: Location, device: str | torch.device, dtype: torch.dtype) -> VisionEncoder:
    """The image encoder in a folder or on the Hub; CheckpointError if there is none."""
    import transformers

    source, subfolder = place.fetch_folder()
    kind, _, processor = describe_encoder(place)
    with as_checkpoint_error(place):
        network, report = getattr(transformers, kind.model).from_pretrained(
            source, subfolder=subfolder or "", dtype=dtype, output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):  # these would be random
        raise CheckpointError(
            f"{place} holds no whole {kind.name} image encoder: {some(missing, 3)} missing"
        )
    network.to(device)
    return VisionEncoder(network, processor, str(place))
