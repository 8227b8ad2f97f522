"""Encoder of a source's samples into a folder of features, by any number of processes.

`imprompt.training.cache` reads the folder. The content of a shard depends only on the plan and the
shard's number: not on which process encodes it, nor on how often encoding was stopped. Shape
letters as in `imprompt.training.features`; R the references of a sample.
"""

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from imprompt.errors import ImpromptError, SettingError
from imprompt.files import atomic_write, flush, sha256
from imprompt.training.buckets import Size, bucket_sizes
from imprompt.training.cache import (
    ShardTable,
    StoredPlan,
    Table,
    file_fault,
    plan_facts,
    read_table,
    refuse_others,
    shard_file,
    shard_sizes,
)
from imprompt.training.contents import digest_of, edited_samples, stamp_of
from imprompt.training.examples import Example, bucket_of
from imprompt.training.feature_size import FeatureSize, check_budget, feature_size
from imprompt.training.features import FeatureEncoder, packed_text
from imprompt.training.recipe import Data
from imprompt.training.samples import BadSample, Source
from imprompt.untrusted import read_json
from imprompt.variants import PARTS

SHARD = 256  # samples in a shard
AT_ONCE = 16  # pictures that the models take at a time
HALF = torch.finfo(torch.float16).max
TEMPORARY = re.compile(r"\..+\.(\d+)\.part")  # a temporary file, with the rank of its process


