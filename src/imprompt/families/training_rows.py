"""How adapters for transformers are trained: a row for each class that this is supported for.

A row's functions take and give what its pipelines in diffusers do, so that a model is trained on
what it samples with. Shape letters as in `imprompt.adapter`; C channels, h and w of latents, L
places of packed latents, T text states of width D.
"""

from collections.abc import Callable, Sequence
from inspect import signature
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imprompt.families.base import Conditions, linear_mu
from imprompt.families.transformers import Given, Training

GUIDANCE = 3.5  # input of guidance-distilled models in training, as in diffusers' scripts
TIMESTEPS = 1000  # of the scheduler, into which models that are told sigma divide their time


# --- Time, of the scheduler's timestep, as the model is told it.


def sigma_of(timestep: Tensor) -> Tensor:
    """Return sigma, from 0, the picture, to 1, noise."""
    return timestep / TIMESTEPS


def progress_of(timestep: Tensor) -> Tensor:
    """Return the progress, from 0, noise, to 1, the picture."""
    return 1 - timestep / TIMESTEPS


# --- Texts, inputs and outputs.


def pixart_text(pipeline: Any, captions: list[str], options: Given) -> dict[str, Tensor]:
    """Return T5's states, and the mask of those that belong to the caption."""
    text, mask, *_ = pipeline.encode_prompt(captions, False, device=pipeline.device, **options)
    return {"text": text, "text_mask": mask}


def usual_inputs(model: Any, latents: Tensor, time: Tensor, given: Conditions) -> dict[str, Any]:
    """Return the arguments that most forward passes have: latents or their rows, time and text."""
    return {
        "hidden_states": latents,
        "timestep": time,
        "encoder_hidden_states": given["text"].to(model.dtype),
    }


