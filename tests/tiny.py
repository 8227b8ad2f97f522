"""Tiny, seeded stand-ins for the models that the tests need.

Their structure is that of the real ones; only widths shrink.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.attention.low_rank import PARTS, AttentionLowRank, ModelLowRank
from imprompt.encoders.vision import VisionEncoder
from imprompt.families.base import family_of
from imprompt.families.published import SD1, SD2, SDXL
from imprompt.projections.mlp import (
    FaceProjection,
    FullProjection,
    TextProjection,
    TransposedProjection,
)
from imprompt.projections.resampler import FacePlusProjection, FacePlusV2Projection, Resampler
from imprompt.projections.timed import CharacterProjection, TimeResampler
from imprompt.prompt import ImagePrompt
from imprompt.variants import find_variant

# The UNets as published, but narrow.
POOLED_DIM = 16
UNETS: dict[str, dict[str, Any]] = {
    "sd1": SD1 | {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8},
    "sd2": SD2
    | {
        "block_out_channels": (16, 32, 64, 64),
        "norm_num_groups": 8,
        "attention_head_dim": (2, 4, 8, 8),
    },
    "sdxl": SDXL
    | {
        "block_out_channels": (16, 32, 64),
        "norm_num_groups": 8,
        "attention_head_dim": (2, 4, 8),
        "transformer_layers_per_block": (1, 1, 2),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + POOLED_DIM,
    },
}
TEXT_TOKENS = 11
FACE_DIM = 20
FEATURE_DIMS: dict[str, int] = {
    "pooled": 24,
    "penultimate": 32,
    "last": 32,
    "face": FACE_DIM,
    "raw face": FACE_DIM,
    "face and crop": 32,
    "raw face and square": 32,
    "character": 64,
}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside; the random state outside stays what it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def freeze(module: Any) -> Any:
    return module.eval().requires_grad_(False)


def tiny_unet(base: str = "sd1", seed: int = 0, **overrides: Any) -> UNet2DConditionModel:
    """A frozen UNet of the structure of `base`; its text is as wide as the real one's."""
    with seeded(seed):
        return freeze(UNet2DConditionModel(**UNETS[base] | overrides))


SMALLEST: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
}


def smallest_unet(base: str = "sd1", **overrides: Any) -> UNet2DConditionModel:
    """Four text cross-attentions, of the SDXL structure eight: for what is slow per layer."""
    more = (
        {"transformer_layers_per_block": (1, 2), "attention_head_dim": (2, 4)}
        if base == "sdxl"
        else {}
    )
    return tiny_unet(base, **SMALLEST | more | overrides)


def tiny_encoder(seed: int = 1) -> VisionEncoder:
    """A CLIP vision tower of 257 tokens, as ViT-H's.

    The pooled and the penultimate feature have different widths.
    """
    hidden, pooled = FEATURE_DIMS["penultimate"], FEATURE_DIMS["pooled"]
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=48,
        projection_dim=pooled,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=2,
    )
    with seeded(seed):
        model = CLIPVisionModelWithProjection(config)
    return VisionEncoder(
        model,
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )


