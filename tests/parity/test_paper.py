"""imprompt against the paper's own package (`ip-adapter` 0.1.0): the same weights give the same
noise, and its files are ours.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.checkpoints.adapters import load_adapter
from imprompt.encoders.vision import VisionEncoder
from imprompt.projections.resampler import HEAD_DIM, Resampler
from imprompt.variants import VARIANTS, Variant, find_variant
from tests.tiny import (
    FEATURE_DIMS,
    noise,
    noise_inputs,
    paper_layout,
    pictures,
    seeded,
    smallest_unet,
    tiny_adapter,
)

TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def paper() -> Iterator[ModuleType]:
    """The paper's package. It reads a name that current diffusers no longer has.

    That name is there during the tests only.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "diffusers.pipelines.controlnet.MultiControlNetModel",
            MultiControlNetModel,
            raising=False,
        )
        yield importlib.import_module("ip_adapter.ip_adapter")


def their_projection(paper: ModuleType, name: str, weights: dict[str, Tensor]) -> nn.Module:
    """The paper's class for that variant, in the sizes of `weights`."""
    if name == "base":
        rows, embedding = weights["proj.weight"].shape
        width = len(weights["norm.weight"])
        return paper.ImageProjModel(width, embedding, rows // width)
    if name == "full":
        return paper.MLPProjModel(*weights["proj.2.weight"].shape)
    depth = sum(key.endswith(".0.to_q.weight") for key in weights)
    _, tokens, width = weights["latents"].shape
    heads = len(weights["layers.0.0.to_q.weight"]) // HEAD_DIM
    output, embedding = len(weights["norm_out.weight"]), weights["proj_in.weight"].shape[1]
    ratio = len(weights["layers.0.1.1.weight"]) / width
    return paper.Resampler(width, depth, HEAD_DIM, heads, tokens, embedding, output, ratio)


def graft_theirs(paper: ModuleType, model: UNet2DConditionModel, tokens: int) -> nn.ModuleList:
    """The paper's graft by its own code, which knows half precision only -> its processors in
    single precision.
    """
    stand_in = SimpleNamespace(pipe=SimpleNamespace(unet=model), device="cpu", num_tokens=tokens)
    paper.IPAdapter.set_ip_adapter(stand_in)
    return nn.ModuleList(model.attn_processors.values()).float()


def load_theirs(
    paper: ModuleType, model: UNet2DConditionModel, projection: nn.Module, file: Path
) -> None:
    """The paper's own reader of its own files; it loads strictly."""
    paper.IPAdapter.load_ip_adapter(
        SimpleNamespace(pipe=SimpleNamespace(unet=model), ip_ckpt=file, image_proj_model=projection)
    )


def save_paper(adapter: IPAdapter, file: Path) -> dict[str, dict[str, Tensor]]:
    groups = paper_layout(adapter)
    save_file(
        {
            f"{group}.{key}": value
            for group, weights in groups.items()
            for key, value in weights.items()
        },
        file,
    )
    return groups


@torch.no_grad()
@pytest.mark.parametrize("row", VARIANTS, ids=lambda row: row.name)
def test_same_noise(
    paper: ModuleType,
    unet: UNet2DConditionModel,
    encoder: VisionEncoder,
    row: Variant,
    tmp_path: Path,
) -> None:
    adapter = tiny_adapter(unet, row.name)
    weights = save_paper(adapter, tmp_path / "adapter.safetensors")
    features = torch.cat([encoder.null_features(row), encoder.features(pictures(2), row.feature)])
    inputs = noise_inputs(unet, 3)
    with adapter.attached(unet):
        prompt = adapter.prompt(adapter.tokens(features))
        ours = {scale: noise(unet, inputs, prompt.with_scale(scale)) for scale in (0.0, 0.3, 1.0)}

    projection = their_projection(paper, row.name, weights["image_proj"])
    processors = graft_theirs(paper, unet, adapter.tokens(features).shape[1])
    load_theirs(paper, unet, projection, tmp_path / "adapter.safetensors")
    tokens = projection(features)
    torch.testing.assert_close(adapter.tokens(features), tokens, **TOLERANCE)
    joined = inputs | {
        "encoder_hidden_states": torch.cat([inputs["encoder_hidden_states"], tokens], 1)
    }
    for scale, expected in ours.items():
        for processor in processors:
            processor.scale = scale
        torch.testing.assert_close(expected, noise(unet, joined), **TOLERANCE)


@pytest.mark.parametrize("row", VARIANTS, ids=lambda row: row.name)
def test_same_keys_and_shapes(paper: ModuleType, unet: UNet2DConditionModel, row: Variant) -> None:
    ours = paper_layout(tiny_adapter(unet, row.name))
    theirs = {
        "image_proj": their_projection(paper, row.name, ours["image_proj"]).state_dict(),
        "ip_adapter": graft_theirs(paper, unet, 4).state_dict(),
    }
    for group, weights in theirs.items():
        assert {key: weight.shape for key, weight in weights.items()} == {
            key: weight.shape for key, weight in ours[group].items()
        }


@torch.no_grad()
@given(
    depth=st.integers(1, 6),
    tokens=st.integers(1, 9),
    heads=st.integers(1, 3),
    patches=st.integers(1, 12),
    extra=st.integers(0, 40),
)
def test_same_resampler(
    paper: ModuleType, depth: int, tokens: int, heads: int, patches: int, extra: int
) -> None:
    """Whatever the depth and sizes, its inner width different from the heads' included."""
    with seeded(depth):
        ours = Resampler(
            24,
            40,
            tokens=tokens,
            width=32 + extra,
            inner=heads * HEAD_DIM,
            hidden=3 * (32 + extra),
            depth=depth,
        )
        features = torch.randn(2, patches, 24)
    weights = ours.state_dict()
    theirs = their_projection(paper, "plus", weights)
    theirs.load_state_dict(weights)
    torch.testing.assert_close(ours(features), theirs(features), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["base", "plus"])
def test_sizes_that_other_loaders_get_wrong(
    paper: ModuleType, encoder: VisionEncoder, name: str, tmp_path: Path
) -> None:
    """From the file: a base adapter of 8 tokens, a resampler of 6 layers, none of which may be
    dropped in silence.
    """
    unet, row = smallest_unet(), find_variant(name)
    with seeded(8):
        wide = FEATURE_DIMS[row.feature]
        projection = (
            ImageProjection(wide, 32, 8)
            if name == "base"
            else Resampler(wide, 32, tokens=5, width=64, depth=6)
        )
        adapter = IPAdapter.for_model(unet, projection)
    weights = save_paper(adapter, tmp_path / "adapter.safetensors")
    loaded = load_adapter(tmp_path / "adapter.safetensors", unet)
    features, inputs = encoder.features(pictures(2), row.feature), noise_inputs(unet, 2)
    with loaded.attached(unet):
        ours = noise(unet, inputs, loaded.prompt(loaded.tokens(features)))

    theirs = their_projection(paper, name, weights["image_proj"])
    graft_theirs(paper, unet, 8 if name == "base" else 5)
    load_theirs(paper, unet, theirs, tmp_path / "adapter.safetensors")
    joined = inputs | {
        "encoder_hidden_states": torch.cat([inputs["encoder_hidden_states"], theirs(features)], 1)
    }
    torch.testing.assert_close(ours, noise(unet, joined), **TOLERANCE)
