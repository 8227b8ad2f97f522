"""Other tools of the ecosystem with image prompts: each row of docs/ecosystem.md, on a tiny model.

Most are a `Way`: with the tool, a prepared image prompt gives the pixels of the plain way, and is
heard.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import ControlNetModel, ControlNetUnionModel, MotionAdapter, MultiAdapter, T2IAdapter
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from imprompt.adapter import IPAdapter
from imprompt.errors import MismatchError
from tests.tiny import (
    freeze,
    noise,
    noise_inputs,
    paper_layout,
    pictures,
    seeded,
    smallest_unet,
    tiny_adapter,
)
from tests.ways import (
    KEY,
    SIDE,
    SIZE,
    START,
    TOLERANCE,
    TWO,
    PromptSpec,
    Way,
    as_pipeline,
    check_same_pixels,
    pipeline,
    plainly,
    run,
)

Change = Callable[[Any], Any]
FRAMES = 3
MASK = {"mask_image": pictures(1, seed=4)[0].resize((SIDE, SIDE)).convert("L")}
HINT, OTHER = (picture.resize((SIDE, SIDE)) for picture in pictures(2, seed=3))
THREE = (*TWO, PromptSpec(window=(500, 1000), seed=5))


def several(*changes: Change) -> Change:
    def change(pipe: Any) -> Any:
        for each in changes:
            pipe = each(pipe)
        return pipe

    return change


def does(name: str, *args: Any, part: str = "", **kwargs: Any) -> Change:
    """Call a method of the pipeline, or of its part."""

    def change(pipe: Any) -> Any:
        getattr(getattr(pipe, part) if part else pipe, name)(*args, **kwargs)
        return pipe

    return change


def becomes(name: str, **components: Any) -> Change:
    """diffusers' pipeline whose name has `name` in place of the last word: "StableDiffusionXL" +
    "PAGPipeline".
    """
    return lambda pipe: as_pipeline(pipe, kind(pipe) + name, **components)


def kind(pipe: Any) -> str:
    return "StableDiffusionXL" if hasattr(pipe, "text_encoder_2") else "StableDiffusion"


def controlnet(pipe: Any, seed: int, union: bool) -> Any:
    takes = inspect.signature(ControlNetUnionModel if union else ControlNetModel).parameters
    shape = {name: value for name, value in pipe.unet.config.items() if name in takes}
    width = shape["block_out_channels"][0]
    own = (
        {"num_trans_channel": width, "num_proj_channel": width, "num_trans_head": 2}
        if union
        else {}
    )
    with seeded(seed):
        net = (ControlNetUnionModel if union else ControlNetModel)(
            **shape | own, conditioning_embedding_out_channels=(8, 8)
        )
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(layer.weight, std=0.05)
    return freeze(net)


def with_controlnet(pipe: Any, task: str = "", count: int = 1, union: bool = False) -> Any:
    name = f"{kind(pipe)}ControlNet{'Union' * union}{task}Pipeline"
    nets = [controlnet(pipe, 11 + number, union) for number in range(count)]
    return as_pipeline(pipe, name, controlnet=nets if count > 1 else nets[0])


def t2i_adapter(pipe: Any, seed: int) -> T2IAdapter:
    structure, factor = (
        ("full_adapter_xl", 4) if kind(pipe) == "StableDiffusionXL" else ("full_adapter", 2)
    )
    with seeded(seed):
        return freeze(
            T2IAdapter(
                3,
                [*pipe.unet.config.block_out_channels],
                num_res_blocks=1,
                downscale_factor=factor,
                adapter_type=structure,
            )
        )


def with_t2i_adapters(pipe: Any, count: int = 1) -> Any:
    found = [t2i_adapter(pipe, 21 + number) for number in range(count)]
    return as_pipeline(
        pipe, f"{kind(pipe)}AdapterPipeline", adapter=MultiAdapter(found) if count > 1 else found[0]
    )


def moving(pipe: Any, name: str = "AnimateDiff{}Pipeline", **components: Any) -> Any:
    with seeded(31):
        motion = MotionAdapter(
            (8, 16),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
            motion_max_seq_length=8,
        )
        for parameter in motion.parameters():
            parameter.data += torch.randn_like(parameter) * 0.1
    images = pipe.unet
    pipe = as_pipeline(
        pipe,
        name.format("SDXL" * (kind(pipe) == "StableDiffusionXL")),
        motion_adapter=freeze(motion),
        **components,
    )
    if images.config.addition_embed_type == "text_time":  # diffusers leaves it as drawn
        pipe.unet.add_embedding.load_state_dict(images.add_embedding.state_dict())
    freeze(pipe.unet)
    return pipe


def lora(pipe: Any, name: str = "style", seed: int = 41) -> Any:
    """A LoRA for every attention of the UNet and for the text encoders, loaded as from a file."""
    ends = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "v_proj")
    parts = ("unet", "text_encoder", "text_encoder_2")
    state: dict[str, Tensor] = {}
    with seeded(seed):
        for part in parts:
            for path, module in getattr(pipe, part, torch.nn.Module()).named_modules():
                if path.endswith(ends) and not path.endswith("base_layer"):
                    state[f"{part}.{path}.lora_A.weight"] = (
                        torch.randn(2, module.in_features) * module.in_features**-0.5
                    )
                    state[f"{part}.{path}.lora_B.weight"] = (
                        torch.randn(module.out_features, 2) * 0.5
                    )
    pipe.load_lora_weights(state, adapter_name=name)
    return pipe


second_lora = partial(lora, name="detail", seed=42)


def consistency_model(pipe: Any) -> Any:
    """The UNet of a latent consistency model: it is told the guidance, and so runs no unconditional
    half.
    """
    pipe.unet = smallest_unet(
        "sdxl" if kind(pipe) == "StableDiffusionXL" else "sd1", time_cond_proj_dim=8, sample_size=64
    )
    return scheduler("LCMScheduler")(pipe)


def scheduler(name: str, **options: Any) -> Change:
    def change(pipe: Any) -> Any:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
        return pipe

    return change


def wider(channels: int, sample_size: int = 64) -> Change:
    """A UNet that sees more than latents: a mask, a picture."""

    def change(pipe: Any) -> Any:
        pipe.unet = smallest_unet(
            "sdxl" if kind(pipe) == "StableDiffusionXL" else "sd1",
            in_channels=channels,
            sample_size=sample_size,
        )
        return pipe

    return change


def converted(name: str) -> Change:
    """By diffusers' `from_pipe`, after the adapter was attached."""
    return lambda pipe: does("set_progress_bar_config", disable=True)(
        getattr(diffusers, kind(pipe) + name).from_pipe(pipe)
    )


