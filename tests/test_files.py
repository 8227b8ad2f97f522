"""Files that are written whole, and never over others."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from imprompt import files
from imprompt.errors import SettingError
from imprompt.files import check_output, refuse_inputs, temporary, written_new
from imprompt.generation.request import save_new


def without_links(_part: object, _path: object) -> None:
    raise PermissionError("this disk knows no links")


@pytest.fixture(params=["links", "no links"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no links":
        monkeypatch.setattr(files.os, "link", without_links)


@pytest.mark.usefixtures("disk")
def test_a_new_file_takes_the_first_free_name(tmp_path: Path) -> None:
    (tmp_path / "cat-7.png").write_text("there before")
    names = []
    for number in range(3):
        with temporary(tmp_path / "cat-7.png") as part:
            part.write_text(str(number))
            names.append(written_new(part, tmp_path / "cat-7.png").name)
    assert names == ["cat-7-2.png", "cat-7-3.png", "cat-7-4.png"]
    assert [(tmp_path / name).read_text() for name in names] == ["0", "1", "2"]
    assert (tmp_path / "cat-7.png").read_text() == "there before"
    assert len([*tmp_path.iterdir()]) == 4


@pytest.mark.usefixtures("disk")
def test_many_that_want_one_name_lose_nothing(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (2, 2), (number, 0, 0)) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        paths = [*pool.map(lambda picture: save_new(picture, tmp_path / "cat-7.png"), pictures)]
    assert len(set(paths)) == 40
    assert [Image.open(path).getpixel((0, 0)) for path in paths] == [
        (number, 0, 0) for number in range(40)
    ]
    assert len([*tmp_path.iterdir()]) == 40


def test_what_is_read_is_not_written_to(tmp_path: Path) -> None:
    cat, link = tmp_path / "cat.png", tmp_path / "link.png"
    cat.write_text("")
    link.symlink_to(cat)
    refuse_inputs(tmp_path / "dog.png", [cat, tmp_path / "none.png"])
    for out in (cat, link, tmp_path / "missing" / ".." / "cat.png"):
        (tmp_path / "missing").mkdir(exist_ok=True)
        with pytest.raises(SettingError, match="is one of the inputs: give another name"):
            refuse_inputs(out, [cat])


def test_what_stands_is_replaced_by_force_alone(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    folder.mkdir()
    inside, other = folder / "model.safetensors", tmp_path / "other.png"
    inside.touch()
    other.touch()
    check_output(tmp_path / "new.png", [folder], force=False)
    check_output(other, [folder], force=True)
    with pytest.raises(SettingError, match=r"exists: give another name, or --force to replace it"):
        check_output(other, [folder], force=False)
    with pytest.raises(SettingError, match="is one of the inputs: give another name"):
        check_output(inside, [folder], force=True)
