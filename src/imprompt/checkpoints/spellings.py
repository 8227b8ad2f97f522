"""Another spelling of a resampler's tensors: diffusers', which reads both.

Its converter (`_convert_ip_adapter_image_proj_to_diffusers`) makes it of the original names, and
leaves files alone that are spelt so already.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# diffusers' name -> the original; n the layer's number
RESAMPLER = (
    (r"layers\.(\d+)\.ln0\.", r"layers.\1.0.norm1."),
    (r"layers\.(\d+)\.ln1\.", r"layers.\1.0.norm2."),
    (r"layers\.(\d+)\.attn\.to_out\.0\.", r"layers.\1.0.to_out."),
    (r"layers\.(\d+)\.attn\.", r"layers.\1.0."),
    (r"layers\.(\d+)\.ff\.0\.", r"layers.\1.1.0."),
    (r"layers\.(\d+)\.ff\.1\.net\.0\.proj\.", r"layers.\1.1.1."),
    (r"layers\.(\d+)\.ff\.1\.net\.2\.", r"layers.\1.1.3."),
)


def original_spelling(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors with the original names where diffusers' occur under a prefix.

    The projections to keys and values, two tensors there, are one in the original.
    """
    named = {
        renamed(key) if key.startswith(f"{prefix}layers.") else key: tensor
        for key, tensor in tensors.items()
    }
    for key in [
        key for key in named if re.fullmatch(rf"{re.escape(prefix)}.*\.0\.to_k\.weight", key)
    ]:
        value = key.replace(".to_k.", ".to_v.")
        if value in named and named[key].shape == named[value].shape:
            pair = named.pop(key), named.pop(value)
            named[key.replace(".to_k.", ".to_kv.")] = torch.cat(pair)
    return named


def renamed(key: str) -> str:
    """Return the original name of a resampler's tensor."""
    for theirs, ours in RESAMPLER:
        key = re.sub(theirs, ours, key)
    return key
