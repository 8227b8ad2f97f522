"""Features on disk: what is read is what was encoded, whoever encoded it, however often that was
stopped; damage is named.
"""

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from imprompt import files
from imprompt.cli import app, commands
from imprompt.errors import ImpromptError, SettingError
from imprompt.files import lock_folder
from imprompt.training import encoding
from imprompt.training.augmented import FeatureContent, PictureReader
from imprompt.training.buckets import bucket_sizes, fit, to_pixels
from imprompt.training.cache import FeatureReader, open_features, read_manifest, verify_folder
from imprompt.training.encoding import encode_set, source_origin
from imprompt.training.examples import Example, Examples, bucket_of, read_example
from imprompt.training.feature_size import FeatureSize
from imprompt.training.features import FeatureEncoder, wanted_identity
from imprompt.training.recipe import Columns, Data
from imprompt.training.references import Parts, PictureReferences
from imprompt.training.samples import BadSample, Sample
from imprompt.variants import find_variant
from tests.tiny import tiny_encoder
from tests.tiny_pipelines import PIPELINES, tiny_pipeline

SIZES = ((40, 56), (64, 32), (32, 64), (48, 48), (90, 40))
BAD = {3: "is empty", 11: "is empty", 12: "is no picture"}


def picture(index: int, size: tuple[int, int]) -> Image.Image:
    width, height = size
    return Image.fromarray(
        np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def grey(index: int, size: tuple[int, int]) -> Image.Image:
    return picture(index, size).convert("L")


@dataclass(frozen=True)
class Noise:
    """A source of small noise pictures; every third has two references."""

    count: int = 23
    bad: dict[int, str] = field(default_factory=dict)
    bad_shards: tuple[BadSample, ...] = ()
    masked: bool = False  # every second sample

    @property
    def shards(self) -> list[int]:
        return [self.count]

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"dïr/{index}.png"

    def size(self, index: int) -> tuple[int, int]:
        if index in self.bad:
            raise BadSample(self.name(index), self.bad[index], "empty")
        return SIZES[index % len(SIZES)]

    def read(self, index: int) -> Sample:
        size = self.size(index)
        target = partial(picture, index, size)
        references = (
            (target,)
            if index % 3
            else tuple(partial(picture, 1000 + index + r, (40, 40)) for r in range(2))
        )
        mask = partial(grey, 2000 + index, size) if self.masked and index % 2 else None
        return Sample(
            self.name(index), target, references, f"picture {index}" if index else "", mask
        )


@cache
def frozen(base: str = "sd1", name: str = "base", seed: int = 1) -> FeatureEncoder:
    return FeatureEncoder(PIPELINES[base](), tiny_encoder(seed), find_variant(name), f"tiny {base}")


def settings(**changes: Any) -> Data:
    return Data(**{"source": "noise", "size": 32, "workers": 0} | changes)


def fill(
    folder: Path,
    source: Any = None,
    encoder: FeatureEncoder | None = None,
    data: Data | None = None,
    **more: Any,
) -> Path:
    source, encoder, data = source or Noise(), encoder or frozen(), data or settings()
    examples = Examples(
        source, bucket_sizes(data, encoder.size(data)), encoder.unit, encoder.references
    )
    encode_set(folder, source, examples, encoder, data, **{"shard": 5} | more)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that tests start: the number of threads decides how sums round."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != ".lock"
    }


class Quick:
    """An encoder without models: its text is the sample's number."""

    unit, channels = 2, 3
    references = PictureReferences(tiny_encoder().processor)

    def __init__(self, name: str = "quick") -> None:
        self.name = name

    def size(self, data: Data) -> int:
        return data.size or 32

    def identity(self, data: Data) -> dict[str, Any]:
        return wanted_identity("model", self.name, find_variant("base"), data, self.size(data))

    def latents(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"mean": pixels[..., ::2, ::2], "spread": pixels[..., ::2, ::2].abs()}

    def image(self, references: Parts) -> Parts:
        return {"image": references["image"].mean((2, 3))}

    def text(self, captions: list[str]) -> dict[str, Tensor]:
        return {
            "text": torch.tensor(
                [[[float(caption.split()[-1]) if caption else 0.0]] for caption in captions]
            )
        }

    def nulls(self) -> dict[str, Tensor]:
        return {"image": torch.zeros(1, 3), **self.text([""])}


