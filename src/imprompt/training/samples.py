"""A training sample, and what every source of samples gives: samples by number, so that one order
serves them all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image

from imprompt.errors import ImpromptError
from imprompt.images import UnusableImage, image_size, open_image
from imprompt.training.recipe import Columns

Opener = Callable[[], Image.Image]  # gives upright RGB, of a mask 8-bit grey; raises BadSample
Size = tuple[int, int]  # width, height in pixels
SIDES = ["width", "height"]  # keys and columns that may tell it
T = TypeVar("T")


class BadSample(ImpromptError):
    """A sample that cannot be used: `name` is how a person finds it, `why` one line, `kind` the
    sort of trouble.

    A shard that cannot be opened stands for as many `samples` as the others hold on average.
    """

    def __init__(self, name: str, why: str, kind: str = "other", samples: int = 1) -> None:
        # as they are, so that it can be pickled: it crosses from the reading processes
        super().__init__(name, why, kind, samples)
        self.name, self.why, self.kind, self.samples = name, why, kind, samples

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


@dataclass(frozen=True)
class Sample:
    """A target picture, the pictures that may prompt it (one of them is drawn each time), a caption
    and perhaps a mask.
    """

    name: str
    picture: Opener
    # never empty: the target picture itself where the set names none
    references: tuple[Opener, ...]
    text: str
    mask: Opener | None = (
        None  # white where an error in the target counts more; None: it counts evenly
    )

    def checked_mask(self, picture: Image.Image) -> Image.Image | None:
        """Open the mask of the target picture, which is given.

        BadSample if it is of another shape than that.
        """
        if self.mask is None:
            return None
        mask = self.mask()
        (wide, high), (width, height) = mask.size, picture.size
        if abs(wide * height - high * width) > max(width, height):
            # more than rounding when it was made smaller
            why = (
                f"the mask has {wide}×{high} pixels, the picture {width}×{height}: another aspect "
                "ratio"
            )
            raise BadSample(self.name, why, "another shape")
        return mask


class Source(Protocol):
    """A training set.

    Copies of it travel to reading processes (pickle), so open files are not kept across.
    """

    # how many samples each shard holds, in order; a set without shards is one
    shards: Sequence[int]
    # what shards that are no tar, or cut off, probably held beyond `shards`
    bad_shards: Sequence[BadSample]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """How a person finds the sample: a file, or a shard and a key."""
        ...

    def read(self, index: int) -> Sample:
        """BadSample if it is not there, or has no caption where captions are required."""
        ...

    def size(self, index: int) -> Size:
        """(width, height) of the upright target picture, from its header alone; BadSample."""
        ...


@dataclass(frozen=True)
class PictureOpener:
    """The opener of one picture of a sample. `part` says which: "the file", "the reference …", "the
    mask …".
    """

    sample: str
    part: str
    place: Path | bytes | Callable[[], bytes]  # the latter raises BadSample
    opened: Callable[..., Image.Image] = open_image  # how

    def __call__(self) -> Image.Image:
        return self._do(self.opened)

    def size(self) -> Size:
        """From the header alone."""
        return self._do(image_size)

    def _do(self, work: Callable[..., T]) -> T:
        try:
            return work(self.place() if callable(self.place) else self.place, name=self.part)
        except UnusableImage as error:
            raise BadSample(self.sample, str(error), error.kind) from error


def caption(name: str, text: str | None, required: bool) -> str:
    """The caption to train with; BadSample if there has to be one and is not."""
    text = (text or "").strip()
    if required and not text:
        raise BadSample(
            name, 'has no caption; data.captions = "optional" trains without', "no caption"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half an emoji, as JSON's \ud83d: no tokenizer takes it
        raise BadSample(name, "its caption is no Unicode text", "damaged") from error
    return text


@dataclass(frozen=True)
class Names:
    """What the parts of a sample may be called, in the order in which they are looked for."""

    image: tuple[str, ...]
    text: tuple[str, ...]
    reference: tuple[str, ...]
    mask: tuple[str, ...]  # empty: masks are not asked for

    @classmethod
    def of(cls, columns: Columns, image: str, text: str, reference: str) -> "Names":
        """The recipe's names, or the format's own; several with commas."""
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
    """The first value that is there under one of the names, or None."""
    return next((item[name] for name in names if item.get(name) is not None), None)


def given_size(item: dict[str, Any]) -> Size | None:
    """A picture's size where the set says it, so that the picture need not be opened for that."""
    match [item.get(side) for side in SIDES]:
        case [int(width), int(height)] if width > 0 and height > 0:
            return width, height
    return None
