"""The sets that can be evaluated on, as they lie on a disk."""

import json
from pathlib import Path

import pytest
from PIL import Image

from imprompt.errors import ImageError, SettingError
from imprompt.evaluation.sets import open_set, set_facts


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), colour).save(path)
    return path


def listing(folder: Path, *entries: dict[str, object]) -> Path:
    for entry in entries:
        picture(folder / str(entry["file_name"]), ("red", "blue")[len(str(entry)) % 2])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder


def test_a_folder_as_for_training(tmp_path: Path) -> None:
    picture(tmp_path / "other.png")
    listing(
        tmp_path,
        {"file_name": "a/1.png", "text": " a cat "},
        {"file_name": "a-1.jpg"},
        {"file_name": "2.png", "text": "a dog", "references": ["other.png", "a/1.png"]},
    )
    found = open_set(tmp_path)
    assert [(item.name, item.caption) for item in found.items] == [
        ("a-1", "a cat"),
        ("a-1-2", ""),
        ("2", "a dog"),
    ]
    assert found.items[0].references == found.items[0].targets == (tmp_path / "a" / "1.png",)
    assert found.items[2].references == (tmp_path / "other.png", tmp_path / "a" / "1.png")
    assert found.items[2].targets == (tmp_path / "2.png",)
    assert found.kind == "folder"
    assert [item.name for item in open_set(tmp_path, limit=1).items] == ["a-1"]


def coco(root: Path) -> Path:
    for number in (9, 139, 25):
        picture(root / "val2017" / f"{number:012}.jpg")
    images = [{"id": number, "file_name": f"{number:012}.jpg"} for number in (139, 9, 25)]
    said = [(7, 139, "second"), (3, 139, "first of\n139"), (5, 9, "of 9 "), (6, 9, "later")]
    annotations = [
        {"id": number, "image_id": image, "caption": caption} for number, image, caption in said
    ]
    (root / "annotations").mkdir()
    (root / "annotations" / "captions_val2017.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    return root


def test_coco_by_image_id_with_the_first_caption(tmp_path: Path) -> None:
    found = open_set(coco(tmp_path), "coco")
    assert [(item.name, item.caption) for item in found.items] == [
        ("000000000009", "of 9"),
        ("000000000139", "first of 139"),
    ]
    assert (
        found.items[1].references
        == found.items[1].targets
        == (tmp_path / "val2017" / "000000000139.jpg",)
    )
    assert open_set(tmp_path).kind == "coco"


def test_coco_that_is_none(tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "annotations" / "captions_val2017.json").write_text('{"images": []}')
    with pytest.raises(SettingError, match="does not hold COCO captions: it needs lists images"):
        open_set(tmp_path)
    told = {
        "images": [{"id": 1, "file_name": 5}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "a"}],
    }
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps(told))
    with pytest.raises(SettingError, match="does not hold COCO captions: it needs lists images"):
        open_set(tmp_path)


def test_subjects_as_customconcept101_lists_them(tmp_path: Path) -> None:
    for name in ("toy_bear", "pet_cat"):
        for number in range(2):
            picture(
                tmp_path / "benchmark_dataset" / name / f"{number}.jpg",
                "gray" if name == "pet_cat" else "brown",
            )
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "toy.txt").write_text("photo of a {}.\n\n{} floating in a pool. \n")
    (tmp_path / "prompts" / "cat.txt").write_text("a house in the style of {}.")
    listed = [("toy_bear", "bear", "toy"), ("pet_cat", "cat", "cat")]
    (tmp_path / "dataset.json").write_text(
        json.dumps(
            [
                {
                    "class_prompt": kind,
                    "instance_data_dir": f"./benchmark_dataset/{folder}",
                    "prompt_filename": f"prompts/{file}.txt",
                }
                for folder, kind, file in listed
            ]
        )
    )
    found = open_set(tmp_path)
    assert found.kind == "subjects"
    assert [(item.name, item.group, item.caption) for item in found.items] == [
        ("toy_bear-00", "toy_bear", "photo of a bear."),
        ("toy_bear-01", "toy_bear", "bear floating in a pool."),
        ("pet_cat-00", "pet_cat", "a house in the style of cat."),
    ]
    assert [path.name for path in found.items[0].targets] == ["0.jpg", "1.jpg"]
    assert found.items[0].references == found.items[0].targets
    (tmp_path / "dataset.json").write_text('[{"class_prompt": "bear"}]')
    with pytest.raises(SettingError, match=r"dataset.json, entry 1: entries look like"):
        open_set(tmp_path)


def test_subjects_of_one_name_stay_apart(tmp_path: Path) -> None:
    entries = [
        {"class_prompt": "dog", "instance_data_dir": f"{side}/dog", "prompt_filename": "p.txt"}
        for side in "ab"
    ]
    for entry in entries:
        picture(tmp_path / str(entry["instance_data_dir"]) / "0.png")
    (tmp_path / "p.txt").write_text("a {}")
    (tmp_path / "dataset.json").write_text(json.dumps(entries))
    assert [(item.name, item.group) for item in open_set(tmp_path).items] == [
        ("a-dog-00", "a/dog"),
        ("b-dog-00", "b/dog"),
    ]
    (tmp_path / "dataset.json").write_text(json.dumps([entries[0] | {"class_prompt": 5}]))
    with pytest.raises(SettingError, match="entry 1: entries look like"):
        open_set(tmp_path)


