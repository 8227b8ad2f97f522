"""Tensor files: read without executing code in them, and written completely or not at all."""

import json
import os
import pickle
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imprompt.errors import CheckpointError, first_line
from imprompt.files import atomic_write

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

Choice = Callable[[Collection[str]], Collection[str]]  # all keys of a file -> those to read


def read_tensors(path: Path, choose: Choice) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the tensors of a safetensors file or of a (nested) pickle by flat key, on the CPU.

    Returns them with the file's metadata. Raises CheckpointError if the file is missing, empty or
    damaged, or holds code. A pickle can also hold values that are not tensors; they are returned
    unchanged: see `check_plain`.
    """
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
        header = json.loads(file.read(length))
        text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        in_place = text.encode().ljust(length)
        assert len(in_place) == length
        file.seek(8)
        file.write(in_place)


def _mapped(path: Path, choose: Choice) -> tuple[dict[str, Any], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in choose(file.keys())}, file.metadata() or {}


def _unpickled(path: Path, choose: Choice) -> tuple[dict[str, Any], dict[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unusual pickles, which are checked here
        try:
            held = dict(flat(torch.load(path, map_location="cpu", weights_only=True)))
        except Exception as error:
            if any(sign in str(error) for sign in CODE_SIGNS):
                message = (
                    f"{path} holds code, not only tensors; refused. Convert it to safetensors "
                    "if you trust it"
                )
                raise CheckpointError(message) from error
            if isinstance(error, pickle.UnpicklingError):
                raise CheckpointError(
                    f"{path} is damaged or cut short, or holds more than tensors; refused"
                ) from error
            raise
    return {key: held[key] for key in choose(held)}, {}


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


def flat(held: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested dictionary: {"a": {"b": x}} -> ("a.b", x), to any depth."""
    if not isinstance(held, Mapping):
        yield prefix, held
        return
    for key, value in held.items():
        yield from flat(value, f"{prefix}.{key}" if prefix else str(key))


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
