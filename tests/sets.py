"""Small training sets of coloured noise, as every kind of source.

Whole, or damaged in every way that users meet.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from imprompt.images import open_image
from imprompt.training.recipe import Data

Size = tuple[int, int]


@dataclass(frozen=True)
class Item:
    """One sample before it is stored: PNG files' bytes and a caption.

    Its mask is under the name "mask".
    """

    key: str
    data: bytes | None  # None: the listing names a file that is not there
    text: str | None
    references: tuple[bytes, ...] = ()
    mask: bytes | None = None


def noise_picture(number: int, size: Size = (48, 40)) -> Image.Image:
    """Blotches with a grain, others for every number."""
    random = np.random.default_rng(number)
    blotches = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    grain = random.integers(-20, 21, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(blotches) + grain).clip(0, 255).astype(np.uint8))


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def items(count: int, size: Size | Sequence[Size] = (48, 40), references: int = 0) -> list[Item]:
    """Samples 0 to count - 1; of several sizes each in turn."""
    sizes = [size] if isinstance(size[0], int) else size
    return [
        Item(
            key=f"{n:04}",
            data=png(noise_picture(n, sizes[n % len(sizes)])),  # pyright: ignore[reportArgumentType]
            text=f"noise {n}",
            references=tuple(png(noise_picture(10_000 + 10 * n + r)) for r in range(references)),
        )
        for n in range(count)
    ]


def masked(samples: Sequence[Item]) -> list[Item]:
    """The samples, all but every third with a mask."""
    masks = {
        n: noise_picture(50_000 + n, open_image(item.data or b"").size).convert("L")
        for n, item in enumerate(samples)
    }
    return [
        replace(item, mask=png(masks[n]) if n % 3 < 2 else None) for n, item in enumerate(samples)
    ]


def given(
    samples: int | Iterable[Item], size: Size | Sequence[Size], references: int
) -> list[Item]:
    return items(samples, size, references) if isinstance(samples, int) else list(samples)


def write_pictures(folder: Path, samples: Iterable[Item]) -> list[list[str]]:
    """Write the files; every sample's file names, the target's first."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for item in samples:
        names.append(
            [
                f"{item.key}.png",
                *(f"{item.key}-reference-{n}.png" for n in range(len(item.references))),
            ]
        )
        for name, data in zip(names[-1], (item.data, *item.references), strict=True):
            if data is not None:
                (folder / name).write_bytes(data)
        if item.mask is not None:
            (folder / mask_name(item)).write_bytes(item.mask)
    return names


def mask_name(item: Item) -> str:
    return f"{item.key}-mask.png"


def entries(
    samples: list[Item], names: list[list[str]], image: str, reference: str
) -> list[dict[str, object]]:
    """What a listing says of the samples; one reference as a text, several as a list."""
    rows = []
    for item, (target, *others) in zip(samples, names, strict=True):
        text = {} if item.text is None else {"text": item.text}
        text |= {} if item.mask is None else {"mask": mask_name(item)}
        rows.append(
            {image: target}
            | text
            | ({reference: others[0] if len(others) == 1 else others} if others else {})
        )
    return rows


def make_folder(
    path: Path,
    samples: int | Iterable[Item],
    *,
    size: Size | Sequence[Size] = (48, 40),
    references: int = 0,
) -> Data:
    made = given(samples, size, references)
    rows = entries(made, write_pictures(path, made), "file_name", "reference")
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(source=str(path))


def make_list(
    path: Path,
    samples: int | Iterable[Item],
    *,
    size: Size | Sequence[Size] = (48, 40),
    references: int = 0,
) -> Data:
    made = given(samples, size, references)
    rows = entries(made, write_pictures(path / "pictures", made), "image_file", "reference_file")
    (path / "list.json").write_text(json.dumps(rows))
    return Data(source=str(path / "list.json"), root=path / "pictures")


def write_tar(
    path: Path, members: Iterable[tuple[str, bytes]], layout: int = tarfile.PAX_FORMAT
) -> None:
    with tarfile.open(path, "w", format=layout) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def members(item: Item) -> list[tuple[str, bytes]]:
    """A sample's files in a shard."""
    parts = {
        "txt": item.text if item.text is None else item.text.encode(),
        "png": item.data,
        "mask.png": item.mask,
    }
    parts |= {f"reference.{n}.png": data for n, data in enumerate(item.references)}
    return [(f"{item.key}.{ending}", data) for ending, data in parts.items() if data is not None]


def make_shards(
    path: Path,
    samples: int | Iterable[Item],
    per_shard: int = 4,
    *,
    size: Size | Sequence[Size] = (48, 40),
    references: int = 0,
) -> Data:
    made = given(samples, size, references)
    path.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, len(made), per_shard)):
        write_tar(
            path / f"{shard:04}.tar",
            [file for item in made[start : start + per_shard] for file in members(item)],
        )
    return Data(source=str(path / f"{{0000..{(len(made) - 1) // per_shard:04}}}.tar"))


def make_hub(
    path: Path,
    samples: int | Iterable[Item],
    *,
    size: Size | Sequence[Size] = (48, 40),
    references: int = 0,
) -> Data:
    """A parquet file that the datasets library opens as it would one of the Hub.

    Set HF_DATASETS_CACHE aside in tests.
    """
    import datasets

    made = given(samples, size, references)
    columns: dict[str, list] = {
        "image": [as_stored(item.data) for item in made],
        "text": [item.text for item in made],
    }
    features: dict[str, object] = {"image": datasets.Image(), "text": datasets.Value("string")}
    if any(item.references for item in made):
        columns["reference"] = [[as_stored(data) for data in item.references] for item in made]
        features["reference"] = datasets.List(datasets.Image())
    if any(item.mask is not None for item in made):
        columns["mask"] = [as_stored(item.mask) for item in made]
        features["mask"] = datasets.Image()
    path.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(
        path / "train.parquet"
    )
    return Data(source=f"hub:{path}")


def as_stored(data: bytes | None) -> dict[str, bytes | None] | None:
    return None if data is None else {"bytes": data, "path": None}


MAKERS: dict[str, Callable[..., Data]] = {
    "folder": make_folder,
    "list": make_list,
    "shards": make_shards,
    "hub": make_hub,
}


def huge() -> bytes:
    """A picture of few bytes that has more pixels than are read."""
    data = bytearray(png(Image.new("1", (8, 8))))
    data[16:24] = (10_001).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


# What can be wrong with a sample -> (how it gets so, of what kind it is reported)
DAMAGE: dict[str, tuple[Callable[[Item], Item], str]] = {
    "truncated": (
        lambda item: replace(item, data=(item.data or b"")[: len(item.data or b"") * 2 // 3]),
        "damaged",
    ),
    "empty": (lambda item: replace(item, data=b""), "empty"),
    "not an image": (lambda item: replace(item, data=b"<html>404 Not Found</html>"), "no picture"),
    "too large": (lambda item: replace(item, data=huge()), "too large"),
    "absent": (lambda item: replace(item, data=None), "absent"),
    "no caption": (lambda item: replace(item, text=None), "no caption"),
    "blank caption": (lambda item: replace(item, text=" \n"), "no caption"),
}


def damaged(samples: list[Item], places: dict[int, str]) -> list[Item]:
    """The samples with those at `places` spoilt in the way that is named."""
    return [DAMAGE[places[n]][0](item) if n in places else item for n, item in enumerate(samples)]
