"""Interface of a family of base models, and the registry of families.

A family is a row of `FAMILIES`. Its module is imported when a model may belong to it, so that
neither this file nor `imprompt.adapter` depends on diffusers.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from inspect import signature
from math import lcm
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from imprompt.errors import MismatchError, SettingError
from imprompt.families.refusals import MODELS
from imprompt.prompt import KEY, ImagePrompt

ROUNDING = 1e-2  # tolerance in points: progress is computed in float32
UNET = "imprompt.families.unet"
ROWS = "imprompt.families.rows"
FAMILIES = {  # name -> module that holds it in a table of its `FAMILIES`
    "unet": UNET,
    **dict.fromkeys(
        (
            *("pixart", "flux", "sd3", "chroma", "bria", "ovis", "longcat", "flux2", "flux3"),
            *("sana", "hunyuandit", "lumina2", "lumina-next", "auraflow", "qwen-image"),
            *("qwen-image-2.1", "z-image", "wan", "hidream", "cogview4", "hunyuan-image"),
            *("hunyuan-video", "kandinsky5", "krea2", "ideogram4", "prx", "ltx", "cosmos"),
            *("cogvideox", "cogview3plus", "mochi", "allegro", "framepack", "bria-fibo"),
            *("bria-fibo2", "nucleus", "glm-image", "joyimage", "easyanimate", "ernie-image"),
            *("ltx2", "anyflow", "kandinsky6"),
        ),
        ROWS,
    ),
}


class LayerSize(NamedTuple):
    """Sizes of one cross-attention layer: the width that W' reads, that it gives, and the heads."""

    text: int
    inner: int
    heads: int


class ModelCall(NamedTuple):
    """What image prompts need to know of one call of a base model.

    given     its arguments, by name
    rows      of the batch, as attentions see it
    text      text states (B, T, D); the same tensor in every step of a picture
    place     gives the call's place, () or (B,), in a table of that many points over the schedule,
              from noise to the picture; between two points it is the later one
    grids     gives the sizes, rows and columns, in which layers see the latents; of a video the
              number of frames stands before them
    positive_first  whether a call with both branches of guidance has the positive one first
    model     the model itself
    """

    given: Mapping[str, Any]
    rows: int
    text: Tensor
    place: Callable[[int], Tensor]
    grids: Callable[[], Sequence[tuple[int, ...]]]
    positive_first: bool = False
    model: Any = None


class Tasks(NamedTuple):
    """Names of diffusers' pipelines over the same networks, by what they start from."""

    text: str
    image: str
    inpaint: str


class TaskTable(NamedTuple):
    """Tasks of one class of saved pipelines, plain and with a ControlNet."""

    plain: Tasks | None = None
    controlled: Tasks | None = None


class ControlKind(NamedTuple):
    """ControlNets of a family: diffusers' class, and sizes in which they equal the base model."""

    model: str
    sizes: tuple[str, ...]


def start_states(own: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor) -> None:
    """Start W'_k and W'_v, each (inner, text), from a layer's own W_k and W_v if these are as wide.

    Else W'_v is zero: the new adapter adds nothing, to the bit, and its first steps cannot disturb
    the base. W'_v has a gradient all the same, which the keys choose; after one step W'_k and the
    projection have theirs. Small random values would save a few steps of W'_v only: AdamW moves
    each weight by the learning rate in every step.
    """
    if own is not None and own[0].shape == key.shape:
        key.copy_(own[0])
        value.copy_(own[1])
    else:
        value.zero_()


def schedule_place(progress: Tensor, points: int) -> Tensor:
    """Return the place, see `ModelCall`, for a progress from 0 to 1."""
    return (progress * (points - 1) - ROUNDING).ceil().long()


def time_of_rows(timestep: Any) -> Tensor:
    """Return the time () or (B,) of a call from a timestep that may be given for every place.

    Places of a picture that is given, such as a video's first frame, are told an earlier time than
    those that are made: a row's time is that of its noisiest place, which has the largest value.
    """
    time = torch.as_tensor(timestep)
    return time.flatten(1).amax(1) if time.ndim > 1 else time


