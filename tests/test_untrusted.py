"""What others may have written is read within limits, by one reader, and refused in one line."""

import ast
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from imprompt.checkpoints.tensors import flat, load_pickle, read_tensors
from imprompt.cli import main
from imprompt.errors import CheckpointError, ImpromptError, SettingError
from imprompt.files import cache_root
from imprompt.generation.references import parsed_blocks
from imprompt.generation.request import Request, read_request
from imprompt.training.cache import read_manifest
from imprompt.training.recipe import Data, read_recipe
from imprompt.training.shards import expand_braces
from imprompt.training.sources import open_source
from imprompt.untrusted import (
    MAX_DEPTH,
    StoredTable,
    checked,
    parse_json,
    parse_toml,
    read_bytes,
    read_json,
    read_lines,
)
from tests.test_house import trees

# What reads other people's texts and files -> the modules that may, and why
READERS = {
    "json.load": {},
    "json.loads": {"untrusted": "the reader itself"},
    "tomllib.load": {},
    "tomllib.loads": {"untrusted": "the reader itself"},
    "torch.load": {"checkpoints.tensors": "the reader of pickles itself"},
    "pickle.load": {},
    "pickle.loads": {},
    "from_json": {},
    "safe_open": {
        "checkpoints.tensors": "the reader of safetensors itself",
        "encoders.feature_cache": "its own files; whatever is wrong with one, it counts as absent",
    },
    "read_text": {},
}


def called(node: ast.AST) -> str:
    """The name of a call, such as json.loads; read_text is a method of any path."""
    if not isinstance(node, ast.Call):
        return ""
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        name = f"{node.func.value.id}.{node.func.attr}"
        return name if name in READERS else node.func.attr
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def test_nothing_else_reads_what_others_wrote() -> None:
    told = []
    for module, tree in trees().items():
        own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} | {
            alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module == "imprompt.untrusted"
            for alias in node.names
        }
        for node in ast.walk(tree):
            name = called(node)
            allowed = {f"imprompt.{one}" for one in READERS.get(name, {})}
            if name in READERS and module not in allowed and name not in own:
                told.append(f"{module}:{getattr(node, 'lineno', 0)}: {name}")
    assert not told


REFUSED_TEXTS = [
    ("[" * 100_000, "nested too deep"),
    ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "nested too deep"),
    ('{"a":' * 500 + "1" + "}" * 500, "nested too deep"),
    ("1" * 5000, "a number has too many digits"),
    ("1" * 30, "a whole number is too large"),
    ('"a\\u0000"', "a text has a NUL character"),
    ('{"\\ud800": 1}', "half a character"),
    ("NaN", "NaN is not a number"),
    ("-Infinity", "-Infinity is not a number"),
    ("", "line 1: not valid JSON"),
    ("[\n1,\n}", "line 3: not valid JSON"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED_TEXTS)
def test_json_beyond_a_limit_is_refused(text: str, words: str) -> None:
    with pytest.raises(SettingError, match=re.escape(words)) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)


