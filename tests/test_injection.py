"""What a base model's cross-attentions are handed before each step: projected once, and noticed
when it changes.
"""

import copy
import gc
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import cpu_offload
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from imprompt.errors import MismatchError
from imprompt.families import unet as unet_family
from imprompt.families.base import family_of
from tests.tiny import noise, noise_inputs, random_prompt, smallest_unet, tiny_adapter, tiny_unet

LAYERS = 4  # of smallest_unet


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return smallest_unet()


@contextmanager
def counted(unet: nn.Module) -> Iterator[list[int]]:
    """How often a text key was projected inside."""
    calls, forward = [0], nn.Linear.forward
    layers = {id(layer.to_k) for layer in family_of(unet).layers(unet).values()}

    def called(layer: nn.Linear, x: Tensor) -> Tensor:
        calls[0] += id(layer) in layers
        return forward(layer, x)

    with mock.patch.object(nn.Linear, "forward", called):
        yield calls


# The text


def test_calls_of_one_kind_share_their_choices_of_a_kernel(unet: UNet2DConditionModel) -> None:
    adapter = tiny_adapter(unet).attach(unet)
    injection, prompt = adapter.injection, random_prompt(adapter, 2)

    def chosen(prompt: Any = prompt, text: int = 5, **given: Any) -> list[bool | None]:
        given = noise_inputs(unet, 2) | {"encoder_hidden_states": torch.ones(2, text, 8)} | given
        call = injection.family.call(unet, given, injection.timesteps)
        return injection.kernel_choices(call, [prompt])

    with torch.no_grad():
        first = chosen()
        assert first == [None] * LAYERS
        assert chosen() is first
        assert chosen(prompt.with_scale(0.3)) is first
        longer = prompt._replace(
            keys=tuple(key.repeat(1, 1, 2, 1) for key in prompt.keys),
            values=tuple(value.repeat(1, 1, 2, 1) for value in prompt.values),
        )
        others = [
            chosen(text=6),
            chosen(longer),
            chosen(prompt._replace(mask=torch.ones(1, 8, 8))),
            chosen(prompt._replace(keys=tuple(key.half() for key in prompt.keys))),
            chosen(sample=torch.ones(2, 4, 32, 32)),
            chosen(sample=torch.ones(4, 4, 16, 8)),
        ]
    others.append(chosen())  # with gradients
    assert len({id(each) for each in (first, *others)}) == 1 + len(others)


@torch.no_grad()
def test_text_is_projected_once(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 2)
    with tiny_adapter(unet).attached(unet) as adapter, counted(unet) as calls:
        first, second = random_prompt(adapter, 2), random_prompt(adapter, 2, scale=0.3, seed=9)
        results = [noise(unet, inputs, prompt) for prompt in (first, second, first)]
    assert calls == [LAYERS]
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


@torch.no_grad()
def test_what_is_held_is_reported_and_dies_with_the_text(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 2)
    with tiny_adapter(unet).attached(unet) as adapter:
        prompt = random_prompt(adapter, 2)
        assert adapter.injection.cached_bytes() == 0
        noise(unet, inputs, prompt)
        text = inputs["encoder_hidden_states"]
        widths = sum(layer.to_k.out_features for layer in family_of(unet).layers(unet).values())
        assert adapter.injection.cached_bytes() == 2 * text.shape[0] * text.shape[1] * widths * 4
        assert prompt.bytes == 2 * 2 * 3 * widths * 4  # three image tokens
        del inputs, text
        gc.collect()
        assert adapter.injection.cached_bytes() == 0


def replaced(unet: nn.Module, inputs: dict[str, Any]) -> None:  # noqa: ARG001
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"] + 0.5


def changed_in_place(unet: nn.Module, inputs: dict[str, Any]) -> None:  # noqa: ARG001
    inputs["encoder_hidden_states"][:, 1] = 0.5


def weights_changed(unet: nn.Module, inputs: dict[str, Any]) -> None:  # noqa: ARG001
    next(iter(family_of(unet).layers(unet).values())).to_v.weight.mul_(1.5)


def weights_loaded(unet: nn.Module, inputs: dict[str, Any]) -> None:  # noqa: ARG001
    unet.load_state_dict({key: value * 1.1 for key, value in unet.state_dict().items()})


