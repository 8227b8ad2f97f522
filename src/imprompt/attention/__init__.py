"""Image tokens -> base model: one file per family of base models, found by the tuple below."""

from importlib import import_module

from torch import nn

from imprompt.adapter import Family
from imprompt.errors import MismatchError

FAMILIES = ("unet",)


def family(name: str) -> Family:
    """The family of that name."""
    if name not in FAMILIES:
        raise MismatchError(f"unknown base-model family {name!r}; known: {', '.join(FAMILIES)}")
    return import_module(f"imprompt.attention.{name}").FAMILY


def family_of(model: nn.Module) -> Family:
    """The family that `model` belongs to; MismatchError if none."""
    for name in FAMILIES:
        if (found := import_module(f"imprompt.attention.{name}").FAMILY).matches(model):
            return found
    raise MismatchError(
        f"{type(model).__name__} is of no known family ({', '.join(FAMILIES)}): it has no text cross-attention to join"
    )
