"""Fixtures that several test files share; the models come from `tests.tiny`."""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import settings
from torch._dynamo.testing import CompileCounterWithBackend

from imprompt.encoders.vision import VisionEncoder
from imprompt.generation import compile as compiled
from tests.tiny import UNETS, tiny_encoder, tiny_unet

# tiny models: threads would only wait for each other, far longer on a busy machine
torch.set_num_threads(1)

settings.register_profile("imprompt", deadline=None, max_examples=12, derandomize=True)
settings.load_profile("imprompt")


@pytest.fixture(params=UNETS)
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    """A fresh base model of each structure."""
    return tiny_unet(request.param)


@pytest.fixture(scope="session")
def encoder() -> VisionEncoder:
    return tiny_encoder()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention kernel runs, without a GPU in Triton's interpreter."""
    from tests.interpreted import interpret

    interpret(monkeypatch)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[CompileCounterWithBackend]:
    """Counts compilations; nothing is generated, as that would take a minute."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setenv(compiled.CACHE, str(tmp_path))
    yield counter
    torch._dynamo.reset()
