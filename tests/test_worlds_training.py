"""The loop that the emoji world's stages are trained by, and the table of stages."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from imprompt.errors import ImpromptError, SettingError
from imprompt.files import lock_folder
from studies.emoji.__main__ import STAGES
from worlds.emoji import train_utils
from worlds.emoji.stages import MAKING, Stage, main
from worlds.emoji.train_utils import Training, World, fit, load_state, states_of

STEPS = 12


class Stopped(Exception):
    """As if the process had been killed."""


def network() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten())
    return nn.ModuleDict({"classifier": layers.append(nn.LazyLinear(2)), "heads": nn.Linear(2, 2)})


def losses(
    modules: nn.ModuleDict, world: World, ends_at: int
) -> Callable[[int], dict[str, Tensor]]:
    """A loss of pictures by the step's generator and of noise by torch's own."""

    def loss_of(step: int) -> dict[str, Tensor]:
        if step == ends_at:
            raise Stopped
        pictures = torch.randn(4, 3, 6, 6, generator=world.generator(1, step))
        found = modules["heads"](modules["classifier"](pictures + torch.randn(4, 3, 6, 6)))
        return {"square": found.square().mean(), "size": found.abs().mean()}

    return loss_of


def trained(
    folder: Path, name: str = "stage", ends_at: int = -1, average: float | None = 0.9
) -> dict[str, Tensor]:
    world, modules = World("cpu", folder, device="cpu"), network()
    modules["classifier"](torch.zeros(1, 3, 6, 6))
    loss_of = losses(modules, world, ends_at)
    fit(world, name, modules, loss_of, steps=STEPS, lr=0.1, batch=4, average=average)
    return modules.state_dict()


@pytest.fixture
def saves_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_utils, "SAVE_EVERY", 0.0)


@pytest.mark.usefixtures("saves_often")
@pytest.mark.parametrize("average", [0.9, None])
def test_a_resumed_stage_is_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, average: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = trained(tmp_path / "whole", average=average)
    for ends_at in (3, 7):
        with pytest.raises(Stopped):
            trained(tmp_path / "parts", ends_at=ends_at, average=average)
    parts = trained(tmp_path / "parts", average=average)
    assert "stage: resumed at step 7" in capsys.readouterr().out
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    again = trained(tmp_path / "parts", ends_at=0, average=average)  # no step is left
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    states = states_of(World("cpu", tmp_path / "parts"), "stage")
    assert [path.name for path in states.glob("step-*")] == [f"step-{STEPS:07d}"]


@pytest.mark.usefixtures("saves_often")
def test_a_state_of_before_is_read_under_its_former_name(tmp_path: Path) -> None:
    """It was one file, its module under another name, its average of all that the module holds."""
    name, world = "glyph-classifier", World("cpu", tmp_path, device="cpu")
    with pytest.raises(Stopped):
        trained(tmp_path, name, ends_at=5)
    state = load_state(world, name)
    assert state is not None

    def before(part: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.replace("classifier.", "namer."): value for key, value in part.items()}

    whole = trained(tmp_path, name)
    states_of(world, name).rename(tmp_path / "away")
    average = {**state["modules"], **state["mean"]}
    former = state | {"modules": before(state["modules"]), "mean": before(average)}
    torch.save(former, tmp_path / "namer.state")
    resumed = trained(tmp_path, name)
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


@pytest.mark.usefixtures("saves_often")
def test_a_loss_that_is_no_number_ends_a_stage_before_it_is_saved(tmp_path: Path) -> None:
    world, modules = World("cpu", tmp_path, device="cpu"), nn.ModuleDict({"a": nn.Linear(1, 1)})

    def loss_of(step: int) -> dict[str, Tensor]:
        value = modules["a"](torch.ones(1, 1)).sum()
        return {"loss": value * (float("nan") if step == 3 else 1.0)}

    with pytest.raises(ImpromptError, match=r"loss of step 4 is nan.*step-0000003"):
        fit(world, "stage", modules, loss_of, steps=9, lr=0.1, batch=1)
    state = load_state(world, "stage")
    assert state is not None
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["modules"].values())


def test_two_processes_do_not_train_the_same_stage(tmp_path: Path) -> None:
    lock = lock_folder(states_of(World("cpu", tmp_path), "stage"), "training into")
    with pytest.raises(SettingError, match="another process"):
        trained(tmp_path)
    lock.release()


def test_a_state_holds_no_average_that_is_not_asked_for() -> None:
    modules = nn.ModuleDict({"a": nn.Linear(1, 1)})
    assert Training(modules, 0.1, 0.0, None).state(0)["mean"] == {}
    assert Training(modules, 0.1, 0.0, 0.9).state(0)["mean"].keys() == modules.state_dict().keys()


@pytest.mark.parametrize(
    ("before", "wanted"),
    [({}, [*STAGES][:6]), (MAKING, [*[*MAKING][:12], *[*STAGES][:6]])],
    ids=["stages", "with those before"],
)
def test_all_runs_the_stages_in_order_but_for_those_apart(
    before: dict[str, Stage], wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Stage] = []
    monkeypatch.setattr(Stage, "run", lambda stage, world: ran.append(stage))  # noqa: ARG005
    threads = str(torch.get_num_threads())
    monkeypatch.setattr("sys.argv", f"stages all --threads {threads} --folder {tmp_path}".split())
    main("stages", "", STAGES, before=before)
    assert ran == [({**MAKING, **STAGES})[name] for name in wanted]
    assert wanted[-1] == "evaluate"


@pytest.mark.parametrize("name", [*MAKING, *STAGES])
def test_every_stage_has_its_function(name: str) -> None:
    pytest.importorskip("peft", reason="the styles are LoRAs")
    module, _, function = ({**MAKING, **STAGES})[name].function.partition(":")
    assert callable(getattr(import_module(module), function))
