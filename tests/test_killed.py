"""kill -9 at any moment, then the same command again: every loss and the last weights are those of
a run that was left alone.
"""

import json
import os
import shutil
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from imprompt.checkpoints.adapters import read_adapter
from imprompt.training.recipe import Recipe
from imprompt.training.state import save_state
from imprompt.training.watch import Metrics
from tests.commands import (
    CONTEXT,
    KINDS,
    After,
    Ended,
    Events,
    Saving,
    command,
    imprompt,
    smallest_model,
    written,
)
from tests.ranks import PATIENCE, before
from tests.runs import names, recipe, stored_faces, tensors
from tests.sets import MAKERS, damaged, items

FILES = ["adapter.safetensors", "state.json", "training.pt"]
STEPS, SAMPLES, BATCH = 12, 14, 3
# of a row: no two runs share them
TIMES = {"samples_per_second", "step_seconds", "data_wait", "peak_memory_gb"}
# Source -> what else its run does.
SOURCES: dict[str, dict[str, Any]] = {
    "folder": {},
    "list": {"data": {"workers": 1}},
    "shards": {"save_every": 2, "optimization": {"accumulate": 3}},
    "hub": {"keep": 1},
    "features": {"data": {"flip": True}, "optimization": {"optimizer": "muon"}},
    "faces": {"variant": "faceid", "rank": 2, "validation": {"shuffled_every": 5}},
    **{kind: {"validation": {"shuffled_every": 5}} for kind in KINDS},
}
Plan = Callable[[str], Recipe]  # of the run of that name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Small models, saved when they are asked for: a UNet's, or that of a kind of transformers."""
    return cache(lambda kind: smallest_model(tmp_path_factory.mktemp(kind), kind))


@pytest.fixture(scope="module")
def model(models: Callable[[str], Path]) -> Path:
    return models("unet")


def plans(source: str, model: Path, at: Path) -> Plan:
    """The recipes of runs that differ in nothing but their folders.

    One sample of the set is bad.
    """
    made = MAKERS.get(source, MAKERS["folder"])(
        at / "set", damaged(items(SAMPLES, (24, 20)), {4: "truncated"})
    )
    other = SOURCES[source]
    data = {"size": 16, "held_out": 2, "max_bad": 0.1, "root": made.root, **other.get("data", {})}
    optimization = {"batch_size": BATCH, "ema": 0.9, **other.get("optimization", {})}
    changes = {"save_every": 1, **other, "optimization": optimization, "model": str(model)}
    if source == "faces":
        changes["faces"] = str(stored_faces(at / "set"))

    def plan(name: str) -> Recipe:
        features = at / f"{name}-features" if source == "features" else None
        return recipe(
            made.source, at / name, STEPS, **{**changes, "data": {**data, "features": features}}
        )

    return plan


def attempt(plan: Recipe, kill: After | Saving | None = None) -> Ended:
    """Start `imprompt train`; what is beside the run's folder is made by this run too."""
    beside = {
        kind: plan.output.with_name(f"{plan.output.name}{kind}")
        for kind in (".toml", "-notes", "-hub")
    }
    arguments = ["train", str(written(plan, beside[".toml"]))]
    return imprompt(arguments, beside["-notes"], kill, {"HF_DATASETS_CACHE": str(beside["-hub"])})


@dataclass
class Toll:
    """What became of a run's attempts."""

    kills: Counter[str] = field(default_factory=Counter)  # by what was being done
    runs: int = 0  # that came to their end
    resumes: int = 0

    def __str__(self) -> str:
        doing = ", ".join(f"{number} {what}" for what, number in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({doing}), {self.resumes} resumes, {self.runs} whole runs"
        )