def offloaded(pipe: Any, by_layer: bool) -> Any:
    # by layer: weights wait on the meta device
    (cpu_offload if by_layer else cpu_offload_with_hook)(pipe.unet, "cpu")
    return pipe


def embeddings(width: int = 32) -> dict[str, Any]:
    """Text as tensors, longer than the text encoder's, as prompt weighting makes it."""
    with seeded(51):
        positive, negative = torch.randn(2, 2, 22, width)
    return {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}


def pooled() -> dict[str, Any]:
    with seeded(52):
        positive, negative = torch.randn(2, 2, 16)
    return {"pooled_prompt_embeds": positive, "negative_pooled_prompt_embeds": negative}


def alter_latents(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    return {"latents": tensors["latents"] * 1.01}


def row(
    name: str, made: Change = lambda pipe: pipe, specs: Sequence[PromptSpec] = TWO, **facts: Any
) -> Way:
    return Way(name, specs, made=made, **{"options": SIZE, "small": True} | facts)


SD, XL = ["sd1"], ["sdxl"]
CONTROL = {"image": HINT, "controlnet_conditioning_scale": 0.8}
FROM = {"control_image": HINT, "controlnet_conditioning_scale": 0.8} | START
UNION = {"control_image": [HINT], "control_mode": [0]} | SIZE
PAG = {"order": ("null", "prompt", "prompt"), "options": SIZE | {"pag_scale": 2.0}}
VIDEO = {"frames": FRAMES, "batch": 1, "options": SIZE | {"num_frames": FRAMES}}
EDIT = {
    "order": ("prompt", "null", "null"),
    "options": {"image": HINT, "image_guidance_scale": 1.5},
}

TOOLS = [
    row("image to image", task=1, options=START),
    row("inpainting", task=2, options=START | SIZE | MASK),
    row("inpainting model", wider(9), task=2, options=START | SIZE | MASK),
    row("ControlNet", with_controlnet, THREE, options=CONTROL),
    row(
        "ControlNets",
        partial(with_controlnet, count=2),
        THREE,
        options={
            "image": [HINT, OTHER],
            "controlnet_conditioning_scale": [0.8, 0.5],
            "control_guidance_end": [1.0, 0.5],
        },
    ),
    row("ControlNet guess mode", with_controlnet, THREE, options=CONTROL | {"guess_mode": True}),
    row("ControlNet image to image", partial(with_controlnet, task="Img2Img"), options=FROM),
    row(
        "ControlNet inpainting",
        partial(with_controlnet, task="Inpaint"),
        options=FROM | SIZE | MASK,
    ),
    row(
        "ControlNet union", partial(with_controlnet, union=True), THREE, options=UNION, pipelines=XL
    ),
    row("T2I-Adapter", with_t2i_adapters, small=False, options=SIZE | {"image": HINT}),
    row(
        "T2I-Adapters",
        partial(with_t2i_adapters, count=2),
        batch=1,
        small=False,
        options=SIZE | {"image": [HINT, OTHER], "adapter_conditioning_scale": [0.8, 0.5]},
    ),
    row(
        "InstructPix2Pix", several(wider(8, SIDE // 2), becomes("InstructPix2PixPipeline")), **EDIT
    ),
    row("LoRA before", lora),
    row("LoRA after", after=lora),
    row("LoRA fused", several(lora, does("fuse_lora"))),
    row("LoRA fused after", after=several(lora, does("fuse_lora"))),
    row("LoRA merged", after=several(lora, does("fuse_lora"), does("unload_lora_weights"))),
    row("LoRA unfused", after=several(lora, does("fuse_lora"), does("unfuse_lora"))),
    row("LoRA disabled", after=several(lora, does("disable_lora"))),
    row("LoRA unloaded", lora, after=does("unload_lora_weights")),
    row(
        "LoRAs",
        lora,
        after=several(second_lora, does("set_adapters", ["style", "detail"], [0.8, -0.4])),
    ),
    row("LoRA scale", lora, options=SIZE | {"cross_attention_kwargs": {"scale": 0.5}}),
    row("LCM", consistency_model, order=("prompt",)),
    row(
        "LCM pipeline",
        several(
            consistency_model, lambda pipe: as_pipeline(pipe, "LatentConsistencyModelPipeline")
        ),
        order=("prompt",),
        pipelines=SD,
    ),
    row(
        "LCM pipeline image to image",
        several(
            consistency_model,
            lambda pipe: as_pipeline(pipe, "LatentConsistencyModelImg2ImgPipeline"),
        ),
        order=("prompt",),
        pipelines=SD,
        options=START,
    ),
    row("LCM LoRA", several(lora, scheduler("LCMScheduler")), guidance=1.0),
    row("PAG", becomes("PAGPipeline"), **PAG),
    row(
        "PAG without guidance",
        becomes("PAGPipeline"),
        guidance=1.0,
        order=("prompt", "prompt"),
        options=PAG["options"],
    ),
    row(
        "ControlNet PAG",
        lambda pipe: as_pipeline(with_controlnet(pipe), f"{kind(pipe)}ControlNetPAGPipeline"),
        order=PAG["order"],
        options=CONTROL | {"pag_scale": 2.0},
    ),
    row("AnimateDiff", moving, [PromptSpec(alike=True), TWO[1]], **VIDEO),
    row("AnimateDiff by frame", moving, THREE, **VIDEO),
    row("AnimateDiff LoRA", several(moving, lora), **VIDEO),
    row(
        "AnimateDiff PAG",
        partial(moving, name="AnimateDiffPAGPipeline"),
        pipelines=SD,
        **VIDEO | {"order": PAG["order"]},
    ),
    row(
        "AnimateDiff ControlNet",
        lambda pipe: moving(
            pipe, "AnimateDiffControlNetPipeline", controlnet=controlnet(pipe, 11, union=False)
        ),
        pipelines=SD,
        **VIDEO | {"options": VIDEO["options"] | {"conditioning_frames": [HINT, OTHER, HINT]}},
    ),
    row("model offload", ready=partial(offloaded, by_layer=False)),
    row("sequential offload", ready=partial(offloaded, by_layer=True)),
    row(
        "VAE tiling",
        ready=several(does("enable_tiling", part="vae"), does("enable_slicing", part="vae")),
    ),
    row("prompt weighting", pipelines=SD, options=SIZE | embeddings()),
    row("prompt weighting XL", pipelines=XL, options=SIZE | embeddings() | pooled()),
    row("CLIP skip", pipelines=XL, options=SIZE | {"clip_skip": 1}),
    row("guidance rescale", options=SIZE | {"guidance_rescale": 0.7}),
    row("FreeU", after=does("enable_freeu", s1=0.9, s2=0.2, b1=1.2, b2=1.4)),
    row("fused projections", does("fuse_qkv_projections", part="unet")),
    row("attention slicing", does("enable_attention_slicing", 1)),
    row("callbacks", options=SIZE | {"callback_on_step_end": alter_latents}),
    row("from_pipe", after=converted("Img2ImgPipeline"), options=START),
    row("Euler", scheduler("EulerDiscreteScheduler"), THREE),
    row("DPM-Solver", scheduler("DPMSolverMultistepScheduler", use_karras_sigmas=True), THREE),
]


# What diffusers and peft say of themselves, and of numpy.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated:FutureWarning")
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
@pytest.mark.parametrize("way", TOOLS, ids=lambda way: way.name)
@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_tool(base: str, way: Way) -> None:
    if base not in way.pipelines:
        pytest.skip("diffusers has it for the other base")
    check_same_pixels(base, way)


LORA_STEPS: list[Change] = [
    lora,
    second_lora,
    does("set_adapters", ["style", "detail"], [0.8, -0.4]),
    does("disable_lora"),
    does("enable_lora"),
    does("fuse_lora", components=["unet"]),
    does("unfuse_lora", components=["unet"]),
    does("delete_adapters", "style"),
    does("fuse_lora", components=["unet"]),
    does("unload_lora_weights"),  # the fused one stays in the weights
]


def one_text() -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    """Two pipelines, an adapter attached to the second, its prompt, and what both UNets are called
    with: one text.
    """
    way = row("one text", specs=[PromptSpec()], batch=1)
    plain, ours = pipeline("sd1", way), pipeline("sd1", way)
    adapter = tiny_adapter(plain.unet, seed=21)
    adapter.attach(ours.unet)
    return way, plain, ours, adapter, noise_inputs(plain.unet, 2) | {"timestep": torch.tensor(500)}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
def test_the_keys_of_one_text_follow_loras() -> None:
    way, plain, ours, adapter, inputs = one_text()
    prompt = PromptSpec().prompt(adapter, 2)
    noise(ours.unet, inputs, prompt)
    for change in LORA_STEPS:
        change(plain), change(ours)
        with plainly(plain.unet, [adapter], way):
            expected = noise(plain.unet, inputs)
        torch.testing.assert_close(
            noise(ours.unet, inputs, prompt), expected, rtol=0, atol=TOLERANCE
        )


@torch.no_grad()
def test_weights_changed_without_a_mark_need_forget() -> None:
    """A LoRA merged between two calls with one text: pipelines make a new tensor in every call, a
    loop of one's own may not.
    """
    way, plain, ours, adapter, inputs = one_text()
    prompt = PromptSpec().prompt(adapter, 2)
    noise(ours.unet, inputs, prompt)
    for pipe in (plain, ours):
        several(lora, does("fuse_lora"), does("unload_lora_weights"))(pipe)
    adapter.injection.clear_cache()
    with plainly(plain.unet, [adapter], way):
        expected = noise(plain.unet, inputs)
    torch.testing.assert_close(noise(ours.unet, inputs, prompt), expected, rtol=0, atol=TOLERANCE)


def diffusers_ip_adapter(pipe: Any) -> None:
    pipe.unet._load_ip_adapter_weights([paper_layout(tiny_adapter(pipe.unet))])


def ledits(pipe: Any) -> None:
    editing = as_pipeline(pipe, "LEditsPPPipelineStableDiffusion")
    editing.enabled_editing_prompts = 1
    editing.prepare_unet(None)


REPLACED: dict[str, Change] = {
    "fused projections after": does("fuse_qkv_projections", part="unet"),
    "attention slicing after": does("enable_attention_slicing", 1),
    "other processors after": does("set_attn_processor", AttnProcessor2_0(), part="unet"),
    "diffusers' IP-Adapter": diffusers_ip_adapter,
    "LEDITS++": ledits,
}


@torch.no_grad()
@pytest.mark.parametrize("name", REPLACED)
def test_replaced_processors_are_said(name: str) -> None:
    """The prompt would not be heard, without a word."""
    _, _, ours, adapter, inputs = one_text()
    prompt = PromptSpec().prompt(adapter, 2)
    expected = noise(ours.unet, inputs, prompt)
    REPLACED[name](ours)
    with pytest.raises(MismatchError, match="attach"):
        noise(ours.unet, inputs, prompt)
    adapter.detach()
    if name.endswith("after"):
        adapter.attach(ours.unet)
        torch.testing.assert_close(
            noise(ours.unet, inputs, prompt), expected, rtol=0, atol=TOLERANCE
        )


OWN_PROCESSORS: list[tuple[str, str, str, dict[str, Any]]] = [  # base, pipeline, method, arguments
    ("sd1", "TextToVideoZeroPipeline", "__call__", {"prompt": "a b", "video_length": 2}),
    ("sdxl", "TextToVideoZeroSDXLPipeline", "__call__", {"prompt": "a b", "video_length": 2}),
    ("sd1", "LEditsPPPipelineStableDiffusion", "invert", {"image": HINT}),
    ("sdxl", "LEditsPPPipelineStableDiffusionXL", "invert", {"image": HINT}),
]


@torch.no_grad()
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
@pytest.mark.parametrize(("base", "name", "method", "arguments"), OWN_PROCESSORS)
def test_calls_that_replace_processors_are_said(
    base: str, name: str, method: str, arguments: dict[str, Any]
) -> None:
    pipe = pipeline(base, row("text to image"))
    adapter = tiny_adapter(pipe.unet, seed=21).attach(pipe.unet)
    prompt = PromptSpec(alike=True).prompt(adapter, 1)
    for_ledits = diffusers.DPMSolverMultistepScheduler(steps_offset=1)
    own = as_pipeline(pipe, name, scheduler=for_ledits)
    with pytest.raises(MismatchError, match="replaced the adapter's"), adapter.using(prompt):
        getattr(own, method)(**arguments)


@torch.no_grad()
def test_pag_refuses_a_low_rank_part() -> None:
    """It would be dropped at the self-attentions that PAG changes."""
    way = row("PAG and FaceID", becomes("PAGPipeline"), [PromptSpec()], **PAG)
    pipe = pipeline("sd1", way)
    adapter = tiny_adapter(pipe.unet, "faceid", seed=21).attach(pipe.unet)
    with pytest.raises(MismatchError, match="PAGCFGIdentitySelfAttnProcessor2_0"):
        run(pipe, way, cross_attention_kwargs={KEY: PromptSpec().prompt(adapter, way.items)})


class Conditional(PromptSpec):
    """Where the batch is cut, its last part is left."""

    def tokens_of(self, adapter: IPAdapter, batch: int) -> Tensor:
        return super().tokens_of(adapter, 4)[-batch:]


@torch.no_grad()
@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_guidance_switched_off_between_steps(base: str) -> None:
    """By a callback, which cuts the text to its conditional half, and gives an image prompt for
    that half.
    """
    way = row("guidance switched off", specs=[Conditional()])
    plain, ours = pipeline(base, way), pipeline(base, way)
    adapter = tiny_adapter(plain.unet, seed=21)
    adapter.attach(ours.unet)
    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"][: 1 if base == "sd1" else 3]
    alone = {KEY: way.specs[0].prompt(adapter, 2)}

    def switch_off(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
        if step != 0:
            return tensors
        pipe._guidance_scale = 0.0
        pipe._cross_attention_kwargs = alone if pipe is ours else None
        return {name: tensors[name].chunk(2)[1] for name in names}

    told = {"callback_on_step_end": switch_off, "callback_on_step_end_tensor_inputs": names}
    with plainly(plain.unet, [adapter], way):
        expected = run(plain, way, **told)
    pixels = run(ours, way, **told, cross_attention_kwargs={KEY: way.specs[0].prompt(adapter, 4)})
    torch.testing.assert_close(pixels, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("part", ["prompt", "mask", "scale"])
def test_a_prompt_for_videos_is_for_every_frame(part: str) -> None:
    way = row("video", moving, [PromptSpec()], **VIDEO)
    pipe = pipeline("sd1", way)
    adapter = tiny_adapter(pipe.unet, seed=21).attach(pipe.unet)
    prompt = PromptSpec(alike=True).prompt(adapter, 1)
    wrong = {
        "prompt": PromptSpec().prompt(adapter, 2),
        "mask": prompt._replace(mask=torch.ones(2, 4, 4)),
        "scale": prompt.with_scale(torch.ones(len(prompt.keys), 2)),
    }
    with pytest.raises(MismatchError, match=f"{2 * FRAMES}"):
        run(pipe, way, cross_attention_kwargs={KEY: wrong[part]})


def rows_of_page() -> list[list[str]]:
    page = (Path(__file__).parent.parent / "docs" / "ecosystem.md").read_text(encoding="utf-8")
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]
    return [row for row in cells if row[1] in ("yes", "yes, if", "no")]


def test_the_page_says_what_is_tested() -> None:
    rows = [(row[1], set(re.findall("`([^`]+)`", row[-1]))) for row in rows_of_page()]
    others = {name for name in globals() if name.startswith("test_")}
    others -= {
        "test_tool",
        "test_replaced_processors_are_said",
        "test_the_page_says_what_is_tested",
    }
    known = {way.name for way in TOOLS} | set(REPLACED) | others
    refused = {name for name in REPLACED if not name.endswith("after")}
    refused.add("test_calls_that_replace_processors_are_said")
    assert set.union(*(tests for _, tests in rows)) == known
    for works, tests in rows:
        assert tests
        assert (works == "no") == (tests <= refused)