def encode_set(
    folder: Path,
    source: Source,
    examples: Callable[[int], Example],
    encoder: FeatureEncoder,
    data: Data,
    *,
    rank: int = 0,
    ranks: int = 1,
    on_done: Callable[[int, int], None] = lambda _done, _total: None,
    on_size: Callable[[FeatureSize], None] = lambda _size: None,
    shard: int = SHARD,
) -> None:
    """Encode this process's shards that are not in `folder` yet, or whose samples were edited.

    The process that finds all shards complete writes the manifest.

    examples  returns the sample of a number or raises BadSample; it is sent to `data.workers`
              reading processes
    on_done   (samples done, samples in all) of this process
    on_size   receives the size of the features, before any is encoded
    shard     samples in a shard

    Raise SettingError if the folder holds features of another plan, or would be larger than
    `data.features_gb`; what is encoded by then stays. Raise ImpromptError if it is finished
    and more of its samples are bad than `data.max_bad` allows.
    """
    plan = plan_of(source, encoder, data, shard)
    start_folder(folder, plan, encoder, rank, ranks)
    own = {
        number: range(number * shard, number * shard + size)
        for number, size in enumerate(shard_sizes(plan))
    }
    own = {number: samples for number, samples in own.items() if number % ranks == rank}
    absent = {
        number: samples
        for number, samples in own.items()
        if (table := shard_table(folder, number)) is None or edited_samples(source, samples, table)
    }
    if absent:
        size = feature_size(plan, load_file(folder / "nulls.safetensors"), data)
        on_size(size)
        check_budget(folder, size.least, data.features_gb)
        (folder / "manifest.json").unlink(missing_ok=True)
    written = [0, 0]  # samples and bytes
    total = sum(map(len, own.values()))
    done = total - sum(map(len, absent.values()))
    on_done(done, total)
    sizes = bucket_sizes(data, encoder.size(data))
    batches = chain.from_iterable(batches_of(samples, source, sizes) for samples in absent.values())
    rows = with_progress(
        encoded_rows(read_ahead(examples, batches, data.workers), encoder, data),
        done,
        total,
        on_done,
    )
    for number, samples in absent.items():
        names = {
            index: source.name(index).encode(errors="backslashreplace").decode()
            for index in samples
        }
        marks = {
            "stamps": [stamp_of(source, index) for index in samples],
            "digests": [digest_of(source, index) for index in samples],
        }
        held = write_shard(folder, number, names, islice(rows, len(samples)), marks, rank)
        written = [written[0] + len(samples), written[1] + held]
        check_budget(folder, written[1] * plan["samples"] // written[0], data.features_gb)
    if manifest := finish_folder(folder, plan, rank):
        check_bad(folder, manifest, data.max_bad)


# The folder: the plan is written first, the manifest last.


def source_origin(data: Data) -> Table:
    """Return the settings that select the samples of features, as plain values.

    Folders written before there were masks have no "mask", which is equivalent to None.
    """
    columns = data.columns.model_dump(exclude={"mask"})
    return data.model_dump(mode="json", include={"source", "root", "captions"}) | {
        "columns": columns,
        "mask": data.columns.mask,
    }


def plan_of(source: Source, encoder: FeatureEncoder, data: Data, shard: int) -> Table:
    """Return the plan of a features folder: identity, source and split into shards."""
    return {
        "identity": encoder.identity(data),
        "source": source_origin(data),
        "samples": len(source),
        "shard": shard,
        "unit": encoder.unit,
        "channels": encoder.channels,
        "bad_shards": [
            {
                "name": trouble.name,
                "why": trouble.why,
                "kind": trouble.kind,
                "samples": trouble.samples,
            }
            for trouble in source.bad_shards
        ],
    }


def start_folder(folder: Path, plan: Table, encoder: FeatureEncoder, rank: int, ranks: int) -> None:
    """Write the null features, and the plan with their hash, unless they exist and are whole.

    Raise SettingError if there is another plan. Remove the temporary files of killed processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(".*.part"):
        if (left := TEMPORARY.fullmatch(path.name)) and int(left[1]) % ranks == rank:
            path.unlink()
    plan_file, nulls_file = folder / "plan.json", folder / "nulls.safetensors"
    filled = any(folder.glob("shard-*"))
    if plan_file.exists() or filled:
        # shards are looked for before the plan: another process may be starting the folder
        theirs = read_table(plan_file, StoredPlan)
        refuse_others(folder, plan_facts(theirs), plan_facts(plan))
        # plans of older versions state no hash
        own = theirs.get("nulls") or (described(nulls_file) if nulls_file.exists() else None)
        if own is not None and file_fault(folder, own) is None:
            return
    with temporary_file(nulls_file, rank) as file:
        file.write(save(stored(encoder.nulls())))
    write_table(plan_file, {**plan, "nulls": described(nulls_file)}, rank)


def finish_folder(folder: Path, plan: Table, rank: int) -> Table | None:
    """Write the manifest and return it if every shard is complete; else return None."""
    tables = [shard_table(folder, number) for number in range(len(shard_sizes(plan)))]
    whole = [table for table in tables if table is not None]
    if len(whole) < len(tables):
        return None
    files = [described(shard_file(folder, number, ".json")) for number in range(len(tables))]
    shards = [
        {key: table[key] for key in ("file", "samples", "bytes", "sha256")} | {"table": file}
        for table, file in zip(whole, files, strict=True)
    ]
    bad = [row for table in whole for row in table["bad"]]
    totals = {
        "samples": plan["samples"],
        "bad": len(bad),
        "bytes": sum(table["bytes"] for table in whole),
    }
    manifest = {
        **plan,
        "totals": totals,
        "nulls": read_table(folder / "plan.json", StoredPlan).get("nulls")
        or described(folder / "nulls.safetensors"),
        "shards": shards,
        "bad": bad,
    }
    write_table(folder / "manifest.json", manifest, rank)
    return manifest


def check_bad(folder: Path, manifest: Table, most: float) -> None:
    """Raise ImpromptError if a larger share of the samples than `most` is bad, or all are.

    The error lists the first of them.
    """
    shards, bad = manifest["bad_shards"], manifest["bad"]
    missing = sum(shard["samples"] for shard in shards)
    lost, samples = len(bad) + missing, manifest["totals"]["samples"] + missing
    if lost <= most * samples and lost < samples:
        return
    bad = shards + bad
    kinds = ", ".join(
        f"{count:,} {kind}" for kind, count in Counter(row["kind"] for row in bad).most_common()
    )
    first = "; ".join(f"{row['name']}: {row['why']}" for row in bad[:10])
    raise ImpromptError(
        f"{lost:,} of {samples:,} samples are bad ({kinds}), more than data.max_bad = {most:g} "
        "allows; "
        f"all of them are in {folder / 'manifest.json'}, the first: {first}"
    )


def described(path: Path) -> Table:
    """Return a file's name, size and SHA-256, as tables and manifest hold them."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def seal(table: Table) -> str:
    """Return a hash of a table without its seal."""
    held = {key: value for key, value in table.items() if key != "seal"}
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()


def shard_table(folder: Path, number: int) -> Table | None:
    """Return the shard's table, or None unless it is whole and the shard has the right length.

    Tables written before there were seals have none.
    """
    try:
        table = read_json(shard_file(folder, number, ".json"), ShardTable)
        sealed = table.get("seal", seal(table)) == seal(table)
        whole = shard_file(folder, number, ".tar").stat().st_size == table["bytes"]
        return table if sealed and whole else None
    except (OSError, SettingError):
        return None


# One shard.


class EncodedRow(NamedTuple):
    """A sample with its bucket, and its features or the reason why it has none."""

    sample: int
    bucket: int
    text: str
    held: dict[str, Tensor] | BadSample


def write_shard(
    folder: Path,
    number: int,
    names: Mapping[int, str],
    rows: Iterable[EncodedRow],
    marks: Table,
    rank: int,
) -> int:
    """Write a shard's tar, then its table; return the tar's bytes.

    `names` are those of all its samples, in order, `marks` their stamps and digests. The rows may
    come in any order.
    """
    path = shard_file(folder, number, ".tar")
    buckets: dict[int, int] = {}
    places: dict[int, tuple[int, int, int]] = dict.fromkeys(names, (0, 0, 0))
    bad: dict[int, Table] = {}
    with temporary_file(path, rank) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for row in rows:
            buckets[row.sample] = row.bucket
            if isinstance(row.held, BadSample):
                bad[row.sample] = {
                    "sample": row.sample,
                    "name": names[row.sample],
                    "why": row.held.why,
                    "kind": row.held.kind,
                }
            else:
                about = {"name": names[row.sample], "text": row.text, "bucket": row.bucket}
                tensors = save(row.held)
                append(tar, f"{row.sample:09d}.json", json.dumps(about).encode())
                append(tar, f"{row.sample:09d}.safetensors", tensors)
                padded = -(-len(tensors) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                places[row.sample] = (file.tell() - padded, len(tensors), zlib.crc32(tensors))
    table = described(path) | {
        "samples": len(names),
        "names": list(names.values()),
        "buckets": [buckets[index] for index in names],
        "places": list(places.values()),
        "bad": [bad[index] for index in sorted(bad)],
        **marks,
    }
    table["seal"] = seal(table)
    write_table(shard_file(folder, number, ".json"), table, rank)
    return table["bytes"]


def append(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file without a time or an owner, so that the same content makes the same tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@contextmanager
def temporary_file(path: Path, rank: int) -> Iterator[BinaryIO]:
    """Yield a temporary file that is flushed to disk and renamed to `path` when it is complete.

    Its name holds the rank, so that files left over by a killed process can be distinguished from
    those that other processes are writing.
    """
    with atomic_write(path, str(rank)) as part, part.open("wb") as file:
        yield file
    flush(path.parent)


def write_table(path: Path, table: Table, rank: int) -> None:
    """Write a table as JSON, through a temporary file."""
    with temporary_file(path, rank) as file:
        file.write(json.dumps(table).encode())


# The samples of a shard.


class Read(NamedTuple):
    """A batch of one bucket, as a reading process sends it.

    It has few tensors, because each is sent as an open file.
    """

    bucket: int
    bad: dict[int, BadSample]  # by the sample's number
    good: list[int]
    texts: list[str]
    references: list[int]  # how many each good sample has
    # "pixels" (B, 3, H, W), "mask" (B, 1, h, w), "time_ids" (B, 6), parts of references (ΣR, …)
    tensors: dict[str, Tensor]


BatchIndex = tuple[int, list[int]]  # a bucket and samples of it


class Reading(Dataset[Read]):
    """Dataset of the batches that reading processes read."""

    def __init__(self, examples: Callable[[int], Example]) -> None:
        self.examples = examples

    def __getitem__(self, batch_index: BatchIndex) -> Read:
        bucket, indices = batch_index
        good: dict[int, Example] = {}
        bad: dict[int, BadSample] = {}
        for index in indices:
            try:
                good[index] = self.examples(index)
            except BadSample as error:
                bad[index] = error
        texts, references = (
            [e.text for e in good.values()],
            [len(next(iter(e.references.values()))) for e in good.values()],
        )
        return Read(
            bucket, bad, list(good), texts, references, stacked_tensors(list(good.values()))
        )


def stacked_tensors(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return the tensors of a `Read`; empty if there are no examples."""
    if not examples:
        return {}
    return {
        "pixels": torch.stack([example.pixels for example in examples]),
        "mask": torch.stack([example.mask for example in examples]),
        "time_ids": torch.stack([example.time_ids for example in examples]),
        **{
            part: torch.cat([example.references[part] for example in examples])
            for part in examples[0].references
        },
    }


def batches_of(
    samples: Sequence[int], source: Source, sizes: Sequence[Size]
) -> Iterator[BatchIndex]:
    """Yield all samples of a shard in batches of one bucket."""
    members: dict[int, list[int]] = {}
    for index in samples:
        members.setdefault(bucket_of(source, index, sizes), []).append(index)
    for bucket, own in sorted(members.items()):
        for start in range(0, len(own), AT_ONCE):
            yield bucket, own[start : start + AT_ONCE]


def read_ahead(
    examples: Callable[[int], Example], batches: Iterator[BatchIndex], workers: int
) -> Iterator[Read]:
    """Yield the batches in order, read by `workers` processes while the models compute."""
    yield from DataLoader(
        Reading(examples),
        batch_size=None,
        sampler=batches,  # pyright: ignore[reportArgumentType] - any iterable will do
        num_workers=workers,
        collate_fn=as_read,  # pyright: ignore[reportArgumentType] - batches are what is asked for
        generator=torch.Generator(),  # so that PyTorch's global generator is not used
    )


def as_read(read: Read) -> Read:
    """Return a batch unchanged, in place of the loader's own conversion."""
    return read


def encoded_rows(
    reads: Iterable[Read], encoder: FeatureEncoder, data: Data
) -> Iterator[EncodedRow]:
    """Yield every sample of the batches with its features or its error."""
    for read in reads:
        for index, error in read.bad.items():
            yield EncodedRow(index, read.bucket, "", error)
        if read.good:
            for index, text, features in zip(
                read.good, read.texts, encoded(read, encoder, data), strict=True
            ):
                finite = all(tensor.isfinite().all() for tensor in features.values())
                trouble = BadSample("", "its features are not finite numbers", "not finite")
                yield EncodedRow(index, read.bucket, text, features if finite else trouble)


def encoded(read: Read, encoder: FeatureEncoder, data: Data) -> Iterator[dict[str, Tensor]]:
    """Yield the features of every good sample of a batch."""
    pixels = read.tensors["pixels"]
    parts = {**encoder.latents(pixels), **encoder.text(read.texts)}
    if data.flip:
        parts |= {f"{key}_flip": value for key, value in encoder.latents(pixels.flip(-1)).items()}
    references = {part: read.tensors[part] for part in PARTS if part in read.tensors}
    split = zip(*(value.split(AT_ONCE) for value in references.values()), strict=True)
    images = [encoder.image(dict(zip(references, values, strict=True))) for values in split]
    joined = stored({part: torch.cat([image[part] for image in images]) for part in references})
    rows = {
        **{key: value.unbind() for key, value in stored(parts).items()},
        **{part: value.split(read.references) for part, value in joined.items()},
        "time_ids": read.tensors["time_ids"].unbind(),
    }
    if data.columns.mask:
        rows["mask"] = read.tensors["mask"].unbind()
    for values in zip(*rows.values(), strict=True):
        yield packed_text(dict(zip(rows, values, strict=True)))


def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors to the stored form: on the CPU, contiguous, in `stored_dtype`."""
    return {
        key: tensor.to("cpu", stored_dtype(key, tensor)).contiguous()
        for key, tensor in tensors.items()
    }


def stored_dtype(key: str, tensor: Tensor) -> torch.dtype:
    """Return float16, "face" float32, and bfloat16 for texts with numbers that are beyond float16.

    States of language models may have such numbers before their last norm.
    """
    if key == "face":
        return torch.float32
    beyond = key.startswith("text") and (tensor.float().abs() > HALF).any()
    return torch.bfloat16 if beyond else torch.float16


def with_progress(
    rows: Iterable[EncodedRow], done: int, total: int, on_done: Callable[[int, int], None]
) -> Iterator[EncodedRow]:
    """Yield the rows, and call `on_done` with (samples done, samples in all) for each."""
    for row in rows:
        done += 1
        on_done(done, total)
        yield row
