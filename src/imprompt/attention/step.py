"""What the cross-attentions are handed before a step, and how strongly each image prompt is then heard: by site, item and place.

Shape letters as in `imprompt.adapter`; P image prompts.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from imprompt.adapter import KV, Image, ImagePrompt, decoupled_attention, for_batch
from imprompt.attention.choice import trains_the_base, worth
from imprompt.attention.lora import Lora, together
from imprompt.errors import MismatchError

KEY = "ip_hidden_states"  # in cross_attention_kwargs


class Step(NamedTuple):
    """What the sites hear in one call of the base model."""

    source: Tensor  # (B, T, D): the text that `text` was projected from
    text: tuple[KV | None, ...]  # by site; None: the site projects it
    images: tuple[tuple[Image, ...], ...]  # by site, then prompt
    packed: tuple[Any, ...]  # by site: the same for the kernel (`fused.Packed`); empty where it cannot run
    weights: dict[int, Tensor]  # scale × mask (sites, P, B or 1, 1, L or 1, 1) by L; without masks there is one, at 0
    fused: list[bool | None]  # by site: whether the kernel is used; None: not known yet. Empty where it cannot run
    lora: tuple[Lora, ...] = ()  # by attention, self-attentions too: what is added to its projections

    def attention(self, site: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Decoupled attention at a site; shapes as in `imprompt.adapter.decoupled_attention`."""
        weight = self.weights[0 if 0 in self.weights else query.shape[2]][site]
        if self.fused and mask is None:
            if self.fused[site] is None and not torch.compiler.is_compiling():
                self.fused[site] = worth(query, key, value, self.packed[site], weight)
            if self.fused[site] and not trains_the_base(key, value, weight):
                from imprompt.attention.fused import fused_attention

                return fused_attention(query, key, value, self.packed[site], weight)
        return decoupled_attention(query, key, value, mask, self.images[site], weight)

    @property
    def undecided(self) -> bool:
        """Whether a site has still to find out which way is faster here: that cannot be done while compiling."""
        return None in self.fused


def check_prompt(prompt: Any, sites: Mapping[str, Any]) -> None:
    """Raise MismatchError unless it is an image prompt for so many sites."""
    if not isinstance(prompt, ImagePrompt):
        raise MismatchError(f"{KEY} takes what adapter.prompt(...) gives, or a list of that; this is a {type(prompt).__name__}")
    if len(prompt.keys) != len(sites):
        raise MismatchError(f"the image prompt was made for {len(prompt.keys)} cross-attentions; this model has {len(sites)}")


def check_lora(prompt: ImagePrompt, listening: Collection[str]) -> None:
    """Raise MismatchError unless every attention that its low-rank part is for listens."""
    if prompt.lora and len(prompt.lora) != len(listening):
        raise MismatchError(
            f"the image prompt has a low-rank part for {len(prompt.lora)} attentions; {len(listening)} of this model listen: "
            "attach the adapter that made it"
        )


def check_listening(attentions: Mapping[str, Any], ours: type) -> None:
    """Raise MismatchError where another tool has put its own processor: image prompts would not be heard there."""
    for name, attention in attentions.items():
        if type(attention.processor) is not ours:
            raise MismatchError(
                f"{type(attention.processor).__name__} was put in the adapter's place at {name}, where image prompts are then not "
                "heard: call detach() and attach(model) after it"
            )


def check_widths(prompt: ImagePrompt, sites: Mapping[str, Any]) -> None:
    """Raise MismatchError unless its keys are as wide as these sites' own."""
    for key, (name, site) in zip(prompt.keys, sites.items(), strict=True):
        if (made := key.shape[1] * key.shape[3]) != (width := site.to_q.out_features):
            raise MismatchError(f"the image prompt was made for keys {made} wide at {name}; this model's are {width} wide")


