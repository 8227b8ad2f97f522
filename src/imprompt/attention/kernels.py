"""Triton kernels of decoupled cross-attention.

There is one for the forward pass, one for the gradient of the queries, and one for the gradient of
the images' keys and values. Softmaxes are online, in base 2 and float32 (Dao et al. 2022, arXiv
2205.14135); the gradient recomputes the probabilities from the saved log-sum-exp. Other numbers of
tokens, prompts, items or queries, and other scales and masks, need no new compilation: none of them
is a constant of the kernels.

Names of pointers: ik, iv images' keys and values, w weights, g gradient of the output, lse
log-sum-exps; their strides end in _b (items), _h (heads), _n (rows), _p (prompts).
"""

# pyright: reportGeneralTypeIssues=false
# (Triton's own types state that tl.arange and tl.range return nothing: they are never called as
# Python.)

from typing import Any

import triton
import triton.language as tl
from triton import knobs

# TRITON_INTERPRET=1: the kernels run on the CPU, slowly, for tests
INTERPRETED: bool = knobs.runtime.interpret
IN_FLOAT32 = tl.constexpr(INTERPRETED)  # the interpreter multiplies bfloat16 matrices as integers
LOG2_E = 1.4426950408889634
LONG_BLOCK = tl.constexpr(32)  # keys at a time; the rest is processed in SHORT_BLOCK keys
# 77 text tokens as 32 + 32 + 16, 4 image tokens as 16: the smallest size of tensor cores
SHORT_BLOCK = tl.constexpr(16)
# The kernels' `shape` is (elements that strides count, width of a head, of its first part, of its
# second part or 0).
NOT_CONSTANT = ["heads", "queries", "texts", "prompts", "total", "splits", "share", "blocks"]
NOT_CONSTANT += [
    f"{name}_{axis}" for name in ("q", "k", "v", "ik", "iv", "w", "g") for axis in "bhnp"
]
kernel: Any = triton.jit(
    do_not_specialize=NOT_CONSTANT, do_not_specialize_on_alignment=["w", "offsets", "lse", "delta"]
)


@triton.jit
def here(tensor, item_stride, head_stride, row_stride, shape: tl.constexpr):
    """Return the position of this program's item and head in a tensor.

    It is a pointer to the first row, and the distance to the next row.
    """
    at = (tl.program_id(2).to(tl.int64) * item_stride + tl.program_id(1) * head_stride) * shape[0]
    return tensor + at, row_stride * shape[0]


@triton.jit
def inside(rows, stop, width: tl.constexpr, start, columns: tl.constexpr):
    """Return the columns start … start + columns, and which of their elements in `rows` exist."""
    column = (start + tl.arange(0, columns))[None, :]
    return column, (rows < stop)[:, None] & (column < width)


@triton.jit
def load_rows(tensor, rows, stop, shape: tl.constexpr):
    """Load rows before `stop` in two parts, with zeros outside of the tensor.

    If a head has one part only, it is returned twice.
    """
    column, there = inside(rows, stop, shape[1], 0, shape[2])
    low = tl.load(tensor[0] + rows[:, None] * tensor[1] + column, mask=there, other=0.0)
    high = low
    if shape[3] > 0:
        column, there = inside(rows, stop, shape[1], shape[2], shape[3])
        high = tl.load(tensor[0] + rows[:, None] * tensor[1] + column, mask=there, other=0.0)
    return low, high


@triton.jit
def write(tensor, x, scale, rows, stop, stride, shape: tl.constexpr):
    """Write the two parts of x times `scale` to rows before `stop`."""
    column, there = inside(rows, stop, shape[1], 0, shape[2])
    tl.store(
        tensor + rows[:, None] * stride + column,
        (x[0] * scale).to(tensor.dtype.element_ty),
        mask=there,
    )
    if shape[3] > 0:
        column, there = inside(rows, stop, shape[1], shape[2], shape[3])
        tl.store(
            tensor + rows[:, None] * stride + column,
            (x[1] * scale).to(tensor.dtype.element_ty),
            mask=there,
        )


@triton.jit
def zeros(rows: tl.constexpr, shape: tl.constexpr):
    """Return float32 zeros for that many rows, in two parts."""
    return tl.full((rows, shape[2]), 0.0, tl.float32), tl.full(
        (rows, shape[3] if shape[3] > 0 else 16), 0.0, tl.float32
    )


