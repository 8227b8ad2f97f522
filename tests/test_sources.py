"""Training sets: every kind of source gives the same samples, says what is wrong with bad ones, and
survives damage.
"""

import hashlib
import io
import json
import math
import pickle
import random
import re
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from imprompt.errors import SettingError
from imprompt.images import image_size, open_image, open_mask
from imprompt.training.contents import digest_of, edited_samples, stamp_of
from imprompt.training.order import Order
from imprompt.training.recipe import Columns, Data
from imprompt.training.samples import BadSample, Opener, Sample, Source
from imprompt.training.shards import HEADER, TarIndex, cache_folder, fetch
from imprompt.training.sources import SOURCES, open_source
from tests.sets import (
    DAMAGE,
    MAKERS,
    Item,
    damaged,
    items,
    make_folder,
    make_hub,
    make_list,
    make_shards,
    masked,
    members,
    noise_picture,
    png,
    write_tar,
)

SIZES = ((48, 40), (24, 64), (33, 32))


@pytest.fixture(autouse=True)
def _caches_aside(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("IMPROMPT_CACHE", str(folder))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "hub"))


def same(opener: Opener, data: bytes | None) -> bool:
    assert data is not None
    return np.array_equal(np.asarray(opener()), np.asarray(open_image(data)))


def holds(source: Source, made: list[Item]) -> None:
    """Assert that the source gives exactly these samples."""
    assert len(source) == sum(source.shards) == len(made)
    for index, item in enumerate(made):
        sample = source.read(index)
        assert item.key in sample.name == source.name(index)
        assert sample.text == item.text
        assert same(sample.picture, item.data)
        assert all(
            same(opener, data)
            for opener, data in zip(sample.references, item.references or (item.data,), strict=True)
        )
        assert source.size(index) == sample.picture().size


def rows_are_named(source: Source) -> bool:
    return source.name(0).startswith("row 0 of hub:")


@pytest.mark.parametrize("references", [0, 1, 2])
@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_source_gives_what_the_files_hold(
    kind: str, references: int, tmp_path: Path
) -> None:
    made = items(7, SIZES, references)
    source = open_source(MAKERS[kind](tmp_path / kind, made))
    if rows_are_named(source):
        made = [
            Item(f"row {n} of", item.data, item.text, item.references)
            for n, item in enumerate(made)
        ]
    holds(source, made)
    assert not source.bad_shards
    holds(pickle.loads(pickle.dumps(source)), made)
    if not references:
        sample = source.read(3)
        assert sample.references == (sample.picture,)


def test_shards_count_their_samples(tmp_path: Path) -> None:
    assert open_source(make_shards(tmp_path, 10, per_shard=4)).shards == (4, 4, 2)
    assert open_source(make_folder(tmp_path / "folder", 10)).shards == (10,)


@pytest.mark.parametrize("trouble", DAMAGE)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_bad_sample_is_named_and_the_others_are_read(
    kind: str, trouble: str, tmp_path: Path
) -> None:
    source = pickle.loads(
        pickle.dumps(open_source(MAKERS[kind](tmp_path, damaged(items(3), {1: trouble}))))
    )
    for index in (0, 2):
        assert source.read(index).picture().size == (48, 40)
    with pytest.raises(BadSample) as caught:
        source.read(1).picture()
    assert caught.value.name == source.name(1)
    assert caught.value.kind == DAMAGE[trouble][1]
    assert "\n" not in str(caught.value)
    assert (
        str(pickle.loads(pickle.dumps(caught.value))) == f"{caught.value.name}: {caught.value.why}"
    )
    if trouble in ("empty", "not an image", "too large", "absent"):
        with pytest.raises(BadSample, match=source.name(1)):
            source.size(1)


@pytest.mark.parametrize("kind", MAKERS)
def test_captions_may_be_optional(kind: str, tmp_path: Path) -> None:
    data = MAKERS[kind](tmp_path, damaged(items(3), {0: "no caption", 1: "blank caption"}))
    source = open_source(data.model_copy(update={"captions": "optional"}))
    assert [source.read(index).text for index in range(3)] == ["", "", "noise 2"]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_bad_reference_is_the_samples_trouble(kind: str, tmp_path: Path) -> None:
    good, other = items(2, references=2)
    spoilt = Item(other.key, other.data, other.text, (other.references[0], b""))
    source = open_source(MAKERS[kind](tmp_path, [good, spoilt]))
    sample = source.read(1)
    assert same(sample.picture, other.data)
    assert same(sample.references[0], other.references[0])
    with pytest.raises(BadSample, match=r"reference.* is empty") as caught:
        sample.references[1]()
    assert (caught.value.name, caught.value.kind) == (source.name(1), "empty")


# Masks

MASKS = {"columns": Columns(mask="mask")}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_source_gives_masks(kind: str, tmp_path: Path) -> None:
    made = masked(items(7, SIZES, references=1))
    data = MAKERS[kind](tmp_path, made)
    source = pickle.loads(pickle.dumps(open_source(data.model_copy(update=MASKS))))
    for index, item in enumerate(made):
        sample = source.read(index)
        mask = sample.checked_mask(sample.picture())
        assert (mask is None) == (item.mask is None)
        assert mask is None or np.array_equal(
            np.asarray(mask), np.asarray(open_mask(item.mask or b""))
        )
        assert same(sample.picture, item.data)
        assert same(sample.references[0], item.references[0])
    assert open_source(data).read(0).mask is None  # they are not asked for