class LowRank(nn.Module):
    """A layer with more than a matrix, as LoRA loaders put in a Linear's place."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.weight, self.scale = layer, layer.weight, 2.0
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


def lora_loaded(unet: nn.Module, inputs: dict[str, Any]) -> None:  # noqa: ARG001
    layer = list(family_of(unet).layers(unet).values())[1]
    layer.to_k = LowRank(layer.to_k)


def first_key(unet: nn.Module) -> Any:
    return next(iter(family_of(unet).layers(unet).values())).to_k


def forward_replaced(unet: nn.Module, inputs: dict[str, Any]) -> None:  # noqa: ARG001
    layer = first_key(unet)
    # as other LoRA loaders do
    layer.forward = lambda x: nn.functional.linear(x, layer.weight * 1.5)


def hook_added(unet: nn.Module, inputs: dict[str, Any]) -> None:  # noqa: ARG001
    first_key(unet).register_forward_hook(lambda _layer, _args, out: out * 1.5)


def bias_added(unet: nn.Module, inputs: dict[str, Any]) -> None:  # noqa: ARG001
    first_key(unet).bias = nn.Parameter(torch.linspace(0, 2, first_key(unet).out_features))


CHANGES = [
    replaced,
    changed_in_place,
    weights_changed,
    weights_loaded,
    lora_loaded,
    forward_replaced,
    hook_added,
    bias_added,
]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_noticed(unet: UNet2DConditionModel, change: Any) -> None:
    inputs = noise_inputs(unet, 2)
    with tiny_adapter(unet).attached(unet) as adapter:
        prompt = random_prompt(adapter, 2)
        before = noise(unet, inputs, prompt)
        change(unet, inputs)
        after = noise(unet, inputs, prompt)
        assert not torch.equal(after, before)
        assert torch.equal(after, noise(copy.deepcopy(unet), inputs, prompt))


@torch.no_grad()
def test_an_unfused_lora_is_projected_every_time(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 1)
    lora_loaded(unet, inputs)
    layer = list(family_of(unet).layers(unet).values())[1]
    with tiny_adapter(unet).attached(unet) as adapter:
        prompt = random_prompt(adapter, 1)
        results = []
        for scale in (2.0, 3.0, 2.0):  # of the LoRA: nothing marks that it changed
            layer.to_k.scale = scale
            results.append(noise(unet, inputs, prompt))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


@torch.no_grad()
def test_offloaded_weights_come_for_the_text_once(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 2)
    with tiny_adapter(unet).attached(unet) as adapter, counted(unet) as calls:
        prompt = random_prompt(adapter, 2)
        expected = noise(copy.deepcopy(unet), inputs, prompt)
        cpu_offload(unet, "cpu")  # layer by layer: elsewhere their weights are on the meta device
        for _ in range(3):
            assert torch.equal(noise(unet, inputs, prompt), expected)
    assert calls == [LAYERS]


@torch.no_grad()
def test_weights_that_are_elsewhere_are_waited_for(
    unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under model offload: the hook of the first step runs before the weights have come."""
    inputs, here = noise_inputs(unet, 2), False
    monkeypatch.setattr(unet_family, "can_call", lambda *_: here)
    with tiny_adapter(unet).attached(unet) as adapter, counted(unet) as calls:
        prompt = random_prompt(adapter, 2)
        results = [noise(unet, inputs, prompt)]
        here = True
        results += [noise(unet, inputs, prompt) for _ in range(2)]
    assert calls == [2 * LAYERS]  # in the first step by the sites, once by the hook
    assert all(torch.equal(result, results[0]) for result in results)


@torch.no_grad()
def test_prompts_are_in_the_precision_that_the_model_computes_in() -> None:
    unet = smallest_unet()
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with tiny_adapter(smallest_unet()).attached(unet) as adapter:
        prompt = random_prompt(adapter, 2)
        assert {state.dtype for state in prompt.keys + prompt.values} == {torch.float32}
        results = [noise(unet, noise_inputs(unet, 2), prompt) for _ in range(2)]
    assert results[0].isfinite().all()
    assert torch.equal(*results)


@torch.no_grad()
def test_what_leaves_no_mark_can_be_forgotten(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 2)
    with tiny_adapter(unet).attached(unet) as adapter:
        prompt = random_prompt(adapter, 2)
        noise(unet, inputs, prompt)
        for weight in unet.parameters():
            weight.data *= 1.1
        adapter.injection.clear_cache()
        assert torch.equal(noise(unet, inputs, prompt), noise(copy.deepcopy(unet), inputs, prompt))


