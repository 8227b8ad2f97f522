"""A command line as a request: flags from schemas, changed requests, results one by one."""

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Unpack, get_type_hints

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from pydantic import BaseModel, Field
from typer.testing import CliRunner

import imprompt as package
from imprompt.checkpoints.tensors import read_tensors, write_tensors
from imprompt.cli import app, generate, main
from imprompt.cli import commands as register_commands
from imprompt.cli.flags import flags_of, with_flags
from imprompt.errors import ImageError, SettingError
from imprompt.generation.pipeline import ImagePromptPipeline
from imprompt.generation.record import check_weights, recorded_path
from imprompt.generation.references import Reference
from imprompt.generation.request import (
    Request,
    ResultFiles,
    read_request,
    save_results,
    text_in,
    write_results,
)
from imprompt.generation.settings import Settings, SettingValues
from imprompt.images import open_image
from imprompt.models import PACKAGED
from imprompt.validation import Flag

SCHEMAS: dict[str, type[BaseModel]] = {one.__name__: one for one in (Settings, Reference, Request)}
MOST_PARAMETERS = 12
TWO = {
    "images": ["blue.png", "red.png"],
    "settings": {"prompt": ["a", "b"], "num_images": 2, "seed": 10},
}


# Flags from schemas


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_field_has_a_flag_or_a_reason_to_have_none(schema: str) -> None:
    flags = {flag.field for flag in generate.field_flags() if flag.schema is SCHEMAS[schema]}
    reasons = generate.WITHOUT_FLAG[schema]
    assert flags | reasons.keys() == SCHEMAS[schema].model_fields.keys()
    assert not flags & reasons.keys()
    assert all(reasons.values())


def test_editors_see_the_arguments_of_a_call() -> None:
    fields = {name: field.annotation for name, field in Settings.model_fields.items()}
    del fields["prompt"]  # an argument by its own name
    assert get_type_hints(SettingValues) == fields
    (*_, last) = inspect.signature(ImagePromptPipeline.__call__).parameters.values()
    assert last.kind is last.VAR_KEYWORD
    assert last.annotation == Unpack[SettingValues]


def test_every_flag_has_a_name_of_its_own_and_help() -> None:
    command = typed(generate.generate_command())
    names = [
        name for parameter in command.params for name in parameter.opts if name.startswith("-")
    ]
    assert len(names) == len(set(names))
    assert all(parameter.help for parameter in command.params)


def test_an_option_is_written_once() -> None:
    """A new field is a flag; what the user gave of it comes back, and nothing else."""

    class More(Settings, frozen=True):
        warp: Annotated[float, Field(description="How much to warp.")] = 0.5
        tags: Annotated[
            tuple[str, ...], Flag("--tag", "-t", list[str], read=tuple), Field(description="Tags.")
        ] = ()

    caught: list[Any] = []
    command = with_flags(
        lambda given_fields: caught.append(dict(given_fields)), list(flags_of(More, {}))
    )
    app = typer.Typer(add_completion=False)
    app.command()(command)
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "How much to warp." in shown
    assert CliRunner().invoke(app, ["--warp", "0.5", "-t", "a", "-t", "b"]).exit_code == 0
    assert CliRunner().invoke(app, []).exit_code == 0
    assert caught == [{More: {"warp": 0.5, "tags": ("a", "b")}}, {}]


def typed(command: Callable[..., None]) -> Any:
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return typer.main.get_command(app)


def test_no_command_has_a_wall_of_parameters() -> None:
    functions = [one for _, one in inspect.getmembers(generate, inspect.isfunction)]
    assert max(len(inspect.signature(one).parameters) for one in functions) <= MOST_PARAMETERS


