"""Checks that a file holds a complete adapter.

The tensors that its variant must have are derived from the sizes of those that it has. Shape
letters as in `imprompt.adapter`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imprompt.checkpoints import layouts
from imprompt.checkpoints.layouts import Layout
from imprompt.checkpoints.tensors import some
from imprompt.errors import CheckpointError
from imprompt.variants import Variant

Shapes = Mapping[str, tuple[int, ...]]
Expected = tuple[int | None, ...] | None  # None: any size, or any shape


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its key."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def blank_projection(row: Variant, shapes: Shapes, head_dim: int | None = None) -> nn.Module:
    """Build the projection of these sizes on the meta device.

    It takes no memory, and no random initialisation is computed.

    head_dim  width of a resampler's attention heads, if it is another than the published one
    """
    heads: Any = {} if head_dim is None else {"head_dim": head_dim}
    with torch.device("meta"):
        return row.projection.from_shapes(shapes, **heads)


def check_whole(
    path: Path,
    row: Variant,
    layout: Layout,
    layers: Sequence[str],
    shapes: Shapes,
    head_dim: int | None = None,
) -> None:
    """Raise CheckpointError unless `shapes` are exactly those of this variant.

    The message names the missing, unexpected and misshapen tensors. `head_dim` is as in
    `blank_projection`.
    """
    own = {
        key.removeprefix(layout.projection): shape
        for key, shape in shapes.items()
        if key.startswith(layout.projection)
    }
    projection, token_dim = _expected_projection(row, own, head_dim)
    if token_dim is None or row.widened:
        # the added projections are then compared with the first of them
        token_dim = text_dim(layout, layers, shapes)
    expected = {layout.projection + key: shape for key, shape in projection.items()}
    expected |= _expected_kv(layout, layers or ("*",), shapes, token_dim)
    if row.lora:
        expected |= _expected_lora(layout, layers or ("*",), shapes, token_dim)
    wrong = {
        "missing": [key for key in expected if key not in shapes],
        "unexpected": [key for key in shapes if key not in expected],
        "misshapen": [
            f"{key} {_text(shapes[key])}" + (f" instead of {_text(shape)}" if shape else "")
            for key, shape in expected.items()
            if key in shapes and not _fits(shapes[key], shape)
        ],
    }
    if any(wrong.values()):
        faults = "; ".join(f"{kind}: {some(names)}" for kind, names in wrong.items() if names)
        feature = own.get(row.feature_key)
        made_for = layouts.suits(row, feature[-1] if feature else None, token_dim, len(layers))
        raise CheckpointError(
            f"{path} is not a complete {row.name} adapter ({layout.name} layout). {faults}. It was "
            f"probably made for {made_for}"
        )


def text_dim(layout: Layout, layers: Sequence[str], shapes: Shapes) -> int | None:
    """Return D, the width that the first W' in the file reads; None if there is none."""
    keys = [shape for layer in layers if len(shape := shapes.get(layout.key(layer, "k"), ())) == 2]
    return keys[0][1] if keys else None


class _Sizes(dict[str, tuple[int, ...]]):
    """Shapes for `from_shapes` that record the keys that are read, with defaults for missing ones.

    So a projection can be built, and all its keys be known, even if a tensor that determines a size
    is missing.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        self.asked: list[str] = []

    def __getitem__(self, key: str) -> tuple[int, ...]:
        self.asked.append(key)
        return self.get(key, (1,) if "norm" in key else (1, 1))


def _expected_projection(
    row: Variant, shapes: Shapes, head_dim: int | None
) -> tuple[dict[str, Expected], int | None]:
    """Return the shape of every key that this variant's projection must have, and D.

    D is None if the shapes do not determine it.
    """
    sizes = _Sizes(shapes)
    try:
        needed = shapes_of(blank_projection(row, sizes, head_dim).state_dict())
        if any(key not in shapes for key in sizes.asked):
            return dict.fromkeys(needed), None
        return dict(needed), row.token_shape(needed)[1]
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError):
        # these sizes do not fit together in such a module
        return dict.fromkeys(shapes) | dict.fromkeys(sizes.asked, ()), None


def _expected_kv(
    layout: Layout, layers: Sequence[str], shapes: Shapes, token_dim: int | None
) -> dict[str, Expected]:
    """Return the shape (H·d, D) of the keys of W'_k and W'_v of every layer.

    Both have as many rows as the first of them.
    """
    expected: dict[str, Expected] = {}
    for layer in layers:
        pair = [layout.key(layer, part) for part in "kv"]
        expected |= dict.fromkeys(pair, (_rows(pair, shapes), token_dim))
    return expected


def _expected_lora(
    layout: Layout, layers: Sequence[str], shapes: Shapes, token_dim: int | None
) -> dict[str, Expected]:
    """Return the shape of the keys of all low-rank parts: down (r, in), up (out, r).

    They are those of every cross-attention layer and of the self-attention before it. The hidden
    states are as wide as the layer's keys; the layer's own keys and values are projected from the
    text. The first of a pair determines the rank.
    """
    expected: dict[str, Expected] = {}
    for number, attention in enumerate(layout.attentions(layers)):
        layer = layers[number // 2]
        hidden = _rows([layout.key(layer, part) for part in "kv"], shapes)
        keys = layout.lora_keys(attention)
        for part in ("to_q", "to_k", "to_v", "to_out"):
            down, up = (keys[f"{part}.{half}.weight"] for half in ("down", "up"))
            rank = next(
                (
                    shapes[key][axis]
                    for axis, key in enumerate((down, up))
                    if len(shapes.get(key, ())) == 2
                ),
                None,
            )
            reads = token_dim if number % 2 and part in ("to_k", "to_v") else hidden
            expected |= {down: (rank, reads), up: (hidden, rank)}
    return expected


def _rows(keys: Sequence[str], shapes: Shapes) -> int | None:
    """Return the number of rows of the first matrix among these keys, or None."""
    return next((shapes[key][0] for key in keys if len(shapes.get(key, ())) == 2), None)


def _fits(shape: tuple[int, ...], expected: Expected) -> bool:
    if expected is None:
        return True
    return len(shape) == len(expected) and all(
        size in (None, ours) for ours, size in zip(shape, expected, strict=True)
    )


def _text(shape: Sequence[int | None]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
