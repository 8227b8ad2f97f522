"""FaceID against the paper's own package (`ip-adapter` 0.1.0), and where that has no class, against
its own layers put together.
"""

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from imprompt.projections.mlp import FaceProjection
from imprompt.projections.resampler import (
    HEAD_DIM,
    FacePlusProjection,
    FacePlusV2Projection,
    Resampler,
)
from tests.parity.test_paper import paper, their_projection
from tests.tiny import (
    FACE_DIM,
    noise,
    noise_inputs,
    paper_layout,
    seeded,
    smallest_unet,
    tiny_adapter,
    tiny_unet,
)

__all__ = ["paper"]  # the fixture
# the paper's package uses it
pytestmark = pytest.mark.filterwarnings("ignore:.LoRALinearLayer. is deprecated:FutureWarning")
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def faceid(paper: ModuleType) -> ModuleType:
    """Its module of FaceID; `paper` makes it importable."""
    import importlib

    assert paper
    return importlib.import_module("ip_adapter.ip_adapter_faceid")


def save_paper(groups: dict[str, dict[str, Tensor]], file: Path) -> None:
    save_file(
        {
            f"{group}.{key}": value
            for group, weights in groups.items()
            for key, value in weights.items()
        },
        file,
    )


@torch.no_grad()
@pytest.mark.parametrize("base", ["sd1", "sdxl", "smallest"])
def test_same_noise(faceid: ModuleType, base: str, tmp_path: Path) -> None:
    """The face's tokens and the low-rank parts, read by the paper's code from the file that it
    takes.
    """
    unet: UNet2DConditionModel = (
        smallest_unet() if base == "smallest" else tiny_unet(base, cross_attention_dim=32)
    )
    adapter = tiny_adapter(unet, "faceid")
    save_paper(paper_layout(adapter), tmp_path / "faceid.safetensors")
    with seeded(1):
        faces = torch.cat([torch.zeros(1, FACE_DIM), torch.randn(2, FACE_DIM)])
    inputs = noise_inputs(unet, 3)
    unconditioned = noise(unet, inputs)
    with adapter.attached(unet):
        prompt = adapter.prompt(adapter.tokens(faces))
        ours = {scale: noise(unet, inputs, prompt.with_scale(scale)) for scale in (0.0, 0.7)}

    projection = faceid.MLPProjModel(32, FACE_DIM, 4)
    theirs = SimpleNamespace(
        pipe=SimpleNamespace(unet=unet),
        device="cpu",
        num_tokens=4,
        lora_rank=3,
        image_proj_model=projection,
        ip_ckpt=tmp_path / "faceid.safetensors",
    )
    faceid.IPAdapterFaceID.set_ip_adapter(theirs)
    processors = nn.ModuleList(unet.attn_processors.values()).float()
    faceid.IPAdapterFaceID.load_ip_adapter(theirs)
    tokens = projection(faces)
    torch.testing.assert_close(adapter.tokens(faces), tokens, **TOLERANCE)
    joined = inputs | {
        "encoder_hidden_states": torch.cat([inputs["encoder_hidden_states"], tokens], 1)
    }
    for scale, expected in ours.items():
        for processor in processors:
            processor.scale = scale
        torch.testing.assert_close(expected, noise(unet, joined), **TOLERANCE)
        assert (expected - unconditioned).abs().max() > 1e-2
    assert (ours[0.0] - ours[0.7]).abs().max() > 1e-2


def test_same_keys_and_shapes(faceid: ModuleType) -> None:
    unet = smallest_unet()
    ours = paper_layout(tiny_adapter(unet, "faceid"))
    theirs = SimpleNamespace(
        pipe=SimpleNamespace(unet=unet), device="cpu", num_tokens=4, lora_rank=3
    )
    faceid.IPAdapterFaceID.set_ip_adapter(theirs)
    expected = {
        "image_proj": faceid.MLPProjModel(32, FACE_DIM, 4).state_dict(),
        "ip_adapter": nn.ModuleList(unet.attn_processors.values()).state_dict(),
    }
    for group, weights in expected.items():
        assert {key: weight.shape for key, weight in weights.items()} == {
            key: weight.shape for key, weight in ours[group].items()
        }


