"""The emoji world's baselines of the adapter, and how its claims are judged and written.

No font is needed.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft", reason="diffusers loads LoRAs through it")

from imprompt.evaluation.metrics import Interval
from imprompt.families.published import base_structure
from imprompt.models import MODELS
from studies.emoji.baselines import (
    BASELINES,
    Base,
    Conditioned,
    ImageFeatures,
    budget,
    file_of,
    load,
    operations,
    sample,
    warped,
)
from studies.emoji.harness import Claim, Harness, Table, digest, in_parts
from studies.emoji.measures import Classifier, embed_pictures, embed_texts, metric_encoder
from studies.emoji.page import anchor
from worlds.emoji.train_utils import World

SIDE = base_structure(MODELS["emoji"]).side


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(World("cpu", tmp_path_factory.mktemp("world"), device="cpu"))


@pytest.fixture(params=BASELINES)
def method(base: Base, request: pytest.FixtureRequest) -> Iterator[Conditioned]:
    torch.manual_seed(0)
    built = BASELINES[request.param].build(base)
    yield built
    if hasattr(built, "adapter"):
        built.adapter.detach()


def inputs(base: Base) -> tuple[Tensor, Tensor, Tensor, ImageFeatures]:
    generator = torch.Generator().manual_seed(1)
    patches = torch.rand(2, 3, 4, 4, generator=generator) * torch.tensor([0.2, 1.0]).view(
        2, 1, 1, 1
    )
    pictures = torch.nn.functional.interpolate(patches, (SIDE, SIDE))
    x = torch.randn(
        2, 4, base.unet.config.sample_size, base.unet.config.sample_size, generator=generator
    )
    return (
        x,
        torch.tensor([300, 800]),
        base.encode_texts(["a cow", ""]),
        base.encode_images(pictures),
    )


def test_every_baseline_learns_and_the_base_does_not(base: Base, method: Conditioned) -> None:
    x, t, text, image = inputs(base)
    before = {name: weight.clone() for name, weight in base.unet.state_dict().items()}
    method(x, t, text, image).square().mean().backward()
    assert sum(float(p.grad.abs().sum()) for p in method.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in base.unet.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in base.unet.state_dict().items())
    assert not any(name.startswith("base") for name in method.state_dict())


def test_the_picture_is_applied(base: Base, method: Conditioned) -> None:
    if type(method).__name__ == "Shuffle":  # its last layers start at zero
        for layer in (*method.net.controlnet_down_blocks, method.net.controlnet_mid_block):
            torch.nn.init.normal_(layer.weight, std=0.1)
    x, t, text, image = inputs(base)
    with torch.no_grad():
        one, other = method(x, t, text, image), method(x, t, text, image[[1, 0]])
    assert (one - other).abs().amax((1, 2, 3)).min() > 1e-4


SILENT = {
    "decoupled": True,
    "decoupled, plus": True,
    "simple": False,
    "T2I style": False,
    "ControlNet shuffle": True,
}


@pytest.mark.parametrize("name", SILENT)
def test_scale_0_is_the_base_only_where_image_tokens_do_not_stand_in_the_texts_softmax(
    base: Base, name: str
) -> None:
    method, (x, t, text, image) = BASELINES[name].build(base), inputs(base)
    with torch.no_grad():
        plain = base.unet(x, t, text, return_dict=False)[0]
        assert torch.equal(method(x, t, text, image, 0.0), plain) == SILENT[name]
    if hasattr(method, "adapter"):
        method.adapter.detach()


def test_no_picture_is_the_base_under_shuffle(base: Base) -> None:
    method, (x, t, text, image) = BASELINES["ControlNet shuffle"].build(base), inputs(base)
    torch.nn.init.normal_(method.net.controlnet_mid_block.weight)
    with torch.no_grad():
        plain, conditioned = base.unet(x, t, text, return_dict=False)[0], method(x, t, text, image)
        assert torch.equal(method(x, t, text, image.where(torch.tensor([False, False]))), plain)
    assert not torch.equal(conditioned, plain)


def test_a_whole_fine_tuning_costs_more_than_the_adapter(base: Base) -> None:
    cost = {name: operations(base, BASELINES[name]) for name in ("decoupled", "tuned")}
    assert 0.5 < cost["decoupled"] / cost["tuned"] < 0.9


def test_a_saved_baseline_draws_what_it_drew(base: Base) -> None:
    from safetensors.torch import save_file

    method = BASELINES["simple"].build(base)
    place: Path = file_of(base.world, "simple")
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.half().float() for key, value in method.state_dict().items()},
        place,
        {"steps": "5"},
    )
    assert budget(base.world, "simple") == (
        sum(value.numel() for value in method.state_dict().values()),
        160,
    )
    method.load_state_dict(
        {key: value.half().float() for key, value in method.state_dict().items()}
    )
    text, image = base.encode_texts(["", ""]), inputs(base)[3]
    one, other = (
        sample(base, m, text, image, steps=2) for m in (method, load(base.world, base, "simple"))
    )
    assert torch.equal(one, other)
    assert one.shape == (2, 3, SIDE, SIDE)
    assert 0 <= one.min() <= one.max() <= 1


def test_what_was_drawn_is_kept_until_what_it_comes_from_changes(
    base: Base, tmp_path: Path
) -> None:
    drawn, weights = [], tmp_path / "weights" / "unet.json"
    weights.parent.mkdir()
    weights.write_text("one")
    harness: Harness = object.__new__(Harness)  # no font is needed for this
    harness.world, harness.drawn = base.world, {}

    def draw(prompts: Tensor, _: object, scale: float) -> Tensor:
        drawn.append(scale)
        return (prompts * scale).to(memory_format=torch.channels_last)  # as the models give them

    prompts = torch.rand(2, 3, 8, 8)
    cached = harness.cached(draw, weights.parent, "plus")
    assert torch.allclose(cached(prompts, ["", ""], 0.5), prompts / 2, atol=1 / 255)
    assert torch.equal(
        cached(prompts, ["", ""], 0.5),
        harness.cached(draw, weights.parent, "plus")(prompts, ("", ""), 0.5),
    )
    assert drawn == [0.5]
    cached(prompts, ["", "a cow"], 0.5)
    cached(prompts[[1, 0]], ["", ""], 0.5)
    harness.cached(draw, weights.parent, "base")(prompts, ["", ""], 0.5)
    weights.write_text("two")
    harness.cached(draw, weights.parent, "plus")(prompts, ["", ""], 0.5)
    assert len(drawn) == len(harness.drawn) == 5
    assert digest(weights) == digest(weights.parent) != digest(prompts)


def test_warping_moves_content_and_keeps_colours() -> None:
    halves = torch.zeros(1, 3, 32, 32)
    halves[..., 16:] = 1
    moved = warped(halves)
    assert (moved - halves).abs().mean() > 0.1
    assert 0.2 < moved.mean() < 0.8
    assert torch.equal(moved, warped(halves))


def test_the_judge_puts_pictures_and_captions_in_one_space() -> None:
    pictures = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    image, said = (
        embed_pictures(pictures),
        embed_texts(["a cow", "a red apple on a blue background"]),
    )
    assert torch.allclose(image.norm(dim=1), torch.ones(3), atol=1e-5)
    assert image.shape[1] == said.shape[1]
    assert len(metric_encoder().sha256) == 64
    assert Classifier.load().classify(pictures).shape == (3,)


def test_a_verdict_needs_the_whole_interval() -> None:
    above, below, about, lone = (
        Interval(0.2, *ends) for ends in ((0.01, 0.4), (-0.4, -0.01), (-0.01, 0.4), (None, None))
    )

    def verdict(*gaps: Interval, margin: float = 0.0) -> str:
        return Claim("", "", [], decides=dict(enumerate(gaps)), above=margin).verdict

    assert verdict(above, above) == "yes"
    assert verdict(above, about) == verdict(lone) == "undecided"
    assert verdict(above, about, below) == "no"
    assert verdict(about, margin=-0.03) == "yes"
    assert verdict() == "not measured"
    assert Claim("", "", [], stated="yes").verdict == "yes"


def test_a_table_and_its_heading() -> None:
    table = Table(
        ["CLIP-I", "kind"],
        {"plus": [Interval(0.5, 0.25, 0.75), "shipped"], "far": [Interval(12.25, None, None), ""]},
    )
    assert table.markdown().splitlines() == [
        "| | CLIP-I | kind |",
        "|---|---|---|",
        "| plus | 0.500 (0.250 to 0.750) | shipped |",
        "| far | 12.2 |  |",
    ]
    assert (
        anchor(4, Claim("Decoupled beats the simple adapter", "", [], stated="no"))
        == "4-decoupled-beats-the-simple-adapter-no"
    )


def test_parts_are_joined_in_order() -> None:
    assert in_parts(lambda part: torch.tensor(list(part)), 70, size=32).tolist() == list(range(70))
