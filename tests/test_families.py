"""Every family: the base model is itself when idle, each layer conditions, gradients reach the
adapter.
"""

import copy
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from imprompt.adapter import ImageProjection, IPAdapter, attention
from imprompt.errors import MismatchError
from imprompt.families.base import FAMILIES, family_of, find_family
from imprompt.families.processor import LayerConditioning, with_image
from tests.tiny import noise_inputs, seeded, smallest_unet
from tests.tiny_pipelines import TRAINED
from tests.zoo import inputs_of, specimen

FEATURES = 12


class Tiny(NamedTuple):
    """A tiny random model of one family, and the arguments of a call of two rows."""

    model: Any
    inputs: Mapping[str, Any]


def unet() -> Tiny:
    model = smallest_unet()
    return Tiny(model, noise_inputs(model, 2))


def pixart() -> Tiny:
    """Two texts of other lengths."""
    inputs = {
        "hidden_states": torch.randn(2, 4, 12, 8),
        "timestep": torch.tensor([500, 700]),
        "encoder_attention_mask": torch.tensor([[1] * 5 + [0], [1] * 6]),
    }
    return Tiny(specimen("pixart"), inputs_of("pixart", 2) | inputs)


def flux() -> Tiny:
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(4), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
    inputs = {
        "hidden_states": torch.randn(2, 24, 4),
        "img_ids": places.float(),
        "timestep": torch.tensor([0.5, 0.7]),
    }
    return Tiny(specimen("flux"), inputs_of("flux", 2) | inputs)


TINY: dict[str, Callable[[], Tiny]] = {"unet": unet, "pixart": pixart, "flux": flux}


def test_every_family_is_tested() -> None:
    """Those that train in tests/test_trained_families.py, every transformer in
    tests/test_transformers.py too.
    """
    trained = {name for name in FAMILIES if find_family(name).trains}
    assert trained == {"unet", *TRAINED}
    assert trained >= TINY.keys()


BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}
OF_NO_FAMILY: dict[str, dict[str, Any]] = {  # diffusers' models with blocks as a UNet's
    "UNet3DConditionModel": BLOCKS
    | {
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    },
    "UNetSpatioTemporalConditionModel": {
        "block_out_channels": (32, 32),
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "num_attention_heads": 2,
        "projection_class_embeddings_input_dim": 96,
        "addition_time_embed_dim": 32,
    },
    "ControlNetModel": BLOCKS | {"conditioning_embedding_out_channels": (8, 8)},
    "AudioLDM2UNet2DConditionModel": BLOCKS
    | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": (8, 8)},
}


@pytest.mark.parametrize("kind", OF_NO_FAMILY)
def test_models_that_resemble_a_family_are_refused(kind: str) -> None:
    model = getattr(diffusers, kind)(**OF_NO_FAMILY[kind])
    with pytest.raises(MismatchError, match=f"^{kind} is not of a known family") as raised:
        family_of(model)
    assert "(unet, pixart, flux, sd3, " in str(raised.value)
    assert "`imprompt families` prints the table" in str(raised.value)


def test_what_is_compiled_is_of_the_family(tiny: Tiny) -> None:
    family = family_of(tiny.model)
    compiled = torch.compile(tiny.model, backend="eager")
    assert family_of(compiled) is family
    assert [*family.layers(compiled)] == [*family.layers(tiny.model)]


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    with seeded(0):
        made = TINY[request.param]()
    assert family_of(made.model).name == request.param
    return made


def adapter_for(model: Any) -> IPAdapter:
    family = family_of(model)
    width = family.size(next(iter(family.layers(model).values()))).text
    with seeded(1):
        adapter = IPAdapter.for_model(model, ImageProjection(FEATURES, width))
        for parameter in adapter.image_kv.parameters():
            parameter.data.normal_(std=0.3)
    return adapter


def run(tiny: Tiny) -> Tensor:
    return tiny.model(**tiny.inputs, return_dict=False)[0]


def tokens(adapter: IPAdapter, rows: int = 2) -> Tensor:
    with seeded(2):
        return adapter.tokens(torch.randn(rows, FEATURES))


@torch.no_grad()
def test_idle_at_scale_0_and_detached_it_is_the_base_model(tiny: Tiny) -> None:
    keys, base = list(tiny.model.state_dict()), run(tiny)
    adapter = adapter_for(tiny.model).attach(tiny.model)
    assert list(tiny.model.state_dict()) == keys
    assert torch.equal(run(tiny), base)
    with adapter.using(adapter.prompt(tokens(adapter), scale=0.0)):
        assert torch.equal(run(tiny), base)
    with adapter.using(adapter.prompt(tokens(adapter))):
        assert (run(tiny) - base).abs().max() > 1e-3
    assert torch.equal(run(tiny), base)
    adapter.detach()
    assert torch.equal(run(tiny), base)


