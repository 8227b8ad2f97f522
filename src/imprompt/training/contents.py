"""Marks of what training samples consist of, by which an edited sample is recognised.

A digest is a hash of a sample's caption and of all bytes of its pictures. A stamp is quicker: a
hash of the caption and of the size and time of the files. Samples of streamed shards have neither
beyond their caption, because they would have to be fetched.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from imprompt.training.samples import BadSample, PictureOpener, Source

Mark = Callable[[PictureOpener], str]


def stamp_of(source: Source, index: int) -> str:
    """Return a sample's stamp; "" if a part of it does not exist."""
    return _marked(source, index, PictureOpener.stamp)


def digest_of(source: Source, index: int) -> str:
    """Return a sample's digest; "" if a part of it does not exist."""
    return _marked(source, index, PictureOpener.digest)


def _marked(source: Source, index: int, mark: Mark) -> str:
    try:
        sample = source.read(index)
        openers = dict.fromkeys([sample.picture, *sample.references, sample.mask])
        marks = [mark(opener) for opener in openers if isinstance(opener, PictureOpener)]
        held = json.dumps([sample.text, *marks])
    except BadSample as error:
        if error.kind == "absent":
            return ""
        held = error.kind
    except OSError:
        return ""
    return hashlib.blake2b(held.encode(), digest_size=8).hexdigest()


def edited_samples(
    source: Source, samples: Sequence[int], table: Mapping[str, Any], thorough: bool = False
) -> list[int]:
    """Return those samples of a shard that differ from what was encoded.

    A sample that does not exist any more is not compared, nor are those of a shard that was written
    before there were digests.

    table     the shard's table
    thorough  whether to read files whose size and time have not changed
    """
    if "digests" not in table:
        return []
    if not len(samples) == len(table["digests"]) == len(table.get("stamps", ())):
        return list(samples)  # the table was changed, so its marks show nothing
    marks = zip(samples, table["stamps"], table["digests"], strict=True)
    return [
        index
        for index, stamp, digest in marks
        if (thorough or stamp_of(source, index) != stamp)
        and digest_of(source, index) not in ("", digest)
    ]