SETTINGS = settings(buckets=True, bucket_step=8, max_bad=0.2)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of 23 samples, 3 of them bad, in 5 shards, encoded without a stop."""
    return fill(tmp_path_factory.mktemp("features") / "f", Noise(bad=BAD), data=SETTINGS)


def started(folder: Path, **more: Any) -> int:
    """The same in a process of its own, which ends with code 0 if all went well."""
    torch.set_num_threads(1)
    if not (child := os.fork()):
        try:
            fill(folder, **{"source": Noise(bad=BAD), "data": SETTINGS} | more)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def ended(child: int) -> int:
    """0, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("base", "name"), [("sd1", "plus"), ("sdxl", "base")])
def test_what_is_read_is_what_was_encoded(base: str, name: str, tmp_path: Path) -> None:
    source, encoder, data = (
        Noise(12),
        frozen(base, name),
        settings(buckets=True, bucket_step=8, flip=True),
    )
    fill(tmp_path, source, encoder, data)
    reader, sizes = FeatureReader(tmp_path), bucket_sizes(data, 32)
    assert (len(reader), reader.shards) == (12, [5, 5, 2])
    assert len(set(reader.bucket.tolist())) > 2
    for index in range(len(source)):
        bucket = bucket_of(source, index, sizes)
        assert (reader.bucket[index], reader.name(index)) == (bucket, source.name(index))
        for flip, pick in ((False, 0.0), (True, 0.99)):
            read = reader.read(index, flip, pick)
            example = read_example(
                source.read(index), sizes[bucket], encoder.unit, encoder.references, pick
            )
            direct = {
                **encoder.latents((example.pixels.flip(-1) if flip else example.pixels)[None]),
                **encoder.text([example.text]),
                **encoder.image(example.references),
            }
            given = tensors_of(read)
            assert given.keys() == direct.keys() | {"time_ids"}
            for key, value in direct.items():
                assert given[key].dtype == torch.float16
                torch.testing.assert_close(given[key].float(), value[0], rtol=2e-3, atol=2e-3)
            assert torch.equal(given["time_ids"], example.time_ids)
            assert {k: (v.shape, v.dtype) for k, v in tensors_of(reader.blank(index)).items()} == {
                k: (v.shape, v.dtype) for k, v in given.items()
            }
    for key, value in encoder.nulls().items():
        torch.testing.assert_close(reader.nulls[key].float(), value, rtol=2e-3, atol=2e-3)
    assert verify_folder(tmp_path) == []


def tensors_of(content: FeatureContent) -> dict[str, Tensor]:
    """Return all tensors of a sample's features, by name."""
    named = {name: getattr(content, name) for name in ("mean", "spread", "mask")}
    given = {key: value for key, value in named.items() if value is not None}
    return given | content.image | content.conditions


MASKED = {"columns": Columns(mask="mask"), "buckets": True, "bucket_step": 8}


@pytest.mark.parametrize("flip", [False, True])
def test_masks_are_encoded_with_their_pictures(flip: bool, tmp_path: Path) -> None:
    source, encoder, data = Noise(8, masked=True), Quick(), settings(**MASKED, flip=flip)
    fill(tmp_path, source, encoder, data)
    features = FeatureReader(tmp_path)
    pictures = PictureReader(source, bucket_sizes(data, 32), encoder.references, encoder.unit, 3)
    for index in range(len(source)):
        read, blank = features.read(index, flip, 0), features.blank(index)
        assert read.mask.any() == (index % 2 == 1)
        assert torch.equal(read.mask, pictures.read(index, flip, 0).mask)
        plain = pictures.read(index, False, 0).mask
        assert torch.equal(read.mask, plain.flip(-1) if flip else plain)
        for reader in (features, pictures):
            assert reader.blank(index).mask.shape == read.mask.shape == (1, *read.mean.shape[1:])
        assert {key: value.dtype for key, value in tensors_of(blank).items()} == {
            key: value.dtype for key, value in tensors_of(read).items()
        }
    without = FeatureReader(fill(tmp_path / "without", source, encoder, settings()))
    assert without.read(1, False, 0).mask is None
    assert without.blank(1).mask is None


def test_features_with_and_without_masks_are_distinguished(tmp_path: Path) -> None:
    plain, masks = settings(), settings(columns=Columns(mask="mask"))
    source, encoder = Noise(6, masked=True), Quick()
    without, with_masks = (
        fill(tmp_path / "1", source, encoder, plain),
        fill(tmp_path / "2", source, encoder, masks),
    )
    for folder, data, words in (
        (without, masks, r'features of mask null \(this recipe: "mask"\)'),
        (with_masks, plain, r'features of mask "mask" \(this recipe: null\)'),
    ):
        with pytest.raises(SettingError, match=words):
            open_features(folder, encoder.identity(data) | source_origin(data))
        with pytest.raises(SettingError, match=words):
            fill(folder, source, encoder, data)


