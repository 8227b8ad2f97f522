"""Diffusion transformers: a row describes one class of them; all other code is common.

Shape letters as in `imprompt.adapter`.
"""

import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imprompt.attention.conditioning import (
    check_rows,
    check_widths,
    images_of,
    masks_at,
    weights_at,
)
from imprompt.attention.injection import Arguments, ModelInjection
from imprompt.attention.text_cache import CachedValue
from imprompt.errors import MismatchError, SettingError
from imprompt.families.base import (
    Conditions,
    ControlKind,
    Family,
    LayerSize,
    ModelCall,
    TaskTable,
    mu_by_places,
    nested_shapes,
    original,
    schedule_place,
    start_states,
    time_of_rows,
)
from imprompt.families.forms import AttentionForm
from imprompt.families.processor import (
    ImageProcessor,
    LayerConditioning,
    Taps,
    processor_for,
    unreached,
)
from imprompt.families.text_rows import weights_of, with_bias, with_rows
from imprompt.families.timed import at_time, norms_of
from imprompt.prompt import KEY, ImagePrompt

QUERIES, KEYS, VALUES = ("to_q", "to_query"), ("to_k", "to_key"), ("to_v", "to_value")
NUMBER = r"\.\d+"  # of a block in its list, in the pattern of a row's layers
Given = Mapping[str, Any]  # arguments of a call of the model, by name


@dataclass(frozen=True)
class Training:
    """What training needs to know of one class of transformers.

    encode_text        (pipeline, captions, options of its encoder) -> the text part of `Conditions`
    inputs             (model, latents, time, conditions) -> arguments of its forward pass
    output             (its output, latents) -> what it predicts, shaped as the latents
    condition_shapes   (configuration, text tokens) -> shapes of one sample's `Conditions`
    latent_channels    of a configuration
    time               the scheduler's timesteps -> what the model is told
    sign               -1 for a model that answers the velocity from noise to picture: its pipelines
                       negate it for their scheduler, whose velocity leads to the noise
    mu                 (a scheduler's configuration, latents) -> by how much its pipelines shift
                       timesteps for such latents
    pipelines          classes of saved pipelines that are trained for, besides those of the row
    unlike             settings of a saved pipeline that, where they are on, make it call its models
                       in a way that training does not know
    """

    encode_text: Callable[[Any, list[str], Given], dict[str, Tensor]]
    inputs: Callable[[Any, Tensor, Tensor, Conditions], dict[str, Any]]
    output: Callable[[Any, Tensor], Tensor]
    condition_shapes: Callable[[Given, int], dict[str, tuple[int, ...]]]
    latent_channels: Callable[[Given], int] = lambda config: config["in_channels"]
    time: Callable[[Tensor], Tensor] = lambda timestep: timestep
    sign: int = 1
    mu: Callable[[Given, Tensor], float] = mu_by_places
    pipelines: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """What is particular to the pipelines of one class of transformers.

    pipelines          tasks by the class of a saved pipeline
    text_tokens        that its pipelines encode, or fewer where the tokenizer takes fewer
    tokenizer          name, in a pipeline, of the tokenizer of that text
    grain              a picture's side, in latents, must be a multiple of it
    pixel_grain        and, in pixels, of this, whatever the VAE
    made_size          (pipeline, width, height) -> those that it makes where it is asked for these
    latent_pixels      name of a pipeline's number of pixels along a side of one latent
    native_latents     of a configuration: side, in latents, of the pictures that it was made for
    call_options       what its pipelines are always called with
    guidance           option of a pipeline's call that takes the guidance scale
    negative           option of a pipeline's call that turns on a negative branch when above
                       `unguided`, in pipelines that take a negative text
    unguided           its largest value without a negative branch
    distilled          flag of a pipeline's configuration that turns the negative branch off
    control            its ControlNets
    one_text           whether pipelines pad the texts of a batch to the longest, and do not mask
                       that, so that a picture depends on the other texts of its batch
    """

    pipelines: Mapping[str, TaskTable] = field(default_factory=dict)
    text_tokens: int | None = None
    tokenizer: str = "tokenizer"
    grain: int = 1
    pixel_grain: int = 1
    made_size: Callable[[Any, int, int], tuple[int, int]] = lambda _pipeline, *size: size
    latent_pixels: str = "vae_scale_factor"
    native_latents: Callable[[Given], int] = lambda config: config.get("sample_size") or 128
    call_options: Mapping[str, Any] = field(default_factory=dict)
    guidance: str = "guidance_scale"
    negative: str = "guidance_scale"
    unguided: float = 1.0
    distilled: str = ""
    control: ControlKind | None = None
    one_text: bool = False


