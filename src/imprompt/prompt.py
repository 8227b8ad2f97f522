"""The image prompt that attention layers read, and operations on the rows of its batch.

A base model runs a batch of rows: for every branch of guidance (negative, positive) all items.
Shape letters: R rows, N image tokens, H heads, d head width, P points of the noise schedule.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imprompt.errors import MismatchError

KEY = "ip_hidden_states"  # keyword that passes image prompts to a model, as in diffusers


class ImagePrompt(NamedTuple):
    """K' and V' of every cross-attention layer for one image prompt, and how strongly each applies.

    Image tokens do not change while a picture is sampled, so they are projected once per prompt,
    not once per step. Changing the tensors does not recompile a compiled model.

    keys, values  per layer (R, H, N, d), or (1, H, N, d) for all rows
    scale         (layers, R or 1), or (layers, R or 1, P) over progress from 0 to 1, for windows
    mask          (R or 1, h, w) in [0, 1]: where it applies; resized to the layer's latents
    bias          (R or 1, N): logarithm of each token's weight; weight 2 acts as the token twice
    low_rank      per attention, self-attentions too: see `imprompt.attention.low_rank`
    branches      of guidance in R: 1, or 2 with all negative rows before all positive ones
    form          of a published adapter for a transformer: see `imprompt.families.forms`; its keys
                  are those of the layers that the form conditions
    patches       (R or 1, K, P, W) of K pictures, in prompts without keys: what these are made of
                  at each step, where they depend on the time (`imprompt.families.timed`), or rows
                  of the text (`imprompt.families.text_rows`); else None
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    scale: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    low_rank: tuple[Any, ...] = ()
    branches: int = 1
    form: Any = None
    patches: Tensor | None = None

    @property
    def layers(self) -> int:
        """Number of the layers that it conditions."""
        return len(self.keys if self.patches is None else self.scale)

    def with_scale(self, scale: float | Tensor) -> "ImagePrompt":
        """Return the prompt with another scale.

        scale  a number, (layers,), (layers, R) or (layers, R, P)

        Raises MismatchError for any other shape.
        """
        layers = self.layers
        # A number becomes a tensor without waiting for a GPU.
        new = scale.to(self.scale) if isinstance(scale, Tensor) else self.scale.new_full((), scale)
        table = new if new.ndim > 1 else new.reshape(-1, 1)
        if table.ndim > 3 or len(table) not in (1, layers):
            raise MismatchError(
                f"scale of shape {list(new.shape)}: give one number, {layers} (one per layer) "
                f"or {layers} rows of items"
            )
        return self._replace(scale=table.expand(layers, *table.shape[1:]).contiguous())

    def positive_alone(self) -> "ImagePrompt":
        """Return a prompt of one branch with a negative branch beside it, where it is inactive."""
        scale = torch.cat([torch.zeros_like(self.scale), self.scale], 1)
        doubled = self.map_rows(lambda part, axis: torch.cat([part] * 2, axis))
        return doubled._replace(scale=scale, branches=2)

    @property
    def rows(self) -> int:
        """Number of rows R, or 1 if every part is for all rows."""
        parts = [*self.keys, *self.values, self.scale[0], self.mask, self.bias, self.patches]
        return max(len(part) for part in parts if part is not None)

    @property
    def bytes(self) -> int:
        """Size of the keys and values, or of what they are made of, in bytes."""
        made_of = () if self.patches is None else (self.patches,)
        return sum(state.nbytes for state in self.keys + self.values + made_of)

    def map_rows(self, change: Callable[[Tensor, int], Tensor]) -> "ImagePrompt":
        """Apply `change(tensor, axis of the rows)` to every tensor that has rows."""
        return self._replace(
            keys=tuple(change(key, 0) for key in self.keys),
            values=tuple(change(value, 0) for value in self.values),
            scale=change(self.scale, 1),
            mask=None if self.mask is None else change(self.mask, 0),
            bias=None if self.bias is None else change(self.bias, 0),
            patches=None if self.patches is None else change(self.patches, 0),
        )

    def branch(self, number: int) -> "ImagePrompt":
        """Return one branch of guidance alone: 0 negative, -1 positive."""

        def part(tensor: Tensor, axis: int) -> Tensor:
            return branches(tensor, self.branches, axis)[number]

        return self if self.branches == 1 else self.map_rows(part)._replace(branches=1)

    def with_branches(self, order: Sequence[int]) -> "ImagePrompt":
        """Return the prompt with these branches, in this order: 0 negative, -1 positive."""

        def part(tensor: Tensor, axis: int) -> Tensor:
            if tensor.shape[axis] == 1:
                return tensor
            own = branches(tensor, self.branches, axis)
            return torch.cat([own[number] for number in order], axis)

        return self.map_rows(part)._replace(branches=len(order))


def check_batch(prepared: int, batch: int) -> None:
    """Raise MismatchError unless what has `prepared` rows can be expanded to a batch."""
    if prepared not in (1, batch):
        raise MismatchError(
            f"the image prompt was prepared for a batch of {prepared}, the base model runs a batch "
            f"of {batch}; with guidance the batch holds every unconditional item, then every "
            "conditional one"
        )


def branches(tensor: Tensor, count: int, axis: int) -> tuple[Tensor, ...]:
    """Split a tensor into the rows of each branch; a single row is used for every branch."""
    return (tensor,) * count if tensor.shape[axis] == 1 else tensor.chunk(count, axis)


