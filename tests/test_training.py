"""Training on the packaged model: whole runs of a few steps, from the same entry that users call."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from imprompt.adapter import IPAdapter
from imprompt.checkpoint import read_adapter, write_adapter
from imprompt.errors import CheckpointError, SettingError
from imprompt.training import loop, state
from imprompt.training.data import batch_rows, read_metadata
from imprompt.training.recipe import Recipe, read_recipe
from imprompt.variants import BY_NAME

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures and their captions, one of which is empty."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for number, colour in enumerate(COLOURS):
        picture = Image.new("RGB", (80, 64), colour)
        ImageDraw.Draw(picture).rectangle((20, 20, 40, 50), fill=COLOURS[number - 1])
        picture.save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a {colour} picture" if number else ""}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def recipe(folder: Path, output: Path, steps: int = 6, **changes: object) -> Recipe:
    return Recipe.model_validate(
        {
            "model": "emoji",
            "output": output,
            "save_every": 2,
            "data": {"folder": folder, "drop_text": 0.2, "drop_image": 0.2, "drop_both": 0.2},
            "optimization": {"steps": steps, "batch_size": 3, "learning_rate": 1e-3, "precision": "fp32"},
            **changes,
        }
    )


def tensors(folder: Path) -> list[torch.Tensor]:
    return read_adapter(folder).tensors


@pytest.mark.parametrize("name", list(BY_NAME))
def test_a_run_leaves_states_that_load(name: str, folder: Path, tmp_path: Path) -> None:
    latest = loop.train(recipe(folder, tmp_path / "run", variant=name, keep=2))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["latest", "metrics.jsonl", "step-0000004", "step-0000006"]
    assert sorted(p.name for p in latest.iterdir()) == ["adapter.safetensors", "optimizer.pt", "state.json"]
    file = read_adapter(latest)
    assert file.variant.name == name
    assert file.header is not None
    assert (file.header.base, file.header.training_steps, file.header.prediction_type) == ("emoji", 6, "v_prediction")
    assert len(file.kv) == 10
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6
    assert rows[-1]["loss"] > 0


def test_a_stopped_run_goes_on_as_if_it_had_not(folder: Path, tmp_path: Path) -> None:
    whole = loop.train(recipe(folder, tmp_path / "whole"))
    loop.train(recipe(folder, tmp_path / "parts", steps=4))
    parts = loop.train(recipe(folder, tmp_path / "parts"))
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(parts), strict=True))


def test_only_the_adapter_learns(folder: Path, tmp_path: Path) -> None:
    kit = loop.outfit(recipe(folder, tmp_path), torch.device("cpu"))
    before = {name: weight.clone() for name, weight in kit.pipeline.unet.state_dict().items()}
    model = loop.AdaptedModel(kit.pipeline.unet, kit.adapter)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"adapter"}
    out = model(torch.randn(2, 4, 16, 16), torch.tensor([1, 500]), torch.randn(2, 24, 192), torch.randn(2, 256))
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(weight.grad is None for weight in kit.pipeline.unet.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in kit.pipeline.unet.state_dict().items())


def test_a_trained_adapter_loads_in_diffusers(folder: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from imprompt import ImagePromptPipeline
    from imprompt.models import PACKAGED

    latest = loop.train(recipe(folder, tmp_path / "run", variant="full"))
    write_adapter(tmp_path / "ip.safetensors", read_adapter(latest), "diffusers")
    prompt = Image.open(folder / "3.png")
    ours = ImagePromptPipeline.from_pretrained("emoji", adapter=latest, device="cpu")(prompt, seed=1, steps=3).images[0]
    theirs = StableDiffusionPipeline.from_pretrained(PACKAGED / "emoji")
    theirs.set_progress_bar_config(disable=True)
    theirs.load_ip_adapter(
        str(tmp_path), subfolder="", weight_name="ip.safetensors", image_encoder_folder=None, low_cpu_mem_usage=False
    )
    made = theirs(
        "", ip_adapter_image=prompt, num_inference_steps=3, guidance_scale=3.0, generator=[torch.Generator().manual_seed(1)]
    ).images[0]
    assert int(np.abs(np.asarray(ours).astype(int) - np.asarray(made)).max()) <= 1


def test_a_torn_save_leaves_the_last_state(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    loop.train(recipe(folder, run, steps=2))
    kept = tensors(run / "latest")

    def torn(_adapter: IPAdapter, *_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state.torch, "save", torn)
        with pytest.raises(CheckpointError, match="No space"):
            loop.train(recipe(folder, run, steps=4))
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors(run / "latest"), strict=True))
    loop.train(recipe(folder, run, steps=4))
    assert json.loads((run / "latest" / "state.json").read_text()) == {"step": 4}
    (run / "latest" / "optimizer.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="damaged"):
        loop.train(recipe(folder, run, steps=5))


def test_every_epoch_sees_every_sample_once() -> None:
    rows = torch.cat([batch_rows(step, 3, 7, seed=5) for step in range(7)])
    epochs = rows.view(3, 7)
    assert all(sorted(epoch.tolist()) == list(range(7)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(batch_rows(0, 7, 7, seed=5), batch_rows(0, 7, 7, seed=6))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_read(path: Path) -> None:
    assert read_recipe(path).optimization.steps > 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimization.lr=1", "unknown key optimization.lr"),
        ("optimization.learning_rat=1", "did you mean learning_rate"),
        ("optimization.steps=0", "optimization.steps = 0"),
        ("optimization.learning_rate=-1", "optimization.learning_rate = -1"),
        ("data.drop_text=2", "data.drop_text = 2"),
        ("data.drop_text=0.95", "must not add up to more than 1"),
        ("variant=pluss", "unknown variant 'pluss'"),
        ("depth=2", "depth is of the plus variant"),
        ("steps", "write key=value"),
        ("model.x=1", "model is no group"),
    ],
)
def test_a_wrong_recipe_is_one_line(override: str, words: str) -> None:
    with pytest.raises(SettingError, match=words) as caught:
        read_recipe(RECIPES[0], [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no metadata.jsonl"),
        ("", "is empty"),
        ("{", "line 1"),
        ('{"file_name": "a.png"}\n[]', "line 2"),
        ('{"text": "x"}', "line 1"),
    ],
)
def test_a_wrong_listing_is_one_line(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(SettingError, match=words):
        read_metadata(tmp_path)


def test_a_bad_picture_is_named(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    (bad / "4.png").write_bytes(b"no picture")
    with pytest.raises(SettingError, match=r"4\.png"):
        loop.train(recipe(bad, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