def test_features_from_before_there_were_masks_are_read_and_completed(tmp_path: Path) -> None:
    source, encoder, data = Noise(12), Quick(), settings()
    whole = digests(fill(tmp_path, source, encoder, data))
    for name in ("plan.json", "manifest.json"):
        table = json.loads((tmp_path / name).read_text())
        assert table["source"].pop("mask") is None
        assert table["source"]["columns"] == {"image": None, "text": None, "reference": None}
        (tmp_path / name).write_text(json.dumps(table))
    wanted_now = encoder.identity(data) | source_origin(data)
    assert (
        tensors_of(open_features(tmp_path, wanted_now).blank(0)).keys()
        == tensors_of(open_features(tmp_path, wanted_now).read(0, False, 0)).keys()
    )
    (tmp_path / "shard-000001.json").unlink()
    fill(tmp_path, source, encoder, data)
    assert digests(tmp_path).items() - whole.items() == {
        ("plan.json", digests(tmp_path)["plan.json"])
    }
    with pytest.raises(SettingError, match="mask null"):
        open_features(tmp_path, wanted_now | {"mask": "mask"})


@pytest.mark.parametrize("bucket", [(32, 32), (48, 24), (24, 40)])
@pytest.mark.parametrize("size", SIZES)
def test_a_mask_is_cut_as_its_picture_and_averaged(
    size: tuple[int, int], bucket: tuple[int, int]
) -> None:
    """One that is its picture's grey becomes the means of the cut picture's squares, half a level
    apart at most.
    """
    mask = grey(1, size)
    target = partial(Image.merge, "RGB", [mask] * 3)
    example = read_example(
        Sample("a", target, (target,), "x", lambda: mask), bucket, 8, Quick.references
    )
    means = torch.nn.functional.avg_pool2d((example.pixels[:1] + 1) * 127.5, 8)
    assert example.mask.dtype == torch.uint8
    assert (example.mask - means).abs().max() <= 0.5 + 1e-3


def test_shards_are_what_webdataset_reads(filled: Path) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    reader, found = FeatureReader(filled), {}
    for path in filled.glob("*.tar"):
        with path.open("rb") as file:
            for sample in group_by_keys(tar_file_expander([{"url": path.name, "stream": file}])):
                found[int(sample["__key__"])] = sample
    assert sorted(found) == [index for index in range(23) if index not in BAD]
    for index, sample in found.items():
        about = {
            "name": f"dïr/{index}.png",
            "text": f"picture {index}" if index else "",
            "bucket": reader.bucket[index],
        }
        assert json.loads(sample["json"]) == about
        assert torch.equal(
            safetensors.torch.load(sample["safetensors"])["mean"],
            reader.read(index, False, 0).mean,
        )


@pytest.mark.parametrize("order", [(0, 1), (2, 0, 1), (5, 6, 0, 3, 2, 1, 4)])
def test_many_ranks_make_what_one_makes(
    order: tuple[int, ...], filled: Path, tmp_path: Path
) -> None:
    for rank in order:
        assert not (tmp_path / "manifest.json").exists()
        fill(tmp_path, Noise(bad=BAD), data=SETTINGS, rank=rank, ranks=len(order))
    assert digests(tmp_path) == digests(filled)


def test_reading_processes_change_nothing(filled: Path, tmp_path: Path) -> None:
    fill(tmp_path, Noise(bad=BAD), data=SETTINGS.model_copy(update={"workers": 2}))
    assert digests(tmp_path) == digests(filled)


def test_processes_at_the_same_time(filled: Path, tmp_path: Path) -> None:
    assert [
        ended(child) for child in [started(tmp_path, rank=rank, ranks=2) for rank in range(2)]
    ] == [0, 0]
    assert digests(tmp_path) == digests(filled)


