"""A thousand samples of which a few cannot be used: training names and counts these, and goes on
unless they are too many.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imprompt.errors import ImpromptError
from imprompt.training import loop
from imprompt.training.recipe import Data, Recipe
from imprompt.training.samples import BadSample
from imprompt.training.shards import TarIndex
from imprompt.training.watch import Metrics, Watcher
from tests.commands import imprompt, smallest_model, written
from tests.runs import begun, recipe
from tests.sets import Item, damaged, items, make_folder, make_list, make_shards

COUNT, BATCH = 1000, 50
EPOCH = COUNT // BATCH  # steps
DAMAGE = {13: "truncated", 207: "empty", 431: "not an image", 655: "absent", 862: "no caption"}
PER_SHARD, CUT_SHARD, NO_TAR, ABSENT_TAR = 2, 120, 250, 333
Reasons = dict[str, str]  # name -> what is said of it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smallest_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def samples() -> list[Item]:
    return damaged(items(COUNT, (20, 16)), DAMAGE)


def folder(at: Path, samples: list[Item]) -> tuple[Data, Reasons]:
    return make_folder(at, samples), reasons(lambda n: f"{at}/{n:04}.png")


def listing(at: Path, samples: list[Item]) -> tuple[Data, Reasons]:
    return make_list(at, samples), reasons(lambda n: f"{at}/pictures/{n:04}.png")


def shards(at: Path, samples: list[Item]) -> tuple[Data, Reasons]:
    """A shard too is cut off within its last sample, one is no tar, one is not there."""
    made = make_shards(at, samples, PER_SHARD)
    cut, no_tar, absent = (at / f"{number:04}.tar" for number in (CUT_SHARD, NO_TAR, ABSENT_TAR))
    start, size = TarIndex(cut).members(PER_SHARD - 1)["png"]
    cut.write_bytes(cut.read_bytes()[: start + size // 2])
    no_tar.write_bytes(b"<html>404 Not Found</html>" * 100)
    absent.unlink()
    why = reasons(lambda n: f"{n:04} in {at}/{n // PER_SHARD:04}.tar")
    last = PER_SHARD * (CUT_SHARD + 1) - 1
    return made, why | {
        f"{last:04} in {cut}": "cut off",
        str(no_tar): "is not a tar file",
        str(absent): "does not exist",
    }


def features(at: Path, samples: list[Item]) -> tuple[Data, Reasons]:
    """Of the shards."""
    made, why = shards(at, samples)
    return made.model_copy(update={"features": at / "features"}), why


SOURCES: dict[str, Callable[[Path, list[Item]], tuple[Data, Reasons]]] = {
    "folder": folder,
    "list": listing,
    "shards": shards,
    "features": features,
}
SAID = {
    "truncated": "image file is truncated",
    "empty": "is empty",
    "not an image": "is not a picture of a known format",
    "absent": "does not exist|holds no picture",
    "no caption": "has no caption",
}


def reasons(name: Callable[[int], str]) -> Reasons:
    return {name(number): SAID[kind] for number, kind in DAMAGE.items()}


def plan(
    made: Data,
    output: Path,
    model: Path,
    steps: int,
    batch: int = BATCH,
    save_every: int = EPOCH,
    **data: Any,
) -> Recipe:
    """A run on a set that was made. `data`: keys of the recipe's data."""
    own = {"size": 16, **made.model_dump(include={"root", "features"}), **data}
    changes = {"model": str(model), "save_every": save_every, "optimization": {"batch_size": batch}}
    return recipe(made.source, output, steps, data=own, **changes)


class Reported(Watcher):
    def __init__(self) -> None:
        self.names: list[str] = []

    def bad(self, sample: BadSample) -> None:
        self.names.append(sample.name)


