"""A tiny random model of every class of transformers that a row is for, and inputs for it.

Inputs are of 4 × 4 places of the picture (videos: two frames) and 6 text tokens, as the class's
pipelines give them.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from imprompt.families.picture import PICTURE
from tests.tiny import awake, seeded

SIDE, TEXT = 4, 6
Inputs = Callable[[int], dict[str, Any]]


class Specimen(NamedTuple):
    """A model's configuration, and its inputs for a batch."""

    model: str
    config: dict[str, Any]
    inputs: Inputs


def noise(*shape: int) -> Tensor:
    return torch.randn(shape)


def at(value: float, batch: int) -> Tensor:
    return torch.full((batch,), float(value))


def ids(first: int, width: int = 3, start: int = 0) -> Tensor:
    """Ids (I, width) of the picture's places: time, row, column."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    made = torch.zeros(SIDE * SIDE, width)
    made[:, 0] = first
    made[:, 1], made[:, 2] = rows.flatten() + start, columns.flatten() + start
    return made


def latents(batch: int, side: int = 2, channels: int = 4) -> Tensor:
    return noise(batch, channels, SIDE * side, SIDE * side)


def text(batch: int, width: int) -> dict[str, Tensor]:
    return {"encoder_hidden_states": noise(batch, TEXT, width)}


def flux_inputs(batch: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, SIDE * SIDE, 4),
        "img_ids": ids(0),
        "txt_ids": torch.zeros(TEXT, 3),
        "timestep": at(0.5, batch),
        **text(batch, 32),
        **more,
    }


def plain(width: int, time: float, side: int = 2, **more: Callable[[int], Any]) -> Inputs:
    """Latents (B, C, h, w), a time, and text of that width."""

    def of(batch: int) -> dict[str, Any]:
        rest = {name: make(batch) for name, make in more.items()}
        made = {"hidden_states": latents(batch, side), "timestep": at(time, batch)}
        return made | text(batch, width) | rest

    return of


def video(width: int, side: int = 2, **more: Callable[[int], Any]) -> Inputs:
    """Latents (B, C, 2, h, w), a timestep, and text of that width."""

    def of(batch: int) -> dict[str, Any]:
        rest = {name: make(batch) for name, make in more.items()}
        shape = noise(batch, 4, 2, SIDE * side, SIDE * side)
        return {"hidden_states": shape, "timestep": at(500, batch)} | text(batch, width) | rest

    return of


def hunyuandit(batch: int) -> dict[str, Any]:
    angle = noise(SIDE * SIDE, 8)
    return {
        "hidden_states": latents(batch),
        "timestep": at(500, batch),
        **text(batch, 8),
        "encoder_hidden_states_t5": noise(batch, TEXT, 8),
        "text_embedding_mask": torch.ones(batch, TEXT),
        "text_embedding_mask_t5": torch.ones(batch, TEXT),
        "image_meta_size": torch.tensor([[1024.0, 1024, 16, 16, 0, 0]] * batch),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": [angle.cos(), angle.sin()],
    }


def z_image(batch: int) -> dict[str, Any]:
    return {
        "x": [noise(16, 1, SIDE * 2, SIDE * 2) for _ in range(batch)],
        "cap_feats": [noise(TEXT, 16) for _ in range(batch)],
        "t": at(0.5, batch),
    }


def qwen(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, SIDE * SIDE, 16),
        **text(batch, 16),
        "encoder_hidden_states_mask": torch.ones(batch, TEXT, dtype=torch.long),
        "timestep": at(0.5, batch),
        "img_shapes": [[(1, SIDE, SIDE)]] * batch,
    }


def qwen21(batch: int) -> dict[str, Any]:
    picture = torch.arange(TEXT + SIDE * SIDE // 4) >= TEXT  # a place of its own: 2 × 2
    return {
        "hidden_states": noise(batch, SIDE * SIDE, 16),
        **text(batch, 16),
        "encoder_hidden_states_mask": torch.ones(batch, TEXT, dtype=torch.bool),
        "timestep": at(0.5, batch),
        "img_shapes": [[(1, SIDE, SIDE)]] * batch,
        "img_mask": picture.expand(batch, -1),
    }


def hidream(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch),
        "timesteps": at(500, batch),
        "encoder_hidden_states_t5": noise(batch, TEXT, 8),
        "encoder_hidden_states_llama3": noise(2, batch, TEXT, 4),
        "pooled_embeds": noise(batch, 8),
    }


def kandinsky5(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 2, SIDE * 2, SIDE * 2, 4),
        **text(batch, 16),
        "timestep": at(500, batch),
        "pooled_projections": noise(batch, 8),
        "visual_rope_pos": [torch.arange(2), torch.arange(SIDE), torch.arange(SIDE)],
        "text_rope_pos": torch.arange(TEXT),
        "scale_factor": (1.0, 1.0, 1.0),
        "sparse_params": None,
    }


def krea2(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, SIDE * SIDE, 4),
        "encoder_hidden_states": noise(batch, TEXT, 3, 16),
        "timestep": at(0.5, batch),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), ids(0)]),
        "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.bool),
    }


def ideogram4(batch: int) -> dict[str, Any]:
    rows = TEXT + SIDE * SIDE
    is_picture = torch.arange(rows) >= TEXT
    places = torch.arange(rows)[:, None].expand(-1, 3).clone()
    places[TEXT:] = ids(1000, start=1000).long()
    marks = torch.where(is_picture, PICTURE, 3)
    return {
        "hidden_states": noise(batch, rows, 4) * is_picture[:, None],
        "encoder_hidden_states": noise(batch, rows, 12) * ~is_picture[:, None],
        "timestep": at(0.5, batch),
        "position_ids": places.expand(batch, -1, -1),
        "segment_ids": torch.ones(batch, rows, dtype=torch.long),
        "indicator": marks.expand(batch, -1),
    }


def ltx(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 2 * SIDE * SIDE, 4),
        **text(batch, 12),
        "timestep": at(500, batch),
        "encoder_attention_mask": torch.ones(batch, TEXT),
        "num_frames": 2,
        "height": SIDE,
        "width": SIDE,
    }


def flux2(batch: int) -> dict[str, Any]:
    more = {"img_ids": ids(0, 4).expand(batch, -1, -1), "guidance": at(1, batch)}
    return flux_inputs(batch, **more, txt_ids=torch.zeros(batch, TEXT, 4))


def flux3(batch: int) -> dict[str, Any]:
    return flux_inputs(batch, img_ids=ids(0, 4), txt_ids=torch.zeros(TEXT, 4))


def vace(batch: int) -> dict[str, Any]:
    control = noise(batch, 6, 2, SIDE * 2, SIDE * 2)
    return video(16)(batch) | {"control_hidden_states": control}


def animate(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 12, 3, SIDE * 2, SIDE * 2),
        "timestep": at(500, batch),
        **text(batch, 16),
        "encoder_hidden_states_image": noise(batch, 2, 8),
        "pose_hidden_states": noise(batch, 4, 2, SIDE * 2, SIDE * 2),
        "face_pixel_values": noise(batch, 3, 8, 16, 16),
    }


def cogvideox(batch: int) -> dict[str, Any]:
    frames = noise(batch, 2, 4, SIDE * 2, SIDE * 2)
    angle = noise(2 * SIDE * SIDE, 8)
    turned = (angle.cos(), angle.sin())
    return {"hidden_states": frames, "timestep": at(500, batch), "image_rotary_emb": turned} | text(
        batch, 8
    )


def consisid(batch: int) -> dict[str, Any]:
    return {name: value for name, value in cogvideox(batch).items() if "rotary" not in name}


def framepack(batch: int) -> dict[str, Any]:
    def history(frames: int) -> dict[str, Tensor]:
        return {
            "latents": noise(batch, 4, frames, SIDE * 2, SIDE * 2),
            "indices": torch.arange(frames),
        }

    past = {"clean": history(2), "history_2x": history(2), "history_4x": history(4)}
    return {
        **video(16, **MASK)(batch),
        "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.long),
        "pooled_projections": noise(batch, 8),
        "image_embeds": noise(batch, 3, 6),
        "indices_latents": torch.arange(2),
        "guidance": at(1000, batch),
        **{f"latents_{name}": own["latents"] for name, own in past.items()},
        **{f"indices_latents_{name}": own["indices"] for name, own in past.items()},
    }


def hunyuan_video15(batch: int) -> dict[str, Any]:
    return {
        **video(16, 1)(batch),
        "encoder_attention_mask": torch.ones(batch, TEXT),
        "encoder_hidden_states_2": noise(batch, 2, 8),
        "encoder_attention_mask_2": torch.ones(batch, 2),
        "image_embeds": torch.zeros(batch, 2, 8),
    }


def bria_fibo(batch: int) -> dict[str, Any]:
    layers = [noise(batch, TEXT, 12) for _ in range(4)]
    return flux_inputs(batch, timestep=at(500, batch), text_encoder_layers=layers)


def bria_fibo2(batch: int) -> dict[str, Any]:
    """States of two layers; in a batch of texts that become four and two tokens, else no mask."""
    lengths = torch.tensor([TEXT, TEXT // 2] * batch)[:batch]
    return {
        "hidden_states": latents(batch),
        "timestep": at(0.5, batch),
        "encoder_hidden_states": noise(batch, 2, TEXT, 16),
        "encoder_attention_mask": torch.arange(TEXT) < lengths[:, None] if batch > 1 else None,
    }


def nucleus(batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    return qwen(batch) | {"encoder_hidden_states_mask": mask}


def glm(batch: int) -> dict[str, Any]:
    return {
        **plain(8, 500)(batch),
        "prior_token_id": torch.arange(SIDE * SIDE).expand(batch, -1) % 8,
        "prior_token_drop": torch.zeros(batch, SIDE * SIDE, dtype=torch.bool),
        "target_size": torch.full((batch, 2), 64.0),
        "crop_coords": torch.zeros(batch, 2),
    }


def ernie(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch, 1),
        "timestep": at(500, batch),
        "text_bth": noise(batch, TEXT, 8),
        "text_lens": torch.full((batch,), TEXT),
    }


def ltx2(batch: int) -> dict[str, Any]:
    return {
        **ltx(batch),
        "audio_hidden_states": noise(batch, 5, 4),
        "audio_encoder_hidden_states": noise(batch, TEXT, 12),
        "audio_encoder_attention_mask": torch.ones(batch, TEXT),
        "audio_num_frames": 5,
    }


def anyflow(batch: int) -> dict[str, Any]:
    times = torch.full((batch, 2), 500.0)
    frames = noise(batch, 2, 4, SIDE * 2, SIDE * 2)
    return {"hidden_states": frames, "timestep": times, "r_timestep": times} | text(batch, 16)


def kandinsky6(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 2, SIDE * 2, SIDE * 2, 4),
        **text(batch, 16),
        "timestep": at(500, batch),
        "pooled_projections": noise(batch, 8),
        "audio_hidden_states": noise(batch, 5, 4),
    }


JOINT = {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 32}
DOUBLE: dict[str, Any] = {"patch_size": 1, "in_channels": 4, "num_layers": 2, **JOINT}
FLUX = DOUBLE | {"num_single_layers": 2, "axes_dims_rope": (4, 4, 8)}
MASK = {"encoder_attention_mask": lambda batch: torch.ones(batch, TEXT)}
WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}
HUNYUAN_VIDEO: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}
COGVIDEO: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": SIDE * 2,
    "sample_height": SIDE * 2,
    "sample_frames": 5,
    "max_text_seq_length": TEXT,
}
SIZES = {
    "original_size": lambda batch: torch.full((batch, 2), 64),
    "target_size": lambda batch: torch.full((batch, 2), 64),
    "crop_coords": lambda batch: torch.zeros(batch, 2, dtype=torch.long),
}
ZOO = {
    "pixart": Specimen(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "sample_size": 8,
            "patch_size": 2,
            "caption_channels": 8,
            "use_additional_conditions": False,
        },
        plain(
            8,
            500,
            **MASK,
            added_cond_kwargs=lambda _: {"aspect_ratio": None, "resolution": None},
        ),
    ),
    "flux": Specimen(
        "FluxTransformer2DModel",
        FLUX | {"pooled_projection_dim": 32},
        lambda batch: flux_inputs(batch, pooled_projections=noise(batch, 32)),
    ),
    "sd3": Specimen(
        "SD3Transformer2DModel",
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 32,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        plain(32, 500, pooled_projections=lambda batch: noise(batch, 32)),
    ),
    "chroma": Specimen(
        "ChromaTransformer2DModel",
        FLUX
        | {
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        flux_inputs,
    ),
    "bria": Specimen(
        "BriaTransformer2DModel",
        FLUX | {"axes_dims_rope": [0, 4, 12]},
        lambda batch: flux_inputs(batch, timestep=at(500, batch)),
    ),
    "ovis": Specimen("OvisImageTransformer2DModel", FLUX | {"out_channels": 4}, flux_inputs),
    "longcat": Specimen(
        "LongCatImageTransformer2DModel",
        FLUX | {"pooled_projection_dim": 32},
        lambda batch: flux_inputs(batch, img_ids=ids(1, start=TEXT)),
    ),
    "flux2": Specimen(
        "Flux2Transformer2DModel",
        FLUX | {"timestep_guidance_channels": 256, "axes_dims_rope": [4, 4, 4, 4]},
        flux2,
    ),
    "flux3": Specimen(
        "Flux3Transformer2DModel",
        {
            **JOINT,
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "timestep_channels": 256,
            "axes_dims_rope": [4, 4, 4, 4],
        },
        flux3,
    ),
    "sana": Specimen(
        "SanaTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 8,
        },
        plain(8, 500, 1),
    ),
    "hunyuandit": Specimen(
        "HunyuanDiT2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": TEXT,
            "text_len_t5": TEXT,
            "activation_fn": "gelu-approximate",
        },
        hunyuandit,
    ),
    "lumina2": Specimen(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (128, 128, 128),
            "cap_feat_dim": 32,
        },
        plain(
            32,
            0.5,
            encoder_attention_mask=lambda batch: (
                torch.arange(TEXT) < torch.tensor([[TEXT - item % 2] for item in range(batch)])
            ),
        ),
    ),
    "lumina-next": Specimen(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "learn_sigma": False,
            "qk_norm": True,
            "cross_attention_dim": 32,
        },
        plain(
            32,
            0.5,
            encoder_mask=lambda batch: torch.ones(batch, TEXT),
            image_rotary_emb=lambda _: torch.polar(torch.ones(384, 384, 4), noise(384, 384, 4)),
            cross_attention_kwargs=lambda _: {},
        ),
    ),
    "auraflow": Specimen(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 256,
        },
        plain(32, 0.5),
    ),
    "qwen-image": Specimen(
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        qwen,
    ),
    "qwen-image-2.1": Specimen(
        "QwenImage21Transformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 16,
            "mlp_ratio": 2,
            "axes_dims_rope": (8, 4, 4),
        },
        qwen21,
    ),
    "z-image": Specimen(
        "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "qk_norm": True,
            "cap_feat_dim": 16,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        z_image,
    ),
    "wan": Specimen("WanTransformer3DModel", WAN, video(16)),
    "hidream": Specimen(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (32, 32),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        hidream,
    ),
    "cogview4": Specimen(
        "CogView4Transformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 4,
            "out_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
        },
        plain(8, 500, **SIZES),
    ),
    "hunyuan-image": Specimen(
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": (1, 1),
            "text_embed_dim": 16,
            "rope_axes_dim": (8, 8),
        },
        plain(
            16,
            500,
            1,
            encoder_attention_mask=lambda batch: torch.ones(batch, TEXT, dtype=torch.long),
        ),
    ),
    "hunyuan-video": Specimen(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN_VIDEO,
        video(
            16,
            1,
            **MASK,
            pooled_projections=lambda batch: noise(batch, 8),
            guidance=lambda batch: at(1000, batch),
        ),
    ),
    "kandinsky5": Specimen(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "out_visual_dim": 4,
            "patch_size": (1, 2, 2),
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
        kandinsky5,
    ),
    "krea2": Specimen(
        "Krea2Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        krea2,
    ),
    "ideogram4": Specimen(
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 12,
            "rope_theta": 10000,
            "mrope_section": (2, 1, 1),
        },
        ideogram4,
    ),
    "prx": Specimen(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 16,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        plain(16, 0.5),
    ),
    "ltx": Specimen(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 12,
            "qk_norm": "rms_norm_across_heads",
        },
        ltx,
    ),
    "cosmos": Specimen(
        "CosmosTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "mlp_ratio": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "patch_size": (1, 2, 2),
            "rope_scale": (2.0, 1.0, 1.0),
            "concat_padding_mask": False,  # else torchvision is needed
        },
        video(
            16,
            timestep=lambda batch: at(0.5, batch),
            attention_mask=lambda batch: torch.ones(batch, TEXT),
            padding_mask=lambda _: torch.zeros(1, 1, SIDE * 2, SIDE * 2),
        ),
    ),
    "skyreels-v2": Specimen("SkyReelsV2Transformer3DModel", WAN, video(16)),
    "chronoedit": Specimen("ChronoEditTransformer3DModel", WAN, video(16)),
    "wan-vace": Specimen(
        "WanVACETransformer3DModel", WAN | {"vace_layers": [0], "vace_in_channels": 6}, vace
    ),
    "wan-animate": Specimen(
        "WanAnimateTransformer3DModel",
        WAN
        | {
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 8,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 2,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        animate,
    ),
    "helios": Specimen(
        "HeliosTransformer3DModel",
        {name: value for name, value in WAN.items() if name != "rope_max_seq_len"}
        | {"rope_dim": (4, 4, 4), "has_multi_term_memory_patch": False},
        video(16),
    ),
    "sana-video": Specimen(
        "SanaVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 12,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 8,
            "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        video(8),
    ),
    "cogvideox": Specimen(
        "CogVideoXTransformer3DModel",
        COGVIDEO | {"use_rotary_positional_embeddings": True},
        cogvideox,
    ),
    "consisid": Specimen("ConsisIDTransformer3DModel", COGVIDEO, consisid),
    "cogview3plus": Specimen(
        "CogView3PlusTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 4,
            "out_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        plain(8, 500, **SIZES),
    ),
    "mochi": Specimen(
        "MochiTransformer3DModel",
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "pooled_projection_dim": 8,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "max_sequence_length": TEXT,
        },
        video(16, encoder_attention_mask=lambda batch: torch.ones(batch, TEXT, dtype=torch.bool)),
    ),
    "allegro": Specimen(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 2,
            "caption_channels": 16,
        },
        video(16, **MASK),
    ),
    "framepack": Specimen(
        "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN_VIDEO
        | {
            "patch_size": 2,
            "image_condition_type": None,
            "has_image_proj": True,
            "image_proj_dim": 6,
            "has_clean_x_embedder": True,
        },
        framepack,
    ),
    "hunyuan-video-1.5": Specimen(
        "HunyuanVideo15Transformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        hunyuan_video15,
    ),
    "motif-video": Specimen(
        "MotifVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 3,
            "num_decoder_layers": 1,
            "patch_size": 2,
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 4, 4),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        video(16, **MASK),
    ),
    "bria-fibo": Specimen(
        "BriaFiboTransformer2DModel",
        FLUX | {"axes_dims_rope": [0, 4, 12], "text_encoder_dim": 12},
        bria_fibo,
    ),
    "bria-fibo2": Specimen(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 16,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 2,
            "max_num_gist_tokens": 4,
            "gist_step": 2,
            "gist_min_text_len": TEXT // 2,
            "gist_max_text_len": TEXT,
            "axes_dims": (4, 6, 6),
            "axes_lens": (32, 32, 32),
        },
        bria_fibo2,
    ),
    "nucleus": Specimen(
        "NucleusMoEImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
            "moe_enabled": False,
        },
        nucleus,
    ),
    "glm-image": Specimen(
        "GlmImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 8,
            "time_embed_dim": 16,
            "condition_dim": 4,
            "prior_vq_quantizer_codebook_size": 8,
        },
        glm,
    ),
    "joyimage": Specimen(
        "JoyImageEditTransformer3DModel",
        {
            "in_channels": 4,
            "hidden_size": 24,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 2,
            "rope_dim_list": [4, 4, 4],
        },
        video(16),
    ),
    "easyanimate": Specimen(
        "EasyAnimateTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "num_layers": 2,
            "mmdit_layers": 1,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
        },
        video(16),
    ),
    "ernie-image": Specimen(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 8,
            "rope_axes_dim": (4, 4, 8),
        },
        ernie,
    ),
    "ltx2": Specimen(
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 2,
            "caption_channels": 12,
            "rope_double_precision": False,
        },
        ltx2,
    ),
    "anyflow": Specimen(
        "AnyFlowTransformer3DModel",
        {name: value for name, value in WAN.items() if name not in ("qk_norm", "rope_max_seq_len")},
        anyflow,
    ),
    "kandinsky6": Specimen(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "visual_cond": False,
            "in_audio_dim": 4,
            "out_audio_dim": 4,
            "model_dim_a": 16,
            "time_dim_a": 16,
            "ff_dim_a": 16,
            "axes_dims_a": (8,),
        },
        kandinsky6,
    ),
}


def specimen(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """The tiny frozen model of that family."""
    kind, config, _ = ZOO[name]
    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names inside diffusers
        model = getattr(diffusers, kind)(**config | changes)
        if hasattr(model, "pad_token"):  # Lumina-Next leaves it without contents
            nn.init.zeros_(model.pad_token)
        return awake(model)


def inputs_of(name: str, batch: int, seed: int = 1) -> dict[str, Any]:
    """Inputs for a batch, other ones for another seed."""
    with seeded(seed):
        return ZOO[name].inputs(batch)


def answer(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What the model predicts, (B, ...)."""
    out = model(**inputs).sample
    return out if isinstance(out, Tensor) else torch.stack(list(out))
