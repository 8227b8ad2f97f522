"""Load image encoders and encode pictures: pooled (B, E), or hidden states (B, patches, E).

`imprompt.encoders.kinds` holds what differs between kinds of image encoder. Shape letters as in
`imprompt.adapter`; S is the encoder's input side.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from PIL.Image import new as new_picture
from torch import Tensor

from imprompt.checkpoints.tensors import some
from imprompt.encoders.kinds import EncoderKind, EncoderStructure, find_kind
from imprompt.encoders.preparation import side_of, without_ends
from imprompt.errors import CheckpointError, first_line
from imprompt.models import Location, collector_waits, load_weights, quiet_imports
from imprompt.variants import Feature, Variant

# Either file may hold the settings of the image processor.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class VisionEncoder:
    """Vision model and image processor of transformers that encode pictures to features.

    The model is of one of `imprompt.encoders.kinds`.
    """

    def __init__(self, model: Any, processor: Any, source: str = "") -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.source = source  # repository or folder that it came from

    @cached_property
    def kind(self) -> EncoderKind:
        """Kind of the encoder, by its `model_type`."""
        return find_kind(self.model.config.model_type)

    @cached_property
    def structure(self) -> EncoderStructure:
        """Sizes of the encoder's features."""
        return self.kind.structure(self.model.config, side_of(self.processor))

    def feature_dim(self, feature: Feature) -> int:
        """Return the width E of a feature; MismatchError if the encoder does not give it."""
        return self.structure.shape(feature)[-1]

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """Preprocess RGB pictures to the encoder's input (B, 3, S, S), with its own processor."""
        return preprocess(self.processor, images).to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def features_of(self, pixels: Tensor, feature: Feature) -> Tensor:
        """Encode the encoder's input (B, 3, S, S) to (B, E) or (B, patches, E).

        Raise MismatchError if the encoder does not give that feature.
        """
        levels = self.structure.levels(feature)
        seen = self.model(pixels, output_hidden_states=bool(levels))
        if levels:
            return torch.cat([seen.hidden_states[level] for level in levels], -1)
        return getattr(seen, self.kind.pooled if feature == "pooled" else "last_hidden_state")

    def features(self, images: Sequence[Image], feature: Feature) -> Tensor:
        """Encode RGB pictures to (B, E) or (B, patches, E).

        They are encoded one by one, so that a picture's feature depends on no other picture.
        """
        return torch.cat([self.features_of(self.pixels([image]), feature) for image in images])

    def null_features(self, variant: Variant) -> Tensor:
        """Return the features (1, …) that stand for "no image": see `Variant.null`."""
        if variant.null == "zero embedding":
            return torch.zeros(
                1,
                *self.structure.shape(variant.feature),
                device=self.model.device,
                dtype=self.model.dtype,
            )
        side = side_of(self.processor)
        if variant.null == "black picture":
            return self.features([new_picture("RGB", (side, side))], variant.feature)
        return self.features_of(
            torch.zeros(1, 3, side, side, device=self.model.device, dtype=self.model.dtype),
            variant.feature,
        )

    def fingerprint(self) -> str:
        """Return a hash of the model's weights, equal for the same model in fp16 or fp32."""
        return fingerprint(self.model)


def fingerprint(model: Any) -> str:
    """Return a hash of a model's weights: see `fingerprint_of`."""
    return fingerprint_of(model.state_dict())


def fingerprint_of(weights: Mapping[str, Tensor]) -> str:
    """Return a hash of weights by name, equal for the same ones in fp16 or fp32.

    It is of the first 64 values of every weight as float16.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.flatten()[:64].to("cpu", torch.float16).numpy().tobytes())
    return digest.hexdigest()[:16]


def preprocess(processor: Any, images: Sequence[Image]) -> Tensor:
    """Preprocess RGB pictures to (B, 3, S, S) on the CPU, with transformers' image processor."""
    seen = [without_ends(image, processor) for image in images]
    return processor(seen, return_tensors="pt").pixel_values


class EncoderDescription(NamedTuple):
    """Description of an image encoder, read from the configuration in its folder."""

    kind: EncoderKind
    structure: EncoderStructure
    processor: Any  # transformers' version for Pillow


def describe_encoder(place: Location) -> EncoderDescription:
    """Describe the image encoder in a folder or on the Hub, without reading its weights.

    The image processor is its own if it has one, else its kind's. Raise CheckpointError if there is
    no encoder of a known kind.
    """
    import transformers

    source, subfolder = place.fetch_folder()
    inside: Any = {"subfolder": subfolder or ""}
    with as_checkpoint_error(place):
        config, _ = transformers.PreTrainedConfig.get_config_dict(source, **inside)
        kind = find_kind(config.get("model_type", "clip"))
        with quiet_imports():
            model_class = getattr(transformers, kind.model)
            processor_class = getattr(transformers, kind.processor)
        config = model_class.config_class.from_pretrained(source, **inside)
        processor = (
            processor_class.from_pretrained(source, **inside)
            if any(has_file(source, name, **inside) for name in PROCESSOR_FILES)
            else processor_class(**kind.settings(config))
        )
        structure = kind.structure(config, side_of(processor))
    return EncoderDescription(kind, structure, processor)


@contextmanager
def as_checkpoint_error(place: Location) -> Iterator[None]:
    """Turn any error inside into a CheckpointError, one line: a folder can be wrong in any way."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"no image encoder can be loaded from {place} ({first_line(error)})"
        ) from error


def has_file(source: str, name: str, subfolder: str) -> bool:
    """Return whether a folder or Hub repository holds a file; False if the Hub does not answer."""
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
    """Load the image encoder in a folder or on the Hub; CheckpointError if there is none."""
    import transformers

    source, subfolder = place.fetch_folder()
    kind, _, processor = describe_encoder(place)
    with as_checkpoint_error(place):
        network, report = load_weights(
            source,
            lambda variant: getattr(transformers, kind.model).from_pretrained(
                source,
                subfolder=subfolder or "",
                dtype=dtype,
                variant=variant,
                output_loading_info=True,
            ),
            (subfolder or "",),
        )
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random values
        raise CheckpointError(
            f"{place} holds an incomplete {kind.name} image encoder: {some(missing, 3)} missing"
        )
    network.to(device)
    return VisionEncoder(network, processor, str(place))
