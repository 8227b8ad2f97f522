"""Decoupled cross-attention on a GPU in one pass over the queries, with its gradient.

Z = Attention(Q, K, V) + Σₚ wₚ ∘ Attention(Q, K'ₚ, V'ₚ) (equations 5 and 8), each with its own
softmax, as PyTorch operators. Attention to a few keys is limited by memory bandwidth, not by
arithmetic: computed source by source, it reads Q and writes Z once per source; one pass
does so once in all.

Triton must be installed to import this file.

Shape letters as in `imprompt.adapter`; P prompts, N tokens of all prompts together, S = P + 1
sources, the text first.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from imprompt.adapter import ImageStates, for_batch
from imprompt.attention.conditioning import base_is_trained
from imprompt.attention.kernels import (
    INTERPRETED,
    LOG2_E,
    SHORT_BLOCK,
    forward_kernel,
    image_kernel,
    query_kernel,
)
from imprompt.errors import MismatchError

DTYPES = (torch.float16, torch.bfloat16)
WIDEST = 160  # of a head; the accumulators of wider ones do not fit in the registers
# `image_kernel` is split into programs of at least SPLIT queries, but into no more than PROGRAMS;
# both are fixed, so that every GPU sums in the same order
SPLIT = 256
PROGRAMS = 1024


class Packed(NamedTuple):
    """Keys and values of several image prompts for the kernels, concatenated along the tokens."""

    key: Tensor  # (B or 1, H, N, d)
    value: Tensor  # (B or 1, H, N, d)
    # (P + 1,) int32, on the keys' device: where each prompt's tokens begin, and their end
    offsets: Tensor
    tokens: tuple[int, ...]  # of each prompt, known without a GPU synchronisation


def pack_images(images: Sequence[ImageStates]) -> Packed:
    """Pack the (key, value) pairs of image prompts, each (B or 1, H, N, d).

    The tensors of one prompt are not copied, those of several are: call it once per set of prompts,
    not once per step.
    """
    batch = max(len(key) for key, _ in images)
    keys, values = zip(*(for_batch(image, batch) for image in images), strict=True)
    tokens = tuple(key.shape[2] for key in keys)
    key, value = (kind[0] if len(kind) == 1 else torch.cat(kind, 2) for kind in (keys, values))
    return Packed(key, value, bounds(tokens, key.device), tokens)


@cache
@torch.inference_mode(False)  # a gradient may need it later
def bounds(tokens: tuple[int, ...], device: torch.device) -> Tensor:
    """Return `Packed.offsets` for these numbers of tokens, copied to the device once."""
    return torch.tensor([0, *accumulate(tokens)], dtype=torch.int32).to(device)


class Launch(NamedTuple):
    """Launch parameters: queries of a block, warps of a program, stages of its loads."""

    block: int
    warps: int
    stages: int


# 16 queries per warp, the tensor cores' size: more warps would share rows and hold the same sums
# twice. Compiled for sm_80 and sm_90, heads up to 160 wide then stay in the registers (in QUERIES
# up to 80), and of 64 wide ones four programs run at once on an sm_90. Two stages of loads take
# 80 KB of shared memory at most; the smallest GPUs have 99.
FORWARD, QUERIES, IMAGES = Launch(64, 4, 2), Launch(64, 4, 2), Launch(32, 4, 2)


@cache
def options(launch: Launch) -> dict[str, Any]:
    """Return the launch parameters as keywords of a Triton launch.

    `enable_fp_fusion` is the default, given because Triton 3.9 warns that the default will change.
    """
    return {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}


@cache
def head_parts(width: int) -> tuple[int, int]:
    """Split a head's width into one or two powers of two with little padding.

    40 becomes 64, 80 becomes 64 + 16, 160 becomes 128 + 32; the second is 0 if one is enough.
    """

    def power_of_two(least: int) -> int:
        return max(16, 1 << (least - 1).bit_length())

    whole = power_of_two(width)
    low, high = whole // 2, power_of_two(width - whole // 2)
    return (whole, 0) if whole <= 64 or high == low else (low, high)


def strides(weights: Tensor, *tensors: Tensor) -> tuple[list[int], int]:
    """Return the strides of tensors and weights, and the unit of the tensors' strides.

    They are those of items, heads and rows of the tensors, and of prompts, items and rows of the
    weights. A stride is 0 where the dimension has size 1. The tensors' strides count `unit`
    elements: the compiler then knows that they are multiples of it, and moves 16 bytes at once.
    """
    steps = [
        0 if size == 1 else step
        for x in tensors
        for size, step in zip(x.shape[:3], x.stride()[:3], strict=True)
    ]
    unit = 8 if all(step % 8 == 0 for step in steps) else 1
    weight_steps = [0 if weights.shape[axis] == 1 else weights.stride(axis) for axis in (0, 1, 3)]
    return [step // unit for step in steps] + weight_steps, unit


def readable(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors; those whose last dimension is not dense are copied."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def empty_like_query(query: Tensor) -> Tensor:
    """Allocate a tensor (B, H, L, d) with the memory layout (B, L, H, d).

    The heads lie side by side, as the next layer reads them.
    """
    items, heads, queries, width = query.shape
    return query.new_empty(items, queries, heads, width).transpose(1, 2)


def empty_sums(query: Tensor, sources: int) -> Tensor:
    """Allocate a float32 number for each query of each of the sources, (S, B, H, L)."""
    return query.new_empty(sources, *query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("imprompt::decoupled_attention", mutates_args=())
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image_key: Tensor,
    image_value: Tensor,
    offsets: Tensor,
    weights: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Compute Z (B, H, L, d) and the sources' log-sum-exps in base 2, (S, B, H, L).

    The log-sum-exps are empty unless `keep` is true.
    """
    query, key, value, image_key, image_value = tensors = readable(
        query, key, value, image_key, image_value
    )
    items, heads, queries, width = query.shape
    out, sums = empty_like_query(query), empty_sums(query, len(offsets) if keep else 0)
    steps, unit = strides(weights, *tensors)
    with torch.cuda.device_of(query):
        forward_kernel[(triton.cdiv(queries, FORWARD.block), heads, items)](
            *tensors,
            weights,
            offsets,
            out,
            sums,
            *steps,
            heads,
            queries,
            key.shape[2],
            len(offsets) - 1,
            width**-0.5 * LOG2_E,
            keep,
            FORWARD.block,
            (unit, width, *head_parts(width)),
            **options(FORWARD),
        )
    return out, sums