@torch.no_grad()
def test_autocast_begins_and_ends(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 2)
    with tiny_adapter(unet).attached(unet) as adapter:
        prompt = random_prompt(adapter, 2)
        before = noise(unet, inputs, prompt)
        with torch.autocast("cpu", torch.bfloat16):
            half = prompt._replace(
                keys=tuple(k.bfloat16() for k in prompt.keys),
                values=tuple(v.bfloat16() for v in prompt.values),
            )
            assert not torch.equal(noise(unet, inputs, half), before)
        assert torch.equal(noise(unet, inputs, prompt), before)


@torch.no_grad()
def test_a_text_that_the_model_projects_first(unet: UNet2DConditionModel) -> None:
    """As Kolors does: the sites see another text, of another width."""
    config = {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 48}
    unet = smallest_unet(**config)
    inputs = noise_inputs(unet, 2) | {"encoder_hidden_states": torch.randn(2, 11, 48)}
    with tiny_adapter(unet).attached(unet) as adapter:
        prompt = random_prompt(adapter, 2)
        results = [noise(unet, inputs, prompt) for _ in range(2)]
        assert adapter.injection.cached_bytes() == 0
    assert torch.equal(*results)


@torch.no_grad()
def test_a_trace_reads_the_text_that_it_is_given(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 2)
    with tiny_adapter(unet).attached(unet) as adapter:
        prompt = random_prompt(adapter, 2)
        expected = [noise(unet, inputs, prompt)]  # its keys and values are kept

        def run(text: Tensor) -> Tensor:
            return noise(unet, inputs | {"encoder_hidden_states": text}, prompt)

        text = inputs["encoder_hidden_states"]
        traced = make_fx(run)(text)
        expected.append(run(text + 1))
        assert torch.equal(traced(text + 1), expected[1])
        assert not torch.equal(*expected)


@torch.no_grad()
def test_weights_made_under_inference_mode() -> None:
    with torch.inference_mode():
        unet = smallest_unet()
        adapter = tiny_adapter(unet).attach(unet)
        prompt = random_prompt(adapter, 2)
    plain = smallest_unet()
    with tiny_adapter(plain).attached(plain) as other:
        expected = noise(plain, noise_inputs(plain, 2), random_prompt(other, 2))
    assert torch.equal(noise(unet, noise_inputs(unet, 2), prompt), expected)


@torch.no_grad()
def test_an_attached_model_can_be_saved_whole(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 2)
    with tiny_adapter(unet).attached(unet) as adapter:
        prompt = random_prompt(adapter, 2)
        expected = noise(unet, inputs, prompt)
        assert torch.equal(noise(pickle.loads(pickle.dumps(unet)), inputs, prompt), expected)


@torch.no_grad()
def test_threads_with_texts_of_their_own(unet: UNet2DConditionModel) -> None:
    with tiny_adapter(unet).attached(unet) as adapter:
        inputs = [noise_inputs(unet, 2, seed=seed) for seed in range(4)]
        prompts = [random_prompt(adapter, 2, seed=seed) for seed in range(4)]
        expected = [noise(unet, own, prompt) for own, prompt in zip(inputs, prompts, strict=True)]

        @torch.no_grad()
        def run(seed: int) -> bool:
            texts = [inputs[seed]["encoder_hidden_states"].clone() for _ in range(5)]
            return all(
                torch.allclose(
                    noise(unet, inputs[seed] | {"encoder_hidden_states": text}, prompts[seed]),
                    expected[seed],
                    0,
                    1e-5,
                )
                for text in texts
            )

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(run, range(4)))
        inputs.clear()
        gc.collect()
        assert adapter.injection.cached_bytes() == 0


def test_training_keeps_nothing(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 2)
    with tiny_adapter(unet).attached(unet) as adapter:
        noise(unet, inputs, random_prompt(adapter, 2)).mean().backward()
        assert adapter.injection.cached_bytes() == 0


def test_inference_tensors_leave_no_mark_and_are_not_kept(unet: UNet2DConditionModel) -> None:
    with tiny_adapter(unet).attached(unet) as adapter, torch.inference_mode():
        inputs, prompt = noise_inputs(unet, 2), random_prompt(adapter, 2)
        before = noise(unet, inputs, prompt)
        inputs["encoder_hidden_states"].mul_(2)
        prompt.scale.mul_(0.5)
        after = noise(unet, inputs, prompt)
        assert adapter.injection.cached_bytes() == 0
        assert not torch.equal(before, after)
        assert torch.equal(after, noise(copy.deepcopy(unet), inputs, prompt))


