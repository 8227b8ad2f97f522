"""Refuse a compiled base model that gives the adapter other gradients than the same model
uncompiled.

A compiler's mistake is silent: the loss is right, and falls a little by what the other weights
learn. PyTorch 2.13 makes one on CPUs: fusing loops, its scheduler forgets that a buffer is written
by scattering (github.com/pytorch/pytorch/pull/185873), and may run the loop that reads the buffer
first. In bfloat16 that is so at every upsampling, and what lies below has a gradient of zeros.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

# distance of two gradients of a weight, as a share of their norm; bfloat16 alone makes a few
# hundredths
TOLERANCE = 0.5
# norm of a weight's gradient, as a share of the whole gradient's: below it, rounding may decide
NEGLIGIBLE = 1e-4


def compare_backward(
    model: nn.Module, backward: Callable[[], None], eager: Iterable[Callable[[], None]]
) -> Tensor:
    """Return [how many weights of `model` get a wrong gradient when compiled, how many could be
    compared] (2,), on their device.

    backward  takes one step's backward pass
    eager     take the same in parts, here uncompiled: of one sample each, they need no more memory
              than the compiled pass

    No weight can be compared if a gradient is not finite. `model` has no gradients before and
    after.
    """
    backward()
    compiled = taken_gradients(model)
    with torch.compiler.set_stance("force_eager"):
        for part in eager:
            part()
    return compare_gradients(compiled, taken_gradients(model))


def taken_gradients(model: nn.Module) -> list[Tensor]:
    """Take the gradients off the weights.

    Of sharded weights this process's part, zeros where there is none.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = [
        torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights
    ]
    model.zero_grad(set_to_none=True)
    return own_parts(gradients)


def compare_gradients(compiled: Sequence[Tensor], eager: Sequence[Tensor]) -> Tensor:
    """Gradients of the same weights -> [wrong, compared] (2,)."""
    norms = torch.stack([gradient.norm() for gradient in eager])
    distances = torch.stack(
        [(one - other).norm() for one, other in zip(compiled, eager, strict=True)]
    )
    comparable = (
        (norms > NEGLIGIBLE * norms.norm()) & norms.isfinite().all() & distances.isfinite().all()
    )
    return torch.stack([(comparable & (distances > TOLERANCE * norms)).sum(), comparable.sum()])


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of them, sharing their memory."""
    from torch.distributed.tensor import DTensor

    return [(one.to_local() if isinstance(one, DTensor) else one).detach() for one in tensors]
