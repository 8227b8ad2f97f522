"""What the commands write tells nobody where it was made."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from imprompt.checkpoints.adapters import read_adapter
from imprompt.encoders.matching import place_of
from imprompt.errors import MismatchError, SettingError
from imprompt.evaluation.report import write_report
from imprompt.evaluation.results import read_results
from imprompt.models import find_model
from tests import commands
from tests.judges import tiny_clip, tiny_dino
from tests.runs import picture_folder, recipe

SECRET = "jane-q-citizen"  # a folder above everything
STATES = ("state.json", "training.pt")  # for the machine that trains: docs/training.md says so


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a user far apart: inputs in `in`, and in `out` what every command made of them."""
    place = tmp_path_factory.mktemp("places") / SECRET
    given, out = place / "in", place / "out"
    picture_folder(given / "set")
    tiny_clip(given / "clip")
    tiny_dino(given / "dino")
    model = commands.smallest_model(given / "model")
    plan = recipe(
        given / "set",
        out / "run",
        2,
        model=str(model),
        data={"size": 32, "features": out / "features"},
        validation={
            "every": 2,
            "images": [given / "set" / "1.png"],
            "clip": str(given / "clip"),
            "steps": 2,
        },
    )
    toml = commands.written(plan, given / "recipe.toml")
    picture, adapter = str(given / "set" / "0.png"), str(out / "run" / "latest")
    own = ["--model", str(model), "--adapter", adapter, "--device", "cpu"]
    judges = ["--clip", str(given / "clip"), "--dino", str(given / "dino"), "--steps", "2"]
    told = {
        "encode": ["data", "encode", str(toml)],
        "train": ["train", str(toml)],
        "generate": ["generate", picture, *own, "--steps", "2", "--out", str(out / "a.png")],
        "embed": ["embed", picture, *own, "--out", str(out / "a.safetensors")],
        "convert": ["convert", adapter, str(out / "converted.safetensors")],
        "first": ["evaluate", "run", str(given / "set"), *own, *judges, "--out", str(out / "one")],
        "swept": [
            *("evaluate", "run", str(given / "set"), *own[:2], *own[4:], *judges),
            *("--sweep", f"adapter={adapter},{out / 'converted.safetensors'}"),
            *("--out", str(out / "two")),
        ],
        "report": ["evaluate", "report", str(out / "one")],
        "compare": ["evaluate", "compare", str(out / "one"), str(out / "one")],
    }
    told["compare"] += ["--out", str(out / "page.html")]
    for name, arguments in told.items():
        ended = commands.imprompt(arguments, place / "notes" / name)
        assert ended.code == 0, (name, ended.said)
    return place


def text_of(path: Path) -> bytes:
    """What a file tells: its bytes, and a picture's texts."""
    data = path.read_bytes()
    if path.suffix == ".png":
        with Image.open(path) as picture:
            data += json.dumps({k: str(v) for k, v in picture.info.items()}).encode()
    return data


def test_no_file_names_a_folder_of_the_user(place: Path) -> None:
    files = [path for path in (place / "out").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        *("a.png", "a.safetensors", "adapter.safetensors", "converted.safetensors"),
        *("run.json", "rows.jsonl", "summary.json", "report.html", "page.html"),
    }
    for_this_machine = {path for path in files if path.name in STATES}
    for_this_machine |= {*(place / "out" / "features").iterdir()}
    telling = {path for path in files if SECRET.encode() in text_of(path)}
    assert telling
    assert telling <= for_this_machine


def test_an_adapter_names_its_models_without_their_folders(place: Path, tmp_path: Path) -> None:
    file = read_adapter(place / "out" / "run" / "latest")
    assert file.header is not None
    assert (file.header.base, file.header.encoder) == ("./model", "./model:image_encoder")
    model = find_model(str(place / "in" / "model"))
    assert Path(place_of(file, model).repo) == place / "in" / "model" / "image_encoder"
    own = replace(file, header=file.header.model_copy(update={"encoder": "../own"}))
    with pytest.raises(
        MismatchError, match=r"reads the image encoder \.\./own, a folder that is n"
    ):
        place_of(own, model)
    for folder in ("run/step-1", "run"):  # a state, or its adapter alone in the run's folder
        (tmp_path / "run" / "step-1").mkdir(parents=True, exist_ok=True)
        (tmp_path / "own").mkdir(exist_ok=True)
        found = place_of(replace(own, folder=tmp_path / folder), model)
        assert Path(found.repo) == tmp_path / "own"


def test_adapters_of_a_sweep_are_known_by_the_names_of_their_files(place: Path) -> None:
    summary = json.loads((place / "out" / "two" / "summary.json").read_text())
    names = [one["name"] for one in summary["settings"]]
    assert names == ["adapter=latest", "adapter=converted.safetensors"]
    axes = [one["axes"]["adapter"] for one in summary["settings"]]
    assert axes == ["../run/latest", "../converted.safetensors"]


def test_a_run_is_shown_and_goes_on_where_it_was_moved(place: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(place / "out" / "one", tmp_path / "moved"))
    (run / "report.html").unlink()
    results = read_results(run)
    assert results.unseen == (
        "The set 'set' was not found: give its folder as --set to show the image prompts."
    )
    assert results.unseen.partition("'")[0] in write_report(run).read_text()
    there = place / "in" / "set"
    results = read_results(run, there)
    assert (results.pictures, results.unseen) == (there, "")
    shown = write_report(run, there).read_text()
    assert "was not found" not in shown
    assert "could not be read" not in shown
    with pytest.raises(SettingError, match=r"--set .*none: there is no such folder"):
        read_results(run, there / "none")

    moved = Path(shutil.copytree(there, tmp_path / "the same set"))
    before = (run / "run.json").read_bytes()
    given = place / "in"
    ended = commands.imprompt(
        [
            *("evaluate", "run", str(moved), "--model", str(given / "model"), "--device", "cpu"),
            *("--adapter", str(place / "out" / "run" / "latest"), "--clip", str(given / "clip")),
            *("--dino", str(given / "dino"), "--steps", "2", "--out", str(run)),
        ],
        tmp_path / "notes",
    )
    assert ended.code == 0, ended.said
    assert (run / "run.json").read_bytes() == before
    assert (run / "rows.jsonl").read_bytes() == (place / "out" / "one" / "rows.jsonl").read_bytes()
