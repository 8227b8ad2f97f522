"""Files of adapters that others published for transformers: how their tensors are named.

Each layout is a row: it names every tensor of the projection and of a layer, so that one function
reads, checks and writes all of them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PublishedLayout:
    """How one kind of published files names its tensors.

    signature   patterns that all occur among the keys
    projection  prefix in the file -> prefix in the projection's module
    states      names in a layer's module -> key in the file, where {layer} is the layer's number;
                names joined by "+" are one tensor there, one after the other
    layer       name of the layer of a number in the base model; "" if the number alone does not
                tell it
    """

    name: str
    form: str
    variant: str
    signature: tuple[str, ...]
    projection: Mapping[str, str]
    states: Mapping[str, str]
    layer: str = ""

    def count(self, keys: Mapping[str, Any]) -> int:
        """Return the number of layers that a file with these keys should have."""
        pattern = re.escape(next(iter(self.states.values()))).replace(r"\{layer\}", r"(\d{1,3})")
        found = [int(match[1]) for key in keys if (match := re.fullmatch(pattern, key))]
        return max(found, default=-1) + 1

    def names(self, layers: int) -> Iterator[tuple[int, str, str]]:
        """Yield layer, names in its module and key in the file, of every layer's tensors."""
        for layer in range(layers):
            for names, key in self.states.items():
                yield layer, names, key.format(layer=layer)


def kv_names(key: str, *tensors: str) -> dict[str, str]:
    """Return the names of W'_k and W'_v, whose key has {part} for k or v and {tensor}."""
    return {
        f"to_{part}.{tensor}": key.replace("{part}", part).replace("{tensor}", tensor)
        for part in "kv"
        for tensor in tensors
    }


XLABS = "double_blocks.{layer}.processor.ip_adapter_double_stream_{part}_proj.{tensor}"
DOUBLE = "transformer_blocks.{}.attn"
NUMBERED = "ip_adapter.{layer}.to_{part}_ip.{tensor}"
# In the order in which they are tried: with biases before those without.
PUBLISHED_LAYOUTS = (
    PublishedLayout(
        "xlabs",
        "xlabs",
        "xlabs",
        (r"\.ip_adapter_double_stream_[kv]_proj\.",),
        {"ip_adapter_proj_model.": ""},
        kv_names(XLABS, "weight", "bias"),
        DOUBLE,
    ),
    PublishedLayout(
        "diffusers-xlabs",
        "xlabs",
        "xlabs",
        (r"^ip_adapter\.\d+\.to_k_ip\.bias$", r"^image_proj\.proj\.weight$"),
        {"image_proj.": ""},
        kv_names(NUMBERED, "weight", "bias"),
        DOUBLE,
    ),
    PublishedLayout(
        "instantx",
        "instantx",
        "instantx",
        (r"^ip_adapter\.0\.to_k_ip\.weight$", r"^image_proj\.proj\.2\."),
        {"image_proj.": ""},
        kv_names(NUMBERED, "weight"),
    ),
    PublishedLayout(
        "diffsynth",
        "instantx",
        "instantx",
        (r"^ipadapter_modules\.\d+\.to_k_ip\.weight$",),
        {"image_proj.": ""},
        kv_names("ipadapter_modules.{layer}.to_{part}_ip.{tensor}", "weight"),
    ),
    PublishedLayout(
        "hunyuandit",
        "hunyuandit",
        "hunyuandit",
        (r"\.kv_proj_ip_adapter\.",),
        {"ip_adapter_clip_len_trans_block.": "proj.", "ip_adapter_img_norm_cond.": "norm."},
        {
            "to_k.weight+to_v.weight": "blocks.{layer}.attn2.kv_proj_ip_adapter.weight",
            "to_k.bias+to_v.bias": "blocks.{layer}.attn2.kv_proj_ip_adapter.bias",
            "norm_k.weight": "blocks.{layer}.attn2.k_norm_ip_adapter.weight",
            "norm_k.bias": "blocks.{layer}.attn2.k_norm_ip_adapter.bias",
        },
        "blocks.{}.attn2",
    ),
)
