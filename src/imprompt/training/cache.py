"""Reader of encoded features: a folder of tar shards, each complete or absent.

    plan.json           what the features depend on and how they are split into shards; a folder
                        has one plan
    nulls.safetensors   features that replace dropped images and captions
    shard-000012.tar    NUMBER.safetensors and NUMBER.json of each sample, as the webdataset library
                        reads them; without the text's masked rows
    shard-000012.json   where each sample lies in the tar, and which are bad; a shard is complete
                        when both its files exist
    manifest.json       the plan, all shards and all bad samples; written when every shard is
                        complete

`imprompt.training.encoding` writes it. Shape letters as in `imprompt.training.features`; R the
references of a sample.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, load_file

from imprompt.errors import SettingError, first_line
from imprompt.files import sha256
from imprompt.training.augmented import FeatureContent
from imprompt.training.features import padded_text
from imprompt.training.samples import BadSample
from imprompt.untrusted import StoredTable, read_json
from imprompt.variants import PARTS

# what reading damaged tables raises
DAMAGE = (OSError, ValueError, LookupError, TypeError, SafetensorError, SettingError)
OPEN_SHARDS = 64  # files that a reading process keeps open

Table = dict[str, Any]  # what a JSON file holds


class BadRow(StoredTable):
    """A bad sample in a shard's table or in the manifest."""

    sample: int
    name: str
    why: str
    kind: str


class ShardTable(StoredTable):
    """Content of shard-000012.json."""

    file: str
    bytes: int
    sha256: str
    samples: int
    names: list[str]
    buckets: list[int]
    places: list[list[int]]
    bad: list[BadRow]
    stamps: list[str] = Field(default_factory=list)
    digests: list[str] = Field(default_factory=list)
    seal: str = ""


class BadShard(StoredTable):
    """A shard of the source that could not be opened."""

    name: str
    why: str
    kind: str
    samples: int


class FeaturePlan(StoredTable):
    """What plan.json and manifest.json have in common."""

    identity: dict[str, Any]
    source: dict[str, Any]
    samples: Annotated[int, Field(ge=1)]
    shard: Annotated[int, Field(ge=1)]
    bad_shards: list[BadShard]
    unit: Annotated[int, Field(ge=1)]
    channels: int


class StoredFile(StoredTable):
    """A file of the folder as the manifest states it."""

    file: str
    bytes: int
    sha256: str


class StoredPlan(FeaturePlan):
    """Content of plan.json; those of older versions state no hash."""

    nulls: StoredFile | None = None


class StoredShard(StoredFile):
    """A shard as the manifest states it, with its table."""

    samples: int
    table: StoredFile


class Manifest(FeaturePlan):
    """Content of manifest.json."""

    totals: dict[str, int]
    nulls: StoredFile
    shards: list[StoredShard]
    bad: list[BadRow]


def shard_file(folder: Path, number: int, suffix: str) -> Path:
    """Return the path of one file of a shard, such as `shard-000012.tar`."""
    return folder / f"shard-{number:06d}{suffix}"


def shard_sizes(plan: Mapping[str, Any]) -> list[int]:
    """Return the number of samples in each shard."""
    samples, size = plan["samples"], plan["shard"]
    return [min(size, samples - start) for start in range(0, samples, size)]


def plan_facts(plan: Mapping[str, Any]) -> Table:
    """Return, by name, what must be equal for features to be usable."""
    cut = {
        "samples": plan["samples"],
        "samples a shard": plan["shard"],
        "bad shards": [row["name"] for row in plan["bad_shards"]],
    }
    return {**plan["identity"], **plan["source"], **cut}


