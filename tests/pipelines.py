"""A tiny random pipeline of every class in diffusers that has one of the zoo's transformers.

Its transformer is the zoo's specimen, its VAE a tiny one of the class that it asks for, and its
texts are given as embeddings: those of the prompt lie about 1, those of the negative prompt about
-1, so that each row of a call of the transformer tells which it has.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL import Image
from torch import Tensor, nn

from imprompt.families.picture import PICTURE
from tests.parts import VAES, qwen_vae, wan_vae
from tests.tiny import freeze, quiet, seeded
from tests.tiny_pipelines import DEEP, controlnet
from tests.zoo import TEXT, ZOO, specimen

SIZE = 32
FRAMES = 5


class Part(nn.Module):
    """A component that is asked for its precision and its place alone."""

    dtype, device = torch.float32, torch.device("cpu")


class Case(NamedTuple):
    """A pipeline over one of the zoo's transformers.

    family   of the transformer
    guided   whether it runs a negative branch
    channels of the VAE's latents
    changes  of the transformer's configuration
    parts    components that the family's do not give, by name, made when they are needed
    call     arguments of the call that the family's do not give
    module   names replaced in the pipeline's module, which has sizes of pictures in them
    settings attributes of the pipeline
    config   entries of the transformer's configuration that its class does not have
    places   of the picture, in all frames
    timed    whether the model is told of time in a way that tells progress
    """

    family: str
    guided: bool = True
    channels: int = 4
    changes: Mapping[str, Any] = {}
    parts: Mapping[str, Callable[[], Any]] = {}
    call: Mapping[str, Any] = {}
    module: Mapping[str, Any] = {}
    settings: Mapping[str, Any] = {}
    config: Mapping[str, Any] = {}
    places: int = 64
    timed: bool = True


def picture(mode: str = "RGB", size: int = SIZE) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def embedding(shape: tuple[int, ...], sign: int) -> Tensor:
    with seeded(sum(shape)):
        return sign + 0.3 * torch.randn(shape)


class PlainVAE(Part):
    """A VAE of no class: four pixels a latent, in time too; it encodes to their means."""

    spatial_compression_ratio = temporal_compression_ratio = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.config = FrozenDict(
            latent_channels=channels,
            z_dim=channels,
            scaling_factor=0.5,
            scale_factor_spatial=4,
            scale_factor_temporal=4,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
            block_out_channels=(8, 8, 8),
            latents_mean=None,
            latents_std=None,
            invert_scale_latents=False,
        )
        self.channels = channels
        self.latents_mean, self.latents_std = torch.zeros(channels), torch.ones(channels)

    def encode(self, x: Tensor) -> Any:
        """Latents of pixels (B, 3, h, w) or (B, 3, F, h, w)."""
        kept = F.adaptive_avg_pool3d if x.ndim == 5 else F.adaptive_avg_pool2d
        sides = [side // 4 for side in x.shape[-2:]]
        frames = [(x.shape[2] + 3) // 4] if x.ndim == 5 else []
        small = kept(x, (*frames, *sides)).mean(1, keepdim=True)
        means = small.expand(-1, 2 * self.channels, *(-1,) * (x.ndim - 2)).contiguous()
        made = DiagonalGaussianDistribution(means)
        return AutoencoderKLOutput(latent_dist=made)


# --- What a call is given, by family: names of embeddings and their shapes without the batch.

MASK = (TEXT,)
TEXTS: dict[str, dict[str, tuple[int, ...]]] = {
    "pixart": {"prompt_embeds": (TEXT, 8), "prompt_attention_mask": MASK},
    "flux": {"prompt_embeds": (TEXT, 32), "pooled_prompt_embeds": (32,)},
    "sd3": {"prompt_embeds": (TEXT, 32), "pooled_prompt_embeds": (32,)},
    "chroma": {"prompt_embeds": (TEXT, 32), "prompt_attention_mask": MASK},
    "flux2": {"prompt_embeds": (TEXT, 32)},
    "sana": {"prompt_embeds": (TEXT, 8), "prompt_attention_mask": MASK},
    "hunyuandit": {
        "prompt_embeds": (TEXT, 8),
        "prompt_embeds_2": (TEXT, 8),
        "prompt_attention_mask": MASK,
        "prompt_attention_mask_2": MASK,
    },
    "lumina2": {"prompt_embeds": (TEXT, 32), "prompt_attention_mask": MASK},
    "lumina-next": {"prompt_embeds": (TEXT, 32), "prompt_attention_mask": MASK},
    "auraflow": {"prompt_embeds": (TEXT, 32), "prompt_attention_mask": MASK},
    "qwen-image": {"prompt_embeds": (TEXT, 16), "prompt_embeds_mask": MASK},
    "z-image": {"prompt_embeds": (TEXT, 16)},
    "wan": {"prompt_embeds": (TEXT, 16)},
    "hidream": {
        "prompt_embeds_t5": (TEXT, 8),
        "prompt_embeds_llama3": (TEXT, 4),
        "pooled_prompt_embeds": (8,),
    },
    "cogview4": {"prompt_embeds": (TEXT, 8)},
    "ltx": {"prompt_embeds": (TEXT, 12), "prompt_attention_mask": MASK},
    "cogvideox": {"prompt_embeds": (TEXT, 8)},
    "cogview3plus": {"prompt_embeds": (TEXT, 8)},
    "mochi": {"prompt_embeds": (TEXT, 16), "prompt_attention_mask": MASK},
    "allegro": {"prompt_embeds": (TEXT, 16), "prompt_attention_mask": MASK},
    "framepack": {
        "prompt_embeds": (TEXT, 16),
        "pooled_prompt_embeds": (8,),
        "prompt_attention_mask": MASK,
    },
    "hunyuan-video": {
        "prompt_embeds": (TEXT, 16),
        "pooled_prompt_embeds": (8,),
        "prompt_attention_mask": MASK,
    },
    "hunyuan-image": {
        "prompt_embeds": (TEXT, 16),
        "prompt_embeds_mask": MASK,
        "prompt_embeds_2": (2, 8),
        "prompt_embeds_mask_2": (2,),
    },
    "hunyuan-video-1.5": {
        "prompt_embeds": (TEXT, 16),
        "prompt_embeds_mask": MASK,
        "prompt_embeds_2": (2, 8),
        "prompt_embeds_mask_2": (2,),
    },
    "bria-fibo2": {"prompt_embeds": (2, TEXT, 16), "prompt_embeds_mask": MASK},
    "motif-video": {"prompt_embeds": (TEXT, 16), "prompt_attention_mask": MASK},
    "nucleus": {"prompt_embeds": (TEXT, 16), "prompt_embeds_mask": MASK},
    "glm-image": {"prompt_embeds": (TEXT, 8)},
    "joyimage": {"prompt_embeds": (TEXT, 16), "prompt_embeds_mask": MASK},
    "easyanimate": {"prompt_embeds": (TEXT, 16), "prompt_attention_mask": MASK},
    "ernie-image": {"prompt_embeds": (TEXT, 8)},
    "sana-video": {"prompt_embeds": (TEXT, 8), "prompt_attention_mask": MASK},
    "skyreels-v2": {"prompt_embeds": (TEXT, 16)},
    "wan-vace": {"prompt_embeds": (TEXT, 16)},
    "wan-animate": {"prompt_embeds": (TEXT, 16)},
    "chronoedit": {"prompt_embeds": (TEXT, 16)},
    "helios": {"prompt_embeds": (TEXT, 16)},
    "kandinsky6": {"prompt_embeds": (TEXT, 16), "pooled_prompt_embeds": (8,)},
    "kandinsky5": {"prompt_embeds_qwen": (TEXT, 16), "prompt_embeds_clip": (8,)},
    "krea2": {"prompt_embeds": (TEXT, 3, 16), "prompt_embeds_mask": MASK},
    "prx": {"prompt_embeds": (TEXT, 16), "prompt_attention_mask": MASK},
    "bria": {"prompt_embeds": (TEXT, 32)},
    "ovis": {"prompt_embeds": (TEXT, 32)},
    "longcat": {"prompt_embeds": (TEXT, 32)},
    "cosmos": {"prompt_embeds": (TEXT, 16)},
    "anyflow": {"prompt_embeds": (TEXT, 16)},
    "ltx2": {"prompt_embeds": (TEXT, 12), "prompt_attention_mask": MASK},
}
BOOL_MASKS = ("chroma", "mochi", "nucleus", "krea2", "bria-fibo2")


def texts(family: str) -> dict[str, Any]:
    """Return the embeddings of a prompt and of its negative, as that family's pipelines take."""
    made: dict[str, Any] = {}
    for name, shape in TEXTS.get(family, {}).items():
        for key, sign in ((name, 1), (f"negative_{name}", -1)):
            mask = torch.ones(1, *shape, dtype=torch.bool if family in BOOL_MASKS else torch.long)
            made[key] = mask if "mask" in name else embedding((1, *shape), sign)
    if family in ("z-image", "ernie-image"):
        made = {name: [one[0]] for name, one in made.items()}
    if family == "kandinsky5":
        ends = torch.tensor([0, TEXT], dtype=torch.int32)
        made |= {"prompt_cu_seqlens": ends, "negative_prompt_cu_seqlens": ends}
    if family == "hidream":
        made = {n: one.expand(2, 1, -1, -1) if "llama" in n else one for n, one in made.items()}
    return made