@torch.no_grad()
def test_each_layer_conditions(tiny: Tiny) -> None:
    adapter = adapter_for(tiny.model).attach(tiny.model)
    base, prompt = run(tiny), adapter.prompt(tokens(adapter))
    layers = len(adapter.image_kv)
    for layer in range(layers):
        with adapter.using(prompt.with_scale(torch.eye(layers)[layer])):
            assert (run(tiny) - base).abs().max() > 1e-6, layer


def whole(model: Any, backend: Any) -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


def blocks(model: Any, backend: Any) -> Any:
    """Each kind of block as one graph; not every class of diffusers names its blocks."""
    model._repeated_blocks = model._repeated_blocks or ["BasicTransformerBlock"]
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [whole, blocks])
@pytest.mark.parametrize("first", ["attach", "compile"])
@pytest.mark.parametrize("name", ["pixart", "flux"])
@torch.no_grad()
def test_compiled_by_a_user_it_needs_no_graph_for_a_new_prompt_or_scale(
    name: str, first: str, compiled: Callable[[Any, Any], Any]
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with seeded(0):
        tiny = TINY[name]()
    plain, model = tiny.model, copy.deepcopy(tiny.model)
    adapter, other = adapter_for(plain).attach(plain), adapter_for(model)
    if first == "attach":
        model = compiled(other.attach(model) and model, counter)
    else:
        other.attach(model := compiled(model, counter))
    counts = []
    for seed, scale in ((2, 1.0), (3, 1.0), (3, 0.4), (4, 0.0)):
        with seeded(seed):
            features = torch.randn(2, FEATURES)
        outputs = []
        for own, called in ((adapter, plain), (other, model)):
            with own.using(own.prompt(own.tokens(features), scale=scale)):
                outputs.append(called(**tiny.inputs, return_dict=False)[0])
        assert torch.equal(*outputs)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 4
    torch._dynamo.reset()


@torch.no_grad()
def test_the_keyword_says_the_same(tiny: Tiny) -> None:
    adapter = adapter_for(tiny.model).attach(tiny.model)
    prompt = adapter.prompt(tokens(adapter))
    with adapter.using(prompt):
        wanted = run(tiny)
    channel = {adapter.family.channel: {"ip_hidden_states": prompt}}
    assert torch.equal(tiny.model(**tiny.inputs, **channel, return_dict=False)[0], wanted)


@torch.no_grad()
def test_arguments_may_be_positional(tiny: Tiny) -> None:
    adapter = adapter_for(tiny.model).attach(tiny.model)
    prompt = adapter.prompt(tokens(adapter))
    over_time = torch.linspace(0, 1, 10).expand(len(adapter.image_kv), 1, -1)
    names = list(signature(type(tiny.model).forward).parameters)[1:]
    last = max(index for index, name in enumerate(names) if name in tiny.inputs)
    defaults = signature(tiny.model.forward).parameters
    given = [tiny.inputs.get(name, defaults[name].default) for name in names[: last + 1]]
    for chosen in (prompt, prompt.with_scale(over_time)):
        with adapter.using(chosen):
            assert torch.equal(tiny.model(*given, return_dict=False)[0], run(tiny))


@torch.no_grad()
def test_a_scale_of_one_training_step_is_active_in_that_step_alone() -> None:
    with seeded(0):
        tiny = unet()
    adapter = adapter_for(tiny.model).attach(tiny.model)
    only = torch.nn.functional.one_hot(torch.tensor(999 - 250), 1000).float()
    prompt = adapter.prompt(tokens(adapter)).with_scale(only.expand(len(adapter.image_kv), 1, -1))

    def effect(timestep: int) -> float:
        now = {**tiny.inputs, "timestep": torch.tensor(timestep)}
        base = tiny.model(**now, return_dict=False)[0]
        with adapter.using(prompt):
            return (tiny.model(**now, return_dict=False)[0] - base).abs().max().item()

    assert [effect(timestep) > 0 for timestep in (249, 250, 251)] == [False, True, False]


@torch.no_grad()
def test_calls_of_separate_branches_get_their_own() -> None:
    """Flux runs the negative text in a call of its own, which gets the negative branch."""
    with seeded(0):
        tiny = flux()
    adapter = adapter_for(tiny.model).attach(tiny.model)
    image, null = tokens(adapter), torch.zeros_like(tokens(adapter))
    texts = [tiny.inputs["encoder_hidden_states"].clone() for _ in range(2)]

    def call(text: int, time: float) -> Tensor:
        now = {"encoder_hidden_states": texts[text], "timestep": torch.full((2,), time)}
        return tiny.model(**{**tiny.inputs, **now}, return_dict=False)[0]

    order = [(text, time) for time in (0.9, 0.5) for text in (0, 1)]
    with adapter.using(adapter.prompt(image, null)):
        found = [call(*one) for one in order]
    for (text, time), made in zip(order, found, strict=True):
        with adapter.using(adapter.prompt((image, null)[text])):
            assert torch.equal(made, call(text, time))
    assert not torch.equal(found[0], found[1])


@torch.no_grad()
@pytest.mark.parametrize("text", [0, 1, 7])  # shorter and longer than a head is wide
@pytest.mark.parametrize("whole", [False, True])
def test_the_image_is_added_to_the_picture_after_a_text(text: int, whole: bool) -> None:
    width, places, wider = 4, 3, 2
    with seeded(3):
        query, key, value = (torch.randn(2, 1, n, width) for n in (text + places, 5, 5))
        x = torch.randn(2, text * whole + places, width + wider)
    image = attention(query[:, :, text:], key, value)[:, 0]
    expected = x.clone()
    expected[:, -places:, :width] += 0.5 * image
    conditioning = LayerConditioning(
        ((key, value),), torch.full((1, 1, 1, 1, 1), 0.5), slice(text, None)
    )
    torch.testing.assert_close(with_image(x, [query], conditioning), expected)


def test_rows_have_prompts_of_their_own(tiny: Tiny) -> None:
    adapter = adapter_for(tiny.model).attach(tiny.model)
    both = tokens(adapter)
    results = []
    for own in (both, both[:1].expand(2, -1, -1), both[1:].expand(2, -1, -1)):
        with adapter.using(adapter.prompt(own)):
            results.append(run(tiny))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[2][1])