@pytest.mark.parametrize(
    ("mask", "kind", "words"),
    [
        (b"", "empty", "mask.* is empty"),
        (b"<html>404 Not Found</html>", "no picture", "mask.* is not a picture"),
        (
            png(noise_picture(1, (40, 48))),
            "another shape",
            "the mask has 40×48 pixels, the picture 48×40: another aspect ratio",
        ),
    ],
)
@pytest.mark.parametrize("source_kind", MAKERS)
def test_a_bad_mask_is_the_samples_trouble(
    source_kind: str, mask: bytes, kind: str, words: str, tmp_path: Path
) -> None:
    made = [replace(item, mask=mask) for item in items(1)]
    source = open_source(MAKERS[source_kind](tmp_path, made).model_copy(update=MASKS))
    sample = source.read(0)
    with pytest.raises(BadSample, match=words) as caught:
        sample.checked_mask(sample.picture())
    assert (caught.value.name, caught.value.kind) == (source.name(0), kind)
    assert "\n" not in str(caught.value)


def test_an_absent_mask_file_is_the_samples_trouble(tmp_path: Path) -> None:
    data = make_folder(tmp_path, masked(items(1)))
    (tmp_path / "0000-mask.png").unlink()
    sample = open_source(data.model_copy(update=MASKS)).read(0)
    with pytest.raises(BadSample, match=r"the mask .*0000-mask\.png does not exist"):
        sample.checked_mask(sample.picture())


@given(
    st.integers(8, 3000),
    st.integers(8, 3000),
    st.floats(0.1, 1),
    st.sampled_from([round, math.floor, math.ceil]),
)
def test_a_smaller_mask_fits_its_picture(
    width: int, height: int, scale: float, rounded: Callable[[float], int]
) -> None:
    def blank(mode: str, *sides: int) -> Callable[[], Image.Image]:
        return lambda: Image.new(mode, sides)

    picture = blank("RGB", width, height)
    mask = blank("L", max(1, rounded(scale * width)), max(1, rounded(scale * height)))
    sample = Sample("a", picture, (picture,), "a", mask)
    assert sample.checked_mask(picture()) is not None
    other = Sample(
        "a", picture, (picture,), "a", blank("L", width, height + max(2, width // 8 + height // 8))
    )
    with pytest.raises(BadSample, match="another aspect ratio"):
        other.checked_mask(picture())


@pytest.mark.parametrize("kind", MAKERS)
def test_a_set_without_any_mask_is_refused(kind: str, tmp_path: Path) -> None:
    data = MAKERS[kind](tmp_path, 2)
    with pytest.raises(SettingError, match=r"data\.columns\.mask") as caught:
        open_source(data.model_copy(update=MASKS))
    assert "\n" not in str(caught.value)


def test_a_mask_that_is_no_file_name_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_bytes(
        GOOD_LINE + b'{"file_name": "0000.png", "text": "a", "mask": ["a.png"]}'
    )
    with pytest.raises(SettingError, match="line 2: mask is not a file name"):
        open_source(Data(source=str(tmp_path), **MASKS))


# Listings


def test_columns_may_be_called_otherwise(tmp_path: Path) -> None:
    data = make_folder(tmp_path, 1, references=1)
    (tmp_path / "metadata.jsonl").write_text(
        '{"target": "0000.png", "prompt": "one", "seen": "0000-reference-0.png"}\n'
    )
    names = Columns(image="target", text="caption, prompt", reference="seen")
    sample = open_source(data.model_copy(update={"columns": names})).read(0)
    assert sample.text == "one"
    assert same(sample.references[0], (tmp_path / "0000-reference-0.png").read_bytes())


def test_listings_may_name_files_elsewhere(tmp_path: Path) -> None:
    png_file = tmp_path / "a.png"
    png_file.write_bytes(png(noise_picture(0)))
    (tmp_path / "set").mkdir()
    paths = [str(png_file), "../a.png"]
    (tmp_path / "set" / "list.json").write_text(
        json.dumps([{"image_file": path, "text": "a"} for path in paths])
    )
    source = open_source(Data(source=str(tmp_path / "set" / "list.json")))
    assert all(same(source.read(index).picture, png_file.read_bytes()) for index in (0, 1))


def test_sizes_in_the_listing_are_believed(tmp_path: Path) -> None:
    data = make_folder(tmp_path, 1)
    line = {"file_name": "0000.png", "text": "a"}
    sides = [
        {"width": 7, "height": 5},
        {"width": 0, "height": 5},
        {"width": "7", "height": 5},
        {"width": 7},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line | side) for side in sides))
    source = open_source(data)
    assert [source.size(index) for index in range(4)] == [(7, 5), *[(48, 40)] * 3]


