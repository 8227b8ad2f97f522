"""The UNets of Stable Diffusion 1.x, 2.x, SDXL and Kolors.

Their `attn2` layers are the text cross-attentions (section 3.2.2 of the paper). The text's keys and
values are projected once and cached while the text lives, and a Triton kernel computes text and
image attention together where it is faster.

Shape letters as in `imprompt.adapter`; C is the width of the hidden states.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imprompt.adapter import KV, ImageStates, attention, decoupled_attention, split_heads
from imprompt.attention.autotune import kernel_is_faster, may_use_kernel
from imprompt.attention.blockwise import SelfAttention
from imprompt.attention.conditioning import (
    Masks,
    Weights,
    base_is_trained,
    check_widths,
    images_of,
    low_ranks_of,
    masks_at,
    weights_at,
)
from imprompt.attention.injection import Arguments, ModelInjection
from imprompt.attention.low_rank import LowRank, project, project_text
from imprompt.attention.text_cache import (
    LIMIT,
    TextCache,
    TextEntry,
    autocast_dtype,
    can_cache,
    can_call,
    plain_weight,
)
from imprompt.errors import MismatchError
from imprompt.families.base import (
    Conditions,
    ControlKind,
    Family,
    LayerSize,
    ModelCall,
    Tasks,
    TaskTable,
    schedule_place,
    start_states,
)
from imprompt.prompt import KEY, ImagePrompt

KOLORS_TOKENS = 256  # of its texts; the configuration of its text encoder states no number


class StepConditioning(NamedTuple):
    """Conditioning of the attentions in one call of the model.

    source    (B, T, D): the text that `text` was projected from
    text      keys and values by layer; None where the layer projects it itself
    images    by layer, then prompt
    packed    by layer, `images` packed for the kernel (`fused.Packed`); empty if it cannot run
    weights   scale × mask: see `imprompt.attention.conditioning`
    fused     by layer, whether the kernel is used, None if not known yet; empty as `packed`
    low_rank  by attention, self-attentions too: what is added to its projections
    """

    source: Tensor
    text: tuple[KV | None, ...]
    images: tuple[tuple[ImageStates, ...], ...]
    packed: tuple[Any, ...]
    weights: Weights
    fused: list[bool | None]
    low_rank: tuple[LowRank, ...] = ()

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor,
                  mask: Tensor | None) -> Tensor:  # fmt: skip
        """Compute a layer's decoupled attention; shapes as in `imprompt.adapter`."""
        weight = self.weights[0 if 0 in self.weights else query.shape[2]][layer]
        if self.fused and mask is None:
            packed = self.packed[layer]
            if self.fused[layer] is None and not torch.compiler.is_compiling():
                self.fused[layer] = kernel_is_faster(query, key, value, packed, weight)
            if self.fused[layer] and not base_is_trained(key, value, weight):
                from imprompt.attention.fused import fused_attention

                return fused_attention(query, key, value, packed, weight)
        return decoupled_attention(query, key, value, mask, self.images[layer], weight)

    @property
    def undecided(self) -> bool:
        """Whether a layer still has to time the kernel, which a compiled graph cannot do."""
        return None in self.fused


class DecoupledAttention:
    """Attention processor of diffusers with the image prompts' attention added.

    It holds no weights. For a self-attention, where `layer` is None, it computes diffusers' own
    attention, with an adapter's low-rank part if there is one.
    """

    def __init__(self, number: int, layer: int | None) -> None:
        self.number, self.layer = number, layer

    def __call__(self, attn: Any, hidden_states: Tensor,
                 encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None,
                 temb: Tensor | None = None,  # noqa: ARG002 - diffusers passes it
                 ip_hidden_states: StepConditioning | None = None) -> Tensor:  # fmt: skip
        """Compute the attention of one layer, with the image prompts' if the call has some.

        hidden_states (B, L, C), text (B, T, D), mask (B·H, 1, T) or None -> (B, L, C).
        """
        if not isinstance(ip_hidden_states, (StepConditioning, type(None))):
            raise MismatchError(
                "give cross_attention_kwargs by name: the hook that prepares image prompts "
                "does not find them otherwise"
            )
        step = ip_hidden_states
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            rows = text.shape[1], text.shape[0]
            mask: Tensor = attn.prepare_attention_mask(attention_mask, *rows)
            attention_mask = mask.unflatten(0, (-1, attn.heads))
        low_rank = step.low_rank[self.number] if step is not None and step.low_rank else None
        query = project(attn.to_q, hidden_states, low_rank and low_rank.to_q)
        query = split_heads(query, attn.heads)
        prepared = None
        if step is not None and self.layer is not None and step.source is text:
            prepared = step.text[self.layer]
        key, value = prepared or project_text(attn, text, low_rank)
        if step is None or self.layer is None:
            out = attention(query, key, value, attention_mask)
        else:
            out = step.attention(self.layer, query, key, value, attention_mask)
        out = out.transpose(1, 2).flatten(2)  # (B, H, L, d) -> (B, L, H·d)
        return attn.to_out[1](project(attn.to_out[0], out, low_rank and low_rank.to_out))


