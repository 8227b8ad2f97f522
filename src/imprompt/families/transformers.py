"""Diffusion transformers: a row describes one class of them; all other code is common.

Shape letters as in `imprompt.adapter`.
"""

import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imprompt.attention.conditioning import check_widths, images_of, masks_at, weights_at
from imprompt.attention.injection import Arguments, ModelInjection
from imprompt.errors import MismatchError
from imprompt.families.base import (
    Conditions,
    Family,
    LayerSize,
    ModelCall,
    Tasks,
    TaskTable,
    original,
    schedule_place,
)
from imprompt.families.processor import (
    ImageProcessor,
    LayerConditioning,
    Layout,
    Taps,
    processor_for,
    unreached,
)
from imprompt.prompt import ImagePrompt

GUIDANCE = 3.5  # input of guidance-distilled models in training, as in diffusers' scripts
TIMESTEPS = 1000  # into which Flux divides its time
Given = Mapping[str, Any]  # arguments of a call of the model, by name


@dataclass(frozen=True)
class TransformerRow:
    """What is particular to one class of transformers.

    model              name of the class
    layers             pattern of the names of the attentions that are conditioned on image prompts
    layout             of the query
    arguments          names of latents, timestep and text in the forward pass
    channel            keyword by which the model passes arguments to its attentions, if it does
    query              attribute whose result is the query
    out                attribute of the output layer
    returns            layers that have no output layer: the image is added to what they return
    picture            (layer's name, arguments) -> which rows of the query belong to the picture
    grids              (model, arguments) -> sizes, rows and columns, of the picture's rows
    progress           timestep, as the model gets it, and timesteps -> progress
    separate_branches  whether pipelines run each branch of guidance in a separate call
    shared             arguments that are for all rows of a batch
    text_arguments     those that hold the text
    text_width         what W' of a new adapter reads; None: what the layer's own W_k reads
    pipelines          tasks by the class of a saved pipeline
    encode_text        (pipeline, captions, options of its encoder) -> the text part of `Conditions`
    inputs             (model, latents, timestep, conditions) -> arguments of its forward pass
    output             (its output, latents) -> the prediction, shaped as the latents
    condition_shapes   (configuration, text tokens) -> shapes of one sample's `Conditions`
    latent_channels    of a configuration
    native_latents     of a configuration: side, in latents, of the pictures that it was made for
    text_tokens        that its pipelines encode, or fewer where the tokenizer takes fewer
    tokenizer          name, in a pipeline, of the tokenizer of that text
    grain              a picture's side, in latents, must be a multiple of it
    pixel_grain        and, in pixels, of this, whatever the VAE
    call_options       what its pipelines are always called with
    negative           option of a pipeline's call that turns on a negative branch when above 1
    """

    model: str
    layers: str
    layout: Layout
    channel: str | None
    query: str
    grids: Callable[[Any, Given], list[tuple[int, int]]]
    progress: Callable[[Tensor, int], Tensor]
    pipelines: Mapping[str, TaskTable]
    encode_text: Callable[[Any, list[str], Given], dict[str, Tensor]]
    inputs: Callable[[Any, Tensor, Tensor, Conditions], dict[str, Any]]
    output: Callable[[Tensor, Tensor], Tensor]
    condition_shapes: Callable[[Given, int], dict[str, tuple[int, ...]]]
    text_tokens: int
    grain: int
    tokenizer: str = "tokenizer"
    pixel_grain: int = 1
    latent_channels: Callable[[Given], int] = lambda config: config["in_channels"]
    native_latents: Callable[[Given], int] = lambda config: config.get("sample_size") or 128
    call_options: Mapping[str, Any] = field(default_factory=dict)
    negative: str = "guidance_scale"
    arguments: tuple[str, str, str] = ("hidden_states", "timestep", "encoder_hidden_states")
    out: str = "to_out"
    returns: Callable[[Any], bool] = lambda _layer: False
    picture: Callable[[str, Given], slice] = lambda _name, _given: slice(None)
    separate_branches: bool = False
    shared: tuple[str, ...] = ()
    text_arguments: tuple[str, ...] = ("encoder_hidden_states", "encoder_attention_mask")
    text_width: Callable[[Any], int] | None = None