def test_a_listing_of_another_editor_is_read(tmp_path: Path) -> None:
    """A byte-order mark, Windows line ends, blank lines, and a separator that is a line end to
    Python only.
    """
    data = make_folder(tmp_path, 2)
    lines = [
        '{"file_name": "0000.png", "text": "one\u2028two"}',
        "",
        '{"file_name": "0001.png", "text": "three"}',
    ]
    (tmp_path / "metadata.jsonl").write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    source = open_source(data)
    assert [source.read(index).text for index in range(2)] == ["one\u2028two", "three"]


def test_half_an_emoji_is_no_caption(tmp_path: Path) -> None:
    data = make_folder(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0000.png", "text": "\\ud83d"}')
    with pytest.raises(BadSample, match="its caption is not Unicode text"):
        open_source(data).read(0)


GOOD_LINE = b'{"file_name": "0000.png", "text": "a"}\n'
# The second line of metadata.jsonl -> words of the refusal
BAD_LINES = [
    (b"\xff\xfe", "line 2: not UTF-8 text"),
    (b'{"file_name": ', "line 2: not valid JSON"),
    (b"[1, 2]", "line 2: found list instead of an object"),
    (b"7", "line 2: found int instead of an object"),
    (b'{"text": "a"}', "line 2: no text under file_name"),
    (b'{"file_name": ""}', "line 2: no text under file_name"),
    (b'{"file_name": 7}', "line 2: no text under file_name"),
    (b'{"file_name": "a.png", "text": ["a"]}', "line 2: text is not a string"),
    (b'{"file_name": "a.png", "reference": {"a": 1}}', "is neither a file name nor a list of them"),
    (
        b'{"file_name": "a.png", "references": ["a", null]}',
        "is neither a file name nor a list of them",
    ),
    (b"[" * 100_000, "line 2: nested too deep"),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES)
def test_a_malformed_listing_is_refused_with_its_line(
    line: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / "metadata.jsonl").write_bytes(GOOD_LINE + line)
    with pytest.raises(SettingError) as caught:
        open_source(Data(source=str(tmp_path)))
    assert str(caught.value).startswith(str(tmp_path / "metadata.jsonl"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "line 1: not valid JSON"),
        (b"[]", "lists no pictures"),
        (b'{"image_file": "a.png"}', "holds a dict, not a list of pictures"),
        (b'[\n{"image_file": "a.png"},\n{"image_file" "b.png"}]', "line 3: not valid JSON"),
        (b'[{"image_file": "a.png"}, {"file_name": "b.png"}]', "entry 2: no text under image_file"),
        (b'["a.png"]', "entry 1: found str instead of an object"),
        (b"[\n\xff]", "line 2: not UTF-8 text"),
    ],
)
def test_a_malformed_list_is_refused_with_its_place(
    text: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / "list.json").write_bytes(text)
    with pytest.raises(SettingError) as caught:
        open_source(Data(source=str(tmp_path / "list.json")))
    assert words in str(caught.value)


@pytest.mark.parametrize("form", [row.form for row in SOURCES])
def test_an_unknown_source_is_reported_the_known_forms(form: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="known: ") as caught:
        open_source(Data(source=str(tmp_path / "no such folder")))
    assert form in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{0}/absent.json", "there is no such file"),
        ("{0}", "holds no metadata.jsonl"),
        ("{0}/*.tar", "no file fits this pattern"),
        ("{0}/absent.tar", "absent.tar: does not exist"),
        ("{0}/{{a,b}}.tar", "none of its 2 shards can be read"),
        ("{0}/{{a.tar", "Unbalanced braces"),
        ("s3://bucket/a.tar", "s3: is not supported (known: ais"),
        ("hub:{0}", "cannot be opened"),
        ("hub:{0}:validation", "cannot be opened"),
    ],
)
def test_a_source_that_is_not_there(source: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError) as caught:
        open_source(Data(source=source.format(tmp_path)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# The Hub


def test_a_hub_imagefolder_names_references_in_its_own_way(tmp_path: Path) -> None:
    made = items(3, references=1)
    data = make_folder(tmp_path, made)
    listing = tmp_path / "metadata.jsonl"
    listing.write_text(listing.read_text().replace('"reference"', '"reference_file_name"'))
    for source in (open_source(data), open_source(Data(source=f"hub:{tmp_path}"))):
        for index, item in enumerate(made):
            sample = source.read(index)
            assert sample.text == item.text
            assert same(sample.picture, item.data)
            assert same(sample.references[0], item.references[0])


def test_hub_columns_are_looked_for_at_once(tmp_path: Path) -> None:
    data = make_hub(tmp_path, 2)
    with pytest.raises(
        SettingError, match=r"no column picture: it has image, text; data.columns.image says"
    ):
        open_source(data.model_copy(update={"columns": Columns(image="picture")}))
    with pytest.raises(SettingError, match="no column caption"):
        open_source(data.model_copy(update={"columns": Columns(text="caption")}))
    with pytest.raises(SettingError, match="its column image holds no text"):
        open_source(data.model_copy(update={"columns": Columns(text="image")}))
    optional = data.model_copy(update={"columns": Columns(text="caption"), "captions": "optional"})
    assert open_source(optional).read(0).text == ""


def test_hub_sizes_and_splits(tmp_path: Path) -> None:
    import datasets

    columns = {
        "image": [{"bytes": png(noise_picture(n)), "path": None} for n in range(2)],
        "width": [7, None],
        "height": [5, 6],
    }
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "validation.parquet")
    source = open_source(Data(source=f"hub:{tmp_path}:validation", captions="optional"))
    assert [source.size(index) for index in range(2)] == [(7, 5), (48, 40)]


# Headers


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff", "avif"])
def test_the_size_is_that_of_the_upright_picture(
    ending: str, orientation: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    noise_picture(0, (40, 24)).save(path, exif=exif)
    assert image_size(path) == image_size(path.read_bytes()) == open_image(path).size


def test_the_size_is_read_from_the_header_alone(tmp_path: Path) -> None:
    """Of a picture whose pixels are cut off, from folders and from shards, also where the header is
    longer than is first read.
    """
    random = np.random.default_rng(0)
    data = png(Image.fromarray(random.integers(0, 256, (200, 300, 3), np.uint8)))
    assert len(data) > HEADER
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (200, 300, 3), np.uint8)).save(
        buffer, "JPEG", icc_profile=random.bytes(2 * HEADER)
    )
    for whole in (data, buffer.getvalue()):
        cut = Item("a", whole[:-1000], "a")
        for kind in ("folder", "shards"):
            source = open_source(MAKERS[kind](tmp_path / f"{kind}-{len(whole)}", [cut]))
            assert source.size(0) == (300, 200)
            with pytest.raises(BadSample, match="damaged, truncated"):
                source.read(0).picture()


