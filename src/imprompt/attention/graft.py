"""What joins adapters to a base model, and what its cross-attentions are handed before each step.

A hook runs before every call of the base model and sees its latents, timestep and text. So a step projects queries only: the
text's keys and values are projected once and kept while that text lives; and how strongly each image prompt is heard, by site,
item, place and time, is worked out once a step at most, not once a site.

Shape letters as in `imprompt.adapter`; P image prompts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from imprompt.adapter import KV, ImagePrompt, split_heads
from imprompt.errors import MismatchError

KEY = "ip_hidden_states"  # in cross_attention_kwargs
LIMIT = 1 << 30  # bytes of projected text that a model's sites hold; what is beyond it they project in every step


class Step(NamedTuple):
    """What the sites hear in one call of the base model."""

    source: Tensor  # (B, T, D): the text that `text` was projected from
    text: tuple[KV | None, ...]  # by site; None: the site projects it
    images: tuple[tuple[KV, ...], ...]  # by site, then prompt
    weights: dict[int, Tensor]  # scale × mask (sites, P, B or 1, 1, L or 1, 1) by L; without masks there is one, at 0

    def weight(self, site: int, queries: int) -> Tensor:
        """(P, B or 1, 1, L or 1, 1)"""
        return self.weights[0 if 0 in self.weights else queries][site]


class Grafted(Protocol):
    """What a graft must know of a family of base models."""

    @property
    def arguments(self) -> tuple[str, str, str]:
        """The forward pass's first: latents (B, C, h, w), timestep, text (B, T, D)."""
        ...

    def sites(self, model: nn.Module) -> dict[str, Any]: ...

    def processor(self, site: int) -> object:
        """What computes the attention of that site in place of the base model's own processor."""
        ...

    def sizes(self, model: nn.Module, height: int, width: int) -> list[tuple[int, int]]:
        """The sizes, rows and columns, in which sites see latents of that size."""
        ...


