"""Families beside the UNet, and Kolors, end to end on tiny random models: generate, train, save,
load, evaluate.
"""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

from imprompt import ImagePromptPipeline, Reference
from imprompt.checkpoints.adapters import read_adapter
from imprompt.errors import CheckpointError, SettingError
from imprompt.evaluation.plan import Plan
from imprompt.evaluation.protocols import Protocol
from imprompt.evaluation.run import evaluate
from imprompt.training.estimate import estimate_run
from imprompt.training.loop import train
from tests.judges import tiny_clip
from tests.runs import losses, picture_folder, recipe
from tests.tiny_pipelines import Saved, tiny_pipeline

OTHERS = ("pixart", "flux", "sd3", "kolors")
SIZE = {"width": 24, "height": 32, "steps": 3}
RED, BLUE = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))


@pytest.fixture(scope="module", params=OTHERS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    if request.param == "kolors":
        pytest.importorskip("sentencepiece")
    return Saved(tmp_path_factory.mktemp(request.param), request.param)


def guided(saved: Saved) -> dict[str, Any]:
    return (
        {"pipeline_options": {"true_cfg_scale": 3.0}} if saved.name == "flux" else {"guidance": 3.0}
    )


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(pixels(one) - pixels(other)).max())


def test_the_facade_follows_an_image_prompt(saved: Saved) -> None:
    pipe = saved.pipeline()
    for options in ({"guidance": 1.0}, guided(saved)):
        red, blue, unconditioned, text = (
            pipe(image, seed=1, **SIZE, **options, **more).images[0]
            for image, more in (
                (RED, {}),
                (BLUE, {}),
                (RED, {"scale": 0.0}),
                (RED, {"prompt": "a cat", "scale": 0.0}),
            )
        )
        assert red.size == (24, 32)
        assert difference(red, blue) > 2
        assert difference(red, unconditioned) > 2
        assert difference(text, unconditioned) > 0
    plain = tiny_pipeline(saved.name)
    call = {"num_inference_steps": 3, "width": 24, "height": 32, "guidance_scale": 1.0}
    options = pipe.family.call_options(plain)
    bare = plain("", **call, **options, generator=torch.Generator().manual_seed(1)).images[0]
    assert difference(pipe(RED, seed=1, scale=0.0, guidance=1.0, **SIZE).images[0], bare) == 0


def test_guidance_is_what_runs_a_negative_branch(saved: Saved) -> None:
    """Flux's guidance_scale is an input of the model; true_cfg_scale turns on a negative branch."""
    pipe = saved.pipeline()
    own = saved.name == "flux"
    assert pipe.family.guided(pipe.pipeline, 3.5, {}) is not own
    assert pipe.family.guided(pipe.pipeline, 3.5, {"true_cfg_scale": 1.0}) is not own
    assert pipe.family.guided(pipe.pipeline, 1.0, {"true_cfg_scale": 2.0}) is own


def test_items_of_a_batch_are_what_they_are_alone(saved: Saved) -> None:
    pipe, options = saved.pipeline(), guided(saved)
    left = Image.new("L", (24, 32))
    left.paste(255, (0, 0, 12, 32))
    items = [RED, Reference(images=BLUE, mask=left, end=0.6), Reference(images=RED, scale=0.4)]
    together = pipe(items, seed=5, **SIZE, **options).images
    alone = [
        pipe(item, seed=5 + number, **SIZE, **options).images[0]
        for number, item in enumerate(items)
    ]
    for one, other in zip(together, alone, strict=True):
        assert difference(one, other) <= 1


def test_a_mask_and_a_window_apply_where_and_when_they_say(saved: Saved) -> None:
    pipe = saved.pipeline()
    left = Image.new("L", (24, 32))
    left.paste(255, (0, 0, 12, 32))
    all_of_it, white, half, late, unconditioned = (
        pipe(Reference(images=RED, **said), seed=1, guidance=1.0, **SIZE).images[0]
        for said in (
            {},
            {"mask": Image.new("L", (8, 8), 255)},
            {"mask": left},
            {"start": 0.9},
            {"scale": 0.0},
        )
    )
    assert difference(all_of_it, white) == 0
    assert difference(all_of_it, half) > 2
    assert difference(half, unconditioned) > 2
    assert difference(late, unconditioned) < difference(all_of_it, unconditioned)


def test_compiled_it_is_one_graph_for_everything_that_a_user_changes(
    saved: Saved, counter: CompileCounterWithBackend
) -> None:
    if saved.name == "kolors":
        return  # a UNet: tests.test_compiled
    fast, plain = saved.pipeline(compile=True), saved.pipeline()
    calls: list[dict[str, Any]] = [
        {},
        {"prompt": "a cat", "seed": 2},
        {"scale": 0.4},
        {"scale": 0.0},
        {"image": BLUE, "steps": 2},
    ]
    for call in calls:
        settings = {"image": RED, "seed": 1, **SIZE, **guided(saved), **call}
        made, wanted = (pipe(**settings).images[0] for pipe in (fast, plain))
        assert difference(made, wanted) <= 1
        assert counter.frame_count == 1, call


