"""Training pictures in files, listed in a folder's metadata.jsonl or the paper's JSON list."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

from imprompt.errors import SettingError
from imprompt.images import open_mask
from imprompt.training.recipe import Data
from imprompt.training.samples import (
    BadSample,
    Names,
    PictureOpener,
    Sample,
    Size,
    Source,
    caption,
    first_of,
    given_size,
)
from imprompt.untrusted import parse_json, read_json, read_lines


@dataclass(frozen=True, slots=True)
class ListingRow:
    """One picture of a listing; its paths are joined to the folder."""

    picture: str
    references: tuple[str, ...]
    text: str | None
    size: Size | None
    mask: str | None


class Listing:
    """Pictures in files that a listing names; it holds one row for each."""

    bad_shards: Sequence[BadSample] = ()

    def __init__(self, rows: Sequence[ListingRow], captions_required: bool) -> None:
        self.rows, self.captions_required = rows, captions_required
        self.shards: Sequence[int] = (len(rows),)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Return the path of the target picture."""
        return self.rows[index].picture

    def read(self, index: int) -> Sample:
        """Read a row; raise BadSample without the picture or a required caption."""
        row, name = self.rows[index], self.name(index)
        text = caption(name, row.text, self.captions_required)
        target = self._target(index)
        if not os.path.exists(row.picture):
            target()  # raises BadSample with the reason
        references = tuple(
            PictureOpener(name, f"the reference {path}", Path(path)) for path in row.references
        )
        mask = (
            None
            if row.mask is None
            else PictureOpener(name, f"the mask {row.mask}", Path(row.mask), open_mask)
        )
        return Sample(name, target, references or (target,), text, mask)

    def size(self, index: int) -> Size:
        """Return (width, height) from the listing, else from the picture's header."""
        return self.rows[index].size or self._target(index).size()

    def _target(self, index: int) -> PictureOpener:
        return PictureOpener(self.name(index), "the file", Path(self.name(index)))


def parse_row(item: Any, names: Names, root: str) -> ListingRow:
    """Parse one entry of a listing; raise ValueError that says what is wrong with its form."""
    if not isinstance(item, dict):
        raise ValueError(f"found {type(item).__name__} instead of an object")
    parts = (names.image, names.text, names.reference, names.mask)
    picture, text, references, mask = (first_of(item, part) for part in parts)
    references = [references] if isinstance(references, str) else references or []
    if not (isinstance(picture, str) and Path(picture).name):
        raise ValueError(
            f"no text under {' or '.join(names.image)}, which names the picture; its keys are "
            f"{', '.join(map(repr, item)) or 'none'}: data.columns.image gives another"
        )
    if isinstance(text, float) and math.isnan(text):  # pandas' absent value
        text = None
    if not isinstance(text, str | None):
        raise ValueError(f"{' or '.join(names.text)} is not a string")
    if not (
        isinstance(references, list) and all(isinstance(path, str) and path for path in references)
    ):
        raise ValueError(
            f"{' or '.join(names.reference)} is neither a file name nor a list of them"
        )
    if mask is not None and not (isinstance(mask, str) and mask):
        raise ValueError(f"{' or '.join(names.mask)} is not a file name")
    target, *others = (spelt_as_on_disk(root, path) for path in (picture, *references))
    return ListingRow(
        target, tuple(others), text, given_size(item), mask and spelt_as_on_disk(root, mask)
    )


def spelt_as_on_disk(root: str, name: str) -> str:
    r"""Return the path of a file in `root`, in the spelling in which it exists.

    Windows writes a\b for a/b, and macOS decomposes letters with accents (é as e and an accent).
    A path that exists in no spelling is returned as given.
    """
    given = os.path.join(root, name)
    if (name.isascii() and "\\" not in name) or os.path.exists(given):
        return given
    slashed = given.replace("\\", "/")
    spellings = [normalize(form, path) for path in (given, slashed) for form in ("NFC", "NFD")]
    return next(filter(os.path.exists, [slashed, *spellings]), given)


def read_listing(
    path: Path,
    entries: Callable[[Path], Iterator[tuple[str, Any]]],
    form: str,
    names: Names,
    root: Path,
    captions: bool = False,
) -> list[ListingRow]:
    """Read all rows of a listing.

    Raise SettingError, with the place in it, if one is malformed; also if it names no pictures, or
    none of the masks or captions that the recipe needs.
    """
    rows, keys = [], dict[str, None]()
    for place, item in entries(path):
        try:
            rows.append(parse_row(item, names, str(root)))
            keys |= dict.fromkeys(item)
        except ValueError as error:
            raise SettingError(f"{path}, {place}: {error}; entries look like {form}") from error
    if not rows:
        raise SettingError(f"{path} lists no pictures; entries look like {form}")
    if names.mask and not any(row.mask for row in rows):
        raise SettingError(
            f"{path} names no masks: data.columns.mask = {','.join(names.mask)!r} is in none of "
            "its entries"
        )
    if captions and not any(row.text for row in rows) and not keys.keys() & names.text:
        raise SettingError(
            f"{path} has no captions: {' or '.join(names.text)} is in none of its entries, only "
            f"{', '.join(keys)} (data.columns.text gives another name, data.captions = "
            '"optional" trains without)'
        )
    return rows


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of every line that is not blank."""
    for number, line in read_lines(path):
        yield f"line {number}", parse_json(line, path, number, lenient=True)


def json_list(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of every element; raise SettingError if it is not a list."""
    items = read_json(path, lenient=True)
    if not isinstance(items, list):
        raise SettingError(f"{path} holds a {type(items).__name__}, not a list of pictures")
    yield from ((f"entry {number}", item) for number, item in enumerate(items, 1))


FOLDER_FORM = '{"file_name": "0001.png", "text": "a cat"}'
LIST_FORM = '{"image_file": "0001.png", "text": "a cat"}'


def open_folder(data: Data) -> Source:
    """Open a folder in the Hub's imagefolder layout: pictures and a metadata.jsonl."""
    root = Path(data.source)
    listing = root / "metadata.jsonl"
    if not listing.is_file():
        others = f"for tar shards give {root}/*.tar, for another metadata file hub:{root}"
        raise SettingError(
            f"{root} holds no metadata.jsonl with a line like {FOLDER_FORM} per picture; {others}"
        )
    # the last two names are imagefolder's
    references = "reference,references,reference_file_name,reference_file_names"
    names = Names.of(data.columns, "file_name", "text", references)
    needed = data.captions == "required"
    return Listing(read_listing(listing, json_lines, FOLDER_FORM, names, root, needed), needed)


def open_list(data: Data) -> Source:
    """Open the paper's list of pictures."""
    listing = Path(data.source)
    if not listing.is_file():
        raise SettingError(f"data.source = {data.source!r}: there is no such file")
    names = Names.of(data.columns, "image_file", "text", "reference_file,reference_files")
    needed = data.captions == "required"
    rows = read_listing(listing, json_list, LIST_FORM, names, data.root or listing.parent, needed)
    return Listing(rows, needed)
