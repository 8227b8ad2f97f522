"""Cache of image features: in memory for servers, or in a folder for later runs.

It holds the encoder's own output, bit for bit, for a picture's pixels and everything else that the
output depends on. If a folder holds all features that are needed, the image encoder is never
opened. Shape letters as in `imprompt.adapter`.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Protocol

import torch
from PIL.Image import Image
from safetensors import safe_open
from torch import Tensor

from imprompt.checkpoints.tensors import write_tensors
from imprompt.encoders.vision import VisionEncoder, describe_encoder
from imprompt.errors import CheckpointError, SettingError, first_line
from imprompt.files import check_folder
from imprompt.models import Location
from imprompt.untrusted import parse_json
from imprompt.variants import Feature, Variant

KEY = "imprompt"  # of the file's metadata
FORMAT = 1  # to be raised when the same facts would give other features

Facts = Mapping[str, str]  # everything that a feature depends on


class Kept(NamedTuple):
    """Cached feature (1, …) of one picture, and the fingerprint of the encoder that made it."""

    feature: Tensor
    fingerprint: str


class Store(Protocol):
    """Place that stores features by their facts."""

    def get(self, facts: Facts) -> Kept | None:
        """Return the feature of these facts; None if it is not stored."""
        ...

    def put(self, facts: Facts, kept: Kept) -> None:
        """Store a feature; it replaces an earlier one of the same facts."""
        ...

    def empty(self) -> bool:
        """Return whether no feature is stored."""
        ...


class FeatureMemory:
    """In-memory store of the most recently used features, of `max_bytes` at most.

    Each feature stays on the device that made it. Threads may share the store.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # the most recently used is the last
        self._lock = Lock()

    def empty(self) -> bool:
        """Return whether no feature is stored."""
        return not self._kept

    def get(self, facts: Facts) -> Kept | None:
        """Return the feature of these facts, now the most recently used; None if absent."""
        name = name_of(facts)
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
            return self._kept.get(name)

    def put(self, facts: Facts, kept: Kept) -> None:
        """Store a copy of a feature, and drop the least recently used ones above `max_bytes`."""
        name = name_of(facts)
        with self._lock:
            if name in self._kept:
                self.bytes -= self._kept.pop(name).feature.nbytes
            with torch.inference_mode(False):
                # a copy outside inference mode, which training can use too
                kept = kept._replace(feature=kept.feature.clone())
            self._kept[name] = kept
            self.bytes += kept.feature.nbytes
            while self.bytes > self.max_bytes:
                self.bytes -= self._kept.popitem(last=False)[1].feature.nbytes


class FeatureFolder:
    """Folder store: safetensors files, one per picture and feature.

    Files may be deleted, and processes may share the folder; a damaged file counts as absent.
    """

    def __init__(self, folder: str | Path) -> None:
        """Use `folder`; raise SettingError if it cannot be written to."""
        self.folder = Path(folder)
        check_folder(self.folder)

    def empty(self) -> bool:
        """Return whether the folder has no file of features."""
        return next(self.folder.glob("*.safetensors"), None) is None

    def get(self, facts: Facts) -> Kept | None:
        """Read the feature of these facts, on the CPU; None if it is absent or damaged."""
        try:
            with safe_open(self._path(facts), "pt") as file:
                feature, header = file.get_tensor("feature"), parse_json(file.metadata()[KEY])
            whole = header == {
                **facts,
                "fingerprint": header["fingerprint"],
                "sha256": tensor_hash(feature),
            }
            return Kept(feature, header["fingerprint"]) if whole else None
        except Exception:  # absent, or damaged in any way
            return None

    def put(self, facts: Facts, kept: Kept) -> None:
        """Write a feature to its file; raise SettingError if this fails."""
        feature = kept.feature.cpu().contiguous()
        header = {**facts, "fingerprint": kept.fingerprint, "sha256": tensor_hash(feature)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path(facts), {"feature": feature}, {KEY: json.dumps(header)})
        except (OSError, CheckpointError) as error:
            raise SettingError(
                f"features cannot be cached in {self.folder} ({first_line(error)}); give another "
                "folder"
            ) from error

    def _path(self, facts: Facts) -> Path:
        return self.folder / f"{name_of(facts)}.safetensors"


