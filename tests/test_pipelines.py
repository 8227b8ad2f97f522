"""Every pipeline in diffusers over a transformer of the table, with image prompts by `using`."""

from math import prod
from typing import Any

import pytest
import torch
from torch import nn

from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.families.base import family_of
from imprompt.prompt import ImagePrompt
from tests.pipelines import CASES, call, pipeline
from tests.tiny import seeded

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


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_each_branch_hears_its_own_image_prompt(name: str) -> None:
    pipe, case = pipeline(name), CASES[name]
    plain = call(name, pipe)
    adapter, prompt = with_adapter(pipe.transformer, case.guided)
    with adapter.using(prompt.with_scale(0.0)):
        assert all(map(torch.equal, call(name, pipe), plain))
    spy = Spy(adapter, pipe.transformer, prompt)
    with adapter.using(prompt):
        made = call(name, pipe)
    assert not all(map(torch.equal, made, plain))
    assert all(one.isfinite().all() for one in made)
    assert spy.images == spy.texts
    assert set(spy.texts) == ({True, False} if case.guided else {True})
    assert spy.places == {case.places}, spy.places
    assert sorted(spy.progress) == spy.progress
    assert -0.01 < spy.progress[0] < spy.progress[-1] < 1
