"""The recipes that ship: each is read, and trains what was published at the size that its comments
say.
"""

import dataclasses
import re
from functools import lru_cache
from math import prod
from pathlib import Path

import pytest
import torch

from imprompt.families.base import find_family
from imprompt.families.published import BASES, ENCODERS
from imprompt.models import find_model
from imprompt.projections.resampler import Resampler
from imprompt.training import estimate as module
from imprompt.training.estimate import Estimate, blank_base, estimate_rows, estimate_run
from imprompt.training.recipe import RECIPES, Recipe, read_recipe
from imprompt.variants import FACE_DIM, TRAINABLE

FOLDER = RECIPES
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))
TRAINED = {
    "emoji-base": 640_128,
    "emoji-plus": 1_416_192,
    "flux-dev": 411_234_304,
    "pixart-sigma": 140_723_712,
    "qwen-image": 430_108_672,
    "sana-06b": 140_723_712,
    "sd35-medium": 195_407_616,
    "wan-13b": 223_719_168,
    "z-image": 288_550_912,
    "sd15-base": 22_319_616,
    "sd15-faceid": 48_354_816,
    "sd15-faceid-plus-v2": 78_260_736,
    "sd15-full": 21_794_304,
    "sd15-plus": 49_087_488,
    "sdxl-base-1024": 349_188_096,
    "sdxl-base-512": 349_188_096,
    "sdxl-plus-1024": 423_748_864,
    "sdxl-plus-512": 423_748_864,
}
# bases: weights of the published files, sites of an adapter and their width
TRANSFORMERS = {
    "flux-dev": (11.90e9, 19 + 38, 3072),
    "pixart-sigma": (0.611e9, 28, 1152),
    "qwen-image": (20.43e9, 60, 3072),
    "sana-06b": (0.590e9, 28, 1152),
    "sd35-medium": (2.47e9, 24, 1536),
    "wan-13b": (1.42e9, 30, 1536),
    "z-image": (6.15e9, 30, 3840),
}
LARGEST = ("flux-dev", "qwen-image")  # that take ten seconds and more
PUBLISHED = [name for name in NAMES if not name.startswith("emoji") and name not in TRANSFORMERS]
QUICK = [pytest.param(name, marks=pytest.mark.slow if name in LARGEST else ()) for name in NAMES]
VIT_H = ENCODERS[1].structure
KEYS = {  # widths of the text cross-attentions' keys
    "sd15": [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280],
    "sdxl": [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10,
}


def read(name: str, *overrides: str) -> Recipe:
    return read_recipe(FOLDER / f"{name}.toml", overrides)


def told(name: str, pattern: str) -> list[int]:
    """The numbers that a comment of the recipe says."""
    found = re.search(pattern, (FOLDER / f"{name}.toml").read_text())
    assert found, pattern
    return [int(number.replace(",", "")) for number in found.groups()]


@pytest.fixture(autouse=True)
def a_known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "matrix_rate", lambda *_: 1e14)


@lru_cache
def estimated(recipe: Recipe, processes: int) -> Estimate:
    return estimate_run(recipe, torch.device("cuda"), processes)


def on_gpus(recipe: Recipe, processes: int = 1) -> Estimate:
    return estimated(recipe, processes)


def gigabytes(recipe: Recipe, processes: int = 1) -> float:
    return sum(on_gpus(recipe, processes).memory.values()) / 1e9


def projection_shapes(variant: str, token_dim: int) -> list[tuple[int, ...]]:
    """Of the published files: ip-adapter_*, ip-adapter-plus_*, ip-adapter-full-face_*, FaceID."""
    norm = [(token_dim,)] * 2
    if variant == "base":
        return [(4 * token_dim, VIT_H.pooled), (4 * token_dim,), *norm]
    if variant == "full":
        width = VIT_H.penultimate
        return [(width, width), (width,), (token_dim, width), (token_dim,), *norm]
    if variant == "faceid":
        face = [(2 * FACE_DIM, FACE_DIM), (2 * FACE_DIM,)]
        return [*face, (4 * token_dim, 2 * FACE_DIM), (4 * token_dim,), *norm]
    if variant == "faceid-plus-v2":  # a face's tokens in the place of latents
        latents, *resampler = projection_shapes("plus", token_dim)
        assert latents == (1, 16, token_dim)
        return projection_shapes("faceid", token_dim) + resampler
    width = {768: 768, 2048: 1280}[token_dim]  # 12 and 20 heads of 64
    attention = [(width,)] * 4 + [(width, width), (2 * width, width), (width, width)]
    feed = [(width,)] * 2 + [(4 * width, width), (width, 4 * width)]
    ends = [(width, VIT_H.penultimate), (width,), (token_dim, width), (token_dim,), *norm]
    return [(1, 16, width), *ends, *(attention + feed) * 4]


def test_all_recipes_are_tested() -> None:
    assert sorted(TRAINED) == NAMES