def check_batch(prompt: ImagePrompt, batch: int) -> None:
    """Raise MismatchError unless prompt, scale and mask are for a batch of that size."""
    for_batch((prompt.keys[0], prompt.values[0]), batch)
    if prompt.scale.shape[1] not in (1, batch):
        raise MismatchError(f"the scale is for {prompt.scale.shape[1]} items, the base model runs a batch of {batch}")
    tokens = prompt.keys[0].shape[2]
    if prompt.bias is not None and prompt.bias.shape not in ((1, tokens), (batch, tokens)):
        raise MismatchError(f"bias of shape {list(prompt.bias.shape)}: give (1 or {batch}, {tokens} image tokens)")
    if prompt.mask is not None and (prompt.mask.ndim != 3 or len(prompt.mask) not in (1, batch)):
        raise MismatchError(f"mask of shape {list(prompt.mask.shape)}: give (1 or {batch}, rows, columns)")


Masks = dict[int, list[Tensor | None]]  # by L, of each prompt: (B or 1, 1, L, 1)


def masks_at(masks: Sequence[Tensor | None], sizes: Sequence[tuple[int, int]], dtype: torch.dtype) -> Masks:
    """The masks (B or 1, h, w) for latents of these sizes, rows and columns; none at all if no prompt has one."""
    if all(mask is None for mask in masks):
        return {}
    return {rows * columns: [seen(mask, (rows, columns), dtype) for mask in masks] for rows, columns in sizes}


def weights_at(scales: Sequence[Tensor], masks: Masks, timestep: Any, dtype: torch.dtype) -> dict[int, Tensor]:
    """See `Step.weights`."""
    now = [scale_at(scale, timestep).to(dtype)[:, :, None, None, None] for scale in scales]
    if not masks:
        return {0: stacked(now)}
    return {
        at: stacked([scale if mask is None else scale * mask for scale, mask in zip(now, of, strict=True)])
        for at, of in masks.items()
    }


def scale_at(scale: Tensor, timestep: Any) -> Tensor:
    """scale (sites, B or 1) or (sites, B or 1, T), timestep a number, () or (B,) -> (sites, B or 1)"""
    if scale.ndim == 2:
        return scale
    now = torch.as_tensor(timestep, device=scale.device).long().clamp(0, scale.shape[-1] - 1)
    return torch.take_along_dim(scale, now.view(1, -1, 1), -1)[..., 0]


def seen(mask: Tensor | None, size: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """mask (B or 1, h, w) -> (B or 1, 1, L, 1) at L = rows × columns, the mean of what each covers"""
    if mask is None:
        return None
    return F.interpolate(mask[:, None].float(), size, mode="area").flatten(2)[..., None].to(dtype)


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """P of (sites, B or 1, 1, L or 1, 1) -> (sites, P, B or 1, 1, L or 1, 1)"""
    return weights[0][:, None] if len(weights) == 1 else torch.stack(torch.broadcast_tensors(*weights), 1)


def packed_for(images: Sequence[Sequence[Image]]) -> tuple[Any, ...]:
    """By site; see `fused.packed`."""
    from imprompt.attention import fused

    return tuple(map(fused.packed, images))


def images_of(prompts: Sequence[ImagePrompt]) -> tuple[tuple[Image, ...], ...]:
    """By site, then prompt; see `Step.images`."""

    def of_site(prompt: ImagePrompt, site: int) -> Image:
        pair = prompt.keys[site], prompt.values[site]
        return pair if prompt.bias is None else (*pair, prompt.bias[:, None, None, :].to(pair[0]))

    return tuple(tuple(of_site(prompt, site) for prompt in prompts) for site in range(len(prompts[0].keys)))


def loras_of(prompts: Sequence[ImagePrompt]) -> tuple[Lora, ...]:
    """By attention; see `Step.lora`. Prompts of one adapter share its part."""
    parts = {id(prompt.lora): prompt.lora for prompt in prompts if prompt.lora}.values()
    return tuple(map(together, zip(*parts, strict=True)))
