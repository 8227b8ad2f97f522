"""Rows of the transformers that take image prompts: one for each class of diffusers' models.

Shape letters as in `imprompt.adapter`; C channels, h and w of latents, F frames, I the picture's
places.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imprompt.families.base import Conditions, Tasks, TaskTable
from imprompt.families.picture import (
    after_history,
    after_own_text,
    after_text,
    by_frames,
    by_last_shape,
    by_progress,
    by_shapes,
    by_sigma,
    by_sizes,
    by_timestep,
    first,
    flux_taps,
    image_ids,
    joint_ids,
    last,
    last_channels,
    list_patches,
    marked,
    new_frames,
    normed,
    own_places,
    own_width,
    patches,
    tapped,
    where_marked,
)
from imprompt.families.transformers import Given, Training, TransformerFamily, TransformerRow

GUIDANCE = 3.5  # input of guidance-distilled models in training, as in diffusers' scripts
TIMESTEPS = 1000  # into which models that are given sigma divide their time
# Keywords by which models pass arguments to their attentions.
JOINT, PLAIN, CROSS = "joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs"


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


def three_tasks(name: str) -> Mapping[str, TaskTable]:
    """Return the tasks of pipelines that are named in diffusers' usual way."""
    kinds = (f"{name}{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
    return {f"{name}Pipeline": TaskTable(Tasks(*kinds))}


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
        pipelines={
            f"PixArt{kind}Pipeline": TaskTable(Tasks(f"PixArt{kind}Pipeline", "", ""))
            for kind in ("Alpha", "Sigma")
        },
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
        pipelines=three_tasks("Flux"),
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
        skips="skip_layers",
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
    "chroma": flux_like("ChromaTransformer2DModel", channel=JOINT),
    "bria": flux_like("BriaTransformer2DModel", channel=PLAIN, progress=by_timestep),
    "ovis": flux_like("OvisImageTransformer2DModel", channel=JOINT),
    "longcat": flux_like("LongCatImageTransformer2DModel"),
    "flux2": flux_like("Flux2Transformer2DModel", channel=JOINT, taps=tapped("norm_q", "BLHd")),
    "flux3": flux_like(
        "Flux3Transformer2DModel",
        channel=PLAIN,
        taps=tapped("norm_q", "BLHd"),
        layers=r"single_transformer_blocks\.\d+\.attn",
    ),
    "sana": TransformerRow(
        model="SanaTransformer2DModel",
        alike=("SanaVideoTransformer3DModel",),
        channel=PLAIN,
        layers=r"transformer_blocks\.\d+\.attn2",
        taps=normed("BLD"),
        grid=patches,
        progress=by_timestep,
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
    ),
    "qwen-image-2.1": TransformerRow(
        model="QwenImage21Transformer2DModel",
        channel=PLAIN,
        layers=r"transformer_blocks\.\d+\.attn",
        taps=tapped("norm_q", "BLHd"),
        grid=by_last_shape,
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
    ),
    "wan": TransformerRow(
        model="WanTransformer3DModel",
        channel=PLAIN,
        alike=(
            "SkyReelsV2Transformer3DModel",
            "WanVACETransformer3DModel",
            "WanAnimateTransformer3DModel",
            "ChronoEditTransformer3DModel",
            "HeliosTransformer3DModel",
        ),
        layers=r"blocks\.\d+\.attn2",
        taps=tapped("norm_q", "BLD"),
        grid=new_frames,
        progress=by_timestep,
        picture=last,
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
        alone=True,
        text_arguments=(
            *("encoder_hidden_states_t5", "encoder_hidden_states_llama3", "pooled_embeds"),
        ),
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
        alike=("HunyuanVideo15Transformer3DModel", "MotifVideoTransformer3DModel"),
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
        separate_branches=True,  # the negative one has a model of its own
    ),
    "prx": TransformerRow(
        model="PRXTransformer2DModel",
        channel=PLAIN,
        layers=r"blocks\.\d+\.attention",
        taps=tapped("norm_q", "BHLd"),
        grid=patches,
        progress=by_sigma,
        text_width=own_width,
    ),
    "ltx": TransformerRow(
        model="LTXVideoTransformer3DModel",
        channel=PLAIN,
        layers=r"transformer_blocks\.\d+\.attn2",
        taps=tapped("norm_q", "BLD"),
        grid=by_sizes,
        progress=by_timestep,
        picture=own_places,
        reads=("video_coords",),
    ),
    "cosmos": TransformerRow(
        model="CosmosTransformer3DModel",
        layers=r"transformer_blocks\.\d+\.attn2",
        taps=tapped("norm_q", "BHLd"),
        grid=patches,
        progress=by_sigma,
        separate_branches=True,
    ),
    "cogvideox": TransformerRow(
        model="CogVideoXTransformer3DModel",
        alike=("ConsisIDTransformer3DModel",),
        channel=PLAIN,
        layers=r"transformer_blocks\.\d+\.attn1",
        taps=tapped("norm_q", "BHLd"),
        grid=by_frames,
        progress=by_timestep,
        picture=last,
        text_width=own_width,
        shared=("image_rotary_emb",),
    ),
    "cogview3plus": TransformerRow(
        model="CogView3PlusTransformer2DModel",
        layers=r"transformer_blocks\.\d+\.attn1",
        taps=tapped("norm_q", "BHLd"),
        grid=patches,
        progress=by_timestep,
        picture=last,
        text_width=own_width,
    ),
    "mochi": TransformerRow(
        model="MochiTransformer3DModel",
        channel=PLAIN,
        layers=r"transformer_blocks\.\d+\.attn1",
        taps=tapped("norm_q", "BLHd"),
        grid=patches,
        progress=by_timestep,
        picture=first,
        text_width=own_width,
    ),
    "allegro": TransformerRow(
        model="AllegroTransformer3DModel",
        layers=r"transformer_blocks\.\d+\.attn2",
        taps=tapped("to_q", "BLD"),
        grid=patches,
        progress=by_timestep,
        shared=("image_rotary_emb",),
    ),
    "framepack": TransformerRow(
        model="HunyuanVideoFramepackTransformer3DModel",
        channel=PLAIN,
        layers=SINGLE,
        taps=flux_taps,
        grid=patches,
        progress=by_timestep,
        picture=after_history,
        text_width=own_width,
        separate_branches=True,
        shared=(
            *("indices_latents", "indices_latents_clean"),
            *("indices_latents_history_2x", "indices_latents_history_4x"),
        ),
    ),
    "bria-fibo": flux_like(
        "BriaFiboTransformer2DModel",
        channel=JOINT,
        progress=by_timestep,
        separate_branches=False,
        text_arguments=("encoder_hidden_states", "text_encoder_layers"),
    ),
    "nucleus": TransformerRow(
        model="NucleusMoEImageTransformer2DModel",
        channel=PLAIN,
        layers=r"transformer_blocks\.\d+\.attn",
        taps=tapped("norm_q", "BLHd"),
        grid=by_shapes,
        progress=by_sigma,
        picture=first,
        reads=("img_shapes",),
        text_width=own_width,
        separate_branches=True,
        lists=("img_shapes",),
        text_arguments=("encoder_hidden_states", "encoder_hidden_states_mask"),
    ),
    "glm-image": TransformerRow(
        model="GlmImageTransformer2DModel",
        channel=PLAIN,
        layers=r"transformer_blocks\.\d+\.attn1",
        taps=tapped("norm_q", "BLHd"),
        grid=patches,
        progress=by_timestep,
        picture=last,
        text_width=own_width,
        separate_branches=True,
    ),
    "joyimage": TransformerRow(
        model="JoyImageEditTransformer3DModel",
        layers=r"double_blocks\.\d+\.attn",
        taps=tapped("img_attn_q_norm", "BLHd", "img_attn_proj"),
        grid=patches,
        progress=by_timestep,
        picture=first,
        text_width=own_width,
        separate_branches=True,
    ),
    "easyanimate": TransformerRow(
        model="EasyAnimateTransformer3DModel",
        layers=r"transformer_blocks\.\d+\.attn1",
        taps=tapped("norm_q", "BHLd"),
        grid=patches,
        progress=by_timestep,
        picture=last,
        text_width=own_width,
        text_arguments=("encoder_hidden_states", "encoder_hidden_states_t5"),
    ),
    "ernie-image": TransformerRow(
        model="ErnieImageTransformer2DModel",
        layers=r"layers\.\d+\.self_attention",
        taps=tapped("norm_q", "BLHd"),
        grid=patches,
        progress=by_timestep,
        picture=first,
        arguments=("hidden_states", "timestep", "text_bth"),
        text_width=own_width,
        text_arguments=("text_bth", "text_lens"),
    ),
    "ltx2": TransformerRow(
        model="LTX2VideoTransformer3DModel",
        channel=PLAIN,
        layers=r"transformer_blocks\.\d+\.attn2",
        taps=tapped("norm_q", "BLD"),
        grid=by_sizes,
        progress=by_timestep,
        picture=own_places,
        reads=("video_coords",),
        text_arguments=(
            *("encoder_hidden_states", "encoder_attention_mask"),
            *("audio_encoder_hidden_states", "audio_encoder_attention_mask"),
        ),
    ),
    "anyflow": TransformerRow(
        model="AnyFlowTransformer3DModel",
        channel=PLAIN,
        layers=r"blocks\.\d+\.attn2",
        taps=tapped("norm_q", "BLD"),
        grid=by_frames,
        progress=by_timestep,
        picture=last,
    ),
    "kandinsky6": TransformerRow(
        model="Kandinsky6Transformer3DModel",
        layers=r"visual_transformer_blocks\.\d+\.video_dec_block\.cross_attention",
        taps=tapped("query_norm", "BLHd", "out_layer"),
        grid=last_channels,
        progress=by_timestep,
        separate_branches=True,
        shared=("visual_rope_pos",),
        text_arguments=("encoder_hidden_states", "pooled_projections", "encoder_attention_mask"),
    ),
}
FAMILIES = {name: TransformerFamily(name, row) for name, row in ROWS.items()}
