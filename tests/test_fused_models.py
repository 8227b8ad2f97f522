"""The attention kernel in base models: what it is used for, and that they predict what they predict
without it.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from imprompt.adapter import IPAdapter
from imprompt.errors import SettingError
from imprompt.generation import compile as compiled
from tests.interpreted import DEVICE, Counted, autotune, fused
from tests.tiny import noise, noise_inputs, random_prompt, smallest_unet, tiny_adapter

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
]
MOST = {torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the noise's norm, after all layers
LAYERS = 4


def narrow_unet(dtype: torch.dtype) -> Any:
    """Four sites; heads are 8 wide."""
    return smallest_unet(attention_head_dim=2).to(DEVICE, dtype)


def joined(unet: Any, count: int) -> list[IPAdapter]:
    return [
        tiny_adapter(unet, seed=seed).to(DEVICE, torch.float32).attach(unet)
        for seed in range(count)
    ]


def inputs_of(unet: Any) -> dict[str, Any]:
    return {
        name: x.to(DEVICE, unet.dtype if x.is_floating_point() else x.dtype)
        for name, x in noise_inputs(unet, 2).items()
    }


def both(
    unet: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> tuple[list[Tensor], list[int]]:
    """The noise predicted with the kernel and without, and how often it ran."""
    results, counts = [], []
    for way in ("always", "never"):
        monkeypatch.setenv(autotune.KERNEL, way)
        with Counted() as counted:
            results.append(noise(unet, inputs_of(unet) | more, prompts))
        counts.append(sum("imprompt.decoupled_attention" in name for name in counted.names))
    return results, counts


@torch.no_grad()
@pytest.mark.parametrize("dtype", MOST, ids=str)
@pytest.mark.parametrize(
    "case", ["one", "one for all", "masked", "two", "two regions, by time and item"]
)
def test_the_same_noise(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = narrow_unet(dtype)
    first, second = joined(unet, 2)
    mask = torch.eye(3, device=DEVICE)[None]
    timed = random_prompt(second, 2, seed=6).with_scale(torch.rand(LAYERS, 2, 1000, device=DEVICE))
    prompts = {
        "one": random_prompt(first, 2, scale=0.7),
        "one for all": random_prompt(first, 1),
        "masked": random_prompt(first, 2)._replace(mask=mask),
        "two": [random_prompt(first, 2), random_prompt(second, 1, scale=0.4, seed=6)],
        "two regions, by time and item": [
            random_prompt(first, 2)._replace(mask=mask),
            timed._replace(mask=1 - mask),
        ],
    }[case]
    (ours, plain), counts = both(unet, prompts, monkeypatch)
    assert counts == [LAYERS, 0]
    assert (ours - plain).float().norm() <= MOST[dtype] * plain.float().norm()
    assert (noise(unet, inputs_of(unet)) - plain).float().norm() > 5 * MOST[
        dtype
    ] * plain.float().norm()


@torch.no_grad()
def test_what_the_kernel_cannot_do_is_done_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = narrow_unet(torch.float16)
    (adapter,) = joined(unet, 1)
    prompt = random_prompt(adapter, 2)
    masked = {
        "encoder_attention_mask": torch.arange(11, device=DEVICE)[None]
        < torch.tensor([[4], [11]], device=DEVICE)
    }
    results, counts = both(unet, prompt, monkeypatch, **masked)
    assert counts == [0, 0]
    assert torch.equal(*results)
    wide = smallest_unet().to(DEVICE)  # in float32, heads 2 wide
    (other,) = joined(wide, 1)
    assert both(wide, random_prompt(other, 2), monkeypatch)[1] == [0, 0]


def test_training_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = narrow_unet(torch.float16)
    (adapter,) = joined(unet, 1)
    gradients = []
    for way in ("always", "never"):
        monkeypatch.setenv(autotune.KERNEL, way)
        adapter.zero_grad()
        noise(unet, inputs_of(unet), random_prompt(adapter, 2)).float().square().mean().backward()
        gradients.append(torch.cat([kv.to_k.weight.grad.flatten() for kv in adapter.image_kv]))  # pyright: ignore
    assert (gradients[0] - gradients[1]).norm() <= 1e-2 * gradients[1].norm()


def test_gradient_checkpointing_does_not_see_what_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first forward pass times both ways, with gradients.

    The pass that is run again in the backward does not.
    """

    def milliseconds(run: Any, query: Tensor, *rest: Any) -> float:
        leaf = query.detach().requires_grad_()
        torch.autograd.grad(run(leaf, *rest[:4]).sum(), leaf)
        return 1.0

    monkeypatch.setattr(autotune, "FASTER", {})
    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    monkeypatch.setattr("imprompt.families.unet.may_use_kernel", lambda *_: True)
    unet = narrow_unet(torch.float16).train()
    (adapter,) = joined(unet, 1)
    unet.enable_gradient_checkpointing()
    noise(unet, inputs_of(unet), random_prompt(adapter, 2)).float().mean().backward()
    assert all(kv.to_k.weight.grad is not None for kv in adapter.image_kv)
    assert len(autotune.FASTER) > 0


