"""Attention processor for transformers: it runs the original processor and adds the image prompts.

diffusers computes an attention by calling `attention.processor(attention, ...)`. Here the original
processor is called with a view of the attention, in which two things differ: the query tap, whose
result is recorded, and the output tap, to whose input the image prompts' attention is added. So no
attention is implemented again, and changes by other tools (LoRA, fused projections) keep their
effect.

Shape letters: B batch, L rows of the query, H heads, d head width; P image prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from imprompt.adapter import ImageStates, add_image_attention, for_batch
from imprompt.errors import MismatchError
from imprompt.families.forms import AttentionForm

Layout = Literal["BLHd", "BHLd", "BLD"]
FORWARDED = ("_attention_backend", "_parallel_config")  # attributes set by diffusers


class LayerConditioning(NamedTuple):
    """Conditioning of one layer in one call of the model.

    images   K' and V' (B or 1, H, N, d) of every prompt, and its bias
    weights  (P, B or 1, 1, L or 1, 1)
    rows     rows of the query that are conditioned: a slice, or indices (B, picture's rows)
    form     published way to attend; None: that of new adapters
    norms    weights (d,) of the adapter's own norms of the query, and of keys if it reads those
    """

    images: tuple[ImageStates, ...]
    weights: Tensor
    rows: slice | Tensor
    form: AttentionForm | None = None
    norms: tuple[Tensor, ...] = ()


class Taps(NamedTuple):
    """Where a layer's query is recorded and where the image's attention is added.

    query   attribute whose result is the query
    layout  of that query
    out     attribute of the output layer; None if the image's attention is added to the result
    """

    query: str
    layout: Layout
    out: str | None


class AttentionView:
    """View of an attention for its own processor, with some attributes replaced."""

    def __init__(self, attention: Any, replaced: dict[str, Any]) -> None:
        self.__dict__["_attention"] = attention
        self.__dict__["_replaced"] = replaced

    def __getattr__(self, name: str) -> Any:
        replaced = self.__dict__["_replaced"]
        return replaced[name] if name in replaced else getattr(self.__dict__["_attention"], name)


class OutputTap:
    """Replacement of an output layer, or of a list that begins with one.

    It applies `add` before that layer.
    """

    def __init__(self, layer: Any, add: Callable[[Tensor], Tensor]) -> None:
        self.layer, self.add = layer, add

    def __getitem__(self, index: int) -> Callable[[Tensor], Tensor]:
        return self.layer[index] if index else lambda x: self.layer[0](self.add(x))

    def __len__(self) -> int:
        return len(self.layer)

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the output layer after `add`."""
        return self.layer(self.add(x))


class ImageProcessor:
    """Processor that runs the original one, and adds the image prompts' attention.

    It holds no weights. `conditioning` is set before a call of the model, for that call.
    """

    def __init__(self, original: Any, taps: Taps, heads: int) -> None:
        self.original, self.taps, self.heads = original, taps, heads
        self.conditioning: tuple[LayerConditioning, ...] | None = None  # one for each form
        self.added = False  # in the last call: layers that added nothing are reported

    def run(self, attention: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the attention, and add the image prompts' attention if there is one."""
        if self.conditioning is None:
            return self.original(attention, *args, **kwargs)
        taps = self.taps
        before, after = (
            [one for one in self.conditioning if after_block(one) is late] for late in (False, True)
        )
        recorded: dict[str, Tensor] = {}

        def recording(name: str) -> Callable[[Tensor], Tensor]:
            def record(x: Tensor) -> Tensor:
                recorded[name] = result = getattr(attention, name)(x)
                return result

            return record

        def read(one: LayerConditioning) -> list[Tensor]:
            if one.norms:
                return own_states(recorded, one, self.heads)
            return [rotated(as_heads(recorded[taps.query], taps.layout, self.heads), one, kwargs)]

        def added(x: Tensor, conditioning: Sequence[LayerConditioning]) -> Tensor:
            self.added = True
            for one in conditioning:
                query, *own = read(one)
                x = with_image(x, query, one, own)
            return x

        def add(x: Tensor) -> Tensor:
            return added(x, before) if before else x

        names = {taps.query, *(name for one in self.conditioning for name in own_taps(one))}
        replaced: dict[str, Any] = {name: recording(name) for name in names}
        if taps.out is not None:
            replaced[taps.out] = OutputTap(getattr(attention, taps.out), add)
        out = self.original(AttentionView(attention, replaced), *args, **kwargs)
        if taps.out is None:
            out = (add(out[0]), *out[1:]) if isinstance(out, tuple) else add(out)
        if not after:
            return out
        whole = out if isinstance(out, tuple) else (out,)
        return *whole, added(torch.zeros_like(whole[0]), after)  # the block adds its third part


def after_block(conditioning: LayerConditioning) -> bool:
    """Return whether the image's attention is added after the whole block."""
    return conditioning.form is not None and conditioning.form.after_block


def own_taps(conditioning: LayerConditioning) -> tuple[str, ...]:
    """Return the projections whose results the form reads; none if it reads the family's query."""
    return conditioning.form.taps if conditioning.form is not None else ()


def own_states(
    recorded: Mapping[str, Tensor], conditioning: LayerConditioning, heads: int
) -> list[Tensor]:
    """Return query, and if the form reads them keys and values, each (B, H, L, d).

    Query and keys pass the adapter's own norms. Raise MismatchError if the layer did not compute
    them one by one.
    """
    form = conditioning.form
    assert form is not None
    if missed := [name for name in form.taps if name not in recorded]:
        raise MismatchError(
            f"adapters of the {form.name} kind read {missed[0]} of each attention, which this "
            "model does not compute by itself: call unfuse_qkv_projections() first"
        )
    states = [as_heads(recorded[name], "BLD", heads) for name in form.taps]
    count = len(conditioning.norms)
    normed = map(form.states.normed, states[:count], conditioning.norms)  # pyright: ignore
    return [*normed, *states[count:]]


def rotated(query: Tensor, conditioning: LayerConditioning, kwargs: Mapping[str, Any]) -> Tensor:
    """Return a query (B, H, L, d), rotated by its places if the form has it so."""
    form = conditioning.form
    if form is None or not form.rotary or kwargs.get(form.rotary) is None:
        return query
    from diffusers.models.embeddings import apply_rotary_emb

    return apply_rotary_emb(query, kwargs[form.rotary])  # pyright: ignore[reportReturnType]


def as_heads(query: Tensor, layout: Layout, heads: int) -> Tensor:
    """Return a query in any layout as (B, H, L, d)."""
    if layout == "BLD":
        query = query.unflatten(-1, (heads, -1))
    return query if layout == "BHLd" else query.transpose(1, 2)


def with_image(x: Tensor, query: Tensor, conditioning: LayerConditioning,
               own: Sequence[Tensor] = ()) -> Tensor:  # fmt: skip
    """Add the image prompts' attention to the picture's rows of x.

    query  (B, H, L, d)
    x      (B, L, width of the heads or more), (B, L, H, d), or the picture's rows of that alone
    own    the picture's keys and values (B, H, L, d), if there is one softmax over these too
    """
    images, weights, rows = conditioning[:3]
    if own:
        images = tuple(after_own(own, image) for image in images)
    picture = picture_rows(query, rows).to(images[0][0].dtype)
    added = add_image_attention(picture.new_zeros(()).expand_as(picture), picture, images, weights)
    added = added.transpose(1, 2).to(x.dtype)  # (B, H, I, d) -> (B, I, H, d)
    added = added if x.ndim == 4 else added.flatten(2)
    if wider := x.shape[-1] - added.shape[-1]:  # in fused layers: first the heads' columns
        added = F.pad(added, (0, wider))
    whole = x.shape[1] == query.shape[2]  # else x is the picture's rows, then perhaps references
    if isinstance(rows, Tensor):
        index = rows[..., *(None,) * (x.ndim - 2)].expand_as(added)
        return x.scatter_add(1, index, added)
    start = rows.indices(query.shape[2])[0] if whole else 0
    after = x.shape[1] - start - added.shape[1]
    if (start, after) != (0, 0):
        added = F.pad(added, (0, 0) * (x.ndim - 2) + (start, after))
    return x + added


def after_own(own: Sequence[Tensor], image: ImageStates) -> ImageStates:
    """Return an image's K' and V', and its bias, after the picture's own keys and values.

    They are for one softmax over both.

    own  keys and values of the picture (B, H, L, d)
    """
    key, value, *bias = for_batch(image, len(own[0]))
    length = own[0].shape[2]
    joined = (torch.cat(pair, 2) for pair in zip(own, (key, value), strict=True))
    return *joined, *(F.pad(one, (length, 0)) for one in bias)


def picture_rows(query: Tensor, rows: slice | Tensor) -> Tensor:
    """Return those rows of a query (B, H, L, d)."""
    if isinstance(rows, slice):
        return query[:, :, rows]
    index = rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index)


def processor_for(original: Any, taps: Taps, heads: int) -> ImageProcessor:
    """Return a processor that replaces `original`."""
    return processor_class(type(original))(original, taps, heads)


@cache
def processor_class(original: type) -> type[ImageProcessor]:
    """Return the class of processors that replace those of class `original`.

    Its call wraps the original's, so that it has the same signature: diffusers passes on only the
    arguments named there, and `torch.compile` cannot read a signature that is set by itself.
    """

    @wraps(original.__call__)
    def call(self: ImageProcessor, attention: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run(attention, *args, **kwargs)

    members = {name: forwarded(name) for name in FORWARDED if hasattr(original, name)}
    return type(f"Image{original.__name__}", (ImageProcessor,), {"__call__": call, **members})


def forwarded(name: str) -> property:
    """Return a property that reads and writes the original processor's attribute."""

    def read(self: ImageProcessor) -> Any:
        return getattr(self.original, name)

    def write(self: ImageProcessor, value: Any) -> None:
        setattr(self.original, name, value)

    return property(read, write)


def unreached(processors: Sequence[tuple[str, ImageProcessor]]) -> list[str]:
    """Return the names of layers that added nothing in the last call."""
    return [name for name, one in processors if one.conditioning and not one.added]
