"""Files written whole or not at all, and whether results can be written, asked before anything is
computed.
"""

import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from imprompt.errors import SettingError, first_line


@contextmanager
def temporary(path: Path, mark: str = "") -> Iterator[Path]:
    """A path beside `path` that nobody else writes to.

    What is still there under it at the end is removed.

    mark  in its name, so that a killed process's part can be told from others'; a random one if not
          given
    """
    part = path.with_name(f".{path.name}.{mark or secrets.token_hex(4)}.part")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path, mark: str = "") -> Iterator[Path]:
    """Write to the path that is given: flushed to disk it takes the name `path`, so that nobody
    meets a part of it.

    mark  as in `temporary`
    """
    with temporary(path, mark) as part:
        yield part
        flush(part)
        part.replace(path)


def written_new(part: Path, wanted: Path) -> Path:
    """Give a whole file (see `temporary`) the name `wanted`, or the first free one of wanted-2,
    wanted-3 and so on; the name it got.

    No other file is replaced, whichever processes write there.
    """
    flush(part)
    for number in count(1):
        path = wanted if number == 1 else wanted.with_stem(f"{wanted.stem}-{number}")
        try:
            os.link(part, path)
        except FileExistsError:
            continue
        except OSError:  # a disk without links: take the name first
            try:
                path.open("x").close()
            except FileExistsError:
                continue
            part.replace(path)
        return path
    raise AssertionError("numbers do not end")


def refuse_inputs(out: Path, inputs: Iterable[Path]) -> None:
    """Raise SettingError if the file `out`, which is to be written, is one of those that are
    read.
    """
    if out.exists() and any(path.exists() and out.samefile(path) for path in inputs):
        raise SettingError(f"{out} is read for this: give another name for what is written")


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_folder(folder: Path) -> None:
    """Raise SettingError unless files can be made in `folder`, or where it is to be made.

    Leaves nothing there.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise SettingError(f"{place} is a file; a folder is needed")
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise SettingError(
            f"{place} may not be written to ({first_line(error)}); give another place"
        ) from error
