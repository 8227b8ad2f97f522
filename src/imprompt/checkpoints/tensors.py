"""Files of tensors: read without running anything they hold, and written whole or not at all."""

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
# How torch's weights-only unpickler words that it met a function or class, and not merely damage.
CODE_SIGNS = (
    "GLOBAL",
    "Can only create new object",
    "Can only build",
    "unrecognized function",
    "TorchScript",
)

Choice = Callable[[Collection[str]], Collection[str]]  # all keys of a file -> those to read


def read_tensors(path: Path, choose: Choice) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a safetensors file or of a (nested) pickle by flat key, on the CPU, and the
    file's metadata.

    Raises CheckpointError if the file is missing, empty or damaged, or holds code. A pickle can
    also hold values that are no tensors; they are given as they are: see `check_plain`.
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
    """Raise CheckpointError unless all that a file holds are dense tensors of finite floating-point
    numbers.
    """
    if odd := [key for key, tensor in held.items() if not _is_plain(tensor)]:
        raise CheckpointError(
            f"{path} holds what is no plain tensor of floating-point numbers: {some(odd)}"
        )
    if broken := [key for key, tensor in held.items() if not tensor.float().isfinite().all()]:
        raise CheckpointError(
            f"{path} is corrupt, or of a training that diverged: NaN or infinite numbers in "
            f"{some(broken)}"
        )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors by flat key: with their metadata as safetensors, without it as a nested pickle,
    by the suffix.

    The file is written aside and then takes its name, so that a reader or a crash never meets a
    part of it. Raises CheckpointError if that fails; what had the name before is then untouched.
    """
    ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        with atomic_write(path) as temporary:
            temporary.touch()
            # as the umask says; safetensors makes files that only their owner can read
            mode = temporary.stat().st_mode
            if path.suffix in PICKLES:
                torch.save(nested(ready), temporary)
            else:
                save_file(ready, temporary, {"format": "pt", **metadata})
            temporary.chmod(mode)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {first_line(error)}") from error


def _mapped(path: Path, choose: Choice) -> tuple[dict[str, Any], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in choose(file.keys())}, file.metadata() or {}


def _unpickled(path: Path, choose: Choice) -> tuple[dict[str, Any], dict[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unusual pickles, which are sound or refused here
        try:
            held = dict(flat(torch.load(path, map_location="cpu", weights_only=True)))
        except Exception as error:
            if any(sign in str(error) for sign in CODE_SIGNS):
                message = (
                    f"{path} holds code, not only tensors; refused. Convert it to safetensors "
                    "where you trust it"
                )
                raise CheckpointError(message) from error
            if isinstance(error, pickle.UnpicklingError):
                raise CheckpointError(
                    f"{path} is damaged or cut short, or holds more than tensors; refused"
                ) from error
            raise
    return {key: held[key] for key in choose(held)}, {}


def _is_plain(tensor: Any) -> bool:
    """Whether this is a dense tensor whose numbers are all there; a pickle can hold others: sparse,
    empty, endlessly repeated.
    """
    if (
        not isinstance(tensor, Tensor)
        or tensor.layout != torch.strided
        or not tensor.is_floating_point()
    ):
        return False
    return tensor.device.type == "cpu" and 0 < tensor.nbytes <= tensor.untyped_storage().nbytes()


def flat(held: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": x}} -> ("a.b", x), to any depth"""
    if not isinstance(held, Mapping):
        yield prefix, held
        return
    for key, value in held.items():
        yield from flat(value, f"{prefix}.{key}" if prefix else str(key))


def nested(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{"a.b.c": x} -> {"a": {"b.c": x}}"""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        outer, inner = key.split(".", 1)
        groups.setdefault(outer, {})[inner] = tensor
    return groups


def some(names: Collection[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    return ", ".join(list(names)[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )
