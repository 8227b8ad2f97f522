"""Attention by blocks of queries, for training on CPUs: the same numbers as the fused kernel's."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from imprompt.attention import blockwise
from imprompt.attention.blockwise import Blockwise, SelfAttention
from tests.tiny import noise, noise_inputs, tiny_unet


@pytest.mark.parametrize("length", [1, 3, 8, 10])
def test_blocks_of_queries_are_attention(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    torch.manual_seed(0)
    own = [
        torch.randn(2, length, 3, 5, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]
    plain = [x.detach().clone().requires_grad_() for x in own]
    gradient = torch.randn(2, 3, length, 5, dtype=torch.float64)
    out, expected = Blockwise.apply(*own), F.scaled_dot_product_attention(*plain)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out, expected)
    # Sums over blocks are float32.
    ours, theirs = (
        torch.autograd.grad(out, own, gradient),
        torch.autograd.grad(expected, plain, gradient),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("long", [1024, 1], ids=["short", "long"])
def test_a_unet_predicts_the_same(long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "LONG", long)
    unet = tiny_unet("sd1").to(torch.float32 if long > 1 else torch.bfloat16)
    inputs = {
        key: x.to(unet.dtype) if x.is_floating_point() else x
        for key, x in noise_inputs(unet, 2).items()
    }
    inputs["encoder_hidden_states"].requires_grad_()
    found = []
    for own in (AttnProcessor2_0(), SelfAttention()):
        unet.set_attn_processor(
            {
                name: own if ".attn1." in name else other
                for name, other in unet.attn_processors.items()
            }
        )
        out = noise(unet, inputs).float()
        found.append(
            (
                out,
                torch.autograd.grad(out.square().sum(), inputs["encoder_hidden_states"])[0].float(),
            )
        )
    for expected, ours in zip(*found, strict=True):
        # of the largest; bfloat16 keeps 8 bits, through 16 layers
        most = 1e-5 if long > 1 else 0.03
        assert (expected - ours).abs().max() <= most * expected.abs().max()
