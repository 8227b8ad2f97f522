"""Ways to make pictures, run twice: as imprompt does it, and the plain way, with every site written
out anew.

`tests.test_same_pixels` has imprompt's own ways, `tests.test_ecosystem` those of other tools.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from imprompt.adapter import IPAdapter, split_heads
from imprompt.families.base import family_of
from imprompt.families.unet import UNET
from imprompt.generation.tasks import FLAGS
from imprompt.prompt import ImagePrompt
from tests.tiny import pictures, quiet, seeded, smallest_unet, tiny_adapter
from tests.tiny_pipelines import PIPELINES

SIDE = 32  # pixels; 16 latents
STEPS = 3
TOLERANCE = 1e-5  # of pixels between 0 and 1, in float32
SIZE = {"width": SIDE, "height": SIDE}
KEY = "ip_hidden_states"


@dataclass(frozen=True)
class PromptSpec:
    """One adapter's prompt: image tokens, how strongly they are spec, where and when."""

    variant: str = "base"
    tokens: int = 4  # a picture's
    scale: float = 0.7
    layers: tuple[float, ...] = ()  # factors by site, repeated over the sites
    mask: Tensor | None = None  # (1, h, w)
    window: tuple[int, int] = (0, 1000)  # timesteps at which it is spec
    alike: bool = False  # one prompt for the whole batch
    seed: int = 1

    def tokens_of(self, adapter: IPAdapter, batch: int) -> Tensor:
        """(B or 1, N, D)"""
        with seeded(self.seed):
            return torch.randn(
                1 if self.alike else batch, self.tokens, adapter.image_kv[0].to_k.in_features
            )

    def factors(self, layers: int) -> Tensor:
        return self.scale * torch.tensor([*(self.layers or (1.0,))] * layers)[:layers]

    def prompt(self, adapter: IPAdapter, batch: int) -> ImagePrompt:
        table = self.factors(len(adapter.image_kv))
        if self.window != (0, 1000):
            times = 999 - torch.arange(1000)  # the noisiest first
            table = table[:, None, None] * ((times >= self.window[0]) & (times < self.window[1]))
        return adapter.prompt(self.tokens_of(adapter, batch), scale=table)._replace(mask=self.mask)


def same(pipe: Any) -> Any:
    return pipe


@dataclass(frozen=True)
class Way:
    """How pictures are made."""

    name: str
    specs: Sequence[PromptSpec] = (PromptSpec(),)
    task: int = 0  # of `Tasks`: text, image to image, inpainting
    guidance: float = 5.0
    batch: int = 2
    order: tuple[
        str, ...
    ] = ()  # what the parts of the base model's batch are; without: as guidance has it
    frames: int = 1  # of a video; they are items of the batch
    options: dict[str, Any] = field(default_factory=dict)  # of the pipeline's call
    made: Callable[[Any], Any] = same  # done to the pipeline, before an adapter is attached
    after: Callable[[Any], Any] = same  # the same, after
    ready: Callable[[Any], Any] = (
        same  # done to the pipeline that uses the prepared prompt, and not to the plain one
    )
    pipelines: Sequence[str] = ("sd1", "sdxl")
    small: bool = False  # the fewest sites that a UNet can have

    @property
    def parts(self) -> tuple[str, ...]:
        return self.order or (("null", "prompt") if self.guidance > 1 else ("prompt",))

    @property
    def items(self) -> int:
        """The base model's batch."""
        return len(self.parts) * self.batch * self.frames


def half(upper: bool) -> Tensor:
    mask = torch.zeros(1, 8, 6)
    mask[:, :4] = 1
    return mask if upper else 1 - mask


TWO = (
    PromptSpec(mask=half(True)),
    PromptSpec("plus", tokens=5, scale=0.4, mask=half(False), seed=2),
)
START = {"image": pictures(1)[0].resize((SIDE, SIDE)), "strength": 0.9}


class Plain:
    """A site's attention, written out anew: nothing is prepared.

    Latents are higher than wide as the mask's aspect says.
    """

    def __init__(self, layer: int, adapters: Sequence[IPAdapter], way: Way, aspect: float) -> None:
        self.layer, self.adapters, self.way, self.aspect = layer, adapters, way, aspect
        self.timestep = 0.0

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> Tensor:
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        out = softmax_attention(
            query,
            *(
                split_heads(layer(encoder_hidden_states), attn.heads)
                for layer in (attn.to_k, attn.to_v)
            ),
        )
        for adapter, spec in zip(self.adapters, self.way.specs, strict=True):
            kv, tokens = (
                adapter.image_kv[self.layer],
                spec.tokens_of(adapter, len(query)).expand(len(query), -1, -1),
            )
            image = softmax_attention(
                query, *(split_heads(layer(tokens), attn.heads) for layer in (kv.to_k, kv.to_v))
            )
            scale = spec.factors(len(adapter.image_kv))[self.layer] * (
                spec.window[0] <= self.timestep < spec.window[1]
            )
            if spec.mask is not None:
                columns = round((query.shape[2] / self.aspect) ** 0.5)
                seen = F.interpolate(
                    spec.mask[None], (query.shape[2] // columns, columns), mode="area"
                )
                image = image * seen.flatten(2)[..., None]
            out = out + scale * image
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1) @ value


