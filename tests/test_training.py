"""Whole runs of a few steps on small models, from the same entry that users call."""

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imprompt.checkpoints.adapters import load_adapter, read_adapter, write_adapter
from imprompt.errors import CheckpointError, ImpromptError, MismatchError, SettingError, Stopped
from imprompt.models import find_adapter, find_model
from imprompt.training import loop, setup, state, step
from imprompt.training.model import AdaptedModel
from imprompt.training.signals import StopRequest, Wish, Wishes
from imprompt.training.watch import LogRow, Metrics, Watcher
from imprompt.variants import TRAINABLE
from tests.runs import (
    begun,
    losses,
    names,
    of_variant,
    picture_folder,
    recipe,
    saved_pipeline,
    tensors,
)
from tests.sets import MAKERS, items, make_folder, masked

LAYERS = {"sd1": 16, "sdxl": 17}  # text cross-attentions of the tiny structures
FILES = ["adapter.safetensors", "state.json", "training.pt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module", params=list(LAYERS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 1.x or SDXL as a folder."""
    return saved_pipeline(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.mark.parametrize("name", list(TRAINABLE))
def test_every_variant_trains_on_sd1_and_sdxl(
    name: str, model: Path, folder: Path, tmp_path: Path
) -> None:
    changes = of_variant(name, folder)
    plan = recipe(folder, tmp_path / "run", 2, model=str(model), data={"size": 32}, **changes)
    latest = loop.train(plan)
    assert names(tmp_path / "run") == ["latest", "metrics.jsonl", "step-0000002"]
    assert names(latest) == FILES
    file = read_adapter(latest)
    assert (file.variant.name, len(file.kv)) == (name, LAYERS[model.name])
    assert file.header is not None
    assert (file.header.base, file.header.training_steps, file.header.prediction_type) == (
        f"./{model.name}",  # its name alone
        2,
        "epsilon",
    )
    run = begun(plan.model_copy(update={"output": tmp_path / "other"}))
    fresh = dict(run.trainer.model.named_parameters())
    assert {key.split(".")[0] for key in fresh} == {"adapter"}
    assert file.parameters == sum(weight.numel() for weight in fresh.values())
    stored = torch.load(latest / "training.pt", weights_only=True)
    assert set(stored) == {"optimizer", "scaler"}
    assert set(stored["optimizer"]["state"]) == set(fresh)
    # no base model in it
    names_of_tensors = 1_500 * len(fresh) + 200_000
    written = sum(path.stat().st_size for path in latest.iterdir())
    assert written < 3.2 * 4 * file.parameters + names_of_tensors
    began = run.setup.cpu_copy.state_dict()
    assert not any(
        torch.equal(before, after)
        for before, after in zip(began.values(), after_of(latest, run), strict=True)
    )


def after_of(latest: Path, run: Any) -> list[torch.Tensor]:
    return list(load_adapter(latest, run.setup.base).state_dict().values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimization": {"ema": 0.9, "accumulate": 3}},
        {"optimization": {"optimizer": "muon", "ema": 0.9}},
        {"data": {"features": "FEATURES", "flip": True, "held_out": 1}},
        {"data": {"buckets": True, "bucket_step": 16, "workers": 2}},
        {"validation": {"every": 3, "steps": 2, "texts": ["a cat"]}, "data": {"held_out": 2}},
        {
            "noise": {"min_snr": 5.0, "offset": 0.05},
            "optimization": {"checkpointing": True, "schedule": "cosine", "warmup": 2},
        },
    ],
    ids=["plain", "average", "muon", "features", "buckets", "validation", "noise"],
)
def test_a_stopped_run_goes_on_as_if_it_had_not(
    changes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    if "features" in changes.get("data", {}):
        changes = {"data": changes["data"] | {"features": tmp_path / "features"}}
    whole = loop.train(recipe(folder, tmp_path / "whole", **changes))
    parts = recipe(folder, tmp_path / "parts", **changes)
    with pytest.raises(Stop):
        loop.train(parts, StopAfter(5))  # the state is of step 4: step 5 is taken again
    again = loop.train(parts)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(again), strict=True))


class Stop(Exception):
    pass


class StopAfter(Watcher):
    """Ends a run after so many steps, as a crash would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def stepped(self, row: LogRow) -> None:
        if row.step == self.steps:
            raise Stop


def test_an_averaged_run_saves_the_average_and_goes_on_from_the_weights(
    folder: Path, tmp_path: Path
) -> None:
    run = begun(recipe(folder, tmp_path, 4, optimization={"ema": 0.5}))
    run.go()
    assert run.trainer.average is not None
    keys = [name.removeprefix("adapter.") for name, _ in run.trainer.model.named_parameters()]
    saved = dict(zip(keys, run.trainer.average.means, strict=True))
    adapter = load_adapter(tmp_path / "latest", run.setup.base)
    assert all(torch.equal(saved[key], value) for key, value in adapter.state_dict().items())
    stored = torch.load(tmp_path / "latest" / "training.pt", weights_only=True)
    assert stored["average_steps"] == 4
    own = run.trainer.weights()
    assert all(torch.equal(own[key], value) for key, value in stored["weights"].items())
    assert not any(torch.equal(own[key], saved[key]) for key in own)


def test_the_average_follows_as_it_should() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    average, expected = step.Average([weight], 0.3), 0.0
    for number in range(1, 8):
        with torch.no_grad():
            weight += 1.0
        average.step([weight])
        decay = min(0.3, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * number
        assert average.means[0].item() == pytest.approx(expected)
    with average.swapped_into([weight]):
        assert weight.item() == pytest.approx(expected)
    assert weight.item() == 7


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulated_parts_are_one_batch(optimizer: str, folder: Path, tmp_path: Path) -> None:
    plan = {"batch_size": 6, "optimizer": optimizer}
    loop.train(recipe(folder, tmp_path / "one", 4, optimization=plan))
    loop.train(recipe(folder, tmp_path / "three", 4, optimization=plan | {"accumulate": 3}))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "three"), abs=1e-5)


def test_features_encoded_once_train_as_pictures_do(folder: Path, tmp_path: Path) -> None:
    loop.train(recipe(folder, tmp_path / "pictures"))
    loop.train(recipe(folder, tmp_path / "features", data={"features": tmp_path / "kept"}))
    # kept as float16
    assert losses(tmp_path / "pictures") == pytest.approx(losses(tmp_path / "features"), rel=5e-3)


MASKS: dict[str, Any] = {
    "columns": {"mask": "mask"},
    "size": 32,
    "buckets": True,
    "bucket_step": 8,
    "flip": True,
}


def plain_losses(run: Path) -> list[float]:
    return [row["plain_loss"] for row in Metrics(run).read() if "loss" in row]


def test_masks_weigh_equally_from_every_source_and_from_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hub-cache"))
    made, runs = masked(items(7, ((48, 40), (40, 64)))), {}
    for kind, make in MAKERS.items():
        more = {"per_shard": 7} if kind == "shards" else {}
        source = make(tmp_path / kind, made, **more)
        data = MASKS | {"root": source.root}
        for name, changes in (
            (kind, {}),
            (f"{kind} encoded", {"features": tmp_path / f"{kind}-features"}),
        ):
            plan = recipe(
                source.source,
                tmp_path / f"{name} run",
                4,
                data=data | changes,
                noise={"mask_weight": 3.0},
            )
            loop.train(plan)
            runs[name] = plan.output
    for kind in MAKERS:
        assert losses(runs[kind]) == losses(runs["folder"])
        assert losses(runs[f"{kind} encoded"]) == losses(runs["folder encoded"])
    # kept as float16
    assert losses(runs["folder encoded"]) == pytest.approx(losses(runs["folder"]), rel=5e-3)
    assert losses(runs["folder"]) != plain_losses(runs["folder"])


def test_a_mask_weight_of_zero_trains_as_without_masks(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "set", masked(items(7))).source
    plain = MASKS | {"columns": {}}
    weighted, zero, without = (
        recipe(source, tmp_path / name, 3, data=data, noise={"mask_weight": weight})
        for name, data, weight in (
            ("weighted", MASKS, 3.0),
            ("zero", MASKS, 0.0),
            ("without", plain, 0.0),
        )
    )
    states = [tensors(loop.train(plan)) for plan in (weighted, zero, without)]
    assert losses(zero.output) == losses(without.output) != losses(weighted.output)
    assert plain_losses(weighted.output)[0] == plain_losses(without.output)[0]
    assert all(torch.equal(one, other) for one, other in zip(states[1], states[2], strict=True))


def test_a_bad_mask_weighs_nothing_and_is_named(tmp_path: Path) -> None:
    made = masked(items(7))
    made[3] = replace(made[3], mask=b"")
    source = make_folder(tmp_path / "set", made).source
    loop.train(
        recipe(
            source, tmp_path / "run", 4, data=MASKS | {"max_bad": 0.2}, noise={"mask_weight": 3.0}
        )
    )
    (row,) = map(json.loads, (tmp_path / "run" / "bad.jsonl").read_text().splitlines())
    assert row["name"].endswith("0003.png")
    assert row["why"].endswith("0003-mask.png is empty")


def test_training_on_features_holds_no_encoders(folder: Path, tmp_path: Path) -> None:
    plan = recipe(folder, tmp_path / "run", 1, data={"features": tmp_path / "kept"})
    loop.train(plan)
    run = begun(recipe(folder, tmp_path / "again", 1, data={"features": tmp_path / "kept"}))
    assert run.setup.frozen is None


def test_features_of_another_encoder_or_size_are_refused(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    loop.train(recipe(folder, tmp_path / "run", 1, data={"features": kept}))
    for changes, words in (
        ({"data": {"features": kept, "size": 32}}, "size 128 .this recipe: 32"),
        ({"data": {"features": kept}, "variant": "plus"}, "feature .*pooled.*penultimate"),
        ({"data": {"features": kept, "flip": True}}, "flip false .this recipe: true"),
    ):
        with pytest.raises(SettingError, match=words):
            loop.train(recipe(folder, tmp_path / "other", 1, **changes))


def test_only_the_adapter_is_trained(folder: Path, tmp_path: Path) -> None:
    run = begun(recipe(folder, tmp_path, 2))
    before = {name: weight.clone() for name, weight in run.setup.base.state_dict().items()}
    model = run.trainer.model
    assert isinstance(model, AdaptedModel)
    text = {"text": torch.randn(2, 24, 192)}
    out = model(
        torch.randn(2, 4, 16, 16), torch.tensor([1, 500]), {"image": torch.randn(2, 256)}, text
    )
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    run.go()
    assert all(weight.grad is None for weight in run.setup.base.parameters())
    assert all(
        torch.equal(before[name], weight) for name, weight in run.setup.base.state_dict().items()
    )


def test_a_run_starts_from_a_given_adapter(folder: Path, tmp_path: Path) -> None:
    first = loop.train(recipe(folder, tmp_path / "first", 2))
    run = begun(recipe(folder, tmp_path / "second", 2, start=str(first)))
    given = load_adapter(first, run.setup.base).state_dict()
    assert all(torch.equal(given[key], value) for key, value in run.trainer.weights().items())
    with pytest.raises(
        MismatchError,
        match="is a base adapter of 256-wide features; this recipe trains a plus one of 192-wide",
    ):
        loop.train(recipe(folder, tmp_path / "third", 2, start=str(first), variant="plus"))


def test_the_best_state_is_kept(folder: Path, tmp_path: Path) -> None:
    measured = iter([3.0, 1.0, 2.0, 4.0])

    class Reported(loop.Run):
        def held_out_loss(self) -> float:
            return next(measured)

    plan = recipe(folder, tmp_path, 8, keep=1, data={"held_out": 2})
    Reported(setup.set_up(plan, Watcher().encoded), Watcher()).go()
    assert names(tmp_path) == ["best", "latest", "metrics.jsonl", "step-0000004", "step-0000008"]
    assert (tmp_path / "best").resolve().name == "step-0000004"
    assert [row["held_out_loss"] for row in Metrics(tmp_path).read() if "held_out_loss" in row] == [
        3.0,
        1.0,
        2.0,
        4.0,
    ]


def test_held_out_samples_are_never_trained_on(folder: Path, tmp_path: Path) -> None:
    run = begun(recipe(folder, tmp_path, 10, data={"held_out": 3}))
    items = run.data_pipeline.samples_from(0)
    shown = {name for _ in range(10) for name in next(items).names}
    kept = {run.data_pipeline.reader.name(int(index)) for index in run.data_pipeline.held_out}
    assert (len(shown), len(kept), shown & kept) == (4, 3, set())
    assert run.held_out_loss() == run.held_out_loss()


def test_a_diverged_run_stops_with_step_samples_and_state(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = step.Trainer.update

    def broken(trainer: step.Trainer, number: int, parts: Any) -> step.Stepped:
        told = update(trainer, number, parts)
        return told._replace(norm=told.norm * float("nan")) if number == 4 else told

    monkeypatch.setattr(step.Trainer, "update", broken)
    with pytest.raises(
        ImpromptError,
        match=r"the loss of step 5 is nan; its samples: .*\.png.*last good state is .*"
        r"step-0000004;",
    ):
        loop.train(recipe(folder, tmp_path))
    assert (tmp_path / "latest" / "state.json").exists()
    assert len(losses(tmp_path)) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 3}, "was started with seed = 0 .now 3."),
        ({"optimization": {"batch_size": 2}}, "optimization.batch_size = 3 .now 2."),
        ({"variant": "plus"}, "variant = 'base' .now 'plus'."),
    ],
)
def test_another_recipe_does_not_go_on(
    changes: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    loop.train(recipe(folder, tmp_path, 2))
    with pytest.raises(SettingError, match=words):
        loop.train(recipe(folder, tmp_path, 4, **changes))


def test_another_set_does_not_go_on(folder: Path, tmp_path: Path) -> None:
    loop.train(recipe(folder, tmp_path, 2))
    listing = folder / "metadata.jsonl"
    whole = listing.read_text()
    listing.write_text("\n".join(whole.splitlines()[:-1]))
    try:
        with pytest.raises(ImpromptError, match="started with 7 samples, the set has 6 now"):
            loop.train(recipe(folder, tmp_path, 4))
    finally:
        listing.write_text(whole)


def test_a_trained_adapter_loads_in_diffusers(folder: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from imprompt.generation.pipeline import ImagePromptPipeline
    from imprompt.models import PACKAGED

    latest = loop.train(recipe(folder, tmp_path / "run", variant="full"))
    write_adapter(tmp_path / "ip.safetensors", read_adapter(latest), "diffusers")
    prompt = Image.open(folder / "3.png")
    ours = ImagePromptPipeline.from_pretrained("emoji", adapter=latest, device="cpu")(
        prompt, seed=1, steps=3
    ).images[0]
    theirs = StableDiffusionPipeline.from_pretrained(PACKAGED / "emoji")
    theirs.set_progress_bar_config(disable=True)
    theirs.load_ip_adapter(
        str(tmp_path),
        subfolder="",
        weight_name="ip.safetensors",
        image_encoder_folder=None,
        low_cpu_mem_usage=False,
    )
    made = theirs(
        "",
        ip_adapter_image=prompt,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(1)],
    ).images[0]
    assert int(np.abs(np.asarray(ours).astype(int) - np.asarray(made)).max()) <= 1


def test_a_torn_save_leaves_the_last_state(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    loop.train(recipe(folder, run, steps=2))
    kept = tensors(run / "latest")

    def torn(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loop.torch, "save", torn)
        with pytest.raises(CheckpointError, match="No space"):
            loop.train(recipe(folder, run, steps=4))
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors(run / "latest"), strict=True))
    assert names(run) == ["latest", "metrics.jsonl", "step-0000002"]
    loop.train(recipe(folder, run, steps=4))
    assert json.loads((run / "latest" / "state.json").read_text())["step"] == 4
    for state_folder in run.glob("step-*"):
        (state_folder / "training.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"no whole state: .*step-0000004/training.pt is dam"):
        loop.train(recipe(folder, run, steps=5))


class Told(Watcher):
    """Keeps what is said about the state that a run goes on from."""

    def __init__(self) -> None:
        self.from_state: list[Any] = []
        self.warnings: list[str] = []

    def resumed(self, state: Path, step: int, steps: int, changed: Sequence[str]) -> None:
        self.from_state = [state.name, step, steps, list(changed)]

    def warned(self, line: str) -> None:
        self.warnings.append(line)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def followed(run: Path) -> None:
    """Make the links folders, as cp -rL does."""
    for link in (run / "latest", run / "best"):
        if link.is_symlink():
            state_folder = link.resolve()
            link.unlink()
            shutil.copytree(state_folder, link)


LOST: dict[str, Callable[[Path], Any]] = {
    "lost": lambda run: (run / "latest").unlink(),
    "dangling": lambda run: [
        (run / "latest").unlink(),
        (run / "latest").symlink_to("step-0000009"),
    ],
    "followed": followed,
    "only the copy": lambda run: [
        followed(run),
        *(shutil.rmtree(path) for path in run.glob("step-*")),
    ],
}


@pytest.mark.parametrize("kind", LOST)
def test_the_newest_state_is_found_whatever_became_of_the_links(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    changes: dict[str, Any] = {"data": {"held_out": 2}}
    loop.train(recipe(folder, whole, 6, **changes))
    with pytest.raises(Stop):
        loop.train(recipe(folder, run, 6, **changes), StopAfter(5))
    LOST[kind](run)
    told = Told()
    last = loop.train(recipe(folder, run, 6, **changes), told)
    assert told.from_state[1:] == [4, 6, []]
    assert losses(run) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(tensors(last), tensors(whole), strict=True))
    assert (run / "latest").resolve().name == "step-0000006"
    assert (run / "best").is_symlink()
    assert not [path for path in run.iterdir() if path.name.startswith("latest-")]


def test_a_disk_without_links_keeps_states(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refused)
    plan = recipe(folder, tmp_path, 4, data={"held_out": 2})
    assert loop.train(plan).name == "step-0000004"
    assert names(tmp_path) == ["metrics.jsonl", "step-0000002", "step-0000004"]
    told = Told()
    loop.train(recipe(folder, tmp_path, 6, data={"held_out": 2}), told)
    assert told.from_state == ["step-0000004", 4, 6, ["optimization.steps = 6 (was 4)"]]
    losses_of = {
        path: json.loads((path / "state.json").read_text())["held_out_loss"]
        for path in tmp_path.glob("step-*")
    }
    assert find_adapter(find_model("emoji"), str(tmp_path / "latest")).path.name == "step-0000006"
    assert find_adapter(find_model("emoji"), str(tmp_path / "best")).path == min(
        losses_of, key=lambda path: losses_of[path]
    )


def test_a_run_is_an_adapter_by_its_newest_whole_state(folder: Path, tmp_path: Path) -> None:
    plan = recipe(folder, tmp_path / "run", 4)
    newest = tensors(loop.train(plan))
    assert all(torch.equal(a, b) for a, b in zip(tensors(tmp_path / "run"), newest, strict=True))
    started = begun(recipe(folder, tmp_path / "other", 1, start=str(tmp_path / "run")))
    given = load_adapter(tmp_path / "run" / "step-0000004", started.setup.base).state_dict()
    assert all(torch.equal(given[key], value) for key, value in started.trainer.weights().items())
    flip_a_bit(tmp_path / "run" / "step-0000004" / "adapter.safetensors")
    older = tensors(tmp_path / "run" / "step-0000002")
    assert all(torch.equal(a, b) for a, b in zip(tensors(tmp_path / "run"), older, strict=True))


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_state_is_named_and_the_one_before_is_taken(
    name: str, folder: Path, tmp_path: Path
) -> None:
    loop.train(recipe(folder, tmp_path / "run", 4))
    damaged = tmp_path / "run" / "step-0000004" / name
    (damaged.write_text("{") if name == "state.json" else flip_a_bit(damaged))
    told = Told()
    loop.train(recipe(folder, tmp_path / "run", 6), told)
    assert told.from_state[:3] == ["step-0000002", 2, 6]
    assert told.warnings[0].startswith(f"{damaged} is damaged (")
    loop.train(recipe(folder, tmp_path / "whole", 6))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for state_folder in (tmp_path / "run").glob("step-*"):
        flip_a_bit(state_folder / "training.pt")
    with pytest.raises(CheckpointError, match=r"holds no whole state: .*another sha256.*again"):
        loop.train(recipe(folder, tmp_path / "run", 6))


def test_a_damaged_best_state_is_replaced(folder: Path, tmp_path: Path) -> None:
    plan = recipe(folder, tmp_path, 2, data={"held_out": 2})
    loop.train(plan)
    (tmp_path / "best" / "state.json").write_bytes(b'{"st\x01')
    with pytest.raises(CheckpointError, match="holds no whole state"):
        loop.train(plan)
    shutil.copytree(tmp_path / "step-0000002", tmp_path / "step-0000001")
    flip_a_bit(tmp_path / "step-0000001" / "training.pt")
    said: list[str] = []
    state.save_state(tmp_path, 3, {}, {"held_out_loss": 9.0}, 1, said.append)
    assert (tmp_path / "best").resolve().name == "step-0000003"
    assert [line.split(" is damaged")[0] for line in said] == [
        str(tmp_path / name / "state.json") for name in ("step-0000001", "step-0000002")
    ]
    assert (tmp_path / "step-0000002").exists()


def test_changed_values_are_said_and_those_without_effect_refused(
    folder: Path, tmp_path: Path
) -> None:
    loop.train(recipe(folder, tmp_path, 2))
    changes = {"optimization": {"learning_rate": 0.5}, "noise": {"min_snr": 5.0}}
    with pytest.raises(
        SettingError,
        match=r"has taken its 2 steps, so optimization.learning_rate = 0.5 \(was 0.001\), "
        r"noise.min_snr = 5.0 \(was None\) has no effect: give optimization.steps above 2",
    ):
        loop.train(recipe(folder, tmp_path, 2, **changes))
    told = Told()
    loop.train(recipe(folder, tmp_path, 2), told)
    assert told.from_state == ["step-0000002", 2, 2, []]
    loop.train(recipe(folder, tmp_path, 4, **changes), told)
    assert told.from_state[3] == [
        "optimization.steps = 4 (was 2)",
        "optimization.learning_rate = 0.5 (was 0.001)",
        "noise.min_snr = 5.0 (was None)",
    ]


def test_a_state_is_saved_every_so_many_minutes() -> None:
    seconds = [0.0]
    wishes = Wishes(10, ranks=1, now=lambda: seconds[0])
    request = StopRequest(stepping=True, said=False)
    for now, expected in ((599.0, Wish.nothing), (600.0, Wish.save), (700.0, Wish.save)):
        seconds[0] = now
        assert wishes.after_step(request) is expected
    wishes.saved()
    assert wishes.after_step(request) is Wish.nothing
    request(signal.SIGTERM, None)
    assert wishes.after_step(request) is Wish.stop
    assert Wishes(None, ranks=1, now=lambda: 1e9).after_step(StopRequest()) is Wish.nothing


def test_states_by_minutes_come_between_those_by_steps(folder: Path, tmp_path: Path) -> None:
    loop.train(recipe(folder, tmp_path, 3, save_every=100, save_minutes=1e-9, keep=5))
    assert names(tmp_path)[-3:] == ["step-0000001", "step-0000002", "step-0000003"]


def test_the_last_step_is_saved_between_those_of_save_every(folder: Path, tmp_path: Path) -> None:
    latest = loop.train(recipe(folder, tmp_path, 3, save_every=2, keep=5))
    assert names(tmp_path) == ["latest", "metrics.jsonl", "step-0000002", "step-0000003"]
    assert latest.resolve().name == "step-0000003"


@pytest.mark.parametrize("asked", [1, 2])
def test_a_run_that_is_asked_to_stop_in_its_last_step_is_complete(
    asked: int, folder: Path, tmp_path: Path
) -> None:
    run = begun(recipe(folder, tmp_path, 2, save_every=100))
    run.request.said = False

    def advanced(step: int) -> None:
        if step == asked:
            run.request(signal.SIGTERM, None)

    run.watcher.advanced = advanced
    try:
        with nullcontext() if asked == 2 else pytest.raises(Stopped):
            run.go()
    finally:
        run.close()
    assert (tmp_path / "latest").resolve().name == f"step-000000{asked}"


def test_a_folder_of_an_unpointed_state_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "step-0000002").mkdir()
    (tmp_path / "step-0000002" / "torn").touch()
    state.save_state(tmp_path, 2, {"a": lambda path: path.write_text("x") and None}, {}, keep=1)
    assert names(tmp_path / "latest") == ["a", "state.json"]


def test_links_that_a_kill_left_behind_are_set_when_the_run_goes_on(
    folder: Path, tmp_path: Path
) -> None:
    plan = recipe(folder, tmp_path, 4)
    loop.train(plan)
    (link := tmp_path / "latest").unlink()
    link.symlink_to("step-0000002")
    loop.train(plan)
    assert link.resolve().name == "step-0000004"


def test_a_damaged_copy_of_the_only_state_is_not_taken_for_no_state(
    folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    newest = loop.train(recipe(folder, run, 2)).resolve()
    (run / "latest").unlink()
    newest.rename(run / "latest")
    for other in run.glob("step-*"):
        shutil.rmtree(other)
    (run / "latest" / "state.json").write_text("{")
    with pytest.raises(ImpromptError, match="damaged"):
        loop.train(recipe(folder, run, 4))
