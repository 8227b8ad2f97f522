"""Files that are written completely or not at all, and checks that results can be written."""

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
    """Yield a path in the folder of `path` that no other process writes to.

    A file that is still there at the end is removed.

    mark  part of the name, by which the file of a killed process can be recognised; random if not
          given
    """
    part = path.with_name(f".{path.name}.{mark or secrets.token_hex(4)}.part")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path, mark: str = "") -> Iterator[Path]:
    """Yield a temporary path; the file written there is flushed to disk and then renamed to `path`.

    So no reader meets an incomplete file.

    mark  as in `temporary`
    """
    with temporary(path, mark) as part:
        yield part
        flush(part)
        part.replace(path)


def written_new(part: Path, wanted: Path) -> Path:
    """Move a finished file to `wanted`, or to the first free one of wanted-2, wanted-3 and so on.

    Returns the path that the file got. No other file is replaced, even if several processes write
    there.

    part  a file at a path that `temporary` gave
    """
    flush(part)
    for number in count(1):
        path = wanted if number == 1 else wanted.with_stem(f"{wanted.stem}-{number}")
        try:
            os.link(part, path)
        except FileExistsError:
            continue
        except OSError:  # a disk without links: reserve the name first
            try:
                path.open("x").close()
            except FileExistsError:
                continue
            part.replace(path)
        return path
    raise AssertionError("numbers do not end")


def refuse_inputs(out: Path, inputs: Iterable[Path]) -> None:
    """Raise SettingError if the file `out`, which is to be written, is one of the inputs."""
    if out.exists() and any(path.exists() and out.samefile(path) for path in inputs):
        raise SettingError(f"{out} is one of the inputs: give another name for the output")


def cache_root() -> Path:
    """Return the folder of what can be fetched or computed again.

    It is IMPROMPT_CACHE, or imprompt in XDG_CACHE_HOME or ~/.cache. Raise SettingError if there is
    no home folder either.
    """
    if chosen := os.environ.get("IMPROMPT_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imprompt"
    except RuntimeError as error:  # neither HOME nor a user of this number
        raise SettingError(
            "there is no home folder to cache files in: set IMPROMPT_CACHE to a folder"
        ) from error


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_folder(folder: Path) -> None:
    """Raise SettingError unless files can be created in `folder`, or where it is to be created.

    Nothing is left there.
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