class CachedFeatures:
    """Image encoder with a feature cache, opened only when a feature is not in the cache.

    It has the interface of `VisionEncoder`. Each picture is encoded alone, so that its feature does
    not depend on the other pictures of a call.
    """

    def __init__(
        self,
        opened: Callable[[], VisionEncoder],
        place: Location,
        device: str | torch.device,
        dtype: torch.dtype,
        store: Store,
        *,
        width: int | None = None,
        fingerprint: str = "",
    ) -> None:
        """Describe the encoder and the features that the adapter needs.

        opened              opens the encoder of `place` and checks it
        width, fingerprint  what the adapter needs, if it is known: cached features that differ are
                            encoded again, and opening the encoder checks it
        """
        self.source, self.device, self.store = str(place), torch.device(device), store
        self.width, self.expected = width, fingerprint
        self._opened, self._place = opened, place
        self._facts = {
            "format": str(FORMAT),
            "encoder": self.source,
            "files": files_of(place),
            "dtype": str(dtype),
            "device": self.device.type,
        }

    @cached_property
    def encoder(self) -> VisionEncoder:
        """Image encoder, opened and checked at its first use."""
        return self._opened()

    @property
    def model(self) -> Any:
        """Network of the encoder, which this opens."""
        return self.encoder.model

    @cached_property
    def processor(self) -> Any:
        """Image processor, read without opening the encoder.

        It also prepares pictures whose features may be in the cache.
        """
        if "encoder" in self.__dict__:
            return self.encoder.processor
        return describe_encoder(self._place).processor

    def feature_dim(self, feature: Feature) -> int:
        """Return the width E of a feature; MismatchError if the encoder does not give it."""
        return self.encoder.feature_dim(feature)

    def fingerprint(self) -> str:
        """Return a hash of the encoder's weights, which is computed once."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return self.encoder.fingerprint()

    def features(self, images: Sequence[Image], feature: Feature) -> Tensor:
        """Return features of RGB pictures, (B, E) or (B, patches, E); encode those not cached."""
        return torch.cat(
            [
                self._kept(
                    pixel_hash(image),
                    feature,
                    lambda it=image: self.encoder.features([it], feature),
                )
                for image in images
            ]
        )

    def null_features(self, variant: Variant) -> Tensor:
        """Return the features (1, …) that stand for "no image": see `Variant.null`."""
        return self._kept(
            variant.null, variant.feature, lambda: self.encoder.null_features(variant)
        )

    def _kept(self, picture: str, feature: Feature, encode: Callable[[], Tensor]) -> Tensor:
        facts = {**self._facts, "picture": picture, "feature": feature}
        kept = self.store.get(facts)
        if kept is None or not self._fits(kept):
            kept = Kept(encode(), self.fingerprint())
            self.store.put(facts, kept)
        return kept.feature.to(self.device, copy=True)

    def _fits(self, kept: Kept) -> bool:
        return self.width in (None, kept.feature.shape[-1]) and self.expected in (
            "",
            kept.fingerprint,
        )


def name_of(facts: Facts) -> str:
    """Return a name for these facts, of 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def pixel_hash(image: Image) -> str:
    """Return the SHA-256 of an RGB picture's size and pixels, whichever file they come from."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """Return the SHA-256 of the bytes of a contiguous tensor on the CPU."""
    return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()


def files_of(place: Location) -> str:
    """Return a text that changes when the files of an image encoder change.

    For a folder it is a hash of the files' names, sizes and times, for the Hub the cached
    revision. Raise CheckpointError if the Hub has no such encoder.
    """
    if place.on_hub:
        return str(place.inside("config.json").fetch_file().parent)
    source, subfolder = place.fetch_folder()
    folder = Path(source, subfolder or "")
    files = sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ctime_ns)
        for file in folder.iterdir()
        if file.is_file()
    )
    return f"{folder.resolve()} {hashlib.sha256(repr(files).encode()).hexdigest()[:16]}"
