"""Injection of adapters into one base model: replaced processors, and a hook before each call.

The hook gets latents, timestep and text of the call, computes how strongly each image prompt
applies, and passes that to the layers. This module holds what is common to all families.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code
from torch.utils._pytree import tree_leaves

from imprompt.attention.conditioning import (
    check_low_rank,
    check_processors,
    check_prompt,
    for_rows,
)
from imprompt.attention.image_guidance import BRANCHES, in_halves, in_thirds
from imprompt.attention.text_cache import CachedValue
from imprompt.errors import MismatchError
from imprompt.families.base import (
    Family,
    LayerSize,
    ModelCall,
    positional_names,
    time_of_rows,
)
from imprompt.prompt import KEY, ImagePrompt

SLACK = 2  # timesteps by which the first and the last of a schedule may differ from the model's
FINE = 2**20  # points of a table fine enough to distinguish the times of calls
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def outside_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a hook of a model out of the graph that `torch.compile` makes of that model.

    PyTorch calls hooks outside that graph, but would make another graph of each: a call's values,
    such as a picture's sizes, could then not be read. In a larger graph that contains the model's
    call, the hook is traced.
    """
    untraced = torch.compiler.disable(hook)

    def run(*args: Any, **kwargs: Any) -> Any:
        return (hook if torch.compiler.is_compiling() else untraced)(*args, **kwargs)

    skip_code(run.__code__)
    return wraps(hook)(run)


def device_of(latents: Tensor | Sequence[Tensor]) -> torch.device:
    """Return the device of latents, which some models take as a list."""
    return (latents if isinstance(latents, Tensor) else latents[0]).device


class Scope:
    """Image prompts that this thread's calls of a model are conditioned on in a `with` block."""

    def __init__(self, prompts: Sequence[ImagePrompt], image_guidance: float | None = None,
                 timed: bool = False) -> None:  # fmt: skip
        self.prompts, self.image_guidance, self.timed = tuple(prompts), image_guidance, timed
        self.calls = 0
        self.text_in_thirds = CachedValue()
        self.texts: list[Tensor] = []  # of this picture's branches, the positive one first
        self.place: Tensor | None = None  # of the picture's first call
        self.rows = 0  # of the largest call

    def branch(self, call: ModelCall, family: Family) -> bool | None:
        """Return whether a call with one branch of guidance is the positive one; None if unknown.

        Where pipelines run both branches in one call, and the positive one alone where guidance
        ended early or a layer is skipped, that call has half the rows of the largest.
        """
        if family.separate_branches:
            return self.positive(call)
        self.rows = max(self.rows, call.rows)
        return True if family.positive_alone and 2 * call.rows == self.rows else None

    def positive(self, call: ModelCall) -> bool:
        """Return whether a call with one branch of guidance is the positive one.

        Families that guide in two calls run the positive branch first: a new text belongs to the
        negative branch if it is the second one at the same time, else to another picture's positive
        branch.
        """
        if any(call.text is text for text in self.texts):
            return call.text is self.texts[0]
        first = self.place
        if len(self.texts) == 1 and first is not None and torch.equal(call.place(FINE), first):
            self.texts.append(call.text)
            return False
        self.texts, self.place = [call.text], call.place(FINE)
        return True


def set_processor(attention: Any, processor: object) -> None:
    """Give an attention another processor; a few classes have no method for that."""
    if hasattr(attention, "set_processor"):
        attention.set_processor(processor)
    else:
        attention.processor = processor


