"""A tiny random text-to-image pipeline of diffusers for every family of transformers.

Transformers are the specimens of `tests.zoo`, text encoders are of the pipelines' own classes.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import transformers
from diffusers import AutoencoderDC, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import T5Tokenizer

from imprompt import ImagePromptPipeline
from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.checkpoints.adapters import adapter_file, write_adapter
from imprompt.families.base import base_of, family_of
from imprompt.families.forms import NORMED
from imprompt.variants import find_variant
from tests.tiny import (
    FEATURE_DIMS,
    awake,
    freeze,
    quiet,
    seeded,
    tiny_encoder,
    tiny_flux,
    tiny_sd3,
    tiny_sd3_model,
    tiny_t5,
    tiny_text_encoder,
    tiny_tokenizer,
)
from tests.zoo import specimen

CHAT = """{% for one in messages if one.role == "user" %}\
{{ one.content if one.content is string else one.content[0].text }}{% endfor %}"""


class Saved:
    """A model of one family in a folder, its image encoder and an adapter for it."""

    def __init__(self, folder: Path, name: str, pipeline: Any) -> None:
        self.name, self.model, self.file = name, folder / "model", folder / "adapter.safetensors"
        pipeline.save_pretrained(self.model)
        encoder = tiny_encoder()
        encoder.model.save_pretrained(self.model / "image_encoder")
        encoder.processor.save_pretrained(self.model / "image_encoder")
        base = base_of(pipeline)
        family = family_of(base)
        layers = family.layers(base)
        width = family.size(next(iter(layers.values()))).text
        with seeded(3):
            projection = ImageProjection(FEATURE_DIMS["pooled"], width)
            form = NORMED if family.norms_queries(base) is False else None
            adapter = IPAdapter.for_model(base, projection, form=form)
            for parameter in adapter.image_kv.parameters():
                parameter.data.normal_(std=0.5)
        write_adapter(self.file, adapter_file(adapter, find_variant("base"), list(layers)))

    def pipeline(self, **options: Any) -> ImagePromptPipeline:
        return ImagePromptPipeline.from_pretrained(
            str(self.model),
            adapter=self.file,
            encoder=self.model / "image_encoder",
            device="cpu",
            **options,
        )


def letters(limit: int | None = 11) -> T5Tokenizer:
    """A tokenizer of letters that has a template for chats."""
    tokenizer = tiny_t5()["tokenizer"]
    tokenizer.chat_template = CHAT
    if limit is None:
        tokenizer.model_max_length = 10**9
    return tokenizer


def language(model: str, config: str, width: int, layers: int = 2, **more: Any) -> Any:
    """A language model of that class; `config` is the class of its configuration."""
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    with seeded(10):
        made = getattr(transformers, model)(getattr(transformers, config)(**sizes | more))
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.5)  # so that texts differ
    return freeze(made)


def vae(channels: int = 4, blocks: int = 2, **more: Any) -> AutoencoderKL:
    """2^(blocks - 1) pixels a latent."""
    with seeded(6):
        return freeze(
            AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * blocks,
                up_block_types=("UpDecoderBlock2D",) * blocks,
                block_out_channels=(8,) * blocks,
                norm_num_groups=4,
                latent_channels=channels,
                shift_factor=0.1,
                **more,
            )
        )


def video_vae() -> Any:
    """Qwen-Image's, of three-dimensional convolutions: 4 pixels a latent."""
    with seeded(6):
        return freeze(
            diffusers.AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 2, 2],
                num_res_blocks=1,
                temperal_downsample=[False, True],
                latents_mean=[0.1] * 4,
                latents_std=[0.9] * 4,
            )
        )


def made(name: str, **parts: Any) -> Any:
    """The pipeline of that name, with the usual scheduler if none is given."""
    usual = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    return quiet(getattr(diffusers, f"{name}Pipeline")(**usual | parts))


def sana() -> Any:
    with seeded(6):
        deep = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.4,
        )
    return made(
        "Sana",
        tokenizer=letters(),
        text_encoder=language("Gemma2Model", "Gemma2Config", 8),
        vae=freeze(deep),
        transformer=specimen("sana"),
    )


