"""imprompt's controls against diffusers' own: several adapters and images, binary masks, scales by
block.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.loaders.ip_adapter import IPAdapterMixin
from PIL import Image
from torch import Tensor

from imprompt.adapter import IPAdapter
from imprompt.families.base import family_of
from imprompt.generation.combine import combine, concat, regions, scale_table
from imprompt.prompt import ImagePrompt
from tests.tiny import (
    FEATURE_DIMS,
    noise,
    noise_inputs,
    paper_layout,
    seeded,
    tiny_adapter,
    tiny_unet,
)

TOLERANCE = {"rtol": 0, "atol": 1e-5}
EFFECT = 1e-2  # an image prompt moves the noise by more than this: the comparisons mean something
BASES = ["sd1", "sdxl"]
LATENTS = {"high": (16, 8), "wide": (16, 24)}  # the deepest sites of SD 1.x see an eighth of a side


class Pair:
    """One base model twice: joined by our adapters, and by diffusers' with the same weights."""

    def __init__(self, base: str, variants: Sequence[str]) -> None:
        self.ours, self.theirs = tiny_unet(base), tiny_unet(base)
        self.adapters: list[IPAdapter] = [
            tiny_adapter(self.ours, name, seed=3 + i).attach(self.ours)
            for i, name in enumerate(variants)
        ]
        self.theirs._load_ip_adapter_weights(
            [paper_layout(adapter) for adapter in self.adapters], low_cpu_mem_usage=False
        )
        self.theirs.requires_grad_(False)
        self.layers = list(family_of(self.ours).layers(self.ours))

    def set_their_scale(self, scale: Any) -> None:
        """A number or a nested dictionary for each adapter."""
        IPAdapterMixin.set_ip_adapter_scale(
            SimpleNamespace(unet=self.theirs, unet_name="unet"), scale
        )

    def their_noise(
        self, inputs: dict[str, Any], features: Sequence[Tensor], masks: list[Tensor] | None = None
    ) -> Tensor:
        """features (B, images, ...) of each adapter, masks (1, images, h, w) of each"""
        told = {"image_embeds": list(features)}
        with_image = inputs | {"added_cond_kwargs": inputs.get("added_cond_kwargs", {}) | told}
        return self.theirs(
            **with_image, cross_attention_kwargs={"ip_adapter_masks": masks} if masks else None
        ).sample

    def by_layer(self) -> list[list[float]]:
        """Their scales, by site and adapter."""
        processors = self.theirs.attn_processors
        return [processors[f"{layer}.processor"].scale for layer in self.layers]


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pair]:
    return {base: Pair(base, ["base"]) for base in BASES}


