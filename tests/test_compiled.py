"""The compiled base model: one graph for every prompt, scale, mask and seed, the same pixels, and a
second start that is quick.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

from imprompt.errors import SettingError
from imprompt.generation import compile as compiled
from imprompt.generation.memory import MemoryOptions
from imprompt.generation.pipeline import ImagePromptPipeline
from imprompt.generation.references import Reference
from tests.tiny import noise, noise_inputs, random_prompt, smallest_unet, tiny_adapter

STEPS = 2
RED, BLUE = (Image.new("RGB", (64, 64), name) for name in ("red", "blue"))


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_nothing_that_a_user_changes_compiles_again(counter: CompileCounterWithBackend) -> None:
    fast, plain = (
        ImagePromptPipeline.from_pretrained("emoji", device="cpu", compile=compile)
        for compile in (True, False)
    )
    calls: list[dict[str, Any]] = [
        {},
        {"prompt": "a panda", "negative_prompt": "a rocket"},
        {"scale": 0.4},
        {"seed": 9},
        {"image": BLUE},
        {"guidance": 5.0, "steps": 3},
        {"init_image": BLUE, "strength": 0.9},
    ]
    for call in calls:
        settings = {"image": RED, "steps": STEPS, "seed": 1, "num_images": 2} | call
        assert np.abs(pixels(fast(**settings).images) - pixels(plain(**settings).images)).max() <= 1
        assert counter.frame_count == 1


def test_nothing_that_references_say_compiles_again(counter: CompileCounterWithBackend) -> None:
    """Two regions, of which everything changes but that there are two."""
    fast, plain = (
        ImagePromptPipeline.from_pretrained("emoji", device="cpu", compile=compile)
        for compile in (True, False)
    )
    masks = [
        Image.linear_gradient("L"),
        Image.linear_gradient("L").rotate(90),
        Image.new("L", (5, 9), 100),
    ]
    said: list[dict[str, Any]] = [
        {},
        {"scale": 0.3, "mask": masks[2]},
        {"images": BLUE, "start": 0.1, "end": 0.7, "easing": "ease in"},
        {"blocks": {"up_blocks": 1.0, "*": 0.2}},
        {"negative": BLUE, "crop": "pad", "sharpening": 0.5},
        {"combine": "average", "images": [RED, BLUE], "weights": [1, 3]},
        {"embeds_scaling": "K+V"},
    ]
    for own in said:
        items = [
            Reference(**{"images": RED, "mask": masks[0]} | own),
            Reference(images=BLUE, mask=masks[1]),
        ]
        settings: dict[str, Any] = {"steps": STEPS, "seed": 1, "together": True, "num_images": 2}
        assert (
            np.abs(
                pixels(fast(items, **settings).images) - pixels(plain(items, **settings).images)
            ).max()
            <= 1
        )
        assert counter.frame_count == 1, own


def test_a_smaller_last_batch_is_filled_up(counter: CompileCounterWithBackend) -> None:
    fast, plain = (
        ImagePromptPipeline.from_pretrained("emoji", device="cpu", compile=compile)
        for compile in (True, False)
    )
    ours, theirs = (
        pipe([RED, BLUE, RED], steps=STEPS, seed=1, batch_size=2) for pipe in (fast, plain)
    )
    assert ours.seeds == theirs.seeds == [1, 2, 3]
    assert np.abs(pixels(ours.images) - pixels(theirs.images)).max() <= 1
    again = fast([RED, BLUE, RED], steps=STEPS, seed=1, batch_size=2, only=2)
    assert np.array_equal(pixels(again.images)[0], pixels(ours.images)[2])
    assert counter.frame_count == 1


@torch.no_grad()
def test_the_graph_projects_no_text(counter: CompileCounterWithBackend) -> None:
    """Of the linear layers that read text, none is left in it."""
    unet = smallest_unet()
    inputs = noise_inputs(unet, 2)
    with tiny_adapter(unet).attached(unet) as adapter:
        compiled.compile_base(unet)
        prompt = random_prompt(adapter, 2)
        for mask in (torch.ones(1, 3, 3), torch.rand(1, 3, 3), torch.rand(1, 3, 3)):
            noise(unet, inputs, prompt._replace(mask=mask))
    (graph,) = counter.graphs
    tokens = inputs["encoder_hidden_states"].shape[1]
    widths = [
        node.meta["example_value"].shape
        for node in graph.graph.nodes
        if node.target is torch._C._nn.linear
    ]
    assert len(widths) > 10
    assert not [shape for shape in widths if tokens in shape]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(compiled.CACHE, str(tmp_path))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, str(tmp_path / "no-compiler")))
    unet = smallest_unet()
    compiled.compile_base(unet)
    with (
        torch.no_grad(),
        pytest.raises(
            SettingError, match=r"needs a C\+\+ compiler, and none was found: install g\+\+, or"
        ),
    ):
        unet(**noise_inputs(unet, 1))
    torch._dynamo.reset()


@torch.no_grad()
def test_more_sizes_than_graphs_run_as_they_are(
    counter: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "GRAPHS", 1)
    unet, plain = smallest_unet(), smallest_unet()
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled.compile_base(unet)
        for batch in (2, 3, 1):
            torch.testing.assert_close(
                noise(unet, noise_inputs(unet, batch)), noise(plain, noise_inputs(plain, batch))
            )
    assert counter.frame_count == 1


def test_offload_is_not_compiled() -> None:
    pipe = ImagePromptPipeline.from_pretrained("emoji", device="cpu")
    savers = MemoryOptions("cuda", offload="model")
    with pytest.raises(
        SettingError,
        match="offload = 'model' moves weights, and what is compiled needs them in place: use one",
    ):
        ImagePromptPipeline(pipe.pipeline, pipe.first, compile=True, savers=savers)


STARTED = """
import sys, torch
sys.path.insert(0, ".")
from torch._dynamo.utils import counters
from imprompt.generation.compile import compile_base
from tests.tiny import noise, noise_inputs, random_prompt, smallest_unet, tiny_adapter
torch.set_num_threads(1)
unet = smallest_unet()
inputs = noise_inputs(unet, 2)
with torch.no_grad(), tiny_adapter(unet).attached(unet) as adapter:
    prompt = random_prompt(adapter, 2)
    expected = noise(unet, inputs, prompt)
    compile_base(unet)
    torch.testing.assert_close(noise(unet, inputs, prompt), expected, rtol=0, atol=1e-5)
print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_a_second_start_reads_what_the_first_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(compiled.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told = [
        subprocess.run(
            [sys.executable, "-c", STARTED], capture_output=True, text=True, check=True
        ).stdout.split()[-2:]
        for _ in range(2)
    ]
    assert told == [["1", "0"], ["0", "1"]]
    assert list((tmp_path / "imprompt" / "compiled").iterdir())
