"""A training sample, and the interface of every source: samples by number."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image

from imprompt.errors import ImpromptError
from imprompt.images import UnusableImage, image_size, open_image
from imprompt.training.recipe import Columns

Opener = Callable[[], Image.Image]  # returns upright RGB, 8-bit grey for masks; raises BadSample
Size = tuple[int, int]  # width, height in pixels
SIDES = ["width", "height"]  # keys and columns that may hold the size
T = TypeVar("T")


class BadSample(ImpromptError):
    """A sample that cannot be used.

    `name` is how a person finds it, `why` one line, `kind` the type of problem. A shard that cannot
    be opened counts as many `samples` as the others hold on average.
    """

    def __init__(self, name: str, why: str, kind: str = "other", samples: int = 1) -> None:
        # the original arguments, because reading processes send the error by pickle
        super().__init__(name, why, kind, samples)
        self.name, self.why, self.kind, self.samples = name, why, kind, samples

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


@dataclass(frozen=True)
class Sample:
    """A target picture, the pictures that may prompt it, a caption and perhaps a mask.

    One of the references is drawn each time.
    """

    name: str
    picture: Opener
    # never empty: the target picture itself if the set names no reference
    references: tuple[Opener, ...]
    text: str
    # white where an error in the target counts more; None: it counts evenly
    mask: Opener | None = None

    def checked_mask(self, picture: Image.Image) -> Image.Image | None:
        """Open the mask of the given target picture, if there is one.

        Raise BadSample if its aspect ratio is not the picture's.
        """
        if self.mask is None:
            return None
        mask = self.mask()
        (wide, high), (width, height) = mask.size, picture.size
        if abs(wide * height - high * width) > max(width, height):
            # more than what rounding of a smaller mask explains
            why = (
                f"the mask has {wide}×{high} pixels, the picture {width}×{height}: another aspect "
                "ratio"
            )
            raise BadSample(self.name, why, "another shape")
        return mask


class Source(Protocol):
    """A training set.

    Copies of it are sent to reading processes (pickle), without open files.
    """

    # number of samples in each shard, in order; a set without shards is one shard
    shards: Sequence[int]
    # unreadable or cut-off shards, with the estimated number of samples missing from `shards`
    bad_shards: Sequence[BadSample]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return how a person finds the sample: a file, or a shard and a key."""
        ...

    def read(self, index: int) -> Sample:
        """Read a sample.

        Raise BadSample if it is absent, or has no caption where captions are required.
        """
        ...

    def size(self, index: int) -> Size:
        """Return (width, height) of the upright target picture, from its header alone.

        Raise BadSample if it cannot be read.
        """
        ...


@dataclass(frozen=True)
class PictureOpener:
    """Opener of one picture of a sample.

    `part` names the picture: "the file", "the reference …", "the mask …". `file` holds the bytes
    that a function reads; None if that is not on this disk.
    """

    sample: str
    part: str
    place: Path | bytes | Callable[[], bytes]  # the function raises BadSample
    opened: Callable[..., Image.Image] = open_image  # how to open it
    file: Path | None = None

    def __call__(self) -> Image.Image:
        """Open the picture; raise BadSample if it cannot be used."""
        return self._do(self.opened)

    def size(self) -> Size:
        """Return (width, height) from the header alone; raise BadSample."""
        return self._do(image_size)

    def stamp(self) -> str:
        """Return size and time of the file, or the digest of bytes in memory; OSError."""
        file = self.place if isinstance(self.place, Path) else self.file
        if file is None:
            return self.digest()
        status = file.stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    def digest(self) -> str:
        """Return a hash of the bytes; "" if they are not on this disk. Raise BadSample, OSError."""
        data = b"" if callable(self.place) and self.file is None else self._bytes()
        return hashlib.blake2b(data, digest_size=8).hexdigest() if data else ""

    def sha256(self) -> str:
        """Return the SHA-256 of the bytes; raise BadSample or OSError if they cannot be read."""
        return hashlib.sha256(self._bytes()).hexdigest()

    def _bytes(self) -> bytes:
        if isinstance(self.place, Path):
            return self.place.read_bytes()
        return self.place() if callable(self.place) else self.place

    def _do(self, work: Callable[..., T]) -> T:
        try:
            return work(self.place() if callable(self.place) else self.place, name=self.part)
        except UnusableImage as error:
            raise BadSample(self.sample, str(error), error.kind) from error


def caption(name: str, text: str | None, required: bool) -> str:
    """Return the caption to train with.

    Raise BadSample if it is required and absent, or not Unicode text.
    """
    text = (text or "").strip()
    if required and not text:
        raise BadSample(
            name, 'has no caption; data.captions = "optional" trains without', "no caption"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # half an emoji, such as JSON's \ud83d, which no tokenizer takes
        raise BadSample(name, "its caption is not Unicode text", "damaged") from error
    return text


@dataclass(frozen=True)
class Names:
    """Possible names of a sample's parts, in the order in which they are tried."""

    image: tuple[str, ...]
    text: tuple[str, ...]
    reference: tuple[str, ...]
    mask: tuple[str, ...]  # empty: masks are not used

    @classmethod
    def of(cls, columns: Columns, image: str, text: str, reference: str) -> "Names":
        """Return the recipe's names, or the format's own; several are separated by commas."""
        pairs = (
            (columns.image, image),
            (columns.text, text),
            (columns.reference, reference),
            (columns.mask, ""),
        )
        return cls(
            *(
                tuple(name.strip() for name in (given or own).split(",") if name.strip())
                for given, own in pairs
            )
        )


def first_of(item: dict[str, Any], names: Sequence[str]) -> Any:
    """Return the first value that is present under one of the names, or None."""
    return next((item[name] for name in names if item.get(name) is not None), None)


def given_size(item: dict[str, Any]) -> Size | None:
    """Return a picture's size if the set states it, so that its file need not be opened."""
    match [item.get(side) for side in SIDES]:
        case [int(width), int(height)] if width > 0 and height > 0:
            return width, height
    return None
