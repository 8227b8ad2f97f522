"""Every class of the table of transformers: the same tests for each, on tiny random models."""

from collections.abc import Iterator
from inspect import signature
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.errors import MismatchError, SettingError
from imprompt.families.base import FAMILIES, family_of, find_family
from imprompt.families.rows import ROWS
from imprompt.generation.engine import Engine, Seat, SeatCall
from imprompt.prompt import KEY, ImagePrompt
from tests.tiny import seeded
from tests.zoo import SIDE, ZOO, answer, inputs_of, specimen

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # Mochi's own

WIDTH = 8
CHANNELS = ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs")
WITHOUT_CHECKPOINTS = {  # why the class itself cannot
    "hunyuandit": "it has none",
    "lumina-next": "it has none",
    "hunyuan-image": "its own call of a block lacks an argument",
}
WITHOUT_HALVES = {"kandinsky5"}  # it mixes precisions, and needs autocast
# Rows that the latents reach and that are not the picture's.
MIXED = {
    "z-image": "a refiner mixes the picture and its padding",
    "wan-animate": "a self-attention mixes the video and its reference",
}
# Their batches differ by rounding: the routing of experts, and padding to the longest text.
ROUNDED = {"hidream": 1e-5, "lumina2": 1e-5}


class Joined:
    """A tiny model with an adapter whose weights are away from where they start."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, specimen(name)
        family = family_of(self.model)
        self.layers = family.layers(self.model)
        width = family.size(next(iter(self.layers.values()))).text
        with seeded(3):
            self.adapter = IPAdapter.for_model(self.model, ImageProjection(WIDTH, width))
            for parameter in self.adapter.image_kv.parameters():
                parameter.data.normal_(std=0.5)
        self.adapter.requires_grad_(False)

    def prompt(self, batch: int, seed: int = 5) -> ImagePrompt:
        with seeded(seed):
            return self.adapter.prompt(self.adapter.tokens(torch.randn(batch, WIDTH)))

    def answer(self, inputs: dict[str, Any], *prompts: ImagePrompt) -> Tensor:
        with self.adapter.using(*prompts):
            return answer(self.model, inputs)


@pytest.fixture(scope="module", params=ZOO)
def joined(request: pytest.FixtureRequest) -> Iterator[Joined]:
    with torch.no_grad():
        yield Joined(request.param)


def test_the_tables_name_the_same_families() -> None:
    assert set(ROWS) == set(FAMILIES) - {"unet"}
    classes = [name for row in ROWS.values() for name in (row.model, *row.alike)]
    assert sorted(classes) == sorted(one.model for one in ZOO.values())
    assert [find_family(name).name for name in FAMILIES] == list(FAMILIES)


def test_idle_at_scale_zero_and_detached_the_base_is_bit_equal(joined: Joined) -> None:
    inputs, keys = inputs_of(joined.name, 2), list(joined.model.state_dict())
    alone = answer(joined.model, inputs)
    with joined.adapter.attached(joined.model):
        prompt = joined.prompt(2)
        assert torch.equal(answer(joined.model, inputs), alone)
        assert torch.equal(joined.answer(inputs, prompt.with_scale(0.0)), alone)
        assert not torch.equal(joined.answer(inputs, prompt), alone)
        assert list(joined.model.state_dict()) == keys
    assert torch.equal(answer(joined.model, inputs), alone)


def test_each_layer_alone_has_an_effect(joined: Joined) -> None:
    inputs = inputs_of(joined.name, 1)
    with joined.adapter.attached(joined.model):
        prompt, alone = joined.prompt(1), answer(joined.model, inputs)
        for number in range(len(joined.layers)):
            scale = torch.zeros(len(joined.layers))
            scale[number] = 1
            assert not torch.equal(joined.answer(inputs, prompt.with_scale(scale)), alone), number


def test_prompts_of_one_batch_equal_runs_alone(joined: Joined) -> None:
    inputs = inputs_of(joined.name, 1)
    twice = inputs_of(joined.name, 2)
    with joined.adapter.attached(joined.model):
        both = joined.prompt(2)
        one, other = (both.map_rows(lambda t, axis, n=n: one_row(t, axis, n)) for n in range(2))
        together = joined.answer(twice, both)
        assert not torch.equal(
            joined.answer(inputs, joined.prompt(1)), joined.answer(inputs, joined.prompt(1, 6))
        )
        swapped = joined.answer(twice, both.map_rows(lambda t, axis: t.flip(axis)))
        close = {"rtol": 0, "atol": ROUNDED.get(joined.name, 1e-6)}
        # row 0 depends on its own prompt alone: with the other item's prompt exchanged it stays
        mixed = both.map_rows(lambda t, axis: torch.cat([one_row(t, axis, 0)] * 2, axis))
        torch.testing.assert_close(joined.answer(twice, mixed)[0], together[0], **close)
        assert not torch.allclose(swapped[0], together[0], **close)
        assert one.rows == other.rows == 1


def one_row(tensor: Tensor, axis: int, number: int) -> Tensor:
    return tensor if tensor.shape[axis] == 1 else tensor.narrow(axis, number, 1)


class Rows:
    """Rows of the first output of an attention that changed, and whether others did."""

    def __init__(self, layer: nn.Module) -> None:
        self.outs: list[Any] = []
        layer.register_forward_hook(lambda _m, _a, out: self.outs.append(out))

    def changed(self) -> tuple[Tensor, bool]:
        parts = [out if isinstance(out, tuple) else (out,) for out in self.outs[-2:]]
        first, *rest = [
            (one != other).flatten(2).any(-1) for one, other in zip(*parts, strict=True)
        ]
        return first, any(one.any() for one in rest)


class Reads:
    """Rows that an attention reads, and which of them changed."""

    def __init__(self, layer: nn.Module) -> None:
        self.read: list[Tensor] = []
        layer.register_forward_pre_hook(self.called, with_kwargs=True)

    def called(self, _layer: nn.Module, args: Any, kwargs: Any) -> None:
        self.read.append(args[0] if args else kwargs["hidden_states"])

    def changed(self) -> Tensor:
        return (self.read[0] != self.read[1]).flatten(2).any(-1)


def test_only_rows_of_the_picture_change_and_of_a_mask_only_its_own(joined: Joined) -> None:
    inputs, name = inputs_of(joined.name, 2), next(iter(joined.layers))
    frames = 2 if "3D" in type(joined.model).__name__ else 1
    left = torch.zeros(1, SIDE, SIDE)
    left[:, :, : SIDE // 2] = 1
    only_left = left.flatten().repeat(frames).bool()
    for number in {0, len(joined.layers) - 1}:
        rows = Rows([*joined.layers.values()][number])
        scale = torch.zeros(len(joined.layers))
        scale[number] = 1
        with joined.adapter.attached(joined.model):
            prompt = joined.prompt(2).with_scale(scale)
            answer(joined.model, inputs)
            joined.answer(inputs, prompt)
            changed, others = rows.changed()
            assert not others
            assert changed.sum(1).tolist() == [frames * SIDE * SIDE] * 2, name
            places = [item.nonzero()[:, 0] for item in changed]
            joined.answer(inputs, prompt._replace(mask=left))
            rows.outs.pop(-2)
            answer(joined.model, inputs)
            changed, _ = rows.changed()
            for item, own in zip(changed, places, strict=True):
                assert torch.equal(item.nonzero()[:, 0], own[only_left])


@pytest.mark.parametrize("batch", [1, 2])
def test_the_rows_that_change_are_those_that_the_latents_reach(joined: Joined, batch: int) -> None:
    """The first layer reads them before they are mixed with the text's."""
    layer = next(iter(joined.layers.values()))
    latents, inputs = family_of(joined.model).arguments[0], inputs_of(joined.name, batch)
    rows, reads = Rows(layer), Reads(layer)
    scale = torch.zeros(len(joined.layers))
    scale[0] = 1
    with joined.adapter.attached(joined.model):
        answer(joined.model, inputs | {latents: inputs_of(joined.name, batch, 2)[latents]})
        answer(joined.model, inputs)
        joined.answer(inputs, joined.prompt(batch).with_scale(scale))
    changed, reached = rows.changed()[0], reads.changed()
    assert not (changed & ~reached).any(), "the row's `picture` names rows of the text"
    same = torch.equal(changed, reached)
    assert same == (joined.name not in MIXED), "the row's `picture` names too few rows"


