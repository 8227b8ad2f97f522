"""Readers of what others may have written, each with a good input, to be fed with mutations of it.

    python -m tests.fuzz_target KIND COUNT SEED     COUNT seeded mutations, figures as JSON
    python -m tests.fuzz_target KIND --atheris      coverage-guided, if atheris is installed

An input may be read or be refused in one line (ImpromptError, or an OSError that `main` prints);
anything else, more than SECONDS for an input, or more than MEMORY bytes, is a fault.
"""

import json
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, PngImagePlugin

from imprompt.checkpoints.adapters import AdapterFile, read_adapter, write_adapter
from imprompt.checkpoints.tensors import load_pickle, read_tensors
from imprompt.encoders.embedding_files import Embedding, load_embedding, save_embedding
from imprompt.errors import ImpromptError
from imprompt.evaluation.results import read_results
from imprompt.evaluation.run import read_record
from imprompt.evaluation.sets import open_set
from imprompt.generation.references import parsed_blocks
from imprompt.generation.request import read_request
from imprompt.images import open_image
from imprompt.models import PACKAGED
from imprompt.training.cache import ShardTable, read_manifest, read_table
from imprompt.training.recipe import Data, Recipe, read_recipe
from imprompt.training.shards import expand_braces
from imprompt.training.sources import open_source
from imprompt.training.state import load_state
from imprompt.training.watch import Metrics

SECONDS, MEMORY = 20, 1 << 30
# Pieces that broke readers before
TOKENS = [
    *(b"[" * 3000, b'{"a":' * 3000, b"a." * 3000, b"1" * 5000, b"1e999", b"NaN", b"-1", b"null"),
    *(b"\\u0000", b"\\ud800", b"\0" * 600, b"\xff\xfe", b"/", b"..", b"[]", b"{}", b"true", b'""'),
    *(b"{0..999999999999}", b"\xef\xbb\xbf", b"\n", b"99999999999999999999", b"0"),
]
RECIPE = """model = "emoji"
output = "run"
licence = "CC0"
[data]
source = "set"
columns = {image = "a"}
[optimization]
steps = 2
learning_rate = 1e-3
[validation]
texts = ["a", "b"]
"""
REQUEST: dict[str, Any] = {
    "images": [{"images": ["a.png"], "scale": 0.5, "blocks": {"down": 1}}, "b.png"],
    "adapter": [{"adapter": "base", "name": "x"}],
    "settings": {"steps": 2, "seed": 1, "prompt": ["a"]},
}
BAD = {"sample": 0, "name": "a", "why": "b", "kind": "c"}
FILE = {"file": "shard-000000.tar", "bytes": 1, "sha256": "0"}
PLAN: dict[str, Any] = {
    "identity": {"a": 1},
    "source": {"b": 2},
    "samples": 2,
    "shard": 2,
    "bad_shards": [],
    "unit": 8,
    "channels": 4,
    "totals": {"samples": 2},
    "nulls": FILE,
    "bad": [BAD],
    "shards": [{**FILE, "samples": 2, "table": FILE}],
}
TABLE = {**FILE, "samples": 1, "names": ["a"], "buckets": [0], "places": [[0, 0, 0]], "bad": [BAD]}
RUN = {"set": {"path": "a"}, "judges": [{"key": "clip"}], "adapters": [{"name": "base"}]}
ROW = {"setting": "a", "item": "b", "seed": 1, "image": "c", "reference": "d", "clip_i": 0.5}
SUMMARY = {
    "run": RUN,
    "settings": [
        {
            "name": "a",
            "axes": {"scale": 1},
            "count": 1,
            "items": 1,
            "metrics": {"clip_i": {"value": 0.5, "low": None, "high": None}},
        }
    ],
    "notes": ["a"],
}


class FuzzKind(NamedTuple):
    """A kind of input.

    name   of the file that is mutated
    make   writes a good input into a folder: the file of that name, and those next to it
    read   reads the folder
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]


def text(name: str, value: Any) -> Callable[[Path], object]:
    """Return a function that writes text, or a value as JSON, to the file of that name."""
    told = value if isinstance(value, str) else json.dumps(value)
    return lambda at: (at / name).write_text(told)


def png(at: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("imprompt", json.dumps(REQUEST))
    Image.new("RGB", (8, 8), "red").save(at / "a.png", pnginfo=info)


def adapter(name: str, layout: str, at: Path) -> None:
    write_adapter(at / name, packaged(), layout)


@cache
def packaged() -> AdapterFile:
    """Return the packaged adapter, the smallest there is."""
    return read_adapter(PACKAGED / "emoji" / "adapters" / "base.safetensors")


def pickled(at: Path, *, new: bool = True) -> None:
    """Write the packaged adapter as a training script would, in torch.save's new or old format."""
    adapter("b.bin", "paper", at)
    held = {"state_dict": load_pickle(at / "b.bin"), "epoch": 3}
    torch.save(held, at / "a.bin", _use_new_zipfile_serialization=new)