@contextmanager
def plainly(unet: Any, adapters: Sequence[IPAdapter], way: Way) -> Iterator[None]:
    """The UNet's sites hear the adapters.

    The parts of its batch are checked to be what `way` says.
    """
    aspect = way.options.get("height", SIDE) / way.options.get("width", SIDE)
    layers = [Plain(number, adapters, way, aspect) for number in range(len(adapters[0].image_kv))]
    for layer, processor in zip(family_of(unet).layers(unet).values(), layers, strict=True):
        layer.set_processor(processor)

    def tell(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(UNET.arguments, args, strict=False)) | kwargs
        if len(given["encoder_hidden_states"]) == way.items:
            check_parts(given["encoder_hidden_states"], way.parts)
        for layer in layers:
            layer.timestep = float(given["timestep"])

    hook = unet.register_forward_pre_hook(tell, with_kwargs=True)
    yield
    hook.remove()


def check_parts(text: Tensor, parts: Sequence[str]) -> None:
    """Raise AssertionError unless the parts of the batch that are of the first part's kind have its
    text, and no other part.
    """
    texts = text.chunk(len(parts))
    assert [torch.equal(part, texts[0]) for part in texts] == [kind == parts[0] for kind in parts]


def run(pipe: Any, way: Way, **options: Any) -> Tensor:
    """Pixels between 0 and 1."""
    told = {"prompt": ["a cat", "two dogs"][: way.batch]} | way.options | options
    pixels = pipe(
        num_inference_steps=STEPS,
        guidance_scale=way.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in range(way.batch)],
        output_type="pt",
        **{
            name: [value] * way.batch if isinstance(value, Image.Image) else value
            for name, value in told.items()
        },
    )[0]
    return torch.as_tensor(pixels)


def flags(pipe: Any) -> dict[str, Any]:
    return {flag: value for flag, value in pipe.config.items() if flag in FLAGS}


def as_pipeline(pipe: Any, name: str, **components: Any) -> Any:
    """diffusers' pipeline of that name, over those of the same components that it takes, and
    others.
    """
    pipeline_class = getattr(diffusers, name)
    takes = inspect.signature(pipeline_class.__init__).parameters
    given = pipe.components | flags(pipe) | components
    return quiet(pipeline_class(**{part: value for part, value in given.items() if part in takes}))


@cache
def model(base: str, small: bool) -> Any:
    pipe = PIPELINES[base]()
    if small:
        pipe.unet = smallest_unet(base)
    pipe.unet.register_to_config(sample_size=64)  # some pipelines compare it
    return pipe


def pipeline(base: str, way: Way) -> Any:
    """A new pipeline each time, with the same weights."""
    pipe = deepcopy(model(base, way.small))
    name = str((UNET.pipelines[type(pipe).__name__].plain or ())[way.task])
    return way.made(pipe if name == type(pipe).__name__ else as_pipeline(pipe, name))


@torch.no_grad()
def check_same_pixels(base: str, way: Way) -> None:
    """Raise AssertionError unless the prepared prompt gives the plain way's pixels, and is
    spec.
    """
    plain, ours = pipeline(base, way), pipeline(base, way)
    adapters = [tiny_adapter(plain.unet, spec.variant, seed=spec.seed + 20) for spec in way.specs]
    plain = way.after(plain)
    with plainly(plain.unet, adapters, way):
        expected = run(plain, way)
    for adapter in adapters:
        adapter.attach(ours.unet)
    prompts = [
        spec.prompt(adapter, way.items) for spec, adapter in zip(way.specs, adapters, strict=True)
    ]
    ours = way.ready(way.after(ours))
    own = way.options.get("cross_attention_kwargs", {})
    for _ in range(2):  # a second call finds what the first left
        pixels = run(
            ours,
            way,
            cross_attention_kwargs=own | {KEY: prompts if len(prompts) > 1 else prompts[0]},
        )
        torch.testing.assert_close(pixels, expected, rtol=0, atol=TOLERANCE)
    unconditioned = [prompt.with_scale(0) for prompt in prompts]
    assert (
        run(ours, way, cross_attention_kwargs=own | {KEY: unconditioned}) - expected
    ).abs().max() > 100 * TOLERANCE
