"""Rows of the transformers that take image prompts: one for each class of diffusers' models.

Shape letters as in `imprompt.adapter`; C channels, h and w of latents, F frames, I the picture's
places.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imprompt.families.base import Conditions, ControlKind, Tasks, TaskTable
from imprompt.families.processor import Layout, Taps
from imprompt.families.transformers import (
    Given,
    Training,
    TransformerFamily,
    TransformerRow,
    projection_of,
)

GUIDANCE = 3.5  # input of guidance-distilled models in training, as in diffusers' scripts
TIMESTEPS = 1000  # into which models that are given sigma divide their time
# Keywords by which models pass arguments to their attentions.
JOINT, PLAIN, CROSS = "joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs"
PICTURES = ("Img2Img", "Inpaint")  # diffusers' names of tasks that start from a picture
PICTURE = 2  # what Ideogram 4 marks the picture's rows with


# --- Progress, of the timestep that the model gets.


def by_timestep(timestep: Tensor, timesteps: int) -> Tensor:
    """Return the progress for a model that gets the training timestep."""
    return 1 - timestep / (timesteps - 1)


def by_sigma(sigma: Tensor, _timesteps: int) -> Tensor:
    """Return the progress for a model that gets sigma, from 1 to 0."""
    return 1 - sigma


def by_progress(time: Tensor, _timesteps: int) -> Tensor:
    """Return the progress for a model that gets it: from 0, noise, to 1, the picture."""
    return time


# --- Grids: rows and columns of the picture's places, in videos the number of frames before them.


def patches(model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of latents (B, C, h, w) or (B, C, F, h, w) that are cut into patches."""
    config, sizes = model.config, list(given["hidden_states"].shape[2:])
    side = config.patch_size
    frames = config.get("patch_size_t") or 1
    cut = [frames, side, side] if isinstance(side, int) else list(side)
    return tuple(size // part for size, part in zip(sizes, cut[-len(sizes) :], strict=True))


def by_ids(ids: Tensor) -> tuple[int, ...]:
    """Return the grid from the ids (I, 3 or 4) of rows: time, row, column.

    Reference pictures follow with another time.
    """
    ids = ids[0] if ids.ndim == 3 else ids
    if ids.is_meta:
        return 1, len(ids)  # the values are not known: an estimate needs their number alone
    own = ids[ids[:, 0] == ids[0, 0]]
    sides = own.amax(0) - own.amin(0) + 1
    return int(sides[1]), int(sides[2])


def image_ids(_model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of packed latents (B, I, C) from their own ids."""
    return by_ids(given["img_ids"])


def joint_ids(_model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of packed latents (B, I, C) from ids (T + I, 3) of text and picture."""
    return by_ids(given["position_ids"][given["encoder_hidden_states"].shape[1] :])


def marked(_model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid from ids (B, T + I, 3), where an indicator marks the picture's rows."""
    return by_ids(given["position_ids"][0][given["indicator"][0] == PICTURE])


def by_shapes(_model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of packed latents from the sizes (F, h, w) of each item's pictures."""
    first = given["img_shapes"][0]
    return tuple(first[0] if isinstance(first, list) else first)


def list_patches(_model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of latents that are a list of (C, F, h, w), cut into patches."""
    side = given.get("patch_size", 2)
    _, frames, height, width = given["x"][0].shape
    return frames // given.get("f_patch_size", 1), height // side, width // side


def last_channels(model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of latents (B, F, h, w, C) that are cut into patches."""
    sizes = given["hidden_states"].shape[1:4]
    return tuple(size // part for size, part in zip(sizes, model.config.patch_size, strict=True))


def by_sizes(_model: Any, given: Given) -> tuple[int, ...]:
    """Return the grid of a packed video (B, F·h·w, C) from its sizes."""
    return given["num_frames"], given["height"], given["width"]


# --- Which rows of a query belong to the picture; `count` is the number of its places.


def first(_name: str, _given: Given, count: int) -> slice:
    """Return the first rows, before references or a text."""
    return slice(0, count)


def last(_name: str, _given: Given, count: int) -> slice:
    """Return the last rows, after a text."""
    return slice(-count, None)


def after_text(name: str, given: Given, count: int) -> slice:
    """Return the rows after the text in blocks of one stream, else the first; references follow."""
    double = name.startswith("transformer_blocks") and given.get("img_ids") is not None
    start = 0 if double else given["encoder_hidden_states"].shape[1]
    return slice(start, start + count)


def after_own_text(_name: str, given: Given, count: int) -> Tensor:
    """Return the indices (B, I) of rows after each item's own text, whose mask tells its length."""
    lengths = given["encoder_attention_mask"].sum(1, keepdim=True).long()
    return lengths + torch.arange(count, device=lengths.device)


def where_marked(_name: str, given: Given, count: int) -> Tensor:
    """Return the indices (B, I) of rows that the indicator marks."""
    return (given["indicator"] == PICTURE).nonzero()[:, 1].view(-1, count)


# --- Taps.


def tapped(query: str, layout: Layout, out: str | None = "to_out") -> Callable[[Any], Taps]:
    """Return taps that are the same for all layers."""
    return lambda _layer: Taps(query, layout, out)


def normed(layout: Layout) -> Callable[[Any], Taps]:
    """Return taps at the norm of the query, or at its projection in models without that norm."""

    def of(layer: Any) -> Taps:
        has_norm = getattr(layer, "norm_q", None) is not None
        return Taps("norm_q", layout, "to_out") if has_norm else Taps("to_q", "BLD", "to_out")

    return of


def flux_taps(layer: Any) -> Taps:
    """Return Flux's taps: its single blocks have no output layer of their own."""
    return Taps("norm_q", "BLHd", None if getattr(layer, "pre_only", False) else "to_out")


JOINT_INPUTS = ("to_q", "to_qkv_mlp_proj", "img_qkv_proj")


def own_width(layer: Any) -> int:
    """Return the width of the rows that a joint attention reads, picture and text."""
    return projection_of(layer, JOINT_INPUTS).in_features


# --- Sizes of pictures.


def own_area(pipeline: Any, width: int, height: int) -> tuple[int, int]:
    """Return the size nearest to the pipeline's own area, as HiDream's computes it."""
    unit, side = 2 * pipeline.vae_scale_factor, pipeline.default_sample_size
    factor = sqrt((side * pipeline.vae_scale_factor) ** 2 / (width * height))
    return int(width * factor // unit * unit), int(height * factor // unit * unit)


def own_sizes(pipeline: Any, width: int, height: int) -> tuple[int, int]:
    """Return the pipeline's own size with the nearest aspect ratio, as Kandinsky's chooses it."""
    if (width, height) in pipeline.resolutions:
        return width, height
    return min(pipeline.resolutions, key=lambda size: abs(size[0] / size[1] - width / height))


# --- Training.


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


def sd3_text(pipeline: Any, captions: list[str], options: Given) -> dict[str, Tensor]:
    """Return the joined states of two CLIPs and T5, and the CLIPs' pooled text."""
    text, _, pooled, _ = pipeline.encode_prompt(
        captions, None, None, device=pipeline.device, do_classifier_free_guidance=False, **options
    )
    return {"text": text, "pooled": pooled}


def sd3_inputs(model: Any, latents: Tensor, timestep: Tensor, given: Conditions) -> dict[str, Any]:
    """Return the arguments of Stable Diffusion 3's forward pass."""
    return {
        "hidden_states": latents,
        "timestep": timestep,
        "encoder_hidden_states": given["text"].to(model.dtype),
        "pooled_projections": given["pooled"].to(model.dtype),
    }


def named_tasks(name: str, kinds: tuple[str, ...]) -> Tasks:
    """Return tasks from text, and of these kinds, that are named in diffusers' usual way."""
    found = (f"{name}{kind}Pipeline" if kind in kinds else "" for kind in PICTURES)
    return Tasks(f"{name}Pipeline", *found)


def text_alone(*names: str, controlled: Tasks | None = None) -> Mapping[str, TaskTable]:
    """Return the tasks of pipelines that start from text alone."""
    return {f"{name}Pipeline": TaskTable(named_tasks(name, ()), controlled) for name in names}


def three_tasks(name: str, controlled: Tasks | None = None) -> Mapping[str, TaskTable]:
    """Return the tasks of pipelines that start from text or a picture, and inpaint."""
    return {f"{name}Pipeline": TaskTable(named_tasks(name, PICTURES), controlled)}


HEADS = ("num_attention_heads", "attention_head_dim")
JOINT_SIZES = ("in_channels", "joint_attention_dim", *HEADS)

# --- The rows.

SINGLE = r"(single_)?transformer_blocks\.\d+\.attn"


def flux_like(model: str, **changes: Any) -> TransformerRow:
    """Return the row of a class with Flux's two kinds of blocks and ids of the picture's rows."""
    row = TransformerRow(
        model=model,
        layers=SINGLE,
        taps=flux_taps,
        grid=image_ids,
        progress=by_sigma,
        picture=after_text,
        reads=("img_ids",),
        text_width=own_width,
        separate_branches=True,
        shared=("img_ids", "txt_ids"),
        grain=2,
    )
    return replace(row, **changes)


ROWS = {
    "pixart": TransformerRow(
        model="PixArtTransformer2DModel",
        channel=CROSS,
        layers=r"transformer_blocks\.\d+\.attn2",
        taps=tapped("to_q", "BLD"),
        grid=patches,
        progress=by_timestep,
        pipelines=text_alone("PixArtAlpha", "PixArtSigma"),
        text_tokens=300,
        grain=2,
        pixel_grain=8,
        call_options={"clean_caption": False, "use_resolution_binning": False},
        training=Training(
            encode_text=pixart_text,
            inputs=pixart_inputs,
            output=lambda out, latents: out[:, : latents.shape[1]],  # then a learned variance
            condition_shapes=lambda config, tokens: {
                "text": (tokens, config["caption_channels"]),
                "text_mask": (tokens,),
            },
        ),
    ),
    "flux": flux_like(
        "FluxTransformer2DModel",
        channel=JOINT,
        pipelines=three_tasks("Flux", named_tasks("FluxControlNet", PICTURES)),
        control=ControlKind("FluxControlNetModel", JOINT_SIZES),
        text_tokens=512,
        tokenizer="tokenizer_2",
        native_latents=lambda _config: 128,
        negative="true_cfg_scale",
        training=Training(
            encode_text=flux_text,
            inputs=flux_inputs,
            output=unpacked,
            condition_shapes=lambda config, tokens: {
                "text": (tokens, config["joint_attention_dim"]),
                "pooled": (config["pooled_projection_dim"],),
            },
            latent_channels=lambda config: config["in_channels"] // 4,
        ),
    ),
    "sd3": TransformerRow(
        model="SD3Transformer2DModel",
        channel=JOINT,
        layers=r"transformer_blocks\.\d+\.attn",
        taps=normed("BHLd"),
        grid=patches,
        progress=by_timestep,
        text_width=own_width,
        # without ControlNet: its pipelines encode the picture with noise that no seed decides
        pipelines=three_tasks("StableDiffusion3"),
        text_arguments=("encoder_hidden_states", "pooled_projections"),
        text_tokens=77 + 256,
        tokenizer="tokenizer_3",
        grain=2,
        training=Training(
            encode_text=sd3_text,
            inputs=sd3_inputs,
            output=lambda out, _latents: out,
            condition_shapes=lambda config, tokens: {
                "text": (tokens, config["joint_attention_dim"]),
                "pooled": (config["pooled_projection_dim"],),
            },
        ),
    ),
    "chroma": flux_like(
        "ChromaTransformer2DModel",
        channel=JOINT,
        pipelines=three_tasks("Chroma"),
        text_tokens=512,
    ),
    "bria": flux_like(
        "BriaTransformer2DModel",
        channel=PLAIN,
        progress=by_timestep,
        separate_branches=False,
        pipelines=text_alone("Bria"),
        text_tokens=128,
        grain=1,  # its pipelines count two latents as one
        native_latents=lambda _config: 64,
    ),
    "ovis": flux_like(
        "OvisImageTransformer2DModel",
        channel=JOINT,
        pipelines=text_alone("OvisImage"),
        text_tokens=256,
    ),
    "longcat": flux_like(
        "LongCatImageTransformer2DModel",
        pipelines=text_alone("LongCatImage"),
        call_options={"enable_prompt_rewrite": False},  # which the seed does not decide
    ),
    "flux2": flux_like(
        "Flux2Transformer2DModel",
        channel=JOINT,
        taps=tapped("norm_q", "BLHd"),
        pipelines={
            **text_alone("Flux2"),
            "Flux2KleinPipeline": TaskTable(
                Tasks("Flux2KleinPipeline", "", "Flux2KleinInpaintPipeline")
            ),
        },
        text_tokens=512,
        distilled="is_distilled",
    ),
    "flux3": flux_like(
        "Flux3Transformer2DModel",
        channel=PLAIN,
        taps=tapped("norm_q", "BLHd"),
        layers=r"single_transformer_blocks\.\d+\.attn",
    ),
    "sana": TransformerRow(
        model="SanaTransformer2DModel",
        channel=PLAIN,
        layers=r"transformer_blocks\.\d+\.attn2",
        taps=normed("BLD"),
        grid=patches,
        progress=by_timestep,
        pipelines=text_alone("Sana", controlled=named_tasks("SanaControlNet", ())),
        control=ControlKind("SanaControlNetModel", ("in_channels", "caption_channels", *HEADS)),
        text_tokens=300,
        pixel_grain=32,
        call_options={"use_resolution_binning": False},
    ),
    "hunyuandit": TransformerRow(
        model="HunyuanDiT2DModel",
        layers=r"blocks\.\d+\.attn2",
        taps=tapped("norm_q", "BHLd"),
        grid=patches,
        progress=by_timestep,
        shared=("image_rotary_emb",),
        text_arguments=(
            *("encoder_hidden_states", "text_embedding_mask"),
            *("encoder_hidden_states_t5", "text_embedding_mask_t5"),
        ),
        pipelines=text_alone("HunyuanDiT"),  # without ControlNet, as sd3
        grain=2,
        pixel_grain=16,
        call_options={"use_resolution_binning": False},
    ),
    "lumina2": TransformerRow(
        model="Lumina2Transformer2DModel",
        channel=PLAIN,
        layers=r"layers\.\d+\.attn",
        taps=tapped("norm_q", "BLHd"),
        grid=patches,
        progress=by_progress,
        picture=after_own_text,
        reads=("encoder_attention_mask",),
        text_width=own_width,
        separate_branches=True,
        pipelines=text_alone("Lumina2"),
        text_tokens=256,
        grain=2,
    ),
    "lumina-next": TransformerRow(
        model="LuminaNextDiT2DModel",
        channel=CROSS,
        layers=r"layers\.\d+\.attn2",
        taps=tapped("norm_q", "BLD", None),
        grid=patches,
        progress=by_progress,
        positive_first=True,
        shared=("image_rotary_emb",),
        text_arguments=("encoder_hidden_states", "encoder_mask"),
        pipelines=text_alone("Lumina"),
        text_tokens=256,
        grain=2,
        call_options={"clean_caption": False},
    ),
    "auraflow": TransformerRow(
        model="AuraFlowTransformer2DModel",
        channel=PLAIN,
        layers=r"(joint|single)_transformer_blocks\.\d+\.attn",
        taps=tapped("norm_q", "BLHd"),
        grid=patches,
        progress=by_sigma,
        picture=last,
        text_width=own_width,
        pipelines=text_alone("AuraFlow"),
        text_tokens=256,
        grain=2,
        native_latents=lambda _config: 128,
    ),
    "qwen-image": TransformerRow(
        model="QwenImageTransformer2DModel",
        channel=PLAIN,
        layers=r"transformer_blocks\.\d+\.attn",
        taps=tapped("norm_q", "BLHd"),
        grid=by_shapes,
        progress=by_sigma,
        picture=first,
        reads=("img_shapes",),
        text_width=own_width,
        separate_branches=True,
        lists=("img_shapes", "txt_seq_lens"),
        text_arguments=("encoder_hidden_states", "encoder_hidden_states_mask"),
        pipelines=three_tasks("QwenImage", named_tasks("QwenImageControlNet", ())),
        control=ControlKind("QwenImageControlNetModel", JOINT_SIZES),
        text_tokens=512,
        grain=2,
        guidance="true_cfg_scale",
        negative="true_cfg_scale",
    ),
    "qwen-image-2.1": TransformerRow(
        model="QwenImage21Transformer2DModel",
        channel=PLAIN,
        layers=r"transformer_blocks\.\d+\.attn",
        taps=tapped("norm_q", "BLHd"),
        grid=by_shapes,
        progress=by_sigma,
        picture=last,
        reads=("img_shapes",),
        text_width=own_width,
        separate_branches=True,
        lists=("img_shapes",),
        text_arguments=("encoder_hidden_states", "encoder_hidden_states_mask", "img_mask"),
    ),
    "z-image": TransformerRow(
        model="ZImageTransformer2DModel",
        channel=JOINT,
        layers=r"layers\.\d+\.attention",
        taps=tapped("norm_q", "BLHd"),
        grid=list_patches,
        progress=by_progress,
        picture=first,
        arguments=("x", "t", "cap_feats"),
        text_width=own_width,
        positive_first=True,
        lists=("x", "cap_feats"),
        text_arguments=("cap_feats",),
        pipelines=three_tasks("ZImage"),
        text_tokens=512,
        grain=2,
        unguided=0.0,
    ),
    "wan": TransformerRow(
        model="WanTransformer3DModel",
        channel=PLAIN,
        layers=r"blocks\.\d+\.attn2",
        taps=tapped("norm_q", "BLD"),
        grid=patches,
        progress=by_timestep,
        separate_branches=True,
    ),
    "hidream": TransformerRow(
        model="HiDreamImageTransformer2DModel",
        channel=PLAIN,
        layers=r"(double|single)_stream_blocks\.\d+\.block\.attn1",
        taps=tapped("q_rms_norm", "BLD"),
        grid=patches,
        progress=by_timestep,
        picture=first,
        arguments=("hidden_states", "timesteps", "encoder_hidden_states_t5"),
        text_width=own_width,
        axes={"encoder_hidden_states_llama3": 1},  # after those of the text encoder's layers
        text_arguments=(
            *("encoder_hidden_states_t5", "encoder_hidden_states_llama3", "pooled_embeds"),
        ),
        pipelines=text_alone("HiDreamImage"),
        text_tokens=128,
        tokenizer="tokenizer_3",
        grain=2,
        made_size=own_area,
        native_latents=lambda _config: 128,
    ),
    "cogview4": TransformerRow(
        model="CogView4Transformer2DModel",
        channel=PLAIN,
        layers=r"transformer_blocks\.\d+\.attn1",
        taps=tapped("norm_q", "BHLd"),
        grid=patches,
        progress=by_timestep,
        picture=last,
        text_width=own_width,
        separate_branches=True,
        pipelines=text_alone("CogView4"),
        text_tokens=1024,
        pixel_grain=16,
        grain=2,
        one_text=True,
    ),
    "hunyuan-image": TransformerRow(
        model="HunyuanImageTransformer2DModel",
        channel=PLAIN,
        layers=SINGLE,
        taps=flux_taps,
        grid=patches,
        progress=by_timestep,
        picture=first,
        text_width=own_width,
        separate_branches=True,
    ),
    "hunyuan-video": TransformerRow(
        model="HunyuanVideoTransformer3DModel",
        channel=PLAIN,
        layers=SINGLE,
        taps=flux_taps,
        grid=patches,
        progress=by_timestep,
        picture=first,
        text_width=own_width,
        separate_branches=True,
    ),
    "kandinsky5": TransformerRow(
        model="Kandinsky5Transformer3DModel",
        layers=r"visual_transformer_blocks\.\d+\.cross_attention",
        taps=tapped("query_norm", "BLHd", "out_layer"),
        grid=last_channels,
        progress=by_timestep,
        separate_branches=True,
        shared=("visual_rope_pos", "text_rope_pos"),
        text_arguments=("encoder_hidden_states", "pooled_projections"),
        pipelines=text_alone("Kandinsky5T2I"),
        text_tokens=512,
        grain=2,
        latent_pixels="vae_scale_factor_spatial",
        made_size=own_sizes,
        one_text=True,
    ),
    "krea2": TransformerRow(
        model="Krea2Transformer2DModel",
        channel=PLAIN,
        layers=r"transformer_blocks\.\d+\.attn",
        taps=tapped("norm_q", "BLHd"),
        grid=joint_ids,
        progress=by_sigma,
        picture=last,
        reads=("position_ids",),
        text_width=own_width,
        separate_branches=True,
        shared=("position_ids",),
        pipelines=text_alone("Krea2"),
        text_tokens=512,
        grain=2,
        unguided=0.0,
    ),
    "ideogram4": TransformerRow(
        model="Ideogram4Transformer2DModel",
        channel=PLAIN,
        layers=r"layers\.\d+\.attention",
        taps=tapped("norm_q", "BLHd"),
        grid=marked,
        progress=by_progress,
        picture=where_marked,
        reads=("position_ids", "indicator"),
        text_width=own_width,
    ),
    "prx": TransformerRow(
        model="PRXTransformer2DModel",
        channel=PLAIN,
        layers=r"blocks\.\d+\.attention",
        taps=tapped("norm_q", "BHLd"),
        grid=patches,
        progress=by_sigma,
        text_width=own_width,
        text_arguments=("encoder_hidden_states", "attention_mask"),
        pipelines=text_alone("PRX"),
        grain=2,
        native_latents=lambda _config: 64,
        call_options={"use_resolution_binning": False},
    ),
    "ltx": TransformerRow(
        model="LTXVideoTransformer3DModel",
        channel=PLAIN,
        layers=r"transformer_blocks\.\d+\.attn2",
        taps=tapped("norm_q", "BLD"),
        grid=by_sizes,
        progress=by_timestep,
        picture=first,
    ),
    "cosmos": TransformerRow(
        model="CosmosTransformer3DModel",
        layers=r"transformer_blocks\.\d+\.attn2",
        taps=tapped("norm_q", "BHLd"),
        grid=patches,
        progress=by_timestep,
        separate_branches=True,
    ),
}
FAMILIES = {name: TransformerFamily(name, row) for name, row in ROWS.items()}