def pictures(count: int, seed: int = 2) -> list[Image.Image]:
    """Noise, wider than high."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 40, 56, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def tiny_projection(name: str, token_dim: int) -> nn.Module:
    """Of the shapes that other implementations can read too: 4 tokens for base, 4 layers and
    64-wide heads for plus.
    """
    feature_dim = FEATURE_DIMS[find_variant(name).feature]
    if name in ("plus", "portrait-unnorm", "ai-toolkit", "lynx"):
        return Resampler(feature_dim, token_dim, tokens=5, width=128)
    if name == "instantx-sd3":
        return TimeResampler(feature_dim, token_dim, tokens=5, width=128, sinusoids=32)
    if name == "instantcharacter":
        return CharacterProjection(
            feature_dim, token_dim, tokens=5, width=128, sinusoids=32, layers=(1, 2)
        )
    if name.startswith("faceid-plus"):
        kind = FacePlusProjection if name == "faceid-plus" else FacePlusV2Projection
        return kind(
            feature_dim, token_dim, face_dim=FACE_DIM, tokens=6 if name.endswith("kolors") else 4
        )
    if name == "portrait":
        return FaceProjection(feature_dim, token_dim, tokens=7)
    kinds = {
        "base": ImageProjection,
        "xlabs": ImageProjection,
        "full": FullProjection,
        "redux": TextProjection,
        "hunyuandit": TransposedProjection,
    }
    return kinds.get(name, FaceProjection)(feature_dim, token_dim)


def tiny_lora(model: UNet2DConditionModel, rank: int = 3) -> ModelLowRank:
    """For every attention, as FaceID adapters have it."""

    def sizes(attention: Any) -> dict[str, tuple[int, int, int]]:
        layers = {part: getattr(attention, part) for part in PARTS[:3]} | {
            "to_out": attention.to_out[0]
        }
        return {
            part: (layer.in_features, layer.out_features, rank) for part, layer in layers.items()
        }

    return ModelLowRank(
        AttentionLowRank(sizes(attention))
        for attention in family_of(model).attentions(model).values()
    )


def tiny_adapter(model: UNet2DConditionModel, name: str = "base", seed: int = 3) -> IPAdapter:
    """An adapter of variant `name` beside `model`, as if trained: every parameter is away from
    where it starts.
    """
    with seeded(seed):
        row = find_variant(name)
        width = model.config.encoder_hid_dim if row.widened else model.config.cross_attention_dim
        adapter = IPAdapter.for_model(model, tiny_projection(name, width))
        if row.lora:
            adapter.low_rank = tiny_lora(model)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += torch.randn_like(parameter) * (
                    0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
                )
            for (
                name,
                parameter,
            ) in adapter.named_parameters():
                # what a low-rank part adds is small beside what is there
                parameter *= 0.3 if name.endswith(".up.weight") else 1
    return adapter


def noise_inputs(model: UNet2DConditionModel, batch: int, seed: int = 4) -> dict[str, Any]:
    """Arguments of one noise prediction.

    Latents are higher than wide, and each item has its own timestep.
    """
    with seeded(seed):
        inputs = {
            "sample": torch.randn(batch, 4, 16, 8),
            "timestep": torch.randint(1000, (batch,)),
            "encoder_hidden_states": torch.randn(
                batch, TEXT_TOKENS, model.config.cross_attention_dim
            ),
        }
        if model.config.addition_embed_type == "text_time":
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.randn(batch, POOLED_DIM),
                "time_ids": torch.full((batch, 6), 32.0),
            }
    return inputs


def noise(model: nn.Module, inputs: dict[str, Any], prompt: Any = None) -> Tensor:
    """The noise that `model` predicts, with or without an image prompt."""
    return model(
        **inputs,
        cross_attention_kwargs={"ip_hidden_states": prompt} if prompt is not None else None,
    ).sample


def random_prompt(
    adapter: IPAdapter, batch: int, scale: float | Tensor = 1.0, seed: int = 5
) -> ImagePrompt:
    """A prompt from random image tokens; the adapter must be attached."""
    with seeded(seed):
        tokens = torch.randn(
            batch, 3, adapter.image_kv[0].to_k.in_features, dtype=next(adapter.parameters()).dtype
        )
    return adapter.prompt(tokens, scale=scale)


def paper_layout(adapter: IPAdapter) -> dict[str, dict[str, Tensor]]:
    """The adapter's weights as the paper's checkpoints hold them: cross-attention i is attention
    processor 2i + 1.
    """
    ip_adapter = {}
    for number, kv in enumerate(adapter.image_kv):
        ip_adapter[f"{2 * number + 1}.to_k_ip.weight"] = kv.to_k.weight.detach()
        ip_adapter[f"{2 * number + 1}.to_v_ip.weight"] = kv.to_v.weight.detach()
    for number, parts in enumerate(adapter.low_rank or ()):
        for name, weight in parts.state_dict().items():
            ip_adapter[f"{number}.{name.replace('.', '_lora.', 1)}"] = weight.detach()
    return {"image_proj": dict(adapter.projection.state_dict()), "ip_adapter": ip_adapter}


def tiny_tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        model_max_length=TEXT_TOKENS,
    )


def tiny_text_encoder(
    kind: type[CLIPTextModel] | type[CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
    width: int,
    seed: int,
) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=40,
        projection_dim=POOLED_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with seeded(seed):
        return freeze(kind(config))


def pipeline_parts(base: str) -> dict[str, Any]:
    """What the pipelines of both kinds need; the text is 32 wide."""
    encoder = tiny_encoder()
    return {
        "vae": tiny_vae(),
        "unet": tiny_unet(base, cross_attention_dim=32),
        "tokenizer": tiny_tokenizer(),
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        "image_encoder": encoder.model,
        "feature_extractor": encoder.processor,
    }


def tiny_sd() -> StableDiffusionPipeline:
    parts = pipeline_parts("sd1")
    text_encoder = tiny_text_encoder(CLIPTextModel, parts["tokenizer"], 32, seed=7)
    return quiet(
        StableDiffusionPipeline(
            **parts, text_encoder=text_encoder, safety_checker=None, requires_safety_checker=False
        )
    )


def tiny_sdxl() -> StableDiffusionXLPipeline:
    parts = pipeline_parts("sdxl")
    first = tiny_text_encoder(CLIPTextModel, parts["tokenizer"], 16, seed=8)
    second = tiny_text_encoder(CLIPTextModelWithProjection, parts["tokenizer"], 16, seed=9)
    return quiet(
        StableDiffusionXLPipeline(
            **parts,
            tokenizer_2=parts["tokenizer"],
            text_encoder=first,
            text_encoder_2=second,
            add_watermarker=False,
        )
    )


def tiny_t5(width: int = 32) -> dict[str, Any]:
    """A T5 encoder and a tokenizer of letters."""
    letters = [(chr(code), -2.0) for code in range(ord("a"), ord("z") + 1)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *letters]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_TOKENS)
    config = T5Config(
        vocab_size=len(vocab),
        d_model=width,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    with seeded(10):
        return {"tokenizer": tokenizer, "text_encoder": freeze(T5EncoderModel(config))}


def tiny_vae(shift: float | None = None, channels: int = 4, halvings: int = 1) -> AutoencoderKL:
    """Two pixels a latent, or twice that for each further halving."""
    with seeded(6):
        return freeze(
            AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * (halvings + 1),
                up_block_types=("UpDecoderBlock2D",) * (halvings + 1),
                block_out_channels=(8,) * halvings + (16,),
                norm_num_groups=4,
                latent_channels=channels,
                shift_factor=shift,
            )
        )


def tiny_pixart_model(**changes: Any) -> PixArtTransformer2DModel:
    """Two cross-attentions and a learned variance."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "sample_size": 16,
        "patch_size": 2,
        "caption_channels": 32,
        "use_additional_conditions": False,
    }
    with seeded(0):
        return awake(PixArtTransformer2DModel(**config | changes))


