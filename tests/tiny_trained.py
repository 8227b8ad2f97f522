"""Tiny random pipelines of the families that adapters are trained for, besides those of tests.tiny.

Their models are those of `tests.zoo`, with autoencoders and texts to match.
"""

from collections.abc import Callable
from typing import Any

from diffusers import (
    AuraFlowPipeline,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    QwenImagePipeline,
    SanaPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    ZImagePipeline,
)
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from tests.tiny import OTHERS, freeze, quiet, seeded, tiny_t5, tiny_vae
from tests.zoo import specimen

CHAT = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


def characters(longest: int = 24) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each letter; it knows how to write a chat."""
    vocab = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {
        chr(97 + letter): 3 + letter for letter in range(26)
    }
    made = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = Split(Regex("."), "isolated")  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        model_max_length=longest,
        padding_side="right",
        chat_template=CHAT,
    )


def language_model(width: int, layers: int = 2) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
    )
    with seeded(10):
        return freeze(Qwen3Model(config))


def flow(**changes: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | changes)


def deep_vae(**changes: Any) -> AutoencoderKL:
    """Eight pixels a latent."""
    with seeded(6):
        return freeze(
            AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(4, 4, 8, 8),
                norm_num_groups=4,
                latent_channels=4,
                **changes,
            )
        )


def tiny_sana() -> SanaPipeline:
    with seeded(6):
        vae = AutoencoderDC(
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
            scaling_factor=0.41407,
        )
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    return SanaPipeline(
        characters(), language_model(8), freeze(vae), specimen("sana", sample_size=16), scheduler
    )


def tiny_z_image() -> ZImagePipeline:
    return ZImagePipeline(
        scheduler=flow(),
        vae=tiny_vae(shift=0.1),
        text_encoder=language_model(16),
        tokenizer=characters(),
        transformer=specimen("z-image", in_channels=4),
    )


def tiny_qwen_image() -> QwenImagePipeline:
    """The characters of its instruction are many more than the tokens that it drops."""
    with seeded(6):
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.5, 1.0, 2.0],
        )
    return QwenImagePipeline(
        scheduler=flow(shift=1.0, use_dynamic_shifting=True),
        vae=freeze(vae),
        text_encoder=language_model(16),
        tokenizer=characters(256),
        transformer=specimen("qwen-image"),
    )


def tiny_wan() -> WanPipeline:
    with seeded(6):
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.5, 1.0, 2.0],
            scale_factor_spatial=2,
        )
    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    return WanPipeline(
        **tiny_t5(),
        vae=freeze(vae),
        scheduler=scheduler,
        transformer=specimen("wan", text_dim=32),
    )


def tiny_chroma() -> ChromaPipeline:
    return ChromaPipeline(
        scheduler=flow(shift=1.0, use_dynamic_shifting=True),
        vae=tiny_vae(shift=0.1),
        **tiny_t5(),
        transformer=specimen("chroma", in_channels=16),
    )


def tiny_lumina2() -> Lumina2Pipeline:
    return Lumina2Pipeline(
        transformer=specimen("lumina2", axes_lens=(512, 128, 128)),
        scheduler=flow(shift=6.0),
        vae=deep_vae(shift_factor=0.1),
        text_encoder=language_model(32),
        tokenizer=characters(256),
    )


def tiny_auraflow() -> AuraFlowPipeline:
    return AuraFlowPipeline(
        **tiny_t5(),
        vae=tiny_vae(),
        transformer=specimen("auraflow", sample_size=16),
        scheduler=flow(shift=1.73),
    )


def tiny_hunyuandit() -> HunyuanDiTPipeline:
    config = BertConfig(
        vocab_size=32,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=77,
    )
    with seeded(9):
        bert = freeze(BertModel(config))
    t5 = tiny_t5()
    return HunyuanDiTPipeline(
        vae=deep_vae(),
        text_encoder=bert,
        tokenizer=characters(77),
        transformer=specimen(  # its pipelines encode as many tokens, whatever the model
            "hunyuandit", cross_attention_dim_t5=32, text_len=77, text_len_t5=256
        ),
        scheduler=DDPMScheduler(
            beta_end=0.018,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5["text_encoder"],
        tokenizer_2=t5["tokenizer"],
    )


def tiny_flux2() -> Flux2KleinPipeline:
    with seeded(6):
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        )
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        scheduler=flow(shift=3.0, use_dynamic_shifting=True),
        vae=freeze(vae),
        text_encoder=language_model(8, layers=27),  # it reads the states of layers 9, 18 and 27
        tokenizer=characters(),
        transformer=specimen(
            "flux2", in_channels=16, joint_attention_dim=24, guidance_embeds=False
        ),
    )


TRAINED: dict[str, Callable[[], Any]] = {
    name: make for name, make in OTHERS.items() if name != "kolors"
} | {
    "sana": tiny_sana,
    "z-image": tiny_z_image,
    "qwen-image": tiny_qwen_image,
    "wan": tiny_wan,
    "chroma": tiny_chroma,
    "lumina2": tiny_lumina2,
    "auraflow": tiny_auraflow,
    "hunyuandit": tiny_hunyuandit,
    "flux2": tiny_flux2,
}


def tiny_pipeline(name: str) -> Any:
    """A pipeline of that family."""
    return quiet(TRAINED[name]())