class PromptGroup:
    """Image prompts for different parts of a batch that share one attention."""

    def __init__(self, prompt: ImagePrompt) -> None:
        self.kind = sharing_key(prompt)
        self.prompts: dict[int, ImagePrompt] = {}  # by part
        self.full_mask: Tensor | None = None  # for prompts without a mask

    def takes(self, prompt: ImagePrompt) -> bool:
        """Return whether the prompt can share this group's attention."""
        mask, full = prompt.mask, self.full_mask
        fits = mask is None or full is None or mask.shape[1:] == full.shape[1:]
        return fits and self.kind == sharing_key(prompt)

    def add(self, part: int, prompt: ImagePrompt) -> None:
        """Add the prompt for that part."""
        self.prompts[part] = prompt
        if prompt.mask is not None:
            self.full_mask = torch.ones_like(prompt.mask[:1])

    def joined(self, rows: Sequence[int]) -> ImagePrompt:
        """Return one prompt for all parts of the batch.

        rows  number of rows of each part; in a part without a prompt of this group, the result is
              inactive
        """
        some = next(iter(self.prompts.values()))
        inactive = some.map_rows(lambda tensor, axis: torch.zeros_like(tensor.narrow(axis, 0, 1)))
        inactive = inactive._replace(mask=None)
        parts = [self.prompts.get(number, inactive) for number in range(len(rows))]
        points = max((part.scale.shape[2] for part in parts if part.scale.ndim == 3), default=0)

        def cat(tensors: Iterable[Tensor | None], axis: int = 0) -> Tensor | None:
            """Join the parts' tensors, each expanded to the part's rows; None if they are None."""
            given = [tensor for tensor in tensors if tensor is not None]
            if not given:
                return None
            return torch.cat([expand(t, n, axis) for t, n in zip(given, rows, strict=True)], axis)

        def timed(scale: Tensor) -> Tensor:
            return scale[..., None].expand(-1, -1, points) if points and scale.ndim == 2 else scale

        masks = [self.full_mask if part.mask is None else part.mask for part in parts]
        states = zip(*(part.keys for part in parts), strict=True)
        values = zip(*(part.values for part in parts), strict=True)
        return some._replace(
            keys=tuple(map(cat, states)),
            values=tuple(map(cat, values)),
            scale=cat((timed(part.scale) for part in parts), 1),
            mask=cat(masks),
            bias=cat(part.bias for part in parts),
            patches=cat(part.patches for part in parts),
            branches=1,
        )


def expand(tensor: Tensor, rows: int, axis: int = 0) -> Tensor:
    """Expand a tensor of one row to `rows`; any other tensor must have that many rows."""
    if tensor.shape[axis] == rows:
        return tensor
    sizes = [-1] * tensor.ndim
    sizes[axis] = rows
    return tensor.expand(sizes)


def sharing_key(prompt: ImagePrompt) -> Any:
    """Return a key that is equal for prompts that can share an attention."""
    low_rank = id(prompt.low_rank) if prompt.low_rank else None
    patches = None if prompt.patches is None else prompt.patches.shape[1:]
    shapes = [key.shape[1:] for key in prompt.keys], patches
    return shapes, prompt.bias is None, low_rank, prompt.form


# number of rows, and the prompts that condition them, each of that many rows or of 1
Part = tuple[int, Sequence[ImagePrompt]]


def stack(parts: Sequence[Part]) -> list[ImagePrompt]:
    """Return prompts for a batch that consists of all parts, one part after the other.

    Each part is conditioned on its prompts in their order, so its result equals the one that it has
    alone, to the bit. Raises MismatchError if a prompt has other rows than its part, or if parts
    differ in the low-rank part (FaceID), which acts on a whole batch.
    """
    low_ranks = [
        {id(prompt.low_rank) for prompt in prompts if prompt.low_rank} for _, prompts in parts
    ]
    if any(low_rank != low_ranks[0] for low_rank in low_ranks):
        raise MismatchError(
            "FaceID's low-rank part acts on a whole batch: run items that do not share it "
            "in separate batches"
        )
    groups: list[PromptGroup] = []
    for number, (rows, prompts) in enumerate(parts):
        after = 0
        for prompt in prompts:
            if prompt.rows not in (1, rows):
                raise MismatchError(
                    f"an image prompt for a batch of {prompt.rows} in a part of {rows} rows"
                )
            free = (i for i in range(after, len(groups)) if groups[i].takes(prompt))
            place = next(free, len(groups))
            if place == len(groups):
                groups.append(PromptGroup(prompt))
            groups[place].add(number, prompt)
            after = place + 1
    return [group.joined([rows for rows, _ in parts]) for group in groups]


def stack_items(items: Sequence[Sequence[ImagePrompt]], order: Sequence[int]) -> list[ImagePrompt]:
    """Return prompts for a batch of items: for every branch of guidance all items.

    The prompts of an item are for that item alone. `order` names the branch of the prompts, 0 the
    negative and -1 the positive one, for each branch of the batch. Raises MismatchError if a prompt
    has the rows of several items.
    """
    for prompt in (prompt for prompts in items for prompt in prompts):
        if prompt.rows not in (1, prompt.branches):
            raise MismatchError(
                f"an image prompt for a batch of {prompt.rows}: "
                f"give the rows of one item, {len(order)}"
            )
    parts = [
        (1, [prompt.branch(number) for prompt in prompts]) for number in order for prompts in items
    ]
    return [prompt._replace(branches=len(order)) for prompt in stack(parts)]