@dataclass(frozen=True)
class TransformerRow:
    """What is particular to one class of transformers.

    model              name of the class
    alike              names of other classes to which all else applies
    layers             pattern of the names of the attentions that are conditioned on image prompts
    taps               (layer) -> where its query is recorded and the image's attention is added
    grid               (model, arguments) -> rows and columns of the picture's places, in videos
                       the number of frames before them
    progress           timestep, as the model gets it, and timesteps -> progress
    picture            (model, layer's name, arguments, number of the picture's places) -> which
                       rows of the query belong to the picture
    reads              arguments whose values, not shapes, `grid` and `picture` read
    skips              argument that holds the numbers of blocks that a call leaves out
    arguments          names of latents, timestep and text in the forward pass
    channel            keyword by which the model passes arguments to its attentions, if it does
    text_projection    the model's own projection of text, which tokens of some adapters pass
    text_width         what W' of a new adapter reads; None: what the layer's own W_k reads
    separate_branches  whether pipelines run each branch of guidance in a separate call
    positive_first     whether pipelines that run both in one call put the positive one first
    positive_alone     whether those also run the positive one alone, and no other
    shared             arguments that are for all rows of a batch
    lists              arguments that are lists with one entry for each row
    axes               the axis of the rows in arguments where it is not the first
    text_arguments     those that hold the text
    generation         what is particular to its pipelines
    training           what training needs; None if it is not supported
    compiles           "whole": `torch.compile` makes one graph of the model; "blocks": of each kind
                       of its blocks; "parts": of neither, because of the class's own code
    """

    model: str
    layers: str
    taps: Callable[[Any], Taps]
    grid: Callable[[Any, Given], tuple[int, ...]]
    progress: Callable[[Tensor, int], Tensor]
    picture: Callable[[Any, str, Given, int], slice | Tensor] = lambda *_: slice(None)
    alike: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    skips: str = ""
    arguments: tuple[str, str, str] = ("hidden_states", "timestep", "encoder_hidden_states")
    channel: str | None = None
    text_projection: str = ""
    text_width: Callable[[Any], int] | None = None
    separate_branches: bool = False
    positive_first: bool = False
    positive_alone: bool = False
    shared: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    axes: Mapping[str, int] = field(default_factory=dict)
    text_arguments: tuple[str, ...] = ("encoder_hidden_states", "encoder_attention_mask")
    generation: Generation = Generation()
    training: Training | None = None
    compiles: Literal["whole", "blocks", "parts"] = "whole"