def test_a_window_follows_progress(joined: Joined) -> None:
    """The specimens' time is the schedule's middle."""
    inputs = inputs_of(joined.name, 1)
    with joined.adapter.attached(joined.model):
        prompt, alone = joined.prompt(1), answer(joined.model, inputs)
        scale = torch.ones(len(joined.layers), 1, 100)
        early, late = scale.clone(), scale.clone()
        early[..., 40:], late[..., :60] = 0, 0
        middle = scale.clone()
        middle[..., :40] = middle[..., 60:] = 0
        assert torch.equal(joined.answer(inputs, prompt._replace(scale=early)), alone)
        assert torch.equal(joined.answer(inputs, prompt._replace(scale=late)), alone)
        assert torch.equal(
            joined.answer(inputs, prompt._replace(scale=middle)), joined.answer(inputs, prompt)
        )


def test_gradients_reach_every_tensor_of_the_adapter_and_none_of_the_base(joined: Joined) -> None:
    inputs = inputs_of(joined.name, 2)
    joined.adapter.requires_grad_(True)
    try:
        with torch.enable_grad(), joined.adapter.attached(joined.model):
            joined.answer(inputs, joined.prompt(2)).square().mean().backward()
        for name, parameter in joined.adapter.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
        assert all(parameter.grad is None for parameter in joined.model.parameters())
        plain = {name: p.grad for name, p in joined.adapter.named_parameters()}
        if joined.name in WITHOUT_CHECKPOINTS:
            return
        joined.adapter.zero_grad()
        joined.model.enable_gradient_checkpointing()
        joined.model.train()
        with torch.enable_grad(), joined.adapter.attached(joined.model):
            joined.answer(inputs, joined.prompt(2)).square().mean().backward()
        for name, parameter in joined.adapter.named_parameters():
            torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-5, atol=1e-7)
    finally:
        if joined.name not in WITHOUT_CHECKPOINTS:
            joined.model.disable_gradient_checkpointing()
        joined.model.eval()
        joined.adapter.zero_grad()
        joined.adapter.requires_grad_(False)


