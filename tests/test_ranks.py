"""Runs on several processes: the steps of one process, every sample once an epoch, and ends that
can be gone on from.
"""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

from imprompt.errors import SettingError
from imprompt.files import lock_folder
from imprompt.training import endings
from imprompt.training.order import SampleIndex
from imprompt.training.recipe import Recipe
from imprompt.training.watch import Metrics
from tests import ranks
from tests.commands import KINDS, smallest_model, written
from tests.runs import COLOURS, losses, names, of_variant, picture_folder, recipe, tensors

CLOSE = 1e-5  # between one process and several, which sum gradients in another order
STEPS = 7  # of 4 samples: each of the seven is shown four times
AVERAGED = {
    "data": {"held_out": 2},
    "optimization": {"ema": 0.9, "accumulate": 2},
    "validation": {"shuffled_every": 4},
}
GOES_ON = r"The last good state is \S*step-0000004; the same command goes on from there$"


class Place:
    """A folder with a small model, a set of seven pictures, and runs by name."""

    def __init__(self, folder: Path, kind: str = "unet") -> None:
        self.folder = folder
        self.model = smallest_model(folder / "model", kind)
        self.set = picture_folder(folder / "set")

    def plan(self, name: str, steps: int = STEPS, save_every: int = 2, **groups: Any) -> Recipe:
        groups["data"] = {
            "size": 16,
            "features": self.folder / "features",
            **groups.get("data", {}),
        }
        groups["optimization"] = {"batch_size": 4, **groups.get("optimization", {})}
        return recipe(
            self.set,
            self.folder / name,
            steps,
            model=str(self.model),
            save_every=save_every,
            **groups,
        )

    def train(self, name: str, count: int, *changes: ranks.Change, **groups: Any) -> Path:
        """The folder of a run of so many processes, which ends well."""
        plan = self.plan(name, **groups)
        ended = ranks.train(plan, count, *changes)
        assert ended.codes == [0] * count, ended.said
        return plan.output

    def copy(self, run: Path, name: str) -> None:
        shutil.copytree(run, self.folder / name, symlinks=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(place: Place) -> Path:
    return place.train("alone", 1)


@pytest.fixture(scope="module")
def encoded(place: Place, alone: Path) -> Place:
    """The place after a run, which has encoded the features that others read."""
    assert (alone / "latest").exists()
    return place


@pytest.fixture(scope="module")
def pair(place: Place) -> Path:
    """The same on two processes, which also encode the features together."""
    return place.train("pair", 2, data={"features": place.folder / "features of two"})


@pytest.fixture(scope="module")
def killed(encoded: Place) -> tuple[Path, ranks.Ended]:
    """A run of two processes, one of which is killed in the sixth step, after the state of step
    4.
    """
    plan = encoded.plan("killed")
    return plan.output, ranks.train(plan, 2, ranks.Struck(1, 5))


def measured(run: Path) -> list[float]:
    """What a run logged, but for the times."""
    rows = Metrics(run).read()
    told = [
        row.get(key)
        for key in (
            *("step", "loss", "plain_loss", "grad_norm", "held_out_loss"),
            *("own_loss", "shuffled_loss"),
        )
        for row in rows
    ]
    return [value for value in told if value is not None] + [
        value for row in rows for _, value in sorted(row.get("by_timestep", {}).items())
    ]


def farthest(one: Path, other: Path) -> float:
    """The largest difference in what they logged and in their last states' weights."""
    logged = zip(measured(one), measured(other), strict=True)
    weights = zip(tensors(one / "latest"), tensors(other / "latest"), strict=True)
    found = max(abs(a - b) for a, b in logged), max((a - b).abs().max().item() for a, b in weights)
    print(
        f"\n{one.name} and {other.name}: {found[0]:.1e} in what was logged, {found[1]:.1e} in "
        "weights"
    )
    return max(found)


def test_two_processes_take_the_steps_of_one(alone: Path, pair: Path) -> None:
    assert len(losses(pair)) == STEPS
    assert names(alone) == names(pair)
    assert farthest(alone, pair) < CLOSE


@pytest.mark.slow
def test_as_many_processes_as_samples_take_the_steps_of_one(place: Place, alone: Path) -> None:
    four = place.train("four", 4)
    assert farthest(alone, four) < CLOSE
    assert [len(part[step]) for part in ranks.shown(four) for step in range(STEPS)] == [
        1
    ] * 4 * STEPS


def test_every_sample_is_shown_once_an_epoch(alone: Path, pair: Path) -> None:
    (whole,), parts = ranks.shown(alone), ranks.shown(pair)
    assert [[len(part[step]) for part in parts] for step in range(STEPS)] == [[2, 2]] * STEPS
    draws = [draw for step in range(STEPS) for part in parts for draw in part[step]]
    assert draws == [draw for step in range(STEPS) for draw in whole[step]]
    assert sorted(draws) == [
        SampleIndex(epoch, sample) for epoch in range(4) for sample in range(len(COLOURS))
    ]


def test_two_processes_take_the_buckets_of_one(place: Place) -> None:
    """From pictures, which other processes read ahead.

    None of the three shapes has samples for a whole batch, one is bad.
    """
    changes = {
        "features": None,
        "size": 32,
        "buckets": True,
        "bucket_step": 8,
        "flip": True,
        "workers": 1,
        "max_bad": 0.2,
    }
    picture = place.set / "5.png"
    whole_picture = picture.read_bytes()
    picture.write_bytes(whole_picture[:-30])
    one, two = (place.train(f"buckets of {count}", count, data=changes) for count in (1, 2))
    picture.write_bytes(whole_picture)
    assert farthest(one, two) < CLOSE
    bad = (one / "bad.jsonl").read_text()
    assert bad.count("5.png") == 1
    assert bad == (two / "bad.jsonl").read_text()
    (whole,), parts = ranks.shown(one), ranks.shown(two)
    assert all(
        [draw for part in parts for draw in part[step]] == whole[step] for step in range(STEPS)
    )
    shown = Counter(draw for step in range(STEPS) for draw in whole[step])
    assert set(shown.values()) == {1}
    for shape in range(3):  # pictures 0, 3 and 6 are of one shape, and so on
        epochs = [
            draw.epoch for step in range(STEPS) for draw in whole[step] if draw.sample % 3 == shape
        ]
        assert epochs == sorted(epochs)
        assert all(
            epochs.count(epoch) == len(range(shape, len(COLOURS), 3))
            for epoch in range(max(epochs))
        )


def test_a_killed_process_ends_the_run_with_one_line(killed: tuple[Path, ranks.Ended]) -> None:
    _, ended = killed
    assert ended.codes == [2, -signal.SIGKILL]
    assert re.match(
        r"imprompt: another process of this run has ended \([^\[].*\)\. " + GOES_ON, ended.said[0]
    )
    print(f"\nended {ended.between:.2f} s after the killed one")
    assert ended.between < 15


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    place: Place, pair: Path, killed: tuple[Path, ranks.Ended]
) -> None:
    """On as many processes bit for bit; on fewer too."""
    run, _ = killed
    place.copy(run, "killed, then alone")
    assert farthest(place.train("killed", 2), pair) == 0
    assert farthest(place.train("killed, then alone", 1), pair) < CLOSE