# Tar shards

pieces = st.sampled_from(["a", "b", "a", ".", "/", ".png", ".ref.png", ".TXT", "__a__", "x.y/"])
names = (
    st.lists(pieces, min_size=1, max_size=5)
    .map(lambda parts: "".join(parts).strip("/"))
    .filter(bool)
)


@given(
    st.lists(st.tuples(names, st.binary(max_size=700)), unique_by=lambda member: member[0].lower()),
    st.sampled_from([0, 1, 2]),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_members_group_as_webdataset_groups_them(
    tmp_path: Path, layout: list[tuple[str, bytes]], kind: int
) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    path = tmp_path / "a.tar"
    write_tar(
        path,
        [(name * (12 if kind and n == 3 else 1), data) for n, (name, data) in enumerate(layout)],
        kind,
    )
    with path.open("rb") as file:
        samples = list(group_by_keys(tar_file_expander([{"url": "", "stream": file}])))
    theirs = [
        {key: value for key, value in sample.items() if key != "__url__"} for sample in samples
    ]
    try:
        tar = pickle.loads(pickle.dumps(TarIndex(path)))
    except BadSample as error:
        assert error.kind in ("empty", "no tar")  # noqa: PT017 - an empty file is no tar
        tar = []
    ours = [
        {"__key__": key} | {ending: tar.read(number, ending) for ending in tar.members(number)}
        for number, key in enumerate(tar.keys if tar else [])
    ]
    assert ours == theirs
    assert not tar or tar.whole


def test_shards_by_pattern_and_other_members(tmp_path: Path) -> None:
    """Names with dots in folders, folders, links and notes among the members.

    One picture format or another.
    """
    made = items(4)
    make_shards(tmp_path / "a.b", made[:2])
    with tarfile.open(tmp_path / "a.b" / "0001.tar", "w") as tar:
        folder, link = tarfile.TarInfo("x.y"), tarfile.TarInfo("x.y/0009.png")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "0000.png"
        tar.addfile(folder)
        tar.addfile(link)
        webp = io.BytesIO()
        open_image(made[3].data or b"").save(webp, "WEBP", lossless=True)
        for name, data in (
            ("__notes__/a.txt", b"{}"),
            ("x.y/0002.PNG", made[2].data),
            ("x.y/0002.txt", b"noise 2"),
            ("0003.json", b"{}"),
            ("0003.webp", webp.getvalue()),
            ("0003.txt", b"noise 3\n"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data or b"")
            tar.addfile(member, io.BytesIO(data or b""))
    source = open_source(Data(source=str(tmp_path / "a.b" / "*.tar")))
    assert source.shards == (2, 2)
    holds(source, made)


def test_a_shard_that_is_none_is_named_and_left_out(tmp_path: Path) -> None:
    made = items(12)
    make_shards(tmp_path, made, per_shard=2)
    (tmp_path / "0001.tar").write_bytes(b"<html>404 Not Found</html>" * 100)
    (tmp_path / "0002.tar").unlink()
    (tmp_path / "0003.tar").write_bytes(b"")
    write_tar(tmp_path / "0004.tar", [])
    with tarfile.open(tmp_path / "0005.tar", "w:gz") as tar:
        tar.add(tmp_path / "0000.tar", "a.txt")
    (tmp_path / "0006.tar").mkdir()
    source = open_source(Data(source=f"file://{tmp_path}/{{0000..0006}}.tar"))
    holds(source, made[:2])
    assert [(Path(bad.name).name, bad.kind) for bad in source.bad_shards] == [
        ("0001.tar", "no tar"),
        ("0002.tar", "absent"),
        ("0003.tar", "no tar"),
        ("0004.tar", "empty"),
        ("0005.tar", "no tar"),
        ("0006.tar", "not readable"),
    ]


def test_a_shard_of_something_else(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        [("0000.npy", b"1"), ("0000.txt", b"a"), ("0001.npy", b"1"), ("0001.txt", b"a")],
    )
    source = open_source(Data(source=str(tmp_path / "a.tar")))
    for index in (0, 1):
        with pytest.raises(
            BadSample,
            match=r"holds no picture, only npy, txt; data\.columns\.image names the ending",
        ):
            source.read(index)


def test_a_caption_in_another_encoding_is_refused(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        [("0000.png", png(noise_picture(0))), ("0000.txt", "é".encode("latin-1"))],
    )
    with pytest.raises(BadSample, match="the txt is not UTF-8 text"):
        open_source(Data(source=str(tmp_path / "a.tar"))).read(0)


def test_endings_may_be_called_otherwise(tmp_path: Path) -> None:
    data = [png(noise_picture(n)) for n in range(3)]
    write_tar(
        tmp_path / "a.tar",
        [
            ("a.in.png", data[0]),
            ("a.in.2.png", data[1]),
            ("a.out.png", data[2]),
            ("a.prompt", b"x"),
        ],
    )
    columns = Columns(image="out", text="prompt", reference="in")
    sample = open_source(Data(source=str(tmp_path / "a.tar"), columns=columns)).read(0)
    assert sample.text == "x"
    assert same(sample.picture, data[2])
    assert [same(opener, d) for opener, d in zip(sample.references, data[:2], strict=True)] == [
        True,
        True,
    ]


def test_a_tar_cut_anywhere_gives_its_whole_samples(tmp_path: Path) -> None:
    made = items(4, (9, 8))
    write_tar(tmp_path / "whole.tar", [file for item in made for file in members(item)])
    whole, index = (tmp_path / "whole.tar").read_bytes(), TarIndex(tmp_path / "whole.tar")
    ends = [
        max(start + size for start, size in index.members(number).values()) for number in range(4)
    ]
    for cut in range(100, ends[-1] + 600, 67):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        try:
            source = open_source(Data(source=str(tmp_path / "a.tar")))
        except SettingError:
            assert cut < 512
            continue
        last = len(source) - 1
        holds_all = all(
            same(source.read(number).picture, made[number].data) for number in range(last)
        )
        assert holds_all
        # every sample that is all there is known
        assert last + 1 >= sum(end <= cut for end in ends)
        if cut < ends[-1]:
            with pytest.raises(
                BadSample, match=f"{made[last].key} in .*a.tar: the tar is cut off"
            ) as caught:
                source.read(last)
            assert caught.value.kind == "damaged"


def test_damaged_headers_never_escape_as_another_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [file for item in items(3, (9, 8)) for file in members(item)])
    whole, draw = (tmp_path / "a.tar").read_bytes(), random.Random(0)
    index = TarIndex(tmp_path / "a.tar")
    headers = [start - 512 for number in range(3) for start, _ in index.members(number).values()]
    for _ in range(200):
        damaged_tar = bytearray(whole)
        for _ in range(draw.choice((1, 3, 30))):
            damaged_tar[draw.choice(headers) + draw.randrange(512)] = draw.randrange(256)
        (tmp_path / "a.tar").write_bytes(damaged_tar)
        try:
            source = open_source(Data(source=str(tmp_path / "a.tar"), captions="optional"))
        except SettingError:
            continue
        for number in range(len(source)):
            try:
                source.read(number).picture()
            except BadSample as error:
                assert "\n" not in str(error)  # noqa: PT017 - either is right


@pytest.mark.parametrize("size", [-512, -(10**9), 2**80])
def test_a_member_of_impossible_size_ends_the_shard(size: int, tmp_path: Path) -> None:
    """A negative one would lead the standard library round in a circle."""
    made = items(2)
    write_tar(tmp_path / "a.tar", [file for item in made for file in members(item)])
    data, start = (
        bytearray((tmp_path / "a.tar").read_bytes()),
        TarIndex(tmp_path / "a.tar").members(1)["png"][0],
    )
    header = data[start - 512 : start]
    header[124:136] = size.to_bytes(12, "big", signed=True)
    header[124] |= 0x80  # the mark of a size that is not in octal digits
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    data[start - 512 : start] = header
    (tmp_path / "a.tar").write_bytes(data)
    source = open_source(Data(source=str(tmp_path / "a.tar")))
    assert source.read(0).text == "noise 0"
    with pytest.raises(BadSample):
        source.read(1)


def test_a_shard_that_goes_away(tmp_path: Path) -> None:
    data = make_shards(tmp_path, 2)
    source = open_source(data)
    (tmp_path / "0000.tar").unlink()
    with pytest.raises(BadSample, match=r"0001 in .*0000\.tar: cannot be read"):
        source.read(1)


def test_shards_are_read_from_many_threads(tmp_path: Path) -> None:
    made = items(24)
    source = open_source(make_shards(tmp_path, made))
    with ThreadPoolExecutor(8) as pool:
        assert all(
            pool.map(lambda n: same(source.read(n % 24).picture, made[n % 24].data), range(200))
        )


# Remote shards


def test_a_remote_shard_is_fetched_once_and_whole(tmp_path: Path) -> None:
    made = items(4)
    make_shards(tmp_path / "far", made)
    url = f"pipe:echo x >> {tmp_path}/log; sleep 0.1; cat {tmp_path}/far/0000.tar"
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
    cache_folder().mkdir(parents=True)
    (cache_folder() / f".{name}.0.part").write_bytes(b"of a process that was killed")
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(fetch, [url] * 4, [cache_folder() / name] * 4)) == {
            cache_folder() / name
        }
    assert (tmp_path / "log").read_text() == "x\n"
    assert {path.name for path in cache_folder().glob("*")} <= {name, name.replace(".tar", ".lock")}
    source = open_source(Data(source=url))
    holds(source, made)
    assert (tmp_path / "log").read_text() == "x\n"
    assert source.name(0) == f"0000 in {url}"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("cat {0}/far/0000.tar; exit 3", "ended with code 3"),
        ("head -c 1000 {0}/far/0000.tar | grep -q nothing", "ended with code 1"),
        ("echo no tar at all", "is not a tar file"),
        ("true", "is not a tar file"),
    ],
)
def test_a_fetch_that_fails_leaves_nothing(command: str, words: str, tmp_path: Path) -> None:
    make_shards(tmp_path / "far", 4)
    with pytest.raises(SettingError) as caught:
        open_source(Data(source=f"pipe:{command.format(tmp_path)}"))
    assert words in str(caught.value)
    assert not list(cache_folder().glob("*.tar"))
    assert not list(cache_folder().glob(".*.part"))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...

    def do_GET(self) -> None:
        self.server.asked.append(Path(urlsplit(self.path).path).name)  # pyright: ignore[reportAttributeAccessIssue]
        super().do_GET()


