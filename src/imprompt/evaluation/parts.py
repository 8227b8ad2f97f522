"""Write the chunks of a run, and check that what is there is what was written.

A row holds the hash of its picture; a chunk's table holds those of its rows and its embeddings.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image
from pydantic import create_model
from torch import Tensor

from imprompt.checkpoints.tensors import write_tensors
from imprompt.errors import SettingError
from imprompt.evaluation.metrics import METRICS
from imprompt.evaluation.plan import Chunk
from imprompt.evaluation.results import PictureRow, Row
from imprompt.files import atomic_write, sha256
from imprompt.generation.request import save_png
from imprompt.untrusted import StoredTable, read_json, read_json_lines

SCORES: Any = dict.fromkeys(METRICS, (float, math.nan))
ScoredRow = create_model("ScoredRow", __base__=PictureRow, **SCORES)


class PartHashes(StoredTable):
    """Content of a chunk's table: SHA-256 of its files."""

    rows: str
    embeddings: str


def write_chunk(
    out: Path,
    chunk: Chunk,
    rows: Sequence[Row],
    embeddings: Mapping[str, Tensor],
    pictures: Sequence[Image],
) -> None:
    """Write the files of a chunk of the run in `out`; its rows are last: then it is complete."""
    for path in (chunk.stem, *(out / row["image"] for row in rows)):
        path.parent.mkdir(parents=True, exist_ok=True)
    for row, picture in zip(rows, pictures, strict=True):
        row["sha256"] = sha256(save_png(picture, out / row["image"]))
    write_tensors(chunk.embeddings, embeddings, {})
    text = lines_of_json(rows)
    hashes = {
        "rows": hashlib.sha256(text.encode()).hexdigest(),
        "embeddings": sha256(chunk.embeddings),
    }
    write_text(chunk.table, json.dumps(hashes))
    write_text(chunk.rows, text)


def is_complete(out: Path, chunk: Chunk) -> bool:
    """Return whether all files of a chunk are there; SettingError if one was changed since."""
    files = (chunk.rows, chunk.table, chunk.embeddings)
    if not all(path.exists() for path in files):
        return False
    rows = read_rows(chunk)
    try:
        hashes = read_json(chunk.table, PartHashes)
        wanted = {chunk.rows: hashes["rows"], chunk.embeddings: hashes["embeddings"]}
        wanted |= {out / row["image"]: row["sha256"] for row in rows}
    except (OSError, SettingError, KeyError) as error:  # KeyError: a row without a hash
        raise damaged(chunk.table, chunk) from error
    there = {path: value for path, value in wanted.items() if path.exists()}
    if changed := next((path for path, value in there.items() if sha256(path) != value), None):
        raise damaged(changed, chunk)
    return len(there) == len(wanted)


def read_rows(chunk: Chunk) -> list[Row]:
    """Return the rows of a chunk; SettingError if its file is missing or damaged."""
    try:
        rows = read_json_lines(chunk.rows, ScoredRow, lenient=True)
    except (OSError, SettingError) as error:
        raise damaged(chunk.rows, chunk) from error
    if len(rows) != chunk.pictures:
        raise damaged(chunk.rows, chunk)
    return rows


def damaged(path: Path, chunk: Chunk) -> SettingError:
    """Return the error for a missing, changed or damaged file of a chunk."""
    return SettingError(
        f"{path} is gone or damaged: delete {chunk.rows}, and the same command makes both again"
    )


def lines_of_json(rows: Sequence[Row]) -> str:
    """Return rows as text, a line each."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
