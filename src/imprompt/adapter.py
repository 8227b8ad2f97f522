"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721): an image prompt for a frozen text-to-image model.

The paper in one file, in its order: image features become a few image tokens (section 3.2.1), every
text cross-attention gets a second pair of key and value projections for them, and the two
attentions are summed (section 3.2.2, equations 3 to 5 and 8). Code for particular base models is in
`imprompt.families`.

Shape letters: B batch, N image tokens, T text tokens, L queries (pixels of a latent), H heads,
D token width, E width of the image embedding, d head width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imprompt.errors import MismatchError
from imprompt.families.base import Family, Injection, LayerSize, family_of
from imprompt.prompt import ImagePrompt, check_batch


class ImageProjection(nn.Module):
    """Projection of the base variant: an image embedding (B, E) to N image tokens (B, N, D).

    It is a linear layer and a layer norm (section 3.2.1). The parameters are named as in the
    paper's checkpoints.
    """

    def __init__(self, embedding_dim: int, token_dim: int, tokens: int = 4) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(embedding_dim, tokens * token_dim)
        self.norm = nn.LayerNorm(token_dim)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        """Build a projection for tensors of these shapes, by their names in a checkpoint."""
        rows, embedding_dim = shapes["proj.weight"]
        (token_dim,) = shapes["norm.weight"]
        return cls(embedding_dim, token_dim, rows // token_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        """Project an image embedding (B, E) to image tokens (B, N, D)."""
        return self.norm(self.proj(embedding).unflatten(-1, (self.tokens, -1)))


class ImageKV(nn.Module):
    """Added projections W'_k and W'_v of one cross-attention layer (equation 4), without bias."""

    def __init__(self, token_dim: int, inner_dim: int) -> None:
        super().__init__()
        self.to_k = nn.Linear(token_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(token_dim, inner_dim, bias=False)

    def forward(self, tokens: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Project image tokens (B, N, D) to K' and V', each (B, H, N, d), in the weights' dtype."""
        tokens = tokens.to(self.to_k.weight.dtype)
        return split_heads(self.to_k(tokens), heads), split_heads(self.to_v(tokens), heads)

    def check_fits(self, layer: str, size: LayerSize) -> None:
        """Raise MismatchError, with both widths, unless the keys fit a layer of that size."""
        if (ours := self.to_k.out_features) != size.inner:
            raise MismatchError(
                f"this adapter was trained for {ours}-wide keys at {layer}; "
                f"this model's are {size.inner} wide"
            )


KV = tuple[Tensor, Tensor]  # keys and values of one cross-attention, each (B, H, N, d)
ImageStates = tuple[Tensor, ...]  # K' and V' of an image prompt, and its bias (B or 1, 1, 1, N)

LONG = 1024  # number of keys from which on whole score matrices cost too much


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split the last dimension into heads: (B, L, H·d) -> (B, H, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute softmax(QKᵀ/√d) V (equation 3).

    query (B, H, L, d), key and value (B, H, T, d), mask broadcastable to (B, H, L, T) ->
    (B, H, L, d).
    """
    if query.is_cpu and query.requires_grad and key.shape[2] < LONG:
        # Training on a CPU: the fused kernel is slower there.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        scores = scores if mask is None else scores + mask
        return scores.softmax(-1).to(value.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def add_image_attention(out: Tensor, query: Tensor, images: Sequence[ImageStates],
                        weights: Tensor) -> Tensor:  # fmt: skip
    """Add Σ λ ∘ Attention(Q, K', V') over the image prompts (equation 8's second term).

    out and query (B, H, L, d), K' and V' (B or 1, H, N, d), weights λ
    (prompts, B or 1, 1, L or 1, 1) -> (B, H, L, d).
    """
    for image, weight in zip(images, weights, strict=True):
        key, value, *bias = for_batch(image, len(query))
        out = torch.addcmul(out, weight, attention(query, key, value, *bias))
    return out


def decoupled_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
                        images: Sequence[ImageStates], weights: Tensor) -> Tensor:  # fmt: skip
    """Compute Attention(Q, K, V) + Σ λ ∘ Attention(Q, K', V') (equations 5 and 8).

    The shapes are those of `attention` and `add_image_attention`.
    """
    return add_image_attention(attention(query, key, value, mask), query, images, weights)


def for_batch(image: ImageStates, batch: int) -> ImageStates:
    """Expand K' and V' (B or 1, H, N, d) to the batch.

    Raises MismatchError if they were prepared for another batch.
    """
    key, value, *bias = image
    check_batch(len(key), batch)
    if len(key) == batch:
        return image
    return key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), *bias


class IPAdapter(nn.Module):
    """Adapter: an image projection, and W'_k and W'_v for each text cross-attention of a model.

    The base model is neither edited nor registered here: `attach` replaces the processors of its
    attentions, which hold no weights, and adds hooks; `detach` restores the original processors.
    """

    def __init__(self, projection: nn.Module, image_kv: Sequence[ImageKV], family: Family,
                 low_rank: Any = None, form: Any = None,
                 own_width: bool = False) -> None:  # fmt: skip
        """Assemble an adapter from its parts.

        family     family of base models that the adapter is for
        low_rank   low-rank part that FaceID adapters add to every attention:
                   `imprompt.attention.low_rank.ModelLowRank`
        form       way to attend, of an adapter that has one: `imprompt.families.forms`
        own_width  whether its tokens have another width than the text of its base model
        """
        super().__init__()
        self.projection = projection
        self.image_kv = nn.ModuleList(image_kv)
        self.low_rank = low_rank
        self.family, self.form = family, form
        self.own_width = own_width
        self._injection: Injection | None = None

    @classmethod
    def for_model(cls, model: nn.Module, projection: nn.Module, low_rank: Any = None,
                  form: Any = None, token_dim: int | None = None) -> Self:  # fmt: skip
        """Make a new adapter for `model`; its family initialises W' (section 3.2.2).

        low_rank, form  as in `__init__`
        token_dim       width D of its tokens; that of the text that the layers read if not given
        """
        family = family_of(model)
        states = ImageKV if form is None else form.states
        image_kv, own_width = [], False
        for layer in family.layers(model).values():
            size = family.size(layer)
            width = token_dim or size.text
            own_width |= width != size.text
            image_kv.append(new := states(width, size.inner))
            family.start(layer, new.to_k.weight.data, new.to_v.weight.data)
        return cls(projection, image_kv, family, low_rank, form, own_width)

    def tokens(self, features: Tensor | tuple[Tensor, ...]) -> Tensor:
        """Project image features to image tokens (B, N, D), in the projection's precision.

        Where they depend on the time, return what they are made of at each step, (B, P, W).

        features  (B, E), (B, patches, E), or several as a tuple, depending on the variant
        """
        dtype = next(self.projection.parameters()).dtype
        parts = (features,) if isinstance(features, Tensor) else features
        return self.projection(*(part.to(dtype) for part in parts))

    def prompt(self, tokens: Tensor, null_tokens: Tensor | None = None,
               scale: float | Tensor = 1.0) -> ImagePrompt:  # fmt: skip
        """Project image tokens (B, N, D) to K' and V' of every layer of the attached model.

        For classifier-free guidance, give `null_tokens` too, the projection of the null feature,
        (B or 1, N, D): the prompt then has two branches, the negative one first. Tokens that depend
        on the time are (B, P, W), or (B, K, P, W) of K pictures, and are projected at each step.
        """
        injection = self.injection
        branches = 1 if null_tokens is None else 2
        if null_tokens is not None:
            tokens = torch.cat([null_tokens.expand(len(tokens), *tokens.shape[1:]), tokens])
        if self.keyless:
            return self.form.keyless_prompt(self, tokens, branches).with_scale(scale)
        reads: int = self.image_kv[0].to_k.in_features  # pyright: ignore
        tokens, dtype = injection.widen(tokens, reads), injection.dtype
        keys, values = [], []
        for kv, size in zip(self.image_kv, injection.sizes_of(self.form).values(), strict=True):
            key, value = kv(tokens, size.heads)
            keys.append(key.to(dtype))
            values.append(value.to(dtype))
        low_rank = () if self.low_rank is None else self.low_rank.weights(dtype)
        ones = tokens.new_ones(len(keys), 1)
        prompt = ImagePrompt(tuple(keys), tuple(values), ones, low_rank=low_rank, branches=branches,
                             form=self.form)  # fmt: skip
        return prompt.with_scale(scale)

    @property
    def keyless(self) -> bool:
        """Whether its prompts hold no keys and values: see `AttentionForm.keyless`."""
        return self.form is not None and self.form.keyless

    @property
    def injection(self) -> Injection:
        """Injection into the attached model; MismatchError if the adapter is not attached."""
        if self._injection is None:
            raise MismatchError("the adapter is not attached to a model: call attach(model) first")
        return self._injection

    def attach(self, model: nn.Module) -> Self:
        """Attach the adapter to `model`, so that `using` can condition it on image prompts.

        Several adapters can be attached to one model. Raises MismatchError if the sizes differ.
        Without a prompt, or at scale 0, the model's results do not change.
        """
        if self._injection is not None:
            raise MismatchError("the adapter is attached already: call detach() first")
        own = self.family.name
        fits = self.form.fits(own) if self.form else (own,)
        if (found := family_of(model)).name not in fits:
            raise MismatchError(
                f"this adapter is for base models of the {self.family.name} family; "
                f"this one is of the {found.name} family"
            )
        self.check_fits(model)
        self._injection = found.inject(model, self.low_rank is not None)
        return self

    def detach(self) -> None:
        """Detach the adapter; the last one to be detached restores the base model."""
        if self._injection is not None:
            self._injection.eject()
            self._injection = None

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[Self]:
        """Attach the adapter to `model` for the duration of a `with` block."""
        self.attach(model)
        try:
            yield self
        finally:
            self.detach()

    @contextmanager
    def using(self, *prompts: ImagePrompt, image_guidance: float | None = None) -> Iterator[None]:
        """Condition this thread's calls of the attached model on image prompts in a `with` block.

        `image_guidance` is a guidance scale for the image; the pipeline's own scale then applies to
        the text alone: see `imprompt.attention.image_guidance`. Raises MismatchError at the end if
        the prompts never reached the model.
        """
        with self.injection.using(prompts, image_guidance):
            yield

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the injection: a copy or pickle is attached to no model."""
        return {**super().__getstate__(), "_injection": None}

    def check_fits(self, model: nn.Module) -> None:
        """Raise MismatchError, with both sizes, unless the adapter fits the layers of `model`."""
        family = family_of(model)
        layers = family.layers(model)
        layers = self.form.of(layers) if self.form else layers
        sizes = {name: family.size(layer) for name, layer in layers.items()}
        for (name, size), kv in zip(sizes.items(), self.image_kv, strict=False):
            # those of a published form have a width of their own too
            if not self.own_width and not (self.form and self.form.families):
                self._check_text(name, size, kv.to_k.in_features)  # pyright: ignore
        if len(sizes) != len(self.image_kv):
            raise MismatchError(
                f"this adapter is for {len(self.image_kv)} cross-attentions; "
                f"this model has {len(sizes)}"
            )
        for (name, size), kv in zip(sizes.items(), self.image_kv, strict=True):
            kv.check_fits(name, size)  # pyright: ignore

    def _check_text(self, name: str, size: LayerSize, ours: int) -> None:
        if ours != size.text:
            known = [self.family.known_by_text(width) for width in (ours, size.text)]
            raise MismatchError(
                f"this adapter was trained for {ours}-wide text{known[0]}; "
                f"the text of this model is {size.text} wide{known[1]} ({name})"
            )
