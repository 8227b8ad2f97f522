"""Read sets to evaluate on: items with image prompts, pictures to compare with, and captions.

Every kind of set is read from local files; SETS lists all kinds.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import commonpath, normpath
from pathlib import Path
from typing import Any

from imprompt.errors import ImageError, SettingError
from imprompt.evaluation.names import unique_names
from imprompt.files import sha256
from imprompt.images import open_image
from imprompt.training.listings import (
    FOLDER_FORM,
    json_lines,
    json_list,
    read_listing,
)
from imprompt.training.recipe import Columns
from imprompt.training.samples import Names
from imprompt.untrusted import read_json, read_text
from imprompt.validation import suggestions

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif")


@dataclass(frozen=True)
class Item:
    """One thing to make pictures of.

    references  files that prompt it; its picture k is conditioned on the k-th of them, in turn
    targets     files that a result should be like
    group       what it belongs to, such as a subject
    """

    name: str
    references: tuple[Path, ...]
    targets: tuple[Path, ...]
    caption: str = ""
    group: str = ""


@dataclass(frozen=True)
class EvaluationSet:
    """Items of a set in their order.

    sha256   of the names, captions and groups, and of the contents of the files
    skipped  what is wrong with the items that were left out
    """

    kind: str
    path: Path
    items: Sequence[Item]
    sha256: str = ""
    skipped: tuple[str, ...] = ()


# A folder with metadata.jsonl


def folder_items(root: Path) -> Iterator[Item]:
    """Yield the items of a folder with metadata.jsonl, in the format for training.

    Each line is {"file_name": …, "text": …, "reference": …}, for one picture.
    """
    names = Names.of(
        Columns(),
        "file_name",
        "text",
        "reference,references,reference_file_name,reference_file_names",
    )
    for row in read_listing(root / "metadata.jsonl", json_lines, FOLDER_FORM, names, root):
        picture = Path(row.picture)
        references = tuple(map(Path, row.references)) or (picture,)
        yield Item(
            name_in(root, picture.with_suffix("")), references, (picture,), (row.text or "").strip()
        )


# COCO


def captions_file(root: Path) -> Path | None:
    """Return the newest annotations/captions_val*.json whose pictures exist, or None."""
    found = (root / "annotations").glob("captions_val*.json")
    return max((path for path in found if pictures_of(path).is_dir()), default=None)


def pictures_of(captions: Path) -> Path:
    """Return the folder of pictures that belongs to a captions file."""
    return captions.parents[1] / captions.stem.removeprefix("captions_")


def coco_items(root: Path) -> Iterator[Item]:
    """Yield the items of COCO, by image id, each with its first caption by annotation id.

    They are in val2017/ and annotations/captions_val2017.json. Raise SettingError for another
    content.
    """
    path = captions_file(root)
    assert path is not None
    facts = read_json(path, lenient=True)
    try:
        first = {}
        for annotation in sorted(facts["annotations"], key=lambda one: one["id"]):
            first.setdefault(annotation["image_id"], " ".join(annotation["caption"].split()))
        files = sorted(
            (image["id"], pictures_of(path) / image["file_name"])
            for image in facts["images"]
            if image["id"] in first
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise SettingError(
            f"{path} does not hold COCO captions: it needs lists images "
            "(id, file_name) and annotations"
        ) from error
    for number, file in files:
        yield Item(file.stem, (file,), (file,), first[number])


# Subjects, such as CustomConcept101 or DreamBench


def subject_items(root: Path) -> Iterator[Item]:
    """Yield the items of subjects, listed in dataset.json or found as folders."""
    return (listed_subjects if (root / "dataset.json").is_file() else subject_folders)(root)


def listed_subjects(root: Path) -> Iterator[Item]:
    """Yield the items of CustomConcept101's dataset.json; SettingError for another content.

    It is a list of {"class_prompt", "instance_data_dir", "prompt_filename"}.
    """
    subjects = []
    for place, entry in json_list(root / "dataset.json"):
        facts = (
            [entry.get(key) for key in ("instance_data_dir", "prompt_filename", "class_prompt")]
            if isinstance(entry, dict)
            else []
        )
        match facts:
            case [str(folder), str(prompts), str(kind)]:
                subjects.append((Path(normpath(root / folder)), root / prompts, kind))
            case _:
                form = (
                    '{"class_prompt": "toy", "instance_data_dir": "toy_bear", '
                    '"prompt_filename": "prompts/toy.txt"}'
                )
                raise SettingError(f"{root / 'dataset.json'}, {place}: entries look like {form}")
    top = Path(commonpath([folder.parent for folder, *_ in subjects])) if subjects else root
    for found in subjects:
        yield from subject(top, *found)


def subject_folders(root: Path) -> Iterator[Item]:
    """Yield the items of folders of pictures, one folder per subject.

    Each has a prompts.txt, or there is one for all next to them. The folder's name is its class.
    """
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and pictures_in(path)):
        own = folder / "prompts.txt"
        yield from subject(
            root,
            folder,
            own if own.is_file() else root / "prompts.txt",
            re.sub(r"[\W_\d]+", " ", folder.name).strip(),
        )


def subject(top: Path, folder: Path, prompts: Path, kind: str) -> Iterator[Item]:
    """Yield an item per prompt of a subject; {} in the prompt is the class.

    All pictures of the subject are its image prompts, in turn, and its targets. Raise SettingError
    if folder, pictures or prompts are missing.

    top  a folder above; the subject is named by its path from there
    """
    if not folder.is_dir():
        raise SettingError(
            f"{folder}: there is no such folder; it should hold the subject's pictures"
        )
    if not prompts.is_file():
        raise SettingError(
            f"{prompts}: there is no such file; it should hold the subject's prompts, one a line"
        )
    pictures = tuple(pictures_in(folder))
    if not pictures:
        raise SettingError(f"{folder} holds no picture of its subject")
    lines = [line.strip() for line in read_text(prompts).splitlines() if line.strip()]
    for number, line in enumerate(lines):
        group = name_in(top, folder)
        yield Item(f"{group}-{number:02}", pictures, pictures, line.replace("{}", kind), group)


def name_in(root: Path, path: Path) -> str:
    """Return a path relative to the set's folder, if it is inside, without a first slash."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix().lstrip("/")


