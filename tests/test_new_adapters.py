"""What new adapters choose: a norm of queries and keys, the width of their tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from imprompt import ImagePromptPipeline
from imprompt.adapter import IPAdapter
from imprompt.checkpoints.adapters import (
    adapter_file,
    load_adapter,
    read_adapter,
    save_adapter,
    write_adapter,
)
from imprompt.errors import CheckpointError, MismatchError, SettingError
from imprompt.families import processor
from imprompt.families.base import family_of, find_family
from imprompt.families.forms import NORMED
from imprompt.training.loop import train
from imprompt.training.model import start_adapter
from imprompt.training.recipe import Recipe
from imprompt.variants import find_variant
from tests.commands import smallest_model
from tests.runs import picture_folder, recipe
from tests.tiny import (
    noise,
    noise_inputs,
    seeded,
    smallest_unet,
    tiny_adapter,
)
from tests.zoo import answer, inputs_of, specimen

FEATURE = 8
WIDTHS = {"image": FEATURE}
BASES = ("pixart", "sd3", "sana", "flux")


def plan(**changes: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": "any", "output": "run", "data": {"source": "set"}, "optimization": {"steps": 1}}
        | changes
    )


def awake(adapter: IPAdapter) -> IPAdapter:
    """The adapter with weights away from where they start."""
    with seeded(3), torch.no_grad():
        for parameter in adapter.image_kv.parameters():
            parameter.normal_(std=0.5)
    return adapter.requires_grad_(False)


def effect(adapter: IPAdapter, model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad(), adapter.attached(model), seeded(5):
        prompt = adapter.prompt(adapter.tokens(torch.randn(1, FEATURE)))
        with adapter.using(prompt):
            return answer(model, inputs)


# A norm of queries and keys.


@pytest.mark.parametrize("name", BASES)
def test_queries_and_keys_of_the_image_are_normed_in_each_head(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = specimen(name), inputs_of(name, 1)
    family = family_of(model)
    layer = next(iter(family.layers(model).values()))
    size, taps = family.size(layer), family.row.taps(layer)
    seen: list[tuple[Tensor, ...]] = []
    attend = processor.attention

    def recorded(*states: Tensor) -> Tensor:
        seen.append(states)
        return attend(*states)

    monkeypatch.setattr(processor, "attention", recorded)
    adapter = awake(start_adapter(plan(qk_norm=True), model, WIDTHS))
    assert adapter.form is NORMED
    plain = IPAdapter(adapter.projection, adapter.image_kv, adapter.family)  # type: ignore
    queries: list[Tensor] = []
    hook = getattr(layer, taps.query).register_forward_hook(lambda *args: queries.append(args[-1]))
    normed = effect(adapter, model, inputs)
    hook.remove()
    query, key, value = seen[0]
    whole = processor.as_heads(queries[0], taps.layout, size.heads)
    wanted = whole / (whole.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    rows = query.shape[2]
    torch.testing.assert_close(query, wanted[:, :, -rows:] if name == "flux" else wanted)
    assert key.square().mean(-1).sqrt().sub(1).abs().max() < 1e-3
    assert value.square().mean(-1).sqrt().sub(1).abs().max() > 0.1
    scores = (query @ key.mT) / query.shape[-1] ** 0.5
    assert scores.abs().max() <= query.shape[-1] ** 0.5 + 1e-3
    out = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(attend(query, key, value), out)
    adapter.image_kv.apply(lambda part: part.to_k.weight.mul_(9) if hasattr(part, "to_k") else None)
    torch.testing.assert_close(effect(adapter, model, inputs), normed, rtol=1e-4, atol=1e-5)
    assert not torch.equal(effect(plain, model, inputs), normed)


@pytest.fixture(
    params=[
        ("pixart", lambda: specimen("pixart"), True),
        ("sd3 medium", lambda: specimen("sd3", qk_norm=None), True),
        ("sd3.5", lambda: specimen("sd3"), False),
        ("sana 1.6B", lambda: specimen("sana"), True),
        ("flux", lambda: specimen("flux"), False),
        ("unet", smallest_unet, False),
    ],
    ids=lambda case: case[0],
)
def default(request: pytest.FixtureRequest) -> tuple[Any, bool]:
    _, make, normed = request.param
    return make(), normed


def test_it_is_the_default_where_a_transformer_has_none(default: tuple[Any, bool]) -> None:
    model, normed = default
    assert (start_adapter(plan(), model, WIDTHS).form is NORMED) == normed
    assert start_adapter(plan(qk_norm=False), model, WIDTHS).form is None


def test_it_is_stored_read_and_refused_where_it_cannot_be(tmp_path: Path) -> None:
    model, inputs = specimen("pixart"), inputs_of("pixart", 1)
    adapter = awake(start_adapter(plan(depth=1, variant="plus"), model, WIDTHS))
    row, layers = find_variant("plus"), list(family_of(model).layers(model))
    save_adapter(tmp_path / "a.safetensors", adapter, row, layers)
    file = read_adapter(tmp_path / "a.safetensors")
    assert file.header is not None
    assert (file.header.form, file.header.family, file.form) == ("normed", "pixart", NORMED)
    again = load_adapter(tmp_path / "a.safetensors", model)
    assert again.form is NORMED
    with torch.no_grad(), seeded(4):
        tokens = torch.randn(1, 5, FEATURE)
        outs = []
        for one in (adapter, again):
            with one.attached(model), one.using(one.prompt(one.tokens(tokens))):
                outs.append(answer(model, inputs))
    assert torch.equal(*outs)
    write_adapter(tmp_path / "b.safetensors", file)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    for layout in ("diffusers", "paper"):
        with pytest.raises(CheckpointError, match=r"cannot hold it: write imprompt$"):
            write_adapter(tmp_path / "c.bin", file, layout)
    changes = {"depth": 1, "variant": "plus", "start": str(tmp_path / "a.safetensors")}
    given = plan(**changes, qk_norm=False, model="emoji")
    with pytest.raises(MismatchError, match="trained with qk_norm: leave qk_norm out"):
        start_adapter(given, model, WIDTHS)
    with pytest.raises(MismatchError, match="is for base models of the pixart family"):
        again.attach(specimen("flux"))


def test_unets_refuse_it_in_one_line() -> None:
    unet = smallest_unet()
    with pytest.raises(MismatchError, match="qk_norm = true is for transformers: in the unet"):
        start_adapter(plan(qk_norm=True), unet, WIDTHS)
    adapter = tiny_adapter(unet)
    adapter.form = NORMED
    with adapter.attached(unet), pytest.raises(MismatchError, match="for transformers; this mod"):
        adapter.prompt(torch.randn(1, 4, 32))
    adapter.form = None
    file = adapter_file(adapter, find_variant("base"), list(family_of(unet).layers(unet)))
    assert file.header is not None
    assert '"form"' not in file.header.as_json()


# A width of the tokens' own.


def test_parameters_of_the_layers_by_width() -> None:
    """In millions: 2 matrices at each of 28 layers of 1152, and of 57 of 3072 numbers."""
    sizes = {
        ("pixart", 1024): 66.1,
        ("pixart", None): 74.3,
        ("flux", 1024): 358.6,
        ("flux", 4096): 1434.5,
    }
    config = {
        "pixart": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72,
                   "cross_attention_dim": 1152, "caption_channels": 4096, "sample_size": 128},
        "flux": {},
    }  # fmt: skip
    for (name, width), millions in sizes.items():
        with torch.device("meta"):
            model = find_family(name).build(config[name])
            adapter = start_adapter(plan(token_width=width), model, {"image": 1024})
        own = adapter.image_kv.parameters()
        assert sum(weight.numel() for weight in own) / 1e6 == pytest.approx(millions, abs=0.05)
        assert adapter.projection.norm.weight.shape == (width or 1152,)  # type: ignore


WIDE = 24  # no text of these models is that wide
WITH_WIDTH = {
    "pixart": lambda: specimen("pixart"),
    "flux": lambda: specimen("flux"),
    "unet": smallest_unet,
}


@pytest.mark.parametrize("name", WITH_WIDTH)
def test_an_adapter_with_its_own_width_says_so(name: str, tmp_path: Path) -> None:
    model: Any = WITH_WIDTH[name]()
    adapter = awake(start_adapter(plan(token_width=WIDE), model, WIDTHS))
    row, layers = find_variant("base"), list(family_of(model).layers(model))
    path = tmp_path / "a.safetensors"
    save_adapter(path, adapter, row, layers)
    file = read_adapter(path)
    assert file.header is not None
    assert (file.header.own_width, file.token_dim, file.own_width) == (True, WIDE, True)
    assert file.suits().startswith(f"base models of the {name} family with {len(layers)} cond")
    again = load_adapter(path, model)
    features = torch.randn(1, FEATURE)
    with torch.no_grad():
        prompts = []
        for one in (adapter, again):
            with one.attached(model):
                prompts.append(one.prompt(one.tokens(features)))
    for ours, theirs in zip(*(prompt.keys + prompt.values for prompt in prompts), strict=True):
        torch.testing.assert_close(ours, theirs)
    for layout in ("diffusers", "paper"):
        words = "cannot hold it: (its readers take|write imprompt)"
        with pytest.raises(CheckpointError, match=words):
            write_adapter(tmp_path / "b.bin", file, layout)
    with pytest.raises(MismatchError, match="has 24-wide image tokens; the recipe asks for tok"):
        start_adapter(plan(start=str(path), token_width=16, model="emoji"), model, WIDTHS)
    assert start_adapter(plan(start=str(path), model="emoji"), model, WIDTHS).own_width
    with pytest.raises(MismatchError, match=r"cross-attentions; this model has|for base models of"):
        again.attach(specimen("sd3", num_layers=5))


def test_text_of_another_width_is_refused_all_the_same(tmp_path: Path) -> None:
    model, other = smallest_unet(), smallest_unet(cross_attention_dim=WIDE)
    adapter = start_adapter(plan(), other, WIDTHS)
    with pytest.raises(MismatchError, match="trained for 24-wide text; the text of this model is"):
        adapter.attach(model)
    path, layers = tmp_path / "a.safetensors", list(family_of(model).layers(model))
    same = start_adapter(plan(token_width=WIDE), other, WIDTHS)  # the text's own width
    save_adapter(path, same, find_variant("base"), layers)
    assert "own_width" not in read_adapter(path).header.as_json()  # type: ignore
    light = start_adapter(plan(token_width=WIDE), model, WIDTHS)
    light.attach(model).detach()
    light.attach(other)  # it reads no text: its keys and values are as wide as these layers'


@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_an_adapter_with_its_own_width_trains_and_is_used(kind: str, tmp_path: Path) -> None:
    model = smallest_model(tmp_path / "model", kind)
    given = recipe(
        picture_folder(tmp_path / "set"),
        tmp_path / "run",
        2,
        model=str(model),
        token_width=WIDE,
        data={"size": 16},
        optimization={"learning_rate": 0.1},
    )
    last = train(given)
    with pytest.raises(SettingError, match=r"was started with token_width = 24 .now 16."):
        train(given.model_copy(update={"token_width": 16}))
    pipe = ImagePromptPipeline.from_pretrained(
        str(model), adapter=last, encoder=model / "image_encoder", device="cpu"
    )
    image = Image.new("RGB", (40, 40), "red")
    with_image, without = (
        pipe(image, seed=1, scale=scale, width=32, height=32, steps=2).images[0]
        for scale in (10.0, 0.0)
    )
    assert with_image.tobytes() != without.tobytes()


def test_a_low_rank_part_has_no_width_of_its_own() -> None:
    with pytest.raises(ValidationError, match="token_width is an option of base, full, plus, "):
        plan(variant="faceid", token_width=64)


# The start.


@pytest.mark.parametrize("name", ["flux", "sd3", "sana", "z-image", "qwen-image", "unet"])
def test_an_adapter_that_cannot_start_from_text_starts_without_effect(name: str) -> None:
    """Bit for bit; every W'_v has a gradient at once, all else after a step of W'_v."""
    if name == "unet":
        model: Any = smallest_unet()
        inputs = noise_inputs(model, 1)
    else:
        model, inputs = specimen(name), inputs_of(name, 1)
    wider = {"token_width": WIDE} if name in ("unet", "sana") else {}
    adapter = start_adapter(plan(**wider), model, WIDTHS)
    run = noise if name == "unet" else answer
    parts: list[Any] = list(adapter.image_kv)
    with adapter.attached(model), seeded(5):
        features = torch.randn(1, FEATURE)
        with torch.no_grad():
            alone = run(model, inputs)
        for step in range(2):
            with adapter.using(adapter.prompt(adapter.tokens(features))):
                with torch.no_grad():
                    assert torch.equal(run(model, inputs), alone) == (step == 0)
                run(model, inputs).square().sum().backward()
            assert all(part.to_v.weight.grad.any() for part in parts)
            others = [adapter.projection.proj.weight, *(part.to_k.weight for part in parts)]
            assert all(weight.grad.any() for weight in others) == (step == 1)  # type: ignore
            with torch.no_grad():
                for part in parts:
                    part.to_v.weight -= 0.1 * part.to_v.weight.grad.sign()


def test_an_adapter_that_reads_text_starts_from_its_weights() -> None:
    for model in (specimen("pixart"), smallest_unet()):
        adapter = start_adapter(plan(), model, WIDTHS)
        layers = family_of(model).layers(model).values()
        for layer, pair in zip(layers, adapter.image_kv, strict=True):
            for name in ("to_k", "to_v"):
                assert torch.equal(getattr(layer, name).weight, getattr(pair, name).weight)
