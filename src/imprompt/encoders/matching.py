"""The image encoder that an adapter was made with: found, opened, and checked against it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from imprompt.encoders.clip import VisionEncoder, open_encoder
from imprompt.encoders.face import FaceEncoder, FaceFeatures, InsightFace
from imprompt.encoders.feature_cache import CachedFeatures, Store
from imprompt.errors import MismatchError, SettingError
from imprompt.families.published import published_encoder
from imprompt.models import KnownModel, Location, may_be_on_hub

Encoder = VisionEncoder | CachedFeatures | FaceFeatures


def load_encoder(
    file: Any,
    location: Location | None,
    model: KnownModel,
    given: str | Path | None,
    device: str,
    dtype: torch.dtype,
    keep: Store | None = None,
    prepare: Callable[[Any], None] | None = None,
    faces: FaceEncoder | None = None,
) -> Encoder:
    """The image encoder for an adapter file, checked against it: the given one, or the one its
    name, header, model or width tells.

    For a FaceID adapter it reads faces: `faces` finds them, else insightface, loaded when the first
    picture is given. `keep` holds features encoded before: then the encoder is opened, and checked,
    when one is asked for that is not there. `prepare` is called with the network once it is opened
    and checked. Raises MismatchError with both widths, or if the encoder's weights are not those
    that the adapter was trained with.
    """
    clip = (
        clip_encoder(file, location, model, given, device, dtype, keep, prepare)
        if file.variant.image_feature
        else None
    )
    if file.variant.faces:
        return FaceFeatures(
            faces or InsightFace(file.variant.faces, device),
            clip,
            width=file.face_dim,
            device=device,
        )
    return clip  # pyright: ignore[reportReturnType] - what reads no face reads CLIP


def clip_encoder(
    file: Any,
    location: Location | None,
    model: KnownModel,
    given: str | Path | None,
    device: str,
    dtype: torch.dtype,
    keep: Store | None,
    prepare: Callable[[Any], None] | None,
) -> VisionEncoder | CachedFeatures:
    """As `load_encoder`, of the CLIP part."""
    place = given_place(str(given)) if given is not None else location or place_of(file, model)

    def checked() -> VisionEncoder:
        encoder = open_encoder(place, device, dtype)
        check_encoder(encoder, file)
        if prepare is not None:
            prepare(encoder.model)
        return encoder

    if keep is None:
        return checked()
    kept = CachedFeatures(
        checked,
        place,
        device,
        dtype,
        keep,
        width=file.feature_dim,
        fingerprint=expected_fingerprint(file, dtype),
    )
    if keep.empty():  # then it is needed for certain, and what is wrong with it is said at once
        _ = kept.encoder
    return kept


def given_place(name: str) -> Location:
    """The place that a user names; SettingError, before the Hub is asked, if it can be none."""
    if not Path(name).is_dir() and not may_be_on_hub(name):
        raise SettingError(
            f"no image encoder {name!r}: give a folder with config.json and weights, or a Hub id "
            "owner/name"
        )
    return Location(name)


def place_of(file: Any, model: KnownModel) -> Location:
    """Where the encoder of an adapter file is, as far as its header, the model or its widths
    tell.
    """
    if file.header is not None and file.header.encoder:
        return Location.parse(file.header.encoder)
    base, _ = model.base.fetch_folder()
    if (Path(base) / "image_encoder").is_dir():
        return Location(str(Path(base) / "image_encoder"))
    known = published_encoder(file.variant.feature, file.feature_dim)
    if known is None or not known.alone:
        raise MismatchError(
            f"this adapter reads {file.feature_dim}-wide {file.variant.image_feature} features and "
            "does not say of which "
            "image encoder: give it with encoder="
        )
    return known.place


def check_encoder(encoder: VisionEncoder, file: Any) -> None:
    """Raise MismatchError unless `encoder` is the one that the adapter file was trained with, as
    far as can be told.
    """
    width = encoder.feature_dim(file.variant.image_feature)
    if width != file.feature_dim:
        raise MismatchError(
            f"this adapter reads {file.feature_dim}-wide {file.variant.image_feature} features "
            f"({file.suits()}); "
            f"the image encoder {encoder.source} gives {width}-wide ones"
        )
    expected = expected_fingerprint(file, encoder.model.dtype)
    if expected and encoder.fingerprint() != expected:
        raise MismatchError(
            "this adapter was trained with other weights of the image encoder "
            f"({file.header.encoder or 'unnamed'}, "
            f"fingerprint {expected}); {encoder.source} has fingerprint {encoder.fingerprint()}"
        )


def expected_fingerprint(file: Any, dtype: torch.dtype) -> str:
    """Of the weights that the adapter file was trained with.

    "" if it does not say, or `dtype` rounds too coarsely to tell.
    """
    return (
        file.header.encoder_fingerprint
        if file.header is not None and dtype != torch.bfloat16
        else ""
    )