@torch.no_grad()
def test_a_window_is_read_by_each_rows_progress(tiny: Tiny) -> None:
    adapter = adapter_for(tiny.model).attach(tiny.model)
    base, prompt = run(tiny), adapter.prompt(tokens(adapter))
    layers = len(adapter.image_kv)
    with adapter.using(prompt):
        whole = run(tiny)
    times = tiny.inputs["timestep"].float()
    late = 1 - times / (1 if times.max() <= 1 else 999)  # progress of both rows
    window = (torch.arange(1000) / 999 < late.mean()).float().expand(layers, 1, -1)
    with adapter.using(prompt.with_scale(window)):
        timed = run(tiny)
    early = int(late.argmin())
    assert torch.equal(timed[early], whole[early])
    assert torch.equal(timed[1 - early], base[1 - early])


@torch.no_grad()
def test_a_mask_lies_on_the_models_grid(tiny: Tiny) -> None:
    adapter = adapter_for(tiny.model).attach(tiny.model)
    prompt = adapter.prompt(tokens(adapter))
    with adapter.using(prompt):
        whole = run(tiny)
    with adapter.using(prompt._replace(mask=torch.ones(1, 3, 2))):
        assert torch.equal(run(tiny), whole)
    base = run(tiny)
    with adapter.using(prompt._replace(mask=torch.zeros(1, 3, 2))):
        assert torch.equal(run(tiny), base)


def test_gradients_reach_the_adapter_alone(tiny: Tiny) -> None:
    adapter = adapter_for(tiny.model).attach(tiny.model)
    with adapter.using(adapter.prompt(tokens(adapter))):
        run(tiny).square().mean().backward()
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters()
    )
    assert all(parameter.grad is None for parameter in tiny.model.parameters())


def test_a_prompt_that_never_reached_the_model_is_reported(tiny: Tiny) -> None:
    adapter = adapter_for(tiny.model).attach(tiny.model)
    with (
        pytest.raises(MismatchError, match="never reached the base model"),
        adapter.using(adapter.prompt(tokens(adapter))),
    ):
        pass


def test_a_processor_that_was_replaced_later_is_reported(tiny: Tiny) -> None:
    adapter = adapter_for(tiny.model).attach(tiny.model)
    prompt = adapter.prompt(tokens(adapter))
    name, layer = next(iter(adapter.injection.layers.items()))
    layer.set_processor(AttnProcessor())
    with pytest.raises(MismatchError, match=name), adapter.using(prompt):
        run(tiny)
