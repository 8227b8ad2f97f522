"""Tar shards (the WebDataset layout) as samples by number: each shard's headers are read once, a member by its place.

The webdataset library says which shards are meant, how members group into samples, and how remote shards are read.
"""

import glob
import hashlib
import os
import re
import shutil
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np

from imprompt.errors import ImageError, SettingError, first_line
from imprompt.files import written_whole
from imprompt.images import image_size
from imprompt.training.recipe import Data
from imprompt.training.sources import BadSample, Names, Picture, Sample, Size, caption

IMAGES = "jpg,jpeg,png,webp,gif,avif,tiff,tif,bmp,ppm,jp2"  # file endings, the likeliest first
HEADER = 65536  # bytes that hold the header of nearly every picture
NOT_SAMPLES = re.compile(r"__[^/]*__($|/)")  # members that the library passes over
FETCHES = 4  # shards fetched at once


class TarIndex:
    """Where the members of a local tar file are, by sample: neighbours that are called alike but for the ending are one.

    It keeps no file open, so that it can be pickled, forked and read from several threads.
    """

    def __init__(self, path: Path, label: str | None = None) -> None:
        """`label` is what messages call it, the path if not given. BadSample if there is no tar file, or nothing in it."""
        from webdataset.tariterators import base_plus_ext

        self.path, self.label = path, label or str(path)
        self.keys: list[str] = []
        self.whole = False  # whether the tar ends as it should; if not, its last sample may lack something
        self._endings: dict[str, int] = {}  # each with its number
        first, spans, numbers = array("q"), array("q"), array("l")
        for name, start, size in self._headers():
            key, ending = base_plus_ext(name)
            if key is None or ending is None or NOT_SAMPLES.match(name):
                continue
            if not self.keys or key != self.keys[-1]:
                self.keys.append(key)
                first.append(len(numbers))
            spans.extend((start, size))
            numbers.append(self._endings.setdefault(ending.lower(), len(self._endings)))
        if not self.keys:
            raise BadSample(self.label, "holds no samples", "empty")
        self._first = np.array([*first, len(numbers)])  # (samples + 1,) a sample's first member
        self._spans = np.array(spans).reshape(-1, 2)  # (members, 2) start and size in bytes
        self._ending = np.array(numbers, np.int32)  # (members,)

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, number: int) -> str:
        return f"{self.keys[number]} in {self.label}"

    def members(self, number: int) -> dict[str, tuple[int, int]]:
        """{file ending: (start, size) in bytes} of a sample. Of members that are called alike the last counts, as in tar."""
        part, endings = slice(*self._first[number : number + 2]), list(self._endings)
        spans: Any = self._spans[part].tolist()
        return {endings[ending]: (start, size) for ending, (start, size) in zip(self._ending[part], spans, strict=True)}

    def read(self, number: int, ending: str, most: int | None = None) -> bytes:
        """A member's bytes, or its first `most`; BadSample if they are not there."""
        start, size = self.members(number)[ending]
        wanted = size if most is None else min(size, most)
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                data = file.read(wanted)
        except OSError as error:
            raise BadSample(self.name(number), f"cannot be read ({first_line(error)})", "not readable") from error
        if len(data) < wanted:
            raise BadSample(self.name(number), f"the {ending} is cut off: the tar ends within it", "damaged")
        return data

    def _headers(self) -> Iterator[tuple[str, int, int]]:
        """(name, start, size) of every file in the tar up to its end or its first damage; BadSample if it is no tar."""
        try:
            with tarfile.open(self.path, "r:") as tar:
                yield from self._walk(tar)
        except FileNotFoundError as error:
            raise BadSample(self.label, "does not exist", "absent") from error
        except OSError as error:
            raise BadSample(self.label, f"cannot be read ({first_line(error)})", "not readable") from error
        except (tarfile.TarError, ValueError) as error:
            why = f"is no tar file, or a compressed one ({first_line(error)})"
            raise BadSample(self.label, why, "no tar") from error

    def _walk(self, tar: tarfile.TarFile) -> Iterator[tuple[str, int, int]]:
        file: Any = tar.fileobj
        length = os.fstat(file.fileno()).st_size
        try:
            while (member := tar.next()) is not None:
                if not 0 <= member.size <= length:  # damaged; below 0 the next header would be one that was read before
                    return
                if member.isreg():
                    yield member.name, member.offset_data, member.size
        except (tarfile.TarError, ValueError):  # cut off or damaged in the middle; what came before is good
            return
        file.seek(tar.offset)
        self.whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


