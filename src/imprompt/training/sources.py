"""Kinds of training sets: SOURCES is the table of all of them."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from imprompt.errors import SettingError
from imprompt.training.hub import open_hub
from imprompt.training.listings import open_folder, open_list
from imprompt.training.recipe import Data
from imprompt.training.samples import Source
from imprompt.training.shards import ShardSource, expand_braces


@dataclass(frozen=True)
class Form:
    """A kind of source: how it is written, how it is recognized, what opens it.

    local  whether all of a source of this kind is on this disk, so that looking at it is cheap
    """

    form: str
    fits: Callable[[str], bool]
    open: Callable[[Data], Source]
    local: Callable[[str], bool]


SOURCES = (
    Form("hub:owner/name", lambda source: source.startswith("hub:"), open_hub, lambda _: False),
    Form("a folder with metadata.jsonl", os.path.isdir, open_folder, os.path.isdir),
    Form("list.json", lambda source: source.endswith(".json"), open_list, os.path.isfile),
    Form(
        "shards/{0000..0099}.tar",
        lambda source: source.startswith("pipe:") or ".tar" in source,
        ShardSource,
        lambda source: all(map(os.path.isfile, expand_braces(source))),
    ),
)


def open_source(data: Data) -> Source:
    """Open the recipe's training set.

    Raise SettingError with one line if its form is unknown or it is malformed.
    """
    return form_of(data.source).open(data)


def is_local(data: Data) -> bool:
    """Return whether the training set is still on this disk."""
    row = next((row for row in SOURCES if row.fits(data.source)), None)
    return row is not None and row.local(data.source)


def refuse_commands(data: Data) -> None:
    """Raise SettingError, with the first command, if opening the set would run shell commands."""
    shards = expand_braces(data.source) if form_of(data.source).open is ShardSource else []
    if commands := [shard.removeprefix("pipe:") for shard in shards if shard.startswith("pipe:")]:
        raise SettingError(
            f"data.source would run the shell command {commands[0]!r}: give --allow-pipe if you "
            "trust it"
        )


def form_of(source: str) -> Form:
    """Return the row of a source; raise SettingError if its form is unknown."""
    found = next((row for row in SOURCES if row.fits(source)), None)
    if found is not None:
        return found
    forms = ", ".join(row.form for row in SOURCES)
    raise SettingError(
        f"data.source = {source!r} is not an existing folder and has no known form; known: {forms}"
    )
