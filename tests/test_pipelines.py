"""Every pipeline in diffusers over a transformer of the table, with image prompts by `using`."""

import inspect
from itertools import combinations
from math import prod
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import transformers
from torch import nn

from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.errors import MismatchError
from imprompt.families.base import family_of
from imprompt.families.refusals import MODELS, NOT_RUN, PIPELINES
from imprompt.families.rows import ROWS
from imprompt.families.table import family_lines
from imprompt.prompt import ImagePrompt
from tests.pipelines import CASES, Case, call, pipeline
from tests.tiny import seeded
from tests.zoo import specimen

WIDTH = 8


def with_adapter(model: nn.Module, guided: bool) -> tuple[IPAdapter, ImagePrompt]:
    """An adapter on the model, away from where it starts, and a prompt with both branches.

    A family that runs both in one call takes the positive one alone where there is no guidance.
    """
    width = family_of(model).size(next(iter(family_of(model).layers(model).values()))).text
    with seeded(3):
        adapter = IPAdapter.for_model(model, ImageProjection(WIDTH, width))
        for parameter in adapter.image_kv.parameters():
            parameter.data.normal_(std=0.5)
        adapter.requires_grad_(False).attach(model)
        image, null = (adapter.tokens(torch.randn(1, WIDTH)) for _ in range(2))
    both = guided or family_of(model).separate_branches
    return adapter, adapter.prompt(image, null if both else None)


class Spy:
    """What rows of the model's calls have: which text, which image prompt, and the progress."""

    def __init__(self, adapter: IPAdapter, model: nn.Module, prompt: ImagePrompt) -> None:
        self.injection, self.family = adapter.injection, family_of(model)
        self.keys = prompt.keys[0]
        self.texts: list[bool] = []  # whether positive, by row
        self.images: list[bool] = []
        self.progress: list[float] = []
        self.places: set[int] = set()
        name, layer = next(iter(self.injection.layers.items()))
        self.processor = self.injection.processors[name]
        model.register_forward_pre_hook(self.called, with_kwargs=True)
        layer.register_forward_pre_hook(self.reached)

    def called(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        given = self.injection.by_name(args, kwargs)
        found = self.family.call(model, given, 1000)
        self.rows = found.rows
        self.texts += [bool(text.float().mean() > 0) for text in found.text]
        self.places.add(prod(found.grids()[0]))
        self.progress.append(float(found.place(10**6).flatten()[0]) / 10**6)

    def reached(self, *_: Any) -> None:
        if self.processor.conditioning is None:
            return
        ((key, *_),) = self.processor.conditioning[0].images
        for row in key.expand(self.rows, *key.shape[1:]):
            found = [torch.equal(row, own) for own in self.keys]
            assert sum(found) == 1
            self.images.append(found[-1])


def test_every_pipeline_is_run_or_said_why_not() -> None:
    run = {f"{name.split(' ')[0]}Pipeline" for name in CASES}
    known = {
        name
        for line in family_lines()
        if line.family != "unet"
        for name in (*line.whole, *line.attached, *line.not_run, *line.refused)
    }
    assert run.isdisjoint(NOT_RUN)
    assert run.isdisjoint(PIPELINES)
    assert run | set(NOT_RUN) | set(PIPELINES) == known


def test_every_transformer_of_diffusers_has_a_row_or_a_reason() -> None:
    kinds = (getattr(diffusers, name, None) for name in dir(transformers))
    names = {
        kind.__name__
        for kind in kinds
        if inspect.isclass(kind) and issubclass(kind, diffusers.ModelMixin)
    }
    assert len(names) > 70
    rows = {name for row in ROWS.values() for name in (row.model, *row.alike)}
    assert not names - rows - set(MODELS)
    assert rows.isdisjoint(MODELS)


def test_a_class_without_image_prompts_says_why() -> None:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, sample_size=4
    )
    with pytest.raises(MismatchError, match="takes no image prompts: it reads the number of a cla"):
        family_of(model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["StableDiffusion3PAG", "StableDiffusion3PAGImg2Img"])
def test_a_pipeline_that_replaces_processors_is_refused(name: str) -> None:
    pipe = pipeline(name, Case("sd3", parts={"pag_applied_layers": lambda: "transformer_blocks.1"}))
    adapter, prompt = with_adapter(pipe.transformer, guided=True)
    with adapter.using(prompt), pytest.raises(MismatchError, match="does not go with image promp"):
        call(pipe, Case("sd3"))


@torch.no_grad()
def test_of_two_transformers_each_has_an_adapter() -> None:
    """Wan 2.2 runs the first while there is much noise, and the second after that."""
    case = CASES["Wan"]._replace(
        parts={
            "transformer_2": lambda: specimen("wan", seed=1),
            "boundary_ratio": lambda: 0.5,
        }
    )
    pipe = pipeline("Wan", case)
    plain = call(pipe, case)
    (one, prompt), (other, late) = (
        with_adapter(model, guided=True) for model in (pipe.transformer, pipe.transformer_2)
    )
    made = {}
    for scales in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        first, second = (own.with_scale(s) for own, s in zip((prompt, late), scales, strict=True))
        with one.using(first), other.using(second):
            made[scales] = call(pipe, case)[0]
    assert torch.equal(made.pop((0.0, 0.0)), plain[0])
    results = [plain[0], *made.values()]
    assert all(not torch.equal(*pair) for pair in combinations(results, 2))


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_each_branch_hears_its_own_image_prompt(name: str) -> None:
    case = CASES[name]
    pipe = pipeline(name, case)
    plain = call(pipe, case)
    adapter, prompt = with_adapter(pipe.transformer, case.guided)
    with adapter.using(prompt.with_scale(0.0)):
        assert all(map(torch.equal, call(pipe, case), plain))
    spy = Spy(adapter, pipe.transformer, prompt)
    with adapter.using(prompt):
        made = call(pipe, case)
    assert not all(map(torch.equal, made, plain))
    assert all(one.isfinite().all() for one in made)
    assert spy.images == spy.texts
    assert set(spy.texts) == ({True, False} if case.guided else {True})
    assert spy.places == {case.places}, spy.places
    window = prompt.with_scale(torch.ones(len(prompt.keys), 1, 100))
    if case.timed:
        assert sorted(spy.progress) == spy.progress
        assert -0.01 < spy.progress[0] < spy.progress[-1] < 1
        with adapter.using(window):
            assert all(map(torch.equal, call(pipe, case), made))
        return
    with adapter.using(window), pytest.raises(MismatchError, match="a scale that changes over tim"):
        call(pipe, case)
