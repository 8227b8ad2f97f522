"""Load the encoders that measure: CLIP for pictures and texts, DINO for pictures, Inception.

Each records exactly what it is. They compute in float32. Shape letters as in `metrics`.
"""

import hashlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from imprompt.checkpoints.tensors import some
from imprompt.encoders.preparation import cut_ends
from imprompt.encoders.vision import open_encoder
from imprompt.errors import CheckpointError, first_line
from imprompt.files import sha256
from imprompt.models import Location, collector_waits, load_weights
from imprompt.training.validation import Clip

PHOTO = "A photo depicts "  # what CLIPScore's authors put before a caption
Encode = Callable[[Sequence[Any]], Tensor]


@dataclass(frozen=True)
class MetricEncoder:
    """An encoder that measures.

    sha256         hash of its weights as they are used: names, shapes and values
    preprocessing  of pictures, in words
    images, texts  encode to embeddings (N, E), on the CPU; `texts` is None if it encodes none
    """

    key: str
    source: str
    sha256: str
    preprocessing: str
    images: Encode
    texts: Encode | None = None

    def facts(self) -> dict[str, str]:
        """Return what a run's record states about the encoder."""
        return {
            "key": self.key,
            "name": Path(self.source).name if Path(self.source).exists() else self.source,
            "source": self.source,
            "sha256": self.sha256,
            "preprocessing": self.preprocessing,
        }


def cpu(encode: Callable[[Any], Tensor]) -> Encode:
    """Return `encode` without gradients, with its result in float32 on the CPU."""
    return torch.no_grad()(lambda inputs: encode(inputs).float().cpu())


@collector_waits()
def open_clip(source: str, device: str) -> MetricEncoder:
    """Load a whole CLIP, or a vision tower, which encodes no texts; CheckpointError."""
    if is_tower(source):
        encoder = open_encoder(Location.parse(source), device, torch.float32)
        pictures = cpu(lambda images: encoder.features(images, "pooled"))
        return MetricEncoder(
            "clip",
            source,
            weights_hash(encoder.model.state_dict()),
            describe_preprocessing(encoder.processor),
            pictures,
        )
    try:
        clip = Clip(source)
    except CheckpointError as error:
        raise refused(
            "clip", source, str(error).removeprefix(f"validation.clip = {source!r}").lstrip(": ")
        ) from error
    clip.model.to(device)
    return MetricEncoder(
        "clip",
        source,
        weights_hash(clip.model.state_dict()),
        describe_preprocessing(clip.processor),
        cpu(clip.images),
        cpu(clip.texts),
    )


def is_tower(source: str) -> bool:
    """Return whether `source` is only the vision tower of a CLIP.

    Return False if it cannot be read: the error is raised when it is opened.
    """
    from transformers import CLIPVisionConfig

    try:
        folder, subfolder = Location.parse(source).fetch_folder()
        return (
            CLIPVisionConfig.get_config_dict(folder, subfolder=subfolder or "")[0].get("model_type")
            == "clip_vision_model"
        )
    except Exception:
        return False


@collector_waits()
def open_dino(source: str, device: str) -> MetricEncoder:
    """Load a vision transformer like DINO or DINOv2, whose class token is the embedding.

    Raise CheckpointError if it cannot be loaded.
    """
    from transformers import AutoImageProcessor, AutoModel

    try:
        folder, _ = Location(source).fetch_folder()
        loaded: Any = load_weights(
            folder,
            lambda variant: AutoModel.from_pretrained(
                folder,
                dtype=torch.float32,
                variant=variant,
                output_loading_info=True,
                trust_remote_code=False,
            ),
        )
        processor: Any = AutoImageProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=False
        )
        model, report = loaded
        if not hasattr(model.config, "patch_size") or model.main_input_name != "pixel_values":
            raise ValueError(f"it holds a {model.config.model_type}, not a vision transformer")
    except Exception as error:  # a folder can be wrong in any way
        raise refused(
            "dino", source, f"no vision transformer can be loaded ({first_line(error)})"
        ) from error
    # DINO has no pooler, and its output is not used
    unread = {key for key in report["missing_keys"] if key.startswith("pooler.")}
    if missing := sorted({*report["missing_keys"]} - unread):  # these would be random
        raise refused("dino", source, f"{some(missing, 3)} missing")
    model.to(device).eval().requires_grad_(False)

    def embed(images: Sequence[Image]) -> Tensor:
        pixels = processor([cut_ends(image) for image in images], return_tensors="pt").pixel_values
        return model(pixel_values=pixels.to(device)).last_hidden_state[:, 0]

    return MetricEncoder(
        "dino",
        source,
        weights_hash(model.state_dict(), unread),
        describe_preprocessing(processor),
        cpu(embed),
    )


