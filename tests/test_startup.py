"""What a start costs: what is imported, read and initialised, and what is not.

No seconds, which vary.
"""

import gc
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

from imprompt import __version__
from imprompt.cli.console import loading, quiet
from imprompt.cli.environment import without_user
from imprompt.errors import CheckpointError
from imprompt.models import (
    HUB_PATIENCE,
    MODELS,
    PACKAGED,
    Location,
    collector_waits,
    hub_answers,
    open_pipeline,
)

EMOJI = PACKAGED / "emoji"
ADAPTER = EMOJI / "adapters" / "base.safetensors"
HEAVY = {
    "torch",
    "numpy",
    "PIL",
    "diffusers",
    "transformers",
    "accelerate",
    "huggingface_hub",
    "safetensors",
}
SHELL_ONLY = {"typer", "click", "rich", "pydantic"}
LIBRARIES = {"diffusers", "transformers", "accelerate", "datasets", "webdataset"}
# Installed or not, none of these makes a picture. The first are what training, encoding and tests
# need. diffusers imports scipy for its schedulers where it is installed.
NEVER = {
    "datasets",
    "webdataset",
    "tensorboard",
    "pyarrow",
    "wandb",
    "bitsandbytes",
    "pytest",
    "sklearn",
    "pandas",
}
NEVER |= {
    "matplotlib",
    "cv2",
    "onnxruntime",
    "tensorflow",
    "jax",
    "flax",
    "librosa",
    "gradio",
    "hypothesis",
    "emoji",
}
COMMAND = """
import sys; sys.argv = ["imprompt", {}]
from imprompt.cli import main
try: main()
except SystemExit as end: assert not end.code
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def told_after(code: str, what: str) -> list[str]:
    """What a new process prints of `what`, a list, after `code`."""
    ended = python(f"{code}\nimport json, sys; print(json.dumps(sorted({what})))")
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def loaded(code: str) -> set[str]:
    """The packages that are imported after `code`."""
    return set(told_after(code, "{name.split('.')[0] for name in sys.modules}"))


def command(*arguments: object) -> str:
    return COMMAND.format(", ".join(repr(str(argument)) for argument in arguments))


@pytest.mark.parametrize(
    ("code", "without"),
    [
        ("import imprompt", HEAVY | SHELL_ONLY),
        ("from imprompt import ImpromptError", HEAVY | SHELL_ONLY),
        (command("--help"), HEAVY | {"pydantic"}),
        (command("generate", "--help"), HEAVY),
        (command("evaluate", "run", "--help"), HEAVY),
        (command("models"), HEAVY),
        (command("inspect", ADAPTER), LIBRARIES),
        (
            "from imprompt import ImagePromptPipeline, load_adapter, write_adapter, FeatureMemory",
            LIBRARIES,
        ),
        (
            "from imprompt import ImagePromptPipeline as P; P.from_pretrained('emoji', "
            "device='cpu')",
            NEVER,
        ),
    ],
)
def test_only_what_is_needed_is_imported(code: str, without: set[str]) -> None:
    assert not loaded(code) & without


def test_a_bug_report_has_versions_and_no_name(tmp_path: Path) -> None:
    home = tmp_path / "jane.doe"
    home.mkdir()
    code = f"import os; os.environ['HOME'] = {str(home)!r}; os.chdir({str(home)!r})\n"
    ended = python(code + command("env", "--json"))
    found = json.loads(ended.stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["imprompt"] == __version__
    assert found["devices"]["cpu"]
    assert found["folders"]["working folder"] == "~"
    assert "jane.doe" not in ended.stdout
    assert without_user(Path("/data", Path.home().name, "x")) == "/data/USER/x"


def test_the_version_is_one_word() -> None:
    assert python(command("--version")).stdout == f"imprompt {__version__}\n"


def test_a_shell_completes_commands_and_their_options() -> None:
    for words, found in (("imprompt ev", {"evaluate"}), ("imprompt embed --cr", {"--crop"})):
        ask = {"_IMPROMPT_COMPLETE": "complete_bash", "COMP_WORDS": words}
        ask["COMP_CWORD"] = str(words.count(" "))
        code = f"import os; os.environ |= {ask}\nimport sys; sys.argv = ['imprompt']\n"
        ended = python(code + "from imprompt.cli import main; main()")
        assert set(ended.stdout.split()) == found, ended.stderr
    assert "_IMPROMPT_COMPLETE" in python(command("--show-completion", "bash")).stdout


def test_loading_initialises_nothing_at_random_and_copies_no_weights() -> None:
    """Weights in the precision of their file stay where the system mapped them, for all processes
    at once.
    """
    code = """