def test_killed_at_random_moments(filled: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    assert ended(started(tmp_path / "whole")) == 0
    span, moments = time.monotonic() - start, random.Random(1)
    for ranks in (1, 2):
        folder = tmp_path / str(moments.random())
        for _ in range(3):
            children = [started(folder, rank=rank, ranks=ranks) for rank in range(ranks)]
            time.sleep(moments.uniform(0, span))
            for child in children:
                os.kill(child, signal.SIGKILL)
                ended(child)
        assert ended(started(folder)) == 0
        assert digests(folder) == digests(filled)


def test_killed_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each file is on the disk, and after it has its name."""
    whole = digests(fill(tmp_path / "whole", Noise(6), Quick(), shard=3))
    for number in range(2 * len(whole)):
        folder, left = tmp_path / str(number), iter(range(number))

        def flush(_: Path, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patch:
            for module in (files, encoding):
                patch.setattr(module, "flush", flush)
            child = started(folder, source=Noise(6), data=settings(), encoder=Quick(), shard=3)
            assert ended(child) == -signal.SIGKILL
        assert digests(fill(folder, Noise(6), Quick(), shard=3)) == whole


class Short(Noise):
    """Noise with captions of 0 to 7 letters."""

    def read(self, index: int) -> Sample:
        return replace(super().read(index), text="a" * (index % 8))


@cache
def masked_texts() -> FeatureEncoder:
    """A tiny PixArt, whose texts are padded and have a mask."""
    return FeatureEncoder(
        tiny_pipeline("pixart"), tiny_encoder(), find_variant("base"), "tiny pixart"
    )


def test_masked_rows_of_texts_are_not_stored_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, source = masked_texts(), Short(4)
    fill(tmp_path / "packed", source, encoder)
    with monkeypatch.context() as patch:  # as older versions stored them
        patch.setattr(encoding, "packed_text", dict)
        fill(tmp_path / "whole", source, encoder)
    packed, whole = (FeatureReader(tmp_path / name) for name in ("packed", "whole"))
    model = encoder.pipeline.transformer
    for index in range(len(source)):
        ours, theirs = (tensors_of(reader.read(index, False, 0)) for reader in (packed, whole))
        mask = ours["text_mask"].bool()
        assert 0 < mask.sum() < len(mask)
        assert ours.keys() == theirs.keys()
        assert {key: value.shape for key, value in ours.items()} == {
            key: value.shape for key, value in tensors_of(packed.blank(index)).items()
        }
        for key, value in theirs.items():
            assert torch.equal(ours[key][mask] if key == "text" else ours[key],
                               value[mask] if key == "text" else value)  # fmt: skip
        assert not ours["text"][~mask].any()
        noisy, time_ = torch.randn(1, 4, 16, 16), torch.tensor([500])
        answers = [
            encoder.family.predict(model, None, noisy, time_, {
                name: part[name][None].float() for name in ("text", "text_mask")
            })
            for part in (ours, theirs)
        ]  # fmt: skip
        assert torch.equal(*answers)
    sizes = [
        sum(
            table["places"][row][1] for table in (json.loads(path.read_text()),) for row in range(4)
        )
        for path in (tmp_path / name / "shard-000000.json" for name in ("packed", "whole"))
    ]
    assert sizes[1] - sizes[0] > 4 * 2 * 32  # of 32 numbers a row in two bytes


def test_packed_texts_survive_a_kill(tmp_path: Path) -> None:
    given: dict[str, Any] = {"source": Short(6), "encoder": masked_texts(), "data": settings()}
    whole = digests(fill(tmp_path / "whole", **given, shard=2))
    for ranks, seconds in ((1, 0.05), (2, 0.15), (2, 0.4)):
        folder = tmp_path / str(seconds)
        children = [started(folder, rank=n, ranks=ranks, shard=2, **given) for n in range(ranks)]
        time.sleep(seconds)
        for child in children:
            os.kill(child, signal.SIGKILL)
            ended(child)
        assert digests(fill(folder, **given, shard=2)) == whole


def test_the_size_is_stated_first_and_kept_to_a_budget(tmp_path: Path) -> None:
    said: list[FeatureSize] = []
    data = settings(flip=True, columns=Columns(mask="mask"))
    source = Noise(6, masked=True)
    fill(tmp_path / "one", source, Quick(), data, on_size=said.append, shard=3)
    (size,) = said
    assert (size.samples, size.masked) == (6, False)
    tensors = tensors_of(FeatureReader(tmp_path / "one").read(1, False, 0))
    for name in ("image", "text", "mask"):
        assert size.parts[name] == (
            tensors[name].nbytes, str(tensors[name].dtype).removeprefix("torch.")
        )  # fmt: skip
    assert size.parts["latents"][0] == 4 * tensors["mean"].nbytes
    assert str(size).startswith("6 samples of 6.4 kB (latents 6.1 kB float16, image 0.0 kB float16")
    fill(tmp_path / "one", source, Quick(), data, on_size=said.append, shard=3)
    assert len(said) == 1  # nothing is left to encode
    small = data.model_copy(update={"features_gb": 30e3 / 1e9})
    with pytest.raises(SettingError, match=r"would hold 38.\d kB of features, more than data.feat"):
        fill(tmp_path / "two", source, Quick(), small, shard=3)
    assert not list((tmp_path / "two").glob("shard*"))
    fill(tmp_path / "two", source, Quick(), data, shard=3)
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


def test_the_size_of_masked_texts_is_that_of_the_shards(tmp_path: Path) -> None:
    """Known after the first one; that stays, and more may be allowed later."""
    said: list[FeatureSize] = []
    encoder, source = masked_texts(), Short(6)
    data = settings(features_gb=26e3 / 1e9)
    with pytest.raises(SettingError, match=r"would hold \d+.\d kB of features, more than"):
        fill(tmp_path, source, encoder, data, on_size=said.append, shard=2)
    assert said[0].least < 26e3
    assert "samples of up to" in str(said[0])
    assert len(list(tmp_path.glob("shard*.tar"))) == 1
    fill(tmp_path, source, encoder, settings(), shard=2)
    assert len(FeatureReader(tmp_path)) == 6


def test_nothing_is_encoded_twice(tmp_path: Path) -> None:
    encoder, seen = Quick(), []
    source = Noise(20)

    def examples(index: int) -> Example:
        if len(seen) == 13:
            raise KeyboardInterrupt
        seen.append(index)
        return Examples(source, bucket_sizes(settings(), 32), encoder.unit, encoder.references)(
            index
        )

    with pytest.raises(KeyboardInterrupt):
        encode_set(tmp_path, source, examples, encoder, settings(), shard=5)
    kept = seen[:10]
    seen.clear()
    told = []
    encode_set(
        tmp_path,
        source,
        examples,
        encoder,
        settings(),
        shard=5,
        on_done=lambda *counts: told.append(counts),
    )
    assert sorted(kept + seen) == list(range(20))
    assert told == [(done, 20) for done in range(10, 21)]
    encode_set(tmp_path, source, examples, encoder, settings(), shard=5)
    assert len(seen) == 10


@given(
    st.integers(1, 24),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sets(st.integers(0, 23), max_size=5),
)
def test_every_sample_has_one_place(count: int, shard: int, ranks: int, bad: set[int]) -> None:
    source = Noise(count, {index: "is empty" for index in bad if index < count - 1})
    with tempfile.TemporaryDirectory() as name:
        for rank in reversed(range(ranks)):
            fill(
                Path(name),
                source,
                Quick(),
                settings(max_bad=1, buckets=True, bucket_step=8),
                rank=rank,
                ranks=ranks,
                shard=shard,
            )
        reader = FeatureReader(Path(name))
        assert (len(reader), sum(reader.shards), max(reader.shards)) == (
            count,
            count,
            min(shard, count),
        )
        for index in range(count):
            assert reader.name(index) == source.name(index)
            if index in source.bad:
                with pytest.raises(BadSample, match=rf"{index}\.png: is empty"):
                    reader.read(index, False, 0)
            else:
                assert int(reader.read(index, False, 0).conditions["text"][0, 0]) == index
        assert [row["sample"] for row in read_manifest(Path(name))["bad"]] == sorted(source.bad)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"encoder": Quick("other")},
            r'features of encoder "quick" \(this recipe: "other"\): give another data\.features',
        ),
        (
            {"data": settings(size=64)},
            r"features of size 32 \(this recipe: 64\), buckets \[\[32, 32\]\]",
        ),
        ({"data": settings(flip=True)}, r"flip false \(this recipe: true\)"),
        ({"data": settings(source="list.json")}, r'source "noise" \(this recipe: "list\.json"\)'),
        ({"source": Noise(24)}, r"samples 23 \(this recipe: 24\)"),
        (
            {"source": Noise(bad_shards=(BadSample("7.tar", "is gone"),))},
            r'bad shards \[\] \(this recipe: \["7\.tar"\]\)',
        ),
        ({"shard": 7}, r"samples a shard 5 \(this recipe: 7\)"),
    ],
)
def test_features_of_another_plan_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    fill(tmp_path, encoder=Quick())
    held = digests(tmp_path)
    with pytest.raises(SettingError, match=words) as caught:
        fill(tmp_path, **{"encoder": Quick()} | changes)
    assert "\n" not in str(caught.value)
    assert digests(tmp_path) == held


def test_opening_says_what_is_wrong(tmp_path: Path) -> None:
    ours = Quick().identity(settings()) | source_origin(settings())
    with pytest.raises(SettingError, match="imprompt data encode"):
        open_features(tmp_path, ours)
    fill(tmp_path, encoder=Quick(), rank=0, ranks=2)
    with pytest.raises(SettingError, match="does not hold all"):
        open_features(tmp_path, ours)
    fill(tmp_path, encoder=Quick(), rank=1, ranks=2)
    assert open_features(tmp_path, ours).identity == Quick().identity(settings())
    with pytest.raises(SettingError, match=r'encoder "quick" \(this recipe: "other"\)'):
        open_features(tmp_path, ours | {"encoder": "other"})
    (tmp_path / "plan.json").unlink()
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(SettingError, match=r"manifest\.json cannot be read"):
        open_features(tmp_path, ours)
    with pytest.raises(SettingError, match=r"plan\.json cannot be read"):
        fill(tmp_path, encoder=Quick())


def overwrite(path: Path, at: int, content: bytes = b"garbage!") -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def refused(reader: FeatureReader, index: int) -> str | None:
    try:
        reader.read(index, False, 0)
    except BadSample as error:
        return error.why
    return None


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str, str]] = {
    "cut short": (
        "shard-000002.tar",
        lambda path: os.truncate(path, 2000),
        "damaged or cut short",
        "has 2,000 bytes instead of",
    ),
    "empty": (
        "shard-000002.tar",
        lambda path: os.truncate(path, 0),
        "damaged or cut short",
        "has 0 bytes instead of",
    ),
    "garbage": (
        "shard-000002.tar",
        lambda path: path.write_bytes(b"x" * path.stat().st_size),
        "damaged or cut short",
        "is damaged",
    ),
    "a bit": (
        "shard-000002.tar",
        lambda path: overwrite(path, 3000),
        "damaged or cut short",
        "is damaged",
    ),
    "missing": ("shard-000002.tar", Path.unlink, "No such file", "is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_named(kind: str, filled: Path, tmp_path: Path) -> None:
    name, damage, told, found = DAMAGE[kind]
    folder = Path(shutil.copytree(filled, tmp_path / "f"))
    damage(folder / name)
    reader = FeatureReader(folder)
    why = {
        index: fault
        for index in range(len(reader))
        if index not in BAD and (fault := refused(reader, index))
    }
    assert why
    assert why.keys() <= {10, 13, 14}
    assert all(name in fault and told in fault for fault in why.values())
    (fault,) = verify_folder(folder)
    assert fault.startswith(f"{folder / name} {found}")
    (folder / name).unlink(missing_ok=True)
    fill(folder, Noise(bad=BAD), data=SETTINGS)
    assert digests(folder) == digests(filled)


@pytest.mark.parametrize("name", ["shard-000002.json", "nulls.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_a_damaged_table_is_refused(
    name: str, content: bytes | None, filled: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(filled, tmp_path / "f"))
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(SettingError, match="--verify"):
        FeatureReader(folder)
    (fault,) = verify_folder(folder)
    assert fault.startswith(f"{folder / name} ")
    (folder / name).unlink(missing_ok=True)
    fill(folder, Noise(bad=BAD), data=SETTINGS)
    assert digests(folder) == digests(filled)


def test_bad_samples_are_named_and_counted(filled: Path, tmp_path: Path) -> None:
    manifest = read_manifest(filled)
    assert manifest["totals"] == {
        "samples": 23,
        "bad": 3,
        "bytes": sum(path.stat().st_size for path in filled.glob("*.tar")),
    }
    assert manifest["bad"] == [
        {"sample": i, "name": f"dïr/{i}.png", "why": why, "kind": "empty"} for i, why in BAD.items()
    ]
    data = SETTINGS.model_copy(update={"max_bad": 0.1})
    for _ in range(2):
        with pytest.raises(ImpromptError) as caught:
            fill(tmp_path, Noise(bad=BAD), data=data)
        words = "3 of 23 samples are bad (3 empty), more than data.max_bad = 0.1 allows"
        assert words in str(caught.value)
        assert "dïr/3.png: is empty; dïr/11.png: is empty; dïr/12.png: is no picture" in str(
            caught.value
        )
    assert digests(tmp_path) == digests(filled)
    with pytest.raises(ImpromptError, match="23 of 23"):
        fill(
            tmp_path / "none",
            Noise(bad=dict.fromkeys(range(23), "is gone")),
            Quick(),
            settings(max_bad=1),
        )


def test_features_that_are_no_numbers_are_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(_: Quick, references: Parts) -> Parts:
        pixels = references["image"]
        large = 1e5 * (torch.arange(len(pixels)) == 2)[:, None]
        return {"image": pixels.mean((2, 3)) + large}

    monkeypatch.setattr(Quick, "image", overflowing)
    fill(tmp_path, Noise(4), Quick(), settings(max_bad=0.5))
    (row,) = read_manifest(tmp_path)["bad"]
    assert (row["why"], row["kind"]) == ("its features are not finite numbers", "not finite")


def test_readers_travel(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imprompt.training.cache.OPEN_SHARDS", 2)
    reader = FeatureReader(filled)
    good = [index for index in range(23) if index not in BAD]
    first = [tensors_of(reader.read(index, False, 0)) for index in good]
    copy = pickle.loads(pickle.dumps(reader))
    for index, held in zip(good, first, strict=True):
        again = tensors_of(copy.read(index, False, 0))
        assert all(torch.equal(value, again[key]) for key, value in held.items())


def test_an_example_opens_each_picture_once() -> None:
    opened = []

    def opener(index: int) -> Callable[[], Image.Image]:
        return lambda: opened.append(index) or picture(index, (90, 40))

    target, references = opener(0), Quick.references
    alone = read_example(Sample("a", target, (target,), "x"), (32, 48), 8, references)
    assert opened == [0]
    assert alone.pixels.shape == (3, 48, 32)
    assert torch.equal(alone.pixels, to_pixels(fit(picture(0, (90, 40)), (32, 48))[0]))
    assert alone.time_ids.tolist() == [40, 90, 0, 38, 48, 32]
    sample = Sample("a", target, (opener(1), opener(2), opener(3)), "x")
    whole = read_example(sample, (32, 32), 8, references)
    opened.clear()
    for pick, index in ((0.0, 0), (0.5, 1), (0.999, 2)):
        assert torch.equal(
            read_example(sample, (32, 32), 8, references, pick).references["image"],
            whole.references["image"][index : index + 1],
        )
    assert opened == [0, 1, 0, 2, 0, 3]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Of the packaged model and seven pictures, one of them no picture."""
    rows = [{"file_name": f"{index}.png", "text": f"picture {index}"} for index in range(7)]
    for index in range(6):
        picture(index, SIZES[index % 5]).save(tmp_path / f"{index}.png")
    (tmp_path / "6.png").write_bytes(b"no picture")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [
        'model = "emoji"',
        f'output = "{tmp_path}/run"',
        f'data = {{source = "{tmp_path}", features = "{tmp_path}/features", '
        "max_bad = 0.2, workers = 0}",
        "optimization = {steps = 1}",
    ]
    (tmp_path / "recipe.toml").write_text("\n".join(lines))
    return tmp_path / "recipe.toml"


def command(*arguments: str) -> Any:
    commands()
    return CliRunner().invoke(app, ["data", "encode", *arguments])


def test_the_command(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    assert "does not hold all its features" in str(command(str(recipe), "--verify").exception)
    recipe_without = recipe.with_name("without.toml")
    recipe_without.write_text(recipe.read_text().replace("features = ", "root = "))
    assert "give --set data.features=FOLDER" in str(command(str(recipe_without)).exception)
    told = command(str(recipe))
    assert told.exit_code == 0
    assert told.stdout.startswith(f"{folder}  7 samples, 1 bad, 0.")
    assert told.stdout.count("\n") == 1
    assert told.stderr.startswith(f"{folder}  7 samples of ")
    assert command(str(recipe), "--verify").stdout == f"{folder}  1 shards, none damaged\n"
    held = digests(folder)
    assert command(str(recipe)).exit_code == 0
    assert digests(folder) == held
    assert 'feature "pooled" (this recipe: "penultimate")' in str(
        command(str(recipe), "--set", "variant=plus").exception
    )
    overwrite(folder / "shard-000000.tar", 5000)
    assert "shard-000000.tar is damaged" in str(command(str(recipe), "--verify").exception)


def retext(recipe: Path) -> None:
    listing = recipe.with_name("metadata.jsonl")
    listing.write_text(listing.read_text().replace("picture 1", "picture one"))


def repaint(recipe: Path) -> None:
    picture(77, SIZES[1]).save(recipe.with_name("1.png"))


@pytest.mark.parametrize("edit", [retext, repaint])
def test_edited_samples_are_noticed_and_encoded_again(
    edit: Callable[[Path], None], recipe: Path, tmp_path: Path
) -> None:
    assert command(str(recipe)).exit_code == 0
    edit(recipe)
    words = "holds features of 1 samples that were edited since ("
    for arguments in (["train", str(recipe)], ["data", "encode", str(recipe), "--verify"]):
        refused = CliRunner().invoke(app, arguments).exception
        assert isinstance(refused, SettingError)
        assert f"{words}{tmp_path}/1.png): imprompt data encode RECIPE enc" in str(refused)
    assert command(str(recipe)).exit_code == 0
    assert command(str(recipe), "--verify").exit_code == 0
    fresh = f"data.features={tmp_path}/fresh"
    assert command(str(recipe), "--set", fresh).exit_code == 0
    assert digests(tmp_path / "features") == digests(tmp_path / "fresh")


def test_only_content_counts_and_verifying_reads_all_of_it(recipe: Path, tmp_path: Path) -> None:
    assert command(str(recipe)).exit_code == 0
    held, target = digests(tmp_path / "features"), tmp_path / "1.png"
    os.utime(target)  # another time, the same content
    assert command(str(recipe), "--verify").exit_code == 0
    assert command(str(recipe)).exit_code == 0
    assert digests(tmp_path / "features") == held
    status = (tmp_path / "2.png").stat()
    overwrite(tmp_path / "2.png", status.st_size // 2)  # the same size and time, other content
    os.utime(tmp_path / "2.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "edited since" in str(command(str(recipe), "--verify").exception)
    for path in tmp_path.glob("*.png"):  # features outlive their set
        path.unlink()
    assert command(str(recipe), "--verify").exit_code == 0


def test_a_set_that_has_grown_does_not_train_on_old_features(recipe: Path, tmp_path: Path) -> None:
    assert command(str(recipe)).exit_code == 0
    with (tmp_path / "metadata.jsonl").open("a") as listing:
        listing.write('\n{"file_name": "0.png", "text": "again"}')
    refused = CliRunner().invoke(app, ["train", str(recipe)]).exception
    assert "features holds features of samples 7 (this recipe: 8)" in str(refused)


def test_a_tampered_file_is_refused_and_encoded_again(filled: Path, tmp_path: Path) -> None:
    """One bit, where the file stays one that can be read."""
    for name, old, new in (
        ("nulls.safetensors", b"", b""),
        ("shard-000002.json", b'"buckets": [', b'"buckets":\t['),
    ):
        folder = Path(shutil.copytree(filled, tmp_path / name))
        data = (folder / name).read_bytes()
        data = data.replace(old, new) if old else data[:-1] + bytes([data[-1] ^ 1])
        (folder / name).write_bytes(data)
        with pytest.raises(SettingError, match=rf"{name} is damaged \(another sha256\)"):
            FeatureReader(folder)
        (fault,) = verify_folder(folder)
        assert fault == f"{folder / name} is damaged (another sha256)"
    fill(tmp_path / "nulls.safetensors", Noise(bad=BAD), data=SETTINGS)
    assert digests(tmp_path / "nulls.safetensors") == digests(filled)
    file = tmp_path / "shard-000002.json" / "shard-000002.json"
    table = json.loads((filled / file.name).read_text())
    table["buckets"][0] += 1
    file.write_text(json.dumps(table))
    fill(file.parent, Noise(bad=BAD), data=SETTINGS)
    assert digests(file.parent) == digests(filled)


def test_a_folder_is_filled_by_one_launch(recipe: Path, tmp_path: Path) -> None:
    lock = lock_folder(tmp_path / "features", "encoding features into")
    for arguments in (["data", "encode", str(recipe)], ["train", str(recipe)]):
        done = subprocess.run(
            [sys.executable, "-m", "imprompt", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == (
            f"imprompt: another process is encoding features into {tmp_path / 'features'}: wait "
            "for it, or give another folder"
        )
    assert sorted(path.name for path in (tmp_path / "features").iterdir()) == [".lock"]
    lock.release()
    assert command(str(recipe)).exit_code == 0


SCRIPT = """
import typer
from imprompt.cli.encode import encode
from imprompt.training import encoding
encoding.encode_set.__kwdefaults__["shard"] = 2
typer.run(encode)
"""


@pytest.mark.slow
def test_the_command_on_two_processes(recipe: Path, tmp_path: Path) -> None:
    """Started by torchrun: one line of the first process, and the files of a run on one."""
    (tmp_path / "script.py").write_text(SCRIPT)
    alone, together = (
        [sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    )
    for name, launcher in (("alone", alone), ("together", together)):
        call = [
            *launcher,
            str(tmp_path / "script.py"),
            str(recipe),
            "--set",
            f"data.features={tmp_path / name}",
        ]
        done = subprocess.run(
            call,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("7 samples, 1 bad") == 1
    assert len(digests(tmp_path / "together")) == 2 * 4 + 3
    assert digests(tmp_path / "together") == digests(tmp_path / "alone")
