"""`imprompt data check`: what it finds in damaged sets, and what it says."""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from imprompt import cli
from imprompt.training.check import (
    ASPECT_ROWS,
    ASPECTS,
    SHORT_SIDES,
    SIDE_ROWS,
    check_set,
    histogram,
)
from imprompt.training.recipe import Columns
from imprompt.training.sources import open_source
from tests.sets import (
    DAMAGE,
    MAKERS,
    damaged,
    items,
    make_folder,
    make_list,
    make_shards,
    masked,
    noise_picture,
    png,
)

SPOILT = dict(enumerate(DAMAGE, 10))  # sample number -> trouble


@pytest.fixture(autouse=True)
def _cache_aside(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hub")))


@pytest.mark.parametrize("kind", MAKERS)
def test_every_trouble_is_counted_and_named(kind: str, tmp_path: Path) -> None:
    source = open_source(MAKERS[kind](tmp_path, damaged(items(40), SPOILT)))
    seen = []
    report = check_set(source, on_sample=lambda done, total: seen.append((done, total)))
    assert (report.samples, report.usable, report.fine) == (40, 40 - len(SPOILT), False)
    for number, trouble in SPOILT.items():
        finding = report.unusable[DAMAGE[trouble][1]]
        assert any(example.startswith(source.name(number)) for example in finding.examples)
    assert sum(finding.count for finding in report.unusable.values()) == len(SPOILT)
    assert report.unusable["no caption"].count == 2
    assert seen == [(n, 40) for n in range(1, 41)]


def test_headers_alone_find_what_headers_show(tmp_path: Path) -> None:
    source = open_source(make_folder(tmp_path, damaged(items(20), SPOILT)))
    report = check_set(source, every_pixel=False)
    assert report.duplicates is None
    # not what is cut off
    assert set(report.unusable) == {"empty", "no picture", "too large", "absent", "no caption"}


def test_bad_references_and_shards_are_found(tmp_path: Path) -> None:
    first, second = items(2, references=2)
    spoilt = replace(second, references=(second.references[0], b"no picture"))
    data = make_shards(tmp_path, [first, spoilt], per_shard=1)
    (tmp_path / "0002.tar").write_bytes(b"no tar")
    report = check_set(open_source(data.model_copy(update={"source": str(tmp_path / "*.tar")})))
    assert report.usable == 1
    assert report.bad_shards.count == 1
    assert "0002.tar: is not a tar file" in report.bad_shards.examples[0]
    assert "reference.1.png is not a picture" in report.unusable["no picture"].examples[0]


@pytest.mark.parametrize("kind", MAKERS)
def test_bad_masks_are_found(kind: str, tmp_path: Path) -> None:
    made = masked(items(4))
    made[0], made[1] = (
        replace(made[0], mask=b"no picture"),
        replace(made[1], mask=png(noise_picture(1, (40, 48)))),
    )
    data = MAKERS[kind](tmp_path, made)
    report = check_set(
        source := open_source(data.model_copy(update={"columns": Columns(mask="mask")}))
    )
    assert (report.usable, report.fine) == (2, False)
    for number, trouble, words in (
        (0, "no picture", "is not a picture"),
        (1, "another shape", "the mask has 40×48 pixels"),
    ):
        (example,) = report.unusable[trouble].examples
        assert example.startswith(f"{source.name(number)}: the ")
        assert "mask" in example
        assert words in example
    assert check_set(open_source(data)).fine


def test_sizes_are_counted(tmp_path: Path) -> None:
    sizes = [(64, 300), (100, 100), (63, 64), (300, 128), (128, 96)]
    report = check_set(open_source(make_folder(tmp_path, items(10, sizes))), training_size=100)
    assert report.short_sides == {"below 64": 2, "64 to 127": 6, "128 to 255": 2}
    assert report.aspects == {
        "narrower than 1:2": 2,
        "3:4 to 4:3": 4,
        "4:3 to 2:1": 2,
        "2:1 and wider": 2,
    }
    assert report.smallest == f"{tmp_path}/0002.png (63×64)"
    assert report.largest == f"{tmp_path}/0003.png (300×128)"
    assert report.too_small is not None
    assert report.too_small.count == 6
    assert report.fine


def test_histogram_rows_begin_at_their_edges() -> None:
    assert histogram([63, 64, 127, 2047, 2048, 9999], SHORT_SIDES, SIDE_ROWS) == {
        "below 64": 1,
        "64 to 127": 2,
        "1536 to 2047": 1,
        "2048 and more": 2,
    }
    assert len(SIDE_ROWS) == len(SHORT_SIDES) + 1
    assert len(ASPECT_ROWS) == len(ASPECTS) + 1


def test_duplicates_are_pixels_equally_whatever_the_file(tmp_path: Path) -> None:
    made = items(6)
    made[4] = replace(made[4], data=made[1].data, text=made[0].text)
    data = make_folder(tmp_path, [*made, made[2]])  # the last is the same file, listed again
    Image.open(tmp_path / "0000.png").save(tmp_path / "0005.png", compress_level=0)
    Image.open(tmp_path / "0000.png").resize((40, 48)).save(tmp_path / "0003.png")
    report = check_set(open_source(data))
    assert report.duplicates is not None
    assert report.duplicates.examples == [
        f"{tmp_path}/{later}.png equals {tmp_path}/{first}.png"
        for later, first in (("0004", "0001"), ("0005", "0000"), ("0002", "0002"))
    ]
    assert report.repeated_captions.count == 2
    assert report.repeated_captions.examples == ["2 times 'noise 0'", "2 times 'noise 2'"]
    assert report.fine


def test_pictures_of_the_same_bytes_but_another_shape_are_no_duplicates(tmp_path: Path) -> None:
    data = make_folder(tmp_path, 2)
    for name, size in (("0000", (20, 10)), ("0001", (10, 20))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    report = check_set(open_source(data))
    assert report.duplicates is not None
    assert report.duplicates.count == 0


def test_examples_are_few(tmp_path: Path) -> None:
    source = open_source(
        make_folder(tmp_path, damaged(items(12), dict.fromkeys(range(8), "empty")))
    )
    finding = check_set(source, examples=3).unusable["empty"]
    assert (finding.count, len(finding.examples)) == (8, 3)


def test_the_threads_leave_the_warning_filters_as_they_were(tmp_path: Path) -> None:
    before = list(warnings.filters)
    check_set(open_source(make_folder(tmp_path, 64)))
    assert list(warnings.filters) == before


# The command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `imprompt data check …`."""
    monkeypatch.setattr(sys, "argv", ["imprompt", "data", "check", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_command_prints_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder(tmp_path, damaged(items(20), {3: "empty", 7: "empty", 9: "absent"}))
    assert run(monkeypatch, data.source, "--size", "64") == 1
    lines = capsys.readouterr().out.splitlines()
    table = {line.split("  ")[0]: line.split()[-1] for line in lines if not line.startswith(" ")}
    assert table["samples"] == "20"
    assert table["usable"] == "17"
    assert table["unusable: empty"] == "2"
    assert table["unusable: absent"] == "1"
    assert table["smaller than 64"] == "17"
    assert table["duplicate pictures"] == "0"
    assert table["short side below 64"] == "17"
    assert f"{tmp_path}/0003.png: the file is empty" in [line.strip() for line in lines]


def test_a_fine_set_is_exit_code_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_list(tmp_path, damaged(items(5), {2: "no caption"}))
    assert (
        run(
            monkeypatch,
            made.source,
            "--root",
            str(made.root),
            "--captions",
            "optional",
            "--headers",
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "not looked for" in out
    assert "without a caption" in out
    assert run(monkeypatch, made.source, "--root", str(made.root)) == 1


def test_a_report_for_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder(tmp_path, damaged(items(5), {2: "truncated"}))
    assert run(monkeypatch, data.source, "--json", "--size", "32") == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["usable"]) == (5, 4)
    assert report["unusable"]["damaged"]["count"] == 1
    assert report["too_small"] == {"count": 0, "examples": []}


def test_a_recipes_data_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_list(tmp_path, 3)
    recipe = (
        'model = "emoji"\noutput = "out"\n[data]\n'
        f'source = "{data.source}"\nroot = "{data.root}"\nsize = 64\n'
    )
    (tmp_path / "a.toml").write_text(recipe + "[optimization]\nsteps = 1\n")
    assert run(monkeypatch, str(tmp_path / "a.toml")) == 0
    assert "smaller than 64" in capsys.readouterr().out


def test_a_set_that_is_none_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"imprompt: {tmp_path} holds no metadata.jsonl")
    assert said.count("\n") == 1