def test_a_terminated_run_goes_on_with_more_processes(place: Place, alone: Path) -> None:
    """It finishes the step that the signal met, the fifth, and saves its state."""
    ended = ranks.train(place.plan("terminated"), 1, ranks.Struck(0, 4, signal.SIGTERM))
    assert ended.codes == [128 + signal.SIGTERM]
    assert re.match(
        r"imprompt: this process was told to end \(SIGTERM\).*\. "
        + GOES_ON.replace("step-0000004", "step-0000005"),
        ended.said[0],
    )
    assert farthest(place.train("terminated", 2), alone) < CLOSE


def test_a_signal_to_one_process_saves_and_ends_all_at_one_step(place: Place, pair: Path) -> None:
    ended = ranks.train(place.plan("interrupted"), 2, ranks.Struck(1, 4, signal.SIGINT))
    assert ended.codes == [128 + signal.SIGTERM, 128 + signal.SIGINT]
    causes = ("another process of this run was told to end", r"this process .* \(Ctrl-C\)")
    for said, cause in zip(ended.said, causes, strict=True):
        goes_on = GOES_ON.replace("step-0000004", "step-0000005")
        assert re.match(rf"imprompt: {cause}\. {goes_on}", said)
    assert farthest(place.train("interrupted", 2), pair) == 0


