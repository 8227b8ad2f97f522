"""Ways in which transformers attend to an image, a row each.

New adapters attend in one way, see `imprompt.families.processor`, with or without a norm of their
own. Adapters that others trained differ in which layers and rows are conditioned, in what is done
to query and keys, in where the image's attention is added, and in whether image tokens depend on
the time: see `imprompt.families.timed`.

Shape letters as in `imprompt.adapter`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imprompt.adapter import KV, ImageKV, split_heads
from imprompt.errors import MismatchError
from imprompt.families.base import LayerSize
from imprompt.prompt import ImagePrompt

Kept = TypeVar("Kept")


class PublishedKV(ImageKV):
    """Projections W'_k and W'_v of a published form, which may have biases."""

    head_dim: int | None = None  # width of the heads, where the adapter's own norms fix it

    def __init__(self, token_dim: int, inner_dim: int, bias: bool = False) -> None:
        super().__init__(token_dim, inner_dim)
        if bias:
            self.to_k = nn.Linear(token_dim, inner_dim)
            self.to_v = nn.Linear(token_dim, inner_dim)

    def check_fits(self, layer: str, size: LayerSize) -> None:
        """Raise MismatchError unless the keys, and norms of its own, fit a layer of that size."""
        super().check_fits(layer, size)
        if self.head_dim not in (None, size.inner // size.heads):
            raise MismatchError(
                f"this adapter's norms are for heads {self.head_dim} wide; those of this model at "
                f"{layer} are {size.inner // size.heads} wide"
            )

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
        self.head_dim = head_dim
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


class TimedKV(PublishedKV):
    """Projections of an adapter whose tokens depend on the time, with norms of its own.

    norms  names of the weights (d,) of its norms of the layer's query, and of the layer's keys if
           it reads those
    """

    norms: tuple[str, ...] = ()

    def at(self, tokens: Tensor, heads: int, _moment: Tensor) -> KV:
        """Project image tokens (B, N, D), at an embedded time (B, W), to K' and V' (B, H, N, d)."""
        return self(tokens, heads)

    @staticmethod
    def normed(x: Tensor, weight: Tensor) -> Tensor:
        """Divide heads (B, H, L, d) by their root mean square, and multiply by a weight (d,)."""
        mean_square = x.float().square().mean(-1, keepdim=True)
        return (x * torch.rsqrt(mean_square + 1e-6)).to(weight.dtype) * weight


class HeadScale(nn.Module):
    """Weight (d,) of a norm over each head, named as InstantCharacter's class names it."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))


class CharacterKV(TimedKV):
    """Projections of InstantCharacter: the layer's query and the image's keys pass own norms."""

    norms = ("norm_q.scale",)

    def __init__(self, token_dim: int, inner_dim: int, head_dim: int) -> None:
        super().__init__(token_dim, inner_dim, bias=True)
        self.head_dim = head_dim
        self.norm_q, self.norm_image = HeadScale(head_dim), HeadScale(head_dim)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        """Build the projections for tensors of these shapes, by their names in this module."""
        inner_dim, token_dim = shapes["to_k.weight"]
        (head_dim,) = shapes["norm_q.scale"]
        return cls(token_dim, inner_dim, head_dim)

    @staticmethod
    def normed(x: Tensor, weight: Tensor) -> Tensor:
        """Divide heads (B, H, L, d) by their root mean square, and multiply by a weight (d,)."""
        root_mean_square = x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return weight * (x / (root_mean_square + 1e-6))

    def forward(self, tokens: Tensor, heads: int) -> KV:
        """Project image tokens (B, N, D) to K' and V', each (B, H, N, d)."""
        key, value = super().forward(tokens, heads)
        return self.normed(key, self.norm_image.scale), value