class UNetInjection(ModelInjection):
    """Injection into a UNet: see `imprompt.families.base.Injection`."""

    def __init__(self, model: nn.Module, family: "UNetFamily") -> None:
        super().__init__(model, family)
        self.every = family.attentions(model)
        self.text_projection = getattr(model, "encoder_hid_proj", None)  # Kolors'
        self.cache = TextCache()
        self.fused: dict[Any, list[bool | None]] = {}  # by everything that the speed depends on
        self.inject(self.layers)

    def attentions(self) -> dict[str, Any]:
        """Return cross- and self-attentions by name."""
        return self.every

    def classes(self) -> Collection[type]:
        """Return the class of our processors."""
        return (DecoupledAttention,)

    def inject(self, names: Collection[str]) -> None:
        """Replace the processors of these attentions."""
        layers = {name: number for number, name in enumerate(self.layers)}
        processors = {
            name: DecoupledAttention(number, layers.get(name))
            for number, name in enumerate(self.every)
            if name in names
        }
        self.replace(self.every, processors)

    def cached_bytes(self) -> int:
        """Return the size of the cached text states in bytes."""
        return self.cache.bytes

    def clear_cache(self) -> None:
        """Remove the cached text states."""
        self.cache.clear()

    def hand_over(self, arguments: Arguments, call: ModelCall,
                  prompts: tuple[ImagePrompt, ...]) -> Arguments:  # fmt: skip
        """Replace the image prompts in the call's keyword by the step's conditioning."""
        args, kwargs = arguments
        step = self.step(call, prompts) if prompts else None
        channel_kwargs = kwargs.get("cross_attention_kwargs") or {}
        return args, {**kwargs, "cross_attention_kwargs": {**channel_kwargs, KEY: step}}

    def step(self, call: ModelCall, prompts: tuple[ImagePrompt, ...]) -> StepConditioning:
        """Return the conditioning of one call; parts that have not changed come from the cache."""
        scales = [prompt.scale for prompt in prompts]
        masks = [prompt.mask for prompt in prompts]
        biases = [prompt.bias for prompt in prompts if prompt.bias is not None]
        low_ranks = [prompt.low_rank for prompt in prompts if prompt.low_rank]
        states = [state for prompt in prompts for state in (prompt.keys, prompt.values)]
        text, dtype, grids = call.text, prompts[0].keys[0].dtype, call.grids()
        kernel = may_use_kernel(text.device, dtype) and not biases
        copied = [s for pair in states for s in pair] if kernel and len(prompts) > 1 else []

        def images() -> tuple[Any, Any, Any]:
            for prompt in prompts:
                check_widths(prompt, self.sizes)
            found = images_of(prompts)
            return found, packed_for(found) if kernel else (), low_ranks_of(prompts)

        def sized() -> Masks:
            return masks_at(masks, grids, dtype)

        given = [mask for mask in masks if mask is not None]
        if can_cache(text, *scales, *biases, *given, *copied):
            entry = self.cache.entry(text)
            steady = all(scale.ndim == 2 for scale in scales)
            made, packed, low_rank = entry.images.get(
                lambda _: (states + copied + biases + low_ranks, kernel), images
            )
            projected = self.text_states(entry, text, low_rank)
            seen = entry.masks.get(lambda _: (masks, (grids, dtype)), sized) if given else {}
            # Scales that change over time are computed in every step.
            sources = (scales + masks, (grids, dtype)) if steady else ([object()], None)
            weights = entry.weights.get(
                lambda _: sources, lambda: weights_at(scales, seen, call.place, dtype)
            )
        else:
            projected, (made, packed, low_rank) = (None,) * len(self.layers), images()
            weights = weights_at(scales, sized(), call.place, dtype)
        fused = self.kernel_choices(call, prompts) if kernel else []
        return StepConditioning(text, projected, made, packed, weights, fused, low_rank)

    def text_states(self, entry: TextEntry, text: Tensor,
                    low_rank: tuple[LowRank, ...]) -> tuple[KV | None, ...]:  # fmt: skip
        """Return keys and values of the text (B, T, D) by layer; None where they are not cached."""
        width = text.shape[-1]

        def sources(states: Any) -> tuple[list[Any], Any]:
            projections = [
                layer._modules[name] for layer in self.layers.values() for name in ("to_k", "to_v")
            ]
            weights = [plain_weight(projection, width) for projection in projections]
            waits = states is None or None in states  # for weights that may have been loaded since
            at_hand = waits and [can_call(weight, text) for weight in weights]
            return [*weights, low_rank], (text._version, autocast_dtype(text), at_hand)

        return entry.states.get(sources, lambda: self._project(entry, text, low_rank))

    def _project(self, entry: TextEntry, text: Tensor,
                 low_rank: tuple[LowRank, ...]) -> tuple[KV | None, ...]:  # fmt: skip
        entry.states.found = None, None  # frees the memory for the new states
        left, width = LIMIT - self.cache.bytes, text.shape[-1]
        added = dict(zip(self.every, low_rank, strict=True)) if low_rank else {}
        states: list[KV | None] = []
        for name, layer in self.layers.items():
            needs = 2 * text.shape[:2].numel() * layer.to_k.out_features * text.element_size()
            weights = [plain_weight(projection, width) for projection in (layer.to_k, layer.to_v)]
            fits = needs <= left and all(can_call(weight, text) for weight in weights)
            states.append(project_text(layer, text, added.get(name)) if fits else None)
            left -= needs * fits
        return tuple(states)

    def kernel_choices(self, call: ModelCall, prompts: Sequence[ImagePrompt]) -> list[bool | None]:
        """Return `StepConditioning.fused` for calls like this one."""
        given = tuple((prompt.keys[0].shape[2], prompt.mask is None) for prompt in prompts)
        text, trained = call.text, torch.is_grad_enabled()
        dtype = prompts[0].keys[0].dtype
        case = (text.device, dtype, call.rows, tuple(call.grids()), text.shape[1], given, trained)
        return self.fused.setdefault(case, [None] * len(self.layers))