def test_a_process_killed_while_features_are_encoded_ends_the_run(place: Place) -> None:
    changes = {"data": {"features": place.folder / "features of one killed"}}
    ended = ranks.train(place.plan("killed encoding", **changes), 2, ranks.killed_encoding)
    assert ended.codes == [2, -signal.SIGKILL]
    assert re.match(
        r"imprompt: another process.*\. No state was saved yet; the same command starts again$",
        ended.said[0],
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_at_once(place: Place, alone: Path) -> None:
    """While the processes that read ahead for it have not yet noticed."""
    changes = {"data": {"workers": 2}}
    assert ranks.train(place.plan("at once", **changes), 1, ranks.Struck(0, 5)).codes == [
        -signal.SIGKILL
    ]
    assert farthest(place.train("at once", 1, **changes), alone) == 0


def test_a_folder_is_written_by_one_run(tmp_path: Path) -> None:
    first = lock_folder(tmp_path, "training into")
    with pytest.raises(SettingError, match="another process is training into"):
        lock_folder(tmp_path, "training into")
    first.release()
    lock_folder(tmp_path, "training into").release()


@pytest.mark.usefixtures("alone")
def test_a_loss_that_is_no_number_on_one_process_stops_all(place: Place) -> None:
    plan = place.plan("spoiled")
    ended = ranks.train(plan, 2, ranks.Spoiled(1, 4))
    assert ended.codes == [2, 2]
    spoiled = ranks.shown(plan.output)[1][4]
    for said in ended.said:
        assert re.search(r"the loss of step 5 is nan; its samples: .*\. " + GOES_ON, said)
        assert all(f"{draw.sample}.png" in said for draw in spoiled)


def test_a_batch_that_cannot_be_shared_is_one_line(place: Place) -> None:
    ended = ranks.train(place.plan("odd", optimization={"batch_size": 6, "accumulate": 2}), 2)
    assert ended.codes == [2, 2]
    line = (
        "imprompt: optimization.batch_size = 6 cannot be shared by 2 processes in 2 parts each: "
        "give a multiple of 4"
    )
    assert ended.said == [line, line]


@pytest.fixture(scope="module", params=["adamw", "muon"])
def averaging(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """What these runs share, by optimizer."""
    return AVERAGED | {"optimization": AVERAGED["optimization"] | {"optimizer": request.param}}


@pytest.fixture(scope="module")
def averaged(encoded: Place, averaging: dict[str, Any]) -> Path:
    return encoded.train(f"averaged, {averaging['optimization']['optimizer']}", 1, **averaging)


@pytest.fixture(scope="module")
def sharded(encoded: Place, averaging: dict[str, Any]) -> Path:
    return encoded.train(
        f"sharded, {averaging['optimization']['optimizer']}", 2, ranks.sharded, **averaging
    )


def test_two_processes_take_the_steps_of_one_with_muon(encoded: Place) -> None:
    changes = {"optimization": {"optimizer": "muon"}}
    assert (
        farthest(encoded.train("muon", 1, **changes), encoded.train("muon of two", 2, **changes))
        < CLOSE
    )


def test_sharded_weights_take_the_steps_of_one_process(averaged: Path, sharded: Path) -> None:
    assert farthest(averaged, sharded) < CLOSE
    assert names(averaged) == names(sharded)


@pytest.mark.parametrize("changes", [(), (ranks.sharded,)], ids=["two", "sharded"])
def test_two_processes_take_the_steps_of_one_with_faces(
    changes: tuple[ranks.Change, ...], place: Place
) -> None:
    """The low-rank part is in every attention; held-out losses use the weights of their step."""
    plan = of_variant("faceid", place.set) | AVERAGED
    plan["data"] = plan["data"] | {"features": place.folder / "features of faces"}
    name = f"faces by {len(changes)}"
    one, two = place.train(f"{name}, one", 1, **plan), place.train(name, 2, *changes, **plan)
    logged = zip(measured(one), measured(two), strict=True)
    assert max(abs(a - b) for a, b in logged) < CLOSE
    # A single weight, of W'_v, has gradients so near AdamW's epsilon that their rounding shows: it
    # differs by 3e-5 of the 7e-3 that seven steps can move it; all others are within 1e-6.
    assert farthest(one, two) < 1e-4


@pytest.mark.slow
def test_parts_of_the_batches_of_two_processes_take_the_steps_of_one(
    place: Place, averaging: dict[str, Any], averaged: Path
) -> None:
    assert farthest(place.train(f"{averaged.name} by two", 2, **averaging), averaged) < CLOSE


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (2, 2),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(1, 2, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_run_goes_on(
    before: int, after: int, place: Place, averaging: dict[str, Any], averaged: Path, sharded: Path
) -> None:
    """Also as one process, and one process's run sharded: a state is the same whoever wrote it."""
    name, changes = f"{sharded.name} on {before}, then {after}", {1: (), 2: (ranks.sharded,)}
    ended = ranks.train(
        place.plan(name, **averaging), before, *changes[before], ranks.Struck(before - 1, 5)
    )
    assert ended.codes == [2] * (before - 1) + [-signal.SIGKILL]
    run = place.train(name, after, *changes[after], **averaging)
    assert farthest(run, averaged) < CLOSE
    if before == after:
        assert farthest(run, sharded) == 0


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "flux"),
        "flux",
    ],
)
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place with a transformer, after a run of one process."""
    place = Place(tmp_path_factory.mktemp(request.param), request.param)
    place.train("alone", 1, **AVERAGED)
    return place


@pytest.mark.parametrize("changes", [(), (ranks.sharded,)], ids=["two", "sharded"])
def test_transformers_train_on_several_processes_as_on_one_and_go_on(
    changes: tuple[ranks.Change, ...], other: Place
) -> None:
    """A killed run goes on bit for bit."""
    whole = other.train(f"whole by {len(changes)}", 2, *changes, **AVERAGED)
    assert farthest(whole, other.folder / "alone") < CLOSE
    name = f"killed by {len(changes)}"
    ended = ranks.train(other.plan(name, **AVERAGED), 2, *changes, ranks.Struck(1, 5))
    assert ended.codes == [2, -signal.SIGKILL]
    assert farthest(other.train(name, 2, *changes, **AVERAGED), whole) == 0


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] "
NCCL = "NCCL error in: /pytorch/NCCLUtils.hpp:268, "
RANK, READER, SELF = (
    "another process of this run has ended",
    "a process that reads samples has ended",
    "this process was told to end",
)


@pytest.mark.parametrize(
    ("error", "who"),
    [
        (RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:26446"), RANK),
        (RuntimeError(GLOO + "Read error [127.0.0.1]:35758: Connection reset by peer."), RANK),
        (RuntimeError(GLOO + "Timed out waiting 1800000ms for recv operation to complete"), RANK),
        (DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), RANK),
        (DistStoreError("wait timeout after 300000ms, keys: /x"), RANK),
        (
            DistBackendError(
                NCCL + "remote process exited or there was a network error, NCCL version 2.21.5"
            ),
            RANK,
        ),
        (DistBackendError("NCCL communicator was aborted on rank 0."), RANK),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), READER),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), READER),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. "), SELF),
        (DistBackendError(NCCL + "invalid usage. Duplicate GPU detected"), None),
        (
            DistNetworkError(
                "The server socket has failed to listen on any local network address. EADDRINUSE"
            ),
            None,
        ),
        (RuntimeError(GLOO + "op.preamble.length <= op.nbytes. 8 vs 4"), None),
        (RuntimeError("CUDA out of memory. NCCL's buffers take 2 GB"), None),
        (RuntimeError("unable to open shared memory object: Broken pipe"), None),
    ],
)
def test_the_end_of_a_process_is_reported_from_other_errors(
    error: RuntimeError, who: str | None
) -> None:
    assert str(endings.end_of_another(error)).startswith(str(who))


class Launched(NamedTuple):
    """How a launcher ended."""

    code: int
    said: str  # on standard error
    seconds: float  # from the kill


def launch(plan: Recipe, kill: int | None = None) -> Launched:
    """`torchrun --nproc-per-node 2 --no-python imprompt train RECIPE`.

    Rank `kill` is killed when step 15 is logged.
    """
    file, programs = written(plan, plan.output.with_suffix(".toml")), Path(sys.executable).parent
    said, told = plan.output.with_suffix(".err"), plan.output.with_suffix(".out")
    arguments = [
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
        str(programs / "imprompt"),
        "train",
        str(file),
    ]
    with said.open("w") as err, told.open("w") as out:
        launcher = psutil.Popen([str(programs / "torchrun"), *arguments], stdout=out, stderr=err)
        began = time.monotonic()
        if kill is not None:
            while "step 15 of" not in told.read_text() and launcher.poll() is None:
                time.sleep(0.01)
            began = time.monotonic()
            next(
                child for child in launcher.children() if child.environ()["RANK"] == str(kill)
            ).kill()
        try:
            code = launcher.wait(ranks.PATIENCE)
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            for process in (launcher, *launcher.children()):
                process.kill()
            raise
    return Launched(code, said.read_text(), time.monotonic() - began)


LONG: dict[str, Any] = {"steps": 30, "save_every": 10, "data": {"workers": 1}}


@pytest.fixture(scope="module")
def long(encoded: Place) -> Path:
    """A longer run under torchrun, that is left alone."""
    plan = encoded.plan("long", **LONG)
    assert launch(plan).code == 0
    return plan.output


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_under_torchrun_ends_and_goes_on(rank: int, place: Place, long: Path) -> None:
    plan = place.plan(f"long, {rank} killed", **LONG)
    ended = launch(plan, rank)
    assert ended.code != 0
    assert re.search(
        r"^imprompt: .*The last good state is \S.*step-0000010; the same command", ended.said, re.M
    )
    assert ended.seconds < 40
    print(f"\nended {ended.seconds:.1f} s after the kill")
    place.copy(plan.output, f"long, {rank} killed, then alone")
    again = launch(plan)
    assert again.code == 0, again.said
    assert farthest(plan.output, long) == 0
    assert farthest(place.train(f"long, {rank} killed, then alone", 1, **LONG), long) < CLOSE
