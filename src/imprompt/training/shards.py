"""Tar shards (the WebDataset layout) as samples by number.

The headers of each shard are read once, and each member by its position. The webdataset library
defines which shards are meant, how members group into samples, and how remote shards are read.
"""

import glob
import hashlib
import os
import re
import shutil
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import Image
from pydantic import NonNegativeInt

from imprompt.errors import ImageError, SettingError, first_line
from imprompt.files import atomic_write, cache_root
from imprompt.images import image_size, open_image, open_mask
from imprompt.training.recipe import Data
from imprompt.training.samples import BadSample, Names, PictureOpener, Sample, Size, caption
from imprompt.untrusted import adapter_for, open_regular, read_json

IMAGES = "jpg,jpeg,png,webp,gif,avif,tiff,tif,bmp,ppm,jp2"  # file endings, the likeliest first
HEADER = 65536  # bytes that hold the header of nearly every picture
# members that the library skips, and those that macOS adds
NOT_SAMPLES = re.compile(r"__[^/]*__($|/)|(.*/)?(__MACOSX/|\._)")
MAX_SHARDS, MAX_NAMES = 300_000, 1 << 28  # shards that braces may name, and their characters
MAX_URL = 4096  # characters
MAX_NESTED = 8  # braces inside each other
INNERMOST = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\n?")
FETCHES = 4  # shards fetched at once
KEEP = 16  # streamed shards of a set that stay on the disk
T = TypeVar("T")
Counts = dict[str, NonNegativeInt]  # of samples, by the shard's file name or URL

# Files next to remote shards that may give the number of samples in each -> these counts.
# OpenCLIP reads the first, {"0000.tar": 1000}; wids, which belongs to webdataset, the second,
# {"shardlist": [{"url": "0000.tar", "nsamples": 1000}]}.
INDEXES: Mapping[str, Callable[[Any], Counts]] = {
    "sizes.json": lambda table: table,
    "index.json": lambda table: {row["url"]: row["nsamples"] for row in table["shardlist"]},
}


