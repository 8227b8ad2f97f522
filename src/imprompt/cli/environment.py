"""Define `imprompt env`, which describes this machine for a bug report."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from imprompt import __version__

LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pillow",
    "torchao",
    "triton",
    "insightface",
)


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Print versions, devices and folders, without the user's name, for a bug report."""
    from imprompt.cli.console import print_rows

    found = environment()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print_rows([(name, value) for part in found.values() for name, value in part.items()])


def environment() -> dict[str, dict[str, str]]:
    """Return versions, devices and folders by name."""
    import platform

    import torch

    return {
        "versions": {
            "imprompt": __version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            **{name: version_of(name) for name in LIBRARIES},
            "torch": torch.__version__,  # names its build for CUDA too, as its package may not
        },
        "devices": devices(),
        "folders": {name: without_user(path) for name, path in folders().items()},
    }


def version_of(library: str) -> str:
    """Return the version of a library, or that it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"


def devices() -> dict[str, str]:
    """Return what torch can compute on."""
    import torch

    gpus: Any = torch.cuda
    found = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    for number in range(gpus.device_count()):
        facts = gpus.get_device_properties(number)
        found[f"cuda:{number}"] = f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found


def folders() -> dict[str, Path]:
    """Return the folders that are read or written without being named."""
    from huggingface_hub import constants

    return {
        "package": Path(__file__).parents[1],
        "hub cache": Path(constants.HF_HUB_CACHE),
        "working folder": Path.cwd(),
    }


def without_user(path: Path) -> str:
    """Return a path with "~" for the home folder, and without the user's name elsewhere."""
    home = Path(os.path.expanduser("~"))
    if path.is_relative_to(home):
        return str("~" / path.relative_to(home))
    return str(Path(*("USER" if part == home.name else part for part in path.parts)))
