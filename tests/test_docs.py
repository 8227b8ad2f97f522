"""The README and the guides say what is so: their commands exist, their code runs, their links lead somewhere."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer
from PIL import Image

from imprompt.cli import app
from imprompt.cli import commands as register_commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "worlds" / "emoji" / "README.md"]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("line", [line.strip() for line in PAGES[0].read_text().splitlines() if line.startswith("    imprompt ")])
def test_commands_of_the_readme_exist(line: str) -> None:
    register_commands()
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    _, name, *rest = shlex.split(line, comments=True)
    known = {option for parameter in group.commands[name].params for option in parameter.opts}
    assert {word for word in rest if word.startswith("-")} <= known


@pytest.mark.parametrize(("page", "number"), [("README.md", 0), ("docs/diffusers.md", 0)])
def test_code_of_the_docs_runs(page: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "orange").save("cat.png")
    exec(compile(blocks(ROOT / page)[number], page, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
