"""A command line as a request: flags from schemas, changed requests, results one by one."""

import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Unpack, get_type_hints

import numpy as np
import pytest
import typer
from PIL import Image
from pydantic import BaseModel, Field
from typer.testing import CliRunner

import imprompt as package
from imprompt.cli import generate, main
from imprompt.cli.flags import flags_of, with_flags
from imprompt.errors import SettingError
from imprompt.generation.pipeline import ImagePromptPipeline
from imprompt.generation.references import Reference
from imprompt.generation.request import Request, read_request, save_results, write_results
from imprompt.generation.settings import Settings, SettingValues
from imprompt.images import open_image
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

    results = list(write_results(made(), request, job.settings, tmp_path / "out"))
    assert there == [0, 1, 2]
    assert [(path.name, seed) for path, seed in results[:3]] == [
        (f"cat-{seed}.png", seed) for seed in (7, 8, 9)
    ]
    assert (results[3][0].name, results[3][1]) == ("cat-7-grid.png", None)


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
    assert capsys.readouterr() == (f"{tmp_path / 'out' / 'cat-3.png'}  seed 3\n", "")


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
