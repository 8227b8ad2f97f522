"""Image prompts for text-to-image diffusion models (IP-Adapter, arXiv 2308.06721).

Importing this package loads neither torch nor diffusers; each name below loads what it needs when
it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from imprompt.adapter import IPAdapter
    from imprompt.checkpoints.adapters import load_adapter, read_adapter, write_adapter
    from imprompt.encoders.choices import Noise
    from imprompt.encoders.face import Face
    from imprompt.encoders.feature_cache import FeatureMemory
    from imprompt.errors import ImpromptError
    from imprompt.generation.pipeline import ImagePromptPipeline, Result
    from imprompt.generation.references import AdapterChoice, Reference
    from imprompt.prompt import ImagePrompt

_HOMES = {
    "AdapterChoice": "generation.references",
    "Face": "encoders.face",
    "FeatureMemory": "encoders.feature_cache",
    "IPAdapter": "adapter",
    "ImagePrompt": "prompt",
    "ImagePromptPipeline": "generation.pipeline",
    "Noise": "encoders.choices",
    "Reference": "generation.references",
    "Result": "generation.pipeline",
    "ImpromptError": "errors",
    "load_adapter": "checkpoints.adapters",
    "read_adapter": "checkpoints.adapters",
    "write_adapter": "checkpoints.adapters",
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
