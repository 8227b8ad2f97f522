"""How strongly each image prompt applies in one call of the model: by layer, row and place.

Shape letters as in `imprompt.adapter`; R rows of the batch, P image prompts, S points of a scale
over progress.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imprompt.adapter import ImageStates
from imprompt.attention.low_rank import LowRank, summed
from imprompt.errors import MismatchError
from imprompt.families.base import LayerSize, ModelCall
from imprompt.prompt import KEY, ImagePrompt, check_batch

Masks = dict[int, list[Tensor | None]]  # by L, of each prompt: (R or 1, 1, L, 1)
Weights = dict[int, Tensor]  # (layers, P, R or 1, 1, L or 1, 1) by L; without masks, only key 0


def check_prompt(prompt: Any, layers_of: Callable[[Any], Collection[str]]) -> None:
    """Raise MismatchError unless `prompt` is an image prompt for a model's layers.

    layers_of  gives those that a published form, or None, conditions
    """
    if not isinstance(prompt, ImagePrompt):
        raise MismatchError(
            f"{KEY} takes what adapter.prompt(...) gives, or a list of that; "
            f"this is a {type(prompt).__name__}"
        )
    if prompt.layers != (layers := len(layers_of(prompt.form))):
        raise MismatchError(
            f"the image prompt was made for {prompt.layers} cross-attentions; "
            f"this model has {layers}"
        )


def check_low_rank(prompt: ImagePrompt, injected: Collection[str]) -> None:
    """Raise MismatchError unless all attentions of the prompt's low-rank part are injected."""
    if prompt.low_rank and len(prompt.low_rank) != len(injected):
        raise MismatchError(
            f"the image prompt has a low-rank part for {len(prompt.low_rank)} attentions; "
            f"{len(injected)} of this model are injected: attach the adapter that made it"
        )


def check_processors(attentions: Mapping[str, Any], ours: Collection[type]) -> None:
    """Raise MismatchError where another tool has replaced our processor.

    Its processor would ignore image prompts.
    """
    for name, attention in attentions.items():
        if type(attention.processor) not in ours:
            raise MismatchError(
                f"{type(attention.processor).__name__} replaced the adapter's processor at {name}, "
                "so image prompts have no effect there: call detach(), then attach(model) again (a "
                "pipeline that replaces processors in every call does not go with image prompts)"
            )


def check_widths(prompt: ImagePrompt, sizes: Mapping[str, LayerSize]) -> None:
    """Raise MismatchError unless the prompt's keys are as wide as those of these layers."""
    for key, (name, size) in zip(prompt.keys, sizes.items(), strict=True):
        if (made := key.shape[1] * key.shape[3]) != size.inner:
            raise MismatchError(
                f"the image prompt was made for keys {made} wide at {name}; "
                f"this model's are {size.inner} wide"
            )


def check_rows(prompt: ImagePrompt, rows: int) -> None:
    """Raise MismatchError unless the prompt is for a batch of that many rows.

    Keys, values, scale, mask and bias are checked; the bias only where there are keys.
    """
    check_batch(len(prompt.keys[0] if prompt.patches is None else prompt.patches), rows)
    if prompt.scale.shape[1] not in (1, rows):
        raise MismatchError(
            f"the scale is for {prompt.scale.shape[1]} items, the base model runs a batch of {rows}"
        )
    tokens = prompt.keys[0].shape[2] if prompt.keys else None
    shapes = (1, tokens), (rows, tokens)
    if prompt.bias is not None and tokens is not None and prompt.bias.shape not in shapes:
        raise MismatchError(
            f"bias of shape {list(prompt.bias.shape)}: give (1 or {rows}, {tokens} image tokens)"
        )
    if prompt.mask is not None and (prompt.mask.ndim != 3 or len(prompt.mask) not in (1, rows)):
        raise MismatchError(
            f"mask of shape {list(prompt.mask.shape)}: give (1 or {rows}, rows, columns)"
        )


def masks_at(masks: Sequence[Tensor | None], grids: Sequence[tuple[int, ...]],
             dtype: torch.dtype) -> Masks:  # fmt: skip
    """Resize the masks (R or 1, h, w) to latents of these sizes.

    A mask is the same in every frame of a video, whose number stands before its rows and columns.
    Returns an empty dictionary if no prompt has a mask.
    """
    if all(mask is None for mask in masks):
        return {}
    return {prod(grid): [resized(mask, grid, dtype) for mask in masks] for grid in grids}


