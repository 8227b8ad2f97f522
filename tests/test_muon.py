"""Muon: its matrices become orthogonal, the rest is AdamW's, and its state is all that it keeps."""

from copy import deepcopy
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from imprompt.training.estimate import STATES
from imprompt.training.muon import ADAMW_SHARE, UPDATE_RMS, Muon, orthogonal, weight_matrices
from imprompt.training.recipe import Optimization
from imprompt.training.step import OPTIMIZERS
from imprompt.variants import TRAINABLE
from tests.tiny import seeded, tiny_adapter, tiny_unet

PRECISIONS = [torch.bfloat16, torch.float32]
sides = st.integers(1, 48)


def random_matrix(rows: int, columns: int, seed: int) -> Tensor:
    """Of singular values from 0.05 to 1 (rows, columns)."""
    random = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(side, side, generator=random)).Q for side in (rows, columns)
    )
    rank = min(rows, columns)
    return (
        left[:, :rank]
        @ torch.rand(rank, generator=random).mul(0.95).add(0.05).diag()
        @ right[:rank]
    )


class Small(nn.Module):
    """A layer of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, 3, 4))
        self.words = nn.Embedding(5, 4)
        self.inner = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 6, bias=False)])
        self.norm = nn.LayerNorm(4)
        self.picture = nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4) -> (B,)"""
        hidden = self.norm(x + self.latents.mean(1) + self.words.weight.mean(0))
        hidden = self.inner[1](self.inner[0](hidden).relu() + self.inner[2](x))
        return self.picture(hidden[:, :, None, None].expand(-1, -1, 3, 3)).mean((1, 2, 3))


def small(precision: torch.dtype = torch.float32, **changes: float) -> tuple[Small, Muon]:
    with seeded(1):
        model = Small()
    matrices = weight_matrices(model)
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return model, Muon(matrices, others, **{"lr": 1e-2, **changes}, precision=precision)


def learn(
    model: Small, optimizer: torch.optim.Optimizer, steps: int, start: int = 0
) -> list[float]:
    """Take steps, whose inputs depend on their number; give their losses."""
    losses = []
    for step in range(start, start + steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step % 5))
        loss = (model(x) - x.square().mean(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", PRECISIONS)
@given(sides, sides, st.integers(0, 2**31))
def test_singular_values_come_near_one(
    precision: torch.dtype, rows: int, columns: int, seed: int
) -> None:
    values = torch.linalg.svdvals(
        orthogonal(1e-3 * random_matrix(rows, columns, seed)[None], precision)
    )
    assert values.min() > 0.65
    assert values.max() < 1.25


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_singular_vectors_stay(precision: torch.dtype) -> None:
    matrices = torch.stack([random_matrix(24, 40, seed) for seed in range(3)])
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    turned = left.mT @ orthogonal(matrices, precision) @ right.mT
    assert (turned - turned.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < 0.05
    assert torch.equal(orthogonal(torch.zeros(1, 3, 4), precision), torch.zeros(1, 3, 4))


def test_matrices_are_weights_of_linear_layers_and_convolutions() -> None:
    model = Small()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(matrix)] for matrix in weight_matrices(model)}
    assert found == {"inner.0.weight", "inner.1.weight", "inner.2.weight", "picture.weight"}


@pytest.mark.parametrize("variant", TRAINABLE)
def test_of_an_adapter_latents_norms_and_biases_are_adamws(variant: str) -> None:
    adapter = tiny_adapter(tiny_unet(), variant)
    optimizer = OPTIMIZERS["muon"](
        adapter, Optimization(steps=1, learning_rate=0.5, weight_decay=0.25)
    )
    muon, rest = optimizer.param_groups
    names = {id(parameter): name for name, parameter in adapter.named_parameters()}
    assert {
        id(parameter) for group in (muon, rest) for parameter in group["params"]
    } == names.keys()
    assert all(
        parameter.ndim == 2 and names[id(parameter)].endswith(".weight")
        for parameter in muon["params"]
    )
    assert all(
        parameter.ndim == 1 or names[id(parameter)].endswith("latents")
        for parameter in rest["params"]
    )
    assert {(group["lr"], group["weight_decay"]) for group in (muon, rest)} == {(0.5, 0.25)}


def test_a_convolution_is_a_matrix_of_its_output_channels() -> None:
    conv, linear = nn.Conv2d(4, 6, 3, bias=False), nn.Linear(36, 6, bias=False)
    linear.weight.data.copy_(conv.weight.detach().flatten(1))
    gradient = random_matrix(6, 36, 1)
    for layer in (conv, linear):
        before = layer.weight.detach().clone()
        layer.weight.grad = gradient.view(layer.weight.shape).clone()
        Muon([layer.weight], [], 0.1, weight_decay=0, precision=torch.float32).step()
        moved = (before - layer.weight.detach()).flatten(1) / 0.1
        assert torch.linalg.svdvals(moved).mean() == pytest.approx(UPDATE_RMS * 36**0.5, rel=0.3)
    assert torch.equal(conv.weight.flatten(1), linear.weight)


def test_matrices_of_one_shape_are_as_each_alone() -> None:
    together, apart = (
        [nn.Parameter(random_matrix(5, 8, seed)) for seed in range(4)] for _ in range(2)
    )
    groups = [together, *([one] for one in apart)]
    optimizers = [Muon(group, [], 0.1, precision=torch.float32) for group in groups]
    for step in range(3):
        for parameters in (together, apart):
            for number, parameter in enumerate(parameters):
                parameter.grad = random_matrix(5, 8, 100 * step + number)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_the_rest_is_adamws_bit_for_bit() -> None:
    model, muon = small(weight_decay=0.1)
    cpu_copy, _ = small()
    others = {
        name
        for name, p in model.named_parameters()
        if any(p is other for other in muon.param_groups[1]["params"])
    }
    theirs = [p for name, p in cpu_copy.named_parameters() if name in others]
    adamw = torch.optim.AdamW(theirs, ADAMW_SHARE * 1e-2, weight_decay=0.1, fused=True)
    for _ in range(4):
        learn(model, muon, 1)
        for own, other in zip(muon.param_groups[1]["params"], theirs, strict=True):
            other.grad = own.grad
        adamw.step()
        assert all(
            torch.equal(own, other)
            for own, other in zip(muon.param_groups[1]["params"], theirs, strict=True)
        )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_small_model_learns(precision: torch.dtype) -> None:
    losses = learn(*small(precision), steps=60)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_state_is_all_that_is_kept() -> None:
    model, muon = small()
    learn(model, muon, 3)
    other, again = small()
    other.load_state_dict(model.state_dict())
    again.load_state_dict(deepcopy(muon.state_dict()))
    assert learn(model, muon, 4, start=3) == learn(other, again, 4, start=3)
    assert all(
        torch.equal(one, two)
        for one, two in zip(model.parameters(), other.parameters(), strict=True)
    )
    for group, numbers in zip(muon.param_groups, (1, 2), strict=True):
        held = [
            value
            for parameter in group["params"]
            for key, value in muon.state[parameter].items()
            if key != "step"
        ]
        assert sum(map(torch.numel, held)) == numbers * sum(map(torch.numel, group["params"]))


def test_what_has_no_gradient_stays() -> None:
    model, muon = small()
    before = [p.detach().clone() for p in model.parameters()]
    muon.step()
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
    assert not muon.state_dict()["state"]


def test_every_optimizer_of_the_recipe_is_known_and_estimated() -> None:
    assert (
        [*OPTIMIZERS] == [*STATES] == [*get_args(Optimization.model_fields["optimizer"].annotation)]
    )
