"""Every way to generate gives the pixels of the plain way, which projects text and image tokens at every site in every step.

A new feature adds a row to `WAYS`: what is heard, and how the pipeline is run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import ControlNetModel
from torch import Tensor

from imprompt.adapter import ImagePrompt, IPAdapter, split_heads
from imprompt.attention import family_of
from imprompt.sampling.generate import TASKS
from tests.tiny import PIPELINES, UNETS, freeze, pictures, seeded, tiny_adapter

SIDE = 32  # pixels; 16 latents
STEPS = 3
TOLERANCE = 1e-5  # of pixels between 0 and 1, in float32


@dataclass(frozen=True)
class Heard:
    """One adapter's prompt: image tokens, how strongly they are heard, where and when."""

    variant: str = "base"
    tokens: int = 4  # a picture's
    scale: float = 0.7
    sites: tuple[float, ...] = ()  # factors by site, repeated over the sites
    mask: Tensor | None = None  # (1, h, w)
    window: tuple[int, int] = (0, 1000)  # timesteps at which it is heard
    alike: bool = False  # one prompt for the whole batch
    seed: int = 1

    def tokens_of(self, adapter: IPAdapter, batch: int) -> Tensor:
        """(B or 1, N, D)"""
        with seeded(self.seed):
            return torch.randn(1 if self.alike else batch, self.tokens, adapter.image_kv[0].to_k.in_features)

    def factors(self, sites: int) -> Tensor:
        return self.scale * torch.tensor([*(self.sites or (1.0,))] * sites)[:sites]

    def prompt(self, adapter: IPAdapter, batch: int) -> ImagePrompt:
        table = self.factors(len(adapter.image_kv))
        if self.window != (0, 1000):
            times = torch.arange(1000)
            table = table[:, None, None] * ((times >= self.window[0]) & (times < self.window[1]))
        return adapter.prompt(self.tokens_of(adapter, batch), scale=table)._replace(mask=self.mask)


@dataclass(frozen=True)
class Way:
    """How pictures are made."""

    name: str
    heard: Sequence[Heard] = (Heard(),)
    task: int = 0  # of TASKS: text, image to image, inpainting
    guidance: float = 5.0
    batch: int = 2
    options: dict[str, Any] = field(default_factory=dict)  # of the pipeline's call
    ready: Callable[[Any], Any] = lambda pipe: pipe  # done to the pipeline that uses the prepared prompt, and not to the plain one
    made: Callable[[Any], Any] = lambda pipe: pipe  # done to both
    pipelines: Sequence[str] = ("sd1", "sdxl")


def half(upper: bool) -> Tensor:
    mask = torch.zeros(1, 8, 6)
    mask[:, :4] = 1
    return mask if upper else 1 - mask


def alter_text(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """A pipeline's callback that changes the text between steps: once in place, once as another tensor."""
    if step == 0:
        tensors["prompt_embeds"][:, 2] += 0.5
    if step == 1:
        tensors["prompt_embeds"] = tensors["prompt_embeds"] * 0.9
    return tensors


def with_controlnet(pipe: Any) -> Any:
    with seeded(11):
        net = freeze(ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8)))
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(layer.weight, std=0.05)
    kind = type(pipe).__name__.replace("Pipeline", "ControlNetPipeline")
    other = getattr(diffusers, kind)(**pipe.components, controlnet=net, **flags(pipe))
    other.set_progress_bar_config(disable=True)
    return other


def flags(pipe: Any) -> dict[str, Any]:
    return {
        flag: value for flag, value in pipe.config.items() if flag in ("requires_safety_checker", "force_zeros_for_empty_prompt")
    }


def offloaded_whole(pipe: Any) -> Any:
    cpu_offload_with_hook(pipe.unet, "cpu")
    return pipe


def offloaded_by_layer(pipe: Any) -> Any:
    cpu_offload(pipe.unet, "cpu")  # weights are on the meta device but while their layer computes
    return pipe


def tiled(pipe: Any) -> Any:
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    return pipe


def compiled(pipe: Any) -> Any:
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend="aot_eager", fullgraph=True)
    return pipe


def compiled_by_user(pipe: Any) -> Any:
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager", fullgraph=True)
    return pipe


START = {"image": pictures(1)[0].resize((SIDE, SIDE)), "strength": 0.9}
CONTROL = {"image": pictures(1, seed=3)[0].resize((SIDE, SIDE)), "controlnet_conditioning_scale": 0.8}
SIZE = {"width": SIDE, "height": SIDE}
TWO = (Heard(mask=half(True)), Heard("plus", tokens=5, scale=0.4, mask=half(False), seed=2))