class ModelInjection(ABC):
    """Injection that is common to all families: see `imprompt.families.base.Injection`.

    It belongs to the model's hook: a copied model has its own injection.
    """

    takes_forms = False  # whether its layers can attend in the ways of `imprompt.families.forms`

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.family, self.adapters, self.timesteps = family, 0, 1000
        self.computes_in: torch.dtype = getattr(model, "dtype", torch.float32)
        self.arguments = positional_names(model)
        self.layers = family.layers(model)
        self.text_projection: Any = None  # the model's own, where it has one
        self.sizes: dict[str, LayerSize] = {n: family.size(x) for n, x in self.layers.items()}
        self.of_forms: dict[str, dict[str, LayerSize]] = {}  # sizes by a published form's layers
        self.originals: dict[str, Any] = {}  # of the attentions that are injected
        self.hooks: list[Any] = []
        self.local = threading.local()
        self.moved = CachedValue()  # prompts that were made on another device than a call's
        self.hook(model)

    @classmethod
    def of(cls, model: nn.Module, make: Callable[[], Self]) -> Self:
        """Return the model's injection, new if it has none, with one more adapter."""
        hooks = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
        found = next((hook for hook in hooks if isinstance(hook, cls)), None) or make()
        found.adapters += 1
        return found

    def hook(self, model: nn.Module) -> None:
        """Be called before and after each call of `model`, and of no other."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = [
            model.register_forward_pre_hook(self.before_call, with_kwargs=True),
            model.register_forward_hook(self.after_call, always_call=True),
        ]

    def replace(self, attentions: dict[str, Any], processors: Mapping[str, object]) -> None:
        """Replace the processors of those attentions, and remember the original ones."""
        for name, processor in processors.items():
            if name not in self.originals:
                self.originals[name] = attentions[name].processor
                set_processor(attentions[name], processor)

    @abstractmethod
    def attentions(self) -> dict[str, Any]:
        """Return all attentions that may be injected, by name."""

    @abstractmethod
    def classes(self) -> Collection[type]:
        """Return the classes of our processors."""

    @abstractmethod
    def hand_over(self, arguments: Arguments, call: ModelCall,
                  prompts: tuple[ImagePrompt, ...]) -> Arguments:  # fmt: skip
        """Pass the conditioning of a call to the layers; return the call's arguments."""

    def idle(self, arguments: Arguments) -> Arguments:
        """Set the layers to compute what the base model computes; return the arguments."""
        return arguments

    def eject(self) -> None:
        """Remove one adapter; the last one to be removed restores the base model."""
        self.adapters -= 1
        if not self.adapters:
            for hook in self.hooks:
                hook.remove()
            attentions = self.attentions()
            for name, original in self.originals.items():
                if type(attentions[name].processor) in self.classes():
                    # a processor of another tool stays
                    set_processor(attentions[name], original)

    @property
    def dtype(self) -> torch.dtype:
        """Precision that the layers compute in; weights may be stored in 8 bits."""
        stored: torch.dtype = next(next(iter(self.layers.values())).parameters()).dtype
        return stored if stored.itemsize > 1 else self.computes_in

    def sizes_of(self, form: Any) -> Mapping[str, LayerSize]:
        """Return the sizes, by name, of the layers that adapters of a published form condition.

        These are all layers for None. Raise MismatchError if the form is for other models.
        """
        if form is None:
            return self.sizes
        if self.family.name not in form.fits(self.family.name) or not self.takes_forms:
            bases = ", ".join(form.families) or "transformers"
            raise MismatchError(
                f"the image prompt is of an adapter for {bases}; "
                f"this model is of the {self.family.name} family"
            )
        if form.layers not in self.of_forms:
            self.of_forms[form.layers] = form.of(self.sizes)
        return self.of_forms[form.layers]

    def widen(self, tokens: Tensor, width: int) -> Tensor:
        """Return image tokens (B, N, D) `width` wide, which W' reads.

        Tokens of another width pass the model's own projection of text. Raise MismatchError if it
        has none for them.
        """
        if tokens.shape[-1] == width:
            return tokens
        if self.text_projection is None:
            raise MismatchError(
                f"the image tokens are {tokens.shape[-1]} wide, the adapter's layers read {width}: "
                "this model has no projection of text that they could pass"
            )
        return self.text_projection(tokens.to(self.dtype))

    def cached_bytes(self) -> int:
        """Return the size of the cached text states in bytes."""
        return 0

    def clear_cache(self) -> None:  # noqa: B027 - most families keep nothing
        """Remove the cached text states."""

    @contextmanager
    def using(self, prompts: Sequence[ImagePrompt], image_guidance: float | None = None,
              *, timed: bool = False) -> Iterator[None]:  # fmt: skip
        """Condition this thread's calls of the model on the prompts in a `with` block.

        image_guidance  a guidance scale for the image: see `imprompt.attention.image_guidance`
        timed           whether timesteps are known to tell progress; else the first call is checked

        Raises MismatchError if prompts are in use already, or at the end if no call was
        conditioned.
        """
        if self.scope is not None:
            raise MismatchError(
                "image prompts are in use already: give all of them to one using(...)"
            )
        scope = self.local.scope = Scope(prompts, image_guidance, timed)
        try:
            yield
        finally:
            self.local.scope = None
        if not scope.calls:
            raise MismatchError(
                "the image prompts never reached the base model that the adapter is attached to: "
                "the code in the block did not call it (does the pipeline use another model?)"
            )

    @property
    def scope(self) -> Scope | None:
        """Image prompts in use in this thread, or None."""
        return getattr(self.local, "scope", None)

    def by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name."""
        return dict(zip(self.arguments[: len(args)], args, strict=True)) | dict(kwargs)

    @outside_graphs
    def before_call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments:
        """Condition the call on its image prompts, as the model's forward pre-hook."""
        prompts, scope = self.prompts_of(kwargs), self.scope
        if prompts is None:
            return self.idle((args, kwargs))
        for prompt in prompts:
            check_prompt(prompt, self.sizes_of)
            check_low_rank(prompt, self.originals)
        low_rank = any(prompt.low_rank for prompt in prompts)
        attentions = self.attentions()
        names = self.originals if low_rank else self.layers
        check_processors({name: attentions[name] for name in names}, self.classes())
        if scope is not None and scope.image_guidance is not None:
            given = self.by_name(args, kwargs)
            args, kwargs = (), in_thirds(self.family, given, scope.text_in_thirds)
            prompts = tuple(prompt.with_branches(BRANCHES) for prompt in prompts)
        given = self.by_name(args, kwargs)
        prompts = self.on_device(prompts, device_of(given[self.family.arguments[0]]))
        call = self.family.call(model, given, self.timesteps)
        if changing := [prompt.scale for prompt in prompts if prompt.scale.ndim == 3]:
            self.check_time(call, scope, changing[0])
        positive = None
        if any(prompt.branches > 1 for prompt in prompts):
            if scope is not None:
                positive = scope.branch(call, self.family)
            elif self.family.separate_branches:
                raise MismatchError(
                    f"a {type(model).__name__} runs the branches of guidance in separate calls: "
                    "give image prompts by `with adapter.using(prompt):`"
                )
        return self.hand_over(
            (args, kwargs), call, tuple(for_rows(prompt, call, positive) for prompt in prompts)
        )

    def on_device(self, prompts: tuple[ImagePrompt, ...], device: torch.device
                  ) -> tuple[ImagePrompt, ...]:  # fmt: skip
        """Return the prompts on the device of a call, where offloaded layers compute.

        Prompts from elsewhere are copied in the first call, and the copies used until another
        prompt is given.
        """
        if all(prompt.scale.device == device for prompt in prompts):
            return prompts
        parts = [part for prompt in prompts for part in tree_leaves(prompt._replace(low_rank=()))]
        return self.moved.get(
            lambda _: (parts, device),
            lambda: tuple(prompt.map_rows(lambda part, _: part.to(device)) for prompt in prompts),
        )

    def check_time(self, call: ModelCall, scope: Scope | None, scale: Tensor) -> None:
        """Raise MismatchError if the timestep of a call cannot tell progress.

        Only the first call is checked, in a `with` block or with this scale: a check waits for the
        device. A real number that stands for the schedule's end is then taken for a scheduler's
        own.
        """
        timestep = time_of_rows(call.given[self.family.arguments[1]])
        known = scope.timed if scope is not None else getattr(self.local, "timed", None) is scale
        if known or timestep.is_meta:
            return
        self.local.timed = scale
        progress, slack = call.place(FINE) / FINE, SLACK / self.timesteps
        stray = (progress < -slack) | (progress > 1 + slack)
        stray |= (progress > 1 - slack) & (timestep != 0) & timestep.is_floating_point()
        if scope is not None:
            scope.timed = True
        if stray.any():
            raise MismatchError(
                "a scale that changes over time needs the timesteps that the model was trained "
                f"with; this scheduler gives {timestep.flatten()[0].item():.4g}: use "
                "ImagePromptPipeline, which asks the scheduler, or another scheduler"
            )

    @outside_graphs
    def after_call(self, model: nn.Module, _args: Any, out: Any) -> Any:
        """Finish the call, even if it failed, as the model's forward hook."""
        self.release(model, out is not None)
        scope = self.scope
        if out is None or scope is None or scope.image_guidance is None:
            return None
        if isinstance(out, tuple):
            return in_halves(out[0], scope.image_guidance), *out[1:]
        out.sample = in_halves(out.sample, scope.image_guidance)
        return out

    def release(self, model: nn.Module, ended: bool) -> None:  # noqa: B027 - most hold nothing
        """Release what the layers were given for a call, which `ended` or failed."""

    def prompts_of(self, kwargs: dict[str, Any]) -> tuple[ImagePrompt, ...] | None:
        """Return the image prompts of a call, from its keyword or those in use; None if none.

        Raises MismatchError if both are given.
        """
        channel = (kwargs.get(self.family.channel) or {}) if self.family.channel else {}
        given, scope = channel.get(KEY), self.scope
        if given is not None and scope is not None:
            raise MismatchError(f"image prompts are in use, and {KEY} gives others: give them once")
        if scope is not None:
            scope.calls += 1
            return scope.prompts or None
        if given is None:
            return None
        if isinstance(given, (list, tuple)) and not isinstance(given, ImagePrompt):
            return tuple(given)
        return (given,)  # pyright: ignore[reportReturnType] - checked later

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.local = threading.local()