@triton.jit
def product(a, b):
    """Multiply two matrices; in the interpreter, in float32."""
    if IN_FLOAT32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b)


@triton.jit
def scores(a, tensor, rows, stop, shape: tl.constexpr):
    """Compute A Bᵀ in float32, where B is `rows` of the tensor."""
    b = load_rows(tensor, rows, stop, shape)
    result = product(a[0], tl.trans(b[0]))
    if shape[3] > 0:
        result += product(a[1], tl.trans(b[1]))
    return result


@triton.jit
def add_mix(p, z, tensor, rows, stop, shape: tl.constexpr):
    """Compute z + P B, where B is `rows` of the tensor."""
    b = load_rows(tensor, rows, stop, shape)
    p = p.to(b[0].dtype)
    low, high = z
    low += product(p, b[0])
    if shape[3] > 0:
        high += product(p, b[1])
    return low, high


@triton.jit
def softmax_mass(q, k, start, stop, scale, top, mass, block: tl.constexpr, shape: tl.constexpr):
    """Update the highest score and the softmax's mass relative to it with the keys start … stop.

    `top` and `mass` are those of the keys before.
    """
    for first in range(start, stop, block):
        keys = first + tl.arange(0, block)
        s = tl.where((keys < stop)[None, :], scores(q, k, keys, stop, shape) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        mass = mass * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
        top = higher
    return top, mass


@triton.jit
def probabilities(q, logs, k, keys, stop, scale, shape: tl.constexpr):
    """Compute the probabilities of these keys from the log-sum-exp; 0 from `stop` on."""
    s = scores(q, k, keys, stop, shape) * scale
    return tl.where((keys < stop)[None, :], tl.exp2(s - logs[:, None]), 0.0)


@triton.jit
def add_values(
    q, weight, logs, k, v, start, stop, scale, z, block: tl.constexpr, shape: tl.constexpr
):
    """Compute z + w ∘ P V over the keys start … stop."""
    for first in range(start, stop, block):
        keys = first + tl.arange(0, block)
        p = probabilities(q, logs, k, keys, stop, scale, shape) * weight[:, None]
        z = add_mix(p, z, v, keys, stop, shape)
    return z


@triton.jit
def add_attention(q, weight, k, v, start, stop, scale, z, block: tl.constexpr, shape: tl.constexpr):
    """Add the weighted attention to one source to z; return its log-sum-exp too.

    The log-sum-exp is +inf without keys. The keys, which are few, are read twice: so one sum, and
    not one more per source, fills the registers.
    """
    top, mass = tl.full((block,), float("-inf"), tl.float32), tl.full((block,), 0.0, tl.float32)
    rest = start + (stop - start) // LONG_BLOCK * LONG_BLOCK
    top, mass = softmax_mass(q, k, start, rest, scale, top, mass, LONG_BLOCK, shape)
    top, mass = softmax_mass(q, k, rest, stop, scale, top, mass, SHORT_BLOCK, shape)
    logs = tl.where(mass > 0, top + tl.log2(mass), float("inf"))
    z = add_values(q, weight, logs, k, v, start, rest, scale, z, LONG_BLOCK, shape)
    z = add_values(q, weight, logs, k, v, rest, stop, scale, z, SHORT_BLOCK, shape)
    return z, logs


@triton.jit
def load_weight(w, w_p, w_b, w_n, offsets, prompt, rows, queries):
    """Load the weight of a prompt for these queries, and its tokens start … stop.

    There are no tokens if the prompt's weight is zero for all these queries.
    """
    at = w + prompt * w_p + tl.program_id(2) * w_b + rows * w_n
    weight = tl.load(at, mask=rows < queries, other=0.0).to(tl.float32)
    start = tl.load(offsets + prompt)
    stop = tl.load(offsets + prompt + 1)
    return weight, start, tl.where(tl.max(tl.abs(weight), 0) == 0, start, stop)


@triton.jit
def places(heads, queries):
    """Count the queries of all items and heads, and those before this program's item and head.

    They are the size of one source in `lse` and `delta`, and the offset inside it.
    """
    here = tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)
    return tl.num_programs(2).to(tl.int64) * heads * queries, here * queries


