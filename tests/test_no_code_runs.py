"""Nothing from a folder or the Hub runs as code, whatever it says and whatever the user answers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import imprompt
from tests.judges import tiny_dino

# loaders that can be told to run a folder's code
ASKS = re.compile(r"\b(Auto\w+|kind)\.from_pretrained\(([^()]|\([^()]*\))*\)")


def test_every_loader_that_could_run_code_is_reported_not_to() -> None:
    calls = [
        call
        for path in Path(imprompt.__file__).parent.rglob("*.py")
        for call in ASKS.finditer(path.read_text())
    ]
    assert len(calls) >= 3
    assert all("trust_remote_code=False" in call[0] for call in calls)


def test_a_judges_folder_runs_no_code_though_the_user_says_yes(tmp_path: Path) -> None:
    folder = tiny_dino(tmp_path / "dino")
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    )
    script = (
        f"from imprompt.evaluation.metric_encoders import open_dino; open_dino({str(folder)!r}, "
        "'cpu')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input="y\n" * 9, capture_output=True, text=True, check=False
    )
    assert "CheckpointError" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "ran").exists()
