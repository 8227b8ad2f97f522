"""Tensor files: read without executing code in them, and written completely or not at all.

Others may have written them: what a file may cost is bounded by its size before it is opened.
"""

import io
import json
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imprompt.errors import CheckpointError, SettingError, first_line
from imprompt.files import atomic_write
from imprompt.untrusted import StoredTable, open_regular, parse_json, read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)
# Words by which torch's weights-only unpickler reports a function or class, and not mere damage.
CODE_SIGNS = (
    "GLOBAL",
    "Can only create new object",
    "Can only build",
    "unrecognized function",
    "TorchScript",
)

# How files begin that stand in place of weights -> what they are, and what to do
STAND_INS = {
    rb"version https://git-lfs": "is a Git LFS pointer, not the file itself: run git lfs pull",
    rb"(?i)\s*<(!doctype|html|head|\?xml)": "is a web page, not the file itself: download it "
    "again, signed in if that is needed",
}
MAX_HEADER = 1 << 24  # bytes of a safetensors header, or of a pickle without its tensors
MAX_KEY = 1000  # characters
# Python's, of those that torch's weights-only unpickler calls, that take memory without data
HOLLOW = ("builtins bytearray", "__builtin__ bytearray")
PLAIN_PICKLES = 5  # before the tensors' bytes in torch.save's format before 1.6
TOO_LARGE = f"has a table of tensors of more than {MAX_HEADER:,} bytes"
INDEX = ".index.json"  # ending of the table of a file that is split into several

# all keys of a file -> those to read, by the names that the caller wants for them
Choice = Callable[[Collection[str]], Mapping[str, str]]


class ShardIndex(StoredTable):
    """Table of a split file: which of its parts holds which tensor."""

    weight_map: dict[str, str]


def read_tensors(path: Path, choose: Choice) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the tensors of a safetensors file or of a (nested) pickle by flat key, on the CPU.

    The path may also be the index of a split file.

    Returns them with the file's metadata. Raises CheckpointError if the file is missing, empty or
    damaged, or holds code. A pickle can also hold values that are not tensors; they are returned
    unchanged: see `check_plain`.
    """
    if path.name.endswith(INDEX):
        return _joined(path, choose)
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path}: weights are read from {', '.join(SUFFIXES)} files")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path} may not be read: permission denied")
    try:
        return _unpickled(path, choose) if path.suffix in PICKLES else _mapped(path, choose)
    except CheckpointError:
        raise
    except Exception as error:  # damaged input makes the readers raise nearly anything
        raise CheckpointError(f"{path} is damaged or cut short: {first_line(error)}") from error


def check_plain(path: Path, held: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless all values of a file are plain tensors.

    These are dense tensors of finite floating-point numbers.
    """
    if odd := [key for key, tensor in held.items() if not _is_plain(tensor)]:
        raise CheckpointError(
            f"{path} holds values that are not plain tensors of floating-point numbers: {some(odd)}"
        )
    if broken := [key for key, tensor in held.items() if not tensor.float().isfinite().all()]:
        raise CheckpointError(
            f"{path} is corrupt, or from a training run that diverged: NaN or infinite numbers in "
            f"{some(broken)}"
        )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors by flat key, as safetensors or as a pickle, depending on the suffix.

    Safetensors hold the metadata, the nested pickle does not. Equal tensors and metadata give equal
    bytes. The tensors are written to a
    temporary file that is then renamed, so nobody reads an incomplete file, even after a crash.
    Raises CheckpointError if that fails; an older file of that name is then unchanged.
    """
    ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        with atomic_write(path) as temporary:
            temporary.touch()
            # the umask's mode; safetensors creates files that only their owner can read
            mode = temporary.stat().st_mode
            if path.suffix in PICKLES:
                torch.save(nested(ready), temporary)
            else:
                save_file(ready, temporary, {"format": "pt", **metadata})
                sort_header(temporary)
            temporary.chmod(mode)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {first_line(error)}") from error


def sort_header(path: Path) -> None:
    """Sort the header of a safetensors file, whose metadata are written in a random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length).decode(), path, lenient=True)
        text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        in_place = text.encode().ljust(length)
        assert len(in_place) == length
        file.seek(8)
        file.write(in_place)


def refuse_stand_in(path: Path) -> None:
    """Raise CheckpointError if a file is something that stands in place of weights.

    OSError as `open_regular`.
    """
    with open_regular(path) as file:
        start = file.read(512)
    for pattern, what in STAND_INS.items():
        if re.match(pattern, start):
            raise CheckpointError(f"{path} {what}")


def _mapped(path: Path, choose: Choice) -> tuple[dict[str, Any], dict[str, str]]:
    refuse_stand_in(path)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(MAX_HEADER, path.stat().st_size):
        raise ValueError(f"its header should have {header:,} bytes")
    with safe_open(path, "pt") as file:
        chosen = choose(file.keys())
        tensors = {name: file.get_tensor(key) for name, key in chosen.items()}
        return tensors, file.metadata() or {}