def survive(plan: Plan, whole: Path, moments: Iterator[After | Saving], kills: int) -> Toll:
    """Kill runs at these moments, start each again until it ends, and compare it with the whole
    one.
    """
    toll = Toll()
    while toll.kills.total() < kills:
        run = plan(f"run-{toll.runs}")
        while True:
            toll.resumes += (run.output / "latest").exists()
            ended = attempt(run, next(moments) if toll.kills.total() < kills else None)
            if ended.code == 0:
                break
            assert ended.code == -9, ended.said
            toll.kills[ended.doing] += 1
            assert_states_are_whole(run.output)
        assert_same(whole, run.output)
        toll.runs += 1
    return toll


def moments(random: Random, seconds: float, saves: list[list[int]]) -> Iterator[After | Saving]:
    """Anywhere in a run of so many seconds, and in its first two savings: at the disk's events, and
    at any.
    """
    disk, every = (2 * sum(numbers) // len(numbers) for numbers in zip(*saves, strict=True))
    while True:
        yield Saving(random.randint(1, disk), disk=True)
        yield After(random.uniform(0, seconds))
        yield Saving(random.randint(1, every), disk=False)
        yield After(random.uniform(0, seconds))


def assert_states_are_whole(run: Path) -> None:
    """All that look like one."""
    for folder in run.glob("step-*"):
        assert names(folder) == FILES
        assert tensors(folder)
        assert torch.load(folder / "training.pt", weights_only=True)
    for link in (run / "latest", run / "best"):
        assert link.exists() == link.is_symlink()


def assert_same(whole: Path, run: Path) -> None:
    """Bit for bit, but for the times.

    A run that was killed as it dropped old states keeps these.
    """
    assert shown(run) >= shown(whole)
    rows = told(run)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert rows == told(whole)
    assert (run / "bad.jsonl").read_text() == (whole / "bad.jsonl").read_text()
    for folder in ("latest", "best"):
        assert (run / folder).resolve().name == (whole / folder).resolve().name
        assert_equal(*(kept(path / folder) for path in (run, whole)))


def shown(run: Path) -> set[str]:
    return {name for name in names(run) if not name.startswith(".")}


def told(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in Metrics(run).read()
    ]


def kept(state: Path) -> list[Any]:
    """What a state holds, without the recipe, which names its folder."""
    facts = json.loads((state / "state.json").read_text())
    facts.pop("recipe")
    assert sorted(facts.pop("files")) == ["adapter.safetensors", "training.pt"]
    adapter = read_adapter(state)
    return [
        facts,
        adapter.header,
        adapter.tensors,
        torch.load(state / "training.pt", weights_only=True),
    ]


def assert_equal(ours: Any, theirs: Any) -> None:
    """Nested dictionaries and sequences of tensors and plain values."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        assert_equal(list(ours.values()), list(theirs.values()))
    elif isinstance(ours, list | tuple):
        for own, other in zip(ours, theirs, strict=True):
            assert_equal(own, other)
    else:
        assert ours == theirs


def trial(source: str, model: Path, at: Path, kills: int) -> Toll:
    plan = plans(source, model, at)
    alone = [attempt(plan(name)) for name in ("whole", "twin")]
    assert all(ended.code == 0 for ended in alone), alone
    assert_same(at / "whole", at / "twin")
    random, seconds = Random(zlib.crc32(source.encode())), min(ended.seconds for ended in alone)
    return survive(plan, at / "whole", moments(random, seconds, alone[0].saves), kills)


@pytest.mark.parametrize("source", ["shards", "features", "faces"])
def test_a_killed_run_ends_as_if_it_had_not_been(source: str, model: Path, tmp_path: Path) -> None:
    toll = trial(source, model, tmp_path, kills=3)
    assert toll.kills["saving"]


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_twenty_kills_change_nothing(
    source: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    toll = trial(source, models(source if source in KINDS else "unet"), tmp_path, kills=20)
    assert toll.kills["saving"] >= 5
    print(f"\n{source}: {toll}")


def struck(arguments: Sequence[str], notes: Path, signals: Sequence[int]) -> None:
    """A command that gets these signals in its fourth step, as a terminal sends them: the processes
    that read ahead get them too.
    """
    os.setsid()

    def strike(parts: Iterable[Any]) -> Iterable[Any]:
        for number in signals:
            os.killpg(0, number)
        return parts

    before(3, strike)
    command(arguments, notes, None, {})


@pytest.mark.parametrize(
    ("signals", "saved"),
    [
        ([signal.SIGINT], True),
        ([signal.SIGTERM], True),
        ([signal.SIGINT, signal.SIGINT], False),
        ([signal.SIGTERM, signal.SIGINT], False),
    ],
    ids=["ctrl-c", "sigterm", "ctrl-c twice", "both"],
)
def test_the_first_signal_saves_and_the_second_ends_at_once(
    signals: list[int], saved: bool, model: Path, tmp_path: Path
) -> None:
    plan = plans("list", model, tmp_path)("run").model_copy(update={"save_every": 100})
    arguments = ["train", str(written(plan, tmp_path / "run.toml"))]
    notes = tmp_path / "notes"
    notes.mkdir()
    for name in ("doing", "saves"):
        (notes / name).touch()
    process = CONTEXT.Process(target=struck, args=(arguments, notes, signals))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 128 + signals[0]
    finishing, *_, last = (notes / "err").read_text().splitlines()
    assert finishing.startswith("imprompt: finishing this step, then saving")
    if saved:
        assert last.endswith(f"{plan.output}/step-0000004; the same command goes on from there")
    else:
        assert last.endswith("No state was saved yet; the same command starts again")
        assert not list(plan.output.glob("*step-*"))
    assert attempt(plan).code == 0
    said = (tmp_path / "run-notes" / "out").read_text()
    assert ("resumed at step 4 of 12 from" in said) == saved
    steps = [row["step"] for row in told(plan.output) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))


def save(run: Path, step: int, loss: float) -> None:
    """A small state."""
    files: dict[str, Callable[[Path], Any]] = {
        "adapter.safetensors": lambda path: save_file({"weight": torch.full((4,), step)}, path),
        "training.pt": lambda path: torch.save({"step": step}, path),
    }
    save_state(run, step, files, {"held_out_loss": loss}, keep=1)


def save_and_die(run: Path, event: int) -> None:
    """At that of the disk's events."""
    sys.setprofile(Events(Saving(event, disk=True)))
    save(run, 3, loss=1.0)
    sys.setprofile(None)


def test_saving_can_be_killed_at_each_call_that_changes_the_disk(tmp_path: Path) -> None:
    save(tmp_path / "before", 1, loss=2.0)  # the best so far
    save(tmp_path / "before", 2, loss=3.0)
    latest = []
    for event in count(1, 2):  # calls; a return and the next call are the same to the disk
        run = shutil.copytree(tmp_path / "before", tmp_path / str(event), symlinks=True)
        process = CONTEXT.Process(target=save_and_die, args=(run, event))
        process.start()
        process.join()
        for link, steps in (("latest", (2, 3)), ("best", (1, 3))):
            step = torch.load(run / link / "training.pt", weights_only=True)["step"]
            assert step in steps
            assert (run / link).resolve().name == f"step-{step:07d}"
        assert all(names(folder) == FILES for folder in run.glob("step-*"))
        latest.append(json.loads((run / "latest" / "state.json").read_text())["step"])
        if process.exitcode == 0:
            break
        assert process.exitcode == -9
        save(run, 3, loss=1.0)
        assert names(run) == ["best", "latest", "step-0000003"]
    assert latest == sorted(latest)
    assert latest[0] == 2
    assert len(latest) > 20


def test_a_state_that_nothing_points_to_does_not_push_out_the_latest(tmp_path: Path) -> None:
    save(tmp_path, 2, loss=1.0)
    save(tmp_path, 6, loss=2.0)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("step-0000002")  # as if killed before it pointed to step 6
    save(tmp_path, 4, loss=3.0)  # it goes on, told to save at other steps
    assert (tmp_path / "latest").resolve() == tmp_path / "step-0000004"
    assert names(tmp_path / "latest") == FILES
