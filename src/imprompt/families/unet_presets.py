"""Published presets of block maps for UNets.

They define which cross-attentions are conditioned on an image prompt, and how strongly. A preset
without a table, by depth alone, is for any model.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

Map = Mapping[str, float]  # pattern -> factor: see `imprompt.generation.blocks`
NOTHING: Map = MappingProxyType({})


class Strengths(NamedTuple):
    """Factors of a preset.

    factors   pattern -> factor
    boosted   pattern -> factor, multiplied by the caller's boost
    negative  pattern -> 1 or 0: see `imprompt.generation.blocks.BlockMap`
    """

    factors: Map
    boosted: Map = NOTHING
    negative: Map = NOTHING


class Tables(NamedTuple):
    """Factors of a preset whose blocks are known for two structures of base model."""

    sd: Strengths
    sdxl: Strengths


class Preset(NamedTuple):
    """A preset: its meaning, and its strengths.

    A function of depth, 0 at the first transformer and 1 after the last, is for any model.
    """

    meaning: str
    strengths: Strengths | Callable[[float], float] | Tables


# Findings of the node packs: in SDXL, layout and style are in one transformer each; in SD 1.x they
# are spread over several.
LAYOUT, STYLE = "down_blocks.2.attentions.1", "up_blocks.0.attentions.1"
SD_LAYOUT = {"down_blocks.2.attentions.0": 0.25, "down_blocks.2.attentions.1": 1.0}
SD_STYLE = {
    "down_blocks.0": 1.0,
    "down_blocks.1": 1.0,
    "up_blocks.1.attentions.2": 1.0,
    "up_blocks.2": 1.0,
    "up_blocks.3": 1.0,
}
SD_FAINT = {"mid_block": 0.1, "up_blocks.1.attentions.0": 0.1, "up_blocks.1.attentions.1": 0.1}
SD_DEEP = {"down_blocks.2": 1.0, "mid_block": 1.0}  # InstantStyle's layout
ALL = {"*": 1.0}

PRESETS: dict[str, Preset] = {
    # The weight types of ComfyUI_IPAdapter_plus, under its names.
    "linear": Preset("every block alike", Strengths(ALL)),
    "ease in": Preset(
        "strong in the first blocks, fading to the last", lambda x: 0.05 + 0.95 * (1 - x)
    ),
    "ease out": Preset("weak in the first blocks, growing to the last", lambda x: 0.05 + 0.95 * x),
    "ease in-out": Preset("strong in the middle", lambda x: 0.05 + 0.95 * (1 - abs(2 * x - 1))),
    "reverse in-out": Preset("strong at both ends", lambda x: 0.05 + 0.95 * abs(2 * x - 1)),
    "weak input": Preset("a fifth in the down blocks", Strengths(ALL | {"down_blocks": 0.2})),
    "weak middle": Preset("a fifth in the mid block", Strengths(ALL | {"mid_block": 0.2})),
    "weak output": Preset("a fifth in the up blocks", Strengths(ALL | {"up_blocks": 0.2})),
    "strong middle": Preset(
        "a fifth outside the mid block", Strengths({"*": 0.2, "mid_block": 1.0})
    ),
    "style transfer": Preset(
        "colours, material and manner, not the layout",
        Tables(sd=Strengths(SD_STYLE), sdxl=Strengths({STYLE: 1.0})),
    ),
    "composition": Preset(
        "the layout alone", Tables(sd=Strengths(SD_LAYOUT), sdxl=Strengths({LAYOUT: 1.0}))
    ),
    "strong style transfer": Preset(
        "everything but the layout",
        Tables(sd=Strengths(ALL | {"down_blocks.2": 0.0}), sdxl=Strengths(ALL | {LAYOUT: 0.0})),
    ),
    "style and composition": Preset(
        "style transfer, and composition times boost",
        Tables(sd=Strengths(SD_STYLE, SD_LAYOUT), sdxl=Strengths({STYLE: 1.0}, {LAYOUT: 1.0})),
    ),
    "strong style and composition": Preset(
        "every block, those of the layout times boost",
        Tables(sd=Strengths(ALL, {"down_blocks.2": 1.0}), sdxl=Strengths(ALL, {LAYOUT: 1.0})),
    ),
    "style transfer precise": Preset(
        "style transfer, pushed away from the picture's layout (times boost)",
        Tables(
            sd=Strengths(SD_STYLE, SD_LAYOUT, {"down_blocks.2": 1}),
            sdxl=Strengths({STYLE: 1.0}, {LAYOUT: 1.0}, {LAYOUT: 1}),
        ),
    ),
    "composition precise": Preset(
        "composition, pushed away from the picture's style (times boost)",
        Tables(
            sd=Strengths(SD_LAYOUT, ALL | SD_FAINT, {"*": 1, "down_blocks.2": 0}),
            sdxl=Strengths({LAYOUT: 1.0}, {"*": 0.1, STYLE: 1.0}, {"*": 1, LAYOUT: 0}),
        ),
    ),
    # InstantStyle's (arXiv 2404.02733); those for SD 1.x are its authors' experiment. InvokeAI
    # names them style and composition.
    "instantstyle style": Preset(
        "InstantStyle's style blocks",
        Tables(sd=Strengths({"up_blocks.1": 1.0}), sdxl=Strengths({STYLE: 1.0})),
    ),
    "instantstyle layout": Preset(
        "InstantStyle's layout blocks", Tables(sd=Strengths(SD_DEEP), sdxl=Strengths({LAYOUT: 1.0}))
    ),
    "instantstyle style and layout": Preset(
        "both, the layout times boost",
        Tables(
            sd=Strengths({"up_blocks.1": 1.0}, SD_DEEP), sdxl=Strengths({STYLE: 1.0}, {LAYOUT: 1.0})
        ),
    ),
    # InvokeAI's, where no other has the same blocks.
    "invokeai style strong": Preset(
        "InvokeAI's style_strong: most blocks, not the layout's",
        Tables(
            sd=Strengths(
                {"down_blocks.0": 1.0, "down_blocks.1": 1.0, "up_blocks.1": 1.0, "up_blocks.2": 1.0}
            ),
            sdxl=Strengths(
                {"down_blocks.1": 1.0, "down_blocks.2.attentions.0": 1.0, "up_blocks": 1.0}
            ),
        ),
    ),
    "invokeai style precise": Preset(
        "InvokeAI's style_precise: InstantStyle's style, pushed away from its layout (times boost)",
        Tables(
            sd=Strengths({"up_blocks.1": 1.0}, SD_DEEP, SD_DEEP),
            sdxl=Strengths({STYLE: 1.0}, {LAYOUT: 1.0}, {LAYOUT: 1}),
        ),
    ),
}