def test_requests_share_a_call_of_the_model(joined: Joined) -> None:
    """Two requests with other latents, times and prompts, as they are alone."""
    with joined.adapter.attached(joined.model):
        family = family_of(joined.model)
        engine = Engine(joined.model, family, joined.adapter.injection)
        calls = []
        for seed in (1, 2):
            given = inputs_of(joined.name, 1, seed)
            if seed == 2:
                given |= {name: calls[0].given[name] for name in family.shared if name in given}
                given[family.arguments[1]] = given[family.arguments[1]] * 0.9
            calls.append(SeatCall(given, 1, [joined.prompt(1, seed)]))
        seats = [Seat(engine, call.prompts) for call in calls]
        groups = {engine.group(seat, call) for seat, call in zip(seats, calls, strict=True)}
        alone = [engine.run([call])[0] for call in calls]
        assert len(groups) == 1
        together = engine.run(calls)
        for one, other in zip(together, alone, strict=True):
            one, other = (
                part if isinstance(part, Tensor) else torch.stack(list(part))
                for part in (one, other)
            )
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_prompt_goes_by_the_keyword_of_the_class_if_it_has_one(joined: Joined) -> None:
    family, inputs = family_of(joined.model), inputs_of(joined.name, 1)
    takes = [name for name in CHANNELS if name in signature(type(joined.model).forward).parameters]
    assert [family.channel] == (takes or [None])
    if family.channel is None:
        return
    with joined.adapter.attached(joined.model):
        prompt = joined.prompt(1)
        if family.separate_branches:
            prompt = prompt._replace(branches=1)
        rest = inputs.get(family.channel) or {}
        given = inputs | {family.channel: rest | {KEY: prompt}}
        assert torch.equal(answer(joined.model, given), joined.answer(inputs, prompt))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_near(joined: Joined, dtype: torch.dtype) -> None:
    inputs = inputs_of(joined.name, 1)
    with joined.adapter.attached(joined.model):
        whole = joined.answer(inputs, joined.prompt(1))
    half = Joined(joined.name)
    half.model.to(dtype)

    def cast(value: Any, name: str = "") -> Any:
        if isinstance(value, list):
            return [cast(one, name) for one in value]
        kept = not isinstance(value, Tensor) or value.dtype != torch.float32 or name.endswith("ids")
        return value if kept else value.to(dtype)

    given = {name: cast(value, name) for name, value in inputs.items()}
    if joined.name in WITHOUT_HALVES:
        with pytest.raises(RuntimeError, match="same dtype"):
            answer(half.model, given)
        return
    with half.adapter.attached(half.model):
        made = half.answer(given, half.prompt(1))
    assert made.isfinite().all()
    assert (made.float() - whole).abs().max() < 0.1 * whole.abs().max()


