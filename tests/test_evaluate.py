"""`imprompt evaluate run`: what its numbers are, and that neither kills nor ranks change one."""

import json
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from imprompt.errors import CheckpointError, ImageError, SettingError
from imprompt.evaluation.generator import Generator, reference_of
from imprompt.evaluation.metric_encoders import (
    PHOTO,
    MetricEncoder,
    open_clip,
    open_dino,
    open_inception,
)
from imprompt.evaluation.metrics import clip_score, cosine, frechet_distance
from imprompt.evaluation.plan import Chunk, Plan
from imprompt.evaluation.protocols import Protocol, settings_of
from imprompt.evaluation.report import write_comparison, write_report
from imprompt.evaluation.results import read_results
from imprompt.evaluation.run import Measure, evaluate
from imprompt.evaluation.sets import Item
from imprompt.evaluation.summary import distances, notes_on, of_rows
from imprompt.generation.pipeline import ImagePromptPipeline
from imprompt.models import PACKAGED
from imprompt.training.validation import Clip
from tests import commands
from tests.judges import tiny_clip, tiny_dino, tiny_dinov2, tiny_inception
from tests.ranks import CONTEXT, PATIENCE
from tests.tiny import pictures
from tests.tiny import seeded as drawn_from

SEEDS, STEPS, FIRST = 2, 2, 40
CAPTIONS = ["a red dot", "a green dot", ""]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)  # a run that goes on takes as many as it had


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of three pictures, two judges, and a finished run in "whole", made by one process."""
    place = tmp_path_factory.mktemp("evaluate")
    (place / "set").mkdir()
    lines = []
    for number, (background, caption) in enumerate(
        zip(("blue", "yellow", "white"), CAPTIONS, strict=True)
    ):
        picture = Image.new("RGB", (64, 64), background)
        picture.paste(("red", "green", "black")[number], (16, 16, 48, 48))
        picture.save(place / "set" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": caption}))
    (place / "set" / "metadata.jsonl").write_text("\n".join(lines))
    tiny_clip(place / "clip")
    tiny_dino(place / "dino")
    ended = commands.imprompt(arguments(place, "whole"), place / "notes")
    assert ended.code == 0, ended.said
    return place


def arguments(place: Path, out: str) -> list[str]:
    told = {
        "out": place / out,
        "clip": place / "clip",
        "dino": place / "dino",
        "steps": STEPS,
        "seeds": SEEDS,
        "seed": FIRST,
    }
    told |= {"batch-size": SEEDS, "device": "cpu", "sweep": "scale=0,1"}
    return [
        "evaluate",
        "run",
        str(place / "set"),
        *(word for name, value in told.items() for word in (f"--{name}", str(value))),
    ]


def plan(place: Path, out: str = "other", **changes: Any) -> Plan:
    values = {
        "steps": STEPS,
        "seeds": SEEDS,
        "seed": FIRST,
        "batch_size": SEEDS,
        "scale": 0.5,
        **changes.pop("protocol", {}),
    }
    how = Protocol(**values)
    asked: dict[str, Any] = {
        "path": place / "set",
        "out": place / out,
        "protocol": how,
        "clip": str(place / "clip"),
        "dino": str(place / "dino"),
        "device": "cpu",
        "sweep": {"scale": (0.0, 1.0)},
    }
    return Plan(**asked | changes)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_rows_say_what_was_made_and_measured(place: Path) -> None:
    rows, held = rows_of(place / "whole"), place / "whole"
    assert [(row["setting"], row["item"], row["number"]) for row in rows] == [
        (f"scale={scale}", str(item), number)
        for scale in (0, 1)
        for item in range(3)
        for number in range(SEEDS)
    ]
    assert [row["seed"] for row in rows[:6]] == [FIRST + picture for picture in range(6)]
    clip, dino = open_clip(str(place / "clip"), "cpu"), open_dino(str(place / "dino"), "cpu")
    assert clip.texts is not None
    for row in rows:
        assert row["reference"] == f"{row['item']}.png"  # from the set's folder
        files = held / row["image"], place / "set" / row["reference"]
        made, wanted = ([Image.open(path).convert("RGB")] for path in files)
        assert row["clip_i"] == pytest.approx(
            cosine(clip.images(made), clip.images(wanted)).item(), abs=2e-6
        )
        assert row["dino"] == pytest.approx(
            cosine(dino.images(made), dino.images(wanted)).item(), abs=2e-6
        )
        assert ("clip_t" in row) == bool(row["caption"])
        for name, prefix in (("", ""), ("_photo", PHOTO)) if row["caption"] else ():
            likeness = cosine(clip.images(made), clip.texts([prefix + row["caption"]]))
            assert row[f"clip_t{name}"] == pytest.approx(likeness.item(), abs=2e-6)
            assert row[f"clip_score{name}"] == pytest.approx(clip_score(likeness).item(), abs=5e-6)


def test_the_pictures_are_those_of_the_facade(place: Path) -> None:
    pipe = ImagePromptPipeline.from_pretrained("emoji", device="cpu")
    for row in rows_of(place / "whole")[-3:]:
        scale = float(row["setting"].removeprefix("scale="))
        again = pipe(
            place / "set" / row["reference"],
            row["caption"],
            scale=scale,
            steps=STEPS,
            seed=row["seed"],
        ).images[0]
        made = Image.open(place / "whole" / row["image"])
        assert np.abs(np.asarray(again).astype(int) - np.asarray(made)).max() <= 1


def test_the_summary_is_of_the_rows(place: Path) -> None:
    summary = json.loads((place / "whole" / "summary.json").read_text())
    rows = [row for row in rows_of(place / "whole") if row["setting"] == "scale=1"]
    told = summary["settings"][1]
    assert (told["name"], told["axes"], told["count"], told["items"]) == (
        "scale=1",
        {"scale": 1.0},
        6,
        3,
    )
    for key in ("clip_i", "dino", "diversity", "clip_t", "clip_score_photo"):
        values = [row[key] for row in rows if key in row]
        assert told["metrics"][key]["value"] == pytest.approx(sum(values) / len(values))
        assert (
            told["metrics"][key]["low"]
            <= told["metrics"][key]["value"]
            <= told["metrics"][key]["high"]
        )
    clip = open_clip(str(place / "clip"), "cpu")
    real, made = (
        clip.images([Image.open(path).convert("RGB") for path in paths])
        for paths in (
            dict.fromkeys(place / "set" / row["reference"] for row in rows),
            [place / "whole" / row["image"] for row in rows],
        )
    )
    assert told["metrics"]["fid"]["value"] == pytest.approx(frechet_distance(real, made), rel=1e-4)
    assert told["metrics"]["kid"]["low"] is None
    assert any("far too high" in note for note in summary["notes"])
    run = json.loads((place / "whole" / "run.json").read_text())
    assert summary["run"] == run
    assert [judge["key"] for judge in run["judges"]] == ["clip", "dino"]
    assert (
        run["protocol"] | {"steps": STEPS, "guidance": 3.0, "seeds": SEEDS, "seed": FIRST}
        == run["protocol"]
    )
    assert "whole/summary.json" in (place / "notes" / "out").read_text()


def parts(folder: Path) -> list[Path]:
    return sorted((folder / "parts").rglob("*.jsonl"))


def same_files(one: Path, other: Path) -> bool:
    names = [
        path.relative_to(one)
        for path in sorted(one.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    ]
    there = [
        path.relative_to(other)
        for path in sorted(other.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    ]
    return names == there and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def test_a_killed_run_goes_on_to_the_same_bytes(place: Path) -> None:
    notes = place / "killed-notes"
    notes.mkdir()
    for name in ("doing", "saves"):
        (notes / name).touch()
    process = CONTEXT.Process(
        target=commands.command, args=(arguments(place, "killed"), notes, None, {})
    )
    process.start()
    deadline = time.monotonic() + PATIENCE
    while len(parts(place / "killed")) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    first = parts(place / "killed")
    assert 2 <= len(first) < 6
    assert not (place / "killed" / "rows.jsonl").exists()
    before = {path: path.stat().st_mtime_ns for path in first}
    ended = commands.imprompt(arguments(place, "killed"), notes)
    assert ended.code == 0, ended.said
    assert {
        path: path.stat().st_mtime_ns for path in first
    } == before  # what was there was not made again
    assert same_files(place / "killed", place / "whole")


def test_two_ranks_make_the_same_bytes(place: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        notes = place / f"rank-{rank}"
        notes.mkdir()
        for name in ("doing", "saves"):
            (notes / name).touch()
        where = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "MASTER_PORT": port,
        }
        environment = {
            "MASTER_ADDR": "localhost",
            **{key: str(value) for key, value in where.items()},
        }
        processes.append(
            CONTEXT.Process(
                target=commands.command, args=(arguments(place, "ranks"), notes, None, environment)
            )
        )
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        process.kill()
    said = [(place / f"rank-{rank}" / "err").read_text() for rank in range(2)]
    assert [process.exitcode for process in processes] == [0, 0], said
    assert same_files(place / "ranks", place / "whole")
    assert (place / "rank-1" / "out").read_text() == ""


def test_a_folder_of_other_settings_is_refused(place: Path) -> None:
    with pytest.raises(
        SettingError,
        match=r"was started with protocol.scale = 0.5 \(now 0.25\): give another --out, or the old",
    ):
        evaluate(plan(place, "whole", protocol={"scale": 0.25}))
    with pytest.raises(
        SettingError,
        match=(
            r"started with judges.dino.key = 'dino' \(now None\), judges.dino.sha256 = .* "
            r"judges.dino.preprocessing = .* \(now None\): give"
        ),
    ):
        evaluate(plan(place, "whole", dino=None))


def test_a_finished_run_is_only_read(place: Path) -> None:
    shutil.copytree(place / "whole", place / "again")
    (place / "again" / "summary.json").unlink()
    done: list[tuple[int, int]] = []
    summary = evaluate(plan(place, "again", protocol={}), lambda *counts: done.append(counts))
    assert done == [(6, 6)]
    assert (
        summary["settings"]
        == json.loads((place / "whole" / "summary.json").read_text())["settings"]
    )


def test_what_is_left_of_a_run_is_never_taken_for_another(place: Path) -> None:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(place / "whole", place / name))

    headless = copied("headless")
    (headless / "run.json").unlink()
    with pytest.raises(
        SettingError,
        match=r"holds parts of a run, but no run.json that describes it: give another --out",
    ):
        evaluate(plan(place, "headless", protocol={}))
    for text in ("{}", "[]", "{", "null", "[" * 100_000, '{"judges": [1], "adapters": []}'):
        (headless / "run.json").write_text(text)
        with pytest.raises(SettingError, match=r"run.json is damaged \(.*give another --out"):
            evaluate(plan(place, "headless", protocol={}))
    cut = copied("cut")
    first = parts(cut)[0]
    first.write_text(first.read_text().splitlines()[0] + "\n")
    with pytest.raises(
        SettingError,
        match=rf"{first.name} is gone or damaged: delete .*{first.name}, and the same command",
    ):
        evaluate(plan(place, "cut", protocol={}))
    rows = [json.loads(line) for line in parts(place / "whole")[0].read_text().splitlines()]
    for row in ([1], {**rows[0], "clip_i": "high"}, {**rows[0], "item": 3}):
        first.write_text("".join(json.dumps(row) + "\n" for _ in rows))
        with pytest.raises(SettingError, match=rf"{first.name} is gone or damaged"):
            evaluate(plan(place, "cut", protocol={}))
    first.write_text(("[" * 100_000 + "\n") * len(rows))
    with pytest.raises(SettingError, match=rf"{first.name} is gone or damaged"):
        evaluate(plan(place, "cut", protocol={}))
    shutil.copy(parts(place / "whole")[0], first)
    embeddings = first.with_suffix(".safetensors")
    embeddings.write_bytes(embeddings.read_bytes()[:50])
    with pytest.raises(
        SettingError, match=rf"{embeddings.name} is gone or damaged: delete .*{first.name}, and"
    ):
        evaluate(plan(place, "cut", protocol={}))


def test_what_was_deleted_is_made_again(place: Path) -> None:
    held = Path(shutil.copytree(place / "whole", place / "deleted"))
    row = rows_of(held)[3]
    second, third = (parts(held)[number] for number in (2, 4))
    (held / row["image"]).unlink()
    second.with_suffix(".json").unlink()
    third.unlink()
    done: list[tuple[int, int]] = []
    evaluate(plan(place, "deleted", protocol={}), lambda *counts: done.append(counts))
    assert done == [(3, 6), (4, 6), (5, 6), (6, 6)]
    assert same_files(held, place / "whole")


def test_what_was_changed_is_never_taken_as_done(place: Path) -> None:
    held = Path(shutil.copytree(place / "whole", place / "edited"))
    row, first = rows_of(held)[0], parts(held)[0]
    assert row["sha256"] == sha256((held / row["image"]).read_bytes()).hexdigest()
    told = first.read_text()
    edits = {
        held / row["image"]: (held / rows_of(held)[1]["image"]).read_bytes(),
        first: told.replace(f'"clip_i": {row["clip_i"]}', '"clip_i": 0.999').encode(),
        first.with_suffix(".safetensors"): parts(held)[1].with_suffix(".safetensors").read_bytes(),
        first.with_suffix(".json"): b"[]",
    }
    for path, other in edits.items():
        before = path.read_bytes()
        assert before != other
        path.write_bytes(other)
        with pytest.raises(
            SettingError, match=rf"{path.name} is gone or damaged: delete .*{first.name}, and"
        ):
            evaluate(plan(place, "edited", protocol={}))
        assert path.read_bytes() == other  # nor was it replaced
        path.write_bytes(before)
    rows = held / "rows.jsonl"
    rows.write_text(rows.read_text().replace(f'"clip_i": {row["clip_i"]}', '"clip_i": 0.999'))
    with pytest.raises(SettingError, match=r"rows.jsonl was changed since the run: the same"):
        read_results(held)
    evaluate(plan(place, "edited", protocol={}))
    assert same_files(held, place / "whole")
    with pytest.raises(SettingError, match="set is one of the inputs"):
        evaluate(plan(place, "set"))


def test_a_page_names_no_folder_of_the_user(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    held = Path(shutil.copytree(place / "whole", tmp_path / "jane" / "whole"))
    monkeypatch.setenv("HOME", str(place.parent / "jane"))
    for path in (write_report(held), write_comparison(held, place / "whole", tmp_path / "a.html")):
        text = path.read_text()
        assert str(place) not in text
        assert str(tmp_path) not in text
        assert "set" in text


def test_files_that_a_kill_left_unfinished_go(place: Path) -> None:
    held = Path(shutil.copytree(place / "whole", place / "littered"))
    left = [
        held / "parts" / ".x.jsonl.1234.part",
        next((held / "images").iterdir()) / ".0-1.png.12.part",
    ]
    for path in left:
        path.touch()
    evaluate(plan(place, "littered", protocol={}))
    assert not any(path.exists() for path in left)


def test_another_schedule_is_another_run(place: Path) -> None:
    packaged = PACKAGED / "emoji"
    model = Path(shutil.copytree(packaged, place / "model"))
    adapter = str(model / "adapters" / "base.safetensors")
    one = plan(
        place,
        "scheduled",
        model=str(model),
        adapter=adapter,
        sweep={},
        protocol={"limit": 1, "steps": 1},
    )
    evaluate(one)
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.011"))
    with pytest.raises(
        SettingError, match=r"started with model.scheduler_config.beta_end = 0.012 \(now 0.011\)"
    ):
        evaluate(one)


def test_a_value_is_given_once(place: Path) -> None:
    ended = commands.imprompt([*arguments(place, "twice"), "--scale", "0.9"], place / "twice-notes")
    assert ended.code == 2
    assert "--scale and --sweep scale are both given: give one of them" in ended.said


def test_a_damaged_picture_is_named_before_anything_runs(place: Path) -> None:
    shutil.copytree(place / "set", place / "bad")
    (place / "bad" / "1.png").write_bytes((place / "bad" / "1.png").read_bytes()[:60])
    with pytest.raises(
        ImageError, match=rf"^{place}/bad/1.png is damaged.*; --skip-bad evaluates without$"
    ):
        evaluate(plan(place, "none", path=place / "bad"))
    assert not (place / "none").exists()


def colours(images: Sequence[Image.Image]) -> Tensor:
    return torch.tensor([np.asarray(image).mean((0, 1)).tolist() for image in images])


def test_references_take_turns_and_all_targets_count(tmp_path: Path) -> None:
    for name in ("red", "lime", "blue"):
        Image.new("RGB", (4, 4), name).save(tmp_path / f"{name}.png")
    red, green, blue = (tmp_path / f"{name}.png" for name in ("red", "lime", "blue"))
    item = Item("thing", (red, green), (red, blue), "a thing", "things")
    (setting,) = settings_of(Protocol(seeds=3, seed=7), {})
    judge = MetricEncoder("clip", "", "", "", colours, None)
    made = [Image.new("RGB", (4, 4), name) for name in ("red", "blue", "magenta")]
    rows, held = Measure({"clip": judge}, tmp_path)(
        Chunk(setting, [item], 2, tmp_path / "000001"), made
    )
    assert [row["reference"] for row in rows] == ["red.png", "lime.png", "red.png"]
    assert reference_of(item, 1) == green
    assert [row["seed"] for row in rows] == [13, 14, 15]  # 7 + 2 · 3 + k
    half = 2**-0.5
    assert [row["clip_i"] for row in rows] == pytest.approx([0.5, 0.5, half], abs=1e-6)
    assert [row["diversity"] for row in rows] == pytest.approx(
        [(2 - half) / 2, (2 - half) / 2, 1 - half], abs=1e-6
    )
    assert not any(key in rows[0] for key in ("clip_t", "dino"))
    assert held["clip.targets"].tolist() == [[255, 0, 0], [0, 0, 255]]
    (lone,) = settings_of(Protocol(seeds=1), {})
    assert (
        "diversity"
        not in Measure({"clip": judge}, tmp_path)(Chunk(lone, [item], 0, tmp_path), made[:1])[0][0]
    )


def test_a_sweep_over_adapters_changes_them_on_one_base(place: Path) -> None:
    swept = plan(
        place,
        sweep={"adapter": ("base", "plus"), "blocks": ("linear", "0")},
        protocol={"scheduler": "ddim"},
    )
    maker = Generator(swept, "cpu")
    base = maker.pipe.pipeline.unet
    settings = settings_of(swept.protocol, swept.sweep)
    assert [setting.name for setting in settings] == [
        f"adapter={adapter},blocks={blocks}"
        for adapter in ("base", "plus")
        for blocks in ("linear", "0")
    ]
    for setting in settings:
        maker.check(setting)
    item = Item("0", (place / "set" / "0.png",), (), "a red dot")
    made = [maker.make(setting, [item], 0) for setting in settings]
    assert maker.pipe.pipeline.unet is base
    assert np.array_equal(made[1], made[3])  # blocks 0: neither is heard
    assert not np.array_equal(made[0], made[2])
    config = maker.pipe.pipeline.scheduler.config
    assert type(maker.pipe.pipeline.scheduler).__name__ == "DDIMScheduler"
    assert not config.clip_sample
    plus = ImagePromptPipeline.from_pretrained("emoji", adapter="plus", device="cpu")
    assert config.prediction_type == plus.pipeline.scheduler.config.prediction_type
    plus.pipeline.scheduler = maker.pipe.pipeline.scheduler
    alone = plus(
        [item.references[0]] * 2, [item.caption] * 2, scale=0.5, steps=STEPS, seed=FIRST
    ).images
    assert np.array_equal(alone, made[2])
    with pytest.raises(SettingError, match="unknown blocks 'nowhere'"):
        maker.check(replace(settings[0], axes={"blocks": "nowhere"}))
    facts = maker.facts()
    assert [adapter["name"] for adapter in facts["adapters"]] == ["base", "plus"]
    assert len({adapter["sha256"] for adapter in facts["adapters"]}) == 2


def test_judges_are_known_by_their_weights(place: Path, tmp_path: Path) -> None:
    clip = open_clip(str(place / "clip"), "cpu")
    shutil.copytree(place / "clip", tmp_path / "copy")
    assert open_clip(str(tmp_path / "copy"), "cpu").sha256 == clip.sha256
    weights = tmp_path / "copy" / "model.safetensors"
    held = load_file(weights)
    from safetensors.torch import save_file

    save_file(held | {"logit_scale": held["logit_scale"] + 1}, weights, {"format": "pt"})
    assert open_clip(str(tmp_path / "copy"), "cpu").sha256 != clip.sha256
    dino = open_dino(str(place / "dino"), "cpu")
    with drawn_from(99):  # the head that its file lacks is drawn anew
        again = open_dino(str(place / "dino"), "cpu")
    assert dino.facts() == again.facts()
    shown = pictures(2)
    assert torch.equal(dino.images(shown), again.images(shown))
    assert open_dino(str(tiny_dinov2(tmp_path / "two")), "cpu").images(shown).shape == (2, 16)
    tower = open_clip("packaged:emoji/image_encoder", "cpu")
    assert (tower.texts, len(tower.images(shown))) == (None, 2)


def test_judges_of_fp16_weights_alone_are_found_by_themselves(place: Path, tmp_path: Path) -> None:
    """Folders with *.fp16.safetensors alone, as many are: here they hold the plain ones' values."""
    shown = pictures(2)
    for key, opened in (("clip", open_clip), ("dino", open_dino)):
        folder = Path(shutil.copytree(place / key, tmp_path / key))
        (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
        plain, other = opened(str(place / key), "cpu"), opened(str(folder), "cpu")
        assert other.sha256 == plain.sha256
        assert torch.equal(other.images(shown), plain.images(shown))
    measure = Clip(str(tmp_path / "clip"))  # training's validation
    wanted = open_clip(str(place / "clip"), "cpu").texts
    assert wanted is not None
    assert torch.equal(measure.texts(["a cat"]), wanted(["a cat"]))


def test_inceptions_features_are_taken_for_fid(tmp_path: Path) -> None:
    inception = open_inception(str(tiny_inception(tmp_path / "inception.pt")), "cpu")
    told = inception.images([Image.new("RGB", (3, 2), (255, 0, 51))])
    assert told.tolist() == [pytest.approx([1, 0, 0.2, 1, 0, 0.04])]
    with drawn_from(0):
        real, made = torch.rand(1500, 6), torch.rand(1500, 6) + 0.1
    whole = dict(distances(real, made))
    assert whole["fid"].value == pytest.approx(6 * 0.1**2, abs=0.01)
    assert whole["kid"].low is not None
    assert whole["kid"].low < whole["kid"].value < (whole["kid"].high or 0)
    assert list(notes_on(real, made, "inception")) == []
    assert [*distances(real[:1], made)] == []


@pytest.mark.parametrize(
    ("key", "source", "said"),
    [
        (
            "clip",
            "nowhere/at all",
            "--clip nowhere/at all: no CLIP can be loaded .*; give a CLIPModel's folder or Hub id",
        ),
        ("clip", "{}/dino", "it holds a vit, not a whole CLIP"),
        ("dino", "{}/clip", "--dino .*: no vision transformer can be loaded"),
        ("inception", "{}/clip/config.json", "--inception .*: no TorchScript can be loaded"),
        ("inception", "{}/none.pt", "there is no such file; give Inception's TorchScript file"),
    ],
)
def test_what_is_no_judge_is_reported_in_one_line(
    place: Path, key: str, source: str, said: str
) -> None:
    opened = {"clip": open_clip, "dino": open_dino, "inception": open_inception}[key]
    with pytest.raises(CheckpointError, match=said) as told:
        opened(source.format(place), "cpu")
    assert "\n" not in str(told.value)


def test_without_any_judge_nothing_runs(place: Path) -> None:
    with pytest.raises(SettingError, match="no judge is left"):
        evaluate(plan(place, "none", clip=None, dino=None))


def test_the_pictures_of_a_subject_are_resampled_together() -> None:
    rows = [
        {"item": f"{subject}-{n}", "group": subject, "clip_i": value}
        for subject, value in (("a", 0.0), ("b", 1.0))
        for n in range(50)
    ]
    alone = [{**row, "group": ""} for row in rows]
    (_, together), (_, apart) = next(iter(of_rows(rows))), next(iter(of_rows(alone)))
    assert (together.value, together.low, together.high) == (0.5, 0.0, 1.0)
    assert apart.low is not None
    assert apart.low > 0.35
