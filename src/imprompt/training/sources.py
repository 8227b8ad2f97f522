"""Kinds of training sets: SOURCES is the table of all of them."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from imprompt.errors import SettingError
from imprompt.training.hub import open_hub
from imprompt.training.listings import open_folder, open_list
from imprompt.training.recipe import Data
from imprompt.training.samples import Source
from imprompt.training.shards import ShardSource


@dataclass(frozen=True)
class Form:
    """A kind of source: how it is written, how it is recognized, what opens it."""

    form: str
    fits: Callable[[str], bool]
    open: Callable[[Data], Source]


SOURCES = (
    Form("hub:owner/name", lambda source: source.startswith("hub:"), open_hub),
    Form("a folder with metadata.jsonl", os.path.isdir, open_folder),
    Form("list.json", lambda source: source.endswith(".json"), open_list),
    Form(
        "shards/{0000..0099}.tar",
        lambda source: source.startswith("pipe:") or ".tar" in source,
        ShardSource,
    ),
)


def open_source(data: Data) -> Source:
    """Open the recipe's training set.

    Raise SettingError with one line if its form is unknown or it is malformed.
    """
    for row in SOURCES:
        if row.fits(data.source):
            return row.open(data)
    forms = ", ".join(row.form for row in SOURCES)
    raise SettingError(
        f"data.source = {data.source!r} is not an existing folder and has no known form; known: "
        f"{forms}"
    )
