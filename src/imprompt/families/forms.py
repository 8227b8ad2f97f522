"""Ways in which transformers attend to an image, a row each.

New adapters attend in one way, see `imprompt.families.processor`, with or without a norm of their
own. Adapters that others trained differ in which layers and rows are conditioned, in what is done
to query and keys, and in where the image's attention is added.

Shape letters as in `imprompt.adapter`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from imprompt.adapter import KV, ImageKV

Kept = TypeVar("Kept")


class PublishedKV(ImageKV):
    """Projections W'_k and W'_v of a published form, which may have biases."""

    def __init__(self, token_dim: int, inner_dim: int, bias: bool = False) -> None:
        super().__init__(token_dim, inner_dim)
        if bias:
            self.to_k = nn.Linear(token_dim, inner_dim)
            self.to_v = nn.Linear(token_dim, inner_dim)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        """Build the projections for tensors of these shapes, by their names in this module."""
        inner_dim, token_dim = shapes["to_k.weight"]
        return cls(token_dim, inner_dim, "to_k.bias" in shapes)


def head_normed(states: Tensor) -> Tensor:
    """Divide queries or keys (B, H, L, d) by their root mean square in each head."""
    return F.rms_norm(states, states.shape[-1:], eps=1e-5)


class HeadNormedKV(PublishedKV):
    """Projections whose keys are normalised in each head, by a root mean square without weight."""

    def forward(self, tokens: Tensor, heads: int) -> KV:
        """Project image tokens (B, N, D) to K' and V', each (B, H, N, d)."""
        key, value = super().forward(tokens, heads)
        return head_normed(key), value


class LayerNormedKV(PublishedKV):
    """Projections whose keys pass a layer norm in each head."""

    def __init__(self, token_dim: int, inner_dim: int, head_dim: int) -> None:
        super().__init__(token_dim, inner_dim, bias=True)
        self.norm_k = nn.LayerNorm(head_dim, eps=1e-6)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        """Build the projections for tensors of these shapes, by their names in this module."""
        inner_dim, token_dim = shapes["to_k.weight"]
        return cls(token_dim, inner_dim, *shapes["norm_k.weight"])

    def forward(self, tokens: Tensor, heads: int) -> KV:
        """Project image tokens (B, N, D) to K' and V', each (B, H, N, d)."""
        key, value = super().forward(tokens, heads)
        return self.norm_k(key), value


@dataclass(frozen=True)
class AttentionForm:
    """One way to attend to an image.

    families     of base models that a published adapter fits; the first is the one that it was
                 trained for. Empty: new adapters attend so, each for its own family
    layers       pattern of the names of the layers that it conditions
    states       module of one layer's W'_k and W'_v
    all_rows     whether rows of the text are conditioned too, in layers that join both; with a mask
                 only rows of the picture are
    after_block  whether the image's attention is added after the whole block, without an output
                 layer; else before the attention's output layer
    rotary       keyword of the attention's call by which the query is rotated first; "" for none
    normed       whether the query is divided by its root mean square in each head
    """

    name: str
    families: tuple[str, ...]
    layers: str
    states: type[PublishedKV]
    all_rows: bool = False
    after_block: bool = False
    rotary: str = ""
    normed: bool = False

    def fits(self, family: str) -> tuple[str, ...]:
        """Return the families of base models that an adapter for `family` fits."""
        return self.families or (family,)

    def of(self, layers: Mapping[str, Kept]) -> dict[str, Kept]:
        """Return those of a family's layers that this form conditions, by name."""
        return {name: own for name, own in layers.items() if re.fullmatch(self.layers, name)}


# Of new adapters for bases that do not norm their queries and keys: it keeps the products of both
# within the root of the head's width, whatever the base's activations.
NORMED = AttentionForm("normed", (), r".*", HeadNormedKV, normed=True)
NEW_FORMS = {NORMED.name: NORMED}
# Published ones.
FORMS = {
    form.name: form
    for form in (
        AttentionForm(
            "xlabs",
            ("flux", "chroma"),
            r"transformer_blocks\.\d+\.attn",
            PublishedKV,
            after_block=True,
        ),
        AttentionForm("instantx", ("flux", "chroma"), r".*", HeadNormedKV, all_rows=True),
        AttentionForm(
            "hunyuandit", ("hunyuandit",), r".*", LayerNormedKV, rotary="image_rotary_emb"
        ),
    )
}
