"""Where training pictures come from: SOURCES is the table of all kinds."""

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
    """A kind of source: how it is written, how that is told from others, what opens it."""

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
    """The recipe's training set.

    SettingError with one line if it is of no known form, or malformed.
    """
    for row in SOURCES:
        if row.fits(data.source):
            return row.open(data)
    forms = ", ".join(row.form for row in SOURCES)
    raise SettingError(
        f"data.source = {data.source!r} is no folder that exists and of no known form; known: "
        f"{forms}"
    )