def _unpickled(path: Path, choose: Choice) -> tuple[dict[str, Any], dict[str, str]]:
    held = dict(flat(load_pickle(path)))
    return {name: held[key] for name, key in choose(held).items()}, {}


def load_pickle(path: Path) -> Any:
    """Return what a file holds that torch.save wrote, on the CPU, without executing code in it.

    Raise CheckpointError if it holds code, is damaged, or would take more memory than its size
    explains; OSError if it cannot be read.
    """
    try:
        refuse_stand_in(path)
        check_pickle(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual pickles, which are checked here
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, CheckpointError):
        raise
    except Exception as error:  # damaged input makes the reader raise nearly anything
        if any(sign in str(error) for sign in CODE_SIGNS):
            raise CheckpointError(
                f"{path} holds code, not only tensors; refused. Convert it to safetensors if you "
                "trust it"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"{path} is damaged or cut short, or holds more than tensors; refused"
            ) from error
        raise CheckpointError(f"{path} is damaged or cut short: {first_line(error)}") from error


def check_pickle(path: Path) -> None:
    """Raise CheckpointError if unpickling a file could take more memory than its size explains.

    Other damage raises other errors. torch.save writes a zip archive without compression, or before
    version 1.6 plain pickles.
    """
    with open_regular(path) as file:
        try:
            if file.peek(4)[:4] == b"PK\3\4":
                _check_archive(file, path.stat().st_size)
            else:
                _check_structure(file)
        except CheckpointError as error:
            raise CheckpointError(f"{path} {error}; refused") from error


def _check_archive(file: BinaryIO, size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > size:
            raise CheckpointError("has compressed or overlapping members, unlike torch.save's")
        for member in members:
            if member.filename.endswith("/data.pkl"):
                if member.file_size > MAX_HEADER:
                    raise CheckpointError(TOO_LARGE)
                _check_structure(io.BytesIO(archive.read(member)))


def _check_structure(file: BinaryIO) -> None:
    """Raise CheckpointError if pickles are larger than a table of tensors, or make hollow data."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    for _ in range(PLAIN_PICKLES):
        if file.tell() == size:
            return
        for operation, argument, position in pickletools.genops(file):
            if position is not None and position > MAX_HEADER:
                raise CheckpointError(TOO_LARGE)
            if operation.name == "GLOBAL" and argument in HOLLOW:
                raise CheckpointError("makes data that it does not hold")


def _joined(index: Path, choose: Choice) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the tensors of a split file by its index; raise CheckpointError."""
    try:
        parts = read_json(index, ShardIndex)["weight_map"]
    except (OSError, SettingError) as error:
        raise CheckpointError(f"{index} cannot be read: {first_line(error)}") from error
    if outside := [name for name in parts.values() if not name or Path(name).name != name]:
        raise CheckpointError(f"{index} names a file outside its folder: {some(outside)}")
    wanted = choose(parts)
    tensors: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for part in dict.fromkeys(parts[key] for key in wanted.values()):
        own = {name: key for name, key in wanted.items() if parts[key] == part}
        found, told = read_tensors(index.with_name(part), partial(_present, own))
        tensors, metadata = tensors | found, metadata | told
    if absent := [key for name, key in wanted.items() if name not in tensors]:
        raise CheckpointError(f"{index}: its files lack {some(absent)}")
    return tensors, metadata


def _present(wanted: Mapping[str, str], keys: Collection[str]) -> dict[str, str]:
    there = set(keys)
    return {name: key for name, key in wanted.items() if key in there}


def _is_plain(tensor: Any) -> bool:
    """Return whether this is a dense tensor with all its numbers.

    A pickle can hold others: sparse, empty, or with numbers repeated endlessly.
    """
    if (
        not isinstance(tensor, Tensor)
        or tensor.layout != torch.strided
        or not tensor.is_floating_point()
    ):
        return False
    return tensor.device.type == "cpu" and 0 < tensor.nbytes <= tensor.untyped_storage().nbytes()


def flat(held: Any) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested dictionary: {"a": {"b": x}} -> ("a.b", x), to any depth.

    Raise ValueError if a dictionary is in it twice, or a key is no text or number or too long:
    a few such would make endlessly many leaves.
    """
    seen, waiting = set(), [("", held)]
    while waiting:
        name, value = waiting.pop()
        if not isinstance(value, Mapping):
            yield name, value
            continue
        if id(value) in seen:
            raise ValueError(f"one dictionary is in it twice, the second time as {name}")
        seen.add(id(value))
        if any(not isinstance(key, str | int) or len(f"{name}{key}") > MAX_KEY for key in value):
            raise ValueError(f"a key in {name or 'it'} is not a name")
        inner = [(f"{name}.{key}" if name else str(key), part) for key, part in value.items()]
        waiting += reversed(inner)


def nested(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group tensors by the first part of their key: {"a.b.c": x} -> {"a": {"b.c": x}}."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        outer, inner = key.split(".", 1)
        groups.setdefault(outer, {})[inner] = tensor
    return groups


def some(names: Collection[str], most: int = 8) -> str:
    """Return the first `most` names, and the number of the others, as text."""
    return ", ".join(list(names)[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )
