"""The seam: what a family of base models tells the rest of the package, and how it is found.

A family is a row of `FAMILIES`. Its module is imported when a model may be of it, so that neither
this file nor `imprompt.adapter` depends on diffusers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from imprompt.errors import MismatchError, SettingError
from imprompt.prompt import KEY, ImagePrompt

ROUNDING = 1e-2  # of a point: progress is computed in float32
FAMILIES = {  # name -> module and attribute that hold it
    "unet": ("imprompt.families.unet", "UNET"),
    "pixart": ("imprompt.families.transformers", "PIXART"),
    "flux": ("imprompt.families.transformers", "FLUX"),
}


class LayerSize(NamedTuple):
    """The widths of one cross-attention: what W' reads, what it gives, and in how many heads."""

    text: int
    inner: int
    heads: int


class ModelCall(NamedTuple):
    """What a base model is called with, as far as image prompts need to know.

    rows      of the batch, as attentions see it
    text      text states (B, T, D); the same tensor in every step of a picture
    place     gives the call's place, () or (B,), in a table of so many points over the schedule,
              from noise to the picture; between two points it is the later one
    grids     gives the sizes, rows and columns, in which layers see the latents
    """

    rows: int
    text: Tensor
    place: Callable[[int], Tensor]
    grids: Callable[[], Sequence[tuple[int, int]]]


class Tasks(NamedTuple):
    """Names of diffusers' pipelines over the same networks, by what they start from."""

    text: str
    image: str
    inpaint: str


class TaskTable(NamedTuple):
    """What one class of saved pipelines can do, and the same beside a ControlNet."""

    plain: Tasks | None = None
    controlled: Tasks | None = None


def schedule_place(progress: Tensor, points: int) -> Tensor:
    """Return the place, see `ModelCall`, at a progress from 0 to 1."""
    return (progress * (points - 1) - ROUNDING).ceil().long()


Conditions = Mapping[str, Tensor]
"""What a model reads beside latents and timestep, for training: "text" (B, T, D), and by family
"pooled" (B, P), "text_mask" (B, T), and "time_ids" (B, 6), sizes as `imprompt.training.buckets.fit`
gives them."""


class Injection(Protocol):
    """What joins adapters to one base model."""

    layers: dict[str, Any]
    sizes: dict[str, LayerSize]
    timesteps: int  # of the schedule that the model was trained with

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision that the layers compute in."""
        ...

    def widen(self, tokens: Tensor) -> Tensor:
        """Return image tokens (B, N, D) as wide as the text that the layers read."""
        ...

    def using(self, prompts: Sequence[ImagePrompt],
              image_guidance: float | None = None) -> AbstractContextManager[None]:  # fmt: skip
        """Condition the model's calls of this thread on the prompts, inside."""
        ...

    def eject(self) -> None:
        """Take one adapter off; the last one gives the base model back as it was."""
        ...

    def cached_bytes(self) -> int:
        """Return the size of what is kept of texts."""
        ...

    def clear_cache(self) -> None:
        """Drop what is kept of texts."""
        ...


class Family(ABC):
    """How one kind of base model is joined."""

    name: str
    classes: tuple[str, ...]  # names of diffusers' models that can be built from a configuration
    pipelines: Mapping[str, TaskTable]  # by the class that a model was saved with
    channel: str | None  # keyword by which the model hands arguments to its attentions, if it does
    arguments: tuple[str, str, str]  # names of latents, timestep and text in the forward pass
    component: str  # of a pipeline: the base model
    shared: tuple[str, ...] = ()  # arguments that are for all rows
    text_arguments: tuple[str, ...] = ()  # those that hold the text, which guidance leaves empty
    separate_branches = False  # whether pipelines run each branch of guidance in a call of its own
    text_widths: Mapping[int, str] = {}  # of known models -> their name
    text_tokens: int | None = None  # that its pipelines encode; None: as the text encoder says
    grain = 1  # latents a side, of which a picture's must be a multiple
    call_options: Mapping[str, Any] = {}  # what its pipelines are always called with
    no_words: str | None = None  # the negative text that its pipelines need where none is given

    def __reduce__(self) -> Any:
        """Copy and pickle it by name: there is one of each family."""
        return find_family, (self.name,)

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Return whether `model` is of this family."""

    @abstractmethod
    def layers(self, model: nn.Module) -> dict[str, Any]:
        """Return the text cross-attentions by name, in the order of published checkpoints."""

    @abstractmethod
    def size(self, layer: Any) -> LayerSize:
        """Return the widths of one of the layers."""

    @abstractmethod
    def start(self, layer: Any, key: Tensor, value: Tensor) -> None:
        """Fill W'_k and W'_v, each (inner, text), of a new adapter at that layer."""

    @abstractmethod
    def inject(self, model: nn.Module, low_rank: bool) -> Injection:
        """Join one adapter more; with `low_rank` it acts on self-attentions too."""

    @abstractmethod
    def call(self, model: nn.Module, given: Mapping[str, Any], timesteps: int) -> ModelCall:
        """Return what image prompts need of a call with these arguments, by name.

        timesteps  of the schedule that the model was trained with
        """

    @abstractmethod
    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the text part of `Conditions` for captions, as its pipelines encode them."""

    @abstractmethod
    def predict(self, model: Any, prompt: ImagePrompt, noisy: Tensor, timestep: Tensor,
                conditions: Conditions) -> Tensor:  # fmt: skip
        """Return the prediction (B, C, h, w) for latents of that shape, in the model's precision.

        timestep  (B,) as the scheduler numbers them
        """

    @abstractmethod
    def condition_shapes(
        self, config: Mapping[str, Any], tokens: int
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one sample's `Conditions`, with a text of so many tokens."""

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """Return C of the latents (B, C, h, w) that a model of this configuration reads."""
        return config["in_channels"]

    def native_latents(self, config: Mapping[str, Any]) -> int:
        """Return the latents a side of the pictures that a model of this configuration was made
        for.
        """
        return config.get("sample_size") or 64  # where it does not say

    def native_side(self, pipeline: Any) -> int:
        """Return the pixels a side of the pictures that the pipeline's model was made for."""
        model = getattr(pipeline, self.component)
        return self.native_latents(model.config) * pipeline.vae_scale_factor

    def guided(self, pipeline: Any, guidance: float, options: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Return whether the pipeline runs a negative branch, called so."""
        return guidance > 1

    def quicken(self, model: Any) -> None:  # noqa: B027 - most train as they are
        """Let the model train faster on a CPU, its results the same up to rounding."""

    def channel_kwargs(self, prompt: ImagePrompt) -> dict[str, Any]:
        """Return the keyword that hands an image prompt to a call of a model that has a channel."""
        assert self.channel is not None
        return {self.channel: {KEY: prompt}}

    def build(self, config: Mapping[str, Any]) -> Any:
        """Return an untrained model of that configuration."""
        own = config.get("_class_name")
        name = own if own in self.classes else self.classes[0]
        return getattr(import_module("diffusers"), name).from_config(dict(config))

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name."""
        return dict(zip(self.arguments, args, strict=False)) | dict(kwargs)

    def known_by_text(self, width: int) -> str:
        """Return " (the model)" whose text is so wide, or nothing."""
        return f" ({self.text_widths[width]})" if width in self.text_widths else ""


def find_family(name: str) -> Family:
    """Return the family of that name; MismatchError if there is none."""
    if name not in FAMILIES:
        raise MismatchError(f"unknown base-model family {name!r}; known: {', '.join(FAMILIES)}")
    module, attribute = FAMILIES[name]
    return getattr(import_module(module), attribute)


def family_of(model: nn.Module) -> Family:
    """Return the family that `model` is of; MismatchError if none."""
    for name in FAMILIES:
        if (found := find_family(name)).matches(model):
            return found
    raise MismatchError(
        f"{type(model).__name__} is of no known family ({', '.join(FAMILIES)}): "
        "it has no text cross-attention that image prompts could join"
    )


def families() -> Iterator[Family]:
    """Return every family."""
    return map(find_family, FAMILIES)


def base_of(pipeline: Any) -> Any:
    """Return the base model of a pipeline; MismatchError if it has none that is known."""
    for known in families():
        if (model := getattr(pipeline, known.component, None)) is not None:
            return model
    raise MismatchError(
        f"a {type(pipeline).__name__} has no base model that image prompts could join"
    )


def pipeline_family(kind: str) -> Family:
    """Return the family that a class of pipelines is of; SettingError if none."""
    for known in families():
        if kind in known.pipelines:
            return known
    names = [name for known in families() for name in known.pipelines]
    raise SettingError(f"image prompts are known for {', '.join(names)}; this is a {kind}")