def test_names_stay_apart_and_short(tmp_path: Path) -> None:
    long = "/".join(["d" * 120] * 3) + "/f.png"
    names = ["a.png", "a.png", "a-2.png", "A.png", long]
    elsewhere = picture(tmp_path / "else" / "x.png")
    listing(
        tmp_path / "set", *({"file_name": name} for name in names), {"file_name": str(elsewhere)}
    )
    found = [item.name for item in open_set(tmp_path / "set").items]
    assert found[:4] == ["a", "a-2", "a-2-2", "A-3"]
    assert len({name.casefold() for name in found}) == len(found) == 6
    assert len(found[4].encode()) <= 150
    assert found[5].endswith("else-x")


def test_half_an_emoji_is_no_caption(tmp_path: Path) -> None:
    listing(
        tmp_path,
        {"file_name": "0.png", "text": "a cat"},
        {"file_name": "1.png", "text": "a \ud83d"},
    )
    with pytest.raises(ImageError, match=r"^1: its caption is not Unicode text; --skip-bad"):
        open_set(tmp_path)
    assert [item.name for item in open_set(tmp_path, skip_bad=True).items] == ["0"]


def test_subjects_in_folders_with_their_own_prompts_or_one_list(tmp_path: Path) -> None:
    for name in ("red_cartoon2", "dog"):
        picture(tmp_path / name / "0.png")
    (tmp_path / "prompts.txt").write_text("a {} on a beach")
    (tmp_path / "dog" / "prompts.txt").write_text("a {} in a hat\na {} asleep")
    told = [(item.name, item.caption) for item in open_set(tmp_path, "subjects").items]
    assert told == [
        ("dog-00", "a dog in a hat"),
        ("dog-01", "a dog asleep"),
        ("red_cartoon2-00", "a red cartoon on a beach"),
    ]
    (tmp_path / "prompts.txt").unlink()
    with pytest.raises(
        SettingError,
        match=r"prompts.txt: there is no such file; it should hold the subject's prompts",
    ):
        open_set(tmp_path)


def test_what_cannot_be_read_is_named_or_skipped(tmp_path: Path) -> None:
    listing(tmp_path, *({"file_name": f"{number}.png", "text": "a"} for number in range(4)))
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "3.png").unlink()
    with pytest.raises(
        ImageError, match=r"1.png is empty \(and 1 more of 4 items\); --skip-bad evaluates without"
    ):
        open_set(tmp_path)
    found = open_set(tmp_path, skip_bad=True)
    assert [item.name for item in found.items] == ["0", "2"]
    assert [line.split("/")[-1] for line in found.skipped] == [
        "1.png is empty",
        "3.png does not exist",
    ]
    facts = set_facts(found, None)
    assert facts["items"] == 2
    assert facts["skipped"] == list(found.skipped)
    assert "skipped" not in set_facts(open_set(tmp_path, limit=1), 1)
    assert len(open_set(tmp_path, limit=1).items) == 1
    (tmp_path / "0.png").unlink()
    with pytest.raises(ImageError, match=r"0.png does not exist"):
        open_set(tmp_path, limit=2, skip_bad=True)


def test_the_hash_is_of_what_there_is(tmp_path: Path) -> None:
    one, other = (
        listing(tmp_path / name, {"file_name": "0.png", "text": "a cat"})
        for name in ("one", "other")
    )
    assert open_set(one).sha256 == open_set(other).sha256
    picture(other / "0.png", "green")
    assert open_set(one).sha256 != open_set(other).sha256
    changed = listing(tmp_path / "changed", {"file_name": "0.png", "text": "a dog"})
    assert open_set(one).sha256 != open_set(changed).sha256


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("auto", "is not a set: it should hold metadata.jsonl, or annotations/"),
        ("coco", "it should hold annotations/captions_val2017"),
        ("cooc", "unknown kind of set 'cooc'; near: coco"),
    ],
)
def test_a_folder_that_is_no_set(tmp_path: Path, kind: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        open_set(tmp_path, kind)
    with pytest.raises(SettingError, match="there is no such folder"):
        open_set(tmp_path / "none")


def test_an_empty_list_is_reported(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(SettingError, match="lists no pictures"):
        open_set(tmp_path)


def test_a_row_that_names_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "/", "text": "a"}')
    with pytest.raises(SettingError, match="line 1: no text under file_name"):
        open_set(tmp_path)


def test_what_macos_adds_to_a_folder_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "a.png")
    (tmp_path / "cat" / "._a.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "prompts.txt").write_text("a {}")
    (item,) = open_set(tmp_path).items
    assert [path.name for path in item.targets] == ["a.png"]
