"""Check that a compiled base model gives the adapter the gradients of the uncompiled model.

A wrong gradient is not reported: the loss is right, and falls a little because the other weights
learn. PyTorch 2.13 computes some on CPUs: when it fuses loops, its scheduler ignores that a buffer
is written by scattering (github.com/pytorch/pytorch/pull/185873), and may run the loop that reads
the buffer first. In bfloat16 this happens at every upsampling, and the layers below get a gradient
of zeros.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

# relative distance of two gradients of a weight; bfloat16 alone gives a few hundredths
TOLERANCE = 0.5
# norm of a weight's gradient, relative to the whole gradient's: below it, rounding dominates
NEGLIGIBLE = 1e-4


def compare_backward(
    model: nn.Module, backward: Callable[[], None], eager: Iterable[Callable[[], None]]
) -> Tensor:
    """Return how many weights get a wrong gradient when compiled, and how many were compared (2,).

    The result is on the device of the weights.

    backward  takes one step's backward pass
    eager     takes the same pass in parts, here uncompiled; with one sample each they need no more
              memory than the compiled pass

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
    """Return the gradients of the weights and remove them from the weights.

    A weight without a gradient gives zeros. A sharded weight gives this process's part.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = [
        torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights
    ]
    model.zero_grad(set_to_none=True)
    return own_parts(gradients)


def compare_gradients(compiled: Sequence[Tensor], eager: Sequence[Tensor]) -> Tensor:
    """Compare gradients of the same weights; return the counts [wrong, compared] (2,)."""
    norms = torch.stack([gradient.norm() for gradient in eager])
    distances = torch.stack(
        [(one - other).norm() for one, other in zip(compiled, eager, strict=True)]
    )
    comparable = (
        (norms > NEGLIGIBLE * norms.norm()) & norms.isfinite().all() & distances.isfinite().all()
    )
    return torch.stack([(comparable & (distances > TOLERANCE * norms)).sum(), comparable.sum()])


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this process's parts of the tensors, sharing their memory."""
    from torch.distributed.tensor import DTensor

    return [(one.to_local() if isinstance(one, DTensor) else one).detach() for one in tensors]
