"""Image features kept, so that a picture is encoded once: in memory for servers, in a folder for
later runs.

What is kept is the encoder's own output, bit for bit, for a picture's pixels and everything else
that the output depends on. With a folder that holds all that is asked for, the image encoder is
never opened. Shape letters as in `imprompt.adapter`.
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
from imprompt.encoders.clip import VisionEncoder, describe_encoder
from imprompt.errors import CheckpointError, SettingError, first_line
from imprompt.files import check_folder
from imprompt.models import Location
from imprompt.variants import Feature, Variant

KEY = "imprompt"  # of the file's metadata
FORMAT = 1  # another where features would come out otherwise for the same facts

Facts = Mapping[str, str]  # all that a feature depends on


class Kept(NamedTuple):
    """The feature (1, …) of one picture, and the fingerprint of the encoder that gave it."""

    feature: Tensor
    fingerprint: str


class Store(Protocol):
    """Where features are kept."""

    def get(self, facts: Facts) -> Kept | None: ...
    def put(self, facts: Facts, kept: Kept) -> None: ...
    def empty(self) -> bool: ...


class FeatureMemory:
    """The features last asked for, on the device that made them, of `max_bytes` at most.

    Threads may share it.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # the one asked for last is the last
        self._lock = Lock()

    def empty(self) -> bool:
        return not self._kept

    def get(self, facts: Facts) -> Kept | None:
        name = name_of(facts)
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
            return self._kept.get(name)

    def put(self, facts: Facts, kept: Kept) -> None:
        name = name_of(facts)
        with self._lock:
            if name in self._kept:
                self.bytes -= self._kept.pop(name).feature.nbytes
            with torch.inference_mode(False):
                # its own memory, of use for training too
                kept = kept._replace(feature=kept.feature.clone())
            self._kept[name] = kept
            self.bytes += kept.feature.nbytes
            while self.bytes > self.max_bytes:
                self.bytes -= self._kept.popitem(last=False)[1].feature.nbytes


class FeatureFolder:
    """A folder of safetensors files, one a picture.

    Files may be deleted, and processes may share it; a damaged file is none.
    """

    def __init__(self, folder: str | Path) -> None:
        """SettingError if `folder` cannot be written to."""
        self.folder = Path(folder)
        check_folder(self.folder)

    def empty(self) -> bool:
        return next(self.folder.glob("*.safetensors"), None) is None

    def get(self, facts: Facts) -> Kept | None:
        try:
            with safe_open(self._path(facts), "pt") as file:
                feature, header = file.get_tensor("feature"), json.loads(file.metadata()[KEY])
            whole = header == {
                **facts,
                "fingerprint": header["fingerprint"],
                "sha256": tensor_hash(feature),
            }
            return Kept(feature, header["fingerprint"]) if whole else None
        except Exception:  # absent, or damaged in any way
            return None

    def put(self, facts: Facts, kept: Kept) -> None:
        feature = kept.feature.cpu().contiguous()
        header = {**facts, "fingerprint": kept.fingerprint, "sha256": tensor_hash(feature)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path(facts), {"feature": feature}, {KEY: json.dumps(header)})
        except (OSError, CheckpointError) as error:
            raise SettingError(
                f"features cannot be kept in {self.folder} ({first_line(error)}); give another "
                "folder"
            ) from error

    def _path(self, facts: Facts) -> Path:
        return self.folder / f"{name_of(facts)}.safetensors"


class CachedFeatures:
    """An image encoder that encodes what it has not encoded before, and is opened when it must.

    Used as `VisionEncoder` is.

    Each picture is encoded by itself, so that its feature does not depend on the pictures beside
    it.
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
        """`opened` opens the encoder of `place`, and checks it.

        width, fingerprint  what the adapter needs, if it says so: other features are encoded anew,
                            which meets that check
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
        return self._opened()

    @property
    def model(self) -> Any:
        return self.encoder.model

    @cached_property
    def processor(self) -> Any:
        """Without opening the encoder: pictures are made ready with it that may have been encoded
        before.
        """
        if "encoder" in self.__dict__:
            return self.encoder.processor
        return describe_encoder(self._place).processor

    def feature_dim(self, feature: Feature) -> int:
        return self.encoder.feature_dim(feature)

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return self.encoder.fingerprint()

    def features(self, images: Sequence[Image], feature: Feature) -> Tensor:
        """RGB pictures -> (B, E) or (B, patches, E)"""
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
        """What stands for "no image" (1, …): see `Variant.null`."""
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
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def pixel_hash(image: Image) -> str:
    """Of an RGB picture's size and pixels, so that the same picture in another file is known."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()


def files_of(place: Location) -> str:
    """Which files an image encoder has now: a folder's names, sizes and times, or the revision in
    the Hub's cache.

    CheckpointError if the Hub has no such encoder.
    """
    source, subfolder = place.fetch_folder()
    folder = Path(source, subfolder or "")
    if not folder.is_dir():
        return str(place.inside("config.json").fetch_file().parent)
    files = sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ctime_ns)
        for file in folder.iterdir()
        if file.is_file()
    )
    return f"{folder.resolve()} {hashlib.sha256(repr(files).encode()).hexdigest()[:16]}"