COMMON: dict[str, Any] = {
    "num_inference_steps": 2,
    "height": SIZE,
    "width": SIZE,
    "num_frames": FRAMES,
    "frames": FRAMES,
    "output_type": "latent",
    "return_dict": False,
    "true_cfg_scale": 3.0,
    "use_resolution_binning": False,
    "clean_caption": False,
    "image": picture(),
    "mask_image": picture("L"),
    "control_image": picture(),
    "control_mask": picture("L"),
    "video": [picture()] * FRAMES,
    "control_video": [picture()] * FRAMES,
}


def controlled(name: str, family: str, **changes: Any) -> Mapping[str, Callable[[], Any]]:
    """A ControlNet of that class, for the family's specimen."""
    return {"controlnet": lambda: controlnet(name, ZOO[family].config, **changes)}


def karras() -> Any:
    """Cosmos 2's."""
    return diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)


def ideogram4_text(grid_h: int, grid_w: int, **_: Any) -> tuple[Tensor, ...]:
    """What Ideogram 4's pipeline makes of a prompt: its states, and marks of all rows."""
    picture = grid_h * grid_w
    rows, columns = torch.meshgrid(torch.arange(grid_h), torch.arange(grid_w), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1) + 1000
    words = torch.arange(TEXT)[:, None].expand(-1, 3)
    marks = torch.tensor([[3] * TEXT + [PICTURE] * picture])
    states = torch.cat([embedding((1, TEXT, 12), 1), torch.zeros(1, picture, 12)], 1)
    return states, torch.cat([words, places])[None], torch.ones_like(marks), marks


