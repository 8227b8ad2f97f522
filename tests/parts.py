"""Tiny parts of pipelines beside the model: autoencoders by class, and texts by kind.

A text is a tokenizer of letters and its encoder, by the names that pipelines have for them.
"""

from collections.abc import Callable, Mapping
from tempfile import mkdtemp
from typing import Any
from warnings import catch_warnings

import diffusers
import transformers
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Tokenizer

from tests.tiny import POOLED_DIM, TEXT_TOKENS, freeze, seeded

Text = dict[str, Any]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]

# --- Autoencoders.


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


def flux2_vae(channels: int = 4) -> nn.Module:
    """Two pixels a latent; latents are normalised by statistics of patches."""
    with seeded(6):
        vae: Any = diffusers.AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=channels,
        )
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
    return freeze(vae)


def dc_vae(channels: int = 4) -> nn.Module:
    """Sana's: two pixels a latent."""
    with seeded(6):
        return freeze(
            diffusers.AutoencoderDC(
                latent_channels=channels,
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
                scaling_factor=0.41407,
            )
        )


def video_vae(kind: str, channels: int = 4, halvings: int = 1, **more: Any) -> nn.Module:
    """Wan's and what follows it: every halving is of the sides and of the frames."""
    with seeded(6):
        return freeze(
            getattr(diffusers, kind)(
                base_dim=8,
                z_dim=channels,
                dim_mult=[1] * (halvings + 1),
                num_res_blocks=1,
                temperal_downsample=[True] * halvings,
                latents_mean=[0.1, -0.2, 0.3, 0.0][:channels],
                latents_std=[1.5, 0.5, 1.0, 2.0][:channels],
                **more,
            )
        )


def qwen_vae(channels: int = 4, halvings: int = 1, **more: Any) -> nn.Module:
    """Qwen-Image's: two pixels a latent, or twice that for each further halving."""
    return video_vae("AutoencoderKLQwenImage", channels, halvings, **more)


def wan_vae(channels: int = 4) -> nn.Module:
    """Four pixels a latent."""
    scales = {"scale_factor_spatial": 4, "scale_factor_temporal": 4}
    return video_vae("AutoencoderKLWan", channels, 2, **scales)


def ltx_vae(channels: int = 4) -> nn.Module:
    """Four pixels a latent."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=channels,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )


# By class: (channels) -> the model.
VAES: dict[str, Callable[[int], nn.Module]] = {
    "AutoencoderKL": lambda channels: tiny_vae(0.1, channels),
    "AutoencoderKLQwenImage": qwen_vae,
    "AutoencoderKLWan": wan_vae,
    "AutoencoderKLFlux2": flux2_vae,
    "AutoencoderDC": dc_vae,
    "AutoencoderKLLTXVideo": ltx_vae,
}

# --- Texts.


def numbered(*texts: Text) -> Text:
    """The texts of a pipeline that has several: the names of the second end in _2."""
    ends = ("", *(f"_{number}" for number in range(2, len(texts) + 1)))
    return {
        f"{name}{end}": part
        for end, text in zip(ends, texts, strict=True)
        for name, part in text.items()
    }


def tiny_tokenizer(limit: int = TEXT_TOKENS) -> CLIPTokenizer:
    """CLIP's."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        model_max_length=limit,
    )


def clip_text(
    width: int,
    seed: int,
    kind: type[CLIPTextModel] | type[CLIPTextModelWithProjection] = CLIPTextModel,
    limit: int = TEXT_TOKENS,
) -> Text:
    """CLIP's text model of that class; a projection is POOLED_DIM wide."""
    tokenizer = tiny_tokenizer(limit)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=40,
        projection_dim=POOLED_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=limit,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with seeded(seed):
        return {"tokenizer": tokenizer, "text_encoder": freeze(kind(config))}


def two_clips() -> tuple[Text, Text]:
    """Those of SD 3 and HiDream."""
    kind = CLIPTextModelWithProjection
    return clip_text(16, 8, kind), clip_text(16, 9, kind)


CHAT = """{% for one in messages if one.role == "user" %}\
{{ one.content if one.content is string else one.content[0].text }}{% endfor %}"""


def letters(limit: int = TEXT_TOKENS) -> T5Tokenizer:
    """T5's; of a chat it writes what the user says."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    vocab = pieces + [(letter, -2.0) for letter in LETTERS]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=limit)
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_t5(width: int = 32) -> Text:
    tokenizer = letters()
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    with seeded(10):
        encoder = freeze(transformers.T5EncoderModel(config))
    return {"tokenizer": tokenizer, "text_encoder": encoder}


def bert_text(width: int) -> Text:
    """HunyuanDiT's first."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = [*words, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    config = transformers.BertConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=77,
    )
    tokenizer = transformers.BertTokenizer(
        vocab={word: number for number, word in enumerate(vocab)}, model_max_length=77
    )
    with seeded(8):
        return {"tokenizer": tokenizer, "text_encoder": freeze(transformers.BertModel(config))}


QWEN_TOWER = {"depth": 1, "num_heads": 2}
ROPE = {"rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"}}
# Of classes with a tower for pictures, which no text needs: how it and the language differ.
TOWERS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "Qwen2_5_VLForConditionalGeneration": (QWEN_TOWER, ROPE),
    "Qwen3VLModel": (QWEN_TOWER | {"deepstack_visual_indexes": [0]}, ROPE),
    "Mistral3ForConditionalGeneration": (
        {
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "model_type": "pixtral",
        },
        {"model_type": "mistral"},
    ),
}


def language(kind: str, width: int, layers: int = 2, limit: int = TEXT_TOKENS) -> Text:
    """A language model of that class in transformers, with heads of 8."""
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 8,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    made = getattr(transformers, kind)
    if kind in TOWERS:
        own, more = TOWERS[kind]
        tower = {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": width, **own}
        config = made.config_class(text_config={**sizes, **more}, vision_config=tower)
    else:
        config = made.config_class(**sizes)
    with seeded(10):
        encoder = made(config)
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.5)  # so that texts differ
    return {"tokenizer": letters(limit), "text_encoder": freeze(encoder)}


def chatglm(width: int) -> Text:
    """Kolors'; its tokenizer needs sentencepiece."""
    import sentencepiece

    with catch_warnings(action="ignore"):  # it runs torch.jit
        from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
        from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    vocab = mkdtemp()  # it stays: the tokenizer copies the file when it is saved
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(LETTERS)] * 3),
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
        encoder = freeze(ChatGLMModel(config, empty_init=False))
        for parameter in encoder.parameters():
            parameter.data.normal_(std=0.2)  # diffusers leaves some of them uninitialised
    return {"tokenizer": ChatGLMTokenizer(f"{vocab}/tokenizer.model"), "text_encoder": encoder}