import torch
from imprompt import ImagePromptPipeline
state = torch.get_rng_state()
pipe = ImagePromptPipeline.from_pretrained("emoji", device="cpu", dtype=torch.float16)
assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn"
assert pipe.pipeline.image_encoder is None, "the image encoder was read twice"
try: lines = [line.split() for line in open("/proc/self/maps")]
except OSError: lines = []
held = [line for line in lines if line[-1].endswith(".safetensors")]
maps = [(*(int(bound, 16) for bound in line[0].split("-")), line[-1]) for line in held]
base = pipe.pipeline
parts = {"unet": base.unet, "vae": base.vae, "text": base.text_encoder}
parts["image"] = pipe.first.reader.encoder.model
def mapped(weight): return any(low <= weight.data_ptr() < high for low, high, _ in maps)
copied = [name for name, part in parts.items() if lines and not all(map(mapped, part.parameters()))]
"""
    assert told_after(code, "copied") == []


def test_a_pipeline_is_opened_without_its_image_encoder() -> None:
    pipeline = open_pipeline(MODELS["emoji"], "cpu", without=("vae", "text_encoder"))
    assert [pipeline.image_encoder, pipeline.vae, pipeline.text_encoder] == [None] * 3
    assert isinstance(pipeline.unet, torch.nn.Module)


def test_the_collector_waits_while_loading() -> None:
    assert gc.isenabled()
    with pytest.raises(KeyError, match="False"), collector_waits():
        raise KeyError(gc.isenabled())
    assert gc.isenabled()
    with loading():
        open_pipeline(MODELS["emoji"], "cpu", without=("vae", "text_encoder", "unet"))
        assert not gc.isenabled()  # one wait inside another does not end it
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def test_the_libraries_notices_are_kept_back() -> None:
    levels = {name: logging.getLogger(name).level for name in ("torchao", "torch.utils._pytree")}
    try:
        quiet()
        assert not any(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in levels)
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def test_loading_says_nothing_of_other_libraries() -> None:
    code = """
import logging
import re
from imprompt import ImagePromptPipeline
ImagePromptPipeline.from_pretrained("emoji", device="cpu")
assert logging.root.manager.disable == 0
logging.getLogger("torchao").warning("heard again")
"""
    ended = python(code)
    assert ended.returncode == 0
    said = [line for line in ended.stderr.replace("\r", "\n").splitlines() if line.strip()]
    bars = re.compile(r"(Loading [\w ]+\.*:)? +\d+%\|")
    assert [line for line in said if not bars.match(line.replace("\x1b[A", ""))] == ["heard again"]


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A Hub that does not answer; it holds the patience of each that asks it."""
    asked: list[float] = []

    class Session:
        def head(self, _address: str, timeout: float) -> None:
            asked.append(timeout)
            raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    hub_answers.cache_clear()
    yield asked
    hub_answers.cache_clear()


def test_a_hub_that_does_not_answer_is_asked_once(silent_hub: list[float]) -> None:
    words = r"could not be downloaded from the Hub \(the Hub does not answer, and it is not in the"
    for fetch in (
        Location("nobody/nothing", "a").fetch_file,
        Location("nobody/nothing").fetch_folder,
    ):
        with pytest.raises(CheckpointError, match=words):
            fetch()
    assert silent_hub == [HUB_PATIENCE]


def test_what_is_in_the_cache_needs_no_hub(
    silent_hub: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "models--some--model"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots" / "abc" / "config.json").touch()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert Location("some/model", "sub").fetch_folder() == (str(cache / "snapshots/abc"), "sub")
    assert Location("some/model", "config.json").fetch_file() == cache / "snapshots/abc/config.json"
    assert len(silent_hub) == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub_answers.cache_clear()
    assert Location("some/model").fetch_folder() == ("some/model", None)
    assert len(silent_hub) == 1  # nothing is asked where HF_HUB_OFFLINE is set


SHELL = """
import atexit, sys, imprompt.cli
class Left:
    def __del__(self): print("taken apart")
left = Left()
def work():
    atexit.register(print, "tidied")
    print("worked")
    {}
imprompt.cli.main = work
imprompt.cli.shell()
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("return", 0),
        ("sys.exit()", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('why')", 1),
        ("raise KeyError('why')", 1),
    ],
)
def test_a_shells_process_ends_at_once_with_all_said(end: str, code: int) -> None:
    """Its code, what it printed and what was registered for the end are as ever.

    Objects are not taken apart.
    """
    ended = python(SHELL.format(end))
    assert (ended.returncode, ended.stdout.split("\n")) == (code, ["worked", "tidied", ""])
    assert ("why" in ended.stderr) == ("why" in end)


def test_a_shell_that_stops_reading_is_no_error(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['imprompt', 'models']\nfrom imprompt.cli import shell\nshell()"
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=said
        )
        assert process.stdout is not None
        process.stdout.close()
        process.wait()
    assert "Traceback" not in (tmp_path / "said").read_text()