def task_table(prefix: str) -> TaskTable:
    """Return the table for pipelines whose names begin with `prefix`."""
    return TaskTable(
        *(
            Tasks(f"{start}Pipeline", f"{start}Img2ImgPipeline", f"{start}InpaintPipeline")
            for start in (prefix, f"{prefix}ControlNet")
        )
    )


def packed_for(images: Sequence[Sequence[ImageStates]]) -> tuple[Any, ...]:
    """Pack the image prompts' keys and values by layer for the kernel."""
    from imprompt.attention import fused

    return tuple(map(fused.pack_images, images))


class UNetFamily(Family):
    """The family of UNets: see `imprompt.families.base.Family`."""

    name = "unet"
    component = "unet"
    classes = ("UNet2DConditionModel", "UNetMotionModel")
    pipelines: Mapping[str, TaskTable] = {
        f"{prefix}Pipeline": task_table(prefix)
        for prefix in ("StableDiffusion", "StableDiffusionXL")
    } | {"KolorsPipeline": TaskTable(Tasks("KolorsPipeline", "KolorsImg2ImgPipeline", ""))}
    control = ControlKind("ControlNetModel", ("cross_attention_dim", "block_out_channels"))
    pixel_grain = 8
    channel = "cross_attention_kwargs"
    arguments = ("sample", "timestep", "encoder_hidden_states")
    text_arguments = (
        "encoder_hidden_states", "added_cond_kwargs", "encoder_attention_mask", "class_labels"
    )  # fmt: skip
    blocks = re.compile(r"(.+\.)?attentions\..+")
    text_widths: Mapping[int, str] = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}

    def attentions(self, model: Any) -> dict[str, Any]:
        """Return cross- and self-attentions by name, in the order of published checkpoints."""
        # attn_processors lists down blocks, up blocks, then the middle: the published numbers.
        names = [name.removesuffix(".processor") for name in model.attn_processors]
        return {
            name: model.get_submodule(name)
            for name in names
            if name.endswith(("attn1", "attn2")) and "motion_modules" not in name.split(".")
        }

    def layers(self, model: nn.Module) -> dict[str, Any]:
        """Return the `attn2` layers by name, in the order of published checkpoints."""
        found = self.attentions(model)
        return {name: layer for name, layer in found.items() if name.endswith("attn2")}

    def size(self, layer: Any) -> LayerSize:
        """Return the sizes of a layer, read from its own W_k."""
        return LayerSize(layer.to_k.in_features, layer.to_k.out_features, layer.heads)

    def start(self, layer: Any, key: Tensor, value: Tensor) -> None:
        """Start from the layer's own W_k and W_v, which read the text, if tokens are as wide."""
        start_states((layer.to_k.weight.data, layer.to_v.weight.data), key, value)

    def inject(self, model: nn.Module, low_rank: bool) -> UNetInjection:
        """Inject one more adapter; with `low_rank` it acts on self-attentions too."""
        injection = UNetInjection.of(model, lambda: UNetInjection(model, self))
        if low_rank:
            injection.inject(injection.every)
        return injection

    def control_sizes(self, net: Any, pipeline: Any) -> dict[str, tuple[Any, Any]]:
        """Return the sizes in which both must agree, and the pixels a latent of the picture."""
        shrinks = 2 ** (len(net.config.conditioning_embedding_out_channels) - 1)
        pixels = {"pixels a latent": (shrinks, pipeline.vae_scale_factor)}
        return super().control_sizes(net, pipeline) | pixels

    def guided(self, pipeline: Any, guidance: float, options: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Return whether the pipeline runs a negative branch; guidance-distilled UNets run none."""
        return guidance > 1 and pipeline.unet.config.time_cond_proj_dim is None

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the captions' text states and, if the pipeline has them, the pooled ones."""
        found = pipeline.encode_prompt(
            list(captions),
            device=pipeline.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        names = ("text", None, "pooled", None)  # None: results for the negative branch
        return {name: part for name, part in zip(names, found, strict=False) if name}

    def predict(self, model: Any, prompt: ImagePrompt | None, noisy: Tensor, timestep: Tensor,
                conditions: Conditions) -> Tensor:  # fmt: skip
        """Return the UNet's prediction (B, C, h, w) for noisy latents of that shape."""
        added = None
        if "pooled" in conditions:
            added = {"text_embeds": conditions["pooled"], "time_ids": conditions["time_ids"]}
            added = {name: value.to(model.dtype) for name, value in added.items()}
        text, channel_kwargs = conditions["text"].to(model.dtype), self.channel_kwargs(prompt)
        return model(
            noisy.to(model.dtype), timestep, text, added_cond_kwargs=added, **channel_kwargs
        ).sample

    def quicken(self, model: Any) -> None:
        """Replace the processors of self-attentions by ones that keep no whole score matrices."""
        own, quick = model.attn_processors, SelfAttention()
        quicker = {name: quick if ".attn1." in name else one for name, one in own.items()}
        model.set_attn_processor(quicker)

    def text_length(self, config: Mapping[str, Any]) -> int:
        """Return the text encoder's number of tokens; Kolors' pipelines encode KOLORS_TOKENS."""
        return config.get("max_position_embeddings", KOLORS_TOKENS)

    def condition_shapes(
        self, config: Mapping[str, Any], tokens: int
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one sample's text and, in SDXL and Kolors, pooled text and sizes."""
        width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
        shapes = {"text": (tokens, width)}
        if config.get("addition_embed_type") != "text_time":  # pooled text and six sizes
            return shapes
        width = config["projection_class_embeddings_input_dim"]
        return {
            **shapes,
            "pooled": (width - 6 * config["addition_time_embed_dim"],),
            "time_ids": (6,),
        }

    def call(self, model: Any, given: Mapping[str, Any], timesteps: int) -> ModelCall:
        """Return rows, text, place and grids of a call with these arguments.

        The frames of a video count as rows.
        """
        latents, timestep, text = (given[name] for name in self.arguments)
        frames = latents.shape[2] if latents.ndim == 5 else 1  # a video's frames are rows
        height, width = latents.shape[-2:]
        levels = range(len(model.config.block_out_channels))
        # Each level has half the side of the one before, rounded up.
        grids = [(-(-height // 2**level), -(-width // 2**level)) for level in levels]

        def place(points: int) -> Tensor:
            """Return the place of a timestep that counts down to 0, a number, () or (B,)."""
            now, last = torch.as_tensor(timestep), timesteps - 1
            if points == timesteps:
                return last - now.long()
            return schedule_place(1 - now / last, points)

        return ModelCall(given, len(latents) * frames, text, place, lambda: grids)


UNET = UNetFamily()
FAMILIES = {"unet": UNET}