def resized(mask: Tensor | None, grid: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Resize a mask (R or 1, h, w) to (R or 1, 1, L, 1); each place is the mean of its area."""
    if mask is None:
        return None
    frame = F.interpolate(mask[:, None].float(), grid[-2:], mode="area").flatten(2)
    return frame.repeat(1, 1, prod(grid[:-2]))[..., None].to(dtype)


def weights_at(scales: Sequence[Tensor], masks: Masks, place: Callable[[int], Tensor],
               dtype: torch.dtype) -> Weights:  # fmt: skip
    """Compute scale × mask of every prompt at the current place in the schedule.

    place  gives that place in a table of a given number of points: see `ModelCall`
    """
    now = [scale_at(scale, place).to(dtype)[:, :, None, None, None] for scale in scales]
    if not masks:
        return {0: stacked(now)}
    return {
        places: stacked(
            [scale if mask is None else scale * mask for scale, mask in zip(now, own, strict=True)]
        )
        for places, own in masks.items()
    }


def scale_at(scale: Tensor, place: Callable[[int], Tensor]) -> Tensor:
    """Read a scale (layers, R or 1), or (layers, R or 1, S) at a place () or (R,) of S."""
    if scale.ndim == 2:
        return scale
    points = scale.shape[-1]
    now = place(points).to(scale.device).clamp(0, points - 1)
    rows = max(scale.shape[1], now.numel())
    now = now.view(1, -1, 1).expand(len(scale), rows, 1)
    return scale.expand(-1, rows, -1).gather(2, now)[..., 0]  # fewer operators than take_along_dim


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """Stack P weights (layers, R or 1, 1, L or 1, 1) to (layers, P, R or 1, 1, L or 1, 1)."""
    if len(weights) == 1:
        return weights[0][:, None]
    return torch.stack(torch.broadcast_tensors(*weights), 1)


def images_of(prompts: Sequence[ImagePrompt]) -> tuple[tuple[ImageStates, ...], ...]:
    """Return K', V' and bias by layer, then by prompt."""

    def at(prompt: ImagePrompt, layer: int) -> ImageStates:
        pair = prompt.keys[layer], prompt.values[layer]
        if prompt.bias is None:
            return pair
        return (*pair, prompt.bias[:, None, None, :].to(pair[0]))

    layers = range(len(prompts[0].keys))
    return tuple(tuple(at(prompt, layer) for prompt in prompts) for layer in layers)


def low_ranks_of(prompts: Sequence[ImagePrompt]) -> tuple[LowRank, ...]:
    """Return the low-rank part of every attention, summed over the prompts.

    The part that prompts of one adapter share is counted once.
    """
    parts = {id(prompt.low_rank): prompt.low_rank for prompt in prompts if prompt.low_rank}
    return tuple(map(summed, zip(*parts.values(), strict=True)))


def for_rows(prompt: ImagePrompt, call: ModelCall, positive: bool | None) -> ImagePrompt:
    """Return the prompt for the rows of a call, after a check of its sizes.

    A call with three branches repeats the positive one: perturbed-attention guidance.

    positive  whether a call with one branch of guidance is the positive one; None if the family
              does not know
    """
    alone = prompt.branches == 2 and prompt.rows in (2, 2 * call.rows)
    if positive is not None and alone:
        prompt = prompt.branch(-1 if positive else 0)
    elif call.positive_first and prompt.branches == 2:
        prompt = prompt.with_branches((-1, 0))._replace(branches=1)
    elif prompt.branches == 2 and 2 * call.rows == 3 * prompt.rows:
        prompt = prompt.with_branches((0, -1, -1))._replace(branches=1)
    check_rows(prompt, call.rows)
    return prompt


def base_is_trained(key: Tensor, value: Tensor, weights: Tensor) -> bool:
    """Return whether a gradient is needed that the kernel does not compute."""
    trained = key.requires_grad or value.requires_grad or weights.requires_grad
    return torch.is_grad_enabled() and trained