@pytest.fixture(params=BASES)
def single(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    return pairs[request.param]


@pytest.fixture(scope="module", params=BASES)
def double(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param, ["base", "plus"])


def features(variant: str, *shape: int, seed: int = 21) -> Tensor:
    """Of images whose features no encoder had to make: (*shape, E) or (*shape, patches, E)."""
    width = {"base": (FEATURE_DIMS["pooled"],), "plus": (9, FEATURE_DIMS["penultimate"])}[variant]
    with seeded(seed):
        return torch.randn(*shape, *width)


def conditioned(adapter: IPAdapter, given: Tensor, **parts: Any) -> ImagePrompt:
    """A prompt of features (B, ...)."""
    return adapter.prompt(adapter.tokens(given))._replace(**parts)


@torch.no_grad()
@pytest.mark.parametrize("scales", [(0.6, 0.3), (0.0, 1.0), (1.0, -0.5)])
def test_several_adapters(double: Pair, scales: tuple[float, float]) -> None:
    inputs = noise_inputs(double.ours, 2)
    given = [features(name, 2, seed=seed) for name, seed in (("base", 21), ("plus", 22))]
    double.set_their_scale(list(scales))
    prompts = [
        conditioned(adapter, f).with_scale(scale)
        for adapter, f, scale in zip(double.adapters, given, scales, strict=True)
    ]
    ours = noise(double.ours, inputs, prompts)
    torch.testing.assert_close(
        ours, double.their_noise(inputs, [f[:, None] for f in given]), **TOLERANCE
    )
    assert (ours - noise(double.ours, inputs)).abs().max() > EFFECT


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_several_images_of_an_adapter(double: Pair, batch: int) -> None:
    """diffusers puts the tokens of all images into one attention, as "concat" does."""
    inputs = noise_inputs(double.ours, batch)
    several, one = features("base", 3), features("plus", 1)
    double.set_their_scale([0.7, 0.4])
    combined = combine(several, "concat")
    tokens, bias = concat(double.adapters[0].tokens(combined.features), combined.weights)
    assert bias is None
    prompts = [
        double.adapters[0].prompt(tokens, scale=0.7),
        conditioned(double.adapters[1], one).with_scale(0.4),
    ]
    theirs = double.their_noise(
        inputs, [f[None].expand(batch, *[-1] * (f.ndim)) for f in (several, one)]
    )
    torch.testing.assert_close(noise(double.ours, inputs, prompts), theirs, **TOLERANCE)


def halved(size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """The upper half and the lower one of a picture of 8 pixels for each latent.

    The edge is one of cells at every site.
    """
    rows, columns = (8 * side for side in size)
    upper = Image.new("L", (columns, rows))
    upper.paste(255, (0, 0, columns, rows // 2))
    return upper, Image.eval(upper, lambda value: 255 - value)


def latents_of(inputs: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    with seeded(5):
        return inputs | {"sample": torch.randn(len(inputs["sample"]), 4, *size)}


@torch.no_grad()
@pytest.mark.parametrize("shape", LATENTS)
def test_a_mask_for_each_image(single: Pair, shape: str) -> None:
    """Each masked image has an attention of its own, there as here, and may have its own scale."""
    size = LATENTS[shape]
    inputs, given, pictures = (
        latents_of(noise_inputs(single.ours, 2), size),
        features("base", 2),
        halved(size),
    )
    masks = IPAdapterMaskProcessor().preprocess(
        list(pictures), height=8 * size[0], width=8 * size[1]
    )
    single.set_their_scale([0.8])
    for layer in single.layers:
        single.theirs.attn_processors[f"{layer}.processor"].scale = [[0.8, 0.5]]
    theirs = single.their_noise(inputs, [given[None].expand(2, -1, -1)], [masks.transpose(0, 1)])
    prompts = [
        conditioned(single.adapters[0], given[i : i + 1], mask=mask).with_scale(scale)
        for i, (mask, scale) in enumerate(zip(regions(pictures), (0.8, 0.5), strict=True))
    ]
    ours = noise(single.ours, inputs, prompts)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    swapped = [prompts[0]._replace(mask=prompts[1].mask), prompts[1]._replace(mask=prompts[0].mask)]
    assert (ours - noise(single.ours, inputs, swapped)).abs().max() > EFFECT


@torch.no_grad()
def test_an_adapter_with_a_mask_beside_one_without(double: Pair) -> None:
    inputs, given = (
        latents_of(noise_inputs(double.ours, 1), LATENTS["wide"]),
        [features("base", 1), features("plus", 1)],
    )
    upper, _ = halved(LATENTS["wide"])
    mask = IPAdapterMaskProcessor().preprocess(upper, height=128, width=192)
    double.set_their_scale([1.0, 0.5])
    theirs = double.their_noise(inputs, [f[:, None] for f in given], [mask, torch.ones_like(mask)])
    prompts = [
        conditioned(double.adapters[0], given[0], mask=regions([upper])[0]),
        conditioned(double.adapters[1], given[1]).with_scale(0.5),
    ]
    torch.testing.assert_close(noise(double.ours, inputs, prompts), theirs, **TOLERANCE)


BLOCKS: dict[str, list[Any]] = {
    "sd1": [
        {"up": {"block_1": [0.0, 1.0, 0.0]}},
        {
            "down": {"block_2": [0.0, 0.5]},
            "mid": 0.3,
            "up": {"block_3": 0.7, "block_1": [0.1, 0.2, 0.3]},
        },
        {"down": 0.25, "mid": [1.0], "up": {"block_2": [0.4]}},
        {"down": [0.5, 1.0], "up": 0.6},
        {"mid": 1.0},
        0.45,
    ],
    "sdxl": [
        {"up": {"block_0": [0.0, 1.0, 0.0]}},
        {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}},
        {"down": {"block_1": 0.3}, "mid": 0.3, "up": {"block_1": [0.1, 0.2, 0.3]}},
        {"down": 0.25, "mid": [1.0], "up": [1.0, 0.5, 0.0]},
        0.45,
    ],
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("base", "blocks"), [(base, blocks) for base in BASES for blocks in BLOCKS[base]]
)
def test_scales_by_block(base: str, blocks: Any, pairs: dict[str, Pair]) -> None:
    pair = pairs[base]
    pair.set_their_scale([blocks])
    _, table = scale_table(pair.layers, blocks=blocks)
    torch.testing.assert_close(table, torch.tensor(pair.by_layer()))
    inputs, given = noise_inputs(pair.ours, 1), features("base", 1)
    ours = noise(pair.ours, inputs, conditioned(pair.adapters[0], given).with_scale(table))
    torch.testing.assert_close(ours, pair.their_noise(inputs, [given[:, None]]), **TOLERANCE)
    assert (
        ours - noise(pair.ours, inputs)
    ).abs().max() > EFFECT / 10  # one block of many may move it less