class AdaptiveKV(TimedKV):
    """Projections of InstantX' adapter for SD3: tokens pass a norm that the time modulates.

    The picture's queries and keys, and the image's keys, pass norms of the adapter.
    """

    norms = ("norm_q.weight", "norm_k.weight")

    def __init__(self, token_dim: int, inner_dim: int, head_dim: int, time_dim: int) -> None:
        super().__init__(token_dim, inner_dim)
        self.head_dim, self.time_dim = head_dim, time_dim
        self.modulation = nn.Linear(time_dim, 2 * token_dim)
        self.norm_q = nn.RMSNorm(head_dim)
        self.norm_k = nn.RMSNorm(head_dim)
        self.norm_image = nn.RMSNorm(head_dim)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        """Build the projections for tensors of these shapes, by their names in this module."""
        inner_dim, token_dim = shapes["to_k.weight"]
        (head_dim,), (_, time_dim) = shapes["norm_q.weight"], shapes["modulation.weight"]
        return cls(token_dim, inner_dim, head_dim, time_dim)

    def at(self, tokens: Tensor, heads: int, moment: Tensor) -> KV:
        """Project image tokens (B, N, D), at an embedded time (B, W), to K' and V' (B, H, N, d)."""
        tokens, moment = (x.to(self.to_k.weight.dtype) for x in (tokens, moment))
        shift, scale = self.modulation(F.silu(moment))[:, None].chunk(2, -1)
        tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift
        key, value = self(tokens, heads)
        return self.normed(key, self.norm_image.weight), value


@dataclass(frozen=True)
class AttentionForm:
    """One way to attend to an image.

    families     of base models that a published adapter fits; the first is the one that it was
                 trained for. Empty: new adapters attend so, each for its own family
    layers       pattern of the names of the layers that it conditions
    states       module of one layer's W'_k and W'_v
    all_rows     whether rows of the text are conditioned too, in layers that join both; under a
                 mask with the least of its weights
    text_stream  whether those of the text are conditioned in layers that keep them apart, too
    after_block  whether the image's attention is added after the whole block, without an output
                 layer; else before the attention's output layer
    rotary       argument of the attention's call by which the query is rotated first; "" for none
    normed       whether the query is divided by its root mean square in each head
    taps         projections of the layer whose results it reads as they are, before the layer's own
                 norms: of the query, and if there is one softmax over the picture's and the image's
                 keys, of keys and values too; (): the family's query
    time         what a timestep as the model gets it is multiplied by, to be from 1000 to 0; 0: the
                 tokens do not depend on the time
    adapter      adapter that makes keys and values at each step; in the form of its prompts alone
    widened      whether the tokens pass the base model's own projection of text before W'
    text_rows    setting of the base model for the width of its text, after whose rows the tokens
                 are appended instead of being attended to: see `imprompt.families.text_rows`; "" if
                 they are not
    """

    name: str
    families: tuple[str, ...]
    layers: str
    states: type[PublishedKV]
    all_rows: bool = False
    text_stream: bool = False
    after_block: bool = False
    rotary: str = ""
    normed: bool = False
    taps: tuple[str, ...] = ()
    time: float = 0
    adapter: Any = None
    widened: bool = False
    text_rows: str = ""

    def fits(self, family: str) -> tuple[str, ...]:
        """Return the families of base models that an adapter for `family` fits."""
        return self.families or (family,)

    @property
    def timed(self) -> bool:
        """Whether image tokens depend on the time."""
        return self.time > 0

    @property
    def keyless(self) -> bool:
        """Whether prompts hold patches instead of keys and values."""
        return self.timed or bool(self.text_rows)

    def keyless_prompt(self, adapter: Any, patches: Tensor, branches: int) -> ImagePrompt:
        """Return a prompt that holds patches: the adapter makes its keys and values at each step.

        Of rows of the text none are made.

        patches  (R, P, W), or (R, K, P, W) of K pictures
        """
        ones = patches.new_ones(len(adapter.injection.sizes_of(self)), 1)
        patches = patches if patches.ndim == 4 else patches[:, None]
        form = replace(self, adapter=adapter) if self.timed else self
        return ImagePrompt((), (), ones, branches=branches, form=form, patches=patches)

    def __deepcopy__(self, _: Any) -> Self:
        """Return the form itself: it does not change, and copied prompts share their adapter."""
        return self

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
        AttentionForm(
            "instantx-sd3", ("sd3",), r".*", AdaptiveKV, taps=("to_q", "to_k", "to_v"), time=1
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
        AttentionForm("instantcharacter", ("flux",), r".*", CharacterKV, taps=("to_q",), time=1000),
        AttentionForm("redux", ("flux",), r".*", PublishedKV, text_rows="joint_attention_dim"),
    )
}
