"""Every row of the table of transformers, compiled by `torch.compile`: as many graphs as the base
alone has, none more for a new prompt or scale, and the same numbers.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounterWithBackend

from imprompt.errors import SettingError
from imprompt.families.base import family_of
from imprompt.families.rows import ROWS
from imprompt.generation.compile import compile_base
from imprompt.prompt import ImagePrompt
from tests.test_transformers import Joined
from tests.zoo import answer, inputs_of, specimen

WHOLE = [name for name, row in ROWS.items() if row.compiles == "whole"]
QUICK = ("flux", "lumina2", "z-image")  # the others are slow
Compiled = Callable[[nn.Module], Any]
# Of base models, with or without an adapter: Mochi's norms, and a cache that Dynamo looks into.
pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # inductor's own
]


def of_quick(names: list[str]) -> list[Any]:
    """Parameters of a test: a few of these names, and all of them where slow tests run."""
    marks = {name: () if name in QUICK else pytest.mark.slow for name in names}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


class Graphs(CompileCounterWithBackend):
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        super().__init__("eager")

    def whole(self, model: nn.Module) -> Any:
        return torch.compile(model, fullgraph=True, backend=self)

    def parts(self, model: nn.Module) -> Any:
        return torch.compile(model, backend=self)

    def in_place(self, model: Any) -> Any:
        model.compile(fullgraph=True, backend=self)
        return model

    def package(self, model: nn.Module) -> Any:
        compile_base(model, backend=self)
        return model

    def blocks(self, model: Any) -> Any:
        """Each kind of block that is conditioned; not every class of diffusers names its own."""
        model._repeated_blocks = type(model)._repeated_blocks or kinds_of_blocks(model)
        model.compile_repeated_blocks(fullgraph=True, backend=self)
        return model


def kinds_of_blocks(model: nn.Module) -> list[str]:
    """Names of the classes of blocks that hold the layers which image prompts condition."""
    layers, kinds = family_of(model).layers(model), {}
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.ModuleList) and any(one.startswith(name + ".") for one in layers):
            kinds[type(module).__name__] = None
    return [*kinds]


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield Graphs()
    torch._dynamo.reset()


def prompts_of(joined: Joined) -> list[ImagePrompt]:
    """What a user changes between calls: the picture, its scale, and the scale of each layer."""
    first, other, layers = joined.prompt(1), joined.prompt(1, 6), len(joined.layers)
    by_layer = other.with_scale(torch.linspace(0, 1, layers))
    return [first, other, other.with_scale(0.3), by_layer, first.with_scale(0.0)]


def counts(joined: Joined, graphs: Graphs, compiled: Compiled) -> list[int]:
    """Attach, compile, and compare with the uncompiled model; the number of graphs after each call.

    Every second call has other inputs.
    """
    inputs, found = [inputs_of(joined.name, 1, seed) for seed in (1, 2)], []
    joined.adapter.attach(joined.model)
    prompts = prompts_of(joined)
    wanted = [joined.answer(inputs[n % 2], prompt) for n, prompt in enumerate(prompts)]
    assert not torch.allclose(wanted[0], wanted[-1], atol=1e-4)
    fast = compiled(joined.model)
    for number, (prompt, expected) in enumerate(zip(prompts, wanted, strict=True)):
        with joined.adapter.using(prompt):
            made = answer(fast, inputs[number % 2])
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
        found.append(graphs.frame_count)
    return found


def alone(name: str, graphs: Graphs, compiled: Compiled) -> int:
    """The number of graphs of the base model without an adapter."""
    model = specimen(name)
    answer(model, inputs_of(name, 1))  # some classes keep what their first call computes
    fast = compiled(model)
    for seed in (1, 2):
        answer(fast, inputs_of(name, 1, seed))
    torch._dynamo.reset()
    made, graphs.frame_count = graphs.frame_count, 0
    return made


@pytest.mark.parametrize("name", WHOLE)
def test_it_is_one_graph_for_every_prompt_and_scale(name: str, graphs: Graphs) -> None:
    assert counts(Joined(name), graphs, graphs.whole) == [1] * 5


@pytest.mark.parametrize("name", of_quick([*ROWS.keys() - set(WHOLE)]))
def test_where_the_base_cannot_be_one_graph_its_parts_are_compiled(
    name: str, graphs: Graphs
) -> None:
    with pytest.raises(TorchDynamoException):
        alone(name, graphs, graphs.whole)
    torch._dynamo.reset()
    expected = alone(name, graphs, graphs.parts)
    assert expected > 1
    assert counts(Joined(name), graphs, graphs.parts) == [expected] * 5
    with pytest.raises(SettingError, match=r"cannot be compiled as one graph: leave compile out"):
        compile_base(specimen(name))


@pytest.mark.parametrize("name", of_quick([n for n in ROWS if ROWS[n].compiles != "parts"]))
def test_blocks_have_as_many_graphs_as_without_an_adapter(name: str, graphs: Graphs) -> None:
    expected = alone(name, graphs, graphs.blocks)
    assert counts(Joined(name), graphs, graphs.blocks) == [expected] * 5


def test_blocks_that_cannot_be_one_graph(graphs: Graphs) -> None:
    (name,) = (name for name, row in ROWS.items() if row.compiles == "parts")
    with pytest.raises(TorchDynamoException):
        alone(name, graphs, graphs.blocks)


@pytest.mark.parametrize("name", of_quick(WHOLE))
def test_so_it_is_where_the_package_compiles_it(name: str, graphs: Graphs) -> None:
    assert counts(Joined(name), graphs, graphs.package) == [1] * 5


def test_so_it_is_compiled_in_place(graphs: Graphs) -> None:
    assert counts(Joined("pixart"), graphs, graphs.in_place) == [1] * 5


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_branches_of_guidance_in_two_calls_share_the_graph(name: str, graphs: Graphs) -> None:
    """The second call with a new text at one time is the negative one."""
    joined = Joined(name)
    joined.adapter.attach(joined.model)
    prompt = joined.prompt(2)._replace(branches=2)
    positive, other = (inputs_of(name, 1, seed) for seed in (1, 2))
    text = joined.adapter.family.arguments[2]
    negative = positive | {text: other[text]}

    def both(model: Any) -> list[Tensor]:
        with joined.adapter.using(prompt):
            return [answer(model, given) for given in (positive, negative, positive)]

    wanted, made = both(joined.model), both(graphs.whole(joined.model))
    for one, expected in zip(made, wanted, strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-5)
    assert torch.equal(made[0], made[2])
    assert graphs.frame_count == 1


def test_inside_a_larger_graph_it_is_a_part_of_it(graphs: Graphs) -> None:
    joined = Joined("pixart")
    joined.adapter.attach(joined.model)
    inputs, prompt = inputs_of("pixart", 1), joined.prompt(1)

    @torch.compile(fullgraph=True, backend=graphs)
    def doubled(given: dict[str, Any]) -> Tensor:
        return 2 * answer(joined.model, given)

    with joined.adapter.using(prompt):
        made = doubled(inputs)
    torch.testing.assert_close(made, 2 * joined.answer(inputs, prompt), rtol=0, atol=1e-5)
    assert graphs.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart", "flux", "sd3"])
@torch.no_grad()
def test_with_generated_code(name: str) -> None:
    """By inductor, PyTorch's usual backend, which makes code for the graph."""
    torch._dynamo.reset()
    assert counts(Joined(name), Graphs(), lambda model: torch.compile(model, fullgraph=True))
    torch._dynamo.reset()
