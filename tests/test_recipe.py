"""Reading recipes: what is wrong in one is a line that names the key, the value and what is
allowed.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from imprompt.errors import SettingError
from imprompt.training.recipe import RECIPES, Recipe, read_recipe

RECIPE = RECIPES / "emoji-base.toml"


def keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def refusal(*overrides: str) -> str:
    with pytest.raises(SettingError) as caught:
        read_recipe(RECIPE, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("key", list(keys()))
def test_a_value_of_another_kind_is_refused_by_key(key: str) -> None:
    told = refusal(f"{key}={{ odd = 1 }}")
    assert f"{key} = {{'odd': 1}}: Input should be" in told


@pytest.mark.parametrize("key", list(keys()))
def test_a_misspelt_key_is_named_and_mended(key: str) -> None:
    group, dot, name = key.rpartition(".")
    told = refusal(f"{group}{dot}{name}x=1")
    assert f"unknown key {group}{dot}{name}x; did you mean" in told


RANGES = [
    *(
        (key, value, "greater than or equal to 1")
        for key in ("save_every", "keep", "tokens", "optimization.steps")
        for value in (0, -3)
    ),
    *(
        (f"optimization.{key}", 0, "greater than or equal to 1")
        for key in ("batch_size", "accumulate")
    ),
    *(
        (f"optimization.{key}", value, "greater than 0")
        for key in ("learning_rate", "clip")
        for value in (0, -1.0)
    ),
    *(
        (f"data.{key}", 1.5, "less than or equal to 1")
        for key in ("drop_text", "drop_image", "drop_both", "max_bad")
    ),
    *(
        (f"data.{key}", -0.5, "greater than or equal to 0")
        for key in ("drop_text", "drop_image", "drop_both", "max_bad")
    ),
    ("optimization.weight_decay", -1, "greater than or equal to 0"),
    ("optimization.warmup", -1, "greater than or equal to 0"),
    ("optimization.ema", 1, "less than 1"),
    ("optimization.learning_rate", "nan", "finite number"),
    ("optimization.precision", '"int8"', "'auto', 'fp32', 'bf16' or 'fp16'"),
    ("optimization.schedule", '"step"', "'constant' or 'cosine'"),
    ("optimization.optimizer", '"sgd"', "'adamw', 'adamw8bit' or 'muon'"),
    ("data.captions", '"none"', "'required' or 'optional'"),
    ("data.size", 4, "greater than or equal to 8"),
    ("data.max_aspect", 0.5, "greater than or equal to 1"),
    ("data.held_out", -1, "greater than or equal to 0"),
    ("noise.min_snr", 0, "greater than 0"),
    ("noise.power", 0, "greater than 0"),
    ("noise.offset", -0.1, "greater than or equal to 0"),
    ("noise.mask_weight", -1, "greater than or equal to 0"),
    ("validation.every", 0, "greater than or equal to 1"),
    ("validation.scales", "[]", "at least 1 item"),
    ("logging.every", 0, "greater than or equal to 1"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), RANGES)
def test_a_value_out_of_range_is_refused_with_what_is_allowed(
    key: str, value: object, allowed: str
) -> None:
    told = refusal(f"{key}={value}")
    assert re.search(rf"{re.escape(key)} = .*: .*{re.escape(allowed)}", told), told


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimization.lr=1", "unknown key optimization.lr"),
        ("optimization.learning_rat=1", "did you mean learning_rate"),
        ("optimization.steps=0", "optimization.steps = 0"),
        ("optimization.learning_rate=-1", "optimization.learning_rate = -1"),
        ("data.drop_text=2", "data.drop_text = 2"),
        ("data.drop_text=0.95", "add up to 1.05: 1 at most"),
        ("variant=pluss", "unknown variant 'pluss'"),
        ("depth=2", "depth is an option of plus, portrait-unnorm, "),
        ("data.columns={}", r"noise.mask_weight = 3 needs masks: data.columns.mask names"),
        ("steps", "write key=value"),
        ("model.x=1", "model is not a group"),
    ],
)
def test_a_wrong_recipe_is_one_line(override: str, words: str) -> None:
    with pytest.raises(SettingError, match=words) as caught:
        read_recipe(RECIPE, [override])
    assert "\n" not in str(caught.value)


def test_masks_may_be_named_without_a_weight() -> None:
    """So that features encoded with masks serve the run that is compared with."""
    for weight in (0, 3):
        recipe = read_recipe(RECIPE, ["data.columns.mask=mask", f"noise.mask_weight={weight}"])
        assert (recipe.data.columns.mask, recipe.noise.mask_weight) == ("mask", weight)


def test_the_packages_recipes_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = Path("recipes/sd15-base.toml")
    assert read_recipe(named) == read_recipe(RECIPES / "sd15-base.toml")
    named.parent.mkdir()
    named.write_text((RECIPES / "sd15-plus.toml").read_text())
    assert read_recipe(named).variant == "plus"  # the user's own goes first
    with pytest.raises(SettingError, match=r"no recipe nothing\.toml .* recipes/sd15-base\.toml"):
        read_recipe(Path("nothing.toml"))