def pixart_inputs(model: Any, latents: Tensor, time: Tensor, given: Conditions) -> dict[str, Any]:
    """Return the arguments of PixArt's forward pass."""
    return {
        **usual_inputs(model, latents, time, given),
        "encoder_attention_mask": given["text_mask"],
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def flux_text(pipeline: Any, captions: list[str], options: Given) -> dict[str, Tensor]:
    """Return T5's states and CLIP's pooled text."""
    text, pooled, _ = pipeline.encode_prompt(captions, None, device=pipeline.device, **options)
    return {"text": text, "pooled": pooled}


def flux_inputs(model: Any, latents: Tensor, time: Tensor, given: Conditions) -> dict[str, Any]:
    """Return the arguments of Flux's forward pass; the latents (B, C, h, w) are packed by 2 × 2."""
    text = given["text"].to(model.dtype)
    return {
        "hidden_states": packed_rows(latents),
        "timestep": time,
        "guidance": guidance_input(model, latents),
        "encoder_hidden_states": text,
        "pooled_projections": given["pooled"].to(model.dtype),
        "img_ids": packed_ids(latents, 3),
        "txt_ids": text.new_zeros(text.shape[1], 3),
    }


def packed_ids(latents: Tensor, width: int) -> Tensor:
    """Return ids (L, width), time, row and column first, of latents that are packed by 2 × 2."""
    sides = (side // 2 for side in latents.shape[2:])
    rows, columns = torch.meshgrid(*map(torch.arange, sides), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
    return F.pad(places, (0, width - 3)).to(latents)


def guidance_input(model: Any, latents: Tensor) -> Tensor | None:
    """Return the guidance (B,) that a guidance-distilled model is told, None for another one."""
    return latents.new_full((len(latents),), GUIDANCE) if model.config.guidance_embeds else None


def packed_channels(config: Given) -> int:
    """Return C of latents that the model reads packed by 2 × 2."""
    return config["in_channels"] // 4


def packed_rows(latents: Tensor) -> Tensor:
    """Pack latents (B, C, h, w) by 2 × 2: (B, L, 4 · C)."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT


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


def sd3_inputs(model: Any, latents: Tensor, time: Tensor, given: Conditions) -> dict[str, Any]:
    """Return the arguments of Stable Diffusion 3's forward pass."""
    return {
        **usual_inputs(model, latents, time, given),
        "pooled_projections": given["pooled"].to(model.dtype),
    }


def unlike_empty(captions: Sequence[str], encoded: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return text states, and the mask of those that belong to the caption.

    An empty caption is dropped text: it stands for the negative branch of guidance, which some
    pipelines encode without the instruction that they put before other captions.

    encoded  states and mask of the captions, then of the negative branch: (B, T, D) and (B, T)
    """
    text, mask, negative, negative_mask = encoded
    empty = torch.tensor([not caption for caption in captions], device=text.device)[:, None]
    return {
        "text": torch.where(empty[:, None], negative, text),
        "text_mask": torch.where(empty, negative_mask, mask),
    }


def sana_text(pipeline: Any, captions: list[str], options: Given) -> dict[str, Tensor]:
    """Return Gemma's states after the instruction that the pipeline puts before captions."""
    key = "complex_human_instruction"
    instruction = signature(type(pipeline).__call__).parameters[key].default
    encoded = pipeline.encode_prompt(
        captions, True, device=pipeline.device, **{key: instruction}, **options
    )
    return unlike_empty(captions, encoded)


def sana_inputs(model: Any, latents: Tensor, time: Tensor, given: Conditions) -> dict[str, Any]:
    """Return the arguments of Sana's forward pass."""
    return {
        **usual_inputs(model, latents, time * model.config.timestep_scale, given),
        "encoder_attention_mask": given["text_mask"],
    }


def first_channels(out: Tensor, latents: Tensor) -> Tensor:
    """Return the channels (B, C, h, w) of an output that a learned variance may follow."""
    return out[:, : latents.shape[1]]


def filled(states: Sequence[Tensor], tokens: int) -> dict[str, Tensor]:
    """Return text states (T, D) of any lengths, zero behind, as (B, tokens, D), and their mask."""
    text = torch.stack([F.pad(own, (0, 0, 0, tokens - len(own))) for own in states])
    lengths = torch.tensor([len(own) for own in states], device=text.device)
    return {"text": text, "text_mask": torch.arange(tokens, device=text.device) < lengths[:, None]}


def z_image_text(pipeline: Any, captions: list[str], options: Given) -> dict[str, Tensor]:
    """Return Qwen's states of each caption, filled to one length, and their mask."""
    given = {"max_sequence_length": 512} | dict(options)
    states, _ = pipeline.encode_prompt([*captions], pipeline.device, False, **given)
    return filled(states, given["max_sequence_length"])


def z_image_inputs(model: Any, latents: Tensor, time: Tensor, given: Conditions) -> dict[str, Any]:
    """Return the arguments of Z-Image's forward pass: lists of pictures and of texts."""
    text = given["text"].to(model.dtype)
    own = [*text]
    if not text.is_meta:  # the lengths are not known: an estimate takes whole texts
        lengths = given["text_mask"].sum(1).long().tolist()
        own = [states[:length] for states, length in zip(text, lengths, strict=True)]
    return {"x": [*latents[:, :, None]], "t": time, "cap_feats": own}


def qwen_text(pipeline: Any, captions: list[str], options: Given) -> dict[str, Tensor]:
    """Return Qwen's states of each caption, filled to one length, and their mask."""
    given = {"max_sequence_length": 512} | dict(options)
    text, mask = pipeline.encode_prompt(captions, pipeline.device, **given)
    lengths = [text.shape[1]] * len(text) if mask is None else mask.sum(1).tolist()
    own = [states[:length] for states, length in zip(text, lengths, strict=True)]
    return filled(own, given["max_sequence_length"])


def qwen_inputs(model: Any, latents: Tensor, time: Tensor, given: Conditions) -> dict[str, Any]:
    """Return the arguments of Qwen-Image's forward pass."""
    height, width = latents.shape[2:]
    return {
        **usual_inputs(model, packed_rows(latents), time, given),
        "guidance": guidance_input(model, latents),
        "encoder_hidden_states_mask": given["text_mask"].bool(),
        "img_shapes": [[(1, height // 2, width // 2)]] * len(latents),
    }


def wan_text(pipeline: Any, captions: list[str], options: Given) -> dict[str, Tensor]:
    """Return UMT5's states, zero after the caption."""
    given = {"max_sequence_length": 512} | dict(options)
    text, _ = pipeline.encode_prompt(captions, None, False, device=pipeline.device, **given)
    return {"text": text}


def wan_inputs(model: Any, latents: Tensor, time: Tensor, given: Conditions) -> dict[str, Any]:
    """Return the arguments of Wan's forward pass, for a video of one frame."""
    return usual_inputs(model, latents[:, :, None], time, given)


def one_frame(out: Tensor, _latents: Tensor) -> Tensor:
    """Return the picture (B, C, h, w) of a video of one frame (B, C, 1, h, w)."""
    return out[:, :, 0]


def chroma_text(pipeline: Any, captions: list[str], options: Given) -> dict[str, Tensor]:
    """Return T5's states, and the mask of those of the caption and of one token after it."""
    text, _, mask, *_ = pipeline.encode_prompt(
        captions, None, pipeline.device, do_classifier_free_guidance=False, **options
    )
    return {"text": text, "text_mask": mask}


def chroma_inputs(model: Any, latents: Tensor, time: Tensor, given: Conditions) -> dict[str, Any]:
    """Return the arguments of Chroma's forward pass.

    As in its pipelines, the mask is a number of the text's precision, which attention adds.
    """
    text, rows = given["text"].to(model.dtype), packed_rows(latents)
    return {
        "hidden_states": rows,
        "timestep": time,
        "encoder_hidden_states": text,
        "img_ids": packed_ids(latents, 3),
        "txt_ids": text.new_zeros(text.shape[1], 3),
        "attention_mask": F.pad(given["text_mask"].to(text.dtype), (0, rows.shape[1]), value=1.0),
    }


def lumina2_text(pipeline: Any, captions: list[str], options: Given) -> dict[str, Tensor]:
    """Return Gemma's states after the system prompt, and their mask."""
    encoded = pipeline.encode_prompt(captions, True, device=pipeline.device, **options)
    return unlike_empty(captions, encoded)


def lumina2_inputs(model: Any, latents: Tensor, time: Tensor, given: Conditions) -> dict[str, Any]:
    """Return the arguments of Lumina 2's forward pass."""
    return {
        **usual_inputs(model, latents, time, given),
        "encoder_attention_mask": given["text_mask"].long(),
    }


def auraflow_text(pipeline: Any, captions: list[str], options: Given) -> dict[str, Tensor]:
    """Return UMT5's states, zero after the caption."""
    text, *_ = pipeline.encode_prompt(captions, None, False, device=pipeline.device, **options)
    return {"text": text}


def hunyuandit_text(pipeline: Any, captions: list[str], _options: Given) -> dict[str, Tensor]:
    """Return the states and masks of CLIP and T5, as long as the model's configuration states."""
    found, config = {}, pipeline.transformer.config
    for number, (name, length) in enumerate((("", "text_len"), ("_t5", "text_len_t5"))):
        text, _, mask, _ = pipeline.encode_prompt(
            captions,
            pipeline.device,
            do_classifier_free_guidance=False,
            max_sequence_length=config[length],
            text_encoder_index=number,
        )
        found |= {f"text{name}": text, f"text{name}_mask": mask}
    return found


def hunyuandit_inputs(
    model: Any, latents: Tensor, time: Tensor, given: Conditions
) -> dict[str, Any]:
    """Return the arguments of HunyuanDiT's forward pass; places turn as its pipelines turn them."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    patch = model.config.patch_size
    grid: Any = tuple(side // patch for side in latents.shape[2:])
    turned = get_2d_rotary_pos_embed(
        model.inner_dim // model.num_heads,
        get_resize_crop_region_for_grid(grid, 64 // patch),
        grid,
        device=latents.device,
        output_type="pt",
    )
    original, crop, target = given["time_ids"].split(2, 1)
    return {
        # whole numbers would stay so in the embedding of time
        **usual_inputs(model, latents, time.to(model.dtype), given),
        "text_embedding_mask": given["text_mask"],
        "encoder_hidden_states_t5": given["text_t5"].to(model.dtype),
        "text_embedding_mask_t5": given["text_t5_mask"],
        "image_meta_size": torch.cat([original, target, crop], 1).to(model.dtype),
        "style": torch.zeros(len(latents), dtype=torch.long, device=latents.device),
        "image_rotary_emb": turned,
    }


def flux2_text(pipeline: Any, captions: list[str], options: Given) -> dict[str, Tensor]:
    """Return the states of several layers of the text model, joined."""
    return {"text": pipeline.encode_prompt(captions, pipeline.device, **options)[0]}


def flux2_inputs(model: Any, latents: Tensor, time: Tensor, given: Conditions) -> dict[str, Any]:
    """Return the arguments of Flux.2's forward pass; ids end with the place in the text."""
    text = given["text"].to(model.dtype)
    places = torch.arange(text.shape[1], device=text.device)[:, None]
    return {
        "hidden_states": packed_rows(latents),
        "timestep": time,
        "guidance": guidance_input(model, latents),
        "encoder_hidden_states": text,
        "img_ids": packed_ids(latents, 4),
        "txt_ids": F.pad(places, (3, 0)).to(text),
    }


def flux2_mu(_config: Given, latents: Tensor) -> float:
    """Return μ by the rule of Flux.2's pipelines, for their usual 50 steps."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return compute_empirical_mu(prod(latents.shape[2:]) // 4, 50)


def shapes(width: str, pooled: str = "") -> Callable[[Given, int], dict[str, tuple[int, ...]]]:
    """Return the shapes of a text and, if its width is named, of its pooled form."""
    return lambda config, tokens: (
        {"text": (tokens, config[width])} | ({"pooled": (config[pooled],)} if pooled else {})
    )


def masked_shapes(width: str) -> Callable[[Given, int], dict[str, tuple[int, ...]]]:
    """Return the shapes of a text and of its mask."""
    return lambda config, tokens: {"text": (tokens, config[width]), "text_mask": (tokens,)}


# --- The rows.

TRAINING = {
    "pixart": Training(
        encode_text=pixart_text,
        inputs=pixart_inputs,
        output=first_channels,
        condition_shapes=masked_shapes("caption_channels"),
    ),
    "flux": Training(
        encode_text=flux_text,
        inputs=flux_inputs,
        output=unpacked,
        condition_shapes=shapes("joint_attention_dim", "pooled_projection_dim"),
        latent_channels=packed_channels,
        time=sigma_of,
    ),
    "sd3": Training(
        encode_text=sd3_text,
        inputs=sd3_inputs,
        output=lambda out, _latents: out,
        condition_shapes=shapes("joint_attention_dim", "pooled_projection_dim"),
    ),
    "sana": Training(
        encode_text=sana_text,
        inputs=sana_inputs,
        output=first_channels,
        condition_shapes=masked_shapes("caption_channels"),
    ),
    "z-image": Training(
        encode_text=z_image_text,
        inputs=z_image_inputs,
        output=lambda out, latents: one_frame(torch.stack([*out]), latents),
        condition_shapes=masked_shapes("cap_feat_dim"),
        time=progress_of,
        sign=-1,
    ),
    "qwen-image": Training(
        encode_text=qwen_text,
        inputs=qwen_inputs,
        output=unpacked,
        condition_shapes=masked_shapes("joint_attention_dim"),
        latent_channels=packed_channels,
        time=sigma_of,
    ),
    "wan": Training(
        encode_text=wan_text,
        inputs=wan_inputs,
        output=one_frame,
        condition_shapes=shapes("text_dim"),
        pipelines=("WanPipeline",),
        unlike=("boundary_ratio", "expand_timesteps"),
    ),
    "chroma": Training(
        encode_text=chroma_text,
        inputs=chroma_inputs,
        output=unpacked,
        condition_shapes=masked_shapes("joint_attention_dim"),
        latent_channels=packed_channels,
        time=sigma_of,
    ),
    "lumina2": Training(
        encode_text=lumina2_text,
        inputs=lumina2_inputs,
        output=first_channels,
        condition_shapes=masked_shapes("cap_feat_dim"),
        time=progress_of,
        sign=-1,
        # its pipelines take the number of channels for that of places
        mu=lambda config, latents: linear_mu(config, latents.shape[1]),
    ),
    "auraflow": Training(
        encode_text=auraflow_text,
        inputs=usual_inputs,
        output=first_channels,
        condition_shapes=shapes("joint_attention_dim"),
        time=sigma_of,
    ),
    "hunyuandit": Training(
        encode_text=hunyuandit_text,
        inputs=hunyuandit_inputs,
        output=first_channels,
        condition_shapes=lambda config, _tokens: {
            "text": (config["text_len"], config["cross_attention_dim"]),
            "text_mask": (config["text_len"],),
            "text_t5": (config["text_len_t5"], config["cross_attention_dim_t5"]),
            "text_t5_mask": (config["text_len_t5"],),
            "time_ids": (6,),
        },
    ),
    "flux2": Training(
        encode_text=flux2_text,
        inputs=flux2_inputs,
        output=unpacked,
        condition_shapes=shapes("joint_attention_dim"),
        latent_channels=packed_channels,
        time=sigma_of,
        mu=flux2_mu,
    ),
}