@kernel
def forward_kernel(q, k, v, ik, iv, w, offsets, out, lse, q_b, q_h, q_n, k_b, k_h,
                   k_n, v_b, v_h, v_n, ik_b, ik_h, ik_n, iv_b, iv_h, iv_n, w_p, w_b,
                   w_n, heads, queries, texts, prompts, scale, keep: tl.constexpr,
                   block: tl.constexpr, shape: tl.constexpr):  # fmt: skip
    """Compute one block of queries of one head and item: the text, then every prompt."""
    rows = tl.program_id(0) * block + tl.arange(0, block)
    every, before = places(heads, queries)
    k, v = here(k, k_b, k_h, k_n, shape), here(v, v_b, v_h, v_n, shape)
    ik, iv = here(ik, ik_b, ik_h, ik_n, shape), here(iv, iv_b, iv_h, iv_n, shape)
    q = load_rows(here(q, q_b, q_h, q_n, shape), rows, queries, shape)
    lse += before + rows
    z, logs = add_attention(
        q,
        tl.full((block,), 1.0, tl.float32),
        k,
        v,
        0,
        texts,
        scale,
        zeros(block, shape),
        block,
        shape,
    )
    if keep:
        tl.store(lse, logs, mask=rows < queries)
    for prompt in range(prompts):
        weight, start, stop = load_weight(w, w_p, w_b, w_n, offsets, prompt, rows, queries)
        z, logs = add_attention(q, weight, ik, iv, start, stop, scale, z, block, shape)
        if keep:
            tl.store(lse + (prompt + 1) * every, logs, mask=rows < queries)
    out += (tl.program_id(2).to(tl.int64) * queries * heads + tl.program_id(1)) * shape[1]
    write(out, z, 1.0, rows, queries, heads * shape[1], shape)


@triton.jit
def shares(q, g, weight, logs, k, v, keys, stop, scale, shape: tl.constexpr):
    """Compute the probabilities P of these keys, and dP = w ∘ (dZ Vᵀ)."""
    return probabilities(q, logs, k, keys, stop, scale, shape), scores(
        g, v, keys, stop, shape
    ) * weight[:, None]


@triton.jit
def add_row_sums(
    q, g, weight, logs, k, v, start, stop, scale, sums, block: tl.constexpr, shape: tl.constexpr
):
    """Compute sums + the row sums of P ∘ dP over the keys start … stop."""
    for first in range(start, stop, block):
        p, dp = shares(q, g, weight, logs, k, v, first + tl.arange(0, block), stop, scale, shape)
        sums += tl.sum(p * dp, 1)
    return sums


@triton.jit
def add_query_gradient(
    q, g, weight, logs, k, v, start, stop, scale, sums, dq, block: tl.constexpr, shape: tl.constexpr
):
    """Compute dq + dS K over the keys start … stop, with dS = P ∘ (dP − row sums)."""
    for first in range(start, stop, block):
        keys = first + tl.arange(0, block)
        p, dp = shares(q, g, weight, logs, k, v, keys, stop, scale, shape)
        dq = add_mix(p * (dp - sums[:, None]), dq, k, keys, stop, shape)
    return dq


@triton.jit
def add_source_gradient(
    q, g, weight, logs, k, v, start, stop, scale, dq, block: tl.constexpr, shape: tl.constexpr
):
    """Add the gradient through one source to dq; return the row sums of P ∘ dP too.

    The sums are computed first, so that dP − sums is taken before it is rounded.
    """
    rest = start + (stop - start) // LONG_BLOCK * LONG_BLOCK
    sums = tl.full((block,), 0.0, tl.float32)
    sums = add_row_sums(q, g, weight, logs, k, v, start, rest, scale, sums, LONG_BLOCK, shape)
    sums = add_row_sums(q, g, weight, logs, k, v, rest, stop, scale, sums, SHORT_BLOCK, shape)
    dq = add_query_gradient(
        q, g, weight, logs, k, v, start, rest, scale, sums, dq, LONG_BLOCK, shape
    )
    dq = add_query_gradient(
        q, g, weight, logs, k, v, rest, stop, scale, sums, dq, SHORT_BLOCK, shape
    )
    return dq, sums


