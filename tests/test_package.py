"""The shape of the package: what is public, what an import costs, what ships."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import imprompt
from imprompt.models import MODELS, PACKAGED

HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL")


def modules_after(code: str) -> set[str]:
    script = (
        f"import sys\n{code}\nimport json; "
        f"print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    return set(json.loads(out.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import imprompt", HEAVY),
        ("import imprompt.cli", HEAVY),
        (
            "import imprompt.adapter, imprompt.variants, imprompt.attention, imprompt.models",
            ("diffusers", "transformers"),
        ),
        ("import imprompt.checkpoints.adapters", ("diffusers", "transformers")),
    ],
)
def test_imports_are_light(code: str, absent: tuple[str, ...]) -> None:
    assert modules_after(code).isdisjoint(absent)


def test_public_names_are_there() -> None:
    assert sorted(imprompt.__all__) == imprompt.__all__
    assert all(
        getattr(imprompt, name).__module__.startswith("imprompt.") for name in imprompt.__all__
    )


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        imprompt.nothing  # noqa: B018


def test_the_adapter_is_one_short_file() -> None:
    source = (Path(imprompt.__file__).parent / "adapter.py").read_text()
    assert len(source.splitlines()) < 300


def test_what_ships_is_small_and_plain() -> None:
    files = [path for path in PACKAGED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 55e6  # the wheel has room for 60 MB
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".png", ".txt"}
    assert not any("_name_or_path" in path.read_text() for path in files if path.suffix == ".json")


def test_packaged_models_are_whole() -> None:
    for known in MODELS["emoji"].adapters.values():
        assert known.file.fetch_file().exists()
        folder, subfolder = known.encoder.fetch_folder()
        assert subfolder is None
        assert (Path(folder) / "config.json").exists()