# Requests that are changed


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Request]:
    """The request of a command line, in a folder with pictures."""
    monkeypatch.chdir(tmp_path)
    for name in ("blue", "red", "green", "left", "right"):
        Image.new("RGB", (8, 8), {"left": "white", "right": "black"}.get(name, name)).save(
            f"{name}.png"
        )

    def request(*words: str) -> Request:
        caught: list[Request] = []
        monkeypatch.setattr(generate, "carry_out", lambda request, *_, **__: caught.append(request))
        monkeypatch.setattr(sys, "argv", ["imprompt", "generate", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return caught[0]

    return request


def saved(request: dict[str, Any], name: str = "asked.json") -> str:
    Path(name).write_text(Request.model_validate(request).model_dump_json())
    return name


def names(request: Request) -> list[list[list[str]]]:
    """The pictures of each reference of each item."""
    return [
        [[file.path.stem for file in reference.images] for reference in item]
        for item in request.images
    ]


def test_flags_change_a_request_and_nothing_else(asked: Callable[..., Request]) -> None:
    file = saved(
        {
            **TWO,
            "batch_size": 2,
            "images": ["blue.png", {"images": "red.png", "crop": "top", "mask": "left.png"}],
        }
    )
    plain, changed = (
        asked("--like", file),
        asked("--request", file, "--scale", "0.5", "--end", "0.6", "--fast"),
    )
    assert plain == read_request(Path(file))
    assert changed.settings == plain.settings.model_copy(update={"scale": 0.5})
    assert changed.fast
    assert [reference.end for (reference,) in changed.images] == [0.6, 0.6]
    assert [reference.crop for (reference,) in changed.images] == [None, "top"]
    restored = changed.changed({"settings": plain.settings, "fast": False, "images": plain.images})
    assert restored == plain


def test_the_picture_of_a_png_keeps_its_seed_and_text_when_its_call_changes(
    asked: Callable[..., Request],
) -> None:
    file = saved({**TWO, "only": 3})
    assert asked("--like", file, "--steps", "2").only == 3
    for words, seed, count in (
        (["-n", "4"], 13, 4),
        (["--seed", "5"], 5, 1),
        (["green.png"], 13, 1),
    ):
        changed = asked(*words, "--like", file)
        assert changed.only is None
        assert (changed.settings.seed, len(changed.numbers), changed.settings.prompt) == (
            seed,
            count,
            "b",
        )
    assert names(changed) == [[["green"]]]
    assert names(asked("--like", file, "-n", "4")) == [[["red"]]]


def test_a_picture_of_what_several_prompt_together(asked: Callable[..., Request]) -> None:
    settings = {"together": True, "num_images": 3, "seed": 4}
    changed = asked(
        "--seed",
        "9",
        "--like",
        saved({"images": ["blue.png", "red.png"], "settings": settings, "only": 2}),
    )
    assert names(changed) == [[["blue"]], [["red"]]]
    assert (changed.settings.seed, changed.settings.together, list(changed.numbers)) == (
        9,
        True,
        [0],
    )


def test_other_pictures_take_the_places_of_a_requests(asked: Callable[..., Request]) -> None:
    regions = [
        [
            {"images": "blue.png", "mask": "left.png"},
            {"images": ["red.png", "blue.png"], "weights": [2, 1], "mask": "right.png"},
        ]
    ]
    file = saved({"images": regions})
    changed = asked("green.png", "blue.png", "red.png", "--like", file)
    assert names(changed) == [[["green"], ["blue", "red"]]]
    assert [reference.weights for reference in changed.images[0]] == [None, (2.0, 1.0)]
    assert [reference.mask.path.stem for reference in changed.images[0]] == ["left", "right"]
    swapped = asked("--like", file, "--region", "right.png", "--region", "left.png")
    assert [reference.mask.path.stem for reference in swapped.images[0]] == ["right", "left"]


def test_what_one_image_prompt_says_is_said_of_several(asked: Callable[..., Request]) -> None:
    file = saved({"images": [{"images": "blue.png", "crop": "top", "end": 0.5}]})
    several = asked("green.png", "red.png", "--like", file, "--end", "0.7")
    assert names(several) == [[["green"]], [["red"]]]
    assert [(reference.crop, reference.end) for (reference,) in several.images] == [
        ("top", 0.7)
    ] * 2
    combined = asked(
        "green.png",
        "red.png",
        "--like",
        file,
        "--combine",
        "average",
        "--weight",
        "2",
        "--weight",
        "1",
    )
    assert names(combined) == [[["green", "red"]]]
    assert (combined.images[0][0].combine, combined.images[0][0].weights) == ("average", (2.0, 1.0))


def test_a_picture_that_is_replaced_need_not_be_there(asked: Callable[..., Request]) -> None:
    file = saved({"images": [{"images": [{"path": "gone.png", "sha256": "0" * 64}]}]})
    for picture in asked("green.png", "--like", file).pictures():
        picture.check()


def test_alone_refuses_a_picture_that_there_is_not() -> None:
    request = Request.model_validate({**TWO, "only": 4})
    with pytest.raises(SettingError, match="only = 4: the request makes no such picture"):
        request.alone()
    assert request.changed({"only": None}).alone() == request.changed({"only": None})


# Results one by one


@pytest.fixture(scope="module")
def pipe() -> ImagePromptPipeline:
    return ImagePromptPipeline.from_pretrained("emoji", device="cpu")


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_changed_result_holds_its_whole_request(
    pipe: ImagePromptPipeline, cat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Request, "load", lambda *_, **__: pipe)
    first = Request.model_validate(
        {"images": [cat], "settings": {"steps": 2, "num_images": 3, "seed": 7}}
    )
    made = save_results(first.run(pipe), first, tmp_path / "first")[2]
    for name, words, seed in (("scale", ["--scale", "0.4"], 9), ("count", ["-n", "2"], 9)):
        monkeypatch.setattr(
            sys,
            "argv",
            ["imprompt", "generate", "--like", str(made), *words, "--out", str(tmp_path / name)],
        )
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        path = tmp_path / name / f"cat-{seed}.png"
        again = read_request(path)
        assert np.array_equal(pixels(again.run(pipe).images[0]), pixels(open_image(path)))
    assert read_request(tmp_path / "scale" / "cat-9.png").settings.scale == 0.4
    assert (
        np.abs(
            pixels(open_image(tmp_path / "count" / "cat-9.png")) - pixels(open_image(made))
        ).max()
        <= 1
    )
    assert {path.name for path in (tmp_path / "count").iterdir()} == {
        "cat-9.png",
        "cat-10.png",
        "cat-9-grid.png",
    }


def test_each_picture_is_written_before_the_next_is_made(
    pipe: ImagePromptPipeline, cat: Path, tmp_path: Path
) -> None:
    request = Request.model_validate(
        {"images": [cat], "batch_size": 1, "settings": {"steps": 1, "num_images": 3, "seed": 7}}
    )
    job, there = request.prepare(pipe), []

    def made() -> Iterator[tuple[int, Image.Image]]:
        for number, picture in pipe.make(job):
            there.append(len(list(tmp_path.glob("out/*.png"))))
            yield number, picture

    files = ResultFiles.of(request, job.settings, pipe.weights, tmp_path / "out")
    results = list(write_results(made(), files))
    assert there == [0, 1, 2]
    assert [(path.name, seed) for path, seed in results[:3]] == [
        (f"cat-{seed}.png", seed) for seed in (7, 8, 9)
    ]
    assert (results[3][0].name, results[3][1]) == ("cat-7-grid.png", None)


@pytest.fixture
def generated(
    pipe: ImagePromptPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Runs `imprompt generate` in tmp_path, on the loaded model; its errors are raised."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Request, "load", lambda *_, **__: pipe)
    register_commands()

    def run(words: str) -> None:
        made = CliRunner().invoke(app, ["generate", *words.split()], catch_exceptions=False)
        assert made.exit_code == 0, made.output

    return run


@pytest.mark.usefixtures("cat")
def test_the_same_command_goes_on_where_it_stopped(
    pipe: ImagePromptPipeline,
    generated: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rounds: list[list[int]] = []
    run = ImagePromptPipeline.run

    def counted(self: Any, job: Any, batch: Any, report: Any) -> Any:
        rounds.append(list(batch))
        return run(self, job, batch, report)

    monkeypatch.setattr(ImagePromptPipeline, "run", counted)
    command = "cat.png -n 5 --batch-size 2 --steps 1 --seed 3 --out out"
    generated(command)
    whole = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert rounds == [[0, 1], [2, 3], [4]]
    assert len(whole) == 6
    for gone in ("cat-5.png", "cat-3-grid.png"):
        (Path("out") / gone).unlink()
    rounds.clear()
    capsys.readouterr()
    result = CliRunner().invoke(app, ["generate", *command.split()], catch_exceptions=False)
    assert result.stdout.startswith("4 of 5 were there\n")
    assert "cat-5.png  seed 5" in result.stdout
    assert rounds == [[2, 3]]
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == whole
    rounds.clear()
    generated(command)
    assert rounds == []
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == whole
    generated(command + " --scale 0.5")  # another request: nothing was there
    assert len(list(Path("out").iterdir())) == 12
    monkeypatch.setattr(pipe, "weights", pipe.weights | {"adapter base": "another"})
    generated(command)
    assert len(list(Path("out").iterdir())) == 18


@pytest.mark.usefixtures("cat")
def test_a_long_command_says_how_it_goes_on(
    generated: Callable[[str], None],
) -> None:
    generated("cat.png -n 2 --batch-size 1 --steps 1 --out out")
    seed = min(int(path.stem.split("-")[1]) for path in Path("out").iterdir())
    command = "cat.png -n 2 --batch-size 1 --steps 1 --out out"
    again = ["generate", *f"{command} --seed {seed}".split()]
    assert CliRunner().invoke(app, again).stdout.startswith("2 of 2 were there\n")
    said = CliRunner().invoke(app, ["generate", *command.split()]).stderr
    assert re.fullmatch(r"seed (\d+): if this is stopped, it goes on with --seed \1\n", said)
    assert CliRunner().invoke(app, again).stderr == ""


def test_each_result_has_the_name_of_its_own_image_prompt(
    generated: Callable[[str], None], tmp_path: Path
) -> None:
    for name in ("red", "blue"):
        Image.new("RGB", (8, 8), name).save(tmp_path / f"{name}.png")
    generated("red.png blue.png -n 2 --steps 1 --seed 3 --out each")
    names = {path.name for path in (tmp_path / "each").iterdir()}
    assert names == {"red-3.png", "red-4.png", "blue-5.png", "blue-6.png", "red-3-grid.png"}
    generated("red.png blue.png --together --steps 1 --seed 3 --out one")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["red-3.png"]


@pytest.mark.usefixtures("cat")
def test_a_grid_repeats_its_call(
    pipe: ImagePromptPipeline, generated: Callable[[str], None]
) -> None:
    generated("cat.png -n 2 --steps 1 --seed 3 --out out")
    again = read_request(Path("out/cat-3-grid.png"))
    assert (again.only, list(again.numbers), again.settings.seed) == (None, [0, 1], 3)
    for number, made in enumerate(again.run(pipe).images):
        assert np.array_equal(pixels(made), pixels(open_image(f"out/cat-{3 + number}.png")))


@pytest.mark.usefixtures("cat")
def test_other_weights_are_said_and_refused(
    pipe: ImagePromptPipeline, generated: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    generated("cat.png --steps 1 --seed 3 --out out")
    recorded = read_request(Path("out/cat-3.png")).weights
    assert recorded == pipe.weights
    assert recorded.keys() == {"base model", "adapter base", "encoder of base"}
    like = "--like out/cat-3.png --out again"
    for name in recorded:
        monkeypatch.setattr(pipe, "weights", recorded | {name: "another"})
        with pytest.raises(SettingError, match=rf"to repeat: {name}; its .*--allow-changed"):
            generated(like)
    assert not Path("again").exists()
    generated(like + " --allow-changed")
    assert read_request(Path("again/cat-3.png")).weights == pipe.weights
    monkeypatch.setattr(pipe, "weights", recorded | {"adapter base": "another"})
    generated(like + " --adapter base --scale 0.5")  # another adapter is what is asked for
    with pytest.raises(SettingError, match="adapter base"):
        generated(like + " --scale 0.5")
    Image.new("RGB", (64, 64), "green").save("cat.png")
    with pytest.raises(ImageError, match="is not the picture that it was"):
        generated(like)


def test_weights_are_known_by_their_values(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PACKAGED / "emoji", tmp_path / "emoji"))
    adapter = folder / "adapters" / "base.safetensors"

    def weights(**given: Any) -> dict[str, str]:
        options = {"adapter": adapter, "device": "cpu", "controlnet": folder / "controlnets/edges"}
        return ImagePromptPipeline.from_pretrained(str(folder), **options | given).weights

    def all_of(keys: Collection[str]) -> dict[str, str]:
        return {key: key for key in keys}

    before = weights()
    assert before == weights(dtype=torch.float16, tiling=True)
    tensors, header = read_tensors(adapter, all_of)
    first = next(name for name in tensors if name.startswith("image_kv"))
    write_tensors(adapter, tensors | {first: tensors[first] + 1}, header)
    assert changed(before, weights()) == {"adapter base"}
    text = next((folder / "text_encoder").glob("*.safetensors"))
    tensors, header = read_tensors(text, all_of)
    write_tensors(text, {name: tensor + 1 for name, tensor in tensors.items()}, header)
    assert changed(before, weights()) == {"adapter base", "base model"}
    with pytest.raises(SettingError, match="repeat: base model, adapter base;"):
        check_weights(before, weights())


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("picture", "out", "recorded"),
    [
        ("home/jane/work/cat.png", "home/jane/work/out", "../cat.png"),
        ("home/jane/work/a/cat.png", "home/jane/work/b/out", "../../a/cat.png"),
        ("home/jane/work/out/cat.png", "home/jane/work/out", "cat.png"),
        ("home/jane/work/cat.png", "elsewhere/out", "cat.png"),
        ("home/jane/pictures/cat.png", "home/jane/work/out", "cat.png"),
        ("home/jane/pictures/cat.png", "home/jane/out", "../pictures/cat.png"),
        ("home/jane/pictures/cat.png", "home/out", "cat.png"),
        ("data/cat.png", "data/out", "../cat.png"),
    ],
)
def test_a_record_names_no_folder_of_the_user(
    picture: str, out: str, recorded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "jane"))
    (tmp_path / "home/jane/work").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home/jane/work")
    assert recorded_path(tmp_path / picture, tmp_path / out).as_posix() == recorded


def test_a_result_holds_names_and_is_repeated_elsewhere(
    generated: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = PACKAGED / "emoji" / "adapters" / "base.safetensors"
    for name in ("project/in", "away"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(weights, tmp_path / "project" / "mine.safetensors")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "project/in/cat.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "away/start.png")
    monkeypatch.chdir("project")
    words = f"in/cat.png --init {tmp_path}/away/start.png --adapter mine.safetensors --steps 2"
    generated(f"{words} --seed 3 --out runs/out")
    text = text_in(Path("runs/out/cat-3.png"))
    assert text is not None
    assert str(tmp_path) not in text
    told = json.loads(text)
    assert told["adapter"] == "../../mine.safetensors"
    assert (told["images"][0]["path"], told["init_image"]["path"]) == (
        "../../in/cat.png",
        "start.png",
    )
    generated(f"{words} --seed 3 --out full --record-paths")
    assert str(tmp_path / "away/start.png") in (text_in(Path("full/cat-3.png")) or "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project").rename(tmp_path / "moved")
    again = read_request(tmp_path / "moved/runs/out/cat-3.png")
    assert again.adapter == str(tmp_path / "moved/mine.safetensors")
    assert again.images[0][0].images[0].path == tmp_path / "moved/in/cat.png"
    with pytest.raises(ImageError, match=r"start\.png does not exist"):
        [file.check() for file in again.pictures()]
    monkeypatch.chdir("away")  # the working folder holds it
    for file in read_request(tmp_path / "moved/runs/out/cat-3.png").pictures():
        file.check()


@pytest.mark.usefixtures("cat")
def test_what_a_request_reads_is_never_written_to(generated: Callable[[str], None]) -> None:
    generated("cat.png --steps 1 --seed 3 --out one.png")
    before = Path("one.png").read_bytes()
    with pytest.raises(SettingError, match="is one of the inputs"):
        generated("--like one.png --out one.png --force")
    generated("cat.png --steps 1 --seed 3 --out one.png")  # the same result: it was there
    with pytest.raises(SettingError, match=r"one.png exists: give another name, or --force"):
        generated("cat.png --steps 1 --seed 4 --out one.png")
    Image.new("RGB", (8, 8)).save("other.png")
    with pytest.raises(SettingError, match=r"other.png exists: give another name, or --force"):
        generated("cat.png --steps 1 --seed 4 --out other.png")
    assert Path("one.png").read_bytes() == before
    generated("cat.png --steps 1 --seed 4 --out one.png --force")
    assert read_request(Path("one.png")).settings.seed == 4


def test_an_interrupt_says_what_was_done(
    pipe: ImagePromptPipeline,
    cat: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make = ImagePromptPipeline.make

    def stopped(*args: Any) -> Iterator[tuple[int, Image.Image]]:
        yield next(make(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(ImagePromptPipeline, "make", stopped)
    monkeypatch.setattr(Request, "load", lambda *_, **__: pipe)
    words = f"generate {cat} -n 3 --batch-size 1 --steps 1 --seed 3 --out {tmp_path / 'out'}"
    monkeypatch.setattr(sys, "argv", ["imprompt", *words.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out' / 'cat-3.png'}  seed 3\n"
    assert not said.err.strip()  # typer's oldest allowed version ends the line of ^C


def test_a_killed_command_leaves_the_pictures_that_were_done(
    pipe: ImagePromptPipeline, cat: Path, tmp_path: Path
) -> None:
    count, out = 1000, tmp_path / "out"
    words = f"generate {cat} -n {count} --batch-size 1 --steps 2 --seed 3 --device cpu --out {out}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(str(package.__file__)).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "imprompt", *words.split()],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (first := out / "cat-3.png").exists() and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    done = sorted(out.glob("*.png"))
    assert 1 <= len(done) < count
    for path in done:
        open_image(path)
    request = read_request(first)
    assert (request.only, request.settings.num_images, request.batch_size) == (0, count, 1)
    assert np.array_equal(pixels(request.run(pipe).images[0]), pixels(open_image(first)))