def qwen_encoder(width: int) -> Any:
    """Qwen 2.5 VL: a language model with a tower for pictures, which no text needs."""
    text: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 8,
        "num_key_value_heads": width // 8,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "pad_token_id": 0,
    }
    tower = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower)
    with seeded(10):
        encoder = transformers.Qwen2_5_VLForConditionalGeneration(config)
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.5)
    return freeze(encoder)


def qwen_image() -> Any:
    return made(
        "QwenImage",
        vae=video_vae(),
        text_encoder=qwen_encoder(16),
        tokenizer=letters(None),
        transformer=specimen("qwen-image"),
    )


def z_image() -> Any:
    return made(
        "ZImage",
        vae=vae(16),
        text_encoder=language("Qwen3Model", "Qwen3Config", 16),
        tokenizer=letters(),
        transformer=specimen("z-image"),
    )


def flux2_vae() -> Any:
    with seeded(6):
        model = diffusers.AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
        )
    return freeze(model)


def flux2_model() -> Any:
    return specimen("flux2", in_channels=16, joint_attention_dim=3 * 16)


def flux2() -> Any:
    text = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "model_type": "mistral",
    }
    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "model_type": "pixtral",
    }
    config = transformers.Mistral3Config(text_config=text, vision_config=tower)
    with seeded(10):
        encoder = transformers.Mistral3ForConditionalGeneration(config)
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.5)
    return made(
        "Flux2",
        vae=flux2_vae(),
        text_encoder=freeze(encoder),
        tokenizer=letters(),
        transformer=flux2_model(),
    )


def klein() -> Any:
    return made(
        "Flux2Klein",
        vae=flux2_vae(),
        text_encoder=language("Qwen3ForCausalLM", "Qwen3Config", 16),
        tokenizer=letters(),
        transformer=flux2_model(),
    )


def chroma() -> Any:
    model = specimen("chroma", in_channels=16)
    # read by the pipeline for inpainting, though the class has no such setting of its own
    model.register_to_config(guidance_embeds=False)
    return made("Chroma", vae=vae(), **tiny_t5(), transformer=model)


def lumina2() -> Any:
    return made(
        "Lumina2",
        vae=vae(blocks=4),
        text_encoder=language("Gemma2Model", "Gemma2Config", 32),
        tokenizer=letters(None),
        transformer=specimen("lumina2", axes_lens=(512, 64, 64)),
    )


def auraflow() -> Any:
    return made(
        "AuraFlow",
        vae=vae(),
        **tiny_t5(),
        transformer=specimen("auraflow"),
    )


def hunyuandit() -> Any:
    bert = transformers.BertConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
    )
    t5 = tiny_t5()
    with seeded(10):
        encoder = freeze(transformers.BertModel(bert))
    return made(
        "HunyuanDiT",
        vae=vae(blocks=4),
        text_encoder=encoder,
        tokenizer=letters(),
        text_encoder_2=t5["text_encoder"],
        tokenizer_2=t5["tokenizer"],
        transformer=specimen("hunyuandit", text_len=77, text_len_t5=256, cross_attention_dim_t5=32),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def cogview4() -> Any:
    return made(
        "CogView4",
        tokenizer=letters(),
        text_encoder=language("GlmModel", "GlmConfig", 8),
        vae=vae(),
        transformer=specimen("cogview4"),
    )


def bria() -> Any:
    return made(
        "Bria",
        vae=vae(),
        **tiny_t5(),
        transformer=specimen("bria", in_channels=16),
    )


def ovis() -> Any:
    return made(
        "OvisImage",
        vae=vae(),
        text_encoder=language("Qwen3Model", "Qwen3Config", 32),
        tokenizer=letters(None),
        transformer=specimen("ovis", in_channels=16, out_channels=16),
    )


def longcat() -> Any:
    return made(
        "LongCatImage",
        vae=vae(16),
        text_encoder=qwen_encoder(32),
        tokenizer=letters(None),
        text_processor=letters(None),  # for rewritten prompts alone
        transformer=specimen("longcat", in_channels=64),
    )


def krea2() -> Any:
    text: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"},
        "pad_token_id": 0,
    }
    tower = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "deepstack_visual_indexes": [0],
    }
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=tower)
    with seeded(10):
        encoder = transformers.Qwen3VLModel(config)
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.5)
    return made(
        "Krea2",
        vae=video_vae(),
        text_encoder=freeze(encoder),
        tokenizer=letters(None),
        transformer=specimen("krea2", in_channels=16),
        text_encoder_select_layers=(0, 1, 2),
    )


