"""Memory savers: the same pixels under offload, near ones with weights in 8 bits, and one line for
what cannot be done.
"""

import copy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from imprompt.checkpoints.adapters import build_adapter, read_adapter
from imprompt.encoders.matching import load_encoder
from imprompt.errors import SettingError
from imprompt.families.base import family_of
from imprompt.families.published import SD1, SD2, SDXL
from imprompt.generation.features import Reader
from imprompt.generation.memory import (
    GROUP,
    OFFLOADS,
    QUANTIZERS,
    MemoryOptions,
    quantizable,
    quantize,
    visit,
)
from imprompt.generation.pipeline import ImagePromptPipeline
from imprompt.generation.prepare import Attached
from imprompt.generation.tasks import as_pipeline
from imprompt.images import open_image
from imprompt.models import PACKAGED, find_adapter, find_model, open_pipeline
from tests.tiny import noise, noise_inputs, random_prompt, tiny_adapter, tiny_unet

# of the largest noise: rounding of the matrices through a whole UNet
NEAR = {"int8": 0.02, "fp8": 0.06}
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="offload needs a GPU")


def opened(savers: MemoryOptions) -> ImagePromptPipeline:
    """The packaged model with `savers`, in float32."""
    known = find_model("emoji")
    path, told, *_ = find_adapter(known, None)
    file = read_adapter(path)
    encoder: Any = load_encoder(file, told, known, None, savers.device, torch.float32)
    savers.offload_encoder(encoder.model)
    pipeline = open_pipeline(known, savers.opens_on)
    savers.quantize_and_tile(pipeline)
    adapter = build_adapter(file, family_of(pipeline.unet)).attach(pipeline.unet)
    savers.place(pipeline, adapter)
    return ImagePromptPipeline(
        pipeline, Attached(adapter, Reader(encoder, file.variant)), model=known
    )


def made(pipe: ImagePromptPipeline, **options: Any) -> np.ndarray:
    settings = {"prompt": "a rocket", "seed": 3, "steps": 2, "num_images": 2}
    return np.stack(
        [np.asarray(image) for image in pipe(demo(), **settings, **options).images]
    ).astype(int)


def demo() -> Image.Image:
    return open_image(PACKAGED / "emoji" / "demo.png")


@pytest.fixture(scope="module")
def plain() -> ImagePromptPipeline:
    return opened(MemoryOptions("cpu"))


def test_pixels_under_model_offload_are_the_same(plain: ImagePromptPipeline) -> None:
    # not through `check`: here a CPU stands for the GPU
    pipe = opened(MemoryOptions("cpu", offload="model"))
    expected = made(plain)
    assert (made(pipe) == expected).all()
    assert (made(pipe) == expected).all()  # a second call starts from what the first one left
    assert hasattr(pipe.pipeline.unet, "_hf_hook")


def test_pixels_under_sequential_offload_are_the_same(plain: ImagePromptPipeline) -> None:
    pipe = opened(MemoryOptions("cpu"))
    for part in pipe.pipeline.components.values():
        if isinstance(part, nn.Module):
            # as diffusers does, which takes no CPU for the GPU
            cpu_offload(part, torch.device("cpu"))
    expected = made(plain)
    assert (made(pipe) == expected).all()
    assert (made(pipe) == expected).all()
    assert {weight.device.type for weight in pipe.pipeline.unet.parameters()} == {"meta"}


def test_tasks_share_one_offload(plain: ImagePromptPipeline) -> None:
    savers = MemoryOptions("cpu", offload="model")
    pipe = opened(savers)
    other = as_pipeline(pipe.pipeline, "image", None, savers)
    savers.again(other)
    expected = made(plain, init_image=demo())
    assert (made(pipe, init_image=demo()) == expected).all()
    assert (made(pipe) == made(plain)).all()
    other("", image=demo(), num_inference_steps=2)
    assert {id(hook.model) for hook in other._all_hooks} == {
        id(hook.model) for hook in pipe.pipeline._all_hooks
    }


def test_a_visitor_leaves_after_its_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(4, 3).requires_grad_(False)
    expected, moves = layer(torch.ones(4)), []
    visit(layer, "cpu")
    move = layer.to
    monkeypatch.setattr(layer, "to", lambda device: moves.append(str(device)) or move(device))
    assert torch.equal(layer(torch.ones(4)), expected)
    assert moves[-1] == "cpu"
    moves.clear()
    with pytest.raises(RuntimeError):
        layer(torch.ones(5))
    assert moves[-1] == "cpu"  # after an error too


def test_tiling_cuts_large_pictures_only(plain: ImagePromptPipeline) -> None:
    pipe = opened(MemoryOptions("cpu", tiling=True))
    vae = pipe.pipeline.vae
    assert (vae.use_tiling, vae.use_slicing) == (True, True)
    assert np.abs(made(pipe) - made(plain)).max() <= 1  # one tile each: slices only round otherwise
    tiles: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda _, args: tiles.append(args[0].shape[-1]))
    made(pipe, width=160, height=160)
    assert max(tiles) <= vae.tile_latent_min_size < 160 // pipe.pipeline.vae_scale_factor


def near(how: str, offload: Callable[[nn.Module], object] | None = None) -> tuple[Tensor, Tensor]:
    """Two noise predictions (2, B, C, h, w) of a UNet with its matrices as `how`, and the plain
    UNet's.
    """
    unet = tiny_unet("sdxl")
    inputs, prompt = (
        noise_inputs(unet, 2),
        random_prompt(tiny_adapter(unet).attach(unet), 2, scale=0.7),
    )
    light = tiny_unet("sdxl")
    quantize(light, how)
    tiny_adapter(unet).attach(light)
    if offload is not None:
        offload(light)
    with torch.no_grad():
        return torch.stack([noise(light, inputs, prompt) for _ in range(2)]), noise(
            unet, inputs, prompt
        )


