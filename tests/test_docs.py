"""The README and the guides say what is so: their commands exist, their code runs, their links lead
somewhere.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from imprompt.cli import app
from imprompt.cli import commands as register_commands
from imprompt.families.table import as_markdown
from imprompt.generation.blocks import presets
from imprompt.training.recipe import RECIPES

ROOT = Path(__file__).parents[1]
ROOMS = ("docs", "src", "worlds", "studies", "benchmarks", "tests")
PAGES = [
    ROOT / "README.md",
    *(
        page
        for room in ROOMS
        for page in sorted((ROOT / room).rglob("*.md"))
        if "node_modules" not in page.parts
    ),
]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


COMMANDS = sorted(
    {
        line.strip()
        for page in PAGES
        for line in page.read_text().splitlines()
        if line.startswith("    imprompt ")
    }
)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_docs_exist(line: str) -> None:
    register_commands()
    command: Any = typer.main.get_command(app)
    _, *rest = shlex.split(line, comments=True)
    while hasattr(command, "commands"):
        command, *rest = command.commands[rest[0]], *rest[1:]
    command = command.make_context(command.name, [], resilient_parsing=True).command
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("-")} <= known


def test_recipes_of_the_docs_are_shipped() -> None:
    named = {
        name for page in PAGES for name in re.findall(r"recipes/[\w-]+\.toml", page.read_text())
    }
    assert named
    assert [name for name in named if not (RECIPES / Path(name).name).exists()] == []


@pytest.mark.parametrize(
    ("page", "count"), [("README.md", 1), ("docs/diffusers.md", 1), ("docs/compose.md", 7)]
)
def test_code_of_the_docs_runs(
    page: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cat.png", "person.png"):
        Image.new("RGB", (64, 64), "orange").save(name)
    names: dict[str, Any] = {}
    for block in blocks(ROOT / page)[:count]:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_presets_of_the_docs_are_those_that_there_are() -> None:
    rows = set(
        re.findall(
            r"^\| `([^`]+)` \| (.+) \|$", (ROOT / "docs" / "compose.md").read_text(), re.MULTILINE
        )
    )
    assert presets().items() <= rows


def test_the_table_of_families_is_the_one_that_the_command_prints() -> None:
    assert as_markdown() in (ROOT / "docs/families.md").read_text()
