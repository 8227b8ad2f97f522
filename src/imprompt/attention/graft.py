"""What joins adapters to a base model, and what its cross-attentions are handed before each step.

A hook runs before every call of the base model and sees its latents, timestep and text. So a step projects queries only: the
text's keys and values are projected once and kept while that text lives; and how strongly each image prompt is heard, by site,
item, place and time, is worked out once a step at most, not once a site.

Shape letters as in `imprompt.adapter`; P image prompts.
"""

from collections.abc import Callable, Collection, Sequence
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from imprompt.adapter import KV, ImagePrompt
from imprompt.attention.choice import may_fuse
from imprompt.attention.lora import Lora, text_states, version
from imprompt.attention.step import (
    KEY,
    Masks,
    Step,
    check_batch,
    check_listening,
    check_lora,
    check_prompt,
    check_widths,
    images_of,
    loras_of,
    masks_at,
    packed_for,
    weights_at,
)

LIMIT = 1 << 30  # bytes of projected text that a model's sites hold; what is beyond it they project in every step


class Grafted(Protocol):
    """What a graft must know of a family of base models."""

    @property
    def arguments(self) -> tuple[str, str, str]:
        """The forward pass's first: latents (B, C, h, w), timestep, text (B, T, D)."""
        ...

    def sites(self, model: nn.Module) -> dict[str, Any]: ...

    def attentions(self, model: nn.Module) -> dict[str, Any]:
        """Sites and self-attentions, in the order in which published checkpoints number them."""
        ...

    def processor(self, attention: int, site: int | None) -> object:
        """What computes that attention in place of the base model's own processor; `site` is None at a self-attention."""
        ...

    def sizes(self, model: nn.Module, height: int, width: int) -> list[tuple[int, int]]:
        """The sizes, rows and columns, in which sites see latents of that size."""
        ...


class Computed:
    """A value, and what it was computed from: objects, which must be the very same, tensors unchanged since; and equal facts.

    `made_of` lists both, given the value that there is or None.
    """

    def __init__(self) -> None:
        self.found: tuple[Any, Any] = None, None  # what it was made of, the value; replaced at once, for threads

    @property
    def value(self) -> Any:
        return self.found[1]

    def get(self, made_of: Callable[[Any], tuple[list[Any], Any]], compute: Callable[[], Any]) -> Any:
        found = self.found
        if not same(marked(*made_of(found[1])), found[0]):
            value = compute()
            # Asked again: to compute brings offloaded weights, and leaves others in their place.
            found = self.found = (marked(*made_of(value)), value)
        return found[1]


def marked(sources: list[Any], facts: Any) -> tuple[list[Any], Any]:
    """The sources, and among the facts how often each tensor was changed in place."""
    return sources, (facts, [version(source) for source in sources if isinstance(source, Tensor)])


def same(new: tuple[list[Any], Any], old: tuple[list[Any], Any] | None) -> bool:
    if old is None or new[1] != old[1] or len(new[0]) != len(old[0]):
        return False
    return all(a is b for a, b in zip(new[0], old[0], strict=True))


class Run:
    """What is kept while a text lives: its keys and values, the image prompts heard with it, and their weights."""

    def __init__(self) -> None:
        self.text, self.images, self.masks, self.weights = Computed(), Computed(), Computed(), Computed()

    @property
    def bytes(self) -> int:
        """What the text's keys and values hold, and those of several image prompts that were copied beside each other."""
        _, packed, _ = self.images.value or ((), (), ())
        copies = [state for site in packed if len(site.tokens) > 1 for state in (site.key, site.value)]
        return sum(state.nbytes for pair in (*(self.text.value or ()), copies) for state in pair or ())


