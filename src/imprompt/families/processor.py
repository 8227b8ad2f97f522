"""Attention processor for transformers: it runs the original processor and adds the image prompts.

diffusers computes an attention by calling `attention.processor(attention, ...)`. Here the original
processor is called with a view of the attention, in which two things differ: the query tap, whose
result is recorded, and the output tap, to whose input the image prompts' attention is added. So no
attention is implemented again, and changes by other tools (LoRA, fused projections) keep their
effect.

Shape letters: B batch, L rows of the query, H heads, d head width; P image prompts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, wraps
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from imprompt.adapter import ImageStates, attention, for_batch
from imprompt.errors import MismatchError
from imprompt.families.forms import AttentionForm, head_normed

Layout = Literal["BLHd", "BHLd", "BLD"]
FORWARDED = ("_attention_backend", "_parallel_config")  # attributes set by diffusers


class LayerConditioning(NamedTuple):
    """Conditioning of one layer in one call of the model.

    images   K' and V' (B or 1, H, N, d) of every prompt, and its bias
    weights  (P, B or 1, 1, L or 1, 1)
    rows     rows of the query that are conditioned: a slice, or indices (B, picture's rows)
    form     way to attend; None: that of new adapters without a norm
    norms    weights (d,) of the adapter's own norms of the query, and of keys if it reads those
    text     whether rows of a text that the layer keeps apart are conditioned too
    """

    images: tuple[ImageStates, ...]
    weights: Tensor
    rows: slice | Tensor
    form: AttentionForm | None = None
    norms: tuple[Tensor, ...] = ()
    text: bool = False


class Taps(NamedTuple):
    """Where a layer's query is recorded and where the image's attention is added.

    query   attribute whose result is the query
    layout  of that query
    out     attribute of the output layer; None if the image's attention is added to the result
    text    query and output layer of the text's rows, where the layer keeps them apart
    """

    query: str
    layout: Layout
    out: str | None
    text: tuple[str, str] | None = None


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


class Stream:
    """Rows of an attention, the picture's or the text's, from their query to their output.

    query   attribute whose result is the query, in that layout
    given   arguments of the attention's call, by name
    first   whether the rows are the first of both: the text's
    """

    def __init__(self, attention: Any, query: str, layout: Layout, heads: int,
                 given: Mapping[str, Any], first: bool = False) -> None:  # fmt: skip
        self.attention, self.query, self.heads = attention, query, heads
        self.layout: Layout = layout
        self.given, self.first = given, first
        self.results: dict[str, Tensor] = {}  # of projections, by name
        self.added = False  # whether anything was

    def recording(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return a projection of the attention that remembers its result."""
        layer = getattr(self.attention, name)

        def record(x: Tensor) -> Tensor:
            self.results[name] = result = layer(x)
            return result

        return record

    def states(self, one: LayerConditioning) -> list[Tensor]:
        """Return what a form reads: a query, for one softmax keys and values too (B, H, L, d)."""
        if one.norms:
            return own_states(self.results, one, self.heads)
        query = as_heads(self.results[self.query], self.layout, self.heads)
        return [rotated(query, one.form, self.given, self.first)]

    def add(self, x: Tensor, conditioning: Sequence[LayerConditioning]) -> Tensor:
        """Add the image's attention of several forms to x."""
        for one in conditioning:
            x = with_image(x, self.states(one), one)
            self.added = True
        return x

    def parts(self, x: Tensor, conditioning: Sequence[LayerConditioning]) -> Tensor:
        """Return the image's attention of several forms, shaped as x."""
        self.added = True
        first, *others = (image_part(x, self.states(one), one) for one in conditioning)
        return sum(others, first)


class ImageProcessor:
    """Processor that runs the original one, and adds the image prompts' attention.

    It holds no weights. `conditioning` is set before a call of the model, for that call.
    """

    names: tuple[str, ...] = ()  # of the original's arguments after the attention

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
        given = dict(zip(self.names, args, strict=False)) | kwargs
        picture = Stream(attention, taps.query, taps.layout, self.heads, given)
        read = {taps.query, *(name for one in self.conditioning for name in own_taps(one))}
        replaced: dict[str, Any] = {name: picture.recording(name) for name in read}

        def tap(name: str, stream: Stream, conditioning: Sequence[LayerConditioning]) -> None:
            replaced[name] = OutputTap(
                getattr(attention, name), lambda x: stream.add(x, conditioning)
            )

        if taps.out is not None:
            tap(taps.out, picture, before)
        if taps.text is not None and (both := [of_text(one) for one in before if one.text]):
            name, out_name = taps.text
            text = Stream(attention, name, taps.layout, self.heads, given, first=True)
            replaced[name] = text.recording(name)
            tap(out_name, text, both)
        out = self.original(AttentionView(attention, replaced), *args, **kwargs)
        if taps.out is None:
            changed = picture.add(out[0] if isinstance(out, tuple) else out, before)
            out = (changed, *out[1:]) if isinstance(out, tuple) else changed
        if after:
            whole = out if isinstance(out, tuple) else (out,)
            out = *whole, picture.parts(whole[0], after)  # the block adds the third
        self.added = picture.added
        return out


def of_text(conditioning: LayerConditioning) -> LayerConditioning:
    """Return the conditioning of the text's rows: with the least of the weights under a mask."""
    least = conditioning.weights.amin(3, keepdim=True)
    return conditioning._replace(weights=least, rows=slice(None))


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


def rotated(
    query: Tensor, form: AttentionForm | None, given: Mapping[str, Any], first: bool
) -> Tensor:
    """Return a query (B, H, L, d), rotated by its places if the form has it so.

    given  arguments of the attention's call, by name: the rotary embeddings are of the text's rows
           and then the picture's, or of the picture's alone
    first  whether the query is of the text's rows
    """
    if form is None or not form.rotary or given.get(form.rotary) is None:
        return query
    from diffusers.models.embeddings import apply_rotary_emb

    rows = query.shape[2]
    own = slice(0, rows) if first else slice(-rows, None)
    places = tuple(part[own] for part in given[form.rotary])
    return apply_rotary_emb(query, places)  # pyright: ignore[reportReturnType]


def as_heads(query: Tensor, layout: Layout, heads: int) -> Tensor:
    """Return a query in any layout as (B, H, L, d)."""
    if layout == "BLD":
        query = query.unflatten(-1, (heads, -1))
    return query if layout == "BHLd" else query.transpose(1, 2)


def with_image(x: Tensor, states: Sequence[Tensor], conditioning: LayerConditioning) -> Tensor:
    """Add the image prompts' attention to the picture's rows of x.

    states  query, and for one softmax the picture's keys and values, each (B, H, L, d)
    x       (B, L, width of the heads or more), (B, L, H, d), or the picture's rows of that alone
    """
    rows = conditioning.rows
    if isinstance(rows, Tensor):
        added = image_attention(states, conditioning, x)
        index = rows[..., *(None,) * (x.ndim - 2)].expand_as(added)
        return x.scatter_add(1, index, added)
    if torch.is_grad_enabled():
        return x + image_part(x, states, conditioning)
    part = x[:, picture_start(x, states[0], rows) :]
    for weight, attended in image_terms(states, conditioning, x):
        # in place: x is the base's own result, which nothing else reads
        part[:, : attended.shape[1], ..., : attended.shape[-1]].addcmul_(weight, attended)
    return x


def image_terms(states: Sequence[Tensor], conditioning: LayerConditioning, x: Tensor
                ) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yield every image prompt's weight λ and Attention(Q, K', V'), shaped as x.

    I picture's rows: (B or 1, I or 1, 1) and (B, I, H·d), or with the heads apart
    (B or 1, I or 1, 1, 1) and (B, I, H, d), as they are in x.
    """
    images, weights, rows, form = conditioning[:4]
    query, *own = states
    picture = picture_rows(query, rows).to(images[0][0].dtype)
    if form is not None and form.normed:
        picture = head_normed(picture)
    for image, weight in zip(images, weights, strict=True):
        key, value, *bias = after_own(own, image) if own else for_batch(image, len(picture))
        attended = attention(picture, key, value, *bias).transpose(1, 2).to(x.dtype)
        weight = weight.transpose(1, 2).to(x.dtype)
        yield (weight, attended) if x.ndim == 4 else (weight.flatten(2), attended.flatten(2))


def image_attention(states: Sequence[Tensor], conditioning: LayerConditioning, x: Tensor) -> Tensor:
    """Return Σ λ ∘ Attention(Q, K', V') of the picture's rows, as wide as x."""
    (weight, attended), *others = image_terms(states, conditioning, x)
    total = weight * attended
    for weight, attended in others:
        total = torch.addcmul(total, weight, attended)
    wider = x.shape[-1] - total.shape[-1]  # in fused layers: first the heads' columns
    return F.pad(total, (0, wider)) if wider else total


def image_part(x: Tensor, states: Sequence[Tensor], conditioning: LayerConditioning) -> Tensor:
    """Return what is added to x: the picture's rows as in `image_attention`, zeros in others."""
    rows = conditioning.rows
    assert isinstance(rows, slice)
    added, start = image_attention(states, conditioning, x), picture_start(x, states[0], rows)
    after = x.shape[1] - start - added.shape[1]
    return F.pad(added, (0, 0) * (x.ndim - 2) + (start, after)) if start or after else added


def picture_start(x: Tensor, query: Tensor, rows: slice) -> int:
    """Return the first of the picture's rows in x, which may have all rows of the query or not.

    Else x is the picture's rows, then perhaps references.
    """
    return rows.indices(query.shape[2])[0] if x.shape[1] == query.shape[2] else 0


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

    members: dict[str, Any] = {
        name: forwarded(name) for name in FORWARDED if hasattr(original, name)
    }
    members["names"] = tuple(signature(original.__call__).parameters)[2:]  # after self, attention
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
