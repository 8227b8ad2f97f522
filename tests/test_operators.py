"""How many operators a step has: the peers' numbers are known, ours has no more than text alone,
and what more prompts add.
"""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch

# the kernel is seen, not compiled; read when it is imported
os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks import operators
from benchmarks.implementations import IMPLEMENTATIONS, IMPROMPT, PEER, TEXT, scene
from benchmarks.operators import (
    BASE,
    BLOCKS,
    FUSED,
    LARGEST,
    LORA,
    MASKS,
    PLUS,
    TWO,
    WEIGHED,
    WINDOW,
    Case,
    Operators,
    counts,
    setting_of,
)
from benchmarks.setting import PromptedSetting
from benchmarks.transformer_models import OURS_AS_PEER
from benchmarks.transformer_models import PEER as TRANSFORMER_PEER

LAYERS = {"sd15": 16, "sdxl": 70}


@pytest.fixture(params=LAYERS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def base_of(model: str, precision: str) -> Any:
    return scene(setting_of(model, BASE, precision)).base


@cache
def counted(name: str, model: str, case: Case) -> dict[str, float]:
    return counts(name, model, case, base_of(model, "bf16" if name == FUSED else "fp32"))


def steps(name: str, model: str, case: Case) -> float:
    return counted(name, model, case)["operators"]


def test_peers(model: str) -> None:
    """As they were counted in another way, on a CPU at reduced width."""
    found = [steps(TEXT, model, BASE), steps(PEER, model, BASE), steps(PEER, model, PLUS)]
    assert found == {"sd15": [727, 809, 871], "sdxl": [1863, 2215, 2277]}[model]


def test_an_image_prompt_is_less_than_nothing(model: str) -> None:
    """A step projects queries alone: fewer operators, and less arithmetic, than text only.

    The first step projects the text.
    """
    text, found = counted(TEXT, model, BASE), counted(IMPROMPT, model, BASE)
    assert found["operators"] <= LARGEST[model]
    assert found["first"] - found["operators"] == 2 * LAYERS[model]
    assert found["flops"] < text["flops"]


@pytest.mark.parametrize(
    ("case", "more"),
    [(PLUS, 0), (TWO, 2), (MASKS, 2), (BLOCKS, 0), (WEIGHED, 0), (LORA, 3 * (4 + 2) - 1)],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_what_a_cross_attention_has_more(case: Case, more: int) -> None:
    """A low-rank part is two products and a sum for every projection that a step does, six of them
    in a transformer block; and our self-attention spares diffusers' division by 1.
    """
    assert steps(IMPROMPT, "sd15", case) == steps(IMPROMPT, "sd15", BASE) + more * LAYERS["sd15"]


def test_a_window_is_looked_up_once_a_step() -> None:
    assert steps(IMPROMPT, "sd15", WINDOW) - steps(IMPROMPT, "sd15", BASE) <= 3
    both = Case("two adapters, masks, time window", adapters=2, masks=True, window=True)
    # and multiplied by masks that were resized once
    assert steps(IMPROMPT, "sd15", both) - steps(IMPROMPT, "sd15", MASKS) <= 2 * 3 + 3 * 4


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernel_is_one_operator() -> None:
    """In place of three; low precision, which it needs, casts the timestep's embedding."""
    fused = steps(FUSED, "sd15", BASE)
    assert fused == steps(IMPROMPT, "sd15", BASE) - 2 * LAYERS["sd15"] + 1
    assert steps(FUSED, "sd15", MASKS) == fused


@pytest.mark.parametrize("name", [TEXT, PEER, IMPROMPT])
@torch.no_grad()
def test_width_and_contents_do_not_matter(name: str) -> None:
    of = scene(PromptedSetting("cpu", "sd15-narrow", 1, 128, "fp32"))
    of.base.requires_grad_(True)
    joined, timestep = IMPLEMENTATIONS[name](of), torch.tensor([5])
    joined(of.latents, timestep)
    assert operators.seen_by(Operators(), joined, of, timestep).count == steps(name, "sd15", BASE)


# what diffusers' adapter adds to a step, in which its image is projected anew
TRANSFORMER_PEERS = {
    "flux-tiny": 16,
    "sd3-tiny": 216,
    "pixart-tiny": None,
    "flux-dev": 135,
    "sd3.5-medium": 1008,
    "pixart-sigma": None,
}


@pytest.mark.parametrize(
    "model",
    [
        *(name for name in TRANSFORMER_PEERS if name.endswith("-tiny")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in operators.TRANSFORMERS),
    ],
)
def test_a_transformer_s_layer_has_the_attention_and_its_sum_more(model: str) -> None:
    """Nothing is added to a step but that, and nothing is left to its first one."""
    found = operators.transformer_counts(model)
    count, layers = found["counts"], found["layers"]
    text = count[TEXT]["operators"]
    assert count[IMPROMPT] == count[IMPROMPT] | {
        "operators": text + 2 * layers,
        "first": text + 2 * layers,
    }
    assert all(bar.met for bar in operators.transformer_bars(found))
    more = TRANSFORMER_PEERS[model]
    assert (TRANSFORMER_PEER in count) == (more is not None)
    if more is not None:
        assert count[TRANSFORMER_PEER]["operators"] - text == more
        assert count[IMPROMPT]["operators"] < count[TRANSFORMER_PEER]["operators"]
    if OURS_AS_PEER in count:  # XLabs' is for the double blocks alone
        form = {"flux-tiny": 2, "flux-dev": 19}[model]
        assert count[OURS_AS_PEER]["operators"] - text == 3 * form  # the block sums a third part


def test_the_table_of_transformers() -> None:
    one = {"operators": 10, "first": 10, "flops": 2e12}
    row = {"model": "flux-dev", "layers": 4, "rows": 1}
    more = one | {"operators": 18, "flops": 2.01e12}
    made = operators.transformer_table([row | {"counts": {TEXT: one, IMPROMPT: more}}])
    assert (
        "| flux-dev, 4 layers, batch 1 | ours | 18 | +8 (2.00 a layer) | 2.010 (+0.50%) |" in made
    )