@torch.no_grad()
def test_memory_is_bounded(unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = noise_inputs(unet, 2)
    with tiny_adapter(unet).attached(unet) as adapter:
        prompt = random_prompt(adapter, 2)
        whole = noise(unet, inputs, prompt)
        everything = adapter.injection.cached_bytes()
        for limit in (everything - 1, everything // 2, 1):
            inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].clone()
            monkeypatch.setattr(unet_family, "LIMIT", limit)
            assert torch.equal(noise(unet, inputs, prompt), whole)
            assert adapter.injection.cached_bytes() <= limit
        assert adapter.injection.cached_bytes() == 0  # a limit of one byte holds nothing


# Several adapters, masks, time


@torch.no_grad()
def test_several_adapters_leave_in_any_order() -> None:
    unet = tiny_unet("sd1")
    inputs = noise_inputs(unet, 2)
    processors, base = dict(unet.attn_processors), noise(unet, inputs)
    first, second = (tiny_adapter(unet, seed=seed) for seed in (3, 4))
    first.attach(unet), second.attach(unet)
    prompts = [random_prompt(first, 2, seed=1), random_prompt(second, 2, scale=0.5, seed=2)]
    both = noise(unet, inputs, prompts)
    assert torch.equal(noise(unet, inputs, [prompts[0]]), noise(unet, inputs, prompts[0]))
    assert torch.equal(noise(unet, inputs, []), base)
    torch.testing.assert_close(noise(unet, inputs, prompts[::-1]), both, rtol=0, atol=1e-5)
    unconditioned = [prompts[0].with_scale(0), prompts[1]]
    torch.testing.assert_close(
        noise(unet, inputs, unconditioned), noise(unet, inputs, prompts[1]), rtol=0, atol=1e-5
    )
    first.detach()
    torch.testing.assert_close(
        noise(unet, inputs, prompts[1]), noise(unet, inputs, unconditioned), rtol=0, atol=1e-5
    )
    second.detach()
    assert dict(unet.attn_processors) == processors
    assert not unet._forward_pre_hooks
    assert torch.equal(noise(unet, inputs), base)


@torch.no_grad()
def test_masks(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 2)
    with tiny_adapter(unet).attached(unet) as adapter:
        prompt = random_prompt(adapter, 2, scale=0.7)
        whole, base = noise(unet, inputs, prompt), noise(unet, inputs)
        assert torch.equal(noise(unet, inputs, prompt._replace(mask=torch.ones(1, 5, 7))), whole)
        assert torch.equal(noise(unet, inputs, prompt._replace(mask=torch.zeros(1, 16, 8))), base)
        by_item = noise(
            unet,
            inputs,
            prompt._replace(mask=torch.tensor([0.0, 1.0]).view(2, 1, 1).expand(2, 3, 3)),
        )
        assert torch.equal(by_item[0], base[0])
        torch.testing.assert_close(by_item[1], whole[1], rtol=0, atol=1e-6)
        soft = noise(unet, inputs, prompt._replace(mask=torch.full((1, 4, 4), 0.5)))
        torch.testing.assert_close(
            soft, noise(unet, inputs, prompt.with_scale(0.35)), rtol=0, atol=1e-6
        )
        two = [prompt._replace(mask=torch.ones(1, 2, 2)), prompt.with_scale(0)]
        torch.testing.assert_close(noise(unet, inputs, two), whole, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_mask_lies_where_the_latents_are() -> None:
    """At one attention: the upper half hears, the lower does not, in the site's own size of latents
    higher than wide.
    """
    unet = smallest_unet()
    inputs = noise_inputs(unet, 1)
    conditioned: list[Tensor] = []
    with tiny_adapter(unet).attached(unet) as adapter:
        layer = next(iter(adapter.injection.layers.values()))
        hook = layer.register_forward_hook(lambda *result: conditioned.append(result[-1]))
        prompt = random_prompt(adapter, 1)
        mask = torch.zeros(1, 6, 3)
        mask[:, :3] = 1
        for one in (prompt, prompt.with_scale(0), prompt._replace(mask=mask)):
            noise(unet, inputs, one)
        hook.remove()
    # 16 × 8 latents, halved
    whole, unconditioned, upper = (states[0].unflatten(0, (8, 4)) for states in conditioned)
    assert torch.equal(upper[:4], whole[:4])
    assert torch.equal(upper[4:], unconditioned[4:])


@torch.no_grad()
@pytest.mark.parametrize(
    "timestep",
    [torch.tensor(700), torch.tensor([700]), torch.tensor([700, 700]), 700, torch.tensor(700.2)],
)
def test_scale_by_timestep(unet: UNet2DConditionModel, timestep: Any) -> None:
    inputs = noise_inputs(unet, 2) | {"timestep": timestep}
    window = torch.zeros(LAYERS, 1, 1000)
    window[..., :500] = 0.5  # the first half of the schedule
    with tiny_adapter(unet).attached(unet) as adapter:
        prompt = random_prompt(adapter, 2)
        early = noise(unet, inputs, prompt.with_scale(window))
        assert torch.equal(early, noise(unet, inputs, prompt.with_scale(0.5)))
        late = inputs | {"timestep": torch.full_like(torch.as_tensor(timestep), 499)}
        assert torch.equal(noise(unet, late, prompt.with_scale(window)), noise(unet, late))
        masked = prompt.with_scale(window)._replace(mask=torch.full((1, 1, 1), 0.5))
        torch.testing.assert_close(
            noise(unet, inputs, masked),
            noise(unet, inputs, prompt.with_scale(0.25)),
            rtol=0,
            atol=1e-6,
        )


@torch.no_grad()
def test_items_have_their_own_times(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 2) | {"timestep": torch.tensor([900, 100])}
    window = (torch.arange(1000) < 500).float().expand(LAYERS, 1, 1000)
    with tiny_adapter(unet).attached(unet) as adapter:
        prompt = random_prompt(adapter, 2)
        timed, whole, base = (
            noise(unet, inputs, one) for one in (prompt.with_scale(window), prompt, None)
        )
    assert torch.equal(timed[0], whole[0])
    assert torch.equal(timed[1], base[1])


@torch.no_grad()
def test_a_scale_changed_in_place_is_noticed(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 2)
    with tiny_adapter(unet).attached(unet) as adapter:
        prompts = [
            random_prompt(adapter, 2),
            random_prompt(adapter, 2, seed=8)._replace(mask=torch.ones(1, 4, 4)),
        ]
        before = noise(unet, inputs, prompts)
        prompts[1].scale.fill_(0.2)
        after = noise(unet, inputs, prompts)
        assert not torch.equal(before, after)
        assert torch.equal(after, noise(copy.deepcopy(unet), inputs, prompts))
        assert prompts[1].mask is not None
        prompts[1].mask[:, 2:] = 0
        assert torch.equal(
            noise(unet, inputs, prompts), noise(copy.deepcopy(unet), inputs, prompts)
        )


# Mistakes


@torch.no_grad()
def test_what_is_no_prompt_is_refused(unet: UNet2DConditionModel) -> None:
    inputs = noise_inputs(unet, 2)
    with tiny_adapter(unet).attached(unet) as adapter:
        with pytest.raises(
            MismatchError,
            match=r"takes what adapter.prompt\(...\) gives, or a list of that; this is a Tensor",
        ):
            noise(unet, inputs, torch.randn(2, 4, 32))
        prompt = random_prompt(adapter, 2)
        narrow = tuple(key[..., :1] for key in prompt.keys)
        wrong = {
            "made for 1 cross-attentions; this model has 4": prompt._replace(
                keys=prompt.keys[:1], values=prompt.values[:1]
            ),
            r"made for keys 8 wide at .*attn2; this model's are 16 wide": prompt._replace(
                keys=narrow, values=narrow
            ),
            "the scale is for 3 items, the base model runs a batch of 2": prompt._replace(
                scale=torch.ones(4, 3)
            ),
            r"mask of shape \[5, 5\]: give \(1 or 2, rows, columns\)": prompt._replace(
                mask=torch.ones(5, 5)
            ),
            "prepared for a batch of 3, the base model runs a batch of 2": random_prompt(
                adapter, 3
            ),
        }
        for words, one in wrong.items():
            with pytest.raises(MismatchError, match=words):
                noise(unet, inputs, one)
        with pytest.raises(MismatchError, match="give cross_attention_kwargs by name"):
            unet(*list(inputs.values())[:3], None, None, None, {"ip_hidden_states": prompt})
