"""What new adapters for transformers choose: a norm of queries and keys."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imprompt.adapter import IPAdapter
from imprompt.checkpoints.adapters import (
    adapter_file,
    load_adapter,
    read_adapter,
    save_adapter,
    write_adapter,
)
from imprompt.errors import CheckpointError, MismatchError
from imprompt.families import processor
from imprompt.families.base import family_of
from imprompt.families.forms import NORMED
from imprompt.training.model import start_adapter
from imprompt.training.recipe import Recipe
from imprompt.variants import find_variant
from tests.tiny import seeded, smallest_unet, tiny_adapter, tiny_flux_model, tiny_sd3_model
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
    seen: list[tuple[Tensor, Any]] = []
    add = processor.add_image_attention

    def recorded(out: Tensor, query: Tensor, images: Any, weights: Tensor) -> Tensor:
        seen.append((query, images[0]))
        return add(out, query, images, weights)

    monkeypatch.setattr(processor, "add_image_attention", recorded)
    adapter = awake(start_adapter(plan(qk_norm=True), model, WIDTHS))
    assert adapter.form is NORMED
    plain = IPAdapter(adapter.projection, adapter.image_kv, adapter.family)  # type: ignore
    queries: list[Tensor] = []
    hook = getattr(layer, taps.query).register_forward_hook(lambda *args: queries.append(args[-1]))
    normed = effect(adapter, model, inputs)
    hook.remove()
    query, (key, value) = seen[0]
    whole = processor.as_heads(queries[0], taps.layout, size.heads)
    wanted = whole / (whole.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    rows = query.shape[2]
    torch.testing.assert_close(query, wanted[:, :, -rows:] if name == "flux" else wanted)
    assert key.square().mean(-1).sqrt().sub(1).abs().max() < 1e-3
    assert value.square().mean(-1).sqrt().sub(1).abs().max() > 0.1
    scores = (query @ key.mT) / query.shape[-1] ** 0.5
    assert scores.abs().max() <= query.shape[-1] ** 0.5 + 1e-3
    out = F.scaled_dot_product_attention(query, key, value)
    weights = torch.ones(1, 1, 1, 1, 1)
    torch.testing.assert_close(add(torch.zeros_like(out), query, [(key, value)], weights), out)
    adapter.image_kv.apply(lambda part: part.to_k.weight.mul_(9) if hasattr(part, "to_k") else None)
    torch.testing.assert_close(effect(adapter, model, inputs), normed, rtol=1e-4, atol=1e-5)
    assert not torch.equal(effect(plain, model, inputs), normed)


@pytest.fixture(
    params=[
        ("pixart", lambda: specimen("pixart"), True),
        ("sd3 medium", lambda: tiny_sd3_model(qk_norm=None), True),
        ("sd3.5", tiny_sd3_model, False),
        ("sana 1.6B", lambda: specimen("sana"), True),
        ("flux", tiny_flux_model, False),
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
        again.attach(tiny_flux_model())


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