def pictures_in(folder: Path) -> list[Path]:
    """Return the picture files of a folder, sorted."""
    return sorted(
        path
        for path in folder.iterdir()
        # macOS writes ._a.png next to a.png, which is no picture
        if path.suffix.lower() in PICTURES and not path.name.startswith("._")
    )


def has_subjects(root: Path) -> bool:
    """Return whether a folder looks like a set of subjects."""
    return any(
        next(root.glob(name), None) for name in ("dataset.json", "prompts.txt", "*/prompts.txt")
    )


# All of them


@dataclass(frozen=True)
class Kind:
    """A kind of set: a description of its form, a test for it, and its reader."""

    form: str
    fits: Callable[[Path], bool]
    items: Callable[[Path], Iterator[Item]]


SETS = {
    "folder": Kind(
        "metadata.jsonl", lambda root: (root / "metadata.jsonl").is_file(), folder_items
    ),
    "coco": Kind(
        "annotations/captions_val2017.json and val2017/",
        lambda root: captions_file(root) is not None,
        coco_items,
    ),
    "subjects": Kind(
        "CustomConcept101's dataset.json, or a folder per subject and prompts.txt",
        has_subjects,
        subject_items,
    ),
}


def open_set(
    path: Path, kind: str = "auto", limit: int | None = None, *, skip_bad: bool = False
) -> EvaluationSet:
    """Return the first `limit` items of the set in a folder, after all their files were read.

    Raise SettingError if it is of no known kind or malformed; ImageError, naming the first file, if
    pictures cannot be used. `skip_bad` leaves their items out.
    """
    if not path.is_dir():
        raise SettingError(f"{path}: there is no such folder; a set is a folder with {forms()}")
    if kind not in ("auto", *SETS):
        raise SettingError(f"unknown kind of set {kind!r}{suggestions(kind, ('auto', *SETS))}")
    known = {kind: SETS[kind]} if kind != "auto" else SETS
    found = next((name for name, one in known.items() if one.fits(path)), None)
    if found is None:
        raise SettingError(f"{path} is not a set: it should hold {forms(known)}")
    items = named_apart(SETS[found].items(path.absolute()))[:limit]
    if not items:
        raise SettingError(f"{path} lists nothing to evaluate on")
    return read_through(EvaluationSet(found, path.absolute(), items), skip_bad)


def forms(known: dict[str, Kind] = SETS) -> str:
    """Return the forms of the kinds of sets as text for a message."""
    return ", or ".join(kind.form for kind in known.values())


def named_apart(items: Iterator[Item]) -> list[Item]:
    """Return the items with unique names that can be parts of file names."""
    all_of = list(items)
    return [
        replace(item, name=name)
        for item, name in zip(all_of, unique_names(item.name for item in all_of), strict=True)
    ]


def read_through(whole: EvaluationSet, skip_bad: bool) -> EvaluationSet:
    """Return the set with its hash after every picture was decoded once; ImageError."""
    held: dict[Path, str] = {}  # file -> sha256, or what is wrong with it after a space
    good, bad, digest = [], [], hashlib.sha256()
    for item in whole.items:
        for path in (*item.references, *item.targets):
            if path not in held:
                held[path] = looked_at(path)
        wrong = next(
            (
                held[path].strip()
                for path in (*item.references, *item.targets)
                if held[path].startswith(" ")
            ),
            "",
        )
        if wrong := wrong or (
            "" if is_unicode(item.caption) else f"{item.name}: its caption is not Unicode text"
        ):
            bad.append(wrong)
            continue
        good.append(item)
        files = [[held[path] for path in part] for part in (item.references, item.targets)]
        digest.update(json.dumps([item.name, item.caption, item.group, *files]).encode())
    if bad and (not skip_bad or not good):
        more = f" (and {len(bad) - 1} more of {len(whole.items)} items)" if len(bad) > 1 else ""
        raise ImageError(f"{bad[0]}{more}; --skip-bad evaluates without")
    return replace(whole, items=good, sha256=digest.hexdigest(), skipped=tuple(bad))


def is_unicode(text: str) -> bool:
    r"""Return whether a text can be encoded.

    Half an emoji, such as JSON's \ud83d, cannot: no tokenizer takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def looked_at(path: Path) -> str:
    """Return the SHA-256 of a picture file, or what is wrong with it after a space."""
    try:
        open_image(path)
        return sha256(path)
    except ImageError as error:
        return f" {error}"


def set_facts(whole: EvaluationSet, limit: int | None) -> dict[str, Any]:
    """Return what a run's record states about the set."""
    facts = {
        "kind": whole.kind,
        "path": str(whole.path),
        "sha256": whole.sha256,
        "items": len(whole.items),
        "limit": limit,
    }
    return facts | ({"skipped": list(whole.skipped)} if whole.skipped else {})
