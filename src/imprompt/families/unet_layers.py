"""Names and numbers of a UNet's attentions in published adapter files, and known UNets.

Files identify a text cross-attention by its module's name, or by its place among all attention
processors: cross-attention i has the number 2·i + 1, because a self-attention precedes each.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

OLDEST = "unet"  # the family of adapter files that do not name one
STATE_PREFIX = "unet."  # prefix of the base model's names in training states of accelerate
# order in which diffusers registers a UNet's blocks: the middle is last
REGISTRATION_ORDER = ("down_blocks", "up_blocks", "mid_block")


class UNetBlocks(NamedTuple):
    """Positions of a UNet's text cross-attentions.

    They are (attentions, transformer blocks in each) of every block.
    """

    down: tuple[tuple[int, int], ...]
    up: tuple[tuple[int, int], ...]
    mid: tuple[int, int]


SD = UNetBlocks(
    down=((2, 1), (2, 1), (2, 1), (0, 0)), up=((0, 0), (3, 1), (3, 1), (3, 1)), mid=(1, 1)
)
SDXL = UNetBlocks(down=((0, 0), (2, 2), (2, 10)), up=((3, 10), (3, 2), (0, 0)), mid=(1, 10))

# (text width, cross-attentions) -> base model
MODELS = {
    (768, 16): ("SD 1.x", SD),
    (1024, 16): ("SD 2.x", SD),
    (2048, 70): ("SDXL", SDXL),
}


def numbered_layers(count: int) -> tuple[str, ...]:
    """Return the numbers of that many cross-attentions."""
    return tuple(str(2 * layer + 1) for layer in range(count))


def numbered_attentions(layers: int) -> tuple[str, ...]:
    """Return the numbers of all attentions of a UNet with that many cross-attentions."""
    return tuple(str(number) for number in range(2 * layers))


def with_self_attentions(layers: Sequence[str]) -> tuple[str, ...]:
    """Return the names of all attentions, each cross-attention after its self-attention."""
    return tuple(
        name for layer in layers for name in (layer.removesuffix("attn2") + "attn1", layer)
    )


def in_model_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return layer names in the order in which diffusers registers them."""

    def place(name: str) -> tuple[bool, int, list[int], str]:
        block = name.split(".")[0]
        known = block in REGISTRATION_ORDER
        return (
            not known,
            REGISTRATION_ORDER.index(block) if known else 0,
            [int(n) for n in re.findall(r"\d+", name)],
            name,
        )

    return tuple(sorted(names, key=place))


def layer_names(blocks: UNetBlocks) -> tuple[str, ...]:
    """Return the module names of the text cross-attentions.

    They are in the order of diffusers' `attn_processors`.
    """

    def of_block(block: str, attentions: int, depth: int) -> Iterator[str]:
        for attention in range(attentions):
            yield from (
                f"{block}.attentions.{attention}.transformer_blocks.{i}.attn2" for i in range(depth)
            )

    numbered = [(f"down_blocks.{i}", row) for i, row in enumerate(blocks.down)]
    numbered += [(f"up_blocks.{i}", row) for i, row in enumerate(blocks.up)]
    return tuple(
        name
        for block, row in [*numbered, ("mid_block", blocks.mid)]
        for name in of_block(block, *row)
    )


def known_layers(token_dim: int, count: int) -> tuple[str, ...] | None:
    """Return the layer names of the known model of that text width and number of layers.

    Returns None if no such model is known.
    """
    model = MODELS.get((token_dim, count))
    return layer_names(model[1]) if model else None