class TransformerInjection(ModelInjection):
    """Injection into a transformer: see `imprompt.families.base.Injection`.

    Calls of one model run one after the other.
    """

    takes_forms = True

    def __init__(self, model: nn.Module, family: "TransformerFamily") -> None:
        super().__init__(model, family)
        self.row = family.row
        self.text_projection = getattr(model, self.row.text_projection, None)
        self.processors: dict[str, ImageProcessor] = {}
        for name, layer in self.layers.items():
            made = processor_for(layer.processor, self.row.taps(layer), self.sizes[name].heads)
            self.processors[name] = made
        self.replace(self.layers, dict(self.processors))
        self.busy = threading.RLock()  # the processors hold the conditioning of a call
        self.seen = CachedValue()  # the picture's places, which no step changes
        self.weights = CachedValue()  # of rows of the text

    def attentions(self) -> dict[str, Any]:
        """Return the cross-attention layers: no others are injected."""
        return self.layers

    def classes(self) -> Collection[type]:
        """Return the classes of our processors, one per class of the original ones."""
        return {type(processor) for processor in self.processors.values()}

    def idle(self, arguments: Arguments) -> Arguments:
        """Remove all conditioning, and hold the model for this call until `release`.

        The model is not passed the prompts themselves: most would warn of them, or drop them.
        """
        if not torch.compiler.is_compiling():  # a graph holds the conditioning of its call itself
            self.busy.acquire()
        self.local.holds = True
        for processor in self.processors.values():
            processor.conditioning = None
        args, kwargs = arguments
        keyword = self.family.channel
        if keyword and KEY in (kwargs.get(keyword) or {}):
            rest = {name: value for name, value in kwargs[keyword].items() if name != KEY}
            kwargs = kwargs | {keyword: rest}
        return args, kwargs

    def picture(self, call: ModelCall) -> tuple[tuple[int, ...], dict[str, slice | Tensor]]:
        """Return the picture's grid, and which rows of each layer's query belong to it."""
        given, row = call.given, self.row
        read = [given[name] for name in row.reads if given.get(name) is not None]
        shapes = nested_shapes([given[name] for name in row.arguments])

        def compute() -> tuple[tuple[int, ...], dict[str, slice | Tensor]]:
            grid, model = call.grids()[0], call.model
            rows = {n: row.picture(model, n, given, prod(grid)) for n in self.processors}
            return grid, rows

        return self.seen.get(lambda _: (read, shapes), compute)

    def hand_over(self, arguments: Arguments, call: ModelCall,
                  prompts: tuple[ImagePrompt, ...]) -> Arguments:  # fmt: skip
        """Set every layer's conditioning for this call."""
        arguments = self.idle(arguments)
        if rows_of_text := [one for one in prompts if one.form and one.form.text_rows]:
            call = self.append(call._replace(given=self.by_name(*arguments)), rows_of_text)
            arguments = (), {**call.given}
            prompts = tuple(one for one in prompts if not (one.form and one.form.text_rows))
        if not prompts:
            return arguments
        grid, rows = self.picture(call)
        for form in dict.fromkeys(prompt.form for prompt in prompts):
            self.condition([one for one in prompts if one.form == form], form, call, grid, rows)
        return arguments

    def append(self, call: ModelCall, prompts: Sequence[ImagePrompt]) -> ModelCall:
        """Return a call whose text goes on with the prompts' rows: see `families.text_rows`."""
        grid = call.grids()[0]
        sources = [x for one in prompts for x in (one.scale, one.mask) if x is not None]
        if any(prompt.scale.ndim == 3 for prompt in prompts):  # it changes with time
            found = weights_of(prompts, call, grid)
        else:
            found = self.weights.get(
                lambda _: (sources, grid), lambda: weights_of(prompts, call, grid)
            )
        pairs = [pair for pair in zip(prompts, found, strict=True) if pair[1].active]
        if not pairs:
            return call
        prompts, weights = zip(*pairs, strict=True)
        given = with_rows(call.given, prompts)
        picture = self.row.picture(call.model, "", given, prod(grid))  # as in blocks of one stream
        assert isinstance(picture, slice)
        return call._replace(given=with_bias(given, prompts, weights, picture, self.dtype))

    def condition(self, prompts: Sequence[ImagePrompt], form: AttentionForm | None, call: ModelCall,
                  grid: tuple[int, ...], rows: Mapping[str, slice | Tensor]) -> None:  # fmt: skip
        """Set the conditioning of the layers of a form by its prompts."""
        sizes = self.sizes_of(form)
        if form is not None and form.timed:
            timestep = call.given[self.family.arguments[1]]
            prompts = [at_time(prompt, timestep, sizes, self.dtype) for prompt in prompts]
        for prompt in prompts:
            check_rows(prompt, call.rows)
            check_widths(prompt, sizes)
        dtype = prompts[0].keys[0].dtype
        masks = masks_at([prompt.mask for prompt in prompts], [grid], dtype)
        scales = [prompt.scale for prompt in prompts]
        (weights,) = weights_at(scales, masks, call.place, dtype).values()
        images, norms = images_of(prompts), norms_of(form, self.dtype)
        text = form is not None and form.text_stream
        for number, name in enumerate(sizes):
            if block_number(name) in (call.given.get(self.row.skips) or ()):
                continue
            own, weight = rows[name], weights[number]
            if form is not None and form.all_rows:
                own, weight = with_text(own, weight)
            processor = self.processors[name]
            made = LayerConditioning(
                images[number], weight, own, form, norms[number] if norms else (), text
            )
            processor.conditioning = (*(processor.conditioning or ()), made)
            processor.added = False

    def release(self, model: nn.Module, ended: bool) -> None:
        """Release the model; MismatchError if the image prompts did not reach some layers."""
        if not getattr(self.local, "holds", False):
            return
        try:
            missed = unreached([*self.processors.items()])
            if not torch.is_grad_enabled():  # else a checkpointed layer is run again by backward
                for processor in self.processors.values():
                    processor.conditioning = None
        finally:
            self.local.holds = False
            if not torch.compiler.is_compiling():
                self.busy.release()
        if missed and ended:
            raise MismatchError(
                f"{len(missed)} of the {len(self.processors)} layers of this "
                f"{type(model).__name__} were not reached by the image prompt, such as {missed[0]}"
            )

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name != "busy"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.busy = threading.RLock()