class Graft:
    """See `imprompt.adapter.Graft`. It lives in the model's hook, so that a copied model has one of its own."""

    def __init__(self, model: nn.Module, family: Grafted) -> None:
        self.family, self.adapters = family, 0
        self.computes_in: torch.dtype = getattr(model, "dtype", torch.float32)
        self.widens = getattr(model, "encoder_hid_proj", None)  # Kolors' text, and image tokens as wide, go through it
        self.sites, self.attentions = family.sites(model), family.attentions(model)
        self.own: dict[str, Any] = {}  # attentions that listen, with the processors that they had
        self.listen(self.sites)
        self.hook = model.register_forward_pre_hook(self.hand_over, with_kwargs=True)
        self.forget()
        self.fused: dict[Any, list[bool | None]] = {}  # see `Step.fused`, by all that speed depends on

    @classmethod
    def of(cls, model: nn.Module, family: Grafted, lora: bool = False) -> "Graft":
        """The model's graft, with one adapter more; with `lora` all attentions listen."""
        hooks = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
        graft = next((found for found in hooks if isinstance(found, cls)), None) or cls(model, family)
        graft.adapters += 1
        if lora:
            graft.listen(graft.attentions)
        return graft

    def listen(self, names: Collection[str]) -> None:
        sites = {name: number for number, name in enumerate(self.sites)}
        for number, (name, attention) in enumerate(self.attentions.items()):
            if name in names and name not in self.own:
                self.own[name] = attention.processor
                attention.set_processor(self.family.processor(number, sites.get(name)))
                self.ours = type(attention.processor)

    def leave(self) -> None:
        self.adapters -= 1
        if not self.adapters:
            self.hook.remove()
            for name, own in self.own.items():
                if type(self.attentions[name].processor) is self.ours:  # else another tool's, which stays
                    self.attentions[name].set_processor(own)

    def as_text(self, tokens: Tensor) -> Tensor:
        """Image tokens (B, N, D) in the width of the text that the sites read."""
        reads = next(iter(self.sites.values())).to_k.in_features
        if tokens.shape[-1] == reads or getattr(self.widens, "in_features", None) != tokens.shape[-1]:
            return tokens
        return self.widens(tokens.to(self.dtype))  # pyright: ignore[reportOptionalCall] - it has in_features

    @property
    def dtype(self) -> torch.dtype:
        """In which the sites compute; weights may be stored in 8 bits."""
        stored: torch.dtype = next(iter(self.sites.values())).to_q.weight.dtype
        return stored if stored.itemsize > 1 else self.computes_in

    def forget(self) -> None:
        self.runs, self.lock = WeakTensorKeyDictionary(), Lock()  # text -> Run

    def held_bytes(self) -> int:
        with self.lock:
            runs = list(self.runs.values())
        return sum(run.bytes for run in runs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("runs", "lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.forget()

    def run(self, text: Tensor) -> Run:
        with self.lock:
            found = self.runs.get(text)
            if found is None:
                found = self.runs[text] = Run()
            return found

    def hand_over(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The hook: puts what this step hears in the image prompts' place."""
        told = kwargs.get("cross_attention_kwargs") or {}
        given = told.get(KEY)
        if given is None:
            return args, kwargs
        prompts = tuple(given) if isinstance(given, list | tuple) and not isinstance(given, ImagePrompt) else (given,)
        for prompt in prompts:
            check_prompt(prompt, self.sites)
            check_lora(prompt, self.own)
        listening = self.own if any(prompt.lora for prompt in prompts) else self.sites
        check_listening({name: self.attentions[name] for name in listening}, self.ours)
        inputs = dict(zip(self.family.arguments, args, strict=False)) | kwargs
        step = self.step(model, prompts, *(inputs[name] for name in self.family.arguments)) if prompts else None
        return args, {**kwargs, "cross_attention_kwargs": {**told, KEY: step}}

    def step(self, model: nn.Module, prompts: tuple[ImagePrompt, ...], latents: Tensor, timestep: Any, text: Tensor) -> Step:
        """What the sites hear at this timestep (a number, () or (B,)) of these latents (B, C, h, w) and this text (B, T, D)."""
        scales = [prompt.scale for prompt in prompts]
        masks = [prompt.mask for prompt in prompts]
        biases = [prompt.bias for prompt in prompts if prompt.bias is not None]
        loras = [prompt.lora for prompt in prompts if prompt.lora]
        states = [state for prompt in prompts for state in (prompt.keys, prompt.values)]
        size, dtype = latents.shape[-2:], prompts[0].keys[0].dtype
        kernel = may_fuse(latents.device, dtype) and not biases
        copied = [state for pair in states for state in pair] if kernel and len(prompts) > 1 else []
        batch = len(latents) * (latents.shape[2] if latents.ndim == 5 else 1)  # a video's frames are items
        for prompt in prompts:
            check_batch(prompt, batch)

        def heard() -> tuple[Any, Any, Any]:
            for prompt in prompts:
                check_widths(prompt, self.sites)
            images = images_of(prompts)
            return images, packed_for(images) if kernel else (), loras_of(prompts)

        def resized() -> Masks:
            return masks_at(masks, self.family.sizes(model, *size), dtype)

        given = [mask for mask in masks if mask is not None]
        if remembers(text, *scales, *biases, *given, *copied):
            run, steady = self.run(text), all(scale.ndim == 2 for scale in scales)
            images, packed, lora = run.images.get(lambda _: (states + copied + biases + loras, kernel), heard)
            projected = self.text(run, text, lora)
            seen = run.masks.get(lambda _: (masks, (size, dtype)), resized) if given else {}
            made_of = (scales + masks, (size, dtype)) if steady else ([object()], None)  # what time changes is made in every step
            weighed = run.weights.get(lambda _: made_of, lambda: weights_at(scales, seen, timestep, dtype))
        else:
            projected, (images, packed, lora) = (None,) * len(self.sites), heard()
            weighed = weights_at(scales, resized(), timestep, dtype)
        return Step(text, projected, images, packed, weighed, self.choices(latents, text, prompts) if kernel else [], lora)

    def text(self, run: Run, text: Tensor, lora: tuple[Lora, ...]) -> tuple[KV | None, ...]:
        """Keys and values of the text (B, T, D) at every site where they can be kept."""
        width = text.shape[-1]

        def made_of(states: Any) -> tuple[list[Any], Any]:
            layers = [site._modules[name] for site in self.sites.values() for name in ("to_k", "to_v")]
            weights = [matrix(layer, width) for layer in layers]
            waits = states is None or None in states  # for weights that may have come since
            facts = (text._version, casts_to(text), waits and [at_hand(weight, text) for weight in weights])
            return [*weights, lora], facts

        return run.text.get(made_of, lambda: self._project(run, text, lora))

    def _project(self, run: Run, text: Tensor, lora: tuple[Lora, ...]) -> tuple[KV | None, ...]:
        run.text.found = None, None  # what is made anew needs the room
        left = LIMIT - self.held_bytes()
        added = dict(zip(self.attentions, lora, strict=True)) if lora else {}
        states: list[KV | None] = []
        for name, site in self.sites.items():
            needs = 2 * text.shape[:2].numel() * site.to_k.out_features * text.element_size()
            fits = needs <= left and all(at_hand(matrix(layer, text.shape[-1]), text) for layer in (site.to_k, site.to_v))
            states.append(text_states(site, text, added.get(name)) if fits else None)
            left -= needs * fits
        return tuple(states)

    def choices(self, latents: Tensor, text: Tensor, prompts: Sequence[ImagePrompt]) -> list[bool | None]:
        """See `Step.fused`."""
        heard = tuple((prompt.keys[0].shape[2], prompt.mask is None) for prompt in prompts)
        case = (latents.device, prompts[0].keys[0].dtype, latents.shape, text.shape[1], heard, torch.is_grad_enabled())
        return self.fused.setdefault(case, [None] * len(self.sites))


def remembers(*tensors: Tensor) -> bool:
    """Whether what is computed from these can be kept: changes must leave a mark on them, and no gradient is to flow."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or traced(tensors[0]):
        return False
    return not any(tensor.is_inference() for tensor in tensors)


def traced(text: Tensor) -> bool:
    """Whether what happens now is recorded to be run again, or not done at all."""
    modes = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
    recorded = torch._C._get_tracing_state() is not None or any(torch._C._get_dispatch_mode(mode) is not None for mode in modes)
    return recorded or (text.is_cuda and torch.cuda.is_current_stream_capturing())


OFFLOADERS = ("_hf_hook", "_diffusers_hook")  # marks of those that replace a layer's forward pass and leave what it computes


def matrix(layer: Any, width: int) -> Tensor | None:
    """What the layer multiplies a text of that width by, if that is all it does: a LoRA that is not fused does more, a hook may."""
    own: dict[str, Any] = layer.__dict__  # read in every step: a module's own attribute access is slow
    if type(layer) is not nn.Linear or own["in_features"] != width or own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return None
    if "forward" in own and not any(mark in own for mark in OFFLOADERS):
        return None
    weight, bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
    return None if weight is None or bias is not None or weight.is_inference() else weight


def casts_to(text: Tensor) -> torch.dtype | None:
    """What autocast makes of it, where that is on."""
    device = text.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def at_hand(weight: Tensor | None, text: Tensor) -> bool:
    """Whether the layer can be called now: its weight is where the text is, or comes when it is called (sequential offload)."""
    return weight is not None and (weight.device == text.device or weight.is_meta)