WAYS = [
    Way("text", options=SIZE),
    Way("plus", [Heard("plus", tokens=5)], options=SIZE),
    Way("no guidance", guidance=1.0, options=SIZE),
    Way("one prompt for all", [Heard(alike=True)], options=SIZE),
    Way("many tokens", [Heard(tokens=33)], options=SIZE),
    Way("oblong", TWO, options={"width": 24, "height": 40}),
    Way("image to image", task=1, options=START),
    Way("inpainting", task=2, options=START | SIZE | {"mask_image": pictures(1, seed=4)[0].resize((SIDE, SIDE)).convert("L")}),
    Way("two adapters", [Heard(), Heard("plus", tokens=5, scale=0.3, seed=2)], options=SIZE),
    Way("two adapters in two regions", TWO, options=SIZE),
    Way("masked", [Heard(mask=half(True))], options=SIZE),
    Way("block map", [Heard(sites=(0.0, 1.0, 0.5))], options=SIZE),
    Way("window", [Heard(window=(300, 800))], options=SIZE),
    Way("window and masks", [*TWO, Heard(window=(500, 1000), seed=5)], options=SIZE),
    Way(
        "text altered between steps",
        options=SIZE | {"callback_on_step_end": alter_text, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
    ),
    Way("ControlNet", TWO, options=CONTROL, made=with_controlnet),
    Way("model offload", TWO, options=SIZE, ready=offloaded_whole),
    Way("sequential offload", TWO, options=SIZE, ready=offloaded_by_layer),
    Way("VAE tiling and slicing", options=SIZE, ready=tiled),
    Way("compiled", [*TWO, Heard(window=(500, 1000), seed=5)], options=SIZE, ready=compiled, pipelines=["sd1"]),
    Way("compiled from outside", TWO, options=SIZE, ready=compiled_by_user, pipelines=["sd1"]),
]


class Plain:
    """A site's attention, written out anew: nothing is prepared. Latents are higher than wide as the mask's aspect says."""

    def __init__(self, site: int, adapters: Sequence[IPAdapter], way: Way, aspect: float) -> None:
        self.site, self.adapters, self.way, self.aspect = site, adapters, way, aspect
        self.timestep = 0.0

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        out = softmax_attention(query, *(split_heads(layer(encoder_hidden_states), attn.heads) for layer in (attn.to_k, attn.to_v)))
        for adapter, heard in zip(self.adapters, self.way.heard, strict=True):
            kv, tokens = adapter.image_kv[self.site], heard.tokens_of(adapter, len(query)).expand(len(query), -1, -1)
            image = softmax_attention(query, *(split_heads(layer(tokens), attn.heads) for layer in (kv.to_k, kv.to_v)))
            scale = heard.factors(len(adapter.image_kv))[self.site] * (heard.window[0] <= self.timestep < heard.window[1])
            if heard.mask is not None:
                columns = round((query.shape[2] / self.aspect) ** 0.5)
                seen = F.interpolate(heard.mask[None], (query.shape[2] // columns, columns), mode="area")
                image = image * seen.flatten(2)[..., None]
            out = out + scale * image
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1) @ value


@contextmanager
def plainly(unet: Any, adapters: Sequence[IPAdapter], way: Way) -> Iterator[None]:
    aspect = way.options.get("height", SIDE) / way.options.get("width", SIDE)
    sites = [Plain(number, adapters, way, aspect) for number in range(len(adapters[0].image_kv))]
    for site, processor in zip(family_of(unet).sites(unet).values(), sites, strict=True):
        site.set_processor(processor)

    def tell(_: Any, args: tuple[Any, ...]) -> None:
        for site in sites:
            site.timestep = float(args[1])

    hook = unet.register_forward_pre_hook(tell)
    yield
    hook.remove()


def run(pipe: Any, way: Way, **options: Any) -> Tensor:
    """Pixels between 0 and 1."""
    return pipe(
        ["a cat", "two dogs"][: way.batch],
        num_inference_steps=STEPS,
        guidance_scale=way.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in range(way.batch)],
        output_type="pt",
        **{name: [value] * way.batch if name == "image" else value for name, value in way.options.items()},
        **options,
    ).images


def pipeline(base: str, way: Way) -> Any:
    pipe = PIPELINES[base]()
    pipe.unet.register_to_config(sample_size=64)  # some pipelines compare it
    name = TASKS[type(pipe).__name__][way.task]
    if name != type(pipe).__name__:
        pipe = getattr(diffusers, name)(**pipe.components, **flags(pipe))
        pipe.set_progress_bar_config(disable=True)
    return way.made(pipe)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_same_pixels_as_the_plain_way(base: str, way: Way) -> None:
    if base not in way.pipelines:
        pytest.skip("the other base shows it")
    assert base in UNETS
    plain, ours = pipeline(base, way), pipeline(base, way)
    adapters = [tiny_adapter(plain.unet, heard.variant, seed=heard.seed + 20) for heard in way.heard]
    with plainly(plain.unet, adapters, way):
        expected = run(plain, way)
    for adapter in adapters:
        adapter.attach(ours.unet)
    batch = way.batch * (1 + (way.guidance > 1))
    prompts = [heard.prompt(adapter, batch) for heard, adapter in zip(way.heard, adapters, strict=True)]
    ours = way.ready(ours)
    for _ in range(2):  # a second call finds what the first left
        pixels = run(ours, way, cross_attention_kwargs={"ip_hidden_states": prompts if len(prompts) > 1 else prompts[0]})
        torch.testing.assert_close(pixels, expected, rtol=0, atol=TOLERANCE)
    silent = [prompt.with_scale(0) for prompt in prompts]
    assert (run(ours, way, cross_attention_kwargs={"ip_hidden_states": silent}) - expected).abs().max() > 100 * TOLERANCE