class TransformerFamily(Family):
    """A family of transformers, described by its row: see `imprompt.families.base.Family`."""

    def __init__(self, name: str, row: TransformerRow) -> None:
        self.name, self.row, self.component = name, row, "transformer"
        made = row.generation
        self.classes, self.pipelines, self.no_words = (row.model, *row.alike), made.pipelines, ""
        self.grain, self.pixel_grain = made.grain, made.pixel_grain
        self.text_tokens = made.text_tokens
        self.shared, self.lists, self.axes = row.shared, row.lists, row.axes
        self.channel, self.arguments = row.channel, row.arguments
        self.text_arguments = row.text_arguments
        self.guidance, self.one_text, self.control = made.guidance, made.one_text, made.control
        self.separate_branches = row.separate_branches
        self.positive_first, self.positive_alone = row.positive_first, row.positive_alone
        self.trains, self.compiles = row.training is not None, row.compiles
        self.trained_pipelines = row.training.pipelines if row.training else ()
        self.unlike = row.training.unlike if row.training else ()
        self.pattern = re.compile(row.layers)
        self.blocks = re.compile(row.layers.partition(NUMBER)[0] + NUMBER + r"\..+")

    @property
    def training(self) -> Training:
        """What training needs to know; SettingError if training is not supported."""
        if self.row.training is None:
            raise SettingError(
                f"training is not supported yet for base models of the {self.name} family"
            )
        return self.row.training

    def layers(self, model: nn.Module) -> dict[str, Any]:
        """Return the attentions whose names match the row's pattern."""
        return {
            name: module
            for name, module in original(model).named_modules()
            if self.pattern.fullmatch(name) and hasattr(module, "processor")
        }

    def size(self, layer: Any) -> LayerSize:
        """Return the sizes of a layer; the text's width is the row's or that of its W_k."""
        width = self.row.text_width
        heads = getattr(layer, "heads", None) or layer.num_heads
        query = projection_of(layer, QUERIES)
        inner = heads * layer.head_dim if query is None else query.out_features
        text = projection_of(layer, KEYS).in_features if width is None else width(layer)
        return LayerSize(text, inner, heads)

    def norms_queries(self, model: nn.Module) -> bool:
        """Return whether every query that the image's attention reads is the result of a norm."""
        return all("norm" in self.row.taps(layer).query for layer in self.layers(model).values())

    def start(self, layer: Any, key: Tensor, value: Tensor) -> None:
        """Start from the layer's own W_k and W_v if it reads text, else without effect."""
        own = (projection_of(layer, names) for names in (KEYS, VALUES))
        reads_text = self.row.text_width is None
        start_states(tuple(one.weight.data for one in own) if reads_text else None, key, value)

    def inject(self, model: nn.Module, low_rank: bool) -> TransformerInjection:
        """Inject one more adapter; MismatchError if it has a low-rank part."""
        if low_rank:
            self.attentions(model)
        return TransformerInjection.of(model, lambda: TransformerInjection(model, self))

    def call(self, model: Any, given: Given, timesteps: int) -> ModelCall:
        """Return rows, text, place and grids of a call, as the row computes them."""
        latents, timestep, text = (given[name] for name in self.arguments)
        progress = self.row.progress
        return ModelCall(
            given,
            len(latents),
            text,
            lambda points: schedule_place(progress(time_of_rows(timestep), timesteps), points),
            lambda: [self.row.grid(original(model), given)],
            self.row.positive_first,
            original(model),
        )

    def guided(self, pipeline: Any, guidance: float, options: Given) -> bool:
        """Return whether the row's option turns on a negative branch, if the pipeline has one."""
        takes = {"negative_prompt", "negative_prompt_embeds"} & {
            *signature(pipeline.__call__).parameters
        }
        if not takes or pipeline.config.get(self.row.generation.distilled):
            return False
        value = {self.row.generation.guidance: guidance, **options}.get(
            self.row.generation.negative
        )
        return value is not None and value > self.row.generation.unguided

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the text part of `Conditions`, as the row encodes it."""
        return self.training.encode_text(pipeline, list(captions), self.text_limit(pipeline))

    def text_limit(self, pipeline: Any) -> dict[str, int]:
        """Return the option that limits a text to the tokens that the pipeline's tokenizer takes.

        It is empty where these are not fewer than the row states.
        """
        usual, tokenizer = (
            self.row.generation.text_tokens,
            getattr(pipeline, self.row.generation.tokenizer, None),
        )
        own = getattr(tokenizer, "model_max_length", usual)  # a pipeline may come without one
        return {"max_sequence_length": own} if usual and own and own < usual else {}

    def call_options(self, pipeline: Any) -> dict[str, Any]:
        """Return the row's options, and the limit of the pipeline's texts."""
        return {**self.row.generation.call_options, **self.text_limit(pipeline)}

    def predict(self, model: Any, prompt: ImagePrompt | None, noisy: Tensor, timestep: Tensor,
                conditions: Conditions) -> Tensor:  # fmt: skip
        """Return the prediction, shaped as `noisy`, with the row's inputs, output and sign."""
        row = self.training
        inputs = row.inputs(model, noisy.to(model.dtype), row.time(timestep), conditions)
        with self.prompted(model, prompt) as more:
            return row.sign * row.output(model(**inputs, **more).sample, noisy)

    @contextmanager
    def prompted(self, model: Any, prompt: ImagePrompt | None) -> Iterator[dict[str, Any]]:
        """Yield the keywords that condition a call of an injected model on an image prompt, if any.

        A model without a channel is conditioned while the block runs.
        """
        if prompt is None or self.channel is not None:
            yield self.channel_kwargs(prompt)
            return
        injection = self.inject(model, low_rank=False)
        try:
            with injection.using([prompt]):
                yield {}
        finally:
            injection.eject()

    def mu(self, config: Given, latents: Tensor) -> float:
        """Return μ of the latents, as the row computes it."""
        return self.training.mu(config, latents)

    def condition_shapes(self, config: Given, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one sample's `Conditions`, as the row states them."""
        return self.training.condition_shapes(config, tokens)

    def latent_channels(self, config: Given) -> int:
        """Return C of the latents (B, C, h, w), as the row states it."""
        return self.training.latent_channels(config)

    def latent_pixels(self, pipeline: Any) -> int:
        """Return the number of pixels along a side of one latent, by the row's name for it."""
        return getattr(pipeline, self.row.generation.latent_pixels)

    def made_size(self, pipeline: Any, width: int, height: int) -> tuple[int, int]:
        """Return the size that the pipeline makes, as the row states it."""
        return self.row.generation.made_size(pipeline, width, height)

    def native_latents(self, config: Given) -> int:
        """Return the side of the pictures in latents, as the row states it."""
        return self.row.generation.native_latents(config)


def with_text(rows: slice | Tensor, weight: Tensor) -> tuple[slice, Tensor]:
    """Return rows and weight of a layer whose text is conditioned too, where it stands first.

    Under a mask, whose weight has the picture's I places, the text has the least of them: an item
    with a mask that is white everywhere is as one without, whatever others share the batch.

    weight  (P, B or 1, 1, I or 1, 1)
    """
    assert isinstance(rows, slice)
    if weight.shape[3] == 1:
        return slice(None), weight
    text = rows.start or 0
    least = weight.amin(3, keepdim=True).expand(-1, -1, -1, text, -1)
    return slice(0, text + weight.shape[3]), torch.cat([least, weight], 3)


def block_number(name: str) -> int:
    """Return the number in a layer's name of the block that holds it."""
    return int(next(part for part in name.split(".") if part.isdecimal()))


def projection_of(layer: Any, names: Sequence[str]) -> Any:
    """Return the first projection of an attention that has one of these names; None if none."""
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