class Far:
    """A folder behind a URL that ends with a slash; `asked` are the files that were asked for."""

    def __init__(self, folder: Path, server: ThreadingHTTPServer) -> None:
        self.folder, self.server, self.url = (
            folder,
            server,
            f"http://127.0.0.1:{server.server_port}/far/",
        )
        self.asked: list[str] = []
        server.asked = self.asked  # pyright: ignore[reportAttributeAccessIssue]

    def counts(self, counts: dict[str, int]) -> None:
        (self.folder / "sizes.json").write_text(json.dumps(counts))

    def shards(self) -> Counter[str]:
        """How often each shard was asked for."""
        return Counter(name for name in self.asked if name.endswith(".tar"))

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    if not shutil.which("curl"):
        pytest.skip("webdataset reads URLs with curl")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "far").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    far = Far(tmp_path / "far", server)
    yield far
    far.stop()


def test_shards_behind_a_url(far: Far) -> None:
    made = items(8)
    make_shards(far.folder, made)
    source = open_source(Data(source=far.url + "{0000..0002}.tar"))
    assert far.asked[:2] == ["sizes.json", "index.json"]
    far.stop()
    holds(source, made)
    assert source.shards == (4, 4)
    assert [bad.name for bad in source.bad_shards] == [far.url + "0002.tar"]
    assert "ended with code 22" in source.bad_shards[0].why
    again = open_source(Data(source=far.url + "{0000..0001}.tar"))  # the server is gone
    holds(again, made)


