"""Image features as files: saved and loaded bit for bit, checked against an adapter, refused in one
line; `imprompt embed`.
"""

import filecmp
import json
import os
import random
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from typer.testing import CliRunner

from imprompt.checkpoints.adapters import read_adapter
from imprompt.checkpoints.tensors import write_tensors
from imprompt.cli import app, commands
from imprompt.encoders.embedding_files import (
    KEY,
    Embedding,
    FeatureSpec,
    check_embedding,
    load_embedding,
    save_embedding,
)
from imprompt.encoders.preparation import Preparation, prepare
from imprompt.encoders.vision import open_encoder
from imprompt.errors import CheckpointError, ImpromptError, MismatchError, SettingError
from imprompt.images import open_image
from imprompt.models import PACKAGED, find_model
from tests.tiny import pictures, seeded, tiny_encoder

Write = Callable[[Path], object]
ADAPTERS = PACKAGED / "emoji" / "adapters"
POOLED = FeatureSpec("pooled", 24)
PENULTIMATE = FeatureSpec("penultimate", 32)


def random_features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with seeded(1):
        return torch.randn(*shape).to(dtype)


def one(*shape: int, **facts: Any) -> Embedding:
    return Embedding(random_features(*shape), **facts)


def one_line(caught: pytest.ExceptionInfo[ImpromptError], *words: str) -> None:
    said = str(caught.value)
    assert "\n" not in said
    assert [word for word in words if word not in said] == [], said


# Saved and loaded


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
@pytest.mark.parametrize("shape", [(1, 24), (3, 24), (2, 257, 32)])
def test_what_is_saved_is_loaded(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    saved = Embedding(
        random_features(*shape, dtype=dtype),
        "pooled",
        "owner/name:folder",
        "0123456789abcdef",
        ("aa", "bb"),
    )
    save_embedding(path, saved)
    loaded = load_embedding(str(path))
    assert isinstance(loaded.features, Tensor)
    assert loaded.features.dtype == dtype
    assert torch.equal(loaded.features, saved.features)  # pyright: ignore[reportArgumentType]
    assert loaded[1:] == saved[1:]
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_features_of_several_kinds_stay_apart(tmp_path: Path) -> None:
    pair = (random_features(2, 512), random_features(2, 257, 32))
    save_embedding(tmp_path / "a.safetensors", Embedding(pair, "face and picture", "x/y"))
    loaded = load_embedding(tmp_path / "a.safetensors")
    assert isinstance(loaded.features, tuple)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(loaded.features, pair, strict=True)
    )
    check_embedding(loaded, FeatureSpec("face and picture", 32))


def test_the_header_says_what_it_is(tmp_path: Path) -> None:
    save_embedding(
        tmp_path / "a.safetensors",
        one(1, 24, feature="pooled", encoder="x/y", fingerprint="ab", pictures=("cd",)),
    )
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        told = json.loads(file.metadata()[KEY])
    assert told == {
        "format": 1,
        "holds": "image features",
        "feature": "pooled",
        "encoder": "x/y",
        "fingerprint": "ab",
        "pictures": ["cd"],
    }


@pytest.mark.parametrize(
    ("features", "feature"), [((2, 24), "pooled"), ((2, 257, 32), "penultimate")]
)
def test_a_community_file(features: tuple[int, ...], feature: str, tmp_path: Path) -> None:
    tensor = random_features(*features, dtype=torch.float16)
    torch.save(tensor, tmp_path / "a.ipadpt")
    loaded = load_embedding(tmp_path / "a.ipadpt")
    assert torch.equal(loaded.features, tensor)  # pyright: ignore[reportArgumentType]
    assert loaded[1:] == (feature, "", "", ())
    check_embedding(loaded, FeatureSpec(feature, features[-1], "x/y", "0123"))


# Checked