@forward.register_fake
def _(
    query: Tensor,
    _key: Tensor,
    _value: Tensor,
    _image_key: Tensor,
    _image_value: Tensor,
    offsets: Tensor,
    _weights: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return empty_like_query(query), empty_sums(query, len(offsets) if keep else 0)


@torch.library.custom_op("imprompt::decoupled_attention_backward", mutates_args=())
def backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image_key: Tensor,
    image_value: Tensor,
    offsets: Tensor,
    weights: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dQ (B, H, L, d), dK' and dV' (B, H, N, d), equal in every run.

    No sum depends on the order in which programs end.
    """
    gradient, query, key, value, image_key, image_value = readable(
        gradient, query, key, value, image_key, image_value
    )
    items, heads, queries, width = query.shape
    prompts, total = len(offsets) - 1, image_key.shape[2]
    scale = width**-0.5 * LOG2_E
    delta, by_query = empty_sums(query, prompts), empty_like_query(query)
    tensors = (query, key, value, image_key, image_value, gradient)
    steps, unit = strides(weights, *tensors)
    with torch.cuda.device_of(query):
        query_kernel[(triton.cdiv(queries, QUERIES.block), heads, items)](
            *tensors[:5],
            weights,
            offsets,
            gradient,
            sums,
            delta,
            by_query,
            *steps,
            heads,
            queries,
            key.shape[2],
            prompts,
            scale,
            width**-0.5,
            QUERIES.block,
            (unit, width, *head_parts(width)),
            **options(QUERIES),
        )
    # enough blocks for every prompt; blocks without tokens end at once
    blocks = int(triton.cdiv(total, SHORT_BLOCK.value))
    splits = max(
        1, min(int(triton.cdiv(queries, SPLIT)), PROGRAMS // (blocks * prompts * heads * items))
    )
    share = triton.cdiv(queries, splits)
    by_key, by_value = (
        query.new_empty(splits, items, heads, total, width, dtype=torch.float32) for _ in range(2)
    )
    tensors = (query, image_key, image_value, gradient)
    steps, unit = strides(weights, *tensors)
    with torch.cuda.device_of(query):
        image_kernel[(prompts * blocks * splits, heads, items)](
            *tensors[:3],
            weights,
            offsets,
            gradient,
            sums,
            delta,
            by_key,
            by_value,
            *steps,
            heads,
            queries,
            total,
            splits,
            share,
            blocks,
            scale,
            width**-0.5,
            IMAGES.block,
            (unit, width, *head_parts(width)),
            **options(IMAGES),
        )
    return by_query, by_key.sum(0).to(query.dtype), by_value.sum(0).to(query.dtype)


@backward.register_fake
def _(
    _gradient: Tensor, query: Tensor, _key: Tensor, _value: Tensor, image_key: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    by_key, by_value = (image_key.new_empty(image_key.shape) for _ in range(2))
    return empty_like_query(query), by_key, by_value


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the inputs and the log-sum-exps for the backward pass."""
    ctx.save_for_backward(*inputs[:-1], output[1])


def differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradients of the operator's inputs; None for those that have none."""
    by_query, by_key, by_value = backward(gradient, *ctx.saved_tensors)
    return by_query, None, None, by_key, by_value, None, None, None


forward.register_autograd(differentiate, setup_context=save)


def usable(query: Tensor, key: Tensor, value: Tensor, images: Packed, weights: Tensor) -> bool:
    """Return whether the kernels accept these tensors.

    This depends on their device, their precision, the head's width, and on what is to be trained.
    """
    return (
        (query.is_cuda or INTERPRETED)
        and query.dtype in DTYPES
        and all(
            x.dtype == query.dtype and x.device == query.device
            for x in (key, value, images.key, images.value)
        )
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= WIDEST
        and not base_is_trained(key, value, weights)
    )


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, images: Packed, weights: Tensor
) -> Tensor:
    """Compute attention to the text plus weighted attention to every image prompt in one operator.

    query (B, H, L, d), text key and value (B, H, T, d), in float16 or bfloat16, any strides;
    weights (P, B or 1, 1, L or 1, 1) of any floating type -> (B, H, L, d). The query and the
    images' keys and values get gradients. Raises MismatchError for other shapes, or if the text or
    the weights are to be trained; see `usable` for the other conditions.
    """
    items, _, queries, _ = query.shape
    if base_is_trained(key, value, weights):
        raise MismatchError(
            "fused attention has no gradient of the text's keys and values or of weights: freeze "
            "them"
        )
    image_key, image_value = for_batch((images.key, images.value), items)
    if weights.shape not in {
        (len(images.tokens), b, 1, n, 1) for b in (1, items) for n in (1, queries)
    }:
        raise MismatchError(
            f"weights of shape {list(weights.shape)}: give ({len(images.tokens)}, {items} or 1, 1, "
            f"{queries} or 1, 1)"
        )
    keep = torch.is_grad_enabled() and (
        query.requires_grad or images.key.requires_grad or images.value.requires_grad
    )
    return forward(query, key, value, image_key, image_value, images.offsets, weights, keep)[0]
