"""Which way decoupled attention is computed: by the kernel (`fused.py`) where that is faster, else
by PyTorch's own attention.
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

# environment: "auto" (where it is faster, the default), "always" (where it can be) or "never"
KERNEL = "IMPROMPT_KERNEL"
ROUNDS = 10  # calls that are timed together


def kernel_mode() -> str:
    if (mode := environ.get(KERNEL, "auto")) not in ("auto", "always", "never"):
        raise SettingError(f"{KERNEL} = {mode!r}: give auto, always or never")
    return mode


def may_use_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel can be tried: with Triton on a GPU in low precision."""
    how = kernel_mode()
    return (
        dtype in (torch.float16, torch.bfloat16)
        and how != "never"
        and ((device.type == "cuda" and has_triton()) or how == "always")
    )


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def kernel_is_faster(
    query: Tensor, key: Tensor, value: Tensor, images: Any, weights: Tensor
) -> bool:
    """Whether the kernel takes these tensors (shapes as in `fused.fused_attention`) and is to be
    used for them.
    """
    from imprompt.attention import fused

    return fused.usable(query, key, value, images, weights) and (
        kernel_mode() == "always"
        or benchmark(query, key, value, images, weights, fused.fused_attention, reference_attention)
    )


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, images: Any, weights: Tensor
) -> Tensor:
    """The same by PyTorch's own attention; `images` packed."""
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
    """Whether the kernel is faster here than `otherwise`, which computes the same from the same
    arguments.

    The first tensors of their shapes are timed on their GPU, in some milliseconds, forward and, if
    they are to be trained, backward; then the answer is remembered. A kernel that fails to compile
    or to run has lost, with a warning in the log. Not to be called for the first time while a graph
    is captured or compiled.
    """
    trained = torch.is_grad_enabled() and any(
        x.requires_grad for x in (query, images.key, images.value)
    )
    shapes = (query.shape, key.shape[2], images.tokens, weights.shape)
    case = (query.device, query.dtype, *shapes, trained)
    if case not in FASTER:
        try:
            with torch.autograd.graph.saved_tensors_hooks(same, same):
                # gradient checkpointing is not to see what is tried
                ours, theirs = (
                    milliseconds(run, query, key, value, images, weights, trained)
                    for run in (kernel, otherwise)
                )
            FASTER[case] = ours < theirs
        except Exception as error:
            # whatever a compiler or a driver raises, the picture is made the other way
            logging.getLogger(__name__).warning(
                "fused attention is not used: %s", first_line(error)
            )
            FASTER[case] = False
    return FASTER[case]


def same(tensor: Tensor) -> Tensor:
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
    """The time of one call, averaged over ROUNDS calls, the best of two turns.

    The first compiles.
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
