"""The benchmarks run: both training loops on tiny models, and the arithmetic of turns, ratios and bars."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import training
from benchmarks.ours import OurLoop
from benchmarks.paper import PaperLoop
from benchmarks.setting import Setting
from benchmarks.training import OURS, PAPER, Outcome, bars_of, main, table
from benchmarks.turns import Loop, Measured, Worker, take_turns
from imprompt.errors import ImpromptError

TINY = Setting("cpu", "tiny", batch=2, pixels=32, precision="fp32")


def trained(loop: Any) -> list[torch.Tensor]:
    return [weight for group in optimizer_of(loop).param_groups for weight in group["params"]]


def optimizer_of(loop: Any) -> Any:
    return loop.optimizer if isinstance(loop, PaperLoop) else loop.trainer.optimizer


@pytest.mark.parametrize("make", [PaperLoop, OurLoop])
def test_a_loop_trains(make: Callable[[Setting], Loop]) -> None:
    loop = make(TINY)
    before = [weight.clone() for weight in trained(loop)]
    assert math.isfinite(loop.run(TINY.samples // TINY.batch + 1))  # into a second epoch
    assert all((weight != old).any() for weight, old in zip(trained(loop), before, strict=True))


def test_both_train_the_same_weights() -> None:
    shapes = [sorted(tuple(weight.shape) for weight in trained(make(TINY))) for make in (PaperLoop, OurLoop)]
    assert shapes[0] == shapes[1]


def test_arithmetic_of_the_published_sizes() -> None:
    sd15 = training.flops(Setting("cuda", "sd15", 8, 512, "bf16"))
    assert sd15 / 1e12 == pytest.approx(1.669, rel=0.005)  # a sample's, whatever the batch


class Fake:
    """Turns that take 4 s, then 3 s, 2 s, …"""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.seconds = name, log, 4.0

    def run(self, steps: int) -> tuple[float, float]:
        self.log.append(f"{self.name}{steps}")
        self.seconds -= 1
        return self.seconds + 1, 0.5

    def peak(self) -> tuple[float, float]:
        return 2.0, 3.0


def test_loops_take_turns_and_the_first_does_not_count() -> None:
    log: list[str] = []
    found = take_turns({"a": Fake("a", log), "b": Fake("b", log)}, rounds=2, steps=5, on_turn=lambda *_: None)
    assert log == ["a5", "b5"] * 3
    assert found["b"] == Measured([3.0, 2.0], [0.5, 0.5], 2.0, 3.0)


def outcome(device: str, ours: list[float]) -> Outcome:
    loops = {PAPER: Measured([10.0, 12.0, 8.0], peak=10.0), OURS: Measured(ours, peak=5.0)}
    return Outcome(Setting(device, "sd15", 8, 512, "bf16"), loops, flops=1e12, ceiling=4e12)


def test_ratios_are_of_neighbouring_turns() -> None:
    found = outcome("cpu", [5.0, 3.0, 4.0])
    assert found.ratios(OURS) == [2.0, 2.0, 4.0]
    assert found.rate(OURS) == 2.0
    assert found.share(OURS) == 0.5
    assert "| ours | 4.000 (3.000 to 5.000) | 2.000 | 2.00 (2.00 to 4.00) | 5.00 | 50.0% |" in table(found)


@pytest.mark.parametrize(
    ("device", "ours", "met"),
    [("cpu", [5.0, 6.0, 4.0], [True]), ("cpu", [10.0, 6.0, 8.0], [False]), ("cuda", [5.0, 6.0, 4.0], [False, True, False])],
)
def test_bars(device: str, ours: list[float], met: list[bool]) -> None:
    bars = bars_of(outcome(device, ours))
    assert [bar.met for bar in bars] == met
    assert all(("reached" in bar.line()) == bar.met for bar in bars)


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def here(loops: Mapping[str, Callable[[Setting], Loop]], setting: Setting, *turns: Any) -> dict[str, Measured]:
        return take_turns({name: InProcess(make(setting)) for name, make in loops.items()}, *turns)

    class InProcess(Fake):
        def __init__(self, loop: Loop) -> None:
            super().__init__("", [])
            self.loop = loop

        def run(self, steps: int) -> tuple[float, float]:
            return super().run(steps)[0], self.loop.run(steps)

    monkeypatch.setattr(training, "measure", here)
    path = tmp_path / "new" / "record.json"
    asked = f"--device cpu --model tiny --pixels 32 --batch 2 --rounds 2 --steps 2 --precision fp32 --record {path}"
    assert main(asked.split()) == 0
    assert "| ours |" in capsys.readouterr().out
    rows = json.loads(path.read_text())
    assert rows["command"] == f"python -m benchmarks.training {asked}"
    assert rows["outcomes"][0]["times_the_papers"] == {PAPER: [1.0, 1.0], OURS: [1.0, 1.0]}
    assert all(math.isfinite(loss) for loop in rows["outcomes"][0]["loops"].values() for loss in loop["losses"])


@pytest.mark.slow
@pytest.mark.parametrize("make", [PaperLoop, OurLoop])
def test_a_loop_in_a_process_of_its_own(make: Callable[[Setting], Loop]) -> None:
    with Worker(make, Setting("cpu", "tiny", 2, 32, "bf16")) as worker:
        seconds, loss = worker.run(2)
        assert seconds > 0
        assert math.isfinite(loss)
        peak, reserved = worker.peak()
        assert 0.05 < peak == reserved < 10


@pytest.mark.slow
def test_a_loop_that_fails_tells_why() -> None:
    with Worker(OurLoop, Setting("cpu", "nothing", 2, 32, "bf16")) as worker, pytest.raises(ImpromptError, match="nothing"):
        worker.run(2)


@pytest.mark.slow
def test_a_loop_that_is_killed() -> None:
    with Worker(OurLoop, TINY) as worker:
        worker.run(1)
        worker._process.kill()
        worker._process.join()
        with pytest.raises(ImpromptError, match="killed"):
            worker.run(1)
