"""The engine: requests that run at the same time share calls of the base model, and change nothing
for each other.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imprompt import ImagePromptPipeline, Reference
from imprompt.errors import MismatchError
from imprompt.generation.settings import Settings
from imprompt.models import PACKAGED

PICTURE = PACKAGED / "emoji" / "demo.png"
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


@pytest.fixture(scope="module")
def pipe() -> ImagePromptPipeline:
    return ImagePromptPipeline.from_pretrained("emoji", adapter="plus", device="cpu")


def together(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run every job in a thread of its own; what they return or raise."""
    results: list[Any] = [None] * len(jobs)

    def run(number: int) -> None:
        try:
            results[number] = jobs[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return results


def pixels(result: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in result.images]).astype(int)


CALLS: list[dict[str, Any]] = [
    {"steps": 5},
    {"steps": 8, "prompt": "a rocket", "scale": 0.5},
    {"steps": 6, "image_guidance": 2.0, "prompt": "a bus"},
    {"steps": 7, "init_image": PICTURE, "strength": 0.7},
    {"steps": 4, "guidance": 1.0},
    {"steps": 5, "guidance": 5.0, "num_images": 2, "negative_prompt": "a fox"},
]


def job(pipe: ImagePromptPipeline, number: int) -> Callable[[], Any]:
    reference = Reference(images=PICTURE, end=0.4 + 0.1 * number)
    return lambda: pipe(reference, seed=number, **CALLS[number])


def test_requests_of_all_kinds_share_calls_and_get_their_own_pictures(
    pipe: ImagePromptPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job(pipe, number) for number in range(len(CALLS))]
    alone = [pixels(run()) for run in jobs]
    sizes: list[int] = []
    engine_run = pipe.engine.run

    def run(calls: Sequence[Any]) -> Any:
        outs = engine_run(calls)
        sizes.append(len(calls))  # those of a call that failed are run again, each alone
        return outs

    monkeypatch.setattr(pipe.engine, "run", run)
    for wanted, found in zip(alone, together(jobs), strict=True):
        assert abs(pixels(found) - wanted).max() <= 2
    assert max(sizes) > 2
    assert not pipe.engine.seats


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' schedulers and NumPy 2
@given(st.lists(st.tuples(st.sampled_from(SCHEDULERS), st.integers(4, 6)), min_size=2, max_size=4))
@settings(max_examples=4, deadline=None)
def test_schedulers_of_any_class_share_calls(
    pipe: ImagePromptPipeline, wanted: list[tuple[str, int]]
) -> None:
    own = pipe.pipeline.scheduler

    def with_scheduler(name: str, steps: int) -> Callable[[], Any]:
        prepared = pipe.prepare(PICTURE, Settings(steps=steps, seed=steps))
        other = copy.copy(prepared.pipeline)
        other.scheduler = getattr(diffusers, name).from_config(own.config)
        prepared = prepared._replace(pipeline=other)
        return lambda: [np.asarray(image).astype(int) for _, image in pipe.make(prepared)]

    jobs = [with_scheduler(*one) for one in wanted]
    alone = [run() for run in jobs]
    for first, second in zip(alone, together(jobs), strict=True):
        assert abs(np.stack(first) - np.stack(second)).max() <= 2


def test_one_that_fails_fails_alone(pipe: ImagePromptPipeline) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, _total: int) -> None:
        if done == 2:
            raise Stop

    def stopped() -> Any:
        return pipe(PICTURE, seed=0, steps=5, on_step=stop)

    found = together([job(pipe, 0), stopped, job(pipe, 1)])
    assert isinstance(found[1], Stop)
    assert abs(pixels(found[0]) - pixels(job(pipe, 0)())).max() <= 2
    assert abs(pixels(found[2]) - pixels(job(pipe, 1)())).max() <= 2
    assert not pipe.engine.seats


def test_an_exchanged_base_model_is_reported(pipe: ImagePromptPipeline) -> None:
    own = pipe.pipeline.unet
    pipe.pipeline.unet = torch.nn.Identity()
    try:
        with pytest.raises(MismatchError, match="exchanged"):
            pipe(PICTURE, steps=2)
    finally:
        pipe.pipeline.unet = own


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_model_that_the_user_compiled_is_the_same_model(
    pipe: ImagePromptPipeline, fullgraph: bool
) -> None:
    own, plain = pipe.pipeline.unet, pipe(PICTURE, steps=2, seed=0)
    calls = []

    def backend(graph: Any, _inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    pipe.pipeline.unet = torch.compile(own, backend=backend, fullgraph=fullgraph)
    try:
        compiled = pipe(PICTURE, steps=2, seed=0)
        assert calls
        assert abs(pixels(compiled) - pixels(plain)).max() <= 1
        assert not own._forward_pre_hooks  # outside the graph
    finally:
        pipe.pipeline.unet = own
    assert abs(pixels(pipe(PICTURE, steps=2, seed=0)) - pixels(plain)).max() == 0


def test_pictures_come_as_they_are_made(pipe: ImagePromptPipeline) -> None:
    prepared = pipe.prepare(PICTURE, Settings(steps=2, num_images=3), batch_size=1)
    made = pipe.make(prepared)
    assert isinstance(next(made)[1], Image.Image)
    assert [number for number, _ in made] == [1, 2]