def streamed(far: Far, made: list[Item], **counts: int) -> Source:
    """Shards of four samples behind a URL, as many by their index or as is given otherwise."""
    make_shards(far.folder, made)
    shards = [f"{number:04}" for number in range(len(made) // 4)]
    far.counts(
        {f"{shard}.tar": 4 for shard in shards}
        | {f"{shard}.tar": count for shard, count in counts.items()}
    )
    return open_source(Data(source=far.url + f"{{{shards[0]}..{shards[-1]}}}.tar"))


INDEXES = {
    "sizes.json": {"0000.tar": 4, "0001.tar": "4", "0007.tar": 4},
    "index.json": {
        "wids_version": 1,
        "shardlist": [{"url": f"s3://elsewhere/000{n}.tar", "nsamples": 4} for n in range(2)],
    },
}


@pytest.mark.parametrize("name", INDEXES)
def test_shards_that_an_index_counts_are_fetched_when_they_are_read(name: str, far: Far) -> None:
    made = items(8)
    make_shards(far.folder, made)
    (far.folder / name).write_text(json.dumps(INDEXES[name]))
    source = open_source(Data(source=far.url + "{0000..0001}.tar?download=true"))
    assert source.shards == (4, 4)
    assert not far.shards()
    assert source.name(5) == f"sample 1 of {far.url}0001.tar?download=true"
    source = pickle.loads(pickle.dumps(source))
    for index in (5, 4, 7):
        sample = source.read(index)
        assert (sample.name, sample.text) == (source.name(index), made[index].text)
        assert same(sample.picture, made[index].data)
        assert source.size(index) == (48, 40)
    assert far.shards() == {"0001.tar": 1}
    far.stop()
    # the index is kept
    assert open_source(Data(source=far.url + "{0000..0001}.tar?download=true")).shards == (4, 4)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sizes.json", b"<html>there is no such page</html>"),
        ("sizes.json", b'{"0000.tar": -1}'),
        ("sizes.json", b"[" * 100_000),
        ("index.json", b'{"shards": [{"samples": 4}]}'),
        ("index.json", b'{"shardlist": ["0000.tar"]}'),
        ("index.json", b"[4]"),
    ],
)
def test_what_is_no_index_is_passed_over(name: str, text: bytes, far: Far) -> None:
    make_shards(far.folder, 4)
    (far.folder / name).write_bytes(text)
    source = open_source(Data(source=far.url + "0000.tar"))
    assert source.name(0) == f"0000 in {far.url}0000.tar"
    assert far.shards() == {"0000.tar": 1}


