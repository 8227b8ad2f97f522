"""Muon: orthogonalized momentum for weight matrices, AdamW for everything else.

By Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), scaled as by Liu et al. 2025
(arXiv 2502.16982, section 2.2).

`torch.optim.Muon` is not used: torch 2.6 lacks it, and that of 2.13 takes 2-D parameters only, one
at a time. This one also takes convolutions, multiplies matrices of one shape together, and uses
AdamW for the other parameters under the same learning rate.
"""

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

# Coefficients of the quintic whose iteration moves all singular values towards 1, and the number
# of iterations.
QUINTIC, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# AdamW's share of the learning rate: with 1, trials on an autoencoder learned more slowly
ADAMW_SHARE = 0.4
# root mean square of a matrix's update, relative to the learning rate: about that of AdamW
UPDATE_RMS = 0.2


def weight_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights of linear layers and convolutions.

    They exclude biases, norms, embeddings, latents and positions.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [layer.get_parameter("weight") for layer in module.modules() if isinstance(layer, kinds)]


def orthogonal(matrices: Tensor, precision: torch.dtype = torch.bfloat16) -> Tensor:
    """Bring the singular values of matrices (N, rows, columns) near 1.

    A Newton-Schulz iteration in that precision.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(precision)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Optimizer of `matrices` by Muon and of `others` by AdamW, under one learning rate.

    momentum   of the matrices' gradients, Nesterov's
    betas      of AdamW
    precision  of `orthogonal`, which amplifies a gradient's rounding errors up to 500 times
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        *,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        precision: torch.dtype = torch.bfloat16,
    ) -> None:
        self.precision = precision
        common = {"lr": lr, "weight_decay": weight_decay}
        groups = [
            {"params": [*matrices], "muon": True, "momentum": momentum, **common},
            {"params": [*others], "muon": False, "betas": betas, **common},
        ]
        super().__init__([group for group in groups if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; return the loss of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._muon(group) if group["muon"] else self._adamw(group)
        return loss

    def _muon(self, group: dict[str, Any]) -> None:
        def shape(parameter: Tensor) -> tuple[int, int]:
            return parameter.shape[0], parameter.shape[1:].numel()

        used = [p for p in group["params"] if p.grad is not None]
        for (rows, columns), same_shape in groupby(sorted(used, key=shape), key=shape):
            parameters, updates = [*same_shape], []
            for p in parameters:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                mean = self.state[p]["momentum"]
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(mean, group["momentum"])
                updates.append(
                    (update.full_tensor() if isinstance(update, DTensor) else update).reshape(
                        rows, columns
                    )
                )
            scale = UPDATE_RMS * max(rows, columns) ** 0.5
            for p, update in zip(
                parameters, orthogonal(torch.stack(updates), self.precision) * scale, strict=True
            ):
                whole = update.view(p.shape)
                part = (
                    distribute_tensor(whole, p.device_mesh, p.placements)
                    if isinstance(p, DTensor)
                    else whole
                )
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(part, alpha=-group["lr"])

    def _adamw(self, group: dict[str, Any]) -> None:
        used = [p for p in group["params"] if p.grad is not None]
        for p in used:
            if not self.state[p]:
                self.state[p].update(
                    step=torch.zeros((), dtype=torch.float32, device=p.device),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                )
        states = [self.state[p] for p in used]
        first, second = group["betas"]
        adamw(
            used,
            [p.grad for p in used],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=group["lr"] * ADAMW_SHARE,
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )
