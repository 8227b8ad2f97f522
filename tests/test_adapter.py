"""The adapter: what it adds, and that it leaves the base model as it was."""

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from imprompt.adapter import ImageProjection, IPAdapter, attention, decoupled_attention, split_heads
from imprompt.encoders.vision import VisionEncoder
from imprompt.errors import MismatchError, SettingError
from imprompt.families.base import family_of, find_family
from imprompt.prompt import ImagePrompt
from imprompt.variants import VARIANTS, Variant, find_variant
from tests.tiny import (
    FEATURE_DIMS,
    SD1,
    SDXL,
    TEXT_TOKENS,
    UNETS,
    noise,
    noise_inputs,
    pictures,
    random_prompt,
    seeded,
    smallest_unet,
    tiny_adapter,
    tiny_projection,
    tiny_unet,
)

SIZES = st.integers(1, 5)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


def describe(model: nn.Module) -> dict[str, Any]:
    """All that a graft could leave traces in: the printed tree, the weights and the attention's
    processors themselves.
    """
    return {
        "tree": repr(model),
        "weights": {
            key: weight.data_ptr() for key, weight in model.state_dict(keep_vars=True).items()
        },
        "processors": dict(model.attn_processors),  # compared by identity
    }


# The graft


@torch.no_grad()
def test_detach_leaves_no_trace(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 2)
    before, noise_before = describe(unet), noise(unet, inputs)
    adapter = tiny_adapter(unet).attach(unet)
    assert describe(unet)["processors"] != before["processors"]
    assert describe(unet)["weights"] == before["weights"]
    assert (noise(unet, inputs, random_prompt(adapter, 2)) - noise_before).abs().max() > 1e-2
    adapter.detach()
    assert describe(unet) == before
    assert same_bits(noise(unet, inputs), noise_before)
    adapter.detach()  # a second time does nothing
    assert describe(unet) == before


@torch.no_grad()
def test_inactive_adapter_is_the_base_model_bit_for_bit(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 2)
    base = noise(unet, inputs)
    with tiny_adapter(unet).attached(unet) as adapter:
        assert same_bits(noise(unet, inputs), base)
        assert same_bits(noise(unet, inputs, random_prompt(adapter, 2, scale=0.0)), base)


def test_base_model_and_adapter_hold_nothing_of_each_other(unet: UNet2DConditionModel) -> None:
    with tiny_adapter(unet).attached(unet) as adapter:
        assert not set(unet.modules()) & set(adapter.modules())
        ours, theirs = (set(map(id, model.parameters())) for model in (adapter, unet))
        assert not ours & theirs
        kv = {
            f"image_kv.{layer}.{name}.weight"
            for layer in range(len(adapter.image_kv))
            for name in ("to_k", "to_v")
        }
        assert set(adapter.state_dict()) == kv | {
            f"projection.{key}" for key in adapter.projection.state_dict()
        }


def test_attached_detaches_after_an_exception() -> None:
    unet = smallest_unet()
    before = describe(unet)
    with pytest.raises(RuntimeError, match="stop"), tiny_adapter(unet).attached(unet):
        raise RuntimeError("stop")
    assert describe(unet) == before


def test_attached_twice_is_refused() -> None:
    unet = smallest_unet()
    with (
        tiny_adapter(unet).attached(unet) as adapter,
        pytest.raises(MismatchError, match="attached already"),
    ):
        adapter.attach(unet)


def test_an_adapter_moves_between_models() -> None:
    unet, other = smallest_unet(), smallest_unet()
    adapter = tiny_adapter(unet)
    inputs = noise_inputs(unet, 1)
    results = []
    for model in (unet, other):
        with torch.no_grad(), adapter.attached(model):
            results.append(noise(model, inputs, random_prompt(adapter, 1)))
    assert same_bits(*results)


# Sizes and starting point


def test_starts_from_the_text_keys_and_values(unet: UNet2DConditionModel) -> None:
    projection = tiny_projection("base", unet.config.cross_attention_dim)
    adapter = IPAdapter.for_model(unet, projection)
    layers = family_of(unet).layers(unet)
    assert all(name.endswith("attn2") for name in layers)
    for kv, layer in zip(adapter.image_kv, layers.values(), strict=True):
        for new, own in ((kv.to_k, layer.to_k), (kv.to_v, layer.to_v)):
            assert torch.equal(new.weight, own.weight)
            assert new.weight.data_ptr() != own.weight.data_ptr()
            assert new.weight.requires_grad
            assert new.bias is None


@pytest.mark.parametrize(
    ("config", "embedding", "layers", "parameters"),
    [(SD1, 1024, 16, 22_319_616), (SDXL, 1024, 70, 349_188_096), (SDXL, 1280, 70, 351_285_248)],
    ids=["sd1", "sdxl-vit-h", "sdxl-vit-bigg"],
)
def test_sizes_of_the_published_adapters(
    config: dict[str, Any], embedding: int, layers: int, parameters: int
) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        adapter = IPAdapter.for_model(
            unet, ImageProjection(embedding, config["cross_attention_dim"])
        )
    assert len(adapter.image_kv) == layers
    assert sum(parameter.numel() for parameter in adapter.parameters()) == parameters


@pytest.mark.parametrize(
    ("config", "runs"),
    [
        (SD1, "down0×2 down1×2 down2×2 up1×3 up2×3 up3×3 mid×1"),
        (SDXL, "down1×4 down2×20 up0×30 up1×6 mid×10"),
    ],
    ids=["sd1", "sdxl"],
)
def test_layers_stand_in_the_published_order(config: dict[str, Any], runs: str) -> None:
    """Down blocks, up blocks, middle: the order by which checkpoints number them."""
    with torch.device("meta"):
        names = list(find_family("unet").layers(UNet2DConditionModel(**config)))
    blocks = [
        name.replace("mid_block", "mid").replace("_blocks.", "").split(".")[0] for name in names
    ]
    assert " ".join(f"{block}×{blocks.count(block)}" for block in dict.fromkeys(blocks)) == runs
    assert blocks == [block for block in dict.fromkeys(blocks) for _ in range(blocks.count(block))]


def test_families_are_found() -> None:
    assert family_of(smallest_unet()) is find_family("unet")
    with pytest.raises(MismatchError, match="Linear is not of a known family"):
        family_of(nn.Linear(1, 1))
    with pytest.raises(MismatchError, match="unknown base-model family 'nope'; known: unet"):
        find_family("nope")
    with pytest.raises(SettingError, match="unknown variant 'nope'; known: base"):
        find_variant("nope")


@pytest.mark.parametrize(
    ("base", "overrides", "message"),
    [
        ("sd2", {}, r"768-wide text \(SD 1.x\); the text of this model is 1024 wide \(SD 2.x\)"),
        ("sdxl", {}, r"768-wide text \(SD 1.x\); the text of this model is 2048 wide \(SDXL\)"),
        ("sdxl", {"cross_attention_dim": 768}, "is for 16 cross-attentions; this model has 17"),
        (
            "sd1",
            {"block_out_channels": (16, 32, 64, 128)},
            "64-wide keys at mid_block.*attn2; this model's are 128 wide",
        ),
    ],
    ids=["text-width", "sdxl", "number", "width"],
)
def test_wrong_model_is_refused_with_both_numbers(
    base: str, overrides: dict[str, Any], message: str
) -> None:
    adapter, other = tiny_adapter(tiny_unet("sd1")), tiny_unet(base, **overrides)
    before = describe(other)
    with pytest.raises(MismatchError, match=message):
        adapter.attach(other)
    assert describe(other) == before
    with pytest.raises(MismatchError, match="not attached"):
        random_prompt(adapter, 1)


# Prompts


@torch.no_grad()
def test_wrong_batch_is_refused_with_both_numbers() -> None:
    unet = smallest_unet()
    with (
        tiny_adapter(unet).attached(unet) as adapter,
        pytest.raises(MismatchError, match="batch of 2, the base model runs a batch of 3"),
    ):
        noise(unet, noise_inputs(unet, 3), random_prompt(adapter, 2))


@torch.no_grad()
def test_a_prompt_of_one_applies_by_all(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 3)
    with tiny_adapter(unet).attached(unet) as adapter:
        one = random_prompt(adapter, 1)
        spread = one._replace(
            keys=tuple(k.expand(3, -1, -1, -1) for k in one.keys),
            values=tuple(v.expand(3, -1, -1, -1) for v in one.values),
        )
        assert same_bits(noise(unet, inputs, one), noise(unet, inputs, spread))


@torch.no_grad()
@pytest.mark.parametrize("row", VARIANTS, ids=lambda row: row.name)
def test_guidance_puts_the_null_image_first(encoder: VisionEncoder, row: Variant) -> None:
    unet = smallest_unet()
    inputs = noise_inputs(unet, 2)
    twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
    with tiny_adapter(unet, row.name).attached(unet) as adapter:
        tokens = adapter.tokens(encoder.features(pictures(2), row.feature))
        null_tokens = adapter.tokens(encoder.null_features(row))
        both = noise(unet, twice, adapter.prompt(tokens, null_tokens))
        halves = [noise(unet, inputs, adapter.prompt(half)) for half in (null_tokens, tokens)]
    torch.testing.assert_close(both, torch.cat(halves), rtol=0, atol=1e-5)
    assert (halves[0] - halves[1]).abs().max() > 1e-2


@torch.no_grad()
def test_scale_by_layers_and_by_item() -> None:
    unet = smallest_unet()
    inputs = noise_inputs(unet, 2)
    with tiny_adapter(unet).attached(unet) as adapter:
        prompt = random_prompt(adapter, 2)
        layers = len(adapter.image_kv)
        unconditioned, conditioned = noise(unet, inputs), noise(unet, inputs, prompt)
        by_item = noise(unet, inputs, prompt.with_scale(torch.tensor([[0.0, 1.0]] * layers)))
        assert same_bits(by_item[0], unconditioned[0])
        assert same_bits(by_item[1], conditioned[1])
        first_only = prompt.with_scale(torch.eye(layers)[0])
        others_muted = prompt._replace(
            values=tuple(v if layer == 0 else 0 * v for layer, v in enumerate(prompt.values))
        )
        assert same_bits(noise(unet, inputs, first_only), noise(unet, inputs, others_muted))
        assert not torch.equal(noise(unet, inputs, first_only), unconditioned)


@given(layers=SIZES, batch=SIZES)
def test_with_scale_takes_a_number_a_row_of_layers_or_a_table(layers: int, batch: int) -> None:
    states = (torch.zeros(batch, 1, 1, 1),) * layers
    prompt = ImagePrompt(states, states, torch.ones(layers, 1))
    table = torch.arange(layers * batch).view(layers, batch).float()
    for scale, expected in (
        (0.5, torch.full((layers, 1), 0.5)),
        (torch.tensor(0.5), torch.full((layers, 1), 0.5)),
        (table[:, 0], table[:, :1]),
        (table, table),
        (table[..., None] + torch.arange(7), table[..., None] + torch.arange(7)),
    ):
        new = prompt.with_scale(scale)
        assert torch.equal(new.scale, expected)
        assert new.keys is prompt.keys
        assert new.values is prompt.values
    assert torch.equal(prompt.scale, torch.ones(layers, 1))


@pytest.mark.parametrize(
    ("scale", "shape"),
    [
        (torch.ones(3), r"\[3\]"),
        (torch.ones(3, 2), r"\[3, 2\]"),
        (torch.ones(4, 1, 1, 1), r"\[4, 1, 1, 1\]"),
    ],
)
def test_a_scale_for_other_layers_is_refused(scale: Tensor, shape: str) -> None:
    states = (torch.zeros(2, 1, 1, 1),) * 4
    with pytest.raises(
        MismatchError, match=f"scale of shape {shape}: give one number, 4 \\(one per layer\\)"
    ):
        ImagePrompt(states, states, torch.ones(4, 1)).with_scale(scale)


def test_a_copy_leaves_the_base_model_behind() -> None:
    unet = smallest_unet()
    with tiny_adapter(unet).attached(unet) as adapter:
        other = copy.deepcopy(adapter)
        assert all(
            torch.equal(a, b) for a, b in zip(adapter.parameters(), other.parameters(), strict=True)
        )
        random_prompt(adapter, 1)  # the first is attached still
        with pytest.raises(MismatchError, match="not attached"):
            random_prompt(other, 1)


# The attention


@given(
    batch=SIZES,
    heads=SIZES,
    queries=SIZES,
    tokens=SIZES,
    width=SIZES,
    scale=st.floats(-2, 2, width=32),
)
def test_output_is_affine_in_scale(
    batch: int, heads: int, queries: int, tokens: int, width: int, scale: float
) -> None:
    """Equation 5, written out: out(s) = out(0) + s · (out(1) − out(0)), and out(1) − out(0) is the
    image's own attention.
    """
    with seeded(batch):
        query, key, value = (
            torch.randn(batch, heads, length, width) for length in (queries, tokens + 1, tokens + 1)
        )
        image_key, image_value = torch.randn(2, batch, heads, tokens, width)

    def conditioned(*scales: float) -> Tensor:
        weights = torch.tensor(scales).view(-1, 1, 1, 1, 1)
        return decoupled_attention(
            query, key, value, None, [(image_key, image_value)] * len(scales), weights
        )

    zero, one = conditioned(0.0), conditioned(1.0)
    torch.testing.assert_close(conditioned(scale), zero + scale * (one - zero), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        conditioned(scale, 0.5), zero + (scale + 0.5) * (one - zero), rtol=0, atol=1e-5
    )
    weights = (query @ image_key.transpose(-1, -2) / width**0.5).softmax(-1)
    torch.testing.assert_close(one - zero, weights @ image_value, rtol=0, atol=1e-5)
    assert torch.equal(zero, attention(query, key, value))


@given(batch=SIZES, length=SIZES, heads=SIZES, width=SIZES)
def test_split_heads_loses_nothing(batch: int, length: int, heads: int, width: int) -> None:
    x = torch.arange(batch * length * heads * width).view(batch, length, heads * width)
    split = split_heads(x, heads)
    assert split.shape == (batch, heads, length, width)
    assert torch.equal(split.transpose(1, 2).flatten(2), x)


@torch.no_grad()
def test_text_mask_as_in_the_base_model(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 2)
    masked = inputs | {
        "encoder_attention_mask": torch.arange(TEXT_TOKENS) < torch.tensor([[4], [TEXT_TOKENS]])
    }
    base = noise(unet, masked)
    assert not torch.equal(base[0], noise(unet, inputs)[0])
    with tiny_adapter(unet).attached(unet):
        assert same_bits(noise(unet, masked), base)


# Precision, training, compilation


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_base_with_single_precision_adapter(
    unet: UNet2DConditionModel, encoder: VisionEncoder, dtype: torch.dtype
) -> None:
    inputs = noise_inputs(unet, 2)
    features = encoder.features(pictures(2), "pooled").to(dtype)
    adapter = tiny_adapter(unet)
    with adapter.attached(unet):
        expected = noise(unet, inputs, adapter.prompt(adapter.tokens(features)))
    unet.to(dtype)
    halves = {
        name: value.to(dtype) if name in ("sample", "encoder_hidden_states") else value
        for name, value in inputs.items()
    }
    if "added_cond_kwargs" in inputs:
        halves["added_cond_kwargs"] = {
            name: value.to(dtype) for name, value in inputs["added_cond_kwargs"].items()
        }
    with adapter.attached(unet):
        prompt = adapter.prompt(adapter.tokens(features))
        assert {state.dtype for state in prompt.keys + prompt.values} == {dtype}
        result = noise(unet, halves, prompt)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.05)


