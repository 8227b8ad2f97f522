"""What a run tells: the file of metrics, the clock, trackers and the terminal."""

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from imprompt.errors import ImpromptError, SettingError
from imprompt.training.recipe import Recipe
from imprompt.training.samples import BadSample
from imprompt.training.watch import (
    LISTED_BAD,
    Clock,
    LogRow,
    Metrics,
    Pace,
    ProgressWatcher,
    open_trackers,
    peak_memory_gb,
)

ROW = LogRow(
    step=25,
    epoch=0.5,
    loss=0.1234,
    plain_loss=0.2,
    grad_norm=0.7,
    learning_rate=1e-4,
    samples_per_second=12.3,
    step_seconds=0.65,
    data_wait=0.031,
    peak_memory_gb=1.24,
    bad=0,
    by_timestep={"loss/000-249": 0.3, "snr_db/000-249": 12.0},
)


def recipe(run: Path, *trackers: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": "emoji",
            "output": run,
            "data": {"source": "pictures"},
            "optimization": {"steps": 100},
            "logging": {"to": trackers},
        }
    )


@given(done=st.integers(0, 8), state=st.integers(0, 8), torn=st.integers(0, 200))
def test_after_a_kill_the_metrics_are_as_if_never_interrupted(
    tmp_path_factory: pytest.TempPathFactory, done: int, state: int, torn: int
) -> None:
    rows = [asdict(replace(ROW, step=step, loss=1 / (step + 3))) for step in range(1, 9)]
    whole, killed = (Metrics(tmp_path_factory.mktemp("run")) for _ in range(2))
    for row in rows:
        whole.add(row)
    for row in rows[:done]:
        killed.add(row)
    with killed.path.open("a") as file:
        file.write(json.dumps(rows[min(done, 7)])[:torn])
    state = min(state, done)
    killed.cut(state)
    assert [row["step"] for row in killed.read()] == list(range(1, state + 1))
    for row in rows[state:]:
        killed.add(row)
    assert killed.path.read_bytes() == whole.path.read_bytes()
    assert killed.read() == rows
    assert [path.name for path in killed.path.parent.iterdir()] == ["metrics.jsonl"]


def test_metrics_hold_plain_numbers(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "run")
    metrics.cut(0)
    assert metrics.read() == []
    metrics.add(
        {
            "step": 1,
            "a": torch.tensor(0.1, dtype=torch.float64),
            "b": np.float32(0.5),
            "c": float("nan"),
            "d": {"0-9": 1 / 3},
        }
    )
    assert metrics.read() == [{"step": 1, "a": 0.1, "b": 0.5, "c": None, "d": {"0-9": 1 / 3}}]
    (tmp_path / "file").touch()
    with pytest.raises(ImpromptError, match=r"cannot write .*metrics\.jsonl"):
        Metrics(tmp_path / "file").add({"step": 1})


def test_the_clock_counts_waiting_and_leaves_out_pauses() -> None:
    seconds = 100.0
    clock = Clock(lambda: seconds)
    for _ in range(2):  # the second lap starts anew
        for _ in range(4):
            with clock.waiting():
                seconds += 0.5
            seconds += 1.5
            clock.step(samples=6)
        with clock.paused():
            seconds += 1000
        assert clock.lap() == Pace(samples_per_second=3.0, step_seconds=2.0, data_wait=0.25)
    assert replace(ROW, **Pace(3.0, 2.0, 0.25)._asdict()).data_wait == 0.25


