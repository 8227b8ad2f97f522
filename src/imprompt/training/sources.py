"""Where training pictures come from: every source gives samples by number, so that one order serves them all.

Pictures by a listing (a folder's metadata.jsonl, the paper's JSON list) and Hub datasets are here, tar shards in
`imprompt.training.shards`; SOURCES is the table of all.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image

from imprompt.errors import ImpromptError, SettingError, first_line
from imprompt.images import UnusableImage, image_size, open_image, open_mask
from imprompt.training.recipe import Columns, Data

Opener = Callable[[], Image.Image]  # gives upright RGB, of a mask 8-bit grey; raises BadSample
Size = tuple[int, int]  # width, height in pixels
SIDES = ["width", "height"]  # keys and columns that may tell it
T = TypeVar("T")


class BadSample(ImpromptError):
    """A sample that cannot be used: `name` is how a person finds it, `why` one line, `kind` the sort of trouble.

    A shard that cannot be opened stands for as many `samples` as the others hold on average.
    """

    def __init__(self, name: str, why: str, kind: str = "other", samples: int = 1) -> None:
        super().__init__(name, why, kind, samples)  # as they are, so that it can be pickled: it crosses from the reading processes
        self.name, self.why, self.kind, self.samples = name, why, kind, samples

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


@dataclass(frozen=True)
class Sample:
    """A target picture, the pictures that may prompt it (one of them is drawn each time), a caption and perhaps a mask."""

    name: str
    picture: Opener
    references: tuple[Opener, ...]  # never empty: the target picture itself where the set names none
    text: str
    mask: Opener | None = None  # white where an error in the target counts more; None: it counts evenly

    def checked_mask(self, picture: Image.Image) -> Image.Image | None:
        """Open the mask of the target picture, which is given; BadSample if it is of another shape than that."""
        if self.mask is None:
            return None
        mask = self.mask()
        (wide, high), (width, height) = mask.size, picture.size
        if abs(wide * height - high * width) > max(width, height):  # more than rounding when it was made smaller
            why = f"the mask has {wide}×{high} pixels, the picture {width}×{height}: another aspect ratio"
            raise BadSample(self.name, why, "another shape")
        return mask


class Source(Protocol):
    """A training set. Copies of it travel to reading processes (pickle), so open files are not kept across."""

    shards: Sequence[int]  # how many samples each shard holds, in order; a set without shards is one
    bad_shards: Sequence[BadSample]  # what shards that are no tar, or cut off, probably held beyond `shards`

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
class Picture:
    """The opener of one picture of a sample. `part` says which: "the file", "the reference …", "the mask …"."""

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
        raise BadSample(name, 'has no caption; data.captions = "optional" trains without', "no caption")
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
        pairs = ((columns.image, image), (columns.text, text), (columns.reference, reference), (columns.mask, ""))
        return cls(*(tuple(name.strip() for name in (given or own).split(",") if name.strip()) for given, own in pairs))


def first_of(item: dict[str, Any], names: Sequence[str]) -> Any:
    """The first value that is there under one of the names, or None."""
    return next((item[name] for name in names if item.get(name) is not None), None)


def given_size(item: dict[str, Any]) -> Size | None:
    """A picture's size where the set says it, so that the picture need not be opened for that."""
    match [item.get(side) for side in SIDES]:
        case [int(width), int(height)] if width > 0 and height > 0:
            return width, height
    return None


# Listings


@dataclass(frozen=True, slots=True)
class Row:
    """One picture of a listing; what the user wrote, joined to the folder."""

    picture: str
    references: tuple[str, ...]
    text: str | None
    size: Size | None
    mask: str | None


class Listing:
    """Pictures in files, named by a listing; it holds one row each."""

    bad_shards: Sequence[BadSample] = ()

    def __init__(self, rows: Sequence[Row], captions_required: bool) -> None:
        self.rows, self.captions_required = rows, captions_required
        self.shards: Sequence[int] = (len(rows),)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.rows[index].picture

    def read(self, index: int) -> Sample:
        row, name = self.rows[index], self.name(index)
        text = caption(name, row.text, self.captions_required)
        target = self._target(index)
        if not os.path.exists(row.picture):
            target()  # says what is wrong
        references = tuple(Picture(name, f"the reference {path}", Path(path)) for path in row.references)
        mask = None if row.mask is None else Picture(name, f"the mask {row.mask}", Path(row.mask), open_mask)
        return Sample(name, target, references or (target,), text, mask)

    def size(self, index: int) -> Size:
        return self.rows[index].size or self._target(index).size()

    def _target(self, index: int) -> Picture:
        return Picture(self.name(index), "the file", Path(self.name(index)))


