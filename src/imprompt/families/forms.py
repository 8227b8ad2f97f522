"""Published ways in which transformers attend to an image, a row each.

New adapters attend in one way: see `imprompt.families.processor`. Adapters that others trained
differ in which layers and rows are conditioned, in what is done to query and keys, and in where the
image's attention is added.

Shape letters as in `imprompt.adapter`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from imprompt.adapter import KV, ImageKV, split_heads

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


class HeadNormedKV(PublishedKV):
    """Projections whose keys are normalised in each head, by a root mean square without weight."""

    def forward(self, tokens: Tensor, heads: int) -> KV:
        """Project image tokens (B, N, D) to K' and V', each (B, H, N, d)."""
        key, value = super().forward(tokens, heads)
        return F.rms_norm(key, key.shape[-1:], eps=1e-5), value


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


class WidthNormedKV(PublishedKV):
    """Projections whose keys are normalised over all heads together, without weight."""

    def forward(self, tokens: Tensor, heads: int) -> KV:
        """Project image tokens (B, N, D) to K' and V', each (B, H, N, d)."""
        key, value = super().forward(tokens, 1)
        key = F.rms_norm(key, key.shape[-1:], eps=1e-5)
        return split_heads(key[:, 0], heads), split_heads(value[:, 0], heads)


@dataclass(frozen=True)
class AttentionForm:
    """One published way to attend to an image.

    families     of base models that it fits; the first is the one that it was trained for
    layers       pattern of the names of the layers that it conditions
    states       module of one layer's W'_k and W'_v
    all_rows     whether rows of the text are conditioned too, in layers that join both; with a mask
                 only rows of the picture are
    text_stream  whether those of the text are conditioned in layers that keep them apart, too
    after_block  whether the image's attention is added after the whole block, without an output
                 layer; else before the attention's output layer
    rotary       argument of the attention's call by which the query is rotated first; "" for none
    widened      whether the tokens pass the base model's own projection of text before W'
    """

    name: str
    families: tuple[str, ...]
    layers: str
    states: type[PublishedKV]
    all_rows: bool = False
    text_stream: bool = False
    after_block: bool = False
    rotary: str = ""
    widened: bool = False

    def of(self, layers: Mapping[str, Kept]) -> dict[str, Kept]:
        """Return those of a family's layers that this form conditions, by name."""
        return {name: own for name, own in layers.items() if re.fullmatch(self.layers, name)}


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
        AttentionForm(
            "ai-toolkit",
            ("flux",),
            r".*",
            PublishedKV,
            all_rows=True,
            text_stream=True,
            rotary="image_rotary_emb",
        ),
        AttentionForm("ai-toolkit-pixart", ("pixart",), r".*", PublishedKV, widened=True),
        # every second block
        AttentionForm("lynx", ("wan",), r"blocks\.\d*[02468]\.attn2", WidthNormedKV),
    )
}