Conditions = Mapping[str, Tensor]
"""Inputs of a model in training other than latents and timestep.

They are "text" (B, T, D), and by family "pooled" (B, P), "text_mask" (B, T), a second text and mask
("text_t5", "text_t5_mask"), and "time_ids" (B, 6), sizes as `imprompt.training.buckets.fit` gives
them.
"""


class Injection(Protocol):
    """Injection of adapters into one base model."""

    layers: dict[str, Any]
    sizes: dict[str, LayerSize]
    timesteps: int  # of the schedule that the model was trained with

    @property
    def dtype(self) -> torch.dtype:
        """Precision that the layers compute in."""
        ...

    def sizes_of(self, form: Any) -> Mapping[str, LayerSize]:
        """Return the sizes of the layers that adapters of a published form, or None, condition."""
        ...

    def widen(self, tokens: Tensor, width: int) -> Tensor:
        """Return image tokens (B, N, D) `width` wide, by the model's own projection of text."""
        ...

    def using(self, prompts: Sequence[ImagePrompt], image_guidance: float | None = None,
              *, timed: bool = False) -> AbstractContextManager[None]:  # fmt: skip
        """Condition this thread's calls of the model on the prompts in a `with` block.

        timed  whether timesteps are known to tell progress
        """
        ...

    def hook(self, model: nn.Module) -> None:
        """Be called before and after each call of `model`, and of no other."""
        ...

    def by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call of the model by name."""
        ...

    def eject(self) -> None:
        """Remove one adapter; the last one to be removed restores the base model."""
        ...

    def cached_bytes(self) -> int:
        """Return the size of the cached text states in bytes."""
        ...

    def clear_cache(self) -> None:
        """Remove the cached text states."""
        ...


class Family(ABC):
    """A kind of base models: where and how adapters are injected into them."""

    name: str
    classes: tuple[str, ...]  # names of diffusers' models that belong to it; the first is usual
    pipelines: Mapping[str, TaskTable]  # by the class that a model was saved with
    channel: str | None  # keyword by which the model passes arguments to its attentions, if it does
    arguments: tuple[str, str, str]  # names of latents, timestep and text in the forward pass
    component: str  # name of the base model in a pipeline
    shared: tuple[str, ...] = ()  # arguments that are for all rows
    text_arguments: tuple[str, ...] = ()  # those that hold the text, which guidance leaves empty
    lists: tuple[str, ...] = ()  # arguments that are lists with one entry for each row
    axes: Mapping[
        str, int
    ] = {}  # of the rows in arguments that have them on another than the first
    separate_branches = False  # whether pipelines run each branch of guidance in a separate call
    positive_first = False  # whether those that run both in one call put the positive one first
    positive_alone = False  # whether those also run the positive one alone, and no other
    text_widths: Mapping[int, str] = {}  # of known models -> their name
    text_tokens: int | None = None  # that its pipelines encode; None: the text encoder's number
    control: ControlKind | None = None  # its ControlNets
    trains = True  # whether adapters for it can be trained
    blocks: re.Pattern[str]  # names of what is inside the blocks that hold the attentions
    compiles = "whole"  # as one graph; else its "blocks" are one each, or it compiles in "parts"
    # classes of saved pipelines that adapters can be trained for, besides those of `pipelines`
    trained_pipelines: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()  # settings of saved pipelines that training does not know
    grain = 1  # a picture's side, in latents, must be a multiple of it
    pixel_grain = 1  # and, in pixels, of this, whatever the VAE: so its pipelines check it
    no_words: str | None = None  # the negative text that its pipelines need where none is given
    guidance = "guidance_scale"  # option of their calls that takes the guidance scale
    one_text = False  # whether another text in a batch changes a picture, as texts are padded to it

    def __reduce__(self) -> Any:
        """Copy and pickle the family by name: there is one object of each family."""
        return find_family, (self.name,)

    def matches(self, model: nn.Module) -> bool:
        """Return whether `model` is of a class of this family and has text cross-attentions."""
        kinds = {kind.__name__ for kind in type(original(model)).__mro__}
        return not kinds.isdisjoint(self.classes) and bool(self.layers(model))

    @abstractmethod
    def layers(self, model: nn.Module) -> dict[str, Any]:
        """Return the text cross-attentions by name, in the order of published checkpoints."""

    @abstractmethod
    def size(self, layer: Any) -> LayerSize:
        """Return the sizes of one of the layers."""

    @abstractmethod
    def start(self, layer: Any, key: Tensor, value: Tensor) -> None:
        """Initialise W'_k and W'_v, each (inner, text), of a new adapter at that layer."""

    def norms_queries(self, model: nn.Module) -> bool | None:  # noqa: ARG002
        """Return whether the model norms the queries that the image's attention reads.

        None where that attention cannot have a norm of its own, as in published UNet layouts.
        """
        return None

    def attentions(self, model: Any) -> dict[str, Any]:
        """Return the attentions that a low-rank part is added to, in the order of its files.

        Raise MismatchError if the family has none.
        """
        raise MismatchError(f"FaceID's low-rank part is for UNets, not for {type(model).__name__}")

    @abstractmethod
    def inject(self, model: nn.Module, low_rank: bool) -> Injection:
        """Inject one more adapter; with `low_rank` it acts on self-attentions too."""

    @abstractmethod
    def call(self, model: nn.Module, given: Mapping[str, Any], timesteps: int) -> ModelCall:
        """Return what image prompts need to know of a call with these arguments, by name.

        timesteps  of the schedule that the model was trained with
        """

    @abstractmethod
    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the text part of `Conditions`, as the family's pipelines encode captions."""

    @abstractmethod
    def predict(self, model: Any, prompt: ImagePrompt | None, noisy: Tensor, timestep: Tensor,
                conditions: Conditions) -> Tensor:  # fmt: skip
        """Return the prediction (B, C, h, w) for latents of that shape, in the model's precision.

        prompt    None for the base model alone
        timestep  (B,) as the scheduler numbers them
        """

    @abstractmethod
    def condition_shapes(
        self, config: Mapping[str, Any], tokens: int
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one sample's `Conditions` for a text of that many tokens."""

    def mu(self, config: Mapping[str, Any], latents: Tensor) -> float:
        """Return μ, by which timesteps are shifted for latents (B, C, h, w), as in sampling.

        config  of a scheduler with `use_dynamic_shifting`
        """
        return mu_by_places(config, latents)

    def text_length(self, config: Mapping[str, Any]) -> int:
        """Return the number of text tokens that its pipelines encode.

        config  of the text encoder, whose number it is if the family has none
        """
        return self.text_tokens or config["max_position_embeddings"]

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """Return C of the latents (B, C, h, w) that a model of this configuration reads."""
        return config["in_channels"]

    def native_latents(self, config: Mapping[str, Any]) -> int:
        """Return the side, in latents, of the pictures that a model was made for.

        Its configuration states it, or it is 64.
        """
        return config.get("sample_size") or 64  # 64 if the configuration states none

    def native_side(self, pipeline: Any) -> int:
        """Return the side, in pixels, of the pictures that the pipeline's model was made for."""
        model = getattr(pipeline, self.component)
        return self.native_latents(model.config) * self.latent_pixels(pipeline)

    def latent_pixels(self, pipeline: Any) -> int:
        """Return the number of pixels along a side of one latent."""
        return pipeline.vae_scale_factor

    def made_size(self, pipeline: Any, width: int, height: int) -> tuple[int, int]:  # noqa: ARG002
        """Return the width and height that the pipeline makes where it is asked for these."""
        return width, height

    def side_unit(self, pipeline: Any) -> int:
        """Return what the sides of a picture, in pixels, must be multiples of."""
        return lcm(self.latent_pixels(pipeline) * self.grain, self.pixel_grain)

    def guided(self, pipeline: Any, guidance: float, options: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Return whether the pipeline runs a negative branch with these arguments."""
        return guidance > 1

    def control_sizes(self, net: Any, pipeline: Any) -> dict[str, tuple[Any, Any]]:
        """Return the sizes in which a ControlNet and the pipeline must agree, by name: of both."""
        assert self.control is not None
        own = getattr(pipeline, self.component).config
        return {name: (net.config[name], own[name]) for name in self.control.sizes}

    def quicken(self, model: Any) -> None:  # noqa: B027 - most train as they are
        """Make the model train faster on a CPU; its results are equal up to rounding."""

    def call_options(self, pipeline: Any) -> dict[str, Any]:  # noqa: ARG002
        """Return what every call of the pipeline is given."""
        return {}

    def channel_kwargs(self, prompt: ImagePrompt | None) -> dict[str, Any]:
        """Return the keyword that passes an image prompt, if any, to a model that has a channel."""
        if prompt is None:
            return {}
        assert self.channel is not None
        return {self.channel: {KEY: prompt}}

    def build(self, config: Mapping[str, Any]) -> Any:
        """Return an untrained model of that configuration."""
        own = config.get("_class_name")
        name = own if own in self.classes else self.classes[0]
        return getattr(import_module("diffusers"), name).from_config(dict(config))

    def known_by_text(self, width: int) -> str:
        """Return " (the model)" whose text has that width, or an empty string."""
        return f" ({self.text_widths[width]})" if width in self.text_widths else ""


def mu_by_places(config: Mapping[str, Any], latents: Tensor) -> float:
    """Return diffusers' usual μ for latents (B, C, h, w) whose places are 2 × 2 of them."""
    return linear_mu(config, latents.shape[-2] // 2 * (latents.shape[-1] // 2))


def linear_mu(config: Mapping[str, Any], places: int) -> float:
    """Return μ that is linear in the number of places, from `base_shift` to `max_shift`."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (places - few) / (many - few)


def nested_shapes(value: Any) -> Any:
    """Return the shapes of tensors in nested lists, and None for anything else."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return tuple(map(nested_shapes, value)) if isinstance(value, list | tuple) else None


def original(model: nn.Module) -> nn.Module:
    """Return the model inside what `torch.compile` returned, or the model itself."""
    return getattr(model, "_orig_mod", model)


def positional_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names that a model's forward pass gives its arguments, in order."""
    return tuple(signature(type(original(model)).forward).parameters)[1:]


def find_family(name: str) -> Family:
    """Return the family of that name; MismatchError if there is none."""
    if name not in FAMILIES:
        raise MismatchError(f"unknown base-model family {name!r}; known: {', '.join(FAMILIES)}")
    return import_module(FAMILIES[name]).FAMILIES[name]


def family_of(model: nn.Module) -> Family:
    """Return the family that `model` belongs to; MismatchError if none."""
    for name in FAMILIES:
        if (found := find_family(name)).matches(model):
            return found
    name = type(original(model)).__name__
    if name in MODELS:
        raise MismatchError(f"{name} takes no image prompts: {MODELS[name]}")
    raise MismatchError(
        f"{name} is not of a known family ({', '.join(FAMILIES)}), or it "
        "has no text cross-attention for image prompts: `imprompt families` prints the table, and "
        "docs/families.md says how to add a row"
    )


def families() -> Iterator[Family]:
    """Return an iterator over all families."""
    return map(find_family, FAMILIES)


def base_of(pipeline: Any) -> Any:
    """Return the base model of a pipeline; MismatchError if it has no known one."""
    for known in families():
        if (model := getattr(pipeline, known.component, None)) is not None:
            return model
    raise MismatchError(
        f"a {type(pipeline).__name__} has no base model that supports image prompts"
    )


def pipeline_family(kind: str, *, trained: bool = False) -> Family:
    """Return the family that a class of pipelines belongs to; SettingError if none.

    trained  whether those count too that adapters are only trained for
    """
    names: list[str] = []
    for known in families():
        own = [*known.pipelines, *(known.trained_pipelines if trained else ())]
        if kind in own:
            return known
        names += own
    raise SettingError(f"image prompts are supported for {', '.join(names)}; this is a {kind}")
