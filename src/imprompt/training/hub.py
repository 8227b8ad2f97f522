"""Training pictures in a Hub dataset, or a local folder that the datasets library reads."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imprompt.errors import SettingError, first_line
from imprompt.images import open_mask
from imprompt.training.recipe import Data
from imprompt.training.samples import (
    SIDES,
    BadSample,
    Names,
    PictureOpener,
    Sample,
    Size,
    Source,
    caption,
    given_size,
)

TEXT_TYPES = ("string", "large_string", "null")


class HubSource:
    """A split of a Hub dataset, as the datasets library stores it.

    Its files are memory-mapped, its pictures undecoded.
    """

    bad_shards: Sequence[BadSample] = ()

    def __init__(self, source: str, rows: Any, names: Names, captions_required: bool) -> None:
        """Find the columns of `rows`, a datasets.Dataset.

        Raise SettingError if a needed column is missing or holds something else.
        """
        self.source, self.captions_required = source, captions_required
        columns = rows.column_names
        self.image, self.text, self.reference, self.mask = (
            next((name for name in part if name in columns), "")
            for part in (names.image, names.text, names.reference, names.mask)
        )
        for part, needed in (
            ("image", True),
            ("text", captions_required),
            ("mask", bool(names.mask)),
        ):
            if needed and not getattr(self, part):
                held = f"it has {', '.join(columns)}; data.columns.{part} says which column to use"
                raise SettingError(
                    f"data.source = {source!r} has no column {' or '.join(getattr(names, part))}: "
                    f"{held}"
                )
        if self.text and getattr(rows.features[self.text], "dtype", None) not in TEXT_TYPES:
            raise SettingError(f"data.source = {source!r}: its column {self.text} holds no text")
        self.sizes = rows.select_columns(SIDES) if {*SIDES} <= {*columns} else None
        used = (self.image, self.text, self.reference, self.mask)
        self.rows = undecoded(rows.select_columns([name for name in used if name]))
        self.shards: Sequence[int] = (len(rows),)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Return the row's number and the dataset's name."""
        return f"row {index} of {self.source}"

    def read(self, index: int) -> Sample:
        """Read a row; raise BadSample without a picture or a required caption."""
        row, name = self.rows[index], self.name(index)
        text = caption(name, row[self.text] if self.text else None, self.captions_required)
        target = self._picture(index, row)
        references = (row[self.reference] if self.reference else None) or []
        references = references if isinstance(references, list) else [references]
        others = [
            PictureOpener(name, f"reference {n}", self._place(index, value))
            for n, value in enumerate(references)
        ]
        held = row[self.mask] if self.mask else None
        mask = (
            None
            if held is None
            else PictureOpener(name, f"the {self.mask}", self._place(index, held), open_mask)
        )
        return Sample(name, target, tuple(others) or (target,), text, mask)

    def size(self, index: int) -> Size:
        """Return (width, height) from the set's columns, else from the picture's header."""
        given = given_size(self.sizes[index]) if self.sizes is not None else None
        return given or self._picture(index, self.rows[index]).size()

    def _picture(self, index: int, row: dict[str, Any]) -> PictureOpener:
        return PictureOpener(
            self.name(index), f"the {self.image}", self._place(index, row[self.image])
        )

    def _place(self, index: int, value: Any) -> Path | bytes:
        """Return a picture's bytes or path.

        Its value is one of them, or imagefolder's {"bytes": …, "path": …}. Raise BadSample if it
        holds neither.
        """
        if isinstance(value, dict):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if not isinstance(value, bytes | str):
            raise BadSample(self.name(index), "holds no picture", "absent")
        return value if isinstance(value, bytes) else Path(value)


def undecoded(rows: Any) -> Any:
    """Return the dataset with its pictures as bytes or paths.

    They are decoded in the same place as the pictures of other sources.
    """
    import datasets

    raw = datasets.Image(decode=False)
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, raw)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, datasets.List(raw))
    return rows


def open_hub(data: Data) -> Source:
    """Open hub:owner/name or hub:owner/name:split; a local folder may replace owner/name.

    Raise SettingError if it cannot be opened.
    """
    try:
        import datasets
    except ImportError as error:
        raise SettingError(
            f"data.source = {data.source!r} needs the datasets library: pip install "
            "'imprompt[train]'"
        ) from error
    where = data.source.removeprefix("hub:")
    place, _, split = (where, "", "") if os.path.isdir(where) else where.partition(":")
    try:
        rows = datasets.load_dataset(place, split=split or "train")
    except Exception as error:
        # the library's, the network's and the builders' errors have nothing in common
        raise SettingError(
            f"data.source = {data.source!r} cannot be opened: {first_line(error)}"
        ) from error
    names = Names.of(data.columns, "image", "text", "reference,references")
    return HubSource(data.source, rows, names, data.captions == "required")