def prx() -> Any:
    from diffusers.pipelines.prx import pipeline_prx

    if not hasattr(pipeline_prx, "ftfy"):  # not installed; it repairs broken letters
        vars(pipeline_prx)["ftfy"] = SimpleNamespace(fix_text=str)
    return made("PRX", vae=vae(), **tiny_t5(), transformer=specimen("prx", context_in_dim=32))


def lumina_next() -> Any:
    return made(
        "Lumina",
        vae=vae(blocks=4),
        text_encoder=language("Gemma2Model", "Gemma2Config", 32),
        tokenizer=letters(None),
        transformer=specimen("lumina-next", learn_sigma=True),
    )


def kandinsky5() -> Any:
    from diffusers.pipelines.kandinsky5 import pipeline_kandinsky_t2i

    if not hasattr(pipeline_kandinsky_t2i, "ftfy"):  # not installed; it repairs broken letters
        vars(pipeline_kandinsky_t2i)["ftfy"] = SimpleNamespace(fix_text=str)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 77
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    with seeded(10):
        pooled = freeze(transformers.CLIPTextModel(config))
    return made(
        "Kandinsky5T2I",
        vae=vae(blocks=4),
        text_encoder=qwen_encoder(16),
        tokenizer=letters(None),
        text_encoder_2=pooled,
        tokenizer_2=tokenizer,
        transformer=specimen("kandinsky5"),
    )


def hidream() -> Any:
    tokenizer, t5 = tiny_tokenizer(), tiny_t5()
    first, second = (
        tiny_text_encoder(transformers.CLIPTextModelWithProjection, tokenizer, 16, seed=seed)
        for seed in (8, 9)
    )
    return made(
        "HiDreamImage",
        vae=vae(),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=t5["text_encoder"],
        tokenizer_3=t5["tokenizer"],
        text_encoder_4=language("LlamaForCausalLM", "LlamaConfig", 16),
        tokenizer_4=letters(),
        transformer=specimen("hidream", text_emb_dim=32, caption_channels=[32, 16]),
    )


def controlnet(name: str, model: Any) -> Any:
    """A ControlNet of that class for a transformer, with noise where its weights start at zero."""
    kind = getattr(diffusers, name)
    takes = inspect.signature(kind.__init__).parameters
    config = {key: value for key, value in model.config.items() if key in takes}
    config |= dict.fromkeys(("num_layers", "num_single_layers"), 1)
    with seeded(12):
        return awake(kind(**{key: value for key, value in config.items() if key in takes}))


def sd3() -> Any:
    """Of 16 channels, which its pipeline for inpainting checks."""
    pipeline = tiny_sd3()
    model = tiny_sd3_model(in_channels=16, out_channels=16)
    pipeline.register_modules(vae=vae(16), transformer=model)
    return pipeline


# Options of each call, where the default is for larger text encoders.
OPTIONS: dict[str, dict[str, Any]] = {
    "flux": {"true_cfg_scale": 3.0},
    "sana": {"complex_human_instruction": None},
    "flux2": {"text_encoder_out_layers": (0, 1, 2)},
    "klein": {"text_encoder_out_layers": (0, 1, 2)},
}
# What a pipeline says of its pictures' sizes, where it makes no others; here they are tiny.
SIZES: dict[str, dict[str, Any]] = {
    "kandinsky5": {"resolutions": [(32, 64), (64, 32)]},
    "hidream": {"default_sample_size": 23},
}
FAMILY_PIPELINES: dict[str, Callable[[], Any]] = {
    "sana": sana,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "flux2": flux2,
    "klein": klein,
    "chroma": chroma,
    "lumina2": lumina2,
    "auraflow": auraflow,
    "hunyuandit": hunyuandit,
    "cogview4": cogview4,
    "flux": tiny_flux,
    "sd3": sd3,
    "krea2": krea2,
    "ovis": ovis,
    "longcat": longcat,
    "bria": bria,
    "prx": prx,
    "kandinsky5": kandinsky5,
    "hidream": hidream,
    "lumina-next": lumina_next,
}