@pytest.mark.parametrize(
    ("made", "reads", "words"),
    [
        (one(1, 24, feature="pooled"), FeatureSpec("pooled", 24, "x/y", "ab"), None),
        # by another name
        (
            one(1, 24, feature="pooled", encoder="a/b", fingerprint="ab"),
            FeatureSpec("pooled", 24, "x/y", "ab"),
            None,
        ),
        (
            one(1, 24, feature="pooled", encoder="a/b", fingerprint="ab"),
            FeatureSpec("pooled", 24, "x/y"),
            None,
        ),
        (
            one(1, 20, feature="pooled", encoder="a/b"),
            POOLED,
            "a.x: pooled features of a/b, 20 wide; this adapter reads pooled ones, 24 wide",
        ),
        (
            one(1, 5, 24, feature="penultimate"),
            POOLED,
            "penultimate features, 24 wide; this adapter reads pooled ones, 24 wide",
        ),
        (one(1, 24, feature="pooled"), PENULTIMATE, "this adapter reads penultimate ones, 32 wide"),
        (
            one(1, 24, feature="pooled", encoder="a/b", fingerprint="cd"),
            FeatureSpec("pooled", 24, "x/y", "ab"),
            "of a/b, 24 wide, were made by an encoder of other weights (fingerprint cd); "
            "this adapter reads pooled ones, 24 wide, of x/y (fingerprint ab)",
        ),
    ],
)
def test_features_that_an_adapter_cannot_read(
    made: Embedding, reads: FeatureSpec, words: str | None
) -> None:
    if words is None:
        check_embedding(made, reads, "a.x")
        return
    with pytest.raises(MismatchError) as caught:
        check_embedding(made, reads, "a.x")
    one_line(caught, words)


def test_a_hash_of_rounded_weights_is_not_compared() -> None:
    features = random_features(1, 24, dtype=torch.bfloat16)
    check_embedding(
        Embedding(features, "pooled", "a/b", "cd"), FeatureSpec("pooled", 24, "x/y", "ab")
    )


@pytest.mark.parametrize("name", ["base", "plus"])
def test_what_a_file_reads(name: str) -> None:
    file = read_adapter(ADAPTERS / f"{name}.safetensors")
    assert file.header is not None
    reads = FeatureSpec.of(file)
    assert reads == (
        file.variant.feature,
        file.feature_dim,
        file.header.encoder,
        file.header.encoder_fingerprint,
    )
    encoder = tiny_encoder()
    features = encoder.features(pictures(1), file.variant.feature)
    with pytest.raises(MismatchError):
        check_embedding(
            Embedding(features, file.variant.feature, "tiny", encoder.fingerprint()), reads
        )


# Refused


def tensors(*, told: Any = None, **held: Tensor) -> Write:
    """Writes a safetensors file with this header."""
    metadata = {} if told is None else {KEY: told if isinstance(told, str) else json.dumps(told)}
    return lambda path: write_tensors(
        path, {name.replace("_", "."): tensor for name, tensor in held.items()}, metadata
    )


def pickled(held: Any) -> Write:
    return lambda path: torch.save(held, path)


