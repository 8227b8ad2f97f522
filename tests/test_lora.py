"""The low-rank part of an adapter: it acts as if it were merged into the base model, and only where
its prompt is heard.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imprompt.adapter import IPAdapter
from imprompt.attention.low_rank import PARTS, AttentionLowRank, ModelLowRank
from imprompt.errors import MismatchError
from imprompt.families.base import family_of
from tests.tiny import (
    noise,
    noise_inputs,
    random_prompt,
    seeded,
    smallest_unet,
    tiny_adapter,
    tiny_unet,
)

CLOSE = {"rtol": 0, "atol": 1e-5}


def layers(attention: Any) -> dict[str, Any]:
    return {
        "to_q": attention.to_q,
        "to_k": attention.to_k,
        "to_v": attention.to_v,
        "to_out": attention.to_out[0],
    }


def with_lora(adapter: IPAdapter, unet: Any, rank: int = 3, seed: int = 8) -> IPAdapter:
    parts = []
    with seeded(seed):
        for attention in family_of(unet).attentions(unet).values():
            part = AttentionLowRank(
                {
                    name: (layer.in_features, layer.out_features, rank)
                    for name, layer in layers(attention).items()
                }
            )
            for layer in part.modules():
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()  # a new part adds nothing
            parts.append(part.requires_grad_(False))
    adapter.low_rank = ModelLowRank(parts)
    return adapter


def merge(unet: Any, lora: ModelLowRank, strength: float = 1.0) -> None:
    """The reference: the low-rank part added to the base model's own matrices."""
    for attention, part in zip(family_of(unet).attentions(unet).values(), lora, strict=True):
        for name, layer in layers(attention).items():
            pair = getattr(part, name)
            layer.weight += strength * pair.up.weight @ pair.down.weight


@torch.no_grad()
@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_as_if_merged(base: str) -> None:
    unet, merged = tiny_unet(base), tiny_unet(base)
    adapter, plain = with_lora(tiny_adapter(unet), unet), tiny_adapter(merged)
    adapter.low_rank.strength = 0.6
    merge(merged, adapter.low_rank, 0.6)
    adapter.attach(unet)
    plain.attach(merged)
    inputs = noise_inputs(unet, 2)
    prompt = random_prompt(adapter, 2)
    assert len(prompt.low_rank) == 2 * len(prompt.keys)
    expected = noise(merged, inputs, random_prompt(plain, 2))
    for _ in range(2):  # a second step finds the text projected, with the low-rank part
        torch.testing.assert_close(noise(unet, inputs, prompt), expected, **CLOSE)
    without = noise(unet, inputs, prompt._replace(low_rank=()))  # of the very same text
    assert (without - expected).abs().max() > 0.01
    torch.testing.assert_close(noise(unet, inputs, prompt), expected, **CLOSE)


@torch.no_grad()
def test_without_its_prompt_the_base_model_is_itself() -> None:
    unet = smallest_unet()
    own, inputs = dict(unet.attn_processors), noise_inputs(unet, 1)
    before = noise(unet, inputs)
    other = tiny_adapter(unet, seed=4).attach(unet)
    adapter = with_lora(tiny_adapter(unet), unet).attach(unet)
    assert torch.equal(noise(unet, inputs), before)
    conditioned = noise(unet, inputs, random_prompt(other, 1))
    noise(unet, inputs, random_prompt(adapter, 1))
    assert torch.equal(noise(unet, inputs, random_prompt(other, 1)), conditioned)
    adapter.detach()
    other.detach()
    assert all(unet.attn_processors[name] is processor for name, processor in own.items())


@torch.no_grad()
def test_several_prompts_of_one_adapter_add_it_once_and_several_adapters_add_up() -> None:
    unet = smallest_unet()
    adapters = [
        with_lora(tiny_adapter(unet, seed=seed), unet, rank, seed).attach(unet)
        for seed, rank in ((3, 2), (4, 5))
    ]
    inputs = noise_inputs(unet, 2)
    prompts = [
        random_prompt(adapters[0], 2),
        random_prompt(adapters[0], 2, seed=6),
        random_prompt(adapters[1], 2, seed=7),
    ]
    merged = smallest_unet()
    for adapter in adapters:
        merge(merged, adapter.low_rank)
    plain = tiny_adapter(merged).attach(merged)
    expected = noise(merged, inputs, [prompt._replace(low_rank=()) for prompt in prompts])
    torch.testing.assert_close(noise(unet, inputs, prompts), expected, **CLOSE)
    plain.detach()


def test_a_prompt_needs_its_adapter_attached() -> None:
    unet = smallest_unet()
    adapter = with_lora(tiny_adapter(unet), unet).attach(unet)
    prompt = random_prompt(adapter, 1)
    adapter.detach()
    tiny_adapter(unet).attach(unet)
    with pytest.raises(
        MismatchError,
        match="low-rank part for 8 attentions; 4 of this model are injected: attach the adapter",
    ):
        noise(unet, noise_inputs(unet, 1), prompt)


def test_strength_and_weights_that_change_are_noticed() -> None:
    unet = smallest_unet()
    lora = with_lora(tiny_adapter(unet), unet).low_rank
    with torch.no_grad():
        first = lora.weights(torch.float32)
        assert lora.weights(torch.float32) is first
        lora.strength = 2.0
        assert torch.equal(lora.weights(torch.float32)[0].to_q[1], 2 * first[0].to_q[1])
        lora.strength = 1.0
        lora[0].to_q.up.weight += 1
        assert torch.equal(lora.weights(torch.float32)[0].to_q[1], lora[0].to_q.up.weight)
        assert lora.weights(torch.bfloat16)[0].to_q[1].dtype == torch.bfloat16
    for same in (copy.deepcopy(lora), pickle.loads(pickle.dumps(lora))):
        assert torch.equal(same[1].to_out.up.weight, lora[1].to_out.up.weight)


def test_it_can_be_trained() -> None:
    unet = smallest_unet()
    adapter = with_lora(tiny_adapter(unet), unet)
    adapter.low_rank.requires_grad_(True)
    adapter.attach(unet)
    noise(unet, noise_inputs(unet, 1), random_prompt(adapter, 1)).square().mean().backward()
    gradients = {
        f"{number}.{name}": getattr(part, name).up.weight.grad
        for number, part in enumerate(adapter.low_rank)
        for name in PARTS
    }
    missing = [
        name
        for name, gradient in gradients.items()
        if not isinstance(gradient, Tensor) or not gradient.any()
    ]
    assert missing == []


@torch.no_grad()
def test_token_weights() -> None:
    """Weight 2 is as the tokens given twice, weight 0 as if they were not there.

    Items of a batch have their own.
    """
    unet = smallest_unet()
    adapter = tiny_adapter(unet).attach(unet)
    inputs = noise_inputs(unet, 2)
    with seeded(2):
        one, other = torch.randn(2, 2, 3, 32)
    both = adapter.prompt(torch.cat([one, other], 1))
    weights = torch.tensor([[1.0, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0]])
    weighed = noise(unet, inputs, both._replace(bias=weights.log()))
    twice = noise(unet, inputs, adapter.prompt(torch.cat([one, other, other], 1)))
    absent = noise(unet, inputs, adapter.prompt(one))
    torch.testing.assert_close(weighed[0], twice[0], **CLOSE)
    torch.testing.assert_close(weighed[1], absent[1], **CLOSE)
    with pytest.raises(
        MismatchError, match=r"bias of shape \[3, 6\]: give \(1 or 2, 6 image tokens\)"
    ):
        noise(unet, inputs, both._replace(bias=torch.zeros(3, 6)))


@torch.no_grad()
def test_tokens_as_wide_as_a_text_that_the_model_widens() -> None:
    """Kolors' text is projected by the UNet itself; image tokens of that width go the same way."""
    unet = smallest_unet(encoder_hid_dim=48, encoder_hid_dim_type="text_proj")
    adapter = tiny_adapter(unet).attach(unet)
    with seeded(3):
        tokens = torch.randn(2, 3, 48)
    wide, own = adapter.prompt(tokens), adapter.prompt(unet.encoder_hid_proj(tokens))
    assert torch.equal(torch.stack(wide.keys[:1]), torch.stack(own.keys[:1]))
    inputs = noise_inputs(unet, 2) | {
        "encoder_hidden_states": torch.randn(2, 11, 48, generator=torch.Generator().manual_seed(1))
    }
    assert (noise(unet, inputs, wide) - noise(unet, inputs)).abs().max() > 1e-3


def test_motion_modules_are_no_layers() -> None:
    from diffusers import MotionAdapter, UNetMotionModel

    unet = tiny_unet("sd1")
    config = {
        "block_out_channels": (16, 32, 64, 64),
        "motion_norm_num_groups": 8,
        "motion_num_attention_heads": 2,
    }
    moving = UNetMotionModel.from_unet2d(unet, MotionAdapter(**config))
    assert list(family_of(moving).layers(moving)) == list(family_of(unet).layers(unet))
    assert len(family_of(moving).attentions(moving)) == 32
