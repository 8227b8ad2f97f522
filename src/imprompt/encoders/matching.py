"""Find and open the image encoder of an adapter, and check that they match."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from imprompt.encoders.character import CHARACTER
from imprompt.encoders.face import FaceEncoder, FaceFeatures
from imprompt.encoders.face_sources import UnknownFaces, face_encoder
from imprompt.encoders.feature_cache import CachedFeatures, Store
from imprompt.encoders.vision import VisionEncoder, open_encoder
from imprompt.errors import MismatchError, SettingError
from imprompt.families.published import published_encoder
from imprompt.models import KnownModel, Location, may_be_on_hub, refuse_url

IN_BASE = "image_encoder"  # where a base model holds its encoder
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
    """Load the image encoder of an adapter file and check that it matches.

    It is the given one, or else the one that the adapter's name (`location`), header, base model or
    feature width implies. For a FaceID adapter it reads faces: `faces` finds them; without it, the
    face encoder that the file states or its variant implies does, loaded when the first picture is
    given. `keep` is a cache of features: with it, the encoder is opened and checked when a feature
    is needed that the cache does not hold, or
    at once if the cache is empty. `prepare` is called with the network after it is opened and
    checked. Raise MismatchError, with both widths, if they differ, or if the encoder's weights are
    not those that the adapter was trained with.
    """
    if file.variant.feature == CHARACTER:
        raise MismatchError(
            f"a {file.variant.name} adapter reads SigLIP and DINOv2 together, and a pipeline loads "
            "one image encoder: make its features by imprompt.encoders.character, and give the "
            "prompt by `with adapter.using(prompt):`"
        )
    clip = (
        clip_encoder(file, location, model, given, device, dtype, keep, prepare)
        if file.variant.image_feature
        else None
    )
    if file.variant.faces:
        return FaceFeatures(
            faces or face_encoder(file.faces, device) or UnknownFaces(file.faces),
            clip,
            width=file.face_dim,
            device=device,
        )
    return clip  # pyright: ignore[reportReturnType] - without faces, it reads pictures


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
    """Load the encoder of an adapter's pictures, without faces: see `load_encoder`."""
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
    if keep.empty():  # the encoder will be needed, so its errors are raised now
        _ = kept.encoder
    return kept


def given_place(name: str) -> Location:
    """Return the location that a user names; SettingError, before any download, if it cannot be."""
    refuse_url(name)
    if not Path(name).is_dir() and not may_be_on_hub(name):
        raise SettingError(
            f"no image encoder {name!r}: give a folder with config.json and weights, or a Hub id "
            "owner/name"
        )
    return Location(name)


def place_of(file: Any, model: KnownModel) -> Location:
    """Return where an adapter file's encoder is, by its header, the base model or its width.

    A header names folders from the run that wrote the adapter, in a folder of its own. One that is
    not here, and was a base model's, is that of the base model here. Raise MismatchError if nothing
    states the encoder, or it is not here.
    """
    if file.header is not None and file.header.encoder:
        named = Location.parse(file.header.encoder)
        if named.repo.startswith(".") and file.folder is not None:
            places = [os.path.abspath(file.folder / up / named.repo) for up in ("..", ".")]
            named = replace(named, repo=next(filter(os.path.isdir, places), named.repo))
        if not named.on_hub or may_be_on_hub(named.repo):
            return named
        if (named.path or Path(named.repo).name) != IN_BASE:
            raise MismatchError(
                f"this adapter reads the image encoder {file.header.encoder}, a folder that is not "
                "here: give it with encoder="
            )
    if file.variant.own_encoder:
        raise MismatchError(
            f"this adapter reads {file.variant.own_encoder}, which no known place has as a folder: "
            "give it with encoder="
        )
    base, _ = model.base.fetch_folder()
    if (Path(base) / IN_BASE).is_dir():
        return Location(str(Path(base) / IN_BASE))
    known = published_encoder(file.variant.feature, file.feature_dim)
    if known is None or not known.alone:
        raise MismatchError(
            f"this adapter reads {file.feature_dim}-wide {file.variant.image_feature} features and "
            "does not state "
            "their image encoder: give it with encoder="
        )
    return known.place


def check_encoder(encoder: VisionEncoder, file: Any) -> None:
    """Raise MismatchError unless an adapter file fits `encoder`.

    The width must be equal, and the fingerprint if `expected_fingerprint` gives one.
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
    """Return the fingerprint of the encoder that the adapter file was trained with.

    It is "" if the file does not state it, or if `dtype` rounds too coarsely to compare.
    """
    return (
        file.header.encoder_fingerprint
        if file.header is not None and dtype != torch.bfloat16
        else ""
    )
