"""Every row of the table of transformers with its weights elsewhere, in 8 bits or cast by layer,
and with another attention backend: the adapter changes nothing that the base alone does not.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from imprompt.errors import SettingError
from imprompt.families.published import BASES
from imprompt.families.rows import ROWS
from imprompt.generation import memory
from imprompt.generation.memory import quantizable, quantize
from imprompt.training.estimate import blank_base
from tests.test_transformers import Joined
from tests.zoo import answer, inputs_of, specimen

CPU = torch.device("cpu")
Change = Callable[[Any], object]
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
# What the class itself cannot: its pooling reads weights of a layer that it does not call.
WITHOUT_LAYERS = {"hunyuandit"}
# What accelerate cannot: it rebuilds an output from its parts one by one, and this class has two.
WITHOUT_HOOKS = {"ltx2"}
WITHOUT_CONTENTS = {  # classes that read values, so that they cannot run without
    *("lumina2", "qwen-image-2.1", "hidream", "ideogram4", "framepack", "glm-image", "ernie-image"),
    "mochi",  # asks for autocast on its device
    *WITHOUT_HOOKS,
}
# Mochi's norms ask for float32, which autocast on a CPU has not.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def unchanged(name: str, change: Change, first: str) -> Tensor:
    """Attach an adapter and make a change, one of them first; return the prompted answer.

    Without a prompt, at scale 0 and detached the model is bit-equal to the changed base alone.
    """
    alone, joined, inputs = specimen(name), Joined(name), inputs_of(name, 1)
    keys = list(alone.state_dict())
    change(alone)
    expected = answer(alone, inputs)
    if first == "change":
        change(joined.model)
    joined.adapter.attach(joined.model)
    if first == "attach":
        change(joined.model)
    prompt = joined.prompt(1)
    assert torch.equal(answer(joined.model, inputs), expected)
    assert torch.equal(joined.answer(inputs, prompt.with_scale(0.0)), expected)
    prompted = joined.answer(inputs, prompt)
    assert not torch.allclose(prompted, expected, atol=1e-4)
    assert torch.equal(joined.answer(inputs, prompt), prompted)  # from what the first call left
    assert [*joined.model.state_dict()] == keys
    joined.adapter.detach()
    assert torch.equal(answer(joined.model, inputs), expected)
    return prompted


def prompted(name: str, change: Change = lambda model: model) -> Tensor:
    """The prompted answer of a model that is changed at the very start."""
    joined = Joined(name)
    change(joined.model)
    joined.adapter.attach(joined.model)
    return joined.answer(inputs_of(name, 1), joined.prompt(1))


def whole(model: Any) -> None:
    """As `enable_model_cpu_offload`: the model is on the device while it is called."""
    cpu_offload_with_hook(model, CPU)


def layers(model: Any) -> None:
    """As `enable_sequential_cpu_offload`: a layer is there while it computes, else it is empty."""
    cpu_offload(model, CPU)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


def group(kind: str, folder: Path) -> Change:
    """Diffusers' group offload to files, which empties the weights between calls."""
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    return lambda model: apply_group_offloading(
        model, CPU, CPU, kind, offload_to_disk_path=str(folder / str(id(model))), **blocks
    )


@pytest.mark.parametrize("first", ["attach", "change"])
@pytest.mark.parametrize("name", [name for name in ROWS if name not in WITHOUT_HOOKS])
def test_under_offload_it_is_the_same(name: str, first: str, tmp_path: Path) -> None:
    changes: list[Change] = [whole, group("block_level", tmp_path)]
    if name not in WITHOUT_LAYERS:
        changes += [layers, group("leaf_level", tmp_path)]
    expected = prompted(name)
    for change in changes:
        made = unchanged(name, change, first)
        # read from a file, weights lie elsewhere in memory, and products round differently
        torch.testing.assert_close(made, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", sorted(WITHOUT_LAYERS))
def test_what_the_class_alone_cannot(name: str) -> None:
    model = specimen(name)
    layers(model)
    with pytest.raises(RuntimeError, match="meta is not on the expected device"):
        answer(model, inputs_of(name, 1))


@pytest.mark.parametrize("name", [name for name in ROWS if name not in WITHOUT_CONTENTS])
def test_a_prompt_follows_the_layers_to_their_device(name: str) -> None:
    """A device without contents stands for the GPU; the adapter stays where it was."""
    joined = Joined(name)
    inputs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs_of(name, 1))
    cpu_offload(joined.model, torch.device("meta"))
    joined.adapter.attach(joined.model)
    prompt = joined.prompt(1)
    expected = answer(joined.model, inputs)
    made = joined.answer(inputs, prompt)
    assert (made.device.type, made.shape) == ("meta", expected.shape)
    moved = joined.adapter.injection.moved.value
    joined.answer(inputs, prompt)
    assert joined.adapter.injection.moved.value is moved  # copied once, not in every step
    assert prompt.keys[0].device == CPU


@needs_torchao
@pytest.mark.parametrize("how", ["int8", "fp8"])
@pytest.mark.parametrize("name", ROWS)
def test_in_8_bits_scale_zero_is_the_base(
    name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "GROUP", 4)  # of the widths of tiny models
    made = [unchanged(name, lambda m: quantize(m, how), first) for first in ("attach", "change")]
    assert torch.equal(*made)
    plain = prompted(name)
    near = {"int8": 0.03, "fp8": 0.2}[how] * plain.abs().max()
    assert 0 < (made[0] - plain).abs().max() < near


@needs_torchao
def test_no_matrix_to_convert_is_reported() -> None:
    with pytest.raises(
        SettingError, match=r"width is a multiple of 64, and the blocks of this Sana.* leave it out"
    ):
        quantize(specimen("sana"), "int8")


def test_which_matrices_of_published_transformers_are_kept_in_8_bits() -> None:
    """Shares of all weights, at the sizes of Flux.1-dev, SD3.5-medium and PixArt-Σ."""
    sizes = {
        "flux-dev": 0.994,
        "sd35-medium": 0.991,
        "pixart-sigma": 0.973,
    }
    for name, share in sizes.items():
        model = blank_base(BASES[name], torch.bfloat16)
        light = sum(module.weight.numel() for _, module in quantizable(model))
        total = sum(weight.numel() for weight in model.parameters())
        assert light / total == pytest.approx(share, abs=0.001), (name, total, light)


def layerwise(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def rounded(model: nn.Module) -> None:
    """Round the weights that layerwise casting stores, but store them as they were."""
    cast = specimen_like(model)
    layerwise(cast)
    model.load_state_dict({name: part.float() for name, part in cast.state_dict().items()})


def specimen_like(model: nn.Module) -> Any:
    return specimen(next(name for name, row in ROWS.items() if row.model == type(model).__name__))


@pytest.mark.parametrize("name", ROWS)
def test_layerwise_casting_rounds_the_base_alone(name: str) -> None:
    expected = prompted(name, rounded)
    for first in ("attach", "change"):
        assert torch.equal(unchanged(name, layerwise, first), expected)


@pytest.mark.parametrize("name", ROWS)
def test_another_attention_backend_is_the_base_s(name: str) -> None:
    """Set before or after the adapter is attached, it reaches the original processors."""
    expected = prompted(name)
    for backend, first in (("native", "attach"), ("_native_math", "change")):
        made = unchanged(name, lambda m, b=backend: m.set_attention_backend(b), first)
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
