"""Cache of what is computed from a text while it lives: keys, values and packed image prompts.

A value is stored together with its sources. It is computed again if one of these objects is another
object, or a tensor was changed in place, or a fact differs.
"""

from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from imprompt.attention.low_rank import version

LIMIT = 1 << 30  # bytes of projected text that a model caches; more is projected in every step
OFFLOADERS = ("_hf_hook", "_diffusers_hook")  # of tools that do not change what a layer computes

Sources = tuple[list[Any], Any]  # objects that must be the very same, and facts that must be equal


class CachedValue:
    """A cached value and its sources.

    Both are replaced in one assignment, so that threads may share it.
    """

    def __init__(self) -> None:
        self.found: tuple[Any, Any] = None, None  # versioned sources, the value

    @property
    def value(self) -> Any:
        """The cached value, or None."""
        return self.found[1]

    def get(self, sources: Callable[[Any], Sources], compute: Callable[[], Any]) -> Any:
        """Return the value for these sources, computed again if they have changed.

        sources  the cached value, or None -> the sources, which may depend on it
        """
        found = self.found
        if not unchanged(versioned(*sources(found[1])), found[0]):
            value = compute()
            # The sources are read again: computing may replace offloaded weights by loaded ones.
            found = self.found = (versioned(*sources(value)), value)
        return found[1]


def versioned(objects: list[Any], facts: Any) -> Sources:
    """Return the sources; the facts count how often each tensor was changed in place."""
    return objects, (facts, [version(one) for one in objects if isinstance(one, Tensor)])


def unchanged(new: Sources, old: Sources | None) -> bool:
    """Return whether the new sources equal the old ones."""
    if old is None or new[1] != old[1] or len(new[0]) != len(old[0]):
        return False
    return all(a is b for a, b in zip(new[0], old[0], strict=True))


class TextEntry:
    """Cached values for one text tensor."""

    def __init__(self) -> None:
        self.states = CachedValue()  # keys and values of the text by layer
        self.images = CachedValue()  # K' and V', packed for the kernel, low-rank parts
        self.masks = CachedValue()
        self.weights = CachedValue()

    @property
    def bytes(self) -> int:
        """Size in bytes of the text's keys and values, and of image prompts that were copied."""
        _, packed, _ = self.images.value or ((), (), ())
        copies = [s for layer in packed if len(layer.tokens) > 1 for s in (layer.key, layer.value)]
        pairs = (*(self.states.value or ()), copies)
        return sum(state.nbytes for pair in pairs for state in pair or ())


class TextCache:
    """Entries by text tensor, which they do not keep alive. Copies and pickles are empty."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Remove all entries."""
        self.entries, self.lock = WeakTensorKeyDictionary(), Lock()

    def entry(self, text: Tensor) -> TextEntry:
        """Return the entry of that text; it is created if there is none."""
        with self.lock:
            found = self.entries.get(text)
            if found is None:
                found = self.entries[text] = TextEntry()
            return found

    @property
    def bytes(self) -> int:
        """Size of all entries in bytes."""
        with self.lock:
            entries = list(self.entries.values())
        return sum(entry.bytes for entry in entries)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self.clear()


def can_cache(*tensors: Tensor) -> bool:
    """Return whether what is computed from these tensors can be cached.

    In-place changes must be counted on the tensors, no gradient may be needed, and nothing may
    record the computation to run it again.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or recorded(tensors[0]):
        return False
    return not any(tensor.is_inference() for tensor in tensors)


def recorded(text: Tensor) -> bool:
    """Return whether operations are being recorded to run again, or are not executed at all."""
    modes = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
    traced = torch._C._get_tracing_state() is not None
    dispatched = any(torch._C._get_dispatch_mode(mode) is not None for mode in modes)
    return traced or dispatched or (text.is_cuda and torch.cuda.is_current_stream_capturing())


def plain_weight(layer: Any, width: int) -> Tensor | None:
    """Return the weight of a layer that only multiplies a text of that width by it, else None.

    A LoRA that is not fused does more, and a hook may.
    """
    own: dict[str, Any] = layer.__dict__  # read in every step: a module's attribute access is slow
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"]
    if type(layer) is not nn.Linear or own["in_features"] != width or hooks:
        return None
    if "forward" in own and not any(mark in own for mark in OFFLOADERS):
        return None
    weight, bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
    return None if weight is None or bias is not None or weight.is_inference() else weight


def autocast_dtype(text: Tensor) -> torch.dtype | None:
    """Return the precision that autocast converts the text to; None if it is off."""
    device = text.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def can_call(weight: Tensor | None, text: Tensor) -> bool:
    """Return whether the layer can be called now.

    Its weight is on the text's device, or is loaded when the layer is called, as under sequential
    offload.
    """
    return weight is not None and (weight.device == text.device or weight.is_meta)