@torch.no_grad()
@given(tokens=st.integers(1, 16), token_dim=st.integers(2, 40), face_dim=st.integers(1, 30))
def test_same_face_tokens(faceid: ModuleType, tokens: int, token_dim: int, face_dim: int) -> None:
    """faceid has 4, portrait 16."""
    with seeded(tokens):
        ours, faces = FaceProjection(face_dim, token_dim, tokens), torch.randn(3, face_dim)
    theirs = faceid.MLPProjModel(token_dim, face_dim, tokens)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(faces), theirs(faces), **TOLERANCE)


def their_plus(paper: ModuleType, faceid: ModuleType, weights: dict[str, Tensor]) -> Any:
    """faceid-plus of the paper's own layers -> a function (face, states, shortcut, scale) ->
    tokens.
    """
    prefix = "perceiver_resampler."
    face = {key: weight for key, weight in weights.items() if not key.startswith(prefix)}
    token_dim = len(face["norm.weight"])
    mlp = faceid.MLPProjModel(
        token_dim, face["proj.0.weight"].shape[1], len(face["proj.2.weight"]) // token_dim
    )
    mlp.load_state_dict(face)
    reader = {
        key.removeprefix(prefix): weight
        for key, weight in weights.items()
        if key.startswith(prefix)
    }
    resampler = their_projection(paper, "plus", reader | {"latents": torch.zeros(1, 1, token_dim)})
    resampler.load_state_dict(reader | {"latents": torch.zeros(1, 1, token_dim)})

    def tokens(faces: Tensor, states: Tensor, shortcut: bool, scale: float) -> Tensor:
        queries = own = mlp(faces)
        patches = resampler.proj_in(states)
        for attention, feed in resampler.layers:
            queries = attention(patches, queries) + queries
            queries = feed(queries) + queries
        read = resampler.norm_out(resampler.proj_out(queries))
        return own + scale * read if shortcut else read

    return tokens


@torch.no_grad()
@given(
    depth=st.integers(1, 6),
    tokens=st.integers(1, 8),
    heads=st.integers(1, 3),
    scale=st.floats(0, 2),
)
def test_same_plus_tokens(
    paper: ModuleType, faceid: ModuleType, depth: int, tokens: int, heads: int, scale: float
) -> None:
    """Versions 1 and 2, Kolors' too: any depth, number of tokens (Kolors' 6) and inner width."""
    with seeded(depth):
        one = FacePlusProjection(
            24, 40, face_dim=10, tokens=tokens, inner=heads * HEAD_DIM, depth=depth
        )
        faces, states = torch.randn(2, 10), torch.randn(2, 7, 24)
    two = FacePlusV2Projection.from_shapes(
        {key: tuple(weight.shape) for key, weight in one.state_dict().items()}
    )
    two.load_state_dict(one.state_dict())
    theirs = their_plus(paper, faceid, one.state_dict())
    torch.testing.assert_close(one(faces, states), theirs(faces, states, False, 1.0), **TOLERANCE)
    torch.testing.assert_close(two(faces, states), theirs(faces, states, True, 1.0), **TOLERANCE)
    torch.testing.assert_close(
        two(faces, states, scale), theirs(faces, states, True, scale), **TOLERANCE
    )


@torch.no_grad()
def test_same_resampler_of_a_face(paper: ModuleType) -> None:
    """portrait-unnorm: the embedding is the resampler's only patch."""
    with seeded(2):
        ours, faces = Resampler(FACE_DIM, 40, tokens=16, width=64), torch.randn(3, FACE_DIM)
    theirs = their_projection(paper, "plus", ours.state_dict())
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(faces), theirs(faces[:, None]), **TOLERANCE)
