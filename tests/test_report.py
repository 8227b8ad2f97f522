"""The pages of an evaluation: whole, escaped, honest about what is missing, and seen by a browser
as they are meant.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imprompt.cli.evaluate import compare
from imprompt.errors import SettingError
from imprompt.evaluation import contact
from imprompt.evaluation.comparison import differs, write_comparison
from imprompt.evaluation.contact import Thumbnails, contact_sheet, evenly_spread, ranked
from imprompt.evaluation.page import lines_of
from imprompt.evaluation.plots import curve, dots
from imprompt.evaluation.report import best, report_table, write_report
from imprompt.evaluation.results import axes_of, label_of, numeric_axes, read_results, word

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
seen = pytest.mark.skipif(
    BROWSER is None, reason="no chromium is installed: apt-get install chromium"
)
SCALES = [{"scale": 0.0}, {"scale": 0.5}, {"scale": 1.0}]
NASTY = (
    "<script>document.title = 'run'</script> \"quoted\" & 'single' 🐙 $x$ \u2028 | "
    + "very long " * 60
)


def band(value: float, reach: float | None = 0.01) -> dict[str, float | None]:
    return {
        "value": value,
        "low": None if reach is None else value - reach,
        "high": None if reach is None else value + reach,
    }


def run_folder(
    folder: Path,
    axes: Sequence[dict[str, Any]] = SCALES,
    items: Sequence[str] = ("cat", "dog", "fox", "owl"),
    seeds: int = 2,
    caption: str = "a caption",
    more: float = 0.0,
    metrics: Sequence[str] = ("clip_i", "clip_t"),
    **run: Any,
) -> Path:
    """A finished run of made-up numbers: CLIP-I is 0.5 + scale / 4 + item / 100 + seed / 1000,
    CLIP-T falls by as much.
    """
    rows, settings = [], []
    for place in range(len(items)):
        picture = Image.new("RGB", (48, 32), (40 * place % 256, 90, 160))
        (folder / "references").mkdir(parents=True, exist_ok=True)
        picture.save(folder / "references" / f"{place}.png")
    for number, one in enumerate(axes):
        name = ",".join(f"{key}={value}" for key, value in one.items()) or "only"
        (folder / "images" / str(number)).mkdir(parents=True, exist_ok=True)
        gain = one["scale"] / 4 if isinstance(one.get("scale"), float) else 0.0
        for place, item in enumerate(items):
            for seed in range(seeds):
                path = f"images/{number}/{place}-{seed}.png"
                Image.new(
                    "RGB", (32, 32), (250 - 60 * number % 250, 40 * place % 256, 30 + seed)
                ).save(folder / path)
                told = {
                    "setting": name,
                    "item": item,
                    "group": "",
                    "number": seed,
                    "seed": seed,
                    "caption": caption,
                    "image": path,
                }
                measured = {
                    "clip_i": 0.5 + gain + place / 100 + seed / 1000 + more * (1 + place),
                    "clip_t": 0.3 - gain / 2,
                }
                reference = str((folder / "references" / f"{place}.png").absolute())
                rows.append(
                    {**told, "reference": reference, **{key: measured[key] for key in metrics}}
                )
        values = {
            "clip_i": band(0.5 + gain),
            "clip_t": band(0.3 - gain / 2),
            "fid": band(20.0 - gain, None),
        }
        chosen = {key: values[key] for key in (*metrics, "fid")}
        settings.append(
            {
                "name": name,
                "axes": one,
                "count": len(items) * seeds,
                "items": len(items),
                "metrics": chosen,
            }
        )
    judges = [
        {
            "key": "clip",
            "name": "clip",
            "source": "some/clip",
            "sha256": "12" * 32,
            "preprocessing": "224",
        }
    ]
    told = {
        "imprompt": "0.1.0",
        "set": {"kind": "folder", "path": "/a/scenes", "sha256": "ab" * 32},
        "judges": judges,
        **run,
    }
    (folder / "run.json").write_text(json.dumps(told))
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    (folder / "summary.json").write_text(json.dumps({"run": told, "settings": settings}))
    return folder


class Page(HTMLParser):
    """What a page holds: its tags with their attributes, and its text.

    Fails on tags that do not close in order.
    """

    VOID = ("meta", "img", "br", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page(path: Path) -> Page:
    return Page(path.read_text("utf-8"))


def test_a_report_is_whole(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    found = page(write_report(folder))
    assert found.count("svg") == 4  # CLIP-I, CLIP-T, one against the other, FID
    # the sheet with two seeds; two items at each end of each setting
    assert found.count("img") == 4 * (1 + 3 * 2) + 3 * 4 * (1 + 2)
    for text in (
        "CLIP-T against CLIP-I",
        "scale 0.5",
        "0.6250",
        "0.6150 – 0.6350",
        "1212121212121212…",
        "0.1.0",
        "some/clip",
    ):
        assert text in found.text
    named = [
        value
        for _, attributes in found.tags
        for key, value in attributes.items()
        if key in ("src", "href", "xlink:href")
    ]
    # nothing is fetched
    assert all(value and value.startswith(("data:image/webp;base64,", "#")) for value in named)


def test_a_report_is_the_same_twice(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


def test_what_users_say_is_escaped(tmp_path: Path) -> None:
    axes = [{"adapter": NASTY}, {"adapter": "<b>plain</b> $\\frac$ --> 🐙"}]
    folder = run_folder(
        tmp_path / "<i>run</i>",
        axes,
        items=("<u>one</u>", "two"),
        caption=NASTY,
        model={"name": "<s>x</s>"},
    )
    other = run_folder(tmp_path / "other", axes, items=("<u>one</u>", "two"), more=0.01)
    for path in (write_report(folder), write_comparison(folder, other, tmp_path / "page.html")):
        found = page(path)
        assert {"script", "b", "i", "u", "s"} & {
            tag for tag, attributes in found.tags if not attributes
        } <= {"b", "i"}  # ours
        assert found.count("script") == 0
        assert NASTY.strip() in found.text
        assert "<b>plain</b>" in found.text
        assert "<u>one</u>" in found.text


def test_missing_pictures_are_named(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "images/1/0-0.png").unlink()
    (folder / "references/2.png").write_bytes(b"no picture")
    found = page(write_report(folder))
    assert "images/1/0-0.png does not exist" in found.text
    assert "references/2.png is not a picture" in found.text
    assert found.text.count("missing") >= 2
    assert "2 of the pictures to show could not be read" in found.text


@pytest.mark.parametrize(
    ("axes", "more", "plots"),
    [
        ([{}], {}, 0),  # one setting: nothing to draw along
        ([{}], {"items": ("one",), "seeds": 1}, 0),
        (SCALES, {"metrics": ("clip_i",), "caption": ""}, 2),  # no captions: no CLIP-T
        ([{"adapter": "base"}, {"adapter": "plus"}], {}, 3),
        ([{"scale": s, "guidance": g} for s in (0.0, 1.0) for g in (3, 7.5)], {}, 4 + 3),
        ([{"scale": s, "adapter": a} for s in (0.0, 1.0) for a in ("base", "plus")], {}, 4),
        (
            [
                {"scale": s, "steps": n, "adapter": a}
                for s in (0.0, 1.0)
                for n in (5, 9)
                for a in "ab"
            ],
            {},
            2 * 4 + 2 * 3,
        ),
        # a swept axis of one value is none
        ([{"scale": 0.5, "blocks": b} for b in ("all", "style")], {}, 3),
    ],
)
def test_all_shapes_of_sweeps(
    tmp_path: Path, axes: list[dict[str, Any]], more: dict[str, Any], plots: int
) -> None:
    folder = run_folder(tmp_path / "run", axes, **more)
    found = page(write_report(folder))
    assert found.count("svg") == plots
    assert ("CLIP-T" in found.text) == (more.get("metrics") != ("clip_i",))


def test_what_is_no_number_is_a_dash(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["settings"][1]["metrics"]["clip_i"] = band(float("nan"))
    summary["settings"][2]["metrics"]["fid"]["value"] = None
    (folder / "summary.json").write_text(json.dumps(summary))
    text = (folder / "rows.jsonl").read_text().replace('"clip_i": 0.5,', '"clip_i": NaN,')
    (folder / "rows.jsonl").write_text(text)
    found = page(write_report(folder))
    assert "nan" not in found.text.lower()
    lines = report_table(summary).splitlines()
    assert lines[3].split("|")[3].strip() == "–"  # CLIP-I of scale 0.5
    assert lines[2].split("|")[3].strip() == "0.5000 (0.4900 to 0.5100)"
    assert len({len(line) for line in lines}) == 1


def test_a_lone_value_is_a_point_and_none_is_no_plot() -> None:
    settings = [
        {"name": str(x), "axes": {"scale": x}, "metrics": {"clip_i": band(0.5)} if x else {}}
        for x in (0.0, 1.0)
    ]
    assert "CLIP-I over scale" in curve(settings, "clip_i", "scale")
    assert "scale 1" not in dots(settings, "clip_i")
    assert best(settings) == {}


def test_a_distance_between_few_pictures_is_never_the_best() -> None:
    def setting(count: int, value: float) -> dict[str, Any]:
        metrics = {key: band(value) for key in ("clip_i", "fid", "kid")}
        return {"name": "", "axes": {}, "count": count, "metrics": metrics}

    few = [setting(24, -3.0), setting(5000, 2.0)]
    assert best(few) == {"clip_i": 2.0}
    some = [setting(1000, -3.0), setting(5000, 2.0)]
    assert best(some) == {"clip_i": 2.0, "kid": -3.0}
    many = [setting(2048, -3.0), setting(5000, 2.0)]
    assert best(many) == {"clip_i": 2.0, "kid": -3.0, "fid": -3.0}


def test_plots_take_the_colours_of_the_page() -> None:
    settings = [
        {"name": str(x), "axes": {"scale": x}, "metrics": {"clip_i": band(x)}}
        for x in (0.0, 0.5, 1.0)
    ]
    svg = curve(settings, "clip_i", "scale")
    # every colour is a variable
    assert not re.findall(r"#[0-9a-f]{6}\b(?![^<]*url)", svg.replace("url(#", ""))
    assert {"var(--ink)", "var(--line)", "var(--plot-0)", "var(--font)"} <= set(
        re.findall(r"var\([\w-]+\)", svg)
    )
    assert "DejaVu" not in svg
    # a tick at each scale that was run
    assert re.findall(r">(0|0\.5|1)</text>", svg)[:3] == ["0", "0.5", "1"]


def test_without_matplotlib_it_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SettingError, match=r"pip install 'imprompt\[evaluate\]'"):
        write_report(run_folder(tmp_path / "run"))


def test_axes() -> None:
    settings = [
        {"name": "", "axes": {"steps": n, "scale": s, "adapter": "base"}}
        for n in (10, 50)
        for s in (0.0, 1.0)
    ]
    assert axes_of(settings) == ["steps", "scale"]
    assert numeric_axes(settings) == ["scale", "steps"]
    assert label_of(settings[0]) == "steps 10 · scale 0 · adapter base"
    assert word("/a/very/long/path/to/weights.safetensors", 12) == "…safetensors"
    assert word({"down.*": 0.5}) == '{"down.*": 0.5}'


def test_choices_follow_their_rules(tmp_path: Path) -> None:
    assert evenly_spread("abcdefgh", 3) == ["a", "c", "f"]
    assert evenly_spread("ab", 5) == ["a", "b"]
    assert contact.sheet_items(1) == contact.ITEMS
    assert contact.sheet_items(48) == contact.sheet_items(1000) == 12
    results = read_results(run_folder(tmp_path / "run", [{}], items=[f"{n:02}" for n in range(30)]))
    sheet = contact_sheet(results, Thumbnails())
    assert [card.name for card in sheet[:4]] == ["00", "01", "02", "03"]
    assert len(sheet) == contact.ITEMS
    assert len(sheet[0].pictures) == 1 + 2
    assert [item for _, item in ranked(results.rows["only"])[:2]] == ["29", "28"]


def test_facts_are_lines() -> None:
    assert lines_of([{"key": "clip", "sha256": "ab", "none": None}, "x"]) == [
        {"key": "clip", "sha256": "ab"},
        {"": "x"},
    ]


def test_a_folder_that_holds_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"is not a finished run: it has no summary\.json"):
        write_report(tmp_path)
    folder = run_folder(tmp_path / "run")
    (folder / "rows.jsonl").write_text('{"setting": ')
    with pytest.raises(SettingError, match=r"rows\.jsonl cannot be read"):
        write_report(folder)
    (folder / "rows.jsonl").write_text("{}\n")
    with pytest.raises(SettingError, match="lacks 'setting'"):
        write_report(folder)
    (folder / "rows.jsonl").write_text("")
    with pytest.raises(SettingError, match="no pictures of scale=0"):
        write_report(folder)
    for text, said in (
        ("[]", r"its summary.json holds \[\]: input should be a valid dictionary"),
        ("{}", "its summary.json lacks 'run'"),
        ('{"run": {}, "settings": [{"name": "a"}]}', "lacks 'axes'"),
        ('{"run": {}, "settings": [], "notes": 3}', "holds notes"),
        (
            '{"run": {}, "settings": [{"name": "a", "axes": {}, "count": 1, "items": 1, '
            '"metrics": {"clip_i": 3}}]}',
            "holds settings.0.metrics.clip_i = 3",
        ),
        ("[" * 100_000, r"summary\.json cannot be read .*nested too deep"),
    ):
        (folder / "summary.json").write_text(text)
        with pytest.raises(SettingError, match=said):
            write_report(folder)


def test_a_comparison_pairs_items(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "a", adapter={"name": "base", "sha256": "1" * 64})
    second = run_folder(tmp_path / "b", more=0.01, adapter={"name": "plus", "sha256": "2" * 64})
    found = page(write_comparison(first, second, tmp_path / "out" / "page.html"))
    # B is above A by 0.01, 0.02, 0.03, 0.04 on the four items.
    assert "+0.0250" in found.text
    assert found.text.count("B is better") == 3
    assert "no clear difference" in found.text  # CLIP-T is equal
    assert found.text.index("CLIP-I +0.0400") < found.text.index("CLIP-I +0.0300")
    assert "A above B" not in found.text
    assert found.count("svg") == 4
    told = differs(read_results(first).run, read_results(second).run)
    assert told == [("adapter.name", "base", "plus"), ("adapter.sha256", "1" * 64, "2" * 64)]


def test_a_comparison_of_what_is_not_the_same(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "x" / "run", [{"scale": 0.5}], items=("cat", "dog"))
    other = [{"key": "clip", "sha256": "34" * 32}]
    second = run_folder(
        tmp_path / "y" / "run",
        [{"scale": 1.0}],
        items=("dog", "fox"),
        judges=other,
        set={"sha256": "cd"},
    )
    found = page(write_comparison(first, second, tmp_path / "page.html"))
    assert "The judges are not the same (clip)" in found.text
    assert "The sets are not the same" in found.text
    assert "Only the 1 items" in found.text
    assert "scale 0.5 and scale 1" in found.text
    assert "FID ↓" not in found.text  # of the whole sets, which differ
    assert found.text.count("+0.1150") >= 1  # dog alone: 0.5 + 0.25 - (0.5 + 0.125 + 0.01)


def test_a_page_replaces_pages_alone(tmp_path: Path) -> None:
    first, second = run_folder(tmp_path / "a"), run_folder(tmp_path / "b", more=0.1)
    out = tmp_path / "page.html"
    compare(first, second, out)
    compare(first, second, out)
    out.write_text("a page of the user's own")
    with pytest.raises(SettingError, match=r"page.html exists: give another name, or --force"):
        compare(first, second, out)
    assert out.read_text() == "a page of the user's own"
    compare(first, second, out, force=True)
    assert page(out).count("h1") == 1


def test_comparisons_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(
        SettingError,
        match=r"--out .*rows.jsonl: a page is written, so give a name that ends in .html",
    ):
        write_comparison(tmp_path, tmp_path, tmp_path / "rows.jsonl")
    first = run_folder(tmp_path / "a")
    with pytest.raises(SettingError, match="share no item"):
        write_comparison(
            first, run_folder(tmp_path / "b", items=("x", "y")), tmp_path / "page.html"
        )
    with pytest.raises(SettingError, match="share no setting"):
        write_comparison(
            first, run_folder(tmp_path / "c", [{"scale": 2.0}]), tmp_path / "page.html"
        )
    without = run_folder(tmp_path / "d", metrics=("clip_t",))
    summary = json.loads((without / "summary.json").read_text())
    for setting in summary["settings"]:
        setting["metrics"].pop("fid")
    (without / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(SettingError, match="share no metric"):
        write_comparison(
            without, run_folder(tmp_path / "e", metrics=("clip_i",)), tmp_path / "page.html"
        )
    assert not (tmp_path / "page.html").exists()


def browse(path: Path, *options: str, folder: Path) -> str:
    """What a headless Chromium prints."""
    assert BROWSER
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    done = subprocess.run(
        [*command, *options, path.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def shot(path: Path, *options: str, folder: Path) -> Image.Image:
    browse(path, f"--screenshot={folder / 'shot.png'}", *options, folder=folder)
    with Image.open(folder / "shot.png") as picture:
        return picture.convert("RGB")


def shades(picture: Image.Image) -> set[tuple[int, ...]]:
    return {
        color
        for _, color in picture.getcolors(picture.width * picture.height) or []
        if isinstance(color, tuple)
    }


LIGHT = [(11, 98, 168), (255, 255, 255)]  # the first line of a plot, the paper
DARK = [(108, 182, 255), (20, 23, 27)]


@seen
@pytest.mark.parametrize(
    ("compared", "options", "size", "colors"),
    [
        (False, (), (1280, 2400), LIGHT),
        (False, (), (500, 1800), LIGHT),  # the least that Chromium takes for a window
        (True, ("--blink-settings=preferredColorScheme=0",), (1280, 2400), DARK),
    ],
)
def test_a_browser_shows_the_pages(
    tmp_path: Path,
    compared: bool,
    options: tuple[str, ...],
    size: tuple[int, int],
    colors: list[tuple[int, ...]],
) -> None:
    folder = run_folder(tmp_path / "run", caption=NASTY)
    other = run_folder(tmp_path / "other", more=0.01)
    path = (
        write_comparison(folder, other, tmp_path / "page.html")
        if compared
        else write_report(folder)
    )
    picture = shot(path, *options, f"--window-size={size[0]},{size[1]}", folder=tmp_path)
    assert picture.size == size
    assert set(colors) <= shades(picture)  # a line of a plot, and the paper
    assert len(shades(picture)) > 200
    margin = picture.crop((size[0] - 8, 0, *size))
    assert shades(margin) == {colors[1]}  # nothing runs out of the page, at any width


@seen
def test_a_browser_reads_the_pages(tmp_path: Path) -> None:
    folder, other = (
        run_folder(tmp_path / "run", caption=NASTY),
        run_folder(tmp_path / "other", more=0.01),
    )
    for path in (write_report(folder), write_comparison(folder, other, tmp_path / "page.html")):
        html = browse(path, "--dump-dom", folder=tmp_path)
        assert html.count("<svg ") == 4
        assert "<title>run</title>" not in html  # the caption's script did not run
        assert "&lt;script&gt;" in html
        assert re.search(
            r'<path d="M [^"]+" clip-path="url\(#\w+\)" style="[^"]*stroke: var\(--plot-0\)', html
        )
