"""Choice of the implementation of decoupled attention.

It is the Triton kernel (`fused.py`) where that is faster, else PyTorch's own attention.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from os import environ
from typing import Any

import torch
from torch import Tensor

from imprompt.adapter import decoupled_attention
from imprompt.errors import SettingError, first_line

# environment variable: "auto" (the default: where it is faster), "always" (if possible), "never"
KERNEL = "IMPROMPT_KERNEL"
ROUNDS = 10  # calls that are timed together


def kernel_mode() -> str:
    """Read the kernel mode from the environment: auto, always or never.

    Raises SettingError for any other value.
    """
    if (mode := environ.get(KERNEL, "auto")) not in ("auto", "always", "never"):
        raise SettingError(f"{KERNEL} = {mode!r}: give auto, always or never")
    return mode


def may_use_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel may be tried for tensors on that device in that precision.

    It needs low precision and, unless the mode is "always", Triton on a GPU.
    """
    how = kernel_mode()
    return (
        dtype in (torch.float16, torch.bfloat16)
        and how != "never"
        and ((device.type == "cuda" and has_triton()) or how == "always")
    )


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


def kernel_is_faster(
    query: Tensor, key: Tensor, value: Tensor, images: Any, weights: Tensor
) -> bool:
    """Return whether the kernel accepts these tensors and is to be used for them.

    The shapes are those of `fused.fused_attention`.
    """
    from imprompt.attention import fused

    return fused.usable(query, key, value, images, weights) and (
        kernel_mode() == "always"
        or benchmark(query, key, value, images, weights, fused.fused_attention, reference_attention)
    )


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, images: Any, weights: Tensor
) -> Tensor:
    """Compute decoupled attention with PyTorch's own attention.

    The arguments are those of `fused.fused_attention`; `images` is packed.
    """
    pairs = zip(
        *(states.split(images.tokens, 2) for states in (images.key, images.value)), strict=True
    )
    return decoupled_attention(query, key, value, None, list(pairs), weights)


Attention = Callable[[Tensor, Tensor, Tensor, Any, Tensor], Tensor]
FASTER: dict[tuple[Any, ...], bool] = {}


def benchmark(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    images: Any,
    weights: Tensor,
    kernel: Attention,
    otherwise: Attention,
) -> bool:
    """Return whether the kernel is faster than `otherwise`, which computes equal results.

    The first tensors of their shapes are timed on their GPU, in some milliseconds, forward and, if
    they are to be trained, backward; then the answer is cached. A kernel that fails to compile or
    to run counts as slower, and a warning is logged. The first call for a shape must not happen
    while a graph is captured or compiled.
    """
    trained = torch.is_grad_enabled() and any(
        x.requires_grad for x in (query, images.key, images.value)
    )
    shapes = (query.shape, key.shape[2], images.tokens, weights.shape)
    case = (query.device, query.dtype, *shapes, trained)
    if case not in FASTER:
        try:
            with torch.autograd.graph.saved_tensors_hooks(same, same):
                # gradient checkpointing must not record the trial
                ours, theirs = (
                    milliseconds(run, query, key, value, images, weights, trained)
                    for run in (kernel, otherwise)
                )
            FASTER[case] = ours < theirs
        except Exception as error:
            # whatever a compiler or a driver raises, the other implementation is used
            logging.getLogger(__name__).warning(
                "fused attention is not used: %s", first_line(error)
            )
            FASTER[case] = False
    return FASTER[case]


def same(tensor: Tensor) -> Tensor:
    """Return the tensor unchanged: a saved-tensors hook that does nothing."""
    return tensor


def milliseconds(
    run: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    images: Any,
    weights: Tensor,
    trained: bool,
) -> float:
    """Measure the time of one call in milliseconds.

    It is the average of ROUNDS calls, and the better of two such averages. An additional round
    before them compiles.
    """
    query, images_key, images_value = (
        x.detach().requires_grad_(trained) for x in (query, images.key, images.value)
    )
    images = images._replace(key=images_key, value=images_value)
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(ROUNDS):
            out = run(query, key, value, images, weights)
            if trained:
                torch.autograd.grad(out, (query, images_key, images_value), out)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / ROUNDS)
    return min(times[1:])
