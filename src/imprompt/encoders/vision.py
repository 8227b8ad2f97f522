"""CLIP's vision tower: a picture -> its image features, pooled (B, E) or penultimate (B, patches, E)."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor

from imprompt.errors import CheckpointError, MismatchError, SettingError, first_line
from imprompt.models import KnownModel, Place, collector_waits
from imprompt.structures import published_encoder
from imprompt.tensorfiles import some
from imprompt.variants import OF_CLIP, Feature, Variant

if TYPE_CHECKING:
    from imprompt.encoders.face import FaceEncoder, FaceFeatures
    from imprompt.encoders.kept import KeptFeatures, Store

MAX_ASPECT = 2  # the encoder sees the central square: what lies far outside is cut off before resizing


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
        """RGB pictures -> the encoder's input (B, 3, S, S): resized by the short side, centre-cropped, normalised."""
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
            return torch.zeros(1, self.feature_dim(variant.feature), device=self.model.device, dtype=self.model.dtype)
        side = self.model.config.image_size
        return self.features_of(torch.zeros(1, 3, side, side, device=self.model.device, dtype=self.model.dtype), variant.feature)

    def fingerprint(self) -> str:
        return fingerprint(self.model)


def check_feature(feature: Feature) -> None:
    """Raise MismatchError if a CLIP image encoder alone does not give it."""
    if OF_CLIP.get(feature) != feature:
        raise MismatchError(f"a CLIP image encoder gives no {feature}: imprompt.encoders.face has what FaceID adapters read")


def fingerprint(model: Any) -> str:
    """A hash of the first 64 values of every weight as float16: equal for the same model in fp16 or fp32."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.flatten()[:64].to("cpu", torch.float16).numpy().tobytes())
    return digest.hexdigest()[:16]


def preprocess(processor: Any, images: Sequence[Image]) -> Tensor:
    """RGB pictures -> (B, 3, S, S) on the CPU, by a CLIP image processor."""
    return processor([cut_ends(image) for image in images], return_tensors="pt").pixel_values


def cut_ends(image: Image) -> Image:
    """The middle of a very long or tall picture: resizing the whole by its short side could take gigabytes."""
    width, height = (min(image.width, MAX_ASPECT * image.height), min(image.height, MAX_ASPECT * image.width))
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def load_encoder(file: Any, told: Place | None, model: KnownModel, given: str | Path | None, device: str, dtype: torch.dtype,
                 keep: "Store | None" = None,
                 prepare: Callable[[Any], None] | None = None,
                 faces: "FaceEncoder | None" = None) -> "VisionEncoder | KeptFeatures | FaceFeatures":  # fmt: skip
    """The image encoder for an adapter file, checked against it: the given one, or the one its name, header, model or width tells.

    For a FaceID adapter it reads faces: `faces` finds them, else insightface, loaded when the first picture is given. `keep` holds
    features encoded before: then the encoder is opened, and checked, when one is asked for that is not there. `prepare` is called
    with the network once it is opened and checked. Raises MismatchError with both widths, or if the encoder's weights are not those
    that the adapter was trained with.
    """
    clip = clip_encoder(file, told, model, given, device, dtype, keep, prepare) if file.variant.clip_feature else None
    if file.variant.faces:
        from imprompt.encoders.face import FaceFeatures, InsightFace

        return FaceFeatures(faces or InsightFace(file.variant.faces, device), clip, width=file.face_dim, device=device)
    return clip  # pyright: ignore[reportReturnType] - what reads no face reads CLIP


def clip_encoder(file: Any, told: Place | None, model: KnownModel, given: str | Path | None, device: str, dtype: torch.dtype,
                 keep: "Store | None", prepare: Callable[[Any], None] | None) -> "VisionEncoder | KeptFeatures":  # fmt: skip
    """As `load_encoder`, of the CLIP part."""
    place = given_place(str(given)) if given is not None else told or place_of(file, model)

    def checked() -> VisionEncoder:
        encoder = open_encoder(place, device, dtype)
        check_encoder(encoder, file)
        if prepare is not None:
            prepare(encoder.model)
        return encoder

    if keep is None:
        return checked()
    from imprompt.encoders.kept import KeptFeatures

    kept = KeptFeatures(checked, place, device, dtype, keep, width=file.feature_dim, fingerprint=expected_fingerprint(file, dtype))
    if keep.empty():  # then it is needed for certain, and what is wrong with it is said at once
        _ = kept.encoder
    return kept


@collector_waits()
def open_encoder(place: Place, device: str | torch.device, dtype: torch.dtype) -> VisionEncoder:
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
        raise CheckpointError(f"no image encoder can be loaded from {place} ({first_line(error)})") from error
    if missing := sorted(report["missing_keys"]):  # these would be random
        raise CheckpointError(f"{place} holds no whole CLIP image encoder: {some(missing, 3)} missing")
    network.to(device)  # pyright: ignore[reportArgumentType] - transformers' decorated `to` loses its signature
    return VisionEncoder(network, processor_of(network.config), str(place))


def processor_of(config: Any) -> Any:
    """CLIP's image processor for an encoder of this configuration."""
    from transformers import CLIPImageProcessorPil

    shortest: Any = {"shortest_edge": config.image_size}
    square: Any = {"height": config.image_size, "width": config.image_size}
    return CLIPImageProcessorPil(size=shortest, crop_size=square)


def given_place(name: str) -> Place:
    """The place that a user names; SettingError, before the Hub is asked, if it can be none."""
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise SettingError(f"no image encoder {name!r}: give a folder with config.json and weights, or a Hub id owner/name")
    return Place(name)


def place_of(file: Any, model: KnownModel) -> Place:
    """Where the encoder of an adapter file is, as far as its header, the model or its widths tell."""
    if file.header is not None and file.header.encoder:
        return Place.parse(file.header.encoder)
    base, _ = model.base.fetch_folder()
    if (Path(base) / "image_encoder").is_dir():
        return Place(str(Path(base) / "image_encoder"))
    known = published_encoder(file.variant.feature, file.feature_dim)
    if known is None or not known.alone:
        raise MismatchError(
            f"this adapter reads {file.feature_dim}-wide {file.variant.clip_feature} features and does not say of which "
            "image encoder: give it with encoder="
        )
    return known.place


def check_encoder(encoder: VisionEncoder, file: Any) -> None:
    """Raise MismatchError unless `encoder` is the one that the adapter file was trained with, as far as can be told."""
    width = encoder.feature_dim(file.variant.clip_feature)
    if width != file.feature_dim:
        raise MismatchError(
            f"this adapter reads {file.feature_dim}-wide {file.variant.clip_feature} features ({file.suits()}); "
            f"the image encoder {encoder.source} gives {width}-wide ones"
        )
    expected = expected_fingerprint(file, encoder.model.dtype)
    if expected and encoder.fingerprint() != expected:
        raise MismatchError(
            f"this adapter was trained with other weights of the image encoder ({file.header.encoder or 'unnamed'}, "
            f"fingerprint {expected}); {encoder.source} has fingerprint {encoder.fingerprint()}"
        )


def expected_fingerprint(file: Any, dtype: torch.dtype) -> str:
    """Of the weights that the adapter file was trained with; "" if it does not say, or `dtype` rounds too coarsely to tell."""
    return file.header.encoder_fingerprint if file.header is not None and dtype != torch.bfloat16 else ""
