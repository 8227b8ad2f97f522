"""The benchmarks run on tiny models, and compare what is equal.

Turns, ratios, bars, records and pages.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import all as everything
from benchmarks import cold, growth, memory, page, profile, step, training, transformers
from benchmarks.implementations import IMPLEMENTATIONS, IMPROMPT, PEER, TEXT, scene
from benchmarks.interleave import InThisProcess, Loop, Measured, Worker, interleave, ratios
from benchmarks.our_loop import OurLoop
from benchmarks.paper import PaperLoop
from benchmarks.record import RESULTS, Bar, Outcome, Record, options, parsed
from benchmarks.setting import PromptedSetting, TrainingSetting
from benchmarks.training import PAPER, bars_of, main, outcome_table
from imprompt.errors import ImpromptError

TINY = TrainingSetting("cpu", "tiny", batch=2, pixels=32, precision="fp32")


def trained(loop: Any) -> list[torch.Tensor]:
    return [weight for group in optimizer_of(loop).param_groups for weight in group["params"]]


def optimizer_of(loop: Any) -> Any:
    return loop.optimizer if isinstance(loop, PaperLoop) else loop.trainer.optimizer


@pytest.mark.parametrize("make", [PaperLoop, OurLoop])
def test_a_loop_trains(make: Callable[[TrainingSetting], Loop]) -> None:
    loop = make(TINY)
    before = [weight.clone() for weight in trained(loop)]
    loss = loop.run(TINY.samples // TINY.batch + 1)  # into a second epoch
    assert loss is not None
    assert math.isfinite(loss)
    assert all((weight != old).any() for weight, old in zip(trained(loop), before, strict=True))


def test_both_train_the_same_weights() -> None:
    shapes = [
        sorted(tuple(weight.shape) for weight in trained(make(TINY)))
        for make in (PaperLoop, OurLoop)
    ]
    assert shapes[0] == shapes[1]


def test_arithmetic_of_the_published_sizes() -> None:
    sd15 = training.flops(TrainingSetting("cuda", "sd15", 8, 512, "bf16"))
    assert sd15 / 1e12 == pytest.approx(1.669, rel=0.005)  # a sample's, whatever the batch


class Fake:
    """Turns that take 4 s, then 3 s, 2 s, …"""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.seconds = name, log, 4.0

    def run(self, steps: int) -> tuple[float, float | None]:
        self.log.append(f"{self.name}{steps}")
        self.seconds -= 1
        return self.seconds + 1, 0.5

    def peak(self) -> tuple[float, float]:
        return 2.0, 3.0


def test_loops_take_turns_and_the_first_does_not_count() -> None:
    log: list[str] = []
    found = interleave(
        {"a": Fake("a", log), "b": Fake("b", log)}, rounds=2, steps=5, on_run=lambda *_: None
    )
    assert log == ["a5", "b5"] * 3
    assert found["b"] == Measured([3.0, 2.0], [0.5, 0.5], 2.0, 3.0)


def outcome(device: str, ours: list[float]) -> Outcome:
    loops = {
        PAPER: Measured([10.0, 12.0, 8.0], peak=10.0),
        training.OUR_LOOP: Measured(ours, peak=5.0),
    }
    return Outcome(
        asdict(TrainingSetting(device, "sd15", 8, 512, "bf16")), loops, flops=1e12, ceiling=4e12
    )


def test_ratios_are_of_neighbouring_turns() -> None:
    found = outcome("cpu", [5.0, 3.0, 4.0])
    assert found.times(training.OUR_LOOP, PAPER) == [2.0, 2.0, 4.0]
    assert found.rate(training.OUR_LOOP) == 2.0
    assert found.share(training.OUR_LOOP) == 0.5
    assert (
        "| ours | 4.000 (3.000 to 5.000) | 2.000 | 2.00 (2.00 to 4.00) | 5.00 | 50.0% |"
        in outcome_table(found)
    )
    assert ratios([1.0, 6.0], [2.0, 2.0]) == [0.5, 3.0]


@pytest.mark.parametrize(
    ("device", "ours", "met"),
    [
        ("cpu", [5.0, 6.0, 4.0], [True]),
        ("cpu", [10.0, 6.0, 8.0], [False]),
        ("cuda", [5.0, 6.0, 4.0], [False, True, False]),
    ],
)
def test_bars(device: str, ours: list[float], met: list[bool]) -> None:
    bars = bars_of(outcome(device, ours))
    assert [bar.met for bar in bars] == met
    assert all(("reached" in bar.line()) == bar.met for bar in bars)


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(
        loops: Mapping[str, Callable[[TrainingSetting], Loop]],
        setting: TrainingSetting,
        *turns: Any,
    ) -> dict[str, Measured]:
        return interleave({name: InProcess(make(setting)) for name, make in loops.items()}, *turns)

    class InProcess(Fake):
        def __init__(self, loop: Loop) -> None:
            super().__init__("", [])
            self.loop = loop

        def run(self, steps: int) -> tuple[float, float | None]:
            return super().run(steps)[0], self.loop.run(steps)

    monkeypatch.setattr(training, "measure", here)
    path = tmp_path / "new" / "record.json"
    asked = (
        "--device cpu --model tiny --pixels 32 --batch 2 --rounds 2 --steps 2 --precision fp32 "
        f"--record {path}"
    )
    assert main(asked.split()) == 0
    assert "| ours |" in capsys.readouterr().out
    rows = json.loads(path.read_text())
    assert rows["command"] == f"python -m benchmarks.training {asked}"
    assert rows["outcomes"][0]["times_the_papers"] == {PAPER: [1.0, 1.0], "ours": [1.0, 1.0]}
    assert all(
        math.isfinite(loss)
        for loop in rows["outcomes"][0]["loops"].values()
        for loss in loop["losses"]
    )


SCENES = {
    "one": PromptedSetting("cpu", "sd15-narrow", 2, 64, "fp32"),
    "three prompts": PromptedSetting("cpu", "sd15-narrow", 1, 64, "fp32", prompts=3),
    "three pictures": PromptedSetting("cpu", "sd15-narrow", 2, 64, "fp32", pictures=3),
    "plus": PromptedSetting("cpu", "sd15-narrow", 1, 64, "fp32", "plus"),
    "sdxl": PromptedSetting("cpu", "sdxl-narrow", 1, 64, "fp32"),
}


@pytest.mark.parametrize("name", SCENES)
@torch.no_grad()
def test_what_is_compared_gives_the_same_noise(name: str) -> None:
    of = scene(SCENES[name])
    text, theirs, ours = (
        make(of)(of.latents, torch.tensor(500)) for make in IMPLEMENTATIONS.values()
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - text).abs().max() > 1e-3


def test_what_is_compared_gives_the_same_pictures() -> None:
    calls = step.from_embeddings(scene(SCENES["one"]), steps=2)
    pictures = {}
    for name in (PEER, IMPROMPT):
        torch.manual_seed(0)
        pictures[name] = np.stack([np.asarray(picture, int) for picture in calls[name]().images])
    assert pictures[IMPROMPT].shape == (2, 64, 64, 3)
    assert abs(pictures[IMPROMPT] - pictures[PEER]).max() <= 1


TRY = ["--device", "cpu", "--model", "tiny", "--rounds", "2", "--precision", "fp32"]


def test_the_step_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    assert (
        step.main([*TRY, "--pixels", "32", "--batch", "2", "--steps", "2", "--record", str(path)])
        == 0
    )
    rows = json.loads(path.read_text())
    assert [row["setting"]["what"] for row in rows["outcomes"]] == [
        step.STEP,
        step.EMBEDDING,
        step.PICTURE,
    ]
    assert all(
        len(loop["seconds"]) == 2 for row in rows["outcomes"] for loop in row["loops"].values()
    )
    assert all(set(row["loops"]) == {TEXT, PEER, IMPROMPT} for row in rows["outcomes"])
    assert [bar["bar"] for bar in rows["bars"]] == [
        1.0
    ] * 3  # never slower than diffusers' IP-Adapter
    assert step.section(rows) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "seconds", "bar"),
    [(step.STEP, 1.01, 1.0), (step.COMPILED, 1.02, 1.01), (step.EMBEDDING, 0.9, 1.25)],
)
def test_bars_of_steps_on_a_gpu(what: str, seconds: float, bar: float) -> None:
    loops = {TEXT: Measured([1.0]), PEER: Measured([1.1]), IMPROMPT: Measured([seconds])}
    (found,) = step.bars_of(
        Outcome({"device": "cuda", "model": "sd15", "batch": 1, "what": what}, loops)
    )
    assert (found.bar, found.met) == (bar, False)


def test_the_profile_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        profile.main(["--device", "cpu", "--model", "tiny", "--record", str(tmp_path / "a.json")])
        == 0
    )
    outcomes = json.loads((tmp_path / "a.json").read_text())["outcomes"]
    for row in outcomes:
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert all(row["shares"][kind] > 0 for kind in ("convolutions", "matrix products", "norms"))
    assert outcomes[0]["shares"]["optimizer"] > outcomes[1]["shares"]["optimizer"] == 0
    assert "| convolutions |" in capsys.readouterr().out


def test_the_growth_command(tmp_path: Path) -> None:
    path = tmp_path / "growth.json"
    assert (
        growth.main(
            [*TRY, "--axes", "prompts", "pictures", "batch", "--most", "2", "--record", str(path)]
        )
        == 0
    )
    rows = json.loads(path.read_text())
    # prompts, then tokens, then images at once
    assert [row["setting"]["value"] for row in rows["outcomes"]] == [1, 2, 4, 1]
    assert all(0 < loop["peak"] < 1 for row in rows["outcomes"] for loop in row["loops"].values())
    assert "| image prompts | 2 |" in growth.section(rows)


def test_the_memory_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class InProcess(InThisProcess):
        def __init__(self, make: Callable[[Any], Loop], setting: Any) -> None:
            super().__init__(partial(make(setting).run, 1), "cpu")
            self.fails = setting.mode == "VAE sliced and tiled" and make.args == (IMPROMPT,)  # pyright: ignore

        def run(self, steps: int) -> tuple[float, None]:
            if self.fails:
                raise ImpromptError("broken")
            return super().run(steps)

    monkeypatch.setattr(memory, "Worker", lambda *told: nullcontext(InProcess(*told)))
    path, modes = (
        tmp_path / "memory.json",
        ["as it is", "VAE sliced and tiled", "model CPU offload"],
    )
    assert memory.main([*TRY, "--pixels", "32", "--modes", *modes, "--record", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [list(row["loops"]) for row in rows["outcomes"]] == [
        [TEXT, PEER, IMPROMPT],
        [TEXT, PEER],
    ]
    assert [row["what"] for row in rows["skipped"]] == [
        f"tiny, {modes[1]}, ours",
        f"tiny, {modes[2]}",
    ]
    # 4 sites, batch 2, keys and values, 16 wide, float32
    assert rows["outcomes"][0]["held"]["text"] == 4 * 2 * 77 * 2 * 4 * 16
    assert "MB of the text" in memory.section(rows)


def test_the_cold_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def commands(_: Path, __: str) -> Any:
        yield (
            "the first picture",
            1,
            {name: [sys.executable, "-c", "pass"] for name in (cold.SCRIPT, cold.GENERATE)},
        )
        yield "the help page", 1, {cold.HELP: [sys.executable, "-c", "pass"]}

    monkeypatch.setattr(cold, "compared", commands)
    path = tmp_path / "cold.json"
    assert cold.main(["--device", "cpu", "--rounds", "1", "--record", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [bar["what"] for bar in rows["bars"]] == ["seconds, imprompt --help"]
    assert f"| the first picture | {cold.GENERATE} |" in cold.section(rows)
    with pytest.raises(ImpromptError, match="no such thing"):
        cold.Process([sys.executable, "-c", "raise SystemExit('no such thing')"]).run(1)


def test_a_try_is_not_recorded(tmp_path: Path) -> None:
    def path(*arguments: str) -> Path | None:
        parser = options("step", "")
        parser.add_argument("--model")
        return parsed(parser, ["--device", "cpu", *arguments], narrows=("model",)).record

    assert path() == RESULTS / "step-cpu.json"
    assert path("--model", "tiny") is None
    assert path("--model", "tiny", "--record", str(tmp_path)) == tmp_path


def test_a_record_is_written_as_it_grows(tmp_path: Path) -> None:
    record = Record("step", ["--rounds", "1"], "cpu", tmp_path / "new" / "record.json")
    record.skip("this", "that")
    record.add(Outcome({"batch": 1}, {IMPROMPT: Measured([1.0])}).row(), [Bar("speed", 1.0, 2.0)])
    rows = json.loads((tmp_path / "new" / "record.json").read_text())
    assert rows["command"] == "python -m benchmarks.step --rounds 1"
    assert rows["bars"] == [
        {"what": "speed", "value": 1.0, "bar": 2.0, "most": False, "met": False}
    ]
    assert rows["machine"]["cores"] > 0
    assert Outcome.read(rows["outcomes"][0]).loops == {IMPROMPT: Measured([1.0])}


def test_the_page_is_what_the_records_say() -> None:
    assert page.PAGE.read_text() == page.made(RESULTS), "make it anew: python -m benchmarks.page"


def test_a_page_without_records(tmp_path: Path) -> None:
    text = page.made(tmp_path)
    # operators have no device
    assert (
        text.count("GPU: not measured yet; run `python -m benchmarks.") == len(page.QUESTIONS) - 1
    )
    assert all(f"## {module.TITLE}" in text for module in page.QUESTIONS.values())


def test_one_command_for_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], timeout: int, check: bool) -> Any:  # noqa: ARG001
        asked.append(command[2:])
        if "growth" in command[2]:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(everything.subprocess, "run", run)
    assert (
        everything.main(["--device", "cuda", "--out", str(tmp_path), "--only", "step", "growth"])
        == 1
    )
    assert asked[0] == [
        "benchmarks.step",
        "--device",
        "cuda",
        "--record",
        str(tmp_path / "step-cuda.json"),
    ]
    assert "not completed: growth" in capsys.readouterr().err
    assert sum(limit for _, limit, _ in everything.STAGES["cuda"]) <= 590


@pytest.mark.slow
@pytest.mark.parametrize("make", [PaperLoop, OurLoop])
def test_a_loop_in_a_process_of_its_own(make: Callable[[TrainingSetting], Loop]) -> None:
    with Worker(make, TrainingSetting("cpu", "tiny", 2, 32, "bf16")) as worker:
        seconds, loss = worker.run(2)
        assert seconds > 0
        assert loss is not None
        assert math.isfinite(loss)
        peak, reserved = worker.peak()
        assert 0.05 < peak == reserved < 10


@pytest.mark.slow
def test_a_loop_that_fails_says_why() -> None:
    with (
        Worker(OurLoop, TrainingSetting("cpu", "nothing", 2, 32, "bf16")) as worker,
        pytest.raises(ImpromptError, match="nothing"),
    ):
        worker.run(2)


@pytest.mark.slow
def test_a_loop_that_is_killed() -> None:
    with Worker(OurLoop, TINY) as worker:
        worker.run(1)
        worker._process.kill()
        worker._process.join()
        with pytest.raises(ImpromptError, match="killed"):
            worker.run(1)


def test_a_step_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tiny ones, of which no bar is asked; diffusers has no adapter for PixArt."""
    path = tmp_path / "transformers.json"
    assert (
        transformers.main(["--device", "cpu", "--dry", "--rounds", "1", "--record", str(path)]) == 0
    )
    rows = json.loads(path.read_text())
    who = {row["setting"]["model"]: [*row["loops"]] for row in rows["outcomes"]}
    assert list(who) == list(transformers.TINY)
    assert transformers.PEER in who["flux-tiny"]
    assert transformers.PEER in who["sd3-tiny"]
    assert who["pixart-tiny"] == [TEXT, IMPROMPT]
    assert rows["bars"] == []
    assert (
        "- not measured: peak memory: tensors are counted on a GPU only" in capsys.readouterr().out
    )


def test_bars_of_transformers() -> None:
    setting = {"device": "cuda", "model": "flux-dev", "what": transformers.STEP}
    loops = {
        name: Measured([seconds] * 3)
        for name, seconds in ((TEXT, 2.0), (transformers.PEER, 2.2), (IMPROMPT, 2.05))
    }
    over_text, over_peer = transformers.bars_of(Outcome(setting, loops))
    assert (over_text.met, over_peer.met) == (True, True)
    assert over_text.value == pytest.approx(1.025)
    assert over_peer.value == pytest.approx(2.05 / 2.2)
    assert transformers.bars_of(Outcome(setting | {"device": "cpu"}, loops)) == []
