"""Losses that are compared before and during a run: is the base right, does the adapter follow its
images?
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imprompt.errors import SettingError
from imprompt.training import loop
from imprompt.training.comparisons import (
    PARTS,
    BaseLosses,
    base_losses,
    check_base,
    reference_losses,
    shuffled,
)
from imprompt.training.watch import Metrics, Watcher
from tests.commands import smallest_model
from tests.runs import begun, losses, picture_folder, recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures"))


class Heard(Watcher):
    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []

    def compared(self, losses: Any) -> None:
        self.losses.append(dict(losses))


def test_a_right_base_is_below_the_best_constant_and_logged_once(
    folder: Path, tmp_path: Path
) -> None:
    plan, heard = recipe(folder, tmp_path, 1, check_base=True), Heard()
    loop.train(plan, heard)
    first, *_ = rows = Metrics(tmp_path).read()
    assert first["step"] == 0
    assert first["base_loss"] < 0.6 * first["constant_loss"]
    assert heard.losses == [{name: first[name] for name in ("base_loss", "constant_loss")}]
    parts = {name for name in first if "/" in name}
    assert len(parts) == 2 * PARTS
    for name in parts:
        assert name.startswith("constant") or first[name] < first[f"constant_{name[5:]}"]
    loop.train(plan.model_copy(update={"optimization": plan.optimization.model_copy(
        update={"steps": 2})}), heard)  # fmt: skip
    assert len(heard.losses) == 1  # a resumed run does not check again
    assert [row["step"] for row in Metrics(tmp_path).read()] == [row["step"] for row in rows] + [2]


def negated(base: Any) -> None:
    base.register_forward_hook(
        lambda _module, _arguments, out: (
            type(out)(sample=-out.sample) if hasattr(out, "sample") else (-out[0],)
        )
    )


def reversed_in_time(base: Any) -> None:
    forward = base.forward
    base.forward = lambda noisy, timestep, *rest, **kw: forward(noisy, 999 - timestep, *rest, **kw)


def scaled_wrongly(base: Any) -> None:
    forward = base.forward
    base.forward = lambda noisy, *rest, **kw: forward(noisy / 0.18215, *rest, **kw)


@pytest.mark.parametrize("fault", [negated, reversed_in_time, scaled_wrongly])
def test_a_wrong_base_is_refused_in_one_line(fault: Any, folder: Path, tmp_path: Path) -> None:
    run = begun(recipe(folder, tmp_path, 1, check_base=True))
    fault(run.setup.base)
    with pytest.raises(SettingError, match=r"own loss is \d.\d+ at timesteps .* not below") as said:
        run.go()
    run.close()
    assert "check_base = false" in str(said.value)
    assert "\n" not in str(said.value)
    assert losses(tmp_path) == []
    first, *_ = Metrics(tmp_path).read()
    assert first["constant_loss"] > 0


def test_an_untrained_base_is_refused_unless_the_recipe_says_otherwise(
    folder: Path, tmp_path: Path
) -> None:
    model = str(smallest_model(tmp_path / "model"))
    plan = recipe(folder, tmp_path / "run", 1, model=model, data={"size": 16})
    with pytest.raises(SettingError, match="the base is untrained, or"):
        loop.train(plan.model_copy(update={"check_base": True}))
    loop.train(plan)
    assert len(losses(plan.output)) == 1


def test_the_best_constant_is_the_variance(folder: Path, tmp_path: Path) -> None:
    """A base that predicts the parts' own means is no better, whatever the data."""
    run = begun(recipe(folder, tmp_path, 1))
    pipeline = run.data_pipeline
    batches = [
        pipeline.compose(samples)
        for _, samples in pipeline.fixed_samples(pipeline.first_samples(16))
    ]
    seen: list[Tensor] = []
    corrupt = run.trainer.objective.corrupt

    def recorded(*arguments: Tensor) -> Any:
        found = corrupt(*arguments)
        seen.append(found[2])
        return found

    run.trainer.objective.corrupt = recorded
    zero = base_losses(
        batches, run.trainer.objective, lambda noisy, _t, _b: torch.zeros_like(noisy)
    )
    targets = torch.cat(seen)
    assert sum(part.base for part in zero) / PARTS == pytest.approx(
        targets.square().mean().item(), rel=0.05
    )
    assert all(part.constant < part.base for part in zero)
    with pytest.raises(SettingError, match=r"is 1.5000 at timesteps 5-9, not below the 1.5000"):
        check_base([BaseLosses("0-4", 0.5, 1.0), BaseLosses("5-9", 1.5, 1.5)])
    with pytest.raises(SettingError, match="is nan"):
        check_base([BaseLosses("0-4", float("nan"), 1.0)])


# Own against shuffled references.


def test_a_trained_adapter_follows_its_own_references(folder: Path, tmp_path: Path) -> None:
    """The packaged one was measured at 0.37 with own and 0.78 with shuffled references."""
    run = begun(recipe(folder, tmp_path, start="base"))
    found = run.reference_losses()
    assert found is not None
    assert found.own < 0.5
    assert found.shuffled - found.own > 0.3
    for pair in run.trainer.model.adapter.image_kv:
        pair.to_v.weight.data.zero_()
    nothing = run.reference_losses()
    assert nothing is not None
    assert nothing.own == nothing.shuffled > found.own


def test_references_are_compared_at_their_steps_and_after_the_last(
    folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    heard = Heard()
    plan = recipe(
        folder,
        tmp_path,
        5,
        model=str(smallest_model(tmp_path / "model")),
        validation={"shuffled_every": 2},
        data={"held_out": 3, "size": 16},
        logging={"to": ["tensorboard"]},
    )
    loop.train(plan, heard)
    rows = [row for row in Metrics(tmp_path).read() if "own_loss" in row]
    assert [row.pop("step") for row in rows] == [2, 4, 5]
    assert rows == heard.losses
    for row in rows:
        assert row["shuffled_minus_own"] == row["shuffled_loss"] - row["own_loss"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [event.value for event in events.Scalars("validation/shuffled_minus_own")]
    assert shown == pytest.approx([row["shuffled_minus_own"] for row in rows])


def test_references_are_shuffled_among_samples_that_were_read(folder: Path, tmp_path: Path) -> None:
    run = begun(recipe(folder, tmp_path, optimization={"batch_size": 1}))
    chosen = run.data_pipeline.first_samples(5)
    batches = run._compared(chosen)
    assert [len(batch.names) for batch in batches] == [1] * 5
    batches[2] = replace(batches[2], weight=torch.zeros(1))
    own, given = ([batch.image["image"] for batch in some] for some in (batches, shuffled(batches)))
    for number, giver in enumerate((4, 0, 2, 1, 3)):
        assert torch.equal(given[number], own[giver])
    one = [replace(batch, weight=torch.zeros(1)) for batch in batches[:4]] + batches[4:]
    assert reference_losses(one, run.trainer.objective, pytest.fail) is None