def test_a_shard_that_the_index_does_not_name_is_fetched_to_be_counted(far: Far) -> None:
    made = items(8)
    make_shards(far.folder, made)
    far.counts({"0001.tar": 4})
    source = open_source(Data(source=far.url + "{0000..0001}.tar"))
    assert source.shards == (4, 4)
    assert far.shards() == {"0000.tar": 1}
    assert [source.name(index)[:8] for index in (0, 4)] == ["0000 in ", "sample 0"]


def test_an_index_that_is_wrong(far: Far) -> None:
    """Shards with fewer samples than it says, with more, that are no shards, and that are not
    there.
    """
    made = items(16)
    source = streamed(far, made, **{"0000": 6, "0001": 3})
    (far.folder / "0002.tar").write_bytes(b"<html>404 Not Found</html>" * 100)
    (far.folder / "0003.tar").unlink()
    assert source.shards == (6, 3, 4, 4)
    good = {0: 0, 3: 3, 6: 4, 8: 6}  # by the sample's number there and here
    assert {index: source.read(index).text for index in good} == {
        index: made[n].text for index, n in good.items()
    }
    words = {
        4: "holds 4 samples, its index states 6",
        5: "holds 4 samples",
        9: "is not a tar file",
        12: "is not a tar file",
        13: "ended with code 22",
    }
    for index, why in words.items():
        for ask in (source.read, source.size):
            with pytest.raises(BadSample, match=why) as caught:
                ask(index)
            assert caught.value.name == source.name(index)
            assert "\n" not in str(caught.value)
    assert far.shards()["0002.tar"] == 1  # it is not fetched for every sample of it


def test_streamed_bad_samples_have_their_names(far: Far) -> None:
    made = damaged(items(4), {1: "truncated", 2: "no caption"})
    source = streamed(far, made)
    whole = (far.folder / "0000.tar").read_bytes()
    cut = TarIndex(far.folder / "0000.tar").members(3)["png"][0] + 10
    (far.folder / "0000.tar").write_bytes(whole[:cut])
    for index, words in ((1, "truncated"), (2, "has no caption"), (3, "the tar is cut off")):
        with pytest.raises(BadSample, match=words) as caught:
            source.read(index).picture()
        assert caught.value.name == source.name(index)


def kept() -> list[Path]:
    return list(cache_folder().glob("*/*.tar"))