def test_peak_memory_is_in_gigabytes() -> None:
    held = torch.ones(50_000_000)
    peak = peak_memory_gb(held.device)
    assert 0.2 < peak < 1000
    del held
    assert peak_memory_gb(torch.device("cpu")) >= peak


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, last, loss in ((0, 6, 1.0), (4, 8, 2.0)):
        # stopped after step 6; the latest state was that of step 4
        (board,) = open_trackers(recipe(tmp_path, "tensorboard"), start, pytest.fail)
        for step in range(start + 1, last + 1):
            board.log(replace(ROW, step=step, loss=loss).scalars(), step)
            board.log_image("validation/grid", Image.new("RGB", (8, 6), "red"), step)
        board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (step, 1.0 if step <= 4 else 2.0) for step in range(1, 9)
    ]
    assert {"train/learning_rate", "train/data_wait", "loss/000-249", "snr_db/000-249"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Images("validation/grid")[-1].width == 8


def test_wandb_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    ids: list[str] = []

    def init(**options: Any) -> SimpleNamespace:
        ids.append(options["id"])
        assert options["resume"] == "allow"
        return SimpleNamespace(
            log=lambda values, step: calls.append((values, step)),
            finish=lambda: calls.append(("finish",)),
        )

    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=init, Image=lambda picture: picture.size)
    )
    for start in (0, 4, 0):
        (page,) = open_trackers(recipe(tmp_path / "run", "wandb"), start, pytest.fail)
    page.log({"train/loss": 1.0}, 5)
    page.log_image("grid", Image.new("RGB", (8, 6)), 5)
    page.close()
    assert calls == [({"train/loss": 1.0}, 5), ({"grid": (8, 6)}, 5), ("finish",)]
    assert ids[0] == ids[1] != ids[2]  # a run begun anew in the same folder is another one


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard.writer"), ("wandb", "wandb")]
)
def test_a_tracker_that_is_not_installed_is_one_warning(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    warnings: list[str] = []
    assert open_trackers(recipe(tmp_path, name), 0, warnings.append) == []
    (line,) = warnings
    assert name in line
    assert "pip install 'imprompt[" in line
    assert "\n" not in line


def test_a_tracker_that_cannot_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("no API key configured\nuse wandb login")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=None))
    with pytest.raises(SettingError, match=r"wandb cannot be started \(no API key configured\)"):
        open_trackers(recipe(tmp_path, "wandb"), 0, pytest.fail)


@contextmanager
def watched(terminal: bool) -> Iterator[tuple[ProgressWatcher, io.StringIO]]:
    out = io.StringIO()
    with ProgressWatcher(
        100, Console(file=out, force_terminal=terminal, force_interactive=terminal, width=100)
    ) as watcher:
        yield watcher, out


def test_without_a_terminal_there_are_plain_lines() -> None:
    with watched(terminal=False) as (watcher, out):
        for done in range(1, 41):
            watcher.encoded(done, 40)
        watcher.stepped(ROW)
        watcher.stepped(replace(ROW, step=100, samples_per_second=1.234, step_seconds=6.5, bad=3))
        watcher.saved(Path("run/step-0000025"))
        watcher.validated(
            Path("run/validation/step-0000025.png"), {"clip_i": 0.71234, "held_out_loss": 0.1}
        )
        watcher.warned("careful")
    assert out.getvalue().splitlines() == [
        *(f"encoded {done} of 40" for done in range(4, 41, 4)),
        "step 25 of 100  loss 0.1234  12 samples/s  650 ms/step  data wait 3%  1.2 GB  0:00:49 "
        "left",
        "step 100 of 100  loss 0.1234  1.23 samples/s  6.50 s/step  data wait 3%  1.2 GB  0:00:00 "
        "left  3 bad",
        "saved run/step-0000025",
        "validated run/validation/step-0000025.png  clip_i 0.7123  held_out_loss 0.1000",
        "warning: careful",
    ]


def test_many_bad_samples_do_not_flood() -> None:
    with watched(terminal=False) as (watcher, out):
        for number in range(1000):
            watcher.bad(BadSample(f"[{number}].png", "is empty"))
    lines = out.getvalue().splitlines()
    assert lines[0] == "bad sample [0].png: is empty"
    assert len(lines) == LISTED_BAD
    assert lines[-1].endswith("further ones are only counted")


def test_in_a_terminal_there_is_a_bar_and_its_numbers() -> None:
    with watched(terminal=True) as (watcher, out):
        watcher.encoded(3, 40)
        watcher.advanced(24)
        watcher.stepped(ROW)
        watcher.saved(Path("run/[red]step"))
    text = out.getvalue()
    assert "saved run/[red]step" in text
    assert all(
        part in text
        for part in ("encoding", "3/40", "training", "25/100", "loss 0.1234", "0:00:49 left")
    )