def test_json_within_the_limits_is_what_it_says() -> None:
    assert parse_json('{"a": [1, 2.5, null, "\\u00e9", 18446744073709551615]}') == {
        "a": [1, 2.5, None, "é", 2**64 - 1]
    }
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_json(deep)) == deep
    assert parse_json('"\\ud83d"', lenient=True) == "\ud83d"
    assert str(parse_json("NaN", lenient=True)) == "nan"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (".".join("a" * 2000) + " = 1", "nested too deep"),
        ("x = " + "[" * 5000, "nested too deep"),
        ("x = " + "1" * 5000, "too many digits"),
        ('x = "\\u0000"', "NUL"),
        ("x = ", "Invalid value"),
    ],
)
def test_toml_beyond_a_limit_is_refused(text: str, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        parse_toml(text)


def test_recipes_requests_and_blocks_are_read_by_it(tmp_path: Path) -> None:
    deep = ".".join("a" * 2000) + " = 1"
    (tmp_path / "a.toml").write_text(deep)
    for read in (read_recipe, read_request):
        with pytest.raises(SettingError, match=r"a.toml is not valid TOML: nested too deep"):
            read(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_text("#" * (1 << 20) + "#")
    with pytest.raises(SettingError, match=r"it has 1,048,577 bytes, more than the 1,048,576"):
        read_recipe(tmp_path / "b.toml")
    with pytest.raises(SettingError, match="--blocks, line 1: nested too deep"):
        parsed_blocks("[" * 3000)
    with pytest.raises(SettingError, match="--blocks, line 1: not valid JSON"):
        parsed_blocks('{"down": 1')
    assert [parsed_blocks(text) for text in ("linear", "0.5", '{"down": 1}')] == [
        "linear",
        0.5,
        {"down": 1},
    ]


@pytest.mark.parametrize("name", ["pipe", "link to a device", "a\0b", "\ud800"])
def test_what_is_no_file_is_refused_before_it_is_opened(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "pipe":
        os.mkfifo(path)
    if name == "link to a device":
        path.symlink_to("/dev/zero")
    with pytest.raises(OSError, match=r"device or a pipe|no file has such a name"):
        read_bytes(path)


def test_pipes_end_no_command(tmp_path: Path) -> None:
    for name in ("a.toml", "a.json", "a.tar", "a.bin", "a.safetensors"):
        os.mkfifo(tmp_path / name)
    for read, name in (
        (read_recipe, "a.toml"),
        (read_request, "a.json"),
        (lambda path: open_source(Data(source=str(path))), "a.tar"),
        (load_pickle, "a.bin"),
    ):
        with pytest.raises((ImpromptError, OSError), match=r"not a file but a device or a pipe"):
            read(tmp_path / name)


def test_lines_are_numbered_and_bounded(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\n\n \nfour")
    assert list(read_lines(tmp_path / "a")) == [(1, "one\r\n"), (4, "four")]
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of zeros that takes no room
    with pytest.raises(SettingError, match=r"line 1: more than 16,777,216 bytes long"):
        list(read_lines(tmp_path / "a"))
    with pytest.raises(OSError, match=r"it has 1,099,511,627,776 bytes, more than"):
        read_bytes(tmp_path / "a")


class Row(StoredTable):
    name: str
    count: int


def test_tables_have_a_form(tmp_path: Path) -> None:
    row = {"name": "a", "count": 1, "more": []}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert read_json(tmp_path / "a.json", list[Row]) == [row]
    for value, words in (
        ([{"name": "a"}], "t lacks 'count' in 0"),
        ([{"name": 1, "count": 1}], "t holds 0.name = 1: input should be a valid string"),
        ({}, "t holds {}: input should be a valid list"),
    ):
        with pytest.raises(SettingError, match=f"^{re.escape(words)}$"):
            checked(value, list[Row], "t")


@pytest.mark.parametrize("text", ["[]", "{}", "null", "[" * 100_000, '{"samples": "many"}'])
def test_an_edited_manifest_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(SettingError, match=r"manifest.json cannot be read \(.*encode again$"):
        read_manifest(tmp_path)


# Pickles


def shared(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"x": torch.ones(1)}
    for _ in range(depth):
        inner = {"a": inner, "b": inner}
    return inner


class Hollow:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[int]]:
        return bytearray, (1 << 40,)


def deflated(path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 20)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def hollow(path: Path) -> None:
    torch.save({"a": Hollow()}, path)


def hollow_before_zips(path: Path) -> None:
    torch.save({"a": Hollow()}, path, _use_new_zipfile_serialization=False)


PICKLES: list[tuple[Callable[[Path], object], str]] = [
    (deflated, "has compressed or overlapping members, unlike torch.save's; refused"),
    (hollow, "makes data that it does not hold; refused"),
    (hollow_before_zips, "makes data that it does not hold; refused"),
    (lambda path: path.write_bytes(pickle.dumps(Hollow(), 2)), "makes data that it does not hold"),
    (lambda path: torch.save(shared(40), path), "one dictionary is in it twice"),
    (lambda path: torch.save({("a",): 1}, path), "a key in it is not a name"),
    (lambda path: torch.save({"a" * 2000: 1}, path), "a key in it is not a name"),
    (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "is a Git LFS pointer, not the file itself: run git lfs pull",
    ),
    (
        lambda path: path.write_text("\n<!DOCTYPE html><html>Sign in</html>"),
        "is a web page, not the file itself: download it again",
    ),
]


@pytest.mark.parametrize(("write", "words"), PICKLES)
def test_a_pickle_costs_no_more_than_its_size(
    write: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.bin"
    write(path)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        read_tensors(path, lambda keys: {key: key for key in keys})


def test_plain_pickles_of_both_formats_are_read(tmp_path: Path) -> None:
    held = {"a": {"b": torch.ones(2)}, "c": torch.zeros(1)}
    for new in (True, False):
        torch.save(held, tmp_path / "a.bin", _use_new_zipfile_serialization=new)
        found, _ = read_tensors(tmp_path / "a.bin", lambda keys: {key: key for key in keys})
        assert list(found) == ["a.b", "c"]
        assert found["a.b"].equal(torch.ones(2))
    assert dict(flat({"a": {1: {}}, "b": [1]})) == {"b": [1]}


@pytest.mark.parametrize("start", [b"version https://git-lfs.github.com/spec/v1\n", b"<html>"])
def test_what_stands_in_place_of_safetensors_is_named(start: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(start + b" " * 100)
    with pytest.raises(CheckpointError, match="not the file itself"):
        read_tensors(tmp_path / "a.safetensors", lambda keys: {key: key for key in keys})


# The rest


def test_braces_are_counted_before_they_are_expanded() -> None:
    for source in (
        "x{0..999999999999}.tar",
        "x{0..9999}{0..9999}.tar",
        "{a,b}" * 40,
        "{0..1" + "0" * 30 + "}",
    ):
        with pytest.raises(
            SettingError, match=r"these braces name too many shards, 300,000 are allowed"
        ):
            expand_braces(source)
    with pytest.raises(SettingError, match=r"data\.source = .*nested deeper than 8"):
        expand_braces("{" * 1000 + "a,b" + "}" * 1000)
    assert expand_braces("{a,{0..2}}{b,c}")[-1] == "2c"
    assert len(expand_braces("a{0..9999}.tar::b{0..9999}.tar")) == 20_000
    assert expand_braces("x{08..10}.tar") == ["x08.tar", "x09.tar", "x10.tar"]


def test_without_a_home_the_cache_asks_for_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("IMPROMPT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(SettingError, match="set IMPROMPT_CACHE to a folder"):
        cache_root()
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_root() == Path("/c/imprompt")
    monkeypatch.setenv("IMPROMPT_CACHE", "/d")
    assert cache_root() == Path("/d")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_too_little_memory_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short() -> None:
        raise error

    monkeypatch.setattr("imprompt.cli.commands", lambda: None)
    monkeypatch.setattr("imprompt.cli.app", short)
    with pytest.raises(SystemExit) as ended:
        main()
    line = capsys.readouterr().err
    assert ended.value.code == 2
    assert line.count("\n") == 1
    assert line.startswith("imprompt: out of memory (")
    assert "--tiling" in line


def test_other_runtime_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("imprompt.cli.commands", lambda: None)
    monkeypatch.setattr("imprompt.cli.app", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main()


def test_a_request_needs_plain_names(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"images": ["a.png"], "adapter": [{"name": "x\\ud800"}]}')
    with pytest.raises(SettingError, match="half a character"):
        read_request(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"images": ["a.png"], "adapter": [{"name": "x"}]}')
    assert isinstance(read_request(tmp_path / "a.json"), Request)
