"""One processor for every transformer: it runs the processor that it replaced, and adds the image.

diffusers computes an attention by calling `attention.processor(attention, ...)`. Here the original
processor is called with a view of the attention, in which two things differ: the query tap, whose
result is recorded, and the output tap, whose input gets the image prompts' attention added first.
So no attention is written anew, and what other tools did to it (LoRA, fused projections) stays.

Shape letters: B batch, L rows of the query, H heads, d head width; P image prompts.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from imprompt.adapter import ImageStates, add_image_attention

Layout = Literal["BLHd", "BHLd", "BLD"]
FORWARDED = ("_attention_backend", "_parallel_config")  # what diffusers sets on processors


class LayerConditioning(NamedTuple):
    """What one layer is conditioned on in one call of the model.

    images   K' and V' (B or 1, H, N, d) of every prompt, and its bias
    weights  (P, B or 1, 1, L or 1, 1)
    rows     of the query that are the picture's
    """

    images: tuple[ImageStates, ...]
    weights: Tensor
    rows: slice


class Taps(NamedTuple):
    """Where a layer's query is recorded and where the image is added.

    query   attribute whose result is the query
    layout  of that query
    out     attribute of the output layer, or None: the image is added to what is returned
    """

    query: str
    layout: Layout
    out: str | None


class AttentionView:
    """An attention as its own processor sees it, but for some attributes."""

    def __init__(self, attention: Any, replaced: dict[str, Any]) -> None:
        self.__dict__["_attention"] = attention
        self.__dict__["_replaced"] = replaced

    def __getattr__(self, name: str) -> Any:
        replaced = self.__dict__["_replaced"]
        return replaced[name] if name in replaced else getattr(self.__dict__["_attention"], name)


class OutputTap:
    """Stands for an output layer, or a list that begins with one: `add` goes before it."""

    def __init__(self, layer: Any, add: Callable[[Tensor], Tensor]) -> None:
        self.layer, self.add = layer, add

    def __getitem__(self, index: int) -> Callable[[Tensor], Tensor]:
        return self.layer[index] if index else lambda x: self.layer[0](self.add(x))

    def __len__(self) -> int:
        return len(self.layer)

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(self.add(x))


class ImageProcessor:
    """A processor that runs the original one, and adds the image prompts' attention.

    It holds no weights. `conditioning` is set before a call of the model, for that call.
    """

    def __init__(self, original: Any, taps: Taps, heads: int) -> None:
        self.original, self.taps, self.heads = original, taps, heads
        self.conditioning: LayerConditioning | None = None
        self.added = False  # in the last call: a layer that was passed by is told

    def run(self, attention: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the attention, with the image if there is one."""
        conditioning = self.conditioning
        if conditioning is None:
            return self.original(attention, *args, **kwargs)
        taps, layer = self.taps, getattr(attention, self.taps.query)
        recorded: list[Tensor] = []

        def record(x: Tensor) -> Tensor:
            recorded.append(query := layer(x))
            return query

        def add(x: Tensor) -> Tensor:
            self.added = True
            query = as_heads(recorded[-1], taps.layout, self.heads)
            return with_image(x, query, conditioning)

        replaced: dict[str, Any] = {taps.query: record}
        if taps.out is not None:
            replaced[taps.out] = OutputTap(getattr(attention, taps.out), add)
        out = self.original(AttentionView(attention, replaced), *args, **kwargs)
        if taps.out is not None:
            return out
        return (add(out[0]), *out[1:]) if isinstance(out, tuple) else add(out)


def as_heads(query: Tensor, layout: Layout, heads: int) -> Tensor:
    """Return a query in any layout as (B, H, L, d)."""
    if layout == "BLD":
        query = query.unflatten(-1, (heads, -1))
    return query if layout == "BHLd" else query.transpose(1, 2)


def with_image(x: Tensor, query: Tensor, conditioning: LayerConditioning) -> Tensor:
    """Add the image's attention to x (B, rows, width of the heads and perhaps more).

    The query (B, H, L, d) has the rows of x, or those of a text before them as well.
    """
    images, weights, rows = conditioning
    picture = query[:, :, rows].to(images[0][0].dtype)
    added = add_image_attention(picture.new_zeros(()).expand_as(picture), picture, images, weights)
    added = added.transpose(1, 2).flatten(2).to(x.dtype)  # (B, H, L, d) -> (B, L, H·d)
    start = rows.indices(query.shape[2])[0] - (query.shape[2] - x.shape[1])
    after = x.shape[1] - start - added.shape[1]
    wider = x.shape[-1] - added.shape[-1]  # of fused layers, whose first columns are the heads'
    if (start, after, wider) != (0, 0, 0):
        added = F.pad(added, (0, wider, start, after))
    return x + added


def processor_for(original: Any, taps: Taps, heads: int) -> ImageProcessor:
    """Return a processor in the place of `original`."""
    return processor_class(type(original))(original, taps, heads)


@cache
def processor_class(original: type) -> type[ImageProcessor]:
    """Return the class of processors that replace those of class `original`.

    Its call has the original's signature: diffusers passes on only the arguments named there.
    """

    def call(self: ImageProcessor, attention: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run(attention, *args, **kwargs)

    call.__signature__ = inspect.signature(original.__call__)  # pyright: ignore[reportFunctionMemberAccess]
    members = {name: forwarded(name) for name in FORWARDED if hasattr(original, name)}
    return type(f"Image{original.__name__}", (ImageProcessor,), {"__call__": call, **members})


def forwarded(name: str) -> property:
    """Return a property that is the original processor's."""

    def read(self: ImageProcessor) -> Any:
        return getattr(self.original, name)

    def write(self: ImageProcessor, value: Any) -> None:
        setattr(self.original, name, value)

    return property(read, write)


def unreached(processors: Sequence[tuple[str, ImageProcessor]]) -> list[str]:
    """Return the names of layers that added nothing in the last call."""
    return [name for name, processor in processors if not processor.added]
