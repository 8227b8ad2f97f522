"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721): an image prompt for a frozen text-to-image model.

The paper in one file, in its order: image features become a few image tokens (section 3.2.1), every text
cross-attention gets a second pair of key and value projections for them, and the two attentions are summed
(section 3.2.2, equations 3 to 5 and 8). Base models of other families come in through the `Family` protocol.

Shape letters: B batch, N image tokens, T text tokens, L queries (pixels of a latent), H heads, D token width,
E width of the image embedding, d = head width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imprompt.errors import MismatchError


class ImageProjection(nn.Module):
    """The base variant's projection: one global image embedding (B, E) -> N image tokens (B, N, D).

    A linear layer and a layer norm (section 3.2.1). The parameters are named as in the paper's checkpoints.
    """

    def __init__(self, embedding_dim: int, token_dim: int, tokens: int = 4) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(embedding_dim, tokens * token_dim)
        self.norm = nn.LayerNorm(token_dim)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        rows, embedding_dim = shapes["proj.weight"]
        (token_dim,) = shapes["norm.weight"]
        return cls(embedding_dim, token_dim, rows // token_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.norm(self.proj(embedding).unflatten(-1, (self.tokens, -1)))  # (B, E) -> (B, N, D)


class ImageKV(nn.Module):
    """The added key and value projections W'_k and W'_v of one cross-attention (equation 4), without bias."""

    def __init__(self, token_dim: int, inner_dim: int) -> None:
        super().__init__()
        self.to_k = nn.Linear(token_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(token_dim, inner_dim, bias=False)

    @classmethod
    def beside(cls, attention: Any) -> Self:
        """Start from the text's own W_k and W_v (section 3.2.2); sizes are read off the attention that is joined."""
        new = cls(attention.to_k.in_features, attention.to_k.out_features)
        new.to_k.weight.data.copy_(attention.to_k.weight.data)
        new.to_v.weight.data.copy_(attention.to_v.weight.data)
        return new

    def forward(self, tokens: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Image tokens (B, N, D) -> K' and V', each (B, H, N, d), in this projection's precision."""
        tokens = tokens.to(self.to_k.weight.dtype)
        return split_heads(self.to_k(tokens), heads), split_heads(self.to_v(tokens), heads)


KV = tuple[Tensor, Tensor]  # keys and values of one cross-attention, each (B, H, N, d)
Image = tuple[Tensor, ...]  # the same of an image prompt, and its bias (B or 1, 1, 1, N) if it has one


class ImagePrompt(NamedTuple):
    """What an image prompt is to the attention: K' and V' of every site, and how strongly each is heard, where and when.

    Image tokens do not change while an image is sampled, so they are projected once per prompt, not once per step.
    All are tensors: changing them recompiles nothing.
    """

    keys: tuple[Tensor, ...]  # per site (B, H, N, d); B is the batch that the base model sees, or 1 for all alike
    values: tuple[Tensor, ...]  # per site (B, H, N, d)
    scale: Tensor  # (sites, B) or (sites, 1), or (sites, B or 1, T) by training timestep, for windows and easings
    mask: Tensor | None = None  # (B or 1, h, w): where it is heard, 0 to 1; any size, resized to the site's latents
    bias: Tensor | None = (
        None  # (B or 1, N): the logarithm of each token's weight; weight 2 is as the token given twice, 0 as absent
    )
    lora: tuple[Any, ...] = ()  # by attention, self-attentions too: the adapter's low-rank part, if it has one: `attention.lora`

    def with_scale(self, scale: float | Tensor) -> "ImagePrompt":
        """The same prompt, heard otherwise: one number, one per site (sites,), per site and item (sites, B) or also by timestep."""
        sites = len(self.keys)
        new = scale.to(self.scale) if isinstance(scale, Tensor) else self.scale.new_full((), scale)  # a number waits for no GPU
        table = new if new.ndim > 1 else new.reshape(-1, 1)
        if table.ndim > 3 or len(table) not in (1, sites):
            raise MismatchError(
                f"scale of shape {list(new.shape)}: give one number, {sites} (one per site) or {sites} rows of items"
            )
        return self._replace(scale=table.expand(sites, *table.shape[1:]).contiguous())

    @property
    def bytes(self) -> int:
        """What its keys and values hold."""
        return sum(state.nbytes for state in self.keys + self.values)


LONG = 1024  # keys, from which on whole score matrices cost too much


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, H·d) -> (B, H, L, d)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention(Q, K, V) = softmax(QKᵀ/√d) V (equation 3); query (B, H, L, d), key and value (B, H, T, d) -> (B, H, L, d)."""
    if query.is_cpu and query.requires_grad and key.shape[2] < LONG:  # training on a CPU: the fused kernel is slower there
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return (scores if mask is None else scores + mask).softmax(-1).to(value.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def decoupled_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, images: Sequence[Image],
                        weights: Tensor) -> Tensor:  # fmt: skip
    """Equation 5, with the weight λ of equation 8: Z = Attention(Q, K, V) + Σ λ ∘ Attention(Q, K', V'), over the image prompts.

    query (B, H, L, d), text key and value (B, H, T, d), mask broadcastable to (B, H, L, T), a prompt's K' and V'
    (B or 1, H, N, d) and its bias, weights (prompts, B or 1, 1, L or 1, 1) -> (B, H, L, d).
    """
    out = attention(query, key, value, mask)
    for image, weight in zip(images, weights, strict=True):
        out = torch.addcmul(out, weight, attention(query, *for_batch(image, len(query))))
    return out


def for_batch(image: Image, batch: int) -> Image:
    """K' and V' (B or 1, H, N, d) -> (B, H, N, d); MismatchError if they were prepared for another batch."""
    key, value, *bias = image
    if (prepared := len(key)) == batch:
        return image
    if prepared != 1:
        raise MismatchError(
            f"the image prompt was prepared for a batch of {prepared}, the base model runs a batch of {batch}; "
            "with guidance the batch holds every unconditional item, then every conditional one"
        )
    return key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), *bias


class Graft(Protocol):
    """What joins adapters to one base model."""

    sites: dict[str, Any]  # the text cross-attentions by module name, in the order in which published checkpoints number them

    @property
    def dtype(self) -> torch.dtype:
        """In which they compute."""
        ...

    def as_text(self, tokens: Tensor) -> Tensor:
        """Image tokens (B, N, D) as wide as the text that the sites read."""
        ...

    def leave(self) -> None:
        """One adapter less; the last one gives the base model back as it was."""
        ...

    def held_bytes(self) -> int:
        """What the text's keys and values hold that were projected once."""
        ...

    def forget(self) -> None:
        """Drop them."""
        ...


class Family(Protocol):
    """How a family of base models is joined: where its text cross-attentions are and how each is made to listen."""

    name: str

    def sites(self, model: nn.Module) -> dict[str, Any]:
        """See `Graft.sites`."""
        ...

    def join(self, model: nn.Module, lora: bool) -> Graft:
        """Let the sites of `model`, with `lora` all its attentions, listen to image prompts; one graft serves all its adapters."""
        ...


class IPAdapter(nn.Module):
    """The adapter: an image projection, and W'_k and W'_v for each text cross-attention ("site") of a base model.

    The base model is neither edited nor registered here: `attach` swaps the attention's processors, which hold no
    weights, and adds a hook; `detach` puts back the very objects that were there.
    """

    def __init__(self, projection: nn.Module, image_kv: Sequence[ImageKV], family: Family,
                 lora: Any = None) -> None:  # fmt: skip
        """lora  the low-rank part that FaceID adapters add to every attention of the base model: an `attention.lora.LoRA`"""
        super().__init__()
        self.projection = projection
        self.image_kv = nn.ModuleList(image_kv)
        self.lora = lora
        self.family = family
        self._graft: Graft | None = None

    @classmethod
    def beside(cls, model: nn.Module, family: Family, projection: nn.Module) -> Self:
        """A new adapter for `model`, its W' started from the model's own weights."""
        return cls(projection, [ImageKV.beside(site) for site in family.sites(model).values()], family)

    def tokens(self, features: Tensor | tuple[Tensor, ...]) -> Tensor:
        """Image features, (B, E), (B, patches, E) or both by variant -> image tokens (B, N, D), in the projection's precision."""
        dtype = next(self.projection.parameters()).dtype
        return self.projection(*(feature.to(dtype) for feature in ((features,) if isinstance(features, Tensor) else features)))

    def prompt(self, tokens: Tensor, null_tokens: Tensor | None = None, scale: float | Tensor = 1.0) -> ImagePrompt:
        """Project image tokens (B, N, D) to K' and V' of every site of the attached model.

        With classifier-free guidance give `null_tokens` too, the projection of the null feature, (B or 1, N, D): the
        result then holds the unconditional half before the conditional one, as diffusers' pipelines stack them.
        """
        graft = self.graft
        if null_tokens is not None:
            tokens = torch.cat([null_tokens.expand(len(tokens), -1, -1), tokens])
        tokens, dtype = graft.as_text(tokens), graft.dtype
        pairs = [kv(tokens, site.heads) for kv, site in zip(self.image_kv, graft.sites.values(), strict=True)]
        keys, values = zip(*((key.to(dtype), value.to(dtype)) for key, value in pairs), strict=True)
        lora = () if self.lora is None else self.lora.weights(dtype)
        return ImagePrompt(keys, values, tokens.new_ones(len(keys), 1), lora=lora).with_scale(scale)

    @property
    def graft(self) -> Graft:
        """What joins it to a model; MismatchError if nothing does."""
        if self._graft is None:
            raise MismatchError("the adapter is not attached to a model: call attach(model) first")
        return self._graft

    def attach(self, model: nn.Module) -> Self:
        """Let `model` hear image prompts passed as `cross_attention_kwargs={"ip_hidden_states": prompt}`, or a list of prompts.

        Several adapters can be attached to one model. Raises MismatchError if the sizes differ. Without a prompt, or at
        scale 0, the model computes what it did before.
        """
        if self._graft is not None:
            raise MismatchError("the adapter is attached already: call detach() first")
        self.check_fits(self.family.sites(model))
        self._graft = self.family.join(model, self.lora is not None)
        return self

    def detach(self) -> None:
        """Leave the base model; the last adapter gives it back as it was."""
        if self._graft is not None:
            self._graft.leave()
            self._graft = None

    def held_bytes(self) -> int:
        """What the base model's cross-attentions hold of the text's keys and values, projected once: see `attention.graft`."""
        return 0 if self._graft is None else self._graft.held_bytes()

    def forget(self) -> None:
        """Drop that. Needed only where weights of the base changed without a mark: through `.data`, or by a fused optimizer."""
        if self._graft is not None:
            self._graft.forget()

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[Self]:
        self.attach(model)
        try:
            yield self
        finally:
            self.detach()

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is the adapter alone, attached to nothing: the base model does not go along."""
        return {**super().__getstate__(), "_graft": None}

    def check_fits(self, sites: Mapping[str, Any]) -> None:
        """Raise MismatchError, with both numbers, unless this adapter was made for cross-attentions of these sizes."""
        pairs: list[tuple[str, Any, Any]] = [
            (name, site, kv) for (name, site), kv in zip(sites.items(), self.image_kv, strict=False)
        ]
        for name, site, kv in pairs:
            ours, theirs = kv.to_k.in_features, site.to_k.in_features
            if ours != theirs:
                raise MismatchError(
                    f"this adapter was trained for {ours}-wide text{known_as(ours)}; "
                    f"the text of this model is {theirs} wide{known_as(theirs)} ({name})"
                )
        if len(sites) != len(self.image_kv):
            raise MismatchError(f"this adapter joins {len(self.image_kv)} cross-attentions; this model has {len(sites)}")
        for name, site, kv in pairs:
            ours, theirs = kv.to_k.out_features, site.to_k.out_features
            if ours != theirs:
                raise MismatchError(f"this adapter was trained for {ours}-wide keys at {name}; this model's are {theirs} wide")


TEXT_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}


def known_as(text_width: int) -> str:
    return f" ({TEXT_WIDTHS[text_width]})" if text_width in TEXT_WIDTHS else ""