class Stamp:
    """Tells whether something was computed from these very tensors, unchanged since. It keeps none of them alive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.seen = [(TensorWeakRef(tensor), tensor._version) for tensor in tensors]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self.seen) and all(
            ref() is tensor and version == tensor._version for tensor, (ref, version) in zip(tensors, self.seen, strict=True)
        )


class Graft:
    """See `imprompt.adapter.Graft`. It lives in the model's hook, so that a copied model has one of its own."""

    def __init__(self, model: nn.Module, family: Grafted) -> None:
        self.family, self.adapters = family, 0
        self.sites = family.sites(model)
        self.own = [site.processor for site in self.sites.values()]
        for number, site in enumerate(self.sites.values()):
            site.set_processor(family.processor(number))
        self.hook = model.register_forward_pre_hook(self.hand_over, with_kwargs=True)
        self.forget()

    @classmethod
    def of(cls, model: nn.Module, family: Grafted) -> "Graft":
        """The model's graft, with one adapter more."""
        hooks = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
        graft = next((found for found in hooks if isinstance(found, cls)), None) or cls(model, family)
        graft.adapters += 1
        return graft

    def leave(self) -> None:
        self.adapters -= 1
        if not self.adapters:
            self.hook.remove()
            for site, own in zip(self.sites.values(), self.own, strict=True):
                site.set_processor(own)

    def forget(self) -> None:
        """Drop what is kept. Needed only after weights were changed through `.data`, which leaves no mark on them."""
        self.texts = WeakTensorKeyDictionary()  # text -> (Stamp, states by site)
        self.weighed: tuple[Stamp, Any, dict[int, Tensor]] | None = None

    def held_bytes(self) -> int:
        return sum(state.nbytes for _, states in self.texts.values() for pair in states if pair for state in pair)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "texts": WeakTensorKeyDictionary(), "weighed": None}

    def hand_over(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The hook: puts what this step hears in the image prompts' place."""
        told = kwargs.get("cross_attention_kwargs") or {}
        given = told.get(KEY)
        if given is None:
            return args, kwargs
        prompts = tuple(given) if isinstance(given, list | tuple) and not isinstance(given, ImagePrompt) else (given,)
        sites = range(len(self.sites))
        for prompt in prompts:
            check_prompt(prompt, len(sites))
        inputs = dict(zip(self.family.arguments, args, strict=False)) | kwargs
        latents, timestep, text = (inputs[name] for name in self.family.arguments)
        images = tuple(tuple((prompt.keys[site], prompt.values[site]) for prompt in prompts) for site in sites)
        step = Step(text, self.text(text), images, self.weights(model, prompts, latents, timestep)) if prompts else None
        return args, {**kwargs, "cross_attention_kwargs": {**told, KEY: step}}

    def text(self, text: Tensor) -> tuple[KV | None, ...]:
        """Keys and values of the text (B, T, D) at every site, kept while it lives and is what it was, as are the weights."""
        nothing = (None,) * len(self.sites)
        if not remembers(text):
            return nothing
        projections = [projection for site in self.sites.values() for projection in (site.to_k, site.to_v)]
        weights = [projection.weight for projection in projections if at_hand(projection, text)]
        if not weights:
            return nothing
        kept = self.texts.get(text)
        if kept is None or not kept[0].fits([text, *weights]):
            self.texts.pop(text, None)
            kept = self.texts[text] = (Stamp([text, *weights]), self._project(text))
        return kept[1]

    def _project(self, text: Tensor) -> tuple[KV | None, ...]:
        left = LIMIT - self.held_bytes()
        states: list[KV | None] = []
        for site in self.sites.values():
            left -= (needs := 2 * text.shape[:2].numel() * site.to_k.out_features * text.element_size())
            if left < 0 or not (at_hand(site.to_k, text) and at_hand(site.to_v, text)):
                left, pair = left + needs, None
            else:
                pair = split_heads(site.to_k(text), site.heads), split_heads(site.to_v(text), site.heads)
            states.append(pair)
        return tuple(states)

    def weights(self, model: nn.Module, prompts: Sequence[ImagePrompt], latents: Tensor, timestep: Any) -> dict[int, Tensor]:
        """See `Step.weights`. Kept where they do not change with time."""
        made_of = [tensor for prompt in prompts for tensor in (prompt.scale, prompt.mask) if tensor is not None]
        size, dtype = latents.shape[-2:], prompts[0].keys[0].dtype
        steady = all(prompt.scale.ndim == 2 for prompt in prompts) and remembers(*made_of)
        if steady and self.weighed and self.weighed[1] == (size, dtype) and self.weighed[0].fits(made_of):
            return self.weighed[2]
        scales = [heard_at(prompt.scale, timestep).to(dtype)[:, :, None, None, None] for prompt in prompts]
        masks = [prompt.mask for prompt in prompts]
        if all(mask is None for mask in masks):
            found = {0: stacked(scales)}
        else:
            found = {
                rows * columns: stacked(
                    [scale * seen_in(mask, (rows, columns)).to(scale) for scale, mask in zip(scales, masks, strict=True)]
                )
                for rows, columns in self.family.sizes(model, *size)
            }
        if steady:
            self.weighed = (Stamp(made_of), (size, dtype), found)
        return found


def check_prompt(prompt: Any, sites: int) -> None:
    """Raise MismatchError unless it is an image prompt for so many sites."""
    if not isinstance(prompt, ImagePrompt):
        raise MismatchError(f"{KEY} takes what adapter.prompt(...) gives, or a list of that; this is a {type(prompt).__name__}")
    if len(prompt.keys) != sites:
        raise MismatchError(f"the image prompt was made for {len(prompt.keys)} cross-attentions; this model has {sites}")


def remembers(*tensors: Tensor) -> bool:
    """Whether what is computed from these can be kept: changes must leave a mark on them, and no gradient is to flow."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not any(tensor.is_inference() for tensor in tensors)


def at_hand(projection: nn.Module, text: Tensor) -> bool:
    """Whether it is a matrix (a LoRA that is not fused is more), and here now (it may be offloaded)."""
    return isinstance(projection, nn.Linear) and projection.weight.device == text.device


def heard_at(scale: Tensor, timestep: Any) -> Tensor:
    """scale (sites, B or 1) or (sites, B or 1, T), timestep a number, () or (B,) -> (sites, B or 1)"""
    if scale.ndim == 2:
        return scale
    now = torch.as_tensor(timestep, device=scale.device).long().clamp(0, scale.shape[-1] - 1)
    return torch.take_along_dim(scale, now.view(1, -1, 1), -1)[..., 0]


def seen_in(mask: Tensor | None, size: tuple[int, int]) -> Tensor:
    """mask (B or 1, h, w) or none -> (B or 1, 1, L, 1) at L = rows × columns"""
    if mask is None:
        return torch.ones(1, 1, 1, 1)
    return F.interpolate(mask[:, None].float(), size, mode="area").flatten(2)[..., None]


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """P of (sites, B or 1, 1, L or 1, 1) -> (sites, P, B or 1, 1, L or 1, 1)"""
    return weights[0][:, None] if len(weights) == 1 else torch.stack(torch.broadcast_tensors(*weights), 1)