def open_inception(source: str, device: str) -> MetricEncoder:
    """Load Inception-v3 from the TorchScript file of StyleGAN's and clean-fid's authors.

    The file is inception-2015-12-05.pt. It takes 8-bit RGB, resizes by itself, and gives 2048
    features. Raise CheckpointError if it cannot be loaded.
    """
    path = Path(source)
    if not path.is_file():
        raise refused("inception", source, "there is no such file")
    try:
        with warnings.catch_warnings():
            # torch deprecates TorchScript, but this is the published format
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # a file can be wrong in any way
        raise refused(
            "inception", source, f"no TorchScript can be loaded ({first_line(error)})"
        ) from error

    def embed(images: Sequence[Image]) -> Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(
            0, 3, 1, 2
        )
        return network(pixels.to(device), return_features=True)

    how = "8-bit RGB, resized to 299×299 by the network"
    return MetricEncoder("inception", source, sha256(path), how, cpu(embed))


JUDGES: dict[str, Callable[[str, str], MetricEncoder]] = {
    "clip": open_clip,
    "dino": open_dino,
    "inception": open_inception,
}
GIVE = {
    "clip": "give a CLIPModel's folder or Hub id",
    "dino": "give a ViT's or DINOv2's folder or Hub id, or none",
    "inception": "give Inception's TorchScript file",
}


def refused(key: str, source: str, why: str) -> CheckpointError:
    """Return the error for a source that cannot be used, with what to give instead."""
    return CheckpointError(f"--{key} {source}: {why}; {GIVE[key]}")


def open_judges(sources: Mapping[str, str | None], device: str) -> dict[str, MetricEncoder]:
    """Load the metric encoders of these sources, by key, except those of None; CheckpointError."""
    for key, source in sources.items():
        if source is not None and Path(source).is_absolute() and not Path(source).exists():
            raise refused(
                key,
                source,
                "there is no such file" if key == "inception" else "there is no such folder",
            )
    return {
        key: JUDGES[key](source, device) for key, source in sources.items() if source is not None
    }


def weights_hash(state: Mapping[str, Tensor], leave_out: Collection[str] = ()) -> str:
    """Return the SHA-256 of names, shapes, types and values of weights, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted({*state} - {*leave_out}):
        weight = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(weight.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_preprocessing(processor: Any) -> str:
    """Describe an image processor: its kind and its steps.

    The steps are sizes in pixels, Pillow's number of the resampling filter, mean and deviation.
    """
    fields = processor.to_dict()
    steps = {
        "resize": fields.get("size") if fields.get("do_resize") else None,
        "resample": fields.get("resample") if fields.get("do_resize") else None,
        "crop": fields.get("crop_size") if fields.get("do_center_crop") else None,
        "mean": fields.get("image_mean"),
        "std": fields.get("image_std"),
    }
    how = ", ".join(
        f"{name} {as_words(value)}" for name, value in steps.items() if value is not None
    )
    return f"{type(processor).__name__}: {how}"


def as_words(value: Any) -> str:
    """Return a processor's value as text, without the entries that are None."""
    if isinstance(value, Mapping):
        return " ".join(f"{name} {number}" for name, number in value.items() if number is not None)
    return (
        " ".join(f"{number:.4g}" for number in value)
        if isinstance(value, list | tuple)
        else str(value)
    )