class ShardSource:
    """Samples in tar shards, which are local, or fetched when the source is opened."""

    def __init__(self, data: Data) -> None:
        """SettingError if there are no shards, or none that can be read."""
        urls = expand(data.source)
        self.remote = any(map(is_remote, urls))
        self.names = Names.of(data.columns, IMAGES, "txt,text,caption", "reference")
        self.captions_required = data.captions == "required"
        with ThreadPoolExecutor(FETCHES) as pool:
            opened = list(pool.map(index_or_trouble, urls))
        self.tars = [tar for tar in opened if isinstance(tar, TarIndex)]
        self.bad_shards: Sequence[BadSample] = [trouble for trouble in opened if isinstance(trouble, BadSample)]
        if not self.tars:
            many = f"none of its {len(urls)} shards can be read, the first: " if len(urls) > 1 else ""
            raise SettingError(f"data.source = {data.source!r}: {many}{self.bad_shards[0]}")
        self.shards: Sequence[int] = tuple(map(len, self.tars))
        self._ends = np.cumsum(self.shards).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        tar, number = self._find(index)
        return tar.name(number)

    def read(self, index: int) -> Sample:
        tar, number = self._find(index)
        name = tar.name(number)
        if number == len(tar) - 1 and not tar.whole:
            raise BadSample(name, "the tar is cut off or damaged here, so this may not be all of it", "damaged")
        members = tar.members(number)
        text = caption(name, self._text(tar, number, members), self.captions_required)
        target = self._picture(tar, number, self._target(name, members))
        references = (self._picture(tar, number, ending) for ending in fitting(members, self.names.reference))
        return Sample(name, target, tuple(references) or (target,), text)

    def size(self, index: int) -> Size:
        tar, number = self._find(index)
        ending = self._target(tar.name(number), tar.members(number))
        try:
            return image_size(tar.read(number, ending, HEADER))
        except ImageError:  # of a format whose header is longer, or anywhere
            return self._picture(tar, number, ending).size()

    def _find(self, index: int) -> tuple[TarIndex, int]:
        """The shard of a sample and its number there."""
        shard = bisect_right(self._ends, index)
        return self.tars[shard], index - self._ends[shard] + self.shards[shard]

    def _target(self, name: str, members: Mapping[str, Any]) -> str:
        found = next(iter(fitting(members, self.names.image)), None)
        if found is None:
            raise BadSample(name, f"holds no picture, only {', '.join(members)}; data.columns.image names the ending", "absent")
        return found

    def _picture(self, tar: TarIndex, number: int, ending: str) -> Picture:
        return Picture(tar.name(number), f"the {ending}", partial(tar.read, number, ending))

    def _text(self, tar: TarIndex, number: int, members: Mapping[str, Any]) -> str | None:
        ending = next(iter(fitting(members, self.names.text)), None)
        try:
            return None if ending is None else tar.read(number, ending).decode()
        except UnicodeDecodeError as error:
            raise BadSample(tar.name(number), f"the {ending} is no UTF-8 text", "damaged") from error


def fitting(members: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The endings that are one of the names, or go on from it after a dot: "reference" has reference.png and reference.2.png."""
    return [ending for name in names for ending in members if ending == name or ending.startswith(f"{name}.")]


def expand(source: str) -> list[str]:
    """The files and URLs of braces and patterns; SettingError if there are none."""
    from webdataset.shardlists import expand_urls

    try:
        urls = expand_urls(source)
    except (ValueError, AssertionError) as error:
        raise SettingError(f"data.source = {source!r}: {first_line(error)}") from error
    found = []
    for url in urls:
        pattern = not is_remote(url) and glob.has_magic(url) and not os.path.exists(url)
        found += sorted(glob.glob(url)) if pattern else [url]
    if not found:
        raise SettingError(f"data.source = {source!r}: no file fits this pattern")
    return found


def is_remote(url: str) -> bool:
    return url.startswith("pipe:") or ("://" in url and not url.startswith("file:"))


def index_or_trouble(url: str) -> TarIndex | BadSample:
    try:
        if is_remote(url):
            return fetched_index(url)
        return TarIndex(Path(url2pathname(urlsplit(url).path) if url.startswith("file:") else url))
    except BadSample as error:
        return error


def fetched_index(url: str) -> TarIndex:
    path = fetch(url)
    try:
        return TarIndex(path, url)
    except BadSample:
        path.unlink(missing_ok=True)  # what came was no shard: the next run asks again
        raise


def cache_folder() -> Path:
    """Where fetched shards are kept: IMPROMPT_CACHE/shards."""
    return Path(os.environ.get("IMPROMPT_CACHE") or Path.home() / ".cache" / "imprompt") / "shards"


def fetch(url: str) -> Path:
    """The local copy of a remote shard, fetched whole if there is none yet; other processes that want it wait. BadSample."""
    from filelock import FileLock

    final = cache_folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_suffix(".lock")):
            if not final.exists():
                for torn in final.parent.glob(f".{final.name}.*"):  # of a process that was killed
                    torn.unlink()
                with written_whole(final) as aside:
                    download(url, aside)
    except OSError as error:
        raise BadSample(url, f"cannot be fetched ({error})", "absent") from error
    return final


def download(url: str, path: Path) -> None:
    """BadSample if the command that reads the URL fails, OSError if the file cannot be written."""
    from webdataset.gopen import gopen, gopen_schemes, set_options

    scheme = url.partition(":")[0]
    if scheme not in gopen_schemes:
        known = ", ".join(sorted({*gopen_schemes} - {"__default__"}))
        raise BadSample(url, f"{scheme}: is not read (known: {known}); pipe:COMMAND reads what a command writes", "absent")
    stream: Any = gopen(url)
    with path.open("wb") as file, stream:
        set_options(stream, ignore_errors=True)  # it is looked at below, when all has been read
        shutil.copyfileobj(stream, file, 1 << 20)
    if stream.status:
        raise BadSample(url, f"cannot be fetched: the command that reads it ended with code {stream.status}", "absent")