@kernel
def query_kernel(q, k, v, ik, iv, w, offsets, g, lse, delta, dq, q_b, q_h, q_n, k_b,
                 k_h, k_n, v_b, v_h, v_n, ik_b, ik_h, ik_n, iv_b, iv_h, iv_n, g_b,
                 g_h, g_n, w_p, w_b, w_n, heads, queries, texts, prompts, scale,
                 to_gradient, block: tl.constexpr, shape: tl.constexpr):  # fmt: skip
    """Compute dQ of one block of queries.

    The row sums of P ∘ dP of every prompt are written too, for `image_kernel`.
    """
    rows = tl.program_id(0) * block + tl.arange(0, block)
    every, before = places(heads, queries)
    k, v = here(k, k_b, k_h, k_n, shape), here(v, v_b, v_h, v_n, shape)
    ik, iv = here(ik, ik_b, ik_h, ik_n, shape), here(iv, iv_b, iv_h, iv_n, shape)
    q = load_rows(here(q, q_b, q_h, q_n, shape), rows, queries, shape)
    g = load_rows(here(g, g_b, g_h, g_n, shape), rows, queries, shape)
    lse += before + rows
    delta += before + rows
    logs = tl.load(lse, mask=rows < queries, other=float("inf"))
    one = tl.full((block,), 1.0, tl.float32)
    x, sums = add_source_gradient(
        q, g, one, logs, k, v, 0, texts, scale, zeros(block, shape), block, shape
    )
    for prompt in range(prompts):
        weight, start, stop = load_weight(w, w_p, w_b, w_n, offsets, prompt, rows, queries)
        logs = tl.load(lse + (prompt + 1) * every, mask=rows < queries, other=float("inf"))
        x, sums = add_source_gradient(
            q, g, weight, logs, ik, iv, start, stop, scale, x, block, shape
        )
        tl.store(delta + prompt * every, sums, mask=rows < queries)
    dq += (tl.program_id(2).to(tl.int64) * queries * heads + tl.program_id(1)) * shape[1]
    write(dq, x, to_gradient, rows, queries, heads * shape[1], shape)


@kernel
def image_kernel(q, ik, iv, w, offsets, g, lse, delta, dk, dv, q_b, q_h, q_n, ik_b,
                 ik_h, ik_n, iv_b, iv_h, iv_n, g_b, g_h, g_n, w_p, w_b, w_n, heads,
                 queries, total, splits, share, blocks, scale, to_gradient,
                 block: tl.constexpr, shape: tl.constexpr):  # fmt: skip
    """Compute dK' and dV' of one block of a prompt's tokens from one split of the queries.

    The caller adds the splits.
    """
    split, number = tl.program_id(0) % splits, tl.program_id(0) // splits
    prompt = number // blocks
    first = tl.load(offsets + prompt) + number % blocks * SHORT_BLOCK
    stop = tl.load(offsets + prompt + 1)
    keys = first + tl.arange(0, SHORT_BLOCK)
    every, before = places(heads, queries)
    q, g = here(q, q_b, q_h, q_n, shape), here(g, g_b, g_h, g_n, shape)
    k = load_rows(here(ik, ik_b, ik_h, ik_n, shape), keys, stop, shape)
    v = load_rows(here(iv, iv_b, iv_h, iv_n, shape), keys, stop, shape)
    w += prompt * w_p + tl.program_id(2) * w_b
    delta += prompt * every + before
    lse += (prompt + 1) * every + before
    x, y = zeros(SHORT_BLOCK, shape), zeros(SHORT_BLOCK, shape)
    # no queries for a block after the prompt's last token
    end = tl.where(first < stop, tl.minimum((split + 1) * share, queries), 0)
    for begin in range(split * share, end, block):
        rows = begin + tl.arange(0, block)
        weight = tl.load(w + rows * w_n, mask=rows < end, other=0.0).to(tl.float32)
        logs = tl.load(lse + rows, mask=rows < end, other=float("inf"))
        sums = tl.load(delta + rows, mask=rows < end, other=0.0)
        p = tl.exp2(scores(k, q, rows, end, shape) * scale - logs[None, :])
        p = tl.where((keys < stop)[:, None], p, 0.0)
        y = add_mix(p * weight[None, :], y, g, rows, end, shape)
        dp = scores(v, g, rows, end, shape) * weight[None, :]
        x = add_mix(p * (dp - sums[None, :]), x, q, rows, end, shape)
    at = (split * every + before) // queries * total * shape[1]
    write(dk + at, x, to_gradient, keys, stop, shape[1], shape)
    write(dv + at, y, 1.0, keys, stop, shape[1], shape)