def longcat_text(prompt_embeds: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """What LongCat's pipeline makes of a prompt: its states and ids."""
    return prompt_embeds, torch.zeros(TEXT, 3)


def fibo_text(**_: Any) -> tuple[Any, ...]:
    """What Bria FIBO's pipeline makes of two prompts: states, those of all layers, and masks."""
    own: list[Any] = []
    for sign in (1, -1):
        layers = [embedding((1, TEXT, 12), sign)] * 4
        own += [embedding((1, TEXT, 32), sign), torch.zeros(TEXT, 3), torch.ones(1, TEXT), layers]
    one, ids, mask, layers, other, _, other_mask, others = own
    return one, other, ids, mask, other_mask, layers, others


def ltx_text(**_: Any) -> tuple[Tensor, ...]:
    """What LTX's pipeline makes of two prompts: states and masks."""
    mask = torch.ones(1, TEXT, dtype=torch.long)
    return embedding((1, TEXT, 12), 1), mask, embedding((1, TEXT, 12), -1), mask


class Safe(Part):
    """A safety checker that lets everything pass."""

    def check_text_safety(self, _prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


class Connectors(Part):
    """LTX-2's way from a text to that of the picture and that of the sound: the text itself."""

    def forward(self, text: Tensor, mask: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return text, text, mask


class AudioVAE(Part):
    """LTX-2's: what is asked of it before anything is decoded."""

    mel_compression_ratio = temporal_compression_ratio = 4
    latents_mean, latents_std = torch.zeros(4), torch.ones(4)
    config = SimpleNamespace(sample_rate=16000, mel_hop_length=160, mel_bins=4, latent_channels=4)


PLAIN: dict[str, Any] = {"dual_attention_layers": ()}
PLACES: dict[str, Any] = {
    "control_layers_places": [0],
    "control_refiner_layers_places": [0],
    "control_in_dim": 16,
}
FLUX, SD3, CHROMA = Case("flux", channels=1), Case("sd3"), Case("chroma", channels=1)
CONTROL = FLUX._replace(guided=False, changes={"in_channels": 8, "out_channels": 4})
CONTROLNET = FLUX._replace(guided=False, parts=controlled("FluxControlNetModel", "flux"))
KONTEXT = FLUX._replace(
    call={"max_area": SIZE * SIZE}, module={"PREFERRED_KONTEXT_RESOLUTIONS": [(SIZE, SIZE)]}
)
QWEN, Z_IMAGE, FLUX2 = Case("qwen-image"), Case("z-image", channels=16), Case("flux2", channels=1)
EDIT = QWEN._replace(module={"calculate_dimensions": lambda *_: (SIZE, SIZE, None)})
REFERENCE = {"image": picture(size=64)}
SANA = Case("sana", places=256)
SPRINT = SANA._replace(
    timed=False,
    guided=False,
    changes={"guidance_embeds": True},
    parts={"scheduler": diffusers.SCMScheduler},
)
WAN, LTX = Case("wan", places=32), Case("ltx", places=128)
HUNYUANDIT = Case("hunyuandit", parts={"vae": DEEP}, call={"height": 64, "width": 64}, places=16)
GUIDER = {"guider": diffusers.ClassifierFreeGuidance}
SAFE = {"safety_checker": Safe}
LTX2 = Case("ltx2", parts={"connectors": Connectors, "audio_vae": AudioVAE}, places=128)
SEEN = {"image_dim": 8, "added_kv_proj_dim": 24}
SEES = {"encode_image": lambda *_: torch.ones(1, 2, 8)}
KANDINSKY5 = Case(
    "kandinsky5", parts={"vae": DEEP}, settings={"resolutions": [(SIZE, SIZE)]}, places=4
)
HELIOS = Case(
    "helios",
    changes={"has_multi_term_memory_patch": True},
    parts={"scheduler": lambda: diffusers.HeliosScheduler(stages=1)},
    call={"image": None, "video": None},
    places=144,
)
COSMOS2 = Case("cosmos", parts=SAFE | {"scheduler": karras})
CASES: dict[str, Case] = {
    "Flux": FLUX,
    "FluxImg2Img": FLUX,
    "FluxInpaint": FLUX,
    "FluxControl": CONTROL,
    "FluxControlImg2Img": CONTROL,
    "FluxControlInpaint": CONTROL,
    "FluxControlNet": CONTROLNET._replace(guided=True),
    "FluxControlNetImg2Img": CONTROLNET,
    "FluxControlNetInpaint": CONTROLNET,
    "FluxFill": CONTROL._replace(changes={"in_channels": 24, "out_channels": 4}),
    "FluxKontext": KONTEXT,
    "FluxKontextInpaint": KONTEXT,
    "StableDiffusion3": SD3,
    "StableDiffusion3 with skip-layer guidance": SD3._replace(
        call={
            "skip_guidance_layers": [1],
            "skip_layer_guidance_start": 0.0,
            "skip_layer_guidance_stop": 0.9,
        }
    ),
    "StableDiffusion3Img2Img": SD3,
    "StableDiffusion3Inpaint": SD3._replace(
        channels=16, changes={"in_channels": 16, "out_channels": 16}
    ),
    "StableDiffusion3ControlNet": SD3._replace(
        parts=controlled("SD3ControlNetModel", "sd3", **PLAIN)
    ),
    "StableDiffusion3ControlNetInpainting": SD3._replace(
        parts=controlled("SD3ControlNetModel", "sd3", **PLAIN, extra_conditioning_channels=1)
    ),
    "Chroma": CHROMA,
    "ChromaImg2Img": CHROMA,
    "ChromaInpaint": CHROMA._replace(config={"guidance_embeds": False}),
    "QwenImage": QWEN,
    "QwenImageImg2Img": QWEN,
    "QwenImageInpaint": QWEN,
    "QwenImageControlNet": QWEN._replace(
        parts=controlled("QwenImageControlNetModel", "qwen-image")
    ),
    "QwenImageControlNetInpaint": QWEN._replace(
        parts=controlled("QwenImageControlNetModel", "qwen-image", extra_condition_channels=4)
    ),
    "QwenImageEdit": EDIT,
    "QwenImageEditPlus": EDIT._replace(module={"calculate_dimensions": lambda *_: (SIZE, SIZE)}),
    "QwenImageEditInpaint": EDIT,
    "QwenImageLayered": EDIT._replace(
        module={"calculate_dimensions": lambda *_: (SIZE, SIZE)},
        parts={"text_encoder": Part, "vae": lambda: qwen_vae(3, input_channels=4)},
        channels=3,
        changes={
            "in_channels": 12,
            "out_channels": 3,
            "use_additional_t_cond": True,
            "use_layer3d_rope": True,
        },
        call={"prompt": "a", "layers": 2, "image": picture("RGBA"), "output_type": "pt"},
        places=3 * 64,
    ),
    "ZImage": Z_IMAGE,
    "ZImage with guidance that ends early": Z_IMAGE._replace(call={"cfg_truncation": 0.3}),
    "ZImageImg2Img": Z_IMAGE,
    "ZImageInpaint": Z_IMAGE,
    "ZImageControlNet": Z_IMAGE._replace(
        parts=controlled("ZImageControlNetModel", "z-image", **PLACES)
    ),
    "ZImageControlNetInpaint": Z_IMAGE._replace(
        parts=controlled("ZImageControlNetModel", "z-image", **PLACES | {"control_in_dim": 33})
    ),
    "Flux2": FLUX2._replace(guided=False, call={"image": None}),
    "Flux2 with a reference": FLUX2._replace(guided=False, call=REFERENCE),
    "Flux2Klein": FLUX2._replace(call={"image": None}),
    "Flux2Klein with a reference": FLUX2._replace(call=REFERENCE),
    "Flux2KleinInpaint": FLUX2._replace(call=REFERENCE, places=256),
    "Flux2KleinKV": FLUX2._replace(guided=False, call=REFERENCE),
    "Sana": SANA,
    "SanaSprint": SPRINT,
    "SanaSprintImg2Img": SPRINT._replace(call={"strength": 1.0, "num_inference_steps": 2}),
    "SanaPAG": SANA,
    "SanaControlNet": SANA._replace(parts=controlled("SanaControlNetModel", "sana")),
    "PixArtAlpha": Case("pixart"),
    "PixArtSigma": Case("pixart"),
    "PixArtSigmaPAG": Case("pixart"),
    "Wan": WAN,
    "WanVideoToVideo": WAN,
    "WanImageToVideo": WAN._replace(changes={"in_channels": 12}),
    "LucyEdit": WAN._replace(changes={"in_channels": 8}),
    "LTX": LTX,
    "LTXImageToVideo": LTX,
    "LTXCondition": LTX,
    "HunyuanDiT": HUNYUANDIT,
    "HunyuanDiTPAG": HUNYUANDIT,
    "HunyuanDiTControlNet": HUNYUANDIT._replace(
        parts={
            "vae": DEEP,
            **controlled(
                "HunyuanDiT2DControlNetModel",
                "hunyuandit",
                transformer_num_layers=2,
                use_style_cond_and_image_meta_size=True,
            ),
        },
        call={"height": 64, "width": 64, "control_image": picture(size=64)},
    ),
    "Lumina2": Case("lumina2", places=4),
    "Lumina": Case("lumina-next", changes={"learn_sigma": True}, places=4),
    "AuraFlow": Case("auraflow"),
    "CogView4": Case("cogview4"),
    "CogView4Control": Case("cogview4", changes={"in_channels": 8, "out_channels": 4}),
    "Bria": Case("bria", channels=1),
    "OvisImage": Case("ovis", channels=1),
    "LongCatImage": Case(
        "longcat",
        channels=16,
        changes={"in_channels": 64},
        call={"enable_prompt_rewrite": False},
        settings={"encode_prompt": longcat_text},
    ),
    "PRX": Case("prx"),
    "PRXPixel": Case("prx", places=256),
    "Krea2": Case("krea2", channels=1),
    "HunyuanImage": Case("hunyuan-image", changes={"text_embed_2_dim": 8}, parts=GUIDER),
    "HunyuanVideo": Case("hunyuan-video", places=128),
    "HunyuanVideoImageToVideo": Case(
        "hunyuan-video", changes={"image_condition_type": "token_replace"}, places=128
    ),
    "HunyuanSkyreelsImageToVideo": Case("hunyuan-video", changes={"in_channels": 8}, places=128),
    "HunyuanVideo15": Case(
        "hunyuan-video-1.5", changes={"in_channels": 9}, parts=GUIDER, places=128
    ),
    "MotifVideo": Case("motif-video", changes={"in_channels": 9}, parts=GUIDER, places=32),
    "Kandinsky5T2I": KANDINSKY5,
    "Kandinsky5I2I": KANDINSKY5._replace(changes={"visual_cond": True}),
    "Kandinsky5T2V": Case("kandinsky5", places=32),
    "Kandinsky5I2V": Case(
        "kandinsky5", changes={"visual_cond": True}, call={"num_frames": 17}, places=80
    ),
    "Kandinsky6TI2VA": Case("kandinsky6", call={"sample_audio": False, "image": None}, places=32),
    "Cosmos2TextToImage": COSMOS2._replace(places=16),
    "Cosmos2VideoToWorld": COSMOS2._replace(changes={"in_channels": 5}, places=32),
    "CosmosTextToWorld": Case("cosmos", parts=SAFE, places=32, timed=False),
    "CosmosVideoToWorld": Case(
        "cosmos",
        changes={"in_channels": 5},
        parts=SAFE,
        call={"video": None},
        places=32,
        timed=False,
    ),
    "CogVideoX": Case("cogvideox", changes={"attention_head_dim": 16}, places=32),
    "CogVideoXFunControl": Case(
        "cogvideox", changes={"attention_head_dim": 16, "in_channels": 8}, places=32
    ),
    "CogVideoXImageToVideo": Case(
        "cogvideox", changes={"attention_head_dim": 16, "in_channels": 8}, places=32
    ),
    "CogVideoXVideoToVideo": Case("cogvideox", changes={"attention_head_dim": 16}, places=32),
    "CogView3Plus": Case("cogview3plus"),
    "Mochi": Case("mochi", places=4),
    "Allegro": Case("allegro", places=32),
    "NucleusMoEImage": Case("nucleus"),
    "GlmImage": Case(
        "glm-image", call={"prior_token_ids": torch.arange(64)[None] % 8, "image": None}
    ),
    "EasyAnimate": Case("easyanimate", places=32),
    "ErnieImage": Case("ernie-image"),
    "SanaVideo": Case("sana-video", parts={"vae": wan_vae}, places=32),
    "SanaImageToVideo": Case("sana-video", parts={"vae": wan_vae}, places=32),
    "SkyReelsV2": Case("skyreels-v2", places=32),
    "SkyReelsV2ImageToVideo": Case(
        "skyreels-v2", changes=SEEN | {"in_channels": 12}, settings=SEES, places=32
    ),
    "SkyReelsV2DiffusionForcing": Case("skyreels-v2", call={"prompt": None}, places=32),
    "SkyReelsV2DiffusionForcingImageToVideo": Case("skyreels-v2", places=32),
    "SkyReelsV2DiffusionForcingVideoToVideo": Case(
        "skyreels-v2", call={"overlap_history": 1, "base_num_frames": 9}, places=32
    ),
    "WanVACE": Case("wan-vace", changes={"vace_in_channels": 24}, places=32),
    "WanAnimate": Case(
        "wan-animate",
        settings=SEES,
        call={
            "pose_video": [picture()] * FRAMES,
            "face_video": [picture()] * FRAMES,
            "segment_frame_length": FRAMES,
            "guidance_scale": 3.0,
        },
        places=32,
    ),
    "ChronoEdit": Case("chronoedit", changes=SEEN | {"in_channels": 12}, settings=SEES, places=32),
    "Helios": HELIOS,
    "LTX2": LTX2,
    "Ideogram4": Case(
        "ideogram4",
        guided=False,
        parts={"unconditional_transformer": lambda: specimen("ideogram4", seed=1)},
        settings={"encode_prompt": ideogram4_text},
        call={
            "prompt": "a",
            "max_sequence_length": TEXT,
            "guidance_scale": 3.0,
            "guidance_schedule": None,
        },
    ),
    "AnyFlow": Case("anyflow", call={"guidance_scale": 3.0, "video": None}, places=32),
    "BriaFibo": Case(
        "bria-fibo",
        channels=4,
        settings={"encode_prompt": fibo_text},
        call={"prompt": "a"},
        places=4,
    ),
    "BriaFibo2": Case("bria-fibo2", call={"image": None}),
    "BriaFibo2 with a reference": Case("bria-fibo2", call=REFERENCE),
    "LTX2ImageToVideo": LTX2._replace(call={"image_crf": 0}),
    "LTX2Condition": LTX2,
    "LTXI2VLongMultiPrompt": LTX._replace(
        guided=False,
        parts={"scheduler": diffusers.FlowMatchEulerDiscreteScheduler},
        settings={"encode_prompt": ltx_text},
        call={"prompt": "a", "num_inference_steps": 4},
    ),
    "MotifVideoImage2Video": Case(
        "motif-video", changes={"in_channels": 9}, parts=GUIDER, call={"prompt": None}, places=32
    ),
    "HunyuanVideoFramepack": Case(
        "framepack",
        settings={"encode_image": lambda *_, **__: torch.ones(1, 3, 6)},
        call={"latent_window_size": 2},
        places=32,
    ),
    "HiDreamImage": Case("hidream", settings={"default_sample_size": 16}),
}


def pipeline_class(name: str) -> Any:
    return getattr(diffusers, f"{name.split(' ')[0]}Pipeline")


SCHEDULERS = {
    "KarrasDiffusionSchedulers": "DDIMScheduler",
    "SchedulerMixin": "",
}


def part(case: Case, name: str, annotation: Any) -> Any:
    """Return the component of that name, or None."""
    kinds = [getattr(one, "__name__", "") for one in getattr(annotation, "__args__", [annotation])]
    if name in case.parts:
        return case.parts[name]()
    if name == "transformer":
        made: Any = specimen(case.family, **case.changes)
        made.register_to_config(**case.config)
        return made
    if name == "vae":
        return VAES.get(kinds[0], PlainVAE)(case.channels)
    if name == "scheduler":
        kind = SCHEDULERS.get(kinds[0], kinds[0]) or "FlowMatchEulerDiscreteScheduler"
        return getattr(diffusers, kind)()
    return None


def pipeline(name: str, case: Case) -> Any:
    """Return the tiny pipeline."""
    kind = pipeline_class(name)
    parameters = [*inspect.signature(kind.__init__).parameters.values()][1:]
    with seeded(0), warnings.catch_warnings(action="ignore"):
        parts = {
            one.name: part(case, one.name, one.annotation)
            for one in parameters
            if one.default in (inspect.Parameter.empty, None) or one.name in case.parts
        }
        for one in parts.values():
            if isinstance(one, nn.Module):
                freeze(one)
        made = quiet(kind(**parts))
    for setting, value in case.settings.items():
        setattr(made, setting, value)
    return made


def call(pipe: Any, case: Case) -> list[Any]:
    """Return what the pipeline makes, always from the same noise."""
    takes = inspect.signature(type(pipe).__call__).parameters
    given = {**COMMON, **texts(case.family), **case.call}
    given = {key: value for key, value in given.items() if key in takes}
    if "strength" in takes:
        given = {**given, "num_inference_steps": 4, "strength": 0.6, **case.call}
    if "negative_prompt" in takes and takes["negative_prompt"].default == "":
        given["negative_prompt"] = None
    module = sys.modules[type(pipe).__module__]
    with seeded(7), patch.dict(vars(module), case.module), warnings.catch_warnings(action="ignore"):
        made = pipe(**given)
    return [
        torch.as_tensor(np.asarray(one))
        for one in torch.utils._pytree.tree_leaves(made)
        if one is not None
    ]
