"""Training on a compiled base: the gradients of the same base uncompiled, or none of it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from imprompt.errors import SettingError
from imprompt.training import loop
from imprompt.training.batches import Batch
from imprompt.training.compiled import compare_gradients
from tests.runs import begun, picture_folder, recipe, tensors

# Looked at by the compiler.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def right(graph: nn.Module, _: Sequence[Any]) -> Callable[..., Any]:
    """A compiler: of nothing but right code."""
    return graph


def without_gradient(graph: nn.Module, _: Sequence[Any]) -> Callable[..., Any]:
    """A compiler as PyTorch 2.13's in bfloat16 on a CPU: a right forward pass, and a gradient of
    zeros.
    """

    def run(*args: Any) -> Any:
        return [one.detach() + 0 * one for one in graph(*args)]

    return run


def compile_by(monkeypatch: pytest.MonkeyPatch, backend: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **_: compile_module(module, backend=backend)
    )


def test_a_wrong_gradient_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_by(monkeypatch, without_gradient)
    plan = recipe(
        picture_folder(tmp_path / "pictures"), tmp_path / "run", 2, optimization={"compile": True}
    )
    with pytest.raises(
        SettingError,
        match=r"compile = true gives 100% of the adapter's weights a wrong gradient.*"
        r"compile = false",
    ):
        loop.train(plan)
    assert not (tmp_path / "run" / "latest").exists()


def test_a_right_gradient_trains_as_uncompiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_by(monkeypatch, right)
    pictures = picture_folder(tmp_path / "pictures")
    runs = {
        name: recipe(pictures, tmp_path / str(name), 2, optimization={"compile": name})
        for name in (True, False)
    }
    fast, plain = (tensors(loop.train(plan)) for plan in runs.values())
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_every_size_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_by(monkeypatch, right)
    plan = recipe(
        picture_folder(tmp_path / "pictures"), tmp_path / "run", optimization={"compile": True}
    )
    run = begun(plan)
    compared: list[int] = []
    check = run.trainer._check_compiled

    def noted(batch: Batch) -> None:
        compared.append(len(batch.names))
        check(batch)

    monkeypatch.setattr(run.trainer, "_check_compiled", noted)
    items = run.data_pipeline.samples_from(0)
    first, second = (run.data_pipeline.compose(next(items)) for _ in range(2))
    for step, batch in enumerate((first, second, next(second.samples()))):
        run.trainer.update(step, [batch])
    assert compared == [3, 1]


def test_comparing() -> None:
    def found(*pairs: tuple[list[float], list[float]]) -> list[int]:
        sides: Any = zip(*pairs, strict=True)
        return compare_gradients(*([torch.tensor(one) for one in side] for side in sides)).tolist()

    same = ([1.0, 2.0], [1.0, 2.0])
    assert found(same, ([1.1, 0.9], [1.0, 1.0])) == [0, 2]
    assert found(same, ([0.0, 0.0], [0.0, 0.01])) == [1, 2]
    assert found(same, ([2.0, 1.0], [1.0, 2.0])) == [1, 2]
    assert found(same, ([1e-9, 0.0], [0.0, 1e-9])) == [0, 1]  # rounding
    assert found(same, ([0.0], [float("inf")])) == [0, 0]
    assert found(([0.0], [0.0])) == [0, 0]  # no sample of the step could be read
