"""FaceID against diffusers: the same weights, low-rank part included, give the same noise and the
same pixels.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from imprompt.adapter import IPAdapter
from imprompt.encoders.vision import VisionEncoder
from imprompt.prompt import ImagePrompt
from imprompt.variants import FACES, Variant, find_variant
from tests.parity.test_diffusers import run, set_their_scale, start, with_image
from tests.tiny import FACE_DIM, noise, noise_inputs, paper_layout, pictures, seeded, tiny_adapter
from tests.tiny_pipelines import PIPELINES

TOLERANCE = {"rtol": 0, "atol": 1e-5}
EFFECT = 1e-2  # what the parts of a prompt move the noise by, at least
ROWS = [row for row in FACES if not row.widened]  # Kolors' it cannot load


@dataclass
class Pair:
    """One pipeline twice: joined by our adapter, and by diffusers' with the same weights."""

    row: Variant
    adapter: IPAdapter
    ours: Any
    theirs: Any
    encoder: VisionEncoder

    def set_theirs(
        self,
        scale: float,
        *,
        shortcut: bool = False,
        states: Tensor | None = None,
        lora: float = 1.0,
    ) -> None:
        set_their_scale(self.theirs.unet, scale)
        (projection,) = self.theirs.unet.encoder_hid_proj.image_projection_layers
        if states is not None:  # these they pass as attributes
            projection.clip_embeds, projection.shortcut = states[:, None], shortcut
        if self.row.lora:
            self.theirs.set_adapters(["faceid_0"], [lora])


def two(row: Variant) -> tuple[Any, Any]:
    base = "sdxl" if row.name in ("portrait-unnorm", "faceid") else "sd1"
    return PIPELINES[base](), PIPELINES[base]()


def made(row: Variant) -> Pair:
    ours, theirs = two(row)
    adapter = tiny_adapter(ours.unet, row.name).attach(ours.unet)
    theirs.load_ip_adapter(
        paper_layout(adapter), subfolder="", weight_name="", low_cpu_mem_usage=False
    )
    theirs.unet.requires_grad_(False)
    return Pair(
        row, adapter, ours, theirs, VisionEncoder(ours.image_encoder, ours.feature_extractor)
    )


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def pair(request: pytest.FixtureRequest) -> Pair:
    return made(request.param)


def shown(row: Variant, faces: Tensor) -> Tensor:
    """As diffusers takes it: portrait-unnorm's resampler reads a sequence, here of one."""
    return faces[:, None] if row.name == "portrait-unnorm" else faces


def features_of(pair: Pair, count: int) -> tuple[Tensor, Tensor | None]:
    """Face embeddings (count, 20), and of the plus variants the hidden states of as many
    pictures.
    """
    with seeded(12):
        faces = torch.randn(count, FACE_DIM)
    return faces, pair.encoder.features(
        pictures(count), "penultimate"
    ) if pair.row.image_feature else None


def prompt_of(pair: Pair, faces: Tensor, states: Tensor | None, scale: float = 1.0) -> ImagePrompt:
    return pair.adapter.prompt(
        pair.adapter.tokens(faces if states is None else (faces, states)), scale=scale
    )


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_same_noise(pair: Pair, batch: int) -> None:
    faces, states = features_of(pair, batch)
    inputs = noise_inputs(pair.ours.unet, batch)
    results = {}
    for scale in (0.0, 0.7):
        pair.set_theirs(scale, shortcut=pair.row.name == "faceid-plus-v2", states=states)
        results[scale] = noise(pair.ours.unet, inputs, prompt_of(pair, faces, states, scale))
        torch.testing.assert_close(
            results[scale],
            noise(pair.theirs.unet, with_image(inputs, shown(pair.row, faces))),
            **TOLERANCE,
        )
    assert (results[0.7] - results[0.0]).abs().max() > EFFECT
    moved = (noise(pair.ours.unet, inputs) - results[0.0]).abs().max()  # by the low-rank part
    assert moved > EFFECT if pair.row.lora else moved == 0