def test_a_lora_acts_the_same_put_on_before_and_after(joined: Joined) -> None:
    inputs = inputs_of(joined.name, 1)
    if not hasattr(joined.model, "add_adapter"):
        return  # PixArt and others have no adapters of peft
    targets = [
        name
        for name, module in joined.model.named_modules()
        if isinstance(module, nn.Linear) and ".to_" in name and ".to_out" not in name
    ] or [n for n, m in joined.model.named_modules() if isinstance(m, nn.Linear) and "qkv" in n]
    made = []
    for first in (True, False):
        own = Joined(joined.name)
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        attach = own.adapter.attach if not first else None
        if attach:
            attach(own.model)
        with seeded(9):
            own.model.add_adapter(config)
        if first:
            own.adapter.attach(own.model)
        made.append(own.answer(inputs, own.prompt(1)))
        own.adapter.detach()
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-6)
    with joined.adapter.attached(joined.model):
        assert not torch.allclose(made[0], joined.answer(inputs, joined.prompt(1)), atol=1e-4)


def test_fused_projections_change_nothing_but_rounding(joined: Joined) -> None:
    own, inputs = Joined(joined.name), inputs_of(joined.name, 1)
    if not hasattr(own.model, "fuse_qkv_projections"):
        return
    with own.adapter.attached(own.model):
        before = own.answer(inputs, own.prompt(1))
        try:
            own.model.fuse_qkv_projections()
            after = answer(own.model, inputs)
        except Exception:
            return
        if all(type(layer.processor).__name__.startswith("Image") for layer in own.layers.values()):
            after = own.answer(inputs, own.prompt(1))
            torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
        else:  # diffusers replaced the processors: said, not silent
            with pytest.raises(MismatchError, match="replaced the adapter's processor"):
                own.answer(inputs, own.prompt(1))


def test_a_family_that_cannot_be_trained_yet_says_so(joined: Joined) -> None:
    family = family_of(joined.model)
    if not family.trains:
        with pytest.raises(SettingError, match="training is not supported yet for base models of"):
            family.condition_shapes({}, 4)
    else:
        assert "text" in family.condition_shapes(dict(joined.model.config), 4)
