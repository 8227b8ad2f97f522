"""A tiny random pipeline of diffusers for every family that generates or trains in one: a table.

Transformers are the specimens of `tests.zoo`, UNets those of `tests.tiny`, the rest is of
`tests.parts`.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
from transformers import CLIPTextModelWithProjection

from imprompt import ImagePromptPipeline
from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.checkpoints.adapters import adapter_file, write_adapter
from imprompt.families.base import base_of, family_of
from imprompt.families.forms import NORMED
from imprompt.variants import find_variant
from tests.parts import (
    Text,
    bert_text,
    chatglm,
    clip_text,
    dc_vae,
    flux2_vae,
    language,
    numbered,
    qwen_vae,
    tiny_t5,
    tiny_vae,
    two_clips,
    wan_vae,
)
from tests.tiny import FEATURE_DIMS, awake, quiet, seeded, tiny_encoder, tiny_unet
from tests.zoo import specimen

LONG = 256  # for pipelines that put a sentence of their own around a prompt


def flow(**changes: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | changes)


def dynamic_flow() -> Any:
    """Its shift depends on the picture's size."""
    return flow(shift=1.0, use_dynamic_shifting=True)


def solver(kind: str) -> Any:
    """A solver that follows a flow."""
    return getattr(diffusers, kind)(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )


def ddim(**changes: Any) -> Any:
    usual = {"beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}
    return diffusers.DDIMScheduler(**usual | changes)


def v_prediction() -> Any:
    return diffusers.DDPMScheduler(
        beta_end=0.018,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


class Tiny(NamedTuple):
    """What the tiny pipeline of a family is made of.

    pipeline   its class in diffusers, without "Pipeline"
    vae        makes the autoencoder
    parts      makes the texts, and what else the pipeline has
    changes    of the model's configuration
    scheduler  makes it
    model      the specimen's name, if it is not the pipeline's
    unet       the structure of the UNet that it has instead
    config     entries of the model's configuration that its class does not have
    """

    pipeline: str
    vae: Callable[[], Any]
    parts: Callable[[], Mapping[str, Any]]
    changes: Mapping[str, Any] = {}
    scheduler: Callable[[], Any] = flow
    model: str = ""
    unet: str = ""
    config: Mapping[str, Any] = {}


def with_encoder(texts: Text, **more: Any) -> Text:
    """The parts of a pipeline that has an encoder of pictures."""
    encoder = tiny_encoder()
    return {
        **texts,
        "image_encoder": encoder.model,
        "feature_extractor": encoder.processor,
        **more,
    }


def sd_parts() -> Text:
    return with_encoder(clip_text(32, 7), safety_checker=None, requires_safety_checker=False)


def sdxl_parts() -> Text:
    texts = clip_text(16, 8), clip_text(16, 9, CLIPTextModelWithProjection)
    return with_encoder(numbered(*texts), add_watermarker=False)


def hunyuandit_parts() -> Text:
    return {
        **numbered(bert_text(8), tiny_t5()),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def longcat_parts() -> Text:
    """The processor is for rewritten prompts alone."""
    text = language("Qwen2_5_VLForConditionalGeneration", 32, limit=LONG)
    return {**text, "text_processor": text["tokenizer"]}


def krea2_parts() -> Text:
    return {
        **language("Qwen3VLModel", 16, limit=LONG),
        "text_encoder_select_layers": (0, 1, 2),
    }


def without_ftfy(module: str, texts: Text) -> Text:
    """The texts of a pipeline that repairs broken letters by a package that is not installed."""
    names = vars(import_module(f"diffusers.pipelines.{module}"))
    names.setdefault("ftfy", SimpleNamespace(fix_text=str))
    return texts


def prx_parts() -> Text:
    return without_ftfy("prx.pipeline_prx", tiny_t5())


def kandinsky5_parts() -> Text:
    texts = (
        language("Qwen2_5_VLForConditionalGeneration", 16, limit=LONG),
        clip_text(8, 10, limit=77),
    )
    return without_ftfy("kandinsky5.pipeline_kandinsky_t2i", numbered(*texts))


SHIFTED = partial(tiny_vae, 0.1)
DEEP = partial(tiny_vae, halvings=3)  # eight pixels a latent, which some pipelines take for granted
TINY: dict[str, Tiny] = {
    "sd1": Tiny(
        "StableDiffusion",
        tiny_vae,
        sd_parts,
        {"cross_attention_dim": 32},
        partial(ddim, set_alpha_to_one=False),
        unet="sd1",
    ),
    "sdxl": Tiny(
        "StableDiffusionXL",
        tiny_vae,
        sdxl_parts,
        {"cross_attention_dim": 32},
        partial(ddim, set_alpha_to_one=False),
        unet="sdxl",
    ),
    "kolors": Tiny(
        "Kolors",
        tiny_vae,
        lambda: chatglm(48),
        {
            "cross_attention_dim": 32,
            "projection_class_embeddings_input_dim": 6 * 8 + 48,
            "encoder_hid_dim": 48,
            "encoder_hid_dim_type": "text_proj",
        },
        partial(ddim, set_alpha_to_one=False),
        unet="sdxl",
    ),
    "pixart": Tiny(
        "PixArtSigma", tiny_vae, tiny_t5, {"caption_channels": 32, "sample_size": 16}, ddim
    ),
    "flux": Tiny(
        "Flux", SHIFTED, lambda: numbered(clip_text(32, 8), tiny_t5()), {"in_channels": 16}
    ),
    "sd3": Tiny(
        "StableDiffusion3",
        partial(tiny_vae, 0.1, 16),
        lambda: numbered(*two_clips(), tiny_t5()),
        {"in_channels": 16, "out_channels": 16},  # which its pipeline for inpainting checks
    ),
    "sana": Tiny(
        "Sana",
        dc_vae,
        lambda: language("Gemma2Model", 8),
        scheduler=partial(solver, "DPMSolverMultistepScheduler"),
    ),
    "qwen-image": Tiny(
        "QwenImage",
        partial(qwen_vae, halvings=2),
        lambda: language("Qwen2_5_VLForConditionalGeneration", 16, limit=LONG),
        scheduler=dynamic_flow,
    ),
    "z-image": Tiny("ZImage", partial(tiny_vae, 0.1, 16), lambda: language("Qwen3Model", 16)),
    "wan": Tiny(
        "Wan",
        wan_vae,
        tiny_t5,
        {"text_dim": 32},
        partial(solver, "UniPCMultistepScheduler"),
    ),
    "flux2": Tiny(
        "Flux2",
        flux2_vae,
        lambda: language("Mistral3ForConditionalGeneration", 16),
        {"in_channels": 16, "joint_attention_dim": 3 * 16},
        dynamic_flow,
    ),
    "klein": Tiny(
        "Flux2Klein",
        flux2_vae,
        # it reads the states of layers 9, 18 and 27
        lambda: language("Qwen3ForCausalLM", 8, layers=27),
        {"in_channels": 16, "joint_attention_dim": 3 * 8, "guidance_embeds": False},
        dynamic_flow,
        model="flux2",
    ),
    "chroma": Tiny(
        "Chroma",
        SHIFTED,
        tiny_t5,
        {"in_channels": 16},
        dynamic_flow,
        config={"guidance_embeds": False},  # which the pipeline for inpainting reads
    ),
    "lumina2": Tiny(
        "Lumina2",
        partial(DEEP, 0.1),
        lambda: language("Gemma2Model", 32, limit=LONG),
        {"axes_lens": (512, 128, 128)},
        partial(flow, shift=6.0),
    ),
    "auraflow": Tiny("AuraFlow", tiny_vae, tiny_t5),
    "hunyuandit": Tiny(
        "HunyuanDiT",
        DEEP,
        hunyuandit_parts,
        # its pipelines encode as many tokens, whatever the model
        {"text_len": 77, "text_len_t5": 256, "cross_attention_dim_t5": 32},
        v_prediction,
    ),
    "cogview4": Tiny("CogView4", SHIFTED, lambda: language("GlmModel", 8)),
    "krea2": Tiny("Krea2", partial(qwen_vae, halvings=2), krea2_parts, {"in_channels": 16}),
    "ovis": Tiny(
        "OvisImage",
        SHIFTED,
        lambda: language("Qwen3Model", 32, limit=LONG),
        {"in_channels": 16, "out_channels": 16},
    ),
    "longcat": Tiny("LongCatImage", partial(tiny_vae, 0.1, 16), longcat_parts, {"in_channels": 64}),
    "bria": Tiny("Bria", SHIFTED, tiny_t5, {"in_channels": 16}),
    "prx": Tiny("PRX", SHIFTED, prx_parts, {"context_in_dim": 32}),
    "kandinsky5": Tiny("Kandinsky5T2I", partial(DEEP, 0.1), kandinsky5_parts),
    "hidream": Tiny(
        "HiDreamImage",
        SHIFTED,
        lambda: numbered(*two_clips(), tiny_t5(), language("LlamaForCausalLM", 16)),
        {"text_emb_dim": 32, "caption_channels": [32, 16]},
    ),
    "lumina-next": Tiny(
        "Lumina",
        partial(DEEP, 0.1),
        lambda: language("Gemma2Model", 32, limit=LONG),
        {"learn_sigma": True},
    ),
}


def tiny_pipeline(name: str, **changes: Any) -> Any:
    """The pipeline of that name in the table, with changes of its model's configuration."""
    row = TINY[name]
    parts, changes = row.parts(), {**row.changes, **changes}
    if row.unet:
        base: dict[str, Any] = {"unet": tiny_unet(row.unet, **changes)}
    else:
        base = {"transformer": specimen(row.model or name, **changes)}
        base["transformer"].register_to_config(**row.config)
    kind = getattr(diffusers, f"{row.pipeline}Pipeline")
    return quiet(kind(**base, **parts, vae=row.vae(), scheduler=row.scheduler()))


# The pipelines in which families beside the UNet train, by family.
TRAINED = {
    "pixart": "pixart",
    "flux": "flux",
    "sd3": "sd3",
    "sana": "sana",
    "z-image": "z-image",
    "qwen-image": "qwen-image",
    "wan": "wan",
    "chroma": "chroma",
    "lumina2": "lumina2",
    "auraflow": "auraflow",
    "hunyuandit": "hunyuandit",
    "flux2": "klein",
}
PIPELINES = {base: partial(tiny_pipeline, base) for base in ("sd1", "sdxl")}


def save_model(pipeline: Any, folder: Path) -> None:
    """Save a pipeline with an image encoder, as a user's folder."""
    encoder = tiny_encoder()
    pipeline.save_pretrained(folder)
    for part in (encoder.model, encoder.processor):
        part.save_pretrained(folder / "image_encoder")


class Saved:
    """A model of one family in a folder, its image encoder and an adapter for it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.model, self.file = name, folder / "model", folder / "adapter.safetensors"
        pipeline = tiny_pipeline(name)
        save_model(pipeline, self.model)
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


def controlnet(name: str, config: Mapping[str, Any], **changes: Any) -> Any:
    """A ControlNet of that class and of one layer for a transformer of that configuration, with
    noise where its weights start at zero.
    """
    kind = getattr(diffusers, name)
    takes = inspect.signature(kind.__init__).parameters
    own = {**config, "num_layers": 1, "num_single_layers": 1}
    own = {key: value for key, value in own.items() if key in takes}
    with seeded(12):
        return awake(kind(**own | changes))
