"""Read files and texts that others may have written, within limits.

Nothing else in the package opens such a file or parses JSON or TOML, so that none of them, however
long, deep or odd, raises anything but one line. The weights' own reader, with the same aim, is
`imprompt.checkpoints.tensors`.
"""

import errno
import json
import os
import re
import reprlib
import stat
import tomllib
from collections.abc import Iterator
from functools import cache, partial
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from imprompt.errors import SettingError, first_line

MAX_SETTINGS = 1 << 20  # bytes of a recipe or a request
MAX_TABLE = 1 << 30  # bytes of a list of pictures, or a table of results
MAX_LINE = 1 << 24  # bytes of one line of a table
MAX_DEPTH = 64  # lists and objects inside each other
MAX_INTEGER = 1 << 64  # the first seed that torch refuses
# What may go beyond the limits inside valid text: without it, a value needs no look.
SUSPECT = re.compile(r"\\u|[0-9]{19}|[\ud800-\udfff]")
# No number is so long; Python needs minutes for longer ones, or refuses them.
DIGITS = re.compile(r"[0-9]{4301}")


class StoredTable(BaseModel):
    """Form of a table in a JSON file; it may have more keys than are named."""

    model_config = ConfigDict(extra="allow", strict=True)


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read its bytes.

    Raise OSError if it is absent, a folder, or a device or a pipe, which may never end; also if no
    file can have this name.
    """
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a NUL character, or half a character
        raise OSError(errno.EINVAL, "no file has such a name") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is not a file but a device or a pipe")
    return path.open("rb")


def read_bytes(path: Path, most: int = MAX_TABLE) -> bytes:
    """Read a file; raise OSError as `open_regular`, and if it has more than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than the {most:,} allowed")
        return file.read(size)  # no more, even if it grows meanwhile


def read_text(path: Path, most: int = MAX_TABLE) -> str:
    """Read a file as UTF-8; raise SettingError, with the line, if it is not UTF-8.

    Raise OSError as `read_bytes`.
    """
    data = read_bytes(path, most)
    try:
        return data.decode("utf-8-sig")  # some editors write a byte order mark first
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SettingError(f"{path}, line {line}: not UTF-8 text") from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of every line that is not blank, reading one at a time.

    Raise SettingError, with the line, if it is not UTF-8 or has more than MAX_LINE bytes; OSError
    as `open_regular`.
    """
    with open_regular(path) as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), 1):
            if len(line) > MAX_LINE:
                raise SettingError(f"{path}, line {number}: more than {MAX_LINE:,} bytes long")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise SettingError(f"{path}, line {number}: not UTF-8 text") from error
            if text.strip():
                yield number, text


def parse_json(text: str, place: object = "", line: int = 1, *, lenient: bool = False) -> Any:
    """Parse JSON text that begins at `line` of `place`, a file's path if it is from one.

    Raise SettingError, with the line, if it is not valid, or goes beyond a limit: depth, digits, a
    NUL character, half a character (a lone surrogate).

    lenient  for tables whose entries are judged one by one: keep any character, NaN and infinity
    """
    where = f"{place}, line" if place else "line"
    try:
        _check_digits(text)
        value = json.loads(text, parse_constant=None if lenient else _no_number)
        if SUSPECT.search(text) or text.count("[") + text.count("{") > MAX_DEPTH:
            check_limits(value, any_text=lenient)
    except json.JSONDecodeError as error:
        raise SettingError(
            f"{where} {line + error.lineno - 1}: not valid JSON "
            f"({error.msg} at column {error.colno})"
        ) from error
    except RecursionError as error:
        raise SettingError(f"{where} {line}: nested too deep") from error
    except ValueError as error:
        raise SettingError(f"{where} {line}: {error}") from error
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML text; raise SettingError, as `parse_json`, if it is not valid."""
    try:
        _check_digits(text)
        table = tomllib.loads(text)
        check_limits(table)
    except RecursionError as error:
        raise SettingError("nested too deep") from error
    except ValueError as error:
        raise SettingError(first_line(error)) from error
    return table


def check_limits(value: Any, *, any_text: bool = False) -> None:
    """Raise ValueError, which says why, if a parsed value goes beyond a limit."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, int) and abs(item) > MAX_INTEGER:
                raise ValueError("a whole number is too large")
            elif isinstance(item, str) and not any_text:
                _check_characters(item)
        level = below
    if level:
        raise ValueError("nested too deep")


def checked(value: Any, form: Any, place: object) -> Any:
    """Return a parsed value unchanged; SettingError unless it has the form of a type.

    form  a `StoredTable`, or a type made of them, such as list[Row]
    """
    try:
        adapter_for(form).validate_python(value)
    except ValidationError as error:
        raise SettingError(f"{place} {_first_fault(error)}") from error
    return value


@cache
def adapter_for(form: Any) -> TypeAdapter[Any]:
    """Return pydantic's validator of a type."""
    return TypeAdapter(form)


def read_json(path: Path, form: Any = Any, *, lenient: bool = False) -> Any:
    """Read a JSON file whose content has the form of a type: see `checked` and `parse_json`.

    Raise SettingError if it has not, OSError as `read_bytes`.
    """
    return checked(parse_json(read_text(path), path, lenient=lenient), form, path)


def read_json_lines(path: Path, form: Any = Any, *, lenient: bool = False) -> list[Any]:
    """Read a file with JSON of this form on every line; errors as `read_json`."""
    return [
        checked(parse_json(text, path, number, lenient=lenient), form, f"{path}, line {number}")
        for number, text in read_lines(path)
    ]


def _first_fault(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        *outer, name = first["loc"]
        return f"lacks {name!r}" + (f" in {'.'.join(map(str, outer))}" if outer else "")
    given = f"{f'{place} = ' if place else ''}{reprlib.repr(first['input'])}"
    return f"holds {given}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _check_digits(text: str) -> None:
    if DIGITS.search(text):
        raise ValueError("a number has too many digits")


def _check_characters(text: str) -> None:
    if "\0" in text:
        raise ValueError("a text has a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("a text has half a character (a lone surrogate)") from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"not valid JSON ({name} is not a number)")
