"""Files that are written completely or not at all, and checks that results can be written."""

import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from imprompt.errors import SettingError, first_line

if TYPE_CHECKING:
    from filelock import FileLock


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
    for path in numbered_names(wanted):
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


def numbered_names(wanted: Path) -> Iterator[Path]:
    """Yield the names that a new file tries: wanted, wanted-2, wanted-3 and so on."""
    yield wanted
    yield from (wanted.with_stem(f"{wanted.stem}-{number}") for number in count(2))


def taken_names(wanted: Path) -> Iterator[Path]:
    """Yield the files at the names that a new file would try before a free one."""
    return takewhile(Path.exists, numbered_names(wanted))


def refuse_inputs(out: Path, inputs: Iterable[Path]) -> None:
    """Raise SettingError if `out`, which is to be written, is an input or a file in one."""
    found = out.exists() and [path for path in inputs if path.exists()]
    if found and any(
        out.samefile(path) or (out.is_file() and out.resolve().is_relative_to(path.resolve()))
        for path in found
    ):
        raise SettingError(f"{out} is one of the inputs: give another name for the output")


def check_output(out: Path, inputs: Iterable[Path], force: bool) -> None:
    """Raise SettingError if the file `out` may not be written.

    It may not be an input, nor an existing file, unless `force` says that this is to be replaced.
    """
    refuse_inputs(out, inputs)
    if out.is_file() and not force:
        raise SettingError(f"{out} exists: give another name, or --force to replace it")


def lock_folder(folder: Path, doing: str, instead: str = "folder") -> "FileLock":
    """Acquire the sole right to write into a folder, which is made if it does not exist.

    It ends with this process at the latest. Raise SettingError if another process has it.

    doing    what a process does with the folder, for the message
    instead  what the message says to give another of
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / ".lock", blocking=False).acquire().lock
    except Timeout as error:
        raise SettingError(
            f"another process is {doing} {folder}: wait for it, or give another {instead}"
        ) from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