def test_threads_make_the_serial_pictures(saved: Saved) -> None:
    pipe, options = saved.pipeline(), guided(saved)
    asked = [(RED, 3), (BLUE, 4), (RED, 2), (BLUE, 3)]

    def make(number: int) -> Image.Image:
        image, steps = asked[number]
        return pipe(image, seed=number, **SIZE | {"steps": steps}, **options).images[0]

    serial, found = [make(number) for number in range(4)], {}

    def work(number: int) -> None:
        found[number] = make(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, one in enumerate(serial):
        assert difference(one, found[number]) <= 1


def test_what_it_cannot_do_is_refused_in_one_line(saved: Saved) -> None:
    said = r"no ControlNet (is known for a \w+Pipeline: leave|can be loaded from)"
    with pytest.raises((SettingError, CheckpointError), match=said):  # Flux has some
        saved.pipeline(controlnet=str(saved.model))
    pipe = saved.pipeline()
    unit, near = (8, (24, 32)) if saved.name in ("pixart", "kolors") else (4, (24, 28))
    said = f"width = 26: this model takes multiples of {unit}, such as {near[0]} or {near[1]}"
    with pytest.raises(SettingError, match=said):
        pipe(RED, width=26, height=32, steps=2)
    for width in near:
        assert pipe(RED, width=width, height=32, steps=1).images[0].size == (width, 32)
    mask = {} if saved.name == "pixart" else {"mask_image": Image.new("L", (8, 8), 255)}
    if saved.name in ("pixart", "kolors"):
        with pytest.raises(SettingError, match="own way to start from pictures"):
            pipe(RED, init_image=BLUE, **mask, **SIZE)
    if saved.name != "pixart":
        assert pipe(RED, init_image=BLUE, seed=1, strength=0.7, **SIZE).images[0].size == (24, 32)


def test_image_guidance_needs_both_branches_in_one_call(saved: Saved) -> None:
    pipe, options = saved.pipeline(), guided(saved)
    if saved.name == "flux":
        with pytest.raises(SettingError, match="a FluxPipeline runs them in separate calls"):
            pipe([RED, BLUE], image_guidance=2.0, **SIZE, **options)
        return
    plain, more = (
        pipe(RED, seed=1, image_guidance=scale, **SIZE, **options).images[0] for scale in (3.0, 9.0)
    )
    assert difference(plain, pipe(RED, seed=1, **SIZE, **options).images[0]) <= 1
    assert difference(plain, more) > 2


def test_encoded_text_is_what_its_words_are(saved: Saved) -> None:
    """One row of it for several pictures too, which Kolors' pipeline does not repeat."""
    if saved.name != "kolors":
        return
    pipe = saved.pipeline()
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
             "negative_pooled_prompt_embeds")  # fmt: skip
    with torch.no_grad():
        encoded = pipe.pipeline.encode_prompt("a cat", negative_prompt="a dog")
    asked: dict[str, Any] = {"seed": 1, "num_images": 2, **SIZE, **guided(saved)}
    words = pipe(RED, prompt="a cat", negative_prompt="a dog", **asked).images
    rows = pipe(RED, pipeline_options=dict(zip(names, encoded, strict=True)), **asked).images
    for one, other in zip(words, rows, strict=True):
        assert difference(one, other) == 0


@pytest.mark.parametrize("kept", [True, False])
def test_it_trains_saves_loads_and_goes_on(saved: Saved, tmp_path: Path, kept: bool) -> None:
    source, output = picture_folder(tmp_path / "set"), tmp_path / "run"
    plan = recipe(
        source,
        output,
        3,
        model=str(saved.model),
        encoder=str(saved.model / "image_encoder"),
        data={"size": 32, "features": tmp_path / "features" if kept else None, "held_out": 2},
    )
    assert estimate_run(plan, torch.device("cpu")).trained > 0
    last = train(plan)
    assert len(losses(output)) == 3
    file = read_adapter(last)
    assert file.header is not None
    assert file.header.family == ("unet" if saved.name == "kolors" else saved.name)
    assert any(
        (one != two).any()
        for one, two in zip(
            file.tensors, read_adapter(output / "step-0000002").tensors, strict=True
        )
    )
    made = ImagePromptPipeline.from_pretrained(
        str(saved.model), adapter=last, encoder=saved.model / "image_encoder", device="cpu"
    )
    assert (
        difference(
            *(
                made(RED, seed=1, guidance=1.0, scale=scale, **SIZE).images[0]
                for scale in (0.0, 3.0)
            )
        )
        > 0
    )


def test_two_items_are_evaluated(saved: Saved, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name, picture in (("a", RED), ("b", BLUE)):
        picture.save(folder / f"{name}.png")
    (folder / "c.png").touch()
    lines = [{"file_name": f"{name}.png", "text": "a cat"} for name in ("a", "b", "c")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tiny_clip(tmp_path / "clip")
    plan = Plan(
        path=folder,
        out=tmp_path / "out",
        protocol=Protocol(steps=2, seeds=1, guidance=1.0),
        model=str(saved.model),
        adapter=str(saved.file),
        encoder=str(saved.model / "image_encoder"),
        clip=str(tmp_path / "clip"),
        dino=None,
        skip_bad=True,
        device="cpu",
    )
    evaluate(plan)
    facts = json.loads((tmp_path / "out" / "run.json").read_text())["set"]
    assert facts["items"] == 2
    assert [line.rpartition("/")[-1] for line in facts["skipped"]] == ["c.png is empty"]
    assert len(list((tmp_path / "out").rglob("*.png"))) >= 2