def embedding(at: Path) -> None:
    save_embedding(at / "a.safetensors", Embedding(torch.ones(1, 4), "pooled"))


def tar(at: Path) -> None:
    import io
    import tarfile

    with tarfile.open(at / "a.tar", "w") as made:
        for name in ("a.png", "a.txt", "b.png", "b.txt"):
            member = tarfile.TarInfo(name)
            member.size = 300
            made.addfile(member, io.BytesIO(b"x" * 300))


def split(at: Path) -> None:
    adapter("part.safetensors", "paper", at)
    keys, _ = read_tensors(at / "part.safetensors", lambda keys: {key: key for key in keys})
    index = {"weight_map": dict.fromkeys(keys, "part.safetensors")}
    (at / "a.safetensors.index.json").write_text(json.dumps(index))


def listed(at: Path) -> None:
    png(at)
    row = {"file_name": "a.png", "text": "b", "reference": ["a.png"]}
    (at / "metadata.jsonl").write_text(f"{json.dumps(row)}\n" * 2)


def results(name: str, at: Path) -> None:
    (at / "summary.json").write_text(json.dumps(SUMMARY))
    (at / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    assert (at / name).exists()


def state(name: str, at: Path) -> None:
    (at / "latest").mkdir()
    recipe = read_recipe_of(at).model_dump(mode="json")
    (at / "latest" / "state.json").write_text(json.dumps({"step": 1, "recipe": recipe}))
    torch.save({"optimizer": {"state": {0: torch.ones(2)}}}, at / "latest" / "training.pt")
    assert (at / name).exists()


def read_recipe_of(at: Path) -> Recipe:
    (at / "r.toml").write_text(RECIPE)
    return read_recipe(at / "r.toml")


def samples(at: Path, name: str = "") -> None:
    """Read all samples of a set; a bad one is refused alone."""
    source = open_source(Data(source=str(at / name) if name else str(at)))
    for index in range(min(len(source), 4)):
        try:
            source.read(index)
        except ImpromptError:
            continue


KINDS = {
    "recipe": FuzzKind("a.toml", text("a.toml", RECIPE), lambda at: read_recipe(at / "a.toml")),
    "request": FuzzKind("a.json", text("a.json", REQUEST), lambda at: read_request(at / "a.json")),
    "PNG": FuzzKind("a.png", png, lambda at: read_request(at / "a.png")),
    "PNG's request": FuzzKind("told", text("told", REQUEST), lambda at: read_told(at)),
    "picture": FuzzKind("a.png", png, lambda at: open_image(at / "a.png")),
    "blocks": FuzzKind(
        "b", text("b", {"down": [1, 0.5]}), lambda at: parsed_blocks(words(at / "b"))
    ),
    "braces": FuzzKind(
        "b", text("b", "x{0..3}{a,b}.tar"), lambda at: expand_braces(words(at / "b"))
    ),
    "listing": FuzzKind("metadata.jsonl", listed, samples),
    "list": FuzzKind(
        "a.json",
        text("a.json", [{"image_file": "a.png", "text": "b"}]),
        partial(samples, name="a.json"),
    ),
    "tar": FuzzKind("a.tar", tar, partial(samples, name="a.tar")),
    "safetensors": FuzzKind(
        "a.safetensors",
        partial(adapter, "a.safetensors", "imprompt"),
        lambda at: read_adapter(at / "a.safetensors"),
    ),
    "pickle": FuzzKind("a.bin", pickled, lambda at: read_adapter(at / "a.bin")),
    "old pickle": FuzzKind(
        "a.bin", partial(pickled, new=False), lambda at: read_adapter(at / "a.bin")
    ),
    "split file": FuzzKind("a.safetensors.index.json", split, read_adapter),
    "embedding": FuzzKind(
        "a.safetensors", embedding, lambda at: load_embedding(at / "a.safetensors")
    ),
    ".ipadpt": FuzzKind(
        "a.ipadpt",
        lambda at: torch.save([torch.ones(2, 1, 4)], at / "a.ipadpt"),
        lambda at: load_embedding(at / "a.ipadpt"),
    ),
    "manifest": FuzzKind("manifest.json", text("manifest.json", PLAN), read_manifest),
    "shard table": FuzzKind(
        "a.json", text("a.json", TABLE), lambda at: read_table(at / "a.json", ShardTable)
    ),
    "state": FuzzKind(
        "latest/state.json",
        partial(state, "latest/state.json"),
        lambda at: load_state(at, read_recipe_of(at)),
    ),
    "training.pt": FuzzKind(
        "latest/training.pt",
        partial(state, "latest/training.pt"),
        lambda at: load_state(at, read_recipe_of(at)),
    ),
    "metrics": FuzzKind(
        "metrics.jsonl", text("metrics.jsonl", {"step": 1}), lambda at: Metrics(at).cut(1)
    ),
    "run.json": FuzzKind("run.json", text("run.json", RUN), read_record),
    "summary": FuzzKind("summary.json", partial(results, "summary.json"), read_results),
    "rows": FuzzKind("rows.jsonl", partial(results, "rows.jsonl"), read_results),
    "evaluation set": FuzzKind("metadata.jsonl", listed, open_set),
}


def words(path: Path) -> str:
    """The file as a command line's argument: Python gives odd bytes as surrogates."""
    return path.read_bytes().decode(errors="surrogateescape").replace("\0", "")


def read_told(at: Path) -> object:
    """Read a file's bytes as the request inside a PNG."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("imprompt", (at / "told").read_bytes().decode(errors="replace"))
    Image.new("RGB", (2, 2)).save(at / "a.png", pnginfo=info)
    return read_request(at / "a.png")


def mutated(good: bytes, rng: random.Random) -> bytes:
    """Return good bytes with one to four changes."""
    data = bytearray(good)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        if rng.random() < 0.7:  # what lies at the start or the end says what the rest is
            start = rng.choice((min(start, start % 2048), len(data) - start % 2048))
            start = max(0, start)
        end = min(len(data), start + rng.choice((0, 1, 1, 4, 64)))
        match rng.randrange(6):
            case 0 if start < len(data):
                data[start] ^= 1 << rng.randrange(8)
            case 1:
                del data[start:end]
            case 2:
                data[start:end] = rng.choice(TOKENS)
            case 3:
                data[start:start] = data[start:end] * rng.randint(1, 50)
            case 4 if (found := value_in(bytes(data), rng)) is not None:
                data[found[0] : found[1]] = rng.choice(TOKENS)
            case 5 if rng.random() < 0.3:
                del data[start:]
    return bytes(data)


def value_in(data: bytes, rng: random.Random) -> tuple[int, int] | None:
    """Return the span of one word, number or quoted text."""
    found = [hit.span() for hit in re.finditer(rb'"[^"]*"|[\w.+-]+', data[:20_000])]
    return rng.choice(found) if found else None


@contextmanager
def limited() -> Iterator[None]:
    """Interrupt what runs longer than SECONDS."""

    def interrupted(*_: object) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, interrupted)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def fault_of(kind: FuzzKind, at: Path, data: bytes) -> str:
    """Read one input; return "read", "refused", or the fault."""
    (at / kind.name).write_bytes(data)
    try:
        with limited():
            kind.read(at)
    except TimeoutError as error:
        return f"fault: {error}"
    except ImpromptError as error:
        return "refused" if "\n" not in str(error) else f"fault: two lines: {error!r}"
    except OSError as error:
        return "refused" if error.strerror else f"fault: {error!r}"
    except BaseException as error:
        return f"fault: {type(error).__name__}: {str(error)[:200]}"
    return "read"


def run(name: str, count: int, seed: int) -> dict[str, Any]:
    """Feed seeded mutations to a kind's reader; return figures, with the first input of a fault."""
    kind, ends, faults = KINDS[name], Counter[str](), {}
    began, rng, slowest = time.monotonic(), random.Random(f"{name} {seed}"), 0.0
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        kind.make(at)
        good = (at / kind.name).read_bytes()
        assert fault_of(kind, at, good) == "read"
        for _ in range(count):
            data, start = mutated(good, rng), time.monotonic()
            end = fault_of(kind, at, data)
            slowest = max(slowest, time.monotonic() - start)
            ends[end[:7]] += 1
            if end.startswith("fault"):
                faults.setdefault(end, data[:200].hex())
    return {
        "kind": name,
        "inputs": count,
        "read": ends["read"],
        "refused": ends["refused"],
        "faults": faults,
        "seconds": round(time.monotonic() - began, 1),
        "slowest": round(slowest, 2),
        "peak_mb": peak_memory() >> 20,
    }


def peak_memory() -> int:
    """Return the most bytes that this process has held, without its parent's as in rusage."""
    held = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert held is not None
    return int(held[1]) << 10


def limit_memory() -> None:
    """Let this process take no more than MEMORY bytes beyond what it has."""
    held = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # pyright: ignore[reportOptionalSubscript]
    resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, held + MEMORY))


def main() -> None:
    """Run as the module's docstring says."""
    name, *rest = sys.argv[1:]
    packaged()
    limit_memory()
    if rest == ["--atheris"]:
        import atheris  # pyright: ignore[reportMissingImports]

        at = Path(tempfile.mkdtemp())
        KINDS[name].make(at)

        def one(data: bytes) -> None:
            if (end := fault_of(KINDS[name], at, data)).startswith("fault"):
                raise AssertionError(end)

        atheris.instrument_all()
        atheris.Setup(sys.argv[:1], one)
        atheris.Fuzz()
        return
    for kind in KINDS if name == "all" else [name]:
        print(json.dumps(run(kind, int(rest[0]), int(rest[1]))), flush=True)


if __name__ == "__main__":
    main()