def refuse_others(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise SettingError, naming each difference, unless `theirs` has what `ours` has."""
    other = [
        f"{key} {_short(theirs.get(key))} (this recipe: {_short(own)})"
        for key, own in ours.items()
        if theirs.get(key) != own
    ]
    if other:
        raise SettingError(
            f"{folder} holds features of {', '.join(other)}: give another data.features folder"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"


def read_table(path: Path, form: type[StoredTable]) -> Table:
    """Read a JSON file of the folder; raise SettingError if it has another form."""
    try:
        return read_json(path, form)
    except (OSError, SettingError) as error:
        raise SettingError(
            f"{path} cannot be read ({first_line(error)}): remove it and run imprompt data encode "
            "again"
        ) from error


def read_manifest(folder: Path) -> Table:
    """Read the manifest; raise SettingError if the folder is not finished."""
    if not (folder / "manifest.json").exists():
        raise SettingError(
            f"{folder} does not hold all its features yet: imprompt data encode RECIPE goes on "
            "where it stopped"
        )
    return read_table(folder / "manifest.json", Manifest)


def verify_folder(folder: Path) -> list[str]:
    """Return one line for every file that differs from what was written.

    All files are read.
    """
    manifest = read_manifest(folder)
    rows = [manifest["nulls"], *manifest["shards"], *(row["table"] for row in manifest["shards"])]
    return [f"{folder / row['file']} {fault}" for row in rows if (fault := file_fault(folder, row))]


def file_fault(folder: Path, row: Mapping[str, Any]) -> str | None:
    """Return how a file differs from its row of the manifest; None if it does not."""
    path: Path = folder / row["file"]
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != row["bytes"]:
        return f"has {size:,} bytes instead of {row['bytes']:,}"
    return "is damaged (another sha256)" if sha256(path) != row["sha256"] else None


def shard_tables(folder: Path, plan: Mapping[str, Any]) -> list[Table]:
    """Read the tables of all shards; raise OSError, or SettingError if one has another form."""
    return [
        read_json(shard_file(folder, number, ".json"), ShardTable)
        for number in range(len(shard_sizes(plan)))
    ]


def open_features(folder: Path, wanted: Mapping[str, Any]) -> "FeatureReader":
    """Open the features in `folder`.

    Raise SettingError if they are incomplete or differ from what is wanted.

    wanted  any of their `plan_facts`: `features.wanted_identity`, and `encoding.source_origin`
    """
    refuse_others(folder, plan_facts(read_manifest(folder)), wanted)
    return FeatureReader(folder)


class FeatureReader:
    """Encoded samples by number: all samples of the source, bad ones included.

    Copies are sent to reading processes.

    shards      number of samples in each shard
    bad_shards  shards of the source that could not be opened
    bucket      of every sample (samples,)
    nulls       parts of the image's features (1, …), and the text part of
                `imprompt.families.base.Conditions`
    identity    what the features depend on: `FeatureEncoder.identity`
    """

    def __init__(self, folder: Path) -> None:
        """Raise SettingError unless the folder is finished and its tables can be read."""
        self.folder, self._plan = folder, read_manifest(folder)
        self.identity: Table = self._plan["identity"]
        self.shards = shard_sizes(self._plan)
        try:
            for row in (self._plan["nulls"], *(row["table"] for row in self._plan["shards"])):
                if fault := file_fault(folder, row):
                    raise ValueError(f"{row['file']} {fault}")
            tables = shard_tables(folder, self._plan)
            self.nulls = load_file(folder / "nulls.safetensors")
            self.bucket = np.concatenate([table["buckets"] for table in tables])
            # (samples, 3): offset, bytes, crc32; 0 for a bad sample
            self._places = np.concatenate([table["places"] for table in tables])
            # An array of strings takes less memory than a list, and forked processes share it.
            self._names = np.concatenate(
                [np.array(table["names"], np.dtypes.StringDType()) for table in tables]
            )
            self._bad = {
                row["sample"]: (row["why"], row["kind"]) for table in tables for row in table["bad"]
            }
            self.bad_shards: Sequence[BadSample] = [
                BadSample(**row) for row in self._plan["bad_shards"]
            ]
        except DAMAGE as error:
            raise SettingError(
                f"{folder} is damaged ({first_line(error)}): imprompt data encode RECIPE --verify "
                "names the files"
            ) from error
        self._open: dict[int, _Shard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __len__(self) -> int:
        return len(self.bucket)

    def name(self, index: int) -> str:
        """Return the sample's name in the source."""
        return str(self._names[index])

    def latent_shape(self, index: int) -> tuple[int, int, int]:
        """Return (C, h, w) of a sample's latent."""
        wide, high = self.identity["buckets"][self.bucket[index]]
        unit = self._plan["unit"]
        return self._plan["channels"], high // unit, wide // unit

    def read(self, index: int, flip: bool, pick: float) -> FeatureContent:
        """Return a sample's features, mirrored or not, with the reference that `pick` selects.

        All are float16, except "face" and "time_ids" in float32, and texts that are beyond float16
        in bfloat16.

        Raise BadSample if it was bad when it was encoded, or its bytes are not those that were
        written.
        """
        offset, size, checksum = self._places[index].tolist()
        if not size:
            raise BadSample(self.name(index), *self._bad[index])
        number = index // self._plan["shard"]
        try:
            held = self._shard(number).read(offset, size)
        except OSError as error:
            why = f"{shard_file(self.folder, number, '.tar')} cannot be read ({first_line(error)})"
            raise BadSample(self.name(index), why, "not readable") from error
        if zlib.crc32(held) != checksum:
            raise BadSample(
                self.name(index),
                f"{shard_file(self.folder, number, '.tar')} is damaged or cut short",
                "damaged",
            )
        tensors = padded_text(load(held))
        side = "_flip" if flip else ""
        mask = tensors.pop("mask", None)
        references = {part: tensors.pop(part) for part in PARTS if part in tensors}
        return FeatureContent(
            mean=tensors["mean" + side],
            spread=tensors["spread" + side],
            image={part: rows[int(pick * len(rows))] for part, rows in references.items()},
            conditions={
                key: value
                for key, value in tensors.items()
                if not key.startswith(("mean", "spread"))
            },
            mask=mask if mask is None or not flip else mask.flip(-1),
        )

    def blank(self, index: int) -> FeatureContent:
        """Return zeros with the shapes of `read`."""
        shape = self.latent_shape(index)
        latent = torch.zeros(shape, dtype=torch.float16)
        conditions = {key: torch.zeros_like(null[0]) for key, null in self.nulls.items()}
        image = {part: conditions.pop(part) for part in PARTS if part in conditions}
        return FeatureContent(
            mean=latent,
            spread=latent,
            image=image,
            conditions={**conditions, "time_ids": torch.zeros(6)},
            mask=torch.zeros(1, *shape[1:], dtype=torch.uint8)
            if self._plan["source"].get("mask")
            else None,
        )

    def _shard(self, number: int) -> "_Shard":
        if number not in self._open:
            if len(self._open) == OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))
            self._open[number] = _Shard(
                os.open(shard_file(self.folder, number, ".tar"), os.O_RDONLY)
            )
        return self._open[number]


class _Shard:
    """An open file that is read by offset, so that forked processes may share it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def __del__(self) -> None:
        os.close(self._descriptor)