# Two double and two single blocks.
FLUX_BLOCKS: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}


def tiny_flux_model(**changes: Any) -> FluxTransformer2DModel:
    config = FLUX_BLOCKS | {"pooled_projection_dim": POOLED_DIM} | changes
    with seeded(0):
        return awake(FluxTransformer2DModel(**config))


def tiny_chroma_model(**changes: Any) -> ChromaTransformer2DModel:
    config = FLUX_BLOCKS | {
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    }
    with seeded(0):
        return awake(ChromaTransformer2DModel(**config | changes))


def tiny_hunyuandit_model() -> HunyuanDiT2DModel:
    """Two blocks; its own pipeline fixes the lengths of the texts."""
    with seeded(0):
        return awake(
            HunyuanDiT2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                cross_attention_dim=16,
                cross_attention_dim_t5=32,
                pooled_projection_dim=4,
                hidden_size=16,
                activation_fn="gelu-approximate",
            )
        )


def awake(model: Any) -> Any:
    """The frozen model, with noise where weights start at zero, which would hide what happens."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.05)
    return freeze(model)


def tiny_pixart() -> PixArtSigmaPipeline:
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    return quiet(
        PixArtSigmaPipeline(
            **tiny_t5(), vae=tiny_vae(), transformer=tiny_pixart_model(), scheduler=scheduler
        )
    )


def tiny_kolors() -> Any:
    """A UNet as SDXL's that projects its text; ChatGLM's tokenizer needs sentencepiece."""
    import sentencepiece

    with warnings.catch_warnings(action="ignore"):  # it runs torch.jit
        from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer, KolorsPipeline
        from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    width = 48
    letters = " ".join(chr(code) for code in range(ord("a"), ord("z") + 1))
    vocab = mkdtemp()  # it stays: the tokenizer copies the file when it is saved
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([letters] * 3),
        model_prefix=f"{vocab}/tokenizer",
        model_type="char",
        vocab_size=30,
        minloglevel=2,
    )
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=64,
        hidden_size=width,
        ffn_hidden_size=40,
        kv_channels=12,
        num_attention_heads=4,
        multi_query_attention=True,
        multi_query_group_num=2,
        add_qkv_bias=True,
        original_rope=True,
        use_cache=True,
    )
    with seeded(10):
        text_encoder = freeze(ChatGLMModel(config, empty_init=False))
        for parameter in text_encoder.parameters():
            parameter.data.normal_(std=0.2)  # diffusers leaves some of them uninitialised
    parts = pipeline_parts("sdxl")
    unet = tiny_unet(
        "sdxl",
        cross_attention_dim=32,
        encoder_hid_dim=width,
        encoder_hid_dim_type="text_proj",
        projection_class_embeddings_input_dim=6 * 8 + width,
    )
    return quiet(
        KolorsPipeline(
            vae=parts["vae"],
            text_encoder=text_encoder,
            tokenizer=ChatGLMTokenizer(f"{vocab}/tokenizer.model"),
            unet=unet,
            scheduler=parts["scheduler"],
        )
    )


def tiny_flux(text_dim: int = 32) -> FluxPipeline:
    t5, tokenizer = tiny_t5(text_dim), tiny_tokenizer()
    return quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(shift=0.1),
            text_encoder=tiny_text_encoder(CLIPTextModel, tokenizer, POOLED_DIM, seed=8),
            tokenizer=tokenizer,
            text_encoder_2=t5["text_encoder"],
            tokenizer_2=t5["tokenizer"],
            transformer=tiny_flux_model(joint_attention_dim=text_dim),
        )
    )


def tiny_chroma(text_dim: int = 32) -> ChromaPipeline:
    return quiet(
        ChromaPipeline(
            **tiny_t5(text_dim),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(shift=0.1),
            transformer=tiny_chroma_model(joint_attention_dim=text_dim),
        )
    )


def tiny_hunyuandit() -> HunyuanDiTPipeline:
    """Its VAE has eight pixels a latent, which the pipeline takes for granted."""
    t5 = tiny_t5()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocab = [*words, *letters, *(f"##{letter}" for letter in letters)]
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=77,
    )
    with seeded(8):
        text_encoder = freeze(BertModel(config))
    return quiet(
        HunyuanDiTPipeline(
            vae=tiny_vae(halvings=3),
            text_encoder=text_encoder,
            tokenizer=BertTokenizer(
                vocab={word: number for number, word in enumerate(vocab)}, model_max_length=77
            ),
            transformer=tiny_hunyuandit_model(),
            scheduler=DDPMScheduler(
                beta_schedule="scaled_linear", prediction_type="v_prediction", steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            text_encoder_2=t5["text_encoder"],
            tokenizer_2=t5["tokenizer"],
        )
    )


def tiny_sd3_model(**changes: Any) -> SD3Transformer2DModel:
    """Three joint blocks, of which the last has no text after it."""
    config = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 2 * POOLED_DIM,
        "out_channels": 4,
        "pos_embed_max_size": 32,
        "qk_norm": "rms_norm",
    }
    with seeded(0):
        return awake(SD3Transformer2DModel(**config | changes))


def tiny_sd3() -> StableDiffusion3Pipeline:
    t5, tokenizer = tiny_t5(), tiny_tokenizer()
    first, second = (
        tiny_text_encoder(CLIPTextModelWithProjection, tokenizer, 16, seed=seed) for seed in (8, 9)
    )
    return quiet(
        StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(shift=0.1),
            text_encoder=first,
            tokenizer=tokenizer,
            text_encoder_2=second,
            tokenizer_2=tokenizer,
            text_encoder_3=t5["text_encoder"],
            tokenizer_3=t5["tokenizer"],
            transformer=tiny_sd3_model(),
        )
    )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES = {"sd1": tiny_sd, "sdxl": tiny_sdxl}
# of other families, and Kolors
OTHERS = {"pixart": tiny_pixart, "flux": tiny_flux, "sd3": tiny_sd3, "kolors": tiny_kolors}
