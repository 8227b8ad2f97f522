"""The wheel as a user gets it: in an environment with its runtime dependencies alone, in an empty
folder.
"""

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = (
    ["--version"],
    ["env"],
    ["generate", "cat.png", "--steps", "2", "--seed", "3"],
    ["generate", "--like", "out/cat-3.png", "--out", "again"],
    ["embed", "cat.png", "--out", "cat.safetensors"],
    ["blocks"],
    ["inspect", "out/cat-3.png"],
    ["data", "check", "src", "--help"],
    ["train", "recipes/sd15-base.toml", "--set", "data.source=.", "--help"],
    ["evaluate", "run", "--help"],
)


def run(command: Sequence[str | Path], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "uv", "build", "--quiet", "--wheel", "-o", folder, ROOT], folder)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_what_commands_need_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert wheel.stat().st_size <= 60e6
    assert {name.split("/")[0] for name in names} == {"imprompt", "imprompt-0.1.0.dist-info"}
    for part in ("py.typed", "recipes/sd15-base.toml", "evaluation/pages/report.html.jinja"):
        assert f"imprompt/{part}" in names


@pytest.mark.slow
def test_commands_run_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    python = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run([sys.executable, "-m", "venv", tmp_path / "venv"], tmp_path)
    install = ["-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel]
    run([python, *install], tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    weights = ROOT / "src" / "imprompt" / "weights" / "emoji"
    (empty / "cat.png").write_bytes((weights / "demo.png").read_bytes())
    for command in COMMANDS:
        run([python, "-m", "imprompt", *command], empty)
    assert len(list((empty / "again").glob("*.png"))) == 1