@needs_torchao
@pytest.mark.parametrize("how", QUANTIZERS)
def test_noise_of_8_bits_is_near(how: str) -> None:
    (first, again), plain = near(how)
    assert 0 < (first - plain).abs().max() < NEAR[how] * plain.abs().max()
    assert torch.equal(first, again)


@needs_torchao
@pytest.mark.parametrize("how", QUANTIZERS)
def test_8_bits_are_offloaded_too(how: str) -> None:
    expected = near(how)[0]
    assert torch.equal(near(how, lambda unet: cpu_offload_with_hook(unet, "cpu"))[0], expected)
    assert torch.equal(near(how, lambda unet: cpu_offload(unet, torch.device("cpu")))[0], expected)


@needs_torchao
@pytest.mark.parametrize("how", QUANTIZERS)
def test_pictures_of_8_bits_are_near(how: str, plain: ImagePromptPipeline) -> None:
    difference = np.abs(made(opened(MemoryOptions.check("cpu", quantize=how))) - made(plain))
    assert 0 < difference.mean() < 2


@needs_torchao
def test_which_matrices_are_kept_in_8_bits() -> None:
    unet = tiny_unet("sdxl")
    before = {
        name: module.weight
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear)
    }
    quantize(unet, "int8")
    changed = {
        name for name, weight in before.items() if unet.get_submodule(name).weight is not weight
    }
    assert changed == {
        name
        for name, weight in before.items()
        if "attentions" in name and weight.shape[1] % GROUP == 0
    }
    assert {name.rpartition(".")[2] for name in changed} >= {"to_q", "to_k", "to_v"}
    assert not any("time" in name for name in changed)
    for name in changed:
        kept: Any = unet.get_submodule(name).weight
        assert kept.dtype == torch.float32  # what it computes in
        assert kept.qdata.dtype == torch.int8
        assert (kept.dequantize() - before[name]).abs().max() <= before[name].abs().max() / 127


def test_published_widths_fit_the_groups() -> None:
    for structure, share in ((SD1, 0.28), (SD2, 0.32), (SDXL, 0.86)):
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel(**structure)
        matrices = {
            name: m
            for name, m in unet.named_modules()
            if isinstance(m, nn.Linear) and "attentions" in name
        }
        light = sum(module.weight.numel() for _, module in quantizable(unet))
        assert light == sum(module.weight.numel() for module in matrices.values())
        assert light / sum(weight.numel() for weight in unet.parameters()) == pytest.approx(
            share, abs=0.005
        )


@needs_torchao
@pytest.mark.parametrize("how", QUANTIZERS)
def test_float16_does_not_overflow(how: str) -> None:
    """Products of int8 weights that are not scaled would: up to 1280 × 200 × 127, where 65504 is
    the largest.
    """
    block = nn.ModuleDict({"attentions": nn.Linear(1280, 8, dtype=torch.float16)}).requires_grad_(
        False
    )
    from torchao.quantization import quantize_

    layer: Any = block["attentions"]
    pixels = 200 * layer.weight[:1].sign()
    light = copy.deepcopy(block)
    quantize_(light, QUANTIZERS[how]())
    torch.testing.assert_close(light["attentions"](pixels), layer(pixels), rtol=0.02, atol=20)


@pytest.mark.parametrize(
    ("savers", "said"),
    [
        ({"device": "cuda", "offload": "disk"}, "unknown offload 'disk'; known: model, sequential"),
        ({"device": "cpu", "quantize": "int4"}, "unknown quantize 'int4'; known: int8, fp8"),
        (
            {"device": "cpu", "offload": "model"},
            "spares a GPU's memory; the device here is cpu: leave it out",
        ),
    ],
)
def test_mistakes_are_reported_in_one_line(savers: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said) as error:
        MemoryOptions.check(**savers)
    assert "\n" not in str(error.value)


@needs_torchao
def test_a_device_that_cannot_is_reported() -> None:
    with pytest.raises(
        SettingError, match=r"quantize = 'fp8' does not work on meta .*: try 'int8'"
    ):
        MemoryOptions.check("meta", quantize="fp8")
    assert MemoryOptions.check("cpu", quantize="fp8").opens_on == "cpu"


def test_missing_torchao_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(SettingError, match=r"needs torchao: pip install 'imprompt\[quantized\]'"):
        MemoryOptions.check("cpu", quantize="int8")


@needs_gpu
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload_on_a_gpu(offload: str) -> None:
    expected = made(opened(MemoryOptions("cuda")))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    pipe = opened(MemoryOptions.check("cuda", offload=offload))
    assert torch.cuda.memory_allocated() - before < 2**20  # nothing waits there
    for _ in range(2):
        assert np.abs(made(pipe) - expected).max() <= 1
        parts = [
            pipe.first.adapter,
            pipe.first.reader.encoder.model,
            pipe.pipeline.unet,
            pipe.pipeline.vae,
        ]
        assert not any(weight.is_cuda for part in parts for weight in part.parameters())


@needs_gpu
@needs_torchao
@pytest.mark.parametrize("how", QUANTIZERS)
@pytest.mark.parametrize("offload", [None, *OFFLOADS])
def test_8_bits_on_a_gpu(how: str, offload: str | None) -> None:
    pipe, plain = (
        opened(MemoryOptions.check("cuda", offload, quantize=how)),
        opened(MemoryOptions("cuda")),
    )
    assert np.abs(made(pipe) - made(plain)).mean() < 8
    assert (made(pipe) == made(pipe)).all()