def gradients(unet: UNet2DConditionModel, row: Variant) -> dict[str, Tensor]:
    """The adapter's gradients after one backward pass through the frozen base model."""
    with tiny_adapter(unet, row.name).attached(unet) as adapter:
        with seeded(0):
            features = torch.randn(
                2, *(() if row.feature == "pooled" else (9,)), FEATURE_DIMS[row.feature]
            )
        noise(
            unet, noise_inputs(unet, 2), adapter.prompt(adapter.tokens(features))
        ).square().mean().backward()
    return {name: parameter.grad for name, parameter in adapter.named_parameters()}


@pytest.mark.parametrize("row", VARIANTS, ids=lambda row: row.name)
def test_gradients_reach_the_adapter_only(unet: UNet2DConditionModel, row: Variant) -> None:
    for name, gradient in gradients(unet, row).items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_gradient_checkpointing_changes_no_gradient(unet: UNet2DConditionModel) -> None:
    row = find_variant("base")
    plain = gradients(unet, row)
    unet.train()
    unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing
    for name, gradient in gradients(unet, row).items():
        torch.testing.assert_close(
            gradient, plain[name], rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def wrapped(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, **options)


def in_place(model: nn.Module, **options: Any) -> Any:
    model.compile(**options)
    return model


def forward_only(model: Any, **options: Any) -> Any:
    model.forward = torch.compile(model.forward, **options)
    return model


@torch.no_grad()
@pytest.mark.parametrize("compiled", [wrapped, in_place, forward_only])
def test_new_scales_and_images_recompile_nothing(compiled: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    counter, unet = CompileCounter(), smallest_unet()
    inputs = noise_inputs(unet, 2)
    adapter = tiny_adapter(unet).attach(unet)
    other = copy.deepcopy(unet)  # with a graft of its own
    prompt, layers = random_prompt(adapter, 2), len(adapter.image_kv)
    fast, compilations = compiled(unet, backend=counter, fullgraph=True), 0
    for conditioned in (
        prompt,
        prompt.with_scale(0.3),
        prompt.with_scale(0.0),
        prompt.with_scale(torch.linspace(0, 1, layers)),
        random_prompt(adapter, 2, scale=0.7, seed=99),
    ):
        torch.testing.assert_close(
            noise(fast, inputs, conditioned), noise(other, inputs, conditioned), rtol=0, atol=1e-6
        )
        compilations = compilations or counter.frame_count
        assert counter.frame_count == compilations > 0
    torch._dynamo.reset()


# What we lean on in diffusers


@pytest.fixture
def diffusers_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    diffusers_logging.disable_propagation()


@torch.no_grad()
def test_self_attention_drops_our_key_without_a_word(
    diffusers_log: pytest.LogCaptureFixture,
) -> None:
    """`ip_hidden_states` reaches every attention.

    The processors that do not know it must not warn.
    """
    unet = smallest_unet()
    with tiny_adapter(unet).attached(unet) as adapter:
        noise(unet, noise_inputs(unet, 1), random_prompt(adapter, 1))
        assert not diffusers_log.records
        unet(**noise_inputs(unet, 1), cross_attention_kwargs={"unknown": 1})
    assert "['unknown'] are not expected by AttnProcessor2_0" in diffusers_log.text


@torch.no_grad()
def test_copies_of_an_adapted_model_get_too() -> None:
    """EMA and some pipelines copy the model: the processors hold no weights and go along."""
    unet = smallest_unet()
    inputs = noise_inputs(unet, 1)
    with tiny_adapter(unet).attached(unet) as adapter:
        prompt = random_prompt(adapter, 1)
        assert same_bits(noise(copy.deepcopy(unet), inputs, prompt), noise(unet, inputs, prompt))


def test_every_structure_has_its_own_number_of_layers() -> None:
    assert {base: len(find_family("unet").layers(tiny_unet(base))) for base in UNETS} == {
        "sd1": 16,
        "sd2": 16,
        "sdxl": 17,
    }