def parse_row(item: Any, names: Names, root: str) -> Row:
    """One entry of a listing; ValueError with words for what is wrong with its form."""
    if not isinstance(item, dict):
        raise ValueError(f"a {type(item).__name__} where an object is due")
    parts = (names.image, names.text, names.reference, names.mask)
    picture, text, references, mask = (first_of(item, part) for part in parts)
    references = [references] if isinstance(references, str) else references or []
    if not (isinstance(picture, str) and picture):
        raise ValueError(f"no text under {' or '.join(names.image)}, which names the picture")
    if not isinstance(text, str | None):
        raise ValueError(f"{' or '.join(names.text)} is no text")
    if not (isinstance(references, list) and all(isinstance(path, str) and path for path in references)):
        raise ValueError(f"{' or '.join(names.reference)} is neither a file name nor a list of them")
    if mask is not None and not (isinstance(mask, str) and mask):
        raise ValueError(f"{' or '.join(names.mask)} is no file name")
    target, *others = (os.path.join(root, path) for path in (picture, *references))
    return Row(target, tuple(others), text, given_size(item), mask and os.path.join(root, mask))


def read_listing(
    path: Path, entries: Callable[[Path], Iterator[tuple[str, Any]]], form: str, names: Names, root: Path
) -> list[Row]:
    """All rows of a listing; SettingError, with the place in it, if one is not of the form."""
    rows = []
    for place, item in entries(path):
        try:
            rows.append(parse_row(item, names, str(root)))
        except ValueError as error:
            raise SettingError(f"{path}, {place}: {error}; entries look like {form}") from error
    if not rows:
        raise SettingError(f"{path} lists no pictures; entries look like {form}")
    if names.mask and not any(row.mask for row in rows):
        raise SettingError(f"{path} names no masks: data.columns.mask = {','.join(names.mask)!r} is in none of its entries")
    return rows


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of every line that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"line {number}", parse_json(line, path, number)


