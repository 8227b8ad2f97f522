"""Long self-attention in low precision on a CPU, for training.

On a CPU, PyTorch's fused kernel takes 1.75 times as long in bfloat16, and whole score matrices
(256 MB each for SD 1.5 at 512 pixels) cost more to allocate than to fill. So the scores are
computed for some queries at a time, and again in the backward pass: Dao et al. 2022 (arXiv
2205.14135, section 3.1), with whole rows in each block.

Shape letters as in `imprompt.adapter`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from imprompt.adapter import LONG, attention, split_heads

BLOCK = 512  # queries at a time


class Blockwise(torch.autograd.Function):
    """Attention(Q, K, V) in blocks of queries, with its gradient.

    Query, key and value (B, H, L, d) -> (B, H, L, d).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute softmax(QKᵀ/√d) V, all (B, H, L, d), and save the inputs for backward."""
        shape = query.shape
        scaled, key, value = (
            x.flatten(0, 1).contiguous() for x in (query * shape[-1] ** -0.5, key, value)
        )
        out = torch.empty_like(scaled)
        for q, k, v, o in zip(scaled, key, value, out, strict=True):  # one head of one item
            for here in range(0, shape[2], BLOCK):
                torch.mm((q[here : here + BLOCK] @ k.T).softmax(-1), v, out=o[here : here + BLOCK])
        ctx.save_for_backward(scaled, key, value)
        return out.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - torch's own pattern
        """Compute the gradients of query, key and value, each (B, H, L, d).

        With S = QKᵀ/√d, P = softmax(S) and O = PV: dV = PᵀdO, dP = dO Vᵀ, dS is the gradient of the
        softmax, dQ = dS K/√d, dK = dSᵀQ/√d.
        """
        query, key, value = ctx.saved_tensors
        shape = gradients[0].shape
        gradient = gradients[0].flatten(0, 1).contiguous()
        # sums over blocks in float32
        by_query, (by_key, by_value) = (torch.empty_like(query), torch.zeros(2, *key.shape))
        for q, k, v, g, dq, dk, dv in zip(
            query, key, value, gradient, by_query, by_key, by_value, strict=True
        ):
            for here in range(0, shape[2], BLOCK):
                q_here, g_here = q[here : here + BLOCK], g[here : here + BLOCK]
                weights = (q_here @ k.T).softmax(-1)
                scores = torch.ops.aten._softmax_backward_data(
                    g_here @ v.T, weights, -1, weights.dtype
                )
                torch.mm(scores, k, out=dq[here : here + BLOCK])
                dk += scores.T @ q_here
                dv += weights.T @ g_here
        by_query *= shape[-1] ** -0.5
        return (
            by_query.view(shape),
            by_key.to(key.dtype).view(shape),
            by_value.to(value.dtype).view(shape),
        )


@torch.compiler.disable  # its loops would be unrolled: torch.compile would take many minutes
def blockwise_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute Attention(Q, K, V) in blocks of queries; all (B, H, L, d)."""
    return Blockwise.apply(query, key, value)


class SelfAttention:
    """Attention processor of diffusers for self-attention layers that are trained on a CPU.

    It holds no weights.
    """

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Compute the self-attention of hidden states (B, L, C) -> (B, L, C)."""
        projections = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (
            split_heads(projection(hidden_states), attn.heads) for projection in projections
        )
        pays = key.dtype != torch.float32 and key.shape[2] >= LONG
        attend: Any = blockwise_attention if pays else attention
        out = attend(query, key, value)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