class TarIndex:
    """Positions of a tar file's members, by sample.

    Neighbours whose names differ only in the ending form one sample.

    It keeps no file open, so that it can be pickled, forked and read from several threads.
    """

    def __init__(self, place: "Path | Streamed", label: str | None = None) -> None:
        """Read the headers; `label` is its name in messages, by default the path.

        Raise BadSample if it is absent, is not a tar file, or holds no samples.
        """
        from webdataset.tariterators import base_plus_ext

        self.place, self.label = place, label or str(place)
        self.keys: list[str] = []
        # whether the tar ends properly; if not, its last sample may be incomplete
        self.whole = False
        self.endings: dict[str, int] = {}  # ending of any member -> its number
        first, spans, numbers = array("q"), array("q"), array("l")
        for name, start, size in self._headers():
            key, ending = base_plus_ext(name)
            if key is None or ending is None or NOT_SAMPLES.match(name):
                continue
            if not self.keys or key != self.keys[-1]:
                self.keys.append(key)
                first.append(len(numbers))
            spans.extend((start, size))
            numbers.append(self.endings.setdefault(ending.lower(), len(self.endings)))
        if not self.keys:
            raise BadSample(self.label, "holds no samples", "empty")
        self._first = np.array([*first, len(numbers)])  # (samples + 1,) a sample's first member
        self._spans = np.array(spans).reshape(-1, 2)  # (members, 2) start and size in bytes
        self._ending = np.array(numbers, np.int32)  # (members,)

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, number: int) -> str:
        """Return the sample's key and the shard."""
        return f"{self.keys[number]} in {self.label}"

    def members(self, number: int) -> dict[str, tuple[int, int]]:
        """Return {file ending: (start, size) in bytes} of a sample.

        Raise BadSample if the sample may be incomplete. Of members with equal names the last
        counts, as in tar.
        """
        if number == len(self) - 1 and not self.whole:
            why = "the tar is cut off or damaged here, so this may not be all of it"
            raise BadSample(self.name(number), why, "damaged")
        part, endings = slice(*self._first[number : number + 2]), list(self.endings)
        spans: Any = self._spans[part].tolist()
        return {
            endings[ending]: (start, size)
            for ending, (start, size) in zip(self._ending[part], spans, strict=True)
        }

    def read(self, number: int, ending: str, most: int | None = None) -> bytes:
        """Return a member's bytes, or its first `most`; raise BadSample if they are absent."""
        start, size = self.members(number)[ending]
        wanted = size if most is None else min(size, most)
        try:
            with self._opened() as file:
                file.seek(start)
                data = file.read(wanted)
        except OSError as error:
            raise BadSample(
                self.name(number), f"cannot be read ({first_line(error)})", "not readable"
            ) from error
        if len(data) < wanted:
            raise BadSample(
                self.name(number), f"the {ending} is cut off: the tar ends within it", "damaged"
            )
        return data

    def _opened(self) -> BinaryIO:
        if isinstance(self.place, Path):
            return open_regular(self.place)
        return self.place.open("rb")

    def _headers(self) -> Iterator[tuple[str, int, int]]:
        """Yield (name, start, size) of every file in the tar up to its end or its first damage.

        Raise BadSample if it is not a tar file.
        """
        try:
            with self._opened() as file, tarfile.open(fileobj=file, mode="r:") as tar:
                yield from self._walk(tar)
        except FileNotFoundError as error:
            raise BadSample(self.label, "does not exist", "absent") from error
        except OSError as error:
            raise BadSample(
                self.label, f"cannot be read ({first_line(error)})", "not readable"
            ) from error
        except (tarfile.TarError, ValueError, RecursionError) as error:
            why = f"is not a tar file, or is a compressed one ({first_line(error)})"
            raise BadSample(self.label, why, "no tar") from error

    def _walk(self, tar: tarfile.TarFile) -> Iterator[tuple[str, int, int]]:
        file: Any = tar.fileobj
        length = os.fstat(file.fileno()).st_size
        try:
            while (member := tar.next()) is not None:
                if not 0 <= member.size <= length:
                    # damaged; a negative size would lead back to a header that was read before
                    return
                if member.isreg():
                    yield member.name, member.offset_data, member.size
        except (tarfile.TarError, ValueError, RecursionError):
            # cut off or damaged in the middle; what came before is good
            return
        file.seek(tar.offset)
        self.whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Streamed:
    """A remote tar file with a known number of samples.

    It is fetched when one of them is read, and again if its copy was removed to make room. Samples
    are named by their number, so that a name does not depend on what has been fetched.
    """

    url: str
    samples: int  # as its index states; samples beyond that are left out
    path: Path  # of its copy, in the folder of its set

    def __len__(self) -> int:
        return self.samples

    def name(self, number: int) -> str:
        """Return the sample's number and the URL."""
        return f"sample {number} of {self.url}"

    def members(self, number: int) -> dict[str, tuple[int, int]]:
        """Return {file ending: (start, size) in bytes} of a sample; raise BadSample."""
        return self._answer(number, lambda tar: tar.members(number))

    def read(self, number: int, ending: str, most: int | None = None) -> bytes:
        """Return a member's bytes, or its first `most`; raise BadSample if they are absent."""
        return self._answer(number, lambda tar: tar.read(number, ending, most))

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        """Open the copy and mark it as used last; raise BadSample if it cannot be fetched."""
        while True:
            try:
                os.utime(self.path)
                return self.path.open(mode)
            except FileNotFoundError:  # not fetched yet, or removed by a process that made room
                fetch(self.url, self.path)
                make_room(self.path)

    def _answer(self, number: int, question: Callable[[TarIndex], T]) -> T:
        try:
            tar = recent_index(self)
            if number >= len(tar):
                why = (
                    f"is not there: the shard holds {len(tar):,} samples, its index states "
                    f"{self.samples:,}"
                )
                raise BadSample(self.url, why, "absent")
            return question(tar)
        except BadSample as error:
            raise BadSample(self.name(number), error.why, error.kind) from error