def test_training_holds_few_streamed_shards_and_fetches_each_once_an_epoch(
    far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imprompt.training.shards.KEEP", 4)
    made = items(48, (9, 8))
    source = streamed(far, made)
    order = Order(np.split(np.arange(48), 12), 4, seed=0, window=2)
    for epoch in range(2):
        far.asked.clear()
        for index in order.epoch(epoch).tolist():
            assert source.read(index).text == made[index].text
            assert len(kept()) <= 4
        assert set(far.shards().values()) == {1}
        # some are still there of the epoch before
        assert len(far.shards()) == 12 if epoch == 0 else len(far.shards()) >= 8
    assert len(kept()) == 4


def test_shards_are_read_while_others_remove_them(
    far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More threads than shards that may stay, each in an order of its own."""
    monkeypatch.setattr("imprompt.training.shards.KEEP", 2)
    made = items(16, (9, 8))
    source = streamed(far, made)

    def read(seed: int) -> bool:
        order = Order(np.split(np.arange(16), 4), 4, seed, window=1).epoch(0).tolist()
        return all(same(source.read(index).picture, made[index].data) for index in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
    assert len(kept()) <= 2


def test_make_list_needs_its_root(tmp_path: Path) -> None:
    data = make_list(tmp_path, 2)
    with pytest.raises(BadSample, match=r"0000.png: the file does not exist"):
        open_source(data.model_copy(update={"root": None})).read(0)


@pytest.mark.parametrize("kind", MAKERS)
def test_samples_have_marks_of_their_content(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal in a copy of the set, others where the caption, the picture or the mask differs."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hub-cache"))
    made = masked(items(4))
    other = [
        made[0],
        replace(made[1], text="another"),
        replace(made[2], data=made[3].data),
        replace(made[3], mask=made[2].mask),
    ]
    one, copy, changed = (
        open_source(MAKERS[kind](tmp_path / name, part).model_copy(update=MASKS))
        for name, part in (("one", made), ("copy", made), ("changed", other))
    )
    marks = [[digest_of(source, index) for index in range(4)] for source in (one, copy, changed)]
    assert marks[0] == marks[1]
    assert len(set(marks[0])) == 4
    assert [a == b for a, b in zip(marks[0], marks[2], strict=True)] == [True, False, False, False]
    assert stamp_of(one, 0) == stamp_of(one, 0) != ""
    table = {"digests": marks[0], "stamps": [stamp_of(one, index) for index in range(4)]}
    assert edited_samples(one, range(4), table) == []
    assert edited_samples(copy, range(4), table) == []
    assert edited_samples(changed, range(4), table) == [1, 2, 3]


@pytest.mark.parametrize("command", [["train"], ["data", "encode"], ["data", "check"]])
@pytest.mark.parametrize(
    "source", ["pipe:touch {}/ran; cat a.tar", "b.tar::pi{{pe:touch {}/ran,c}}"]
)
def test_commands_in_a_recipe_run_only_if_they_are_allowed(
    command: list[str], source: str, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from imprompt.cli import app, commands

    commands()
    recipe, source = tmp_path / "recipe.toml", source.format(tmp_path)
    recipe.write_text(
        f'model = "emoji"\noutput = "{tmp_path}/run"\n[optimization]\nsteps = 1\n'
        f'[data]\nsource = "{source}"\nfeatures = "{tmp_path}/features"\n'
    )
    refused = CliRunner().invoke(app, [*command, str(recipe)]).exception
    assert isinstance(refused, SettingError)
    shell = "touch {}/ran" if "::" in source else "touch {}/ran; cat a.tar"
    assert str(refused) == (
        f"data.source would run the shell command {shell.format(tmp_path)!r}: give --allow-pipe if "
        "you trust it"
    )
    assert not (tmp_path / "ran").exists()
    CliRunner().invoke(app, [*command, str(recipe), "--allow-pipe"])
    assert (tmp_path / "ran").exists()


def listed(at: Path, line: str, captions: Literal["required", "optional"] = "required") -> Source:
    (at / "metadata.jsonl").write_text(line, encoding="utf-8")
    return open_source(Data(source=str(at), captions=captions))


def test_an_absent_caption_of_pandas_is_one_bad_sample(tmp_path: Path) -> None:
    make_folder(tmp_path, 2)
    line = '{"file_name": "0000.png", "text": NaN}\n{"file_name": "0001.png", "text": "a"}'
    with pytest.raises(BadSample, match="has no caption"):
        listed(tmp_path, line).read(0)
    assert listed(tmp_path, line).read(1).text == "a"
    assert listed(tmp_path, line, "optional").read(0).text == ""


@pytest.mark.parametrize(
    ("on_disk", "name"),
    [
        ("inner/a.png", r"inner\a.png"),
        ("e\u0301.png", "\u00e9.png"),
        ("\u00e9.png", "e\u0301.png"),
        ("inner/e\u0301.png", "inner\\\u00e9.png"),
        (r"odd\name.png", r"odd\name.png"),
    ],
)
def test_a_name_is_found_in_any_spelling(on_disk: str, name: str, tmp_path: Path) -> None:
    (tmp_path / on_disk).parent.mkdir(exist_ok=True)
    noise_picture(0, (16, 16)).save(tmp_path / on_disk)
    row = {"file_name": name, "text": "a", "reference": name}
    source = listed(tmp_path, json.dumps(row))
    assert source.name(0) == str(tmp_path / on_disk)
    sample = source.read(0)
    assert sample.picture().size == sample.references[0]().size == (16, 16)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            '{"image": "0000.png", "caption": "a"}',
            "no text under file_name, which names the picture; its keys are 'image', 'caption': "
            "data.columns.image gives another",
        ),
        (
            '{"file_name": "0000.png", "prompt": "a"}',
            "has no captions: text is in none of its entries, only file_name, prompt "
            '(data.columns.text gives another name, data.captions = "optional" trains without)',
        ),
        ('{"file_name": "/", "text": "a"}', "no text under file_name"),
    ],
)
def test_a_refused_listing_says_which_keys_there_are(line: str, words: str, tmp_path: Path) -> None:
    make_folder(tmp_path, 1)
    with pytest.raises(SettingError, match=re.escape(words)):
        listed(tmp_path, line)


def test_what_macos_adds_to_a_tar_is_no_sample(tmp_path: Path) -> None:
    names = ("./._a.png", "./a.png", "__MACOSX/a.png", "./__MACOSX/._a.png", "b/._a.png", "b/a.png")
    write_tar(tmp_path / "a.tar", [(name, b"x") for name in names])
    assert TarIndex(tmp_path / "a.tar").keys == ["./a", "b/a"]


def test_a_dotted_name_in_a_tar_is_explained(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.b.png", b"x"), ("a.b.txt", b"a cat")])
    with pytest.raises(BadSample, match=r"holds no picture, only b.png, b.txt; .*first dot"):
        open_source(Data(source=str(tmp_path / "a.tar"))).read(0)


def test_headers_that_continue_each_other_without_end_are_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 512
    block = header.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(block * 3000)
    with pytest.raises(SettingError, match=r"a.tar: is not a tar file"):
        open_source(Data(source=str(tmp_path / "a.tar")))
