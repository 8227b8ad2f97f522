"""Several items in one call of the base model, each with image prompts of its own.

Shape letters as in `imprompt.adapter`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imprompt.adapter import ImagePrompt
from imprompt.errors import MismatchError
from imprompt.sampling.controls import halves


class Slot:
    """Prompts of different items that one attention serves."""

    def __init__(self, prompt: ImagePrompt) -> None:
        self.kind = kind(prompt)
        self.of: dict[int, ImagePrompt] = {}  # by item
        self.everywhere: Tensor | None = None  # as a mask; None while no prompt has one

    def takes(self, prompt: ImagePrompt) -> bool:
        fits = prompt.mask is None or self.everywhere is None or prompt.mask.shape[1:] == self.everywhere.shape[1:]
        return fits and self.kind == kind(prompt)

    def add(self, item: int, prompt: ImagePrompt) -> None:
        self.of[item] = prompt
        if prompt.mask is not None:
            self.everywhere = torch.ones_like(prompt.mask[:1])


def kind(prompt: ImagePrompt) -> Any:
    """What must be alike for prompts to share an attention."""
    return [key.shape[1:] for key in prompt.keys], prompt.bias is None, id(prompt.lora) if prompt.lora else None


def batched(items: Sequence[Sequence[ImagePrompt]], guided: bool) -> list[ImagePrompt]:
    """Each item's own prompts, made for that item alone -> prompts for a base model that runs all items at once.

    Prompts are for a batch of 1, or of 2 with guidance; the result's batch is every unconditional item, then every conditional
    one. An item hears its prompts in its own order, so that it is what it would be alone, to the bit. MismatchError if prompts are
    for more than one item, or items differ in the low-rank part (FaceID), which acts on a whole batch.
    """
    loras = [{id(prompt.lora) for prompt in prompts if prompt.lora} for prompts in items]
    if any(lora != loras[0] for lora in loras):
        raise MismatchError("FaceID's low-rank part acts on a whole batch: run items with and without it, or with others, apart")
    slots: list[Slot] = []
    for item, prompts in enumerate(items):
        after = 0
        for prompt in prompts:
            if (made_for := batch_of(prompt)) not in (1, 1 + guided):
                raise MismatchError(f"an image prompt for a batch of {made_for}: give those of one item, {1 + guided}")
            place = next((i for i, slot in enumerate(slots) if i >= after and slot.takes(prompt)), len(slots))
            if place == len(slots):
                slots.append(Slot(prompt))
            slots[place].add(item, prompt)
            after = place + 1
    return [beside(slot, len(items), guided) for slot in slots]


def batch_of(prompt: ImagePrompt) -> int:
    parts = [*prompt.keys, *prompt.values, prompt.scale[0], prompt.mask, prompt.bias]
    return max(len(part) for part in parts if part is not None)


def beside(slot: Slot, items: int, guided: bool) -> ImagePrompt:
    """The prompts of a slot as one for all items; those that have none there are silent."""
    some = next(iter(slot.of.values()))
    times = max((prompt.scale.shape[2] for prompt in slot.of.values() if prompt.scale.ndim == 3), default=0)
    silent = some._replace(
        keys=tuple(torch.zeros_like(key[:1]) for key in some.keys),
        values=tuple(torch.zeros_like(value[:1]) for value in some.values),
        scale=torch.zeros_like(some.scale[:, :1]),
        mask=None,
        bias=None if some.bias is None else torch.zeros_like(some.bias[:1]),
    )
    prompts = [slot.of.get(item, silent) for item in range(items)]

    def joined(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
        return torch.cat([half for which in range(1 + guided) for half in (halves(part, axis)[which] for part in parts)], axis)

    def timed(scale: Tensor) -> Tensor:
        return scale[..., None].expand(-1, -1, times) if times and scale.ndim == 2 else scale

    masks = [slot.everywhere if prompt.mask is None else prompt.mask for prompt in prompts]
    biases = [prompt.bias for prompt in prompts]
    return some._replace(
        keys=tuple(map(joined, zip(*(prompt.keys for prompt in prompts), strict=True))),
        values=tuple(map(joined, zip(*(prompt.values for prompt in prompts), strict=True))),
        scale=joined([timed(prompt.scale) for prompt in prompts], 1),
        mask=joined([mask for mask in masks if mask is not None]) if masks[0] is not None else None,
        bias=joined([bias for bias in biases if bias is not None]) if biases[0] is not None else None,
    )