class TransformerInjection(ModelInjection):
    """Injection into a transformer: see `imprompt.families.base.Injection`.

    Calls of one model run one after the other.
    """

    def __init__(self, model: nn.Module, family: "TransformerFamily") -> None:
        super().__init__(model, family)
        self.row = family.row
        self.processors: dict[str, ImageProcessor] = {}
        for name, layer in self.layers.items():
            out = None if self.row.returns(layer) else self.row.out
            taps = Taps(self.row.query, self.row.layout, out)
            made = processor_for(layer.processor, taps, self.sizes[name].heads)
            self.processors[name] = made
        self.replace(self.layers, dict(self.processors))
        self.busy = threading.RLock()  # the processors hold the conditioning of a call

    def attentions(self) -> dict[str, Any]:
        """Return the cross-attention layers: no others are injected."""
        return self.layers

    def classes(self) -> Collection[type]:
        """Return the classes of our processors, one per class of the original ones."""
        return {type(processor) for processor in self.processors.values()}

    def idle(self, arguments: Arguments) -> Arguments:
        """Remove all conditioning, and hold the model for this call until `release`."""
        self.busy.acquire()
        self.local.holds = True
        for processor in self.processors.values():
            processor.conditioning = None
        return arguments

    def hand_over(self, arguments: Arguments, call: ModelCall,
                  prompts: tuple[ImagePrompt, ...]) -> Arguments:  # fmt: skip
        """Set every layer's conditioning for this call."""
        arguments = self.idle(arguments)
        if not prompts:
            return arguments
        for prompt in prompts:
            check_widths(prompt, self.sizes)
        dtype = prompts[0].keys[0].dtype
        masked = any(prompt.mask is not None for prompt in prompts)  # only masks need the sizes
        grids = call.grids() if masked else ()
        masks = masks_at([prompt.mask for prompt in prompts], grids, dtype)
        scales = [prompt.scale for prompt in prompts]
        (weights,) = weights_at(scales, masks, call.place, dtype).values()
        images = images_of(prompts)
        for number, (name, processor) in enumerate(self.processors.items()):
            rows = self.row.picture(name, call.given)
            processor.conditioning = LayerConditioning(images[number], weights[number], rows)
            processor.added = False
        return arguments

    def release(self, model: nn.Module, ended: bool) -> None:
        """Release the model; MismatchError if the image prompts did not reach some layers."""
        if not getattr(self.local, "holds", False):
            return
        try:
            conditioned = any(one.conditioning is not None for one in self.processors.values())
            missed = unreached([*self.processors.items()]) if conditioned else []
            if not torch.is_grad_enabled():  # else a checkpointed layer is run again by backward
                for processor in self.processors.values():
                    processor.conditioning = None
        finally:
            self.local.holds = False
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
        self.classes, self.pipelines, self.no_words = (row.model,), row.pipelines, ""
        self.grain, self.pixel_grain = row.grain, row.pixel_grain
        self.text_tokens = row.text_tokens
        self.shared, self.text_arguments = row.shared, row.text_arguments
        self.channel, self.arguments = row.channel, row.arguments
        self.separate_branches = row.separate_branches
        self.pattern = re.compile(row.layers)

    def layers(self, model: nn.Module) -> dict[str, Any]:
        """Return the attentions whose names match the row's pattern."""
        return {
            name: module
            for name, module in original(model).named_modules()
            if self.pattern.fullmatch(name) and hasattr(module, "set_processor")
        }

    def size(self, layer: Any) -> LayerSize:
        """Return the sizes of a layer; the text's width is the row's or that of its W_k."""
        width = self.row.text_width
        text = layer.to_k.in_features if width is None else width(layer)
        return LayerSize(text, layer.to_q.out_features, layer.heads)

    def start(self, layer: Any, key: Tensor, value: Tensor) -> None:
        """Start from the layer's own W_k and W_v if it reads text, else with a small W'_v."""
        if key.shape == layer.to_k.weight.shape and self.row.text_width is None:
            key.copy_(layer.to_k.weight.data)
            value.copy_(layer.to_v.weight.data)
        else:
            value.mul_(1e-2)

    def inject(self, model: nn.Module, low_rank: bool) -> TransformerInjection:
        """Inject one more adapter; MismatchError if it has a low-rank part."""
        if low_rank:
            raise MismatchError(
                f"FaceID's low-rank part is for UNets, not for {type(model).__name__}"
            )
        return TransformerInjection.of(model, lambda: TransformerInjection(model, self))

    def call(self, model: Any, given: Given, timesteps: int) -> ModelCall:
        """Return rows, text, place and grids of a call, as the row computes them."""
        latents, timestep, text = (given[name] for name in self.arguments)
        progress = self.row.progress
        return ModelCall(
            given,
            len(latents),
            text,
            lambda points: schedule_place(progress(torch.as_tensor(timestep), timesteps), points),
            lambda: self.row.grids(model, given),
        )

    def guided(self, pipeline: Any, guidance: float, options: Given) -> bool:  # noqa: ARG002
        """Return whether the row's option turns on a negative branch."""
        return {"guidance_scale": guidance, **options}.get(self.row.negative, 1) > 1

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the text part of `Conditions`, as the row encodes it."""
        return self.row.encode_text(pipeline, list(captions), self.text_limit(pipeline))

    def text_limit(self, pipeline: Any) -> dict[str, int]:
        """Return the option that limits a text to the tokens that the pipeline's tokenizer takes.

        It is empty where these are not fewer than the row states.
        """
        usual, tokenizer = self.row.text_tokens, getattr(pipeline, self.row.tokenizer)
        own = getattr(tokenizer, "model_max_length", usual)  # a pipeline may come without one
        return {"max_sequence_length": own} if own < usual else {}

    def call_options(self, pipeline: Any) -> dict[str, Any]:
        """Return the row's options, and the limit of the pipeline's texts."""
        return {**self.row.call_options, **self.text_limit(pipeline)}

    def predict(self, model: Any, prompt: ImagePrompt | None, noisy: Tensor, timestep: Tensor,
                conditions: Conditions) -> Tensor:  # fmt: skip
        """Return the prediction, shaped as `noisy`, with the row's inputs and output."""
        inputs = self.row.inputs(model, noisy.to(model.dtype), timestep, conditions)
        return self.row.output(model(**inputs, **self.channel_kwargs(prompt)).sample, noisy)

    def condition_shapes(self, config: Given, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one sample's `Conditions`, as the row states them."""
        return self.row.condition_shapes(config, tokens)

    def latent_channels(self, config: Given) -> int:
        """Return C of the latents (B, C, h, w), as the row states it."""
        return self.row.latent_channels(config)

    def native_latents(self, config: Given) -> int:
        """Return the side of the pictures in latents, as the row states it."""
        return self.row.native_latents(config)


def by_timestep(timestep: Tensor, timesteps: int) -> Tensor:
    """Return the progress for a model that gets the training timestep."""
    return 1 - timestep / (timesteps - 1)


def by_sigma(sigma: Tensor, _timesteps: int) -> Tensor:
    """Return the progress for a model that gets sigma, from 1 to 0."""
    return 1 - sigma


def patches(model: Any, given: Given) -> list[tuple[int, int]]:
    """Return the grid of latents (B, C, h, w) that are cut into patches."""
    height, width = given["hidden_states"].shape[-2:]
    side = model.config.patch_size
    return [(height // side, width // side)]


def by_ids(_model: Any, given: Given) -> list[tuple[int, int]]:
    """Return the grid of packed latents (B, L, C) from the ids (L, 3) of their places."""
    ids = given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    return [(int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1)]


def after_text(name: str, given: Given) -> slice:
    """Return the picture's rows: all in double blocks, those after the text in single ones."""
    text = given["encoder_hidden_states"].shape[1]
    return slice(text if name.startswith("single") else 0, None)


def pixart_text(pipeline: Any, captions: list[str], options: Given) -> dict[str, Tensor]:
    """Return T5's states, and the mask of those that belong to the caption."""
    text, mask, *_ = pipeline.encode_prompt(captions, False, device=pipeline.device, **options)
    return {"text": text, "text_mask": mask}


def pixart_inputs(
    model: Any, latents: Tensor, timestep: Tensor, given: Conditions
) -> dict[str, Any]:
    """Return the arguments of PixArt's forward pass."""
    return {
        "hidden_states": latents,
        "timestep": timestep,
        "encoder_hidden_states": given["text"].to(model.dtype),
        "encoder_attention_mask": given["text_mask"],
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def flux_text(pipeline: Any, captions: list[str], options: Given) -> dict[str, Tensor]:
    """Return T5's states and CLIP's pooled text."""
    text, pooled, _ = pipeline.encode_prompt(captions, None, device=pipeline.device, **options)
    return {"text": text, "pooled": pooled}


def flux_inputs(model: Any, latents: Tensor, timestep: Tensor, given: Conditions) -> dict[str, Any]:
    """Return the arguments of Flux's forward pass; the latents (B, C, h, w) are packed by 2 × 2."""
    text, packed = given["text"].to(model.dtype), F.pixel_unshuffle(latents, 2)
    rows, columns = torch.meshgrid(*map(torch.arange, packed.shape[2:]), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(packed)
    guidance = latents.new_full((len(latents),), GUIDANCE) if model.config.guidance_embeds else None
    return {
        "hidden_states": packed.flatten(2).mT,
        "timestep": timestep / TIMESTEPS,
        "guidance": guidance,
        "encoder_hidden_states": text,
        "pooled_projections": given["pooled"].to(model.dtype),
        "img_ids": places,
        "txt_ids": text.new_zeros(text.shape[1], 3),
    }


def unpacked(out: Tensor, latents: Tensor) -> Tensor:
    """Unpack an output (B, L, 4 · C) to the shape of the latents (B, C, h, w)."""
    height, width = latents.shape[2:]
    return F.pixel_shuffle(out.mT.unflatten(2, (height // 2, width // 2)), 2)


PIXART = TransformerFamily(
    "pixart",
    TransformerRow(
        model="PixArtTransformer2DModel",
        layers=r"transformer_blocks\.\d+\.attn2",
        layout="BLD",
        channel="cross_attention_kwargs",
        query="to_q",
        grids=patches,
        progress=by_timestep,
        pipelines={
            f"PixArt{kind}Pipeline": TaskTable(Tasks(f"PixArt{kind}Pipeline", "", ""))
            for kind in ("Alpha", "Sigma")
        },
        encode_text=pixart_text,
        inputs=pixart_inputs,
        output=lambda out, latents: out[:, : latents.shape[1]],  # the rest is a learned variance
        condition_shapes=lambda config, tokens: {
            "text": (tokens, config["caption_channels"]),
            "text_mask": (tokens,),
        },
        text_tokens=300,
        grain=2,
        pixel_grain=8,
        call_options={"clean_caption": False, "use_resolution_binning": False},
    ),
)
FLUX = TransformerFamily(
    "flux",
    TransformerRow(
        model="FluxTransformer2DModel",
        layers=r"(single_)?transformer_blocks\.\d+\.attn",
        layout="BLHd",
        channel="joint_attention_kwargs",
        query="norm_q",
        returns=lambda layer: layer.pre_only,
        picture=after_text,
        grids=by_ids,
        progress=by_sigma,
        pipelines={
            "FluxPipeline": TaskTable(
                Tasks("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
            )
        },
        encode_text=flux_text,
        inputs=flux_inputs,
        output=unpacked,
        condition_shapes=lambda config, tokens: {
            "text": (tokens, config["joint_attention_dim"]),
            "pooled": (config["pooled_projection_dim"],),
        },
        text_tokens=512,
        tokenizer="tokenizer_2",
        grain=2,
        latent_channels=lambda config: config["in_channels"] // 4,
        native_latents=lambda _config: 128,
        negative="true_cfg_scale",
        separate_branches=True,
        shared=("img_ids", "txt_ids"),
        text_width=lambda layer: layer.to_q.in_features,
    ),
)
