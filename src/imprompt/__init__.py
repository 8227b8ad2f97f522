"""imprompt: image prompts for text-to-image diffusion models (IP-Adapter, arXiv 2308.06721).

Importing this package loads neither torch nor diffusers; the names below load what they need when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from imprompt.adapter import ImagePrompt, IPAdapter
    from imprompt.checkpoint import load_adapter, read_adapter, write_adapter
    from imprompt.encoders.face import Face
    from imprompt.encoders.kept import FeatureMemory
    from imprompt.encoders.noise import Noise
    from imprompt.errors import ImpromptError
    from imprompt.sampling.generate import ImagePromptPipeline, Result
    from imprompt.sampling.references import AdapterChoice, Reference

_HOMES = {
    "AdapterChoice": "sampling.references",
    "Face": "encoders.face",
    "FeatureMemory": "encoders.kept",
    "IPAdapter": "adapter",
    "ImagePrompt": "adapter",
    "ImagePromptPipeline": "sampling.generate",
    "Noise": "encoders.noise",
    "Reference": "sampling.references",
    "Result": "sampling.generate",
    "ImpromptError": "errors",
    "load_adapter": "checkpoint",
    "read_adapter": "checkpoint",
    "write_adapter": "checkpoint",
}

__all__ = [
    "AdapterChoice",
    "Face",
    "FeatureMemory",
    "IPAdapter",
    "ImagePrompt",
    "ImagePromptPipeline",
    "ImpromptError",
    "Noise",
    "Reference",
    "Result",
    "load_adapter",
    "read_adapter",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"imprompt.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'imprompt' has no attribute {name!r}")
