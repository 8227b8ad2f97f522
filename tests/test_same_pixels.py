"""Every way to generate gives the pixels of the plain way, which projects text and image tokens at
every site in every step.

A new feature adds a row to `WAYS`: what is heard, and how the pipeline is run. Ways of other tools:
`tests.test_ecosystem`.
"""

from typing import Any

import pytest
import torch

from tests.tiny import UNETS
from tests.ways import SIZE, TWO, PromptSpec, Way, check_same_pixels, half


def alter_text(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """A pipeline's callback that changes the text between steps: once in place, once as another
    tensor.
    """
    if step == 0:
        tensors["prompt_embeds"][:, 2] += 0.5
    if step == 1:
        tensors["prompt_embeds"] = tensors["prompt_embeds"] * 0.9
    return tensors


def compiled(pipe: Any) -> Any:
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend="aot_eager", fullgraph=True)
    return pipe


def compiled_by_user(pipe: Any) -> Any:
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager", fullgraph=True)
    return pipe


WAYS = [
    Way("text", options=SIZE),
    Way("plus", [PromptSpec("plus", tokens=5)], options=SIZE),
    Way("no guidance", guidance=1.0, options=SIZE),
    Way("one prompt for all", [PromptSpec(alike=True)], options=SIZE),
    Way("many tokens", [PromptSpec(tokens=33)], options=SIZE),
    Way("oblong", TWO, options={"width": 24, "height": 40}),
    Way(
        "two adapters",
        [PromptSpec(), PromptSpec("plus", tokens=5, scale=0.3, seed=2)],
        options=SIZE,
    ),
    Way("two adapters in two regions", TWO, options=SIZE),
    Way("masked", [PromptSpec(mask=half(True))], options=SIZE),
    Way("block map", [PromptSpec(layers=(0.0, 1.0, 0.5))], options=SIZE),
    Way("window", [PromptSpec(window=(300, 800))], options=SIZE),
    Way("window and masks", [*TWO, PromptSpec(window=(500, 1000), seed=5)], options=SIZE),
    Way(
        "text altered between steps",
        options=SIZE
        | {
            "callback_on_step_end": alter_text,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        },
    ),
    Way(
        "compiled",
        [*TWO, PromptSpec(window=(500, 1000), seed=5)],
        options=SIZE,
        ready=compiled,
        pipelines=["sd1"],
        small=True,
    ),
    Way(
        "compiled from outside",
        TWO,
        options=SIZE,
        ready=compiled_by_user,
        pipelines=["sd1"],
        small=True,
    ),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_same_pixels_as_the_plain_way(base: str, way: Way) -> None:
    if base not in way.pipelines:
        pytest.skip("the other base shows it")
    assert base in UNETS
    check_same_pixels(base, way)
