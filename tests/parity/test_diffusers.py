"""imprompt against diffusers' own IP-Adapter: the same weights and inputs give the same noise and
the same pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from PIL import Image
from torch import Tensor

from imprompt.adapter import IPAdapter
from imprompt.encoders.vision import VisionEncoder
from imprompt.prompt import ImagePrompt
from imprompt.variants import VARIANTS, Variant, find_variant
from tests.tiny import (
    TEXT_TOKENS,
    UNETS,
    noise,
    noise_inputs,
    paper_layout,
    pictures,
    tiny_adapter,
    tiny_unet,
)
from tests.tiny_pipelines import PIPELINES

TOLERANCE = {"rtol": 0, "atol": 1e-5}
EFFECT = 1e-2  # an image prompt moves the noise by more than this: the comparisons mean something


@dataclass
class Pair:
    """One base model twice: joined by our adapter, and by diffusers' with the same weights."""

    row: Variant
    adapter: IPAdapter
    ours: UNet2DConditionModel
    theirs: UNet2DConditionModel


@pytest.fixture(
    scope="module",
    params=[(base, row) for base in UNETS for row in VARIANTS],
    ids=lambda p: f"{p[0]}-{p[1].name}",
)
def pair(request: pytest.FixtureRequest) -> Pair:
    base, row = request.param
    ours, theirs = tiny_unet(base), tiny_unet(base)
    adapter = tiny_adapter(ours, row.name).attach(ours)
    theirs._load_ip_adapter_weights([paper_layout(adapter)], low_cpu_mem_usage=False)
    return Pair(row, adapter, ours, theirs.requires_grad_(False))


def set_their_scale(model: UNet2DConditionModel, scale: float) -> None:
    for processor in model.attn_processors.values():
        if isinstance(processor, IPAdapterAttnProcessor2_0):
            processor.scale = [scale]


def with_image(inputs: dict[str, Any], features: Tensor) -> dict[str, Any]:
    """diffusers takes the features (batch, 1 image, ...) beside the model's other conditions."""
    return inputs | {
        "added_cond_kwargs": inputs.get("added_cond_kwargs", {})
        | {"image_embeds": [features[:, None]]}
    }


@torch.no_grad()
@pytest.mark.parametrize("guidance", [False, True], ids=["plain", "guidance"])
@pytest.mark.parametrize("batch", [1, 3])
def test_same_noise(pair: Pair, encoder: VisionEncoder, batch: int, guidance: bool) -> None:
    features = encoder.features(pictures(batch), pair.row.feature)
    null = encoder.null_features(pair.row) if guidance else None
    prompt = pair.adapter.prompt(
        pair.adapter.tokens(features), None if null is None else pair.adapter.tokens(null)
    )
    if null is not None:
        features = torch.cat([null.expand_as(features), features])
    inputs = noise_inputs(pair.ours, len(features))
    results = {}
    for scale in (0.0, 0.3, 1.0):
        set_their_scale(pair.theirs, scale)
        results[scale] = noise(pair.ours, inputs, prompt.with_scale(scale))
        torch.testing.assert_close(
            results[scale], noise(pair.theirs, with_image(inputs, features)), **TOLERANCE
        )
    assert (results[1.0] - results[0.0]).abs().max() > EFFECT


@torch.no_grad()
def test_text_mask_leaves_the_image_alone(pair: Pair, encoder: VisionEncoder) -> None:
    """A mask over text tokens (some pipelines pass one) masks no image token, here as in
    diffusers.
    """
    features = encoder.features(pictures(2), pair.row.feature)
    mask = torch.arange(TEXT_TOKENS) < torch.tensor([[4], [TEXT_TOKENS]])
    inputs = noise_inputs(pair.ours, 2) | {"encoder_attention_mask": mask}
    set_their_scale(pair.theirs, 1.0)
    ours = noise(pair.ours, inputs, pair.adapter.prompt(pair.adapter.tokens(features)))
    torch.testing.assert_close(ours, noise(pair.theirs, with_image(inputs, features)), **TOLERANCE)


def pipeline_prompt(
    adapter: IPAdapter, pipe: Any, images: Sequence[Image.Image], row: Variant, scale: float = 1.0
) -> ImagePrompt:
    encoder = VisionEncoder(pipe.image_encoder, pipe.feature_extractor)
    return adapter.prompt(
        adapter.tokens(encoder.features(images, row.feature)),
        adapter.tokens(encoder.null_features(row)),
        scale,
    )


def run(pipe: Any, texts: Sequence[str], latents: Tensor, **arguments: Any) -> Tensor:
    """Four guided steps from these latents -> pixels in [0, 1]."""
    images = pipe(
        list(texts),
        height=32,
        width=16,
        latents=latents,
        num_inference_steps=4,
        guidance_scale=7.5,
        output_type="pt",
        **arguments,
    ).images
    assert images.isfinite().all()
    return images


def start(batch: int) -> Tensor:
    return torch.randn(batch, 4, 16, 8, generator=torch.Generator().manual_seed(11))


@torch.no_grad()
@pytest.mark.parametrize("row", VARIANTS, ids=lambda row: row.name)
@pytest.mark.parametrize("base", PIPELINES)
def test_same_pixels(base: str, row: Variant) -> None:
    pipe = PIPELINES[base]()
    adapter = tiny_adapter(pipe.unet, row.name)
    theirs = PIPELINES[base]()
    theirs.load_ip_adapter(paper_layout(adapter), subfolder="", weight_name="")
    theirs.set_ip_adapter_scale(0.6)
    (picture,) = pictures(1)
    text_only = run(pipe, ["a cat"], start(1))
    with adapter.attached(pipe.unet):
        prompt = pipeline_prompt(adapter, pipe, [picture], row, scale=0.6)
        ours = run(pipe, ["a cat"], start(1), cross_attention_kwargs={"ip_hidden_states": prompt})
    torch.testing.assert_close(
        ours, run(theirs, ["a cat"], start(1), ip_adapter_image=picture), **TOLERANCE
    )
    assert (ours - text_only).abs().max() > EFFECT
    assert torch.equal(run(pipe, ["a cat"], start(1)), text_only)


@torch.no_grad()
@pytest.mark.parametrize("base", PIPELINES)
def test_each_item_gets_its_own_image(base: str) -> None:
    """diffusers' pipelines let every item of a batch hear all images of the batch.

    Here item i hears image i.
    """
    pipe = PIPELINES[base]()
    row, texts, images, latents = (
        find_variant("base"),
        ["a cat", "dog", "a red hat"],
        pictures(3),
        start(3),
    )
    with tiny_adapter(pipe.unet).attached(pipe.unet) as adapter:

        def ours(items: slice) -> Tensor:
            prompt = pipeline_prompt(adapter, pipe, images[items], row)
            return run(
                pipe,
                texts[items],
                latents[items],
                cross_attention_kwargs={"ip_hidden_states": prompt},
            )

        together = ours(slice(0, 3))
        alone = torch.cat([ours(slice(item, item + 1)) for item in range(3)])
    torch.testing.assert_close(together, alone, **TOLERANCE)
    assert (together - together.roll(1, 0)).abs().max() > EFFECT