@pytest.mark.parametrize("name", QUICK)
def test_a_recipe_trains_what_it_says(name: str) -> None:
    recipe = read(name)
    assert recipe.data.features is not None
    found = on_gpus(recipe)
    assert found.trained == TRAINED[name]
    assert (
        dict(estimate_rows(dataclasses.replace(found, device=torch.device("cpu"))))[
            "trained parameters"
        ]
        == f"{TRAINED[name]:,}"
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_comments_are_true(name: str) -> None:
    found = on_gpus(read(name))
    assert told(name, r"([\d,]+) trained parameters") == [found.trained]
    assert told(name, r"# (\d+) kB a sample") == [round((found.encoded or 0) / 1000)]
    one, _, _ = told(
        name,
        r"One GPU needs (\d+) GB, each of 8 needs (\d+); one of 24 GB: --set "
        r"optimization.accumulate=(\d+)",
    )
    assert one - 1 < gigabytes(read(name)) <= one


@pytest.mark.parametrize("name", [one for one in QUICK if one.values[0] in TRANSFORMERS])
def test_comments_on_transformers_are_true(name: str) -> None:
    recipe = read(name)
    found = on_gpus(recipe)
    assert told(name, r"([\d,]+) trained parameters") == [found.trained]
    assert told(name, r"(\d+) image tokens") == [recipe.tokens]
    assert told(name, r"# (\d+) kB a sample") == [round((found.encoded or 0) / 1000)]
    one, parts = told(name, r"One GPU needs (\d+) GB; .*accumulate=(\d+)\.")
    assert one - 1 < gigabytes(recipe) <= one
    plan = recipe.optimization
    assert parts * 8 == plan.accumulate
    assert told(name, r"accumulate = \d+ # (\d+) at once") == [plan.batch_size // plan.accumulate]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_bases_and_adapters_have_the_published_sizes(name: str) -> None:
    """Weights as published within 2 %, with fixed embeddings of places as in the files; an adapter
    has W'_k and W'_v at every site.
    """
    published, sites, width = TRANSFORMERS[name]
    structure = BASES[name]
    base = blank_base(structure, torch.bfloat16)
    held = sum(value.numel() for value in base.state_dict().values())
    assert held == pytest.approx(published, rel=0.02)
    family = find_family(structure.family)
    sizes = [family.size(layer) for layer in family.layers(base).values()]
    assert [(size.text, size.inner) for size in sizes] == [(width, width)] * sites
    recipe = read(name)
    tokens = recipe.token_width or width
    resampler = Resampler(ENCODERS[3].structure.penultimate, tokens, tokens=recipe.tokens)
    tensors = sum(weight.numel() for weight in resampler.parameters())
    assert TRAINED[name] == 2 * sites * tokens * width + tensors


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_recipes_of_transformers_keep_to_what_is_known_to_work(name: str) -> None:
    recipe = read(name)
    plan, data = recipe.optimization, recipe.data
    assert (plan.precision, plan.clip, plan.optimizer) == ("bf16", 1.0, "adamw")
    assert (data.drop_text, data.drop_image, data.drop_both) == (0.05,) * 3
    assert plan.learning_rate <= (1e-4 if TRAINED[name] < 5e8 else 2e-5)
    assert (recipe.variant, recipe.encoder) == ("plus", str(ENCODERS[3].place))
    assert 16 <= (recipe.tokens or 0) <= 64
    assert data.size == BASES[name].side
    assert find_model(recipe.model).base.on_hub
    assert recipe.noise.shift == ("dynamic" if name in ("flux-dev", "qwen-image") else "static")


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_comments_on_other_gpus_are_true(name: str) -> None:
    _, of_eight, parts = told(
        name, r"One GPU needs (\d+) GB, each of 8 needs (\d+); .*accumulate=(\d+)"
    )
    assert of_eight - 1 < gigabytes(read(name), 8) <= of_eight
    # of 24, the rest is for CUDA and its libraries
    assert gigabytes(read(name, f"optimization.accumulate={parts}")) < 20


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_file(name: str) -> None:
    recipe = read(name)
    token_dim = BASES[recipe.model].config["cross_attention_dim"]
    shapes = projection_shapes(recipe.variant, token_dim) + [
        (2 * width, token_dim) for width in KEYS[recipe.model]
    ]
    if TRAINABLE[recipe.variant].lora:
        shapes += low_rank_shapes(KEYS[recipe.model], token_dim)
    assert sum(map(prod, shapes)) == TRAINED[name]


def low_rank_shapes(widths: list[int], token_dim: int) -> list[tuple[int, ...]]:
    """Of rank 128: down and up of query, key, value and output, of self- and cross-attentions."""
    pairs = [(width, read) for width in widths for read in (width, token_dim)]
    return [
        shape
        for width, text in pairs
        for reads in (width, text, text, width)
        for shape in ((128, reads), (width, 128))
    ]


@pytest.mark.parametrize("variant", ["base", "plus"])
def test_the_second_stage_goes_on_from_the_first(variant: str) -> None:
    first, second = read(f"sdxl-{variant}-512"), read(f"sdxl-{variant}-1024")
    assert second.start == str(first.output / "latest")
    assert (first.variant, first.tokens, first.depth) == (
        second.variant,
        second.tokens,
        second.depth,
    )
    assert second.data.features != first.data.features


def test_features_are_shared_where_they_are_the_same() -> None:
    """A folder of features is of one model, size and feature, which the variant's row tells."""
    kinds: dict[Path | None, set[object]] = {}
    for name in NAMES:
        recipe = read(name)
        kind = (
            recipe.model,
            recipe.data.size,
            recipe.data.buckets,
            TRAINABLE[recipe.variant].feature,
            TRAINABLE[recipe.variant].null,
        )
        kinds.setdefault(recipe.data.features, set()).add(kind)
    assert all(len(found) == 1 for found in kinds.values())
    assert read("sd15-plus").data.features == read("sd15-full").data.features


@pytest.mark.parametrize("name", NAMES)
def test_lines_are_short(name: str) -> None:
    assert max(map(len, (FOLDER / f"{name}.toml").read_text().splitlines())) <= 132