@lru_cache(KEEP)
def recent_index(shard: Streamed) -> TarIndex:
    """Return the index of a streamed shard; those of the last KEEP shards are cached."""
    return TarIndex(shard, shard.url)


class ShardSource:
    """Samples in tar shards.

    Remote shards are streamed if an index next to them (INDEXES) counts their samples. Nothing is
    fetched when the source is opened; a shard is fetched when one of its samples is read, and the
    KEEP shards of a set that were used last stay on the disk. `size` also reads the file, so that
    aspect buckets fetch every shard once. All other remote shards (without an index, or `pipe:`)
    are fetched when the source is opened, to be counted, and stay.
    """

    def __init__(self, data: Data) -> None:
        """Open the shards.

        Raise SettingError if there are none, none can be read, or none can have the masks that the
        recipe needs.
        """
        urls = expand_braces(data.source)
        self.remote = any(map(is_remote, urls))
        self.names = Names.of(data.columns, IMAGES, "txt,text,caption", "reference")
        self.captions_required = data.captions == "required"
        counts, folder = known_counts(urls), cache_folder() / hashed(data.source)
        with ThreadPoolExecutor(FETCHES) as pool:
            opened = list(pool.map(lambda url: tar_or_trouble(url, counts.get(url), folder), urls))
        self.tars = [tar for tar in opened if not isinstance(tar, BadSample)]
        troubles = [trouble for trouble in opened if isinstance(trouble, BadSample)]
        if not self.tars:
            many = (
                f"none of its {len(urls)} shards can be read, the first: " if len(urls) > 1 else ""
            )
            raise SettingError(f"data.source = {data.source!r}: {many}{troubles[0]}")
        self.shards: Sequence[int] = tuple(map(len, self.tars))
        cut = [tar for tar in self.tars if isinstance(tar, TarIndex) and not tar.whole]
        sound = [len(tar) for tar in self.tars if tar not in cut] or self.shards
        held = round(sum(sound) / len(sound))  # estimated from the other shards
        self.bad_shards: Sequence[BadSample] = [
            *(BadSample(bad.name, bad.why, bad.kind, held) for bad in troubles),
            *(
                BadSample(tar.label, "is cut off or damaged", "damaged", held - len(tar))
                for tar in cut
                if len(tar) < held
            ),
        ]
        self._ends = np.cumsum(self.shards).tolist()
        possible = any(
            isinstance(tar, Streamed) or fitting(tar.endings, self.names.mask) for tar in self.tars
        )
        if self.names.mask and not possible:
            raise SettingError(
                f"data.source = {data.source!r} holds no masks: data.columns.mask is the ending of "
                "none of its files"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        """Return the sample's key or number, and its shard."""
        tar, number = self._find(index)
        return tar.name(number)

    def read(self, index: int) -> Sample:
        """Read a sample; raise BadSample if it is damaged or lacks a required part."""
        tar, number = self._find(index)
        name, members = tar.name(number), tar.members(number)
        target = self._picture(tar, number, self._target(name, members))
        text = caption(name, self._text(tar, number, members), self.captions_required)
        references = (
            self._picture(tar, number, ending) for ending in fitting(members, self.names.reference)
        )
        mask = next(
            (
                self._picture(tar, number, ending, open_mask)
                for ending in fitting(members, self.names.mask)
            ),
            None,
        )
        return Sample(name, target, tuple(references) or (target,), text, mask)

    def size(self, index: int) -> Size:
        """Return (width, height) of the target picture, from its first bytes if possible."""
        tar, number = self._find(index)
        ending = self._target(tar.name(number), tar.members(number))
        try:
            return image_size(tar.read(number, ending, HEADER))
        except ImageError:  # its header is longer, or not at the start of the file
            return self._picture(tar, number, ending).size()

    def _find(self, index: int) -> tuple[TarIndex | Streamed, int]:
        """Return the shard of a sample and its number there."""
        shard = bisect_right(self._ends, index)
        return self.tars[shard], index - self._ends[shard] + self.shards[shard]

    def _target(self, name: str, members: Mapping[str, Any]) -> str:
        found = next(iter(fitting(members, self.names.image)), None)
        if found is None:
            raise BadSample(
                name,
                f"holds no picture, only {', '.join(members)}; data.columns.image names the ending "
                "(all that follows the first dot)",
                "absent",
            )
        return found

    def _picture(
        self,
        tar: TarIndex | Streamed,
        number: int,
        ending: str,
        opened: Callable[..., Image.Image] = open_image,
    ) -> PictureOpener:
        file = tar.place if isinstance(tar, TarIndex) and isinstance(tar.place, Path) else None
        return PictureOpener(
            tar.name(number), f"the {ending}", partial(tar.read, number, ending), opened, file
        )

    def _text(
        self, tar: TarIndex | Streamed, number: int, members: Mapping[str, Any]
    ) -> str | None:
        ending = next(iter(fitting(members, self.names.text)), None)
        try:
            return None if ending is None else tar.read(number, ending).decode()
        except UnicodeDecodeError as error:
            raise BadSample(
                tar.name(number), f"the {ending} is not UTF-8 text", "damaged"
            ) from error


def fitting(members: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Return the endings that are one of the names, or continue it after a dot.

    "reference" has reference.png and reference.2.png.
    """
    return [
        ending
        for name in names
        for ending in members
        if ending == name or ending.startswith(f"{name}.")
    ]


def expand_braces(source: str) -> list[str]:
    """Return the files and URLs of braces and patterns; raise SettingError if there are none."""
    from webdataset.shardlists import expand_urls

    try:
        refuse_many(source)
        urls = expand_urls(source)
    except (ValueError, AssertionError, RecursionError) as error:
        shown = source if len(source) <= 200 else f"{source[:199]}…"
        raise SettingError(f"data.source = {shown!r}: {first_line(error)}") from error
    found = []
    for url in urls:
        pattern = not is_remote(url) and glob.has_magic(url) and not os.path.exists(url)
        found += sorted(glob.glob(url)) if pattern else [url]
    if not found:
        raise SettingError(f"data.source = {source!r}: no file fits this pattern")
    return found


def refuse_many(source: str) -> None:
    """Raise ValueError if braces name more than MAX_SHARDS, or their names take too much memory."""
    urls = source.split("::")
    if any(len(url) > MAX_URL for url in urls):
        raise ValueError(f"a name of more than {MAX_URL:,} characters")
    many = sum(map(count_braces, urls))
    if many > MAX_SHARDS or many * len(source) > MAX_NAMES:
        raise ValueError(f"these braces name too many shards, {MAX_SHARDS:,} are allowed")


def count_braces(url: str) -> int:
    """Return how many URLs braces name at most; more than there are where braces are nested.

    Raise ValueError if they are nested too deep to count.
    """
    many, left = 1, re.sub(r"\\.", "", url)  # without what is escaped
    for _ in range(MAX_NESTED):
        for inside in INNERMOST.findall(left):
            ends = RANGE.fullmatch(inside)
            many *= abs(int(ends[2]) - int(ends[1])) + 1 if ends else inside.count(",") + 1
        left = INNERMOST.sub("", left)
    if INNERMOST.search(left):
        raise ValueError(f"these braces are nested deeper than {MAX_NESTED}")
    return many


def is_remote(url: str) -> bool:
    """Return whether a shard comes from a URL or a command, not from a local file."""
    return url.startswith("pipe:") or ("://" in url and not url.startswith("file:"))


def tar_or_trouble(url: str, samples: int | None, folder: Path) -> TarIndex | Streamed | BadSample:
    """Open a shard; return the BadSample if it cannot be opened.

    If the number of its samples is known, it is streamed to `folder`.
    """
    if samples is not None:
        return Streamed(url, samples, folder / f"{hashed(url)}.tar")
    try:
        if is_remote(url):
            return fetched(url, ".tar", lambda path: TarIndex(path, url))
        return TarIndex(Path(url2pathname(urlsplit(url).path) if url.startswith("file:") else url))
    except BadSample as error:
        return error


def known_counts(urls: Iterable[str]) -> Counts:
    """Return the numbers of samples of those remote shards that an index counts."""
    places = {
        url: re.split("[?#]", url)[0].rpartition("/")
        for url in urls
        if is_remote(url) and not url.startswith("pipe:")
    }
    counted = {
        folder: folder_counts(folder) for folder in {folder for folder, _, _ in places.values()}
    }
    return {
        url: counted[folder][name]
        for url, (folder, _, name) in places.items()
        if name in counted[folder]
    }


def folder_counts(folder: str) -> Counts:
    """Return counts by file name, from the first valid index in a remote folder.

    It is fetched once. Empty if there is none.
    """
    for name, form in INDEXES.items():
        try:
            return fetched(f"{folder}/{name}", ".json", partial(read_counts, form=form))
        except BadSample:
            continue
    return {}


def read_counts(path: Path, form: Callable[[Any], Counts]) -> Counts:
    """Return an index's counts by file name; raise BadSample if it has another form."""
    try:
        counts = adapter_for(Counts).validate_python(form(read_json(path)))
    except (OSError, SettingError, ValueError, LookupError, TypeError) as error:
        # an error page, or the index.json of another program
        raise BadSample(str(path), "is not an index of shards") from error
    return {url.rpartition("/")[2]: count for url, count in counts.items()}


def fetched(url: str, ending: str, read: Callable[[Path], T]) -> T:
    """Return what `read` makes of the local copy of a URL.

    Raise BadSample if it cannot be fetched or read.
    """
    path = fetch(url, cache_folder() / f"{hashed(url)}{ending}")
    try:
        return read(path)
    except BadSample:
        path.unlink(missing_ok=True)  # the download was something else: the next run fetches again
        raise


def cache_folder() -> Path:
    """Return the folder of fetched shards.

    Streamed ones are in a folder of their set.
    """
    return cache_root() / "shards"


def hashed(text: str) -> str:
    """Return a name for a text, of 32 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def fetch(url: str, final: Path) -> Path:
    """Fetch a complete copy of a remote file to `final`, unless there is one already.

    Other processes that want it wait. Raise BadSample if it cannot be fetched.
    """
    from filelock import FileLock

    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_suffix(".lock")):
            if not final.exists():
                for torn in final.parent.glob(f".{final.name}.*"):  # left over by a killed process
                    torn.unlink()
                with atomic_write(final) as temporary:
                    download(url, temporary)
    except OSError as error:
        raise BadSample(url, f"cannot be fetched ({error})", "absent") from error
    return final


def make_room(new: Path) -> None:
    """Remove the streamed shards of a folder that were used longest ago.

    KEEP are left, including the new one.
    """
    from filelock import FileLock

    with FileLock(new.with_name("room.lock")):
        others = sorted(
            (path.stat().st_mtime_ns, path) for path in new.parent.glob("*.tar") if path != new
        )
        for _, path in others[: max(0, len(others) + 1 - KEEP)]:
            path.unlink(missing_ok=True)


def download(url: str, path: Path) -> None:
    """Download a URL to a file.

    Raise BadSample if the command that reads the URL fails, OSError if the file cannot be written.
    """
    from webdataset.gopen import gopen, gopen_schemes, set_options

    scheme = url.partition(":")[0]
    if scheme not in gopen_schemes:
        known = ", ".join(sorted({*gopen_schemes} - {"__default__"}))
        raise BadSample(
            url,
            f"{scheme}: is not supported (known: {known}); pipe:COMMAND reads a command's output",
            "absent",
        )
    stream: Any = gopen(url)
    with path.open("wb") as file, stream:
        set_options(stream, ignore_errors=True)  # the status is checked below, after all is read
        shutil.copyfileobj(stream, file, 1 << 20)
    if stream.status:
        raise BadSample(
            url,
            f"cannot be fetched: the command that reads it ended with code {stream.status}",
            "absent",
        )
