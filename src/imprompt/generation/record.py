"""Record what a result was made of: names and hashes, in place of a machine's folders.

A result names its files from its own folder or from the working folder, and the weights by
fingerprints, so that another machine finds them again or says which changed.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from imprompt.errors import SettingError
from imprompt.files import sha256
from imprompt.generation.references import PictureFile
from imprompt.models import Location
from imprompt.untrusted import parse_json

# field of a request -> beginnings of the names of the weights that it changes
CHANGES = {
    "model": ("base", "adapter", "encoder", "controlnet"),
    "adapter": ("adapter", "encoder"),
    "variant": ("adapter", "encoder"),
    "encoder": ("encoder",),
    "controlnet": ("controlnet",),
    "dtype": ("base", "encoder", "controlnet"),  # rounding may change their fingerprints
}


def recorded_path(path: Path, out: Path) -> Path:
    """Return the name of a file in a result in the folder `out`, without the user's folders.

    It is the path from `out` for a file in it, beside it, or with it in the working folder; else
    the path from the working folder; else the file's name alone.
    """
    path, out, here = (Path(os.path.abspath(one)) for one in (path, out, ""))
    near = [
        out,
        *_without_home(out.parent),
        *(_without_home(here) if out.is_relative_to(here) else ()),
    ]
    if any(path.is_relative_to(folder) for folder in near):
        return Path(os.path.relpath(path, out))
    shown = any(path.is_relative_to(folder) for folder in _without_home(here))
    return path.relative_to(here) if shown else Path(path.name)


def _without_home(folder: Path) -> list[Path]:
    """Return the folder, unless a path from it would name the user's home."""
    home = Path(os.path.abspath(os.path.expanduser("~")))
    return [] if home != folder and home.is_relative_to(folder) else [folder]


def recorded_name(name: str, out: Path) -> str:
    """Return the name of weights in a result in `out`; that of a file or folder begins with "."."""
    if not Path(name).exists():
        return name
    path = recorded_path(Path(name), out).as_posix()
    return path if path.startswith("..") else f"./{path}"


def recorded_location(text: str, out: Path) -> str:
    """Return the location of weights, in the form of `Location`, as a file in `out` names it."""
    place = Location.parse(text)
    return str(replace(place, repo=recorded_name(place.repo, out))) if place.repo else text


def find_picture(file: PictureFile, folder: Path) -> PictureFile:
    """Return a picture that a file in `folder` names where it is now.

    A picture with a hash may also be in the working folder, or have been moved to either folder.
    """
    places = [folder / file.path]
    if file.sha256:
        places += [file.path, folder / file.path.name, Path(file.path.name)]
    there = [path for path in places if path.is_file()]
    same = (path for path in there if not file.sha256 or sha256(path) == file.sha256)
    path = next(same, (there or places)[0])
    return file.model_copy(update={"path": Path(os.path.abspath(path))})


def find_weights(name: str, folder: Path) -> str:
    """Return the path of weights that a file in `folder` names, or the name if it is none."""
    places = (folder / name, *([Path(name)] if name.startswith(".") else []))
    return next((os.path.abspath(path) for path in places if path.exists()), name)


def same_result(text: str | None, own: str) -> bool:
    """Return whether a file's record, if any, is of our result, wherever the pictures were."""
    try:
        return text is not None and _by_hash(parse_json(text)) == _by_hash(parse_json(own))
    except SettingError:  # a damaged one
        return False


def _by_hash(value: Any) -> Any:
    if isinstance(value, list):
        return [_by_hash(one) for one in value]
    if isinstance(value, dict):
        hashed = value.get("sha256")
        return {name: _by_hash(one) for name, one in value.items() if name != "path" or not hashed}
    return value


def fingerprints(
    components: Mapping[str, Any], opened: Sequence[Any], controlnet: Any
) -> dict[str, str]:
    """Return fingerprints of a base model, of adapters with their image encoders, a ControlNet.

    components  of the pipeline, before they are quantized or offloaded
    opened      a `LoadedAdapter` each
    """
    from torch import nn

    from imprompt.encoders.vision import fingerprint, fingerprint_of

    parts = sorted((name, part) for name, part in components.items() if isinstance(part, nn.Module))
    digest = hashlib.sha256("".join(fingerprint(part) for _, part in parts).encode())
    found = {"base model": digest.hexdigest()[:16]}
    for one in opened:
        tensors = {str(number): tensor for number, tensor in enumerate(one.file.tensors)}
        found[f"adapter {one.name}"] = fingerprint_of(tensors)
        found[f"encoder of {one.name}"] = known_fingerprint(one.encoder)
    found["controlnet"] = "" if controlnet is None else fingerprint(controlnet)
    return {name: value for name, value in found.items() if value}


def known_fingerprint(encoder: Any) -> str:
    """Return the fingerprint of an image encoder, or "" if it is not known without opening it.

    An encoder whose features are cached has the one that its adapter states.
    """
    from imprompt.encoders.feature_cache import CachedFeatures

    vision = getattr(encoder, "vision", encoder)  # the one that a face encoder has, or None
    if isinstance(vision, CachedFeatures):
        return vision.expected
    return "" if vision is None else vision.fingerprint()


def unchanged_by(fields: Mapping[str, Any], weights: Mapping[str, str]) -> dict[str, str]:
    """Return the recorded weights that are expected still when these fields of a request change."""
    changed = tuple(start for field in fields for start in CHANGES.get(field, ()))
    return {name: value for name, value in weights.items() if not name.startswith(changed)}


def check_weights(recorded: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise SettingError, naming what differs, unless the weights are those that were recorded."""
    changed = [name for name, value in recorded.items() if now.get(name, value) != value]
    if changed:
        raise SettingError(
            f"these weights are not those of the result to repeat: {', '.join(changed)}; its "
            "picture would differ. Give the same, or --allow-changed"
        )