@torch.no_grad()
def test_same_pixels(pair: Pair) -> None:
    """With guidance, from the face and what stands for none."""
    faces, states = features_of(pair, 1)
    nulls = (
        torch.zeros_like(faces),
        None if states is None else pair.encoder.null_features(find_variant("plus")),
    )
    both = torch.cat([nulls[0], faces])
    pair.set_theirs(
        0.8,
        shortcut=pair.row.name == "faceid-plus-v2",
        states=None if states is None or nulls[1] is None else torch.cat([nulls[1], states]),
    )
    tokens = [
        pair.adapter.tokens(face if state is None else (face, state))
        for face, state in ((faces, states), nulls)
    ]
    prompt = pair.adapter.prompt(*tokens, scale=0.8)
    ours = run(pair.ours, ["a cat"], start(1), cross_attention_kwargs={"ip_hidden_states": prompt})
    theirs = run(
        pair.theirs, ["a cat"], start(1), ip_adapter_image_embeds=[shown(pair.row, both)[:, None]]
    )
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert (ours - run(pair.ours, ["a cat"], start(1))).abs().max() > EFFECT


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_the_low_rank_part_at_another_strength(strength: float) -> None:
    ours, theirs = two(find_variant("faceid"))
    with tiny_adapter(ours.unet, "faceid").attached(ours.unet) as adapter:
        theirs.load_ip_adapter(
            paper_layout(adapter), subfolder="", weight_name="", low_cpu_mem_usage=False
        )
        theirs.set_adapters(["faceid_0"], [strength])
        adapter.low_rank.strength = strength
        with seeded(13):
            faces = torch.randn(2, FACE_DIM)
        inputs = noise_inputs(ours.unet, 2)
        conditioned = noise(ours.unet, inputs, adapter.prompt(adapter.tokens(faces)))
        torch.testing.assert_close(
            conditioned, noise(theirs.unet, with_image(inputs, faces)), **TOLERANCE
        )


@torch.no_grad()
def test_several_faces_of_one_prompt() -> None:
    """A portrait of one person by several pictures: their tokens beside each other."""
    ours, theirs = two(find_variant("portrait"))
    with tiny_adapter(ours.unet, "portrait").attached(ours.unet) as adapter:
        theirs.load_ip_adapter(
            paper_layout(adapter), subfolder="", weight_name="", low_cpu_mem_usage=False
        )
        with seeded(14):
            faces = torch.randn(2, 3, FACE_DIM)
        tokens = adapter.tokens(faces.flatten(0, 1)).unflatten(0, (2, 3)).flatten(1, 2)
        assert tokens.shape == (2, 21, 32)
        inputs = noise_inputs(ours.unet, 2)
        told = inputs.get("added_cond_kwargs", {}) | {"image_embeds": [faces]}
        theirs_noise = noise(theirs.unet, inputs | {"added_cond_kwargs": told})
        torch.testing.assert_close(
            noise(ours.unet, inputs, adapter.prompt(tokens)), theirs_noise, **TOLERANCE
        )


@torch.no_grad()
def test_strength_of_the_picture_beside_the_embedding() -> None:
    pair = made(find_variant("faceid-plus-v2"))
    faces, states = features_of(pair, 2)
    assert states is not None
    (projection,) = pair.theirs.unet.encoder_hid_proj.image_projection_layers
    for strength in (0.0, 0.5, 2.0):
        pair.set_theirs(1.0, shortcut=True, states=states)
        projection.shortcut_scale = strength
        tokens = pair.adapter.tokens((faces, states, torch.tensor(strength)))
        torch.testing.assert_close(tokens, projection(faces), **TOLERANCE)
    each = pair.adapter.tokens((faces, states, torch.tensor([2.0, 0.0])))
    torch.testing.assert_close(each[0], tokens[0], **TOLERANCE)
    torch.testing.assert_close(each[1], pair.adapter.projection.of_face(faces)[1], **TOLERANCE)
