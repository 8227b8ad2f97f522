"""Named protocols and sweeps: which settings they come to, and what is refused."""

import pytest

from imprompt.errors import SettingError
from imprompt.evaluation.protocols import Protocol, find_protocol, read_sweep, settings_of


def test_protocols_and_sweeps() -> None:
    paper = find_protocol("paper-captioned", scale=None, limit=10)
    assert (
        paper.captions,
        paper.scale,
        paper.seeds,
        paper.scheduler,
        paper.steps,
        paper.guidance,
    ) == (
        True,
        0.5,
        4,
        "ddim",
        50,
        7.5,
    )
    assert (
        find_protocol("paper").captions,
        find_protocol("paper").scale,
        find_protocol("paper").limit,
        paper.limit,
    ) == (False, 1, 5000, 10)
    sweep = read_sweep(["scale=0, 0.5,1", "steps=10,20", "adapter=base,./runs/a b"])
    assert sweep == {"scale": (0, 0.5, 1), "steps": (10, 20), "adapter": ("base", "./runs/a b")}
    settings = settings_of(paper, sweep)
    assert len(settings) == 12
    assert settings[1].name == "scale=0,steps=10,adapter=.-runs-a-b"
    assert (
        settings[-1].protocol.scale,
        settings[-1].protocol.steps,
        settings[-1].protocol.guidance,
    ) == (1, 20, 7.5)
    assert [setting.name for setting in settings_of(paper, {})] == ["all"]
    near = read_sweep(["scale=-1,1,0.1234567,0.1234568", "adapter=a b,a-b", "blocks=-1"])
    names = [setting.name for setting in settings_of(paper, near)]
    assert names[0] == "scale=-1,adapter=a-b,blocks=-1"
    assert names[1] == "scale=-1,adapter=a-b,blocks=-1-2"
    assert names[4] == "scale=0.1234567,adapter=a-b,blocks=-1"
    assert len(set(names)) == 8
    long = settings_of(paper, {"adapter": ("/" + "x" * 400, "/" + "x" * 401)})
    assert all(len(setting.name) <= 150 for setting in long)
    assert long[0].name != long[1].name


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        (["sale=1"], "unknown axis 'sale'; near: scale"),
        (["scale=a"], "give numbers with commas between"),
        (["scale="], "give its values"),
        (["scale=1", "scale=2"], "given twice"),
        (["scale=1,1.0"], "scale=1 is given 2 times"),
        (["scale=11"], "scale = 11.0: input should be less than"),
        (["steps=0"], "steps = 0: input should be greater"),
    ],
)
def test_sweeps_that_cannot_be(sweep: list[str], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        settings_of(Protocol(), read_sweep(sweep))
