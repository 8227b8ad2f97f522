"""The emoji world's bases, a few steps of each at a small size, on glyphs drawn here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from imprompt import ImagePromptPipeline
from imprompt.checkpoints.adapters import read_adapter
from imprompt.models import PACKAGED
from imprompt.training.objective import Objective
from imprompt.training.recipe import NoiseSettings, read_recipe
from studies.emoji.evaluate import GUIDED, Model
from worlds.emoji import base, train_utils
from worlds.emoji.assemble import OWN_RECIPES, TRANSFORMERS, scenes, transformer_adapters
from worlds.emoji.base import BASES, sample_batch, train
from worlds.emoji.glyphs import Glyphs
from worlds.emoji.pool import open_pool
from worlds.emoji.text import build_word_tokenizer
from worlds.emoji.train_utils import BUDGETS, World, states_of

pytestmark = [
    # diffusers asks for another steps_offset, which does not matter to this schedule
    pytest.mark.filterwarnings("ignore:.*DDIMScheduler:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    # PyTorch normalises bf16 by weights in float32 without its fused function
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]

STEPS = 3
SMALL = """
[cpu]
pool = 8
unet = { channels = [8, 16], attention = [false, true], figure = [3.0, 1.0], layers = 1, heads = 2,\
 groups = 4, batch = 4, steps = 3, lr = 2e-3 }
dit = { layers = 2, heads = 2, head_width = 8, text = { width = 16, layers = 1, heads = 2 },\
 figure = [3.0, 1.0], batch = 4, steps = 3, lr = 2e-3 }
mmdit = { layers = 1, single_layers = 1, heads = 2, head_width = 8, rotary = [4, 2, 2],\
 text = { width = 16, layers = 1, heads = 2 }, pooled = { width = 8, layers = 1, heads = 2 },\
 figure = [3.0, 1.0], batch = 4, steps = 3, lr = 2e-3 }
"""


class Stopped(Exception):
    """As if the process had been killed."""


def small_world(folder: Path) -> World:
    """The packaged models around small untrained bases, and four squares as glyphs."""
    emoji = PACKAGED / "emoji"
    for name, parts in {
        ".": ("vae", "tokenizer"),
        "clip": ("text_encoder", "image_encoder"),
    }.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for part in parts:
            (folder / name / part).symlink_to(emoji / part)
    (folder / "clip" / "feature_extractor").symlink_to(emoji / "feature_extractor")
    atlas = torch.zeros(4, 4, 112, 112, dtype=torch.uint8)
    for number in range(4):
        atlas[number, [number % 3, 3], 20:90, 20:90] = 255
    squares = Glyphs(("apple", "pear", "plum", "fig"), atlas, seen=2)
    torch.save(vars(squares), folder / "glyphs-noto-112.pt")
    budgets = folder / "small.toml"
    budgets.write_text(SMALL)
    return World("cpu", folder, most=STEPS, device="cpu", budgets=(BUDGETS, budgets))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world whose three bases are trained for a few steps."""
    made = small_world(tmp_path_factory.mktemp("world"))
    for name in BASES:
        train(made, name)
    return made


def weights(world: World, name: str) -> dict[str, torch.Tensor]:
    pipeline: Any = DiffusionPipeline.from_pretrained(world.folder / BASES[name].folder)
    return {
        f"{part}.{key}": value
        for part in BASES[name].trained.values()
        for key, value in getattr(pipeline, part).state_dict().items()
    }


@pytest.mark.parametrize("name", BASES)
def test_a_resumed_base_is_an_uninterrupted_one_bit_for_bit(
    world: World, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_utils, "SAVE_EVERY", 0.0)
    parts, drawn = small_world(tmp_path), []

    def interrupted(*given: Any, **options: Any) -> Any:
        drawn.append(given)
        if len(drawn) == STEPS:
            raise Stopped
        return sample_batch(*given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(base, "sample_batch", interrupted)
        with pytest.raises(Stopped):
            train(parts, name)
    assert [path.name for path in states_of(parts, name).glob("step-*")] == ["step-0000002"]
    train(parts, name)
    whole = weights(world, name)
    assert all(torch.equal(whole[key], value) for key, value in weights(parts, name).items())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_new_transformer_predicts_zero_and_all_of_it_learns(world: World, name: str) -> None:
    pipeline = BASES[name].build(world)
    family = base.pipeline_family(type(pipeline).__name__)
    objective = Objective(pipeline.scheduler, NoiseSettings())
    assert objective.prediction_type == "flow"
    batch = sample_batch(world, open_pool(world), objective, 2, world.generator(0))
    texts = family.encode_text(pipeline, batch.captions)
    assert texts["text"].shape[1] == world["text"]["tokens"]
    found = family.predict(pipeline.transformer, None, batch.noisy, batch.t, texts)
    assert found.shape == batch.target.shape
    assert not found.any()
    before, after = BASES[name].build(world), weights(world, name)
    same = [
        f"{part}.{key}"
        for part in BASES[name].trained.values()
        for key, value in getattr(before, part).state_dict().items()
        if torch.equal(value, after[f"{part}.{key}"])
    ]
    assert all("position" in key or "pos_embed" in key for key in same), same


def test_words_are_tokens_and_others_are_spelled(world: World) -> None:
    tokenizer = build_word_tokenizer(world)
    ids = tokenizer(["a fox on a sky blue background", "zzyx"]).input_ids
    assert len(ids[0]) == 8  # seven words and the end
    assert tokenizer.decode(ids[1], skip_special_tokens=True) == "zzyx"
    assert tokenizer.unk_token_id not in ids[0] + ids[1]


@pytest.mark.slow
def test_adapters_of_the_transformers_train_and_are_measured_like_the_packaged(
    world: World, tmp_path: Path
) -> None:
    """By the recipes' own form, in whole folders that the façade opens."""
    scenes(world)
    transformer_adapters(world)
    prompts = torch.rand(2, 3, 128, 128)
    for name in TRANSFORMERS:
        adapter = world.folder / f"adapter-{name}"
        assert read_adapter(adapter / "latest").variant.name == "base"
        model = Model(str(world.folder / name), {name: str(adapter)}, GUIDED[name])
        made = model.make(model.open(name), prompts, ["a fox", ""])
        assert made.shape == prompts.shape
        assert (made[0] - made[1]).abs().max() > 0.01
        again = ImagePromptPipeline.from_pretrained(str(world.folder / name), adapter=str(adapter))
        result = again(Image.new("RGB", (64, 64), "red"), width=128, height=128, steps=2, seed=1)
        assert np.asarray(result.images[0]).shape == (128, 128, 3)
        result.images[0].save(tmp_path / f"{name}.png")


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_recipes_of_the_transformers_differ_by_base_alone(name: str) -> None:
    own = read_recipe(OWN_RECIPES / f"{name}.toml").model_dump(mode="json")
    other = read_recipe(OWN_RECIPES / f"{TRANSFORMERS[0]}.toml").model_dump(mode="json")
    assert json.dumps(own).replace(name, "NAME") == json.dumps(
        other | {"seed": own["seed"]}
    ).replace(TRANSFORMERS[0], "NAME")
    assert own["model"].endswith(f"/{name}")