def json_list(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of every element."""
    items = parse_json(read_text(path), path)
    if not isinstance(items, list):
        raise SettingError(f"{path} holds a {type(items).__name__}, not a list of pictures")
    yield from ((f"entry {number}", item) for number, item in enumerate(items, 1))


def read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SettingError(f"{path}, line {line}: no UTF-8 text") from error


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    """The value of a text that begins at `line` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SettingError(f"{path}, line {line + error.lineno - 1}: no JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise SettingError(f"{path}, line {line}: nested too deep") from error


FOLDER_FORM = '{"file_name": "0001.png", "text": "a cat"}'
LIST_FORM = '{"image_file": "0001.png", "text": "a cat"}'


def open_folder(data: Data) -> Source:
    """The Hub's imagefolder: pictures and a metadata.jsonl."""
    root = Path(data.source)
    listing = root / "metadata.jsonl"
    if not listing.is_file():
        others = f"for tar shards give {root}/*.tar, for another metadata file hub:{root}"
        raise SettingError(f"{root} holds no metadata.jsonl with a line like {FOLDER_FORM} per picture; {others}")
    references = "reference,references,reference_file_name,reference_file_names"  # the latter two are imagefolder's own
    names = Names.of(data.columns, "file_name", "text", references)
    return Listing(read_listing(listing, json_lines, FOLDER_FORM, names, root), data.captions == "required")


def open_list(data: Data) -> Source:
    """The paper's list of pictures."""
    listing = Path(data.source)
    if not listing.is_file():
        raise SettingError(f"data.source = {data.source!r}: there is no such file")
    names = Names.of(data.columns, "image_file", "text", "reference_file,reference_files")
    rows = read_listing(listing, json_list, LIST_FORM, names, data.root or listing.parent)
    return Listing(rows, data.captions == "required")


# The Hub


TEXT_TYPES = ("string", "large_string", "null")


class HubSource:
    """A split of a Hub dataset, as the datasets library keeps it: memory-mapped files, pictures undecoded."""

    bad_shards: Sequence[BadSample] = ()

    def __init__(self, source: str, rows: Any, names: Names, captions_required: bool) -> None:
        """rows: a datasets.Dataset; SettingError if its columns are not what is needed."""
        self.source, self.captions_required = source, captions_required
        columns = rows.column_names
        self.image, self.text, self.reference, self.mask = (
            next((name for name in part if name in columns), "") for part in (names.image, names.text, names.reference, names.mask)
        )
        for part, needed in (("image", True), ("text", captions_required), ("mask", bool(names.mask))):
            if needed and not getattr(self, part):
                held = f"it has {', '.join(columns)}; data.columns.{part} says which it is"
                raise SettingError(f"data.source = {source!r} has no column {' or '.join(getattr(names, part))}: {held}")
        if self.text and getattr(rows.features[self.text], "dtype", None) not in TEXT_TYPES:
            raise SettingError(f"data.source = {source!r}: its column {self.text} holds no text")
        self.sizes = rows.select_columns(SIDES) if {*SIDES} <= {*columns} else None
        used = (self.image, self.text, self.reference, self.mask)
        self.rows = undecoded(rows.select_columns([name for name in used if name]))
        self.shards: Sequence[int] = (len(rows),)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"row {index} of {self.source}"

    def read(self, index: int) -> Sample:
        row, name = self.rows[index], self.name(index)
        text = caption(name, row[self.text] if self.text else None, self.captions_required)
        target = self._picture(index, row)
        references = (row[self.reference] if self.reference else None) or []
        references = references if isinstance(references, list) else [references]
        others = [Picture(name, f"reference {n}", self._place(index, value)) for n, value in enumerate(references)]
        held = row[self.mask] if self.mask else None
        mask = None if held is None else Picture(name, f"the {self.mask}", self._place(index, held), open_mask)
        return Sample(name, target, tuple(others) or (target,), text, mask)

    def size(self, index: int) -> Size:
        given = given_size(self.sizes[index]) if self.sizes is not None else None
        return given or self._picture(index, self.rows[index]).size()

    def _picture(self, index: int, row: dict[str, Any]) -> Picture:
        return Picture(self.name(index), f"the {self.image}", self._place(index, row[self.image]))

    def _place(self, index: int, value: Any) -> Path | bytes:
        """A picture's value: bytes, a path, or imagefolder's {"bytes": …, "path": …}."""
        if isinstance(value, dict):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if not isinstance(value, bytes | str):
            raise BadSample(self.name(index), "holds no picture", "absent")
        return value if isinstance(value, bytes) else Path(value)


def undecoded(rows: Any) -> Any:
    """The dataset with its pictures as the bytes or files that they are: they are decoded where all others are."""
    import datasets

    raw = datasets.Image(decode=False)
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, raw)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, datasets.List(raw))
    return rows


def open_hub(data: Data) -> Source:
    """hub:owner/name, hub:owner/name:split, or a local folder in the owner's place."""
    try:
        import datasets
    except ImportError as error:
        raise SettingError(f"data.source = {data.source!r} needs the datasets library: pip install 'imprompt[train]'") from error
    where = data.source.removeprefix("hub:")
    place, _, split = (where, "", "") if os.path.isdir(where) else where.partition(":")
    try:
        rows = datasets.load_dataset(place, split=split or "train")
    except Exception as error:  # the library's, the network's and the builders' errors have nothing in common
        raise SettingError(f"data.source = {data.source!r} cannot be opened: {first_line(error)}") from error
    names = Names.of(data.columns, "image", "text", "reference,references")
    return HubSource(data.source, rows, names, data.captions == "required")


# All of them


def open_shards(data: Data) -> Source:
    from imprompt.training.shards import ShardSource  # it is made of what stands above

    return ShardSource(data)


@dataclass(frozen=True)
class Form:
    """A kind of source: how it is written, how that is told from others, what opens it."""

    form: str
    fits: Callable[[str], bool]
    open: Callable[[Data], Source]


SOURCES = (
    Form("hub:owner/name", lambda source: source.startswith("hub:"), open_hub),
    Form("a folder with metadata.jsonl", os.path.isdir, open_folder),
    Form("list.json", lambda source: source.endswith(".json"), open_list),
    Form("shards/{0000..0099}.tar", lambda source: source.startswith("pipe:") or ".tar" in source, open_shards),
)


def open_source(data: Data) -> Source:
    """The recipe's training set; SettingError with one line if it is of no known form, or malformed."""
    for row in SOURCES:
        if row.fits(data.source):
            return row.open(data)
    forms = ", ".join(row.form for row in SOURCES)
    raise SettingError(f"data.source = {data.source!r} is no folder that exists and of no known form; known: {forms}")