def test_training_the_text_is_done_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Textual inversion, say: the kernel has no gradient of the text's keys.

    What was chosen before does not matter.
    """
    unet = narrow_unet(torch.float16)
    (adapter,) = joined(unet, 1)
    prompt, inputs = random_prompt(adapter, 2), inputs_of(unet)
    prompt = prompt._replace(
        keys=tuple(key.detach() for key in prompt.keys),
        values=tuple(v.detach() for v in prompt.values),
    )
    monkeypatch.setenv(autotune.KERNEL, "always")
    noise(unet, inputs, prompt)
    text = inputs["encoder_hidden_states"].requires_grad_()
    noise(unet, inputs, prompt).float().mean().backward()
    assert text.grad is not None
    assert text.grad.abs().max() > 0


@torch.no_grad()
def test_copies_for_the_kernel_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = narrow_unet(torch.float16)
    prompts = [random_prompt(adapter, 2, seed=seed) for seed, adapter in enumerate(joined(unet, 2))]
    monkeypatch.setenv(autotune.KERNEL, "always")
    inputs = inputs_of(unet)
    before = noise(unet, inputs, prompts)
    for value in prompts[1].values:
        value.mul_(3)
    after = noise(unet, inputs, prompts)
    assert not torch.equal(before, after)
    assert torch.equal(after, noise(copy.deepcopy(unet), inputs, prompts))


@torch.no_grad()
def test_each_layers_chooses_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By time, where that can be taken.

    Then from what was found, in later steps and for later prompts of the same shapes.
    """
    unet = narrow_unet(torch.float16)
    (adapter,) = joined(unet, 1)
    asked: list[int] = []

    def worth(query: Tensor, *_: Any) -> bool:
        asked.append(query.shape[2])
        return len(asked) % 2 == 0

    monkeypatch.setenv(autotune.KERNEL, "always")
    monkeypatch.setattr("imprompt.families.unet.kernel_is_faster", worth)
    for seed in (1, 2):
        inputs = inputs_of(unet)
        for _ in range(2):
            with Counted() as counted:
                noise(unet, inputs, random_prompt(adapter, 2, seed=seed))
            assert sum("imprompt.decoupled_attention" in name for name in counted.names) == 2
    assert len(asked) == LAYERS


def test_the_choice_is_one_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autotune.KERNEL, "sometimes")
    with pytest.raises(
        SettingError, match="IMPROMPT_KERNEL = 'sometimes': give auto, always or never"
    ):
        autotune.may_use_kernel(torch.device("cpu"), torch.float16)


@torch.no_grad()
def test_a_compiled_model_chooses_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its first step is not compiled: the sites try both ways in it."""
    torch._dynamo.reset()
    monkeypatch.setenv(autotune.KERNEL, "always")
    monkeypatch.setenv(compiled.CACHE, str(tmp_path))
    unet, counter = narrow_unet(torch.float16), CompileCounterWithBackend("aot_eager")
    (adapter,) = joined(unet, 1)
    compiled.compile_base(unet, backend=counter)
    inputs, results, counts = inputs_of(unet), [], []
    for seed in (1, 1, 1, 2):
        results.append(noise(unet, inputs, random_prompt(adapter, 2, seed=seed)))
        counts.append(counter.frame_count)
    assert counts == [0, 1, 1, 1]
    (graph,) = counter.graphs
    assert (
        sum("imprompt.decoupled_attention" in str(node.target) for node in graph.graph.nodes)
        == LAYERS
    )
    assert all(
        (result - results[0]).float().norm() <= 1e-3 * results[0].float().norm()
        for result in results[:3]
    )
    assert not torch.equal(results[3], results[2])
    torch._dynamo.reset()


def test_offsets_are_copied_once() -> None:
    with torch.inference_mode():
        first = fused.bounds((4, 3), torch.device(DEVICE))
    assert fused.bounds((4, 3), torch.device(DEVICE)) is first
    assert first.tolist() == [0, 4, 7]
    assert not first.is_inference()