class Trap:
    """A pickle that would run something."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/never",)


GOOD = {
    "format": 1,
    "holds": "image features",
    "feature": "pooled",
    "encoder": "",
    "fingerprint": "",
    "pictures": [],
}
NAN = torch.tensor([[1.0, float("nan")]])
ROW = torch.ones(1, 3)
REFUSED: list[tuple[str, str, Write, str]] = [
    ("missing", "safetensors", lambda _: None, "there is no such file"),
    ("missing", "ipadpt", lambda _: None, "No such file"),
    ("a folder", "ipadpt", Path.mkdir, "Is a directory"),
    ("empty", "safetensors", Path.touch, "is empty"),
    ("empty", "ipadpt", Path.touch, "cut short"),
    ("text", "safetensors", lambda path: path.write_text("features"), "is damaged or cut short"),
    (
        "text",
        "ipadpt",
        lambda path: path.write_text("features"),
        "is damaged or cut short",
    ),
    ("code", "ipadpt", pickled(Trap()), "holds code, not only tensors; refused"),
    ("a list", "ipadpt", pickled([ROW, ROW]), "holds a list instead of one tensor"),
    (
        "whole numbers",
        "ipadpt",
        pickled(torch.ones(1, 3, dtype=torch.long)),
        "not plain tensors of floating-point numbers",
    ),
    ("no rows", "ipadpt", pickled(torch.ones(0, 3)), "not plain tensors of floating-point numbers"),
    ("NaN", "ipadpt", pickled(NAN), "NaN"),
    (
        "a number",
        "ipadpt",
        pickled(torch.tensor(1.0)),
        "a tensor of a single number is neither (K, E) nor",
    ),
    ("four axes", "ipadpt", pickled(torch.ones(1, 2, 3, 4)), "1×2×3×4"),
    (
        "no header",
        "safetensors",
        tensors(features_0=ROW),
        "holds no image features as imprompt embed writes them",
    ),
    ("other tensors", "safetensors", tensors(told=GOOD, other=ROW), "holds no image features"),
    ("no JSON", "safetensors", tensors(told="{", features_0=ROW), "header that is not valid JSON"),
    (
        "another format",
        "safetensors",
        tensors(told={**GOOD, "format": 2}, features_0=ROW),
        "is of format 2",
    ),
    (
        "a header lacking a part",
        "safetensors",
        tensors(told={"holds": "image features", "format": 1}, features_0=ROW),
        "feature: ",
    ),
    ("NaN", "safetensors", tensors(told=GOOD, features_0=NAN), "NaN"),
    (
        "uneven rows",
        "safetensors",
        tensors(told=GOOD, features_0=ROW, features_1=torch.ones(2, 3)),
        "1×3, 2×3",
    ),
    ("another kind of file", "bin", pickled({"features": {"0": ROW}}), "holds no image features"),
]


@pytest.mark.parametrize(
    ("ending", "write", "words"),
    [row[1:] for row in REFUSED],
    ids=[f"{row[0]} {row[1]}" for row in REFUSED],
)
def test_what_holds_no_features_is_refused_in_one_line(
    ending: str, write: Write, words: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{ending}"
    write(path)
    with pytest.raises(CheckpointError) as caught:
        load_embedding(path)
    one_line(caught, str(path), words)


def test_an_adapter_is_no_embedding() -> None:
    with pytest.raises(CheckpointError) as caught:
        load_embedding(ADAPTERS / "base.safetensors")
    one_line(caught, "holds no image features")


@pytest.mark.parametrize("ending", ["safetensors", "ipadpt"])
def test_damage_never_escapes_as_another_error(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    embedding = one(2, 24, feature="pooled", encoder="x/y", fingerprint="ab", pictures=("cd",))
    if ending == "ipadpt":
        torch.save(embedding.features, path)
    else:
        save_embedding(path, embedding)
    whole, draw = path.read_bytes(), random.Random(0)
    for cut in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError) as caught:
            load_embedding(path)
        one_line(caught)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 3, 30))):
            damaged[draw.randrange(min(len(damaged), draw.choice((64, 10**6))))] = draw.randrange(
                256
            )
        path.write_bytes(damaged)
        try:
            assert load_embedding(path).features is not None
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either is right


@pytest.mark.parametrize(
    ("name", "embedding", "words"),
    [
        ("a.pt", one(1, 24), "features are written to .safetensors files"),
        ("a.safetensors", Embedding(NAN), "NaN"),
        ("a.safetensors", one(24), "a tensor of 24 is neither"),
        ("nowhere/a.safetensors", one(1, 24), "cannot write"),
    ],
)
def test_what_cannot_be_saved_leaves_nothing(
    name: str, embedding: Embedding, words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        save_embedding(tmp_path / name, embedding)
    one_line(caught, words)
    assert os.listdir(tmp_path) == []


# imprompt embed


def embed(*arguments: object) -> str:
    """What the command prints; its errors are raised."""
    commands()
    words = ["embed", *map(str, arguments)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path, picture in zip(paths, pictures(2), strict=True):
        picture.save(path)
    return paths


@pytest.mark.parametrize(("adapter", "shape"), [("base", (2, 256)), ("plus", (2, 101, 192))])
def test_pictures_embedded_for_the_packaged_model(
    adapter: str, shape: tuple[int, ...], photos: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "a.safetensors"
    said = embed(*photos, "--out", out, "--adapter", adapter)
    loaded = load_embedding(out)
    file = read_adapter(ADAPTERS / f"{adapter}.safetensors")
    check_embedding(loaded, FeatureSpec.of(file), out)
    encoder = open_encoder(find_model("emoji").adapters[adapter].encoder, "cpu", torch.float32)
    expected = encoder.features([open_image(path) for path in photos], file.variant.feature)
    assert torch.equal(loaded.features, expected)  # pyright: ignore[reportArgumentType]
    assert loaded.fingerprint == encoder.fingerprint()
    assert loaded.pictures == tuple(sha256(path.read_bytes()).hexdigest() for path in photos)
    assert said.splitlines() == [
        f"{out}  {file.variant.feature} features of {encoder.source}, {'×'.join(map(str, shape))}"
    ]


def test_a_file_that_stands_is_kept(photos: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    out.write_text("an adapter, say")
    with pytest.raises(SettingError, match=r"exists: give another name, or --force to replace it"):
        embed(photos[0], "--out", out)
    assert out.read_text() == "an adapter, say"
    embed(photos[0], "--out", out, "--force")
    assert load_embedding(out).features is not None
    encoder = Path(shutil.copytree(PACKAGED / "emoji" / "image_encoder", tmp_path / "encoder"))
    embed(photos[0], "--encoder", encoder, "--out", out, "--force")
    assert load_embedding(out).encoder == "./encoder"  # no folder of the user
    inside = encoder / "model.safetensors"
    with pytest.raises(SettingError, match="is one of the inputs"):
        embed(photos[0], "--encoder", encoder, "--out", inside, "--force")
    assert filecmp.cmp(inside, PACKAGED / "emoji" / "image_encoder" / inside.name, shallow=False)


def test_pictures_are_prepared_as_given(photos: list[Path], tmp_path: Path) -> None:
    embed(photos[0], "--out", tmp_path / "a.safetensors", "--crop", "tiles", "--sharpening", "0.5")
    encoder = open_encoder(find_model("emoji").adapters["base"].encoder, "cpu", torch.float32)
    tiles = prepare(open_image(photos[0]), Preparation(crop="tiles", sharpening=0.5), encoder)
    loaded = load_embedding(tmp_path / "a.safetensors")
    assert torch.equal(loaded.features, encoder.features(tiles, "pooled"))  # pyright: ignore[reportArgumentType]
    assert len(loaded.pictures) == 1
    assert len(tiles) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "a.bin"], "a.bin: features are written to .safetensors files"),
        (["--out", "a.safetensors", "--crop", "centre"], "near: center"),
        (["--out", "a.safetensors", "--sharpening", "2"], "sharpening = 2.0"),
        (["--out", "a.safetensors", "--ignore", "nowhere.png"], "nowhere.png does not exist"),
        (["--out", "a.safetensors", "--dtype", "int8"], "dtype = 'int8': input should be"),
        (["--out", "a.safetensors", "--adapter", "extra"], "no adapter 'extra'"),
        (["nowhere.png", "--out", "a.safetensors"], "nowhere.png does not exist"),
    ],
)
def test_wrong_use_is_reported_in_one_line(
    arguments: list[str],
    words: str,
    photos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImpromptError) as caught:
        embed(photos[0], *arguments)
    one_line(caught, words)
    assert not (tmp_path / "a.safetensors").exists()


NEGATIVE = torch.zeros(1, 1, 24)
POOLED, STATES = random_features(1, 24), random_features(1, 6, 24)


@pytest.mark.parametrize(
    ("held", "features"),
    [
        (POOLED, POOLED),  # ComfyUI
        (POOLED[None], POOLED),  # ComfyUI, of one token
        ([torch.cat([NEGATIVE, POOLED[None]])], POOLED),  # diffusers with guidance
        ([POOLED[None]], POOLED),  # and without
        (STATES, STATES),
        ([torch.stack([torch.zeros_like(STATES), STATES])], STATES),
        ([STATES[None]], STATES),
    ],
)
def test_features_of_each_writer_of_ipadpt(held: Any, features: Tensor, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "a.ipadpt")
    found = load_embedding(tmp_path / "a.ipadpt")
    assert found.parts[0].equal(features)
    assert found.feature == {2: "pooled", 3: "penultimate"}[features.ndim]