def known(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "bad.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("source", SOURCES)
def test_each_bad_sample_is_named_once_and_training_goes_on(
    source: str, samples: list[Item], model: Path, tmp_path: Path
) -> None:
    data, why = SOURCES[source](tmp_path / "set", samples)
    run, told = tmp_path / "run", Reported()
    loop.train(plan(data, run, model, EPOCH, workers=source == "list"), told)
    rows = known(run)
    assert sorted(row["name"] for row in rows) == sorted(told.names) == sorted(why)
    assert all(re.search(why[row["name"]], row["why"]) for row in rows)
    counts = [row["bad"] for row in Metrics(run).read()]
    assert counts == [
        sum(row["samples"] for row in rows if row["step"] <= step) for step in range(1, EPOCH + 1)
    ]
    assert (
        counts[0]
        < counts[-1]
        == len(DAMAGE) + (1 + 2 * PER_SHARD if source in ("shards", "features") else 0)
    )
    loop.train(plan(data, run, model, EPOCH + 2), told)
    assert known(run) == rows
    assert [row["bad"] for row in Metrics(run).read()] == counts + 2 * counts[-1:]


@pytest.mark.parametrize(
    ("source", "max_bad", "words"),
    [
        (
            "folder",
            0.002,
            "3 of 1,000 samples cannot be used, more than data.max_bad = 0.002 allows; all of them "
            "are in ",
        ),
        # 2 shards
        (
            "shards",
            0.003,
            "4 of 1,000 samples cannot be used, more than data.max_bad = 0.003 allows; all of them "
            "are in ",
        ),
    ],
)
def test_more_bad_samples_than_allowed_stop_a_run(
    source: str, max_bad: float, words: str, samples: list[Item], model: Path, tmp_path: Path
) -> None:
    data, why = SOURCES[source](tmp_path / "set", samples)
    with pytest.raises(ImpromptError) as told:
        loop.train(plan(data, tmp_path / "run", model, COUNT // 10, batch=10, max_bad=max_bad))
    said, rows = str(told.value), known(tmp_path / "run")
    assert said.startswith(words + str(tmp_path / "run" / "bad.jsonl"))
    assert "\n" not in said
    assert f"{sum(row['samples'] for row in rows)} of 1,000" in words
    assert all(f"{row['name']}: {row['why']}" in said for row in rows)
    assert all(re.search(why[row["name"]], row["why"]) for row in rows)


def test_a_set_that_was_repaired_trains(model: Path, tmp_path: Path) -> None:
    whole = items(12, (20, 16))
    data = make_folder(tmp_path / "set", damaged(whole, {3: "empty", 4: "absent"}))
    asked = plan(data, tmp_path / "run", model, 4, batch=6, max_bad=0.1)
    with pytest.raises(ImpromptError, match="2 of 12 samples cannot be used"):
        loop.train(asked)
    make_folder(tmp_path / "set", whole)
    loop.train(asked)
    assert known(tmp_path / "run") == []
    assert [row["bad"] for row in Metrics(tmp_path / "run").read()] == [0] * 4


def test_a_bad_sample_among_the_held_out_is_named(model: Path, tmp_path: Path) -> None:
    data = make_folder(tmp_path / "set", items(12, (20, 16)))
    run = begun(
        plan(data, tmp_path / "run", model, 4, batch=6, save_every=2, max_bad=0.1, held_out=5)
    )
    name = run.data_pipeline.reader.name(run.data_pipeline.held_out[2])
    Path(name).write_bytes(b"")
    run.go()
    run.close()
    assert [(row["step"], row["name"]) for row in known(tmp_path / "run")] == [(2, name)]
    assert [row["bad"] for row in Metrics(tmp_path / "run").read() if "bad" in row] == [0, 0, 1, 1]


def empty(at: Path) -> Data:
    return make_folder(at, damaged(items(20, (20, 16)), {2: "empty"}))


def no_tar(at: Path) -> Data:
    made = make_shards(at, 20, PER_SHARD, size=(20, 16))
    (at / "0001.tar").write_bytes(b"no tar")
    return made


def no_tar_encoded(at: Path) -> Data:
    return no_tar(at).model_copy(update={"features": at / "features"})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (empty, ["1 of 20 samples cannot be used, .*0002.png: the file is empty"]),
        (no_tar, ["2 of 20 samples cannot be used, .*0001.tar: is not a tar file"]),
        (
            no_tar_encoded,
            [
                r"2 of 20 samples are bad \(1 no tar\), .*manifest.json, the first: .*0001.tar: is "
                r"not a tar file",
                # the same command again
                "2 of 20 samples cannot be used, .*bad.jsonl, the first: .*0001.tar: is not a tar "
                "file",
            ],
        ),
    ],
)
def test_the_command_says_so_in_one_line(
    make: Callable[[Path], Data], words: list[str], model: Path, tmp_path: Path
) -> None:
    asked = written(
        plan(make(tmp_path / "set"), tmp_path / "run", model, 4, batch=10), tmp_path / "recipe.toml"
    )
    for line in words:
        ended = imprompt(["train", str(asked)], tmp_path / "notes")
        assert ended.code == 2
        assert re.fullmatch(f"imprompt: {line}.*\n", ended.said)
