"""Files of adapters that others published for transformers: how their tensors are named.

Each layout is a row: it names every tensor of the projection and of a layer, so that one function
reads, checks and writes all of them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PublishedLayout:
    """How one kind of published files names its tensors.

    signature   patterns that all occur among the keys
    projection  prefix in the file -> prefix in the projection's module
    spelling    parts of names in the file, below that prefix -> in the projection's module; {layer}
                is a number
    states      names in a layer's module -> key in the file, where {layer} is the layer's number;
                names joined by "+" are one tensor there, one after the other; none if layers have
                no tensors
    layer       name of the layer of a number in the base model; "" if the number alone does not
                tell it
    where       whether a file with that signature, given its tensors, is of this layout
    every       layers of the base model from one number to the next
    files       of a folder that holds one adapter -> prefix that its tensors are given
    """

    name: str
    form: str
    variant: str
    signature: tuple[str, ...]
    projection: Mapping[str, str]
    states: Mapping[str, str]
    layer: str = ""
    where: Callable[[Mapping[str, Any]], bool] = lambda _: True
    every: int = 1
    files: Mapping[str, str] = field(default_factory=dict)
    spelling: Mapping[str, str] = field(default_factory=dict)

    def module_name(self, key: str) -> str:
        """Return the name in the projection's module of a tensor in the file."""
        outer = next(outer for outer in self.projection if key.startswith(outer))
        name = key.removeprefix(outer)
        return self.projection[outer] + respelt(name, self.spelling.items())

    def file_key(self, name: str) -> str:
        """Return the key in the file of a tensor of the projection's module."""
        outer, inner = next(pair for pair in self.projection.items() if name.startswith(pair[1]))
        swapped = ((ours, theirs) for theirs, ours in self.spelling.items())
        return outer + respelt(name.removeprefix(inner), swapped)

    def count(self, keys: Mapping[str, Any]) -> int:
        """Return the number of layers that a file with these keys should have."""
        key = next(iter(self.states.values()), "")
        pattern = re.escape(key).replace(r"\{layer\}", r"(\d{1,3})")
        found = [int(match[1]) for key in keys if (match := re.fullmatch(pattern, key))]
        return max(found, default=-1) + 1

    def names(self, layers: int) -> Iterator[tuple[int, str, str]]:
        """Yield layer, names in its module and key in the file, of every layer's tensors."""
        for layer in range(layers):
            for names, key in self.states.items():
                yield layer, names, key.format(layer=layer)


def respelt(name: str, spelling: Iterable[tuple[str, str]]) -> str:
    """Return a name whose beginning is spelt in another way, by the first pair that fits."""
    for before, after in spelling:
        pattern = re.escape(before).replace(r"\{layer\}", r"(\d{1,3})")
        if match := re.match(rf"{pattern}(?=\.)", name):
            return after.format(layer=match[1]) + name[match.end() :]
    return name


def kv_names(key: str, *tensors: str) -> dict[str, str]:
    """Return the names of W'_k and W'_v, whose key has {part} for k or v and {tensor}."""
    return {
        f"to_{part}.{tensor}": key.replace("{part}", part).replace("{tensor}", tensor)
        for part in "kv"
        for tensor in tensors
    }


def resampled(tensors: Mapping[str, Any]) -> bool:
    """Return whether tokens are the same at all times, and layers normalise nothing of their own.

    Other adapters with a resampler differ in that.
    """
    return not any(".norm_ip" in key or ".time_embedding." in key for key in tensors)


def widened(tensors: Mapping[str, Any]) -> bool:
    """Return whether a resampler's tokens are of another width than the layers read."""

    def sizes(key: str) -> list[int]:
        return list(getattr(tensors.get(key), "shape", ()))

    given, read = sizes("image_proj.proj_out.weight"), sizes("ip_adapter.0.to_k_ip.weight")
    return resampled(tensors) and bool(given and read) and given[0] != read[-1]


def lite(tensors: Mapping[str, Any]) -> bool:
    """Return whether a Lynx' layers are those of its lite form: without registers and biases."""
    return not any(key.endswith((".registers", ".bias")) for key in tensors if "ip_layers" in key)


XLABS = "double_blocks.{layer}.processor.ip_adapter_double_stream_{part}_proj.{tensor}"
DOUBLE = "transformer_blocks.{}.attn"
NUMBERED = "ip_adapter.{layer}.to_{part}_ip.{tensor}"
RESAMPLER = {  # diffusers' names of a resampler's parts that is told the time -> the original's
    "layers.{layer}.ln0": "layers.{layer}.0.norm1",
    "layers.{layer}.ln1": "layers.{layer}.0.norm2",
    "layers.{layer}.attn.to_q": "layers.{layer}.0.to_q",
    "layers.{layer}.attn.to_kv": "layers.{layer}.0.to_kv",
    "layers.{layer}.attn.to_out.0": "layers.{layer}.0.to_out",
    "layers.{layer}.adaln_norm": "layers.{layer}.1.0",
    "layers.{layer}.ff.net.0.proj": "layers.{layer}.1.1",
    "layers.{layer}.ff.net.2": "layers.{layer}.1.3",
    "layers.{layer}.adaln_proj": "layers.{layer}.2.1",
}
SD3_STATES = kv_names(NUMBERED, "weight") | {
    "modulation.weight": "ip_adapter.{layer}.norm_ip.linear.weight",
    "modulation.bias": "ip_adapter.{layer}.norm_ip.linear.bias",
    "norm_q.weight": "ip_adapter.{layer}.norm_q.weight",
    "norm_k.weight": "ip_adapter.{layer}.norm_k.weight",
    "norm_image.weight": "ip_adapter.{layer}.norm_ip_k.weight",
}
AI_TOOLKIT = r"^ip_adapter\.0\.to_k_ip\.weight$", r"^image_proj\.latents$"
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
    PublishedLayout(
        "instantx-sd3",
        "instantx-sd3",
        "instantx-sd3",
        (r"^ip_adapter\.\d+\.norm_ip\.linear\.", r"^image_proj\.layers\.\d+\.2\.1\."),
        {"image_proj.": ""},
        SD3_STATES,
        DOUBLE,
    ),
    PublishedLayout(
        "diffusers-sd3",
        "instantx-sd3",
        "instantx-sd3",
        (r"^ip_adapter\.\d+\.norm_ip\.linear\.", r"^image_proj\.layers\.\d+\.adaln_proj\."),
        {"image_proj.": ""},
        SD3_STATES,
        DOUBLE,
        spelling=RESAMPLER,
    ),
    PublishedLayout(
        "ai-toolkit-pixart",
        "ai-toolkit-pixart",
        "ai-toolkit",
        AI_TOOLKIT,
        {"image_proj.": ""},
        kv_names(NUMBERED, "weight"),
        "transformer_blocks.{}.attn2",
        widened,
    ),
    PublishedLayout(
        "ai-toolkit",
        "ai-toolkit",
        "ai-toolkit",
        AI_TOOLKIT,
        {"image_proj.": ""},
        kv_names(NUMBERED, "weight"),
        where=resampled,
    ),
    PublishedLayout(
        "lynx",
        "lynx",
        "lynx",
        (r"^resampler\.latents$", r"^ip_layers\.\d+\.to_k_ip\.weight$"),
        {"resampler.": ""},
        kv_names("ip_layers.{layer}.to_{part}_ip.{tensor}", "weight"),
        "blocks.{}.attn2",
        lite,
        every=2,
        files={"resampler.safetensors": "resampler.", "ip_layers.safetensors": "ip_layers."},
    ),
    PublishedLayout(
        "instantcharacter",
        "instantcharacter",
        "instantcharacter",
        (r"^ip_adapter\.\d+\.norm_ip_q\.scale$", r"^image_proj\.cross_layer_blocks\."),
        {"image_proj.": ""},
        kv_names(NUMBERED, "weight", "bias")
        | {
            "norm_q.scale": "ip_adapter.{layer}.norm_ip_q.scale",
            "norm_image.scale": "ip_adapter.{layer}.norm_ip_k.scale",
        },
        spelling={
            f"cross_{kind}_blocks.{{layer}}.{theirs}": f"cross_{kind}_blocks.{{layer}}.{ours}"
            for kind in ("layer", "scale")
            for theirs, ours in (("attn1", "of_own"), ("attn2", "of_others"))
        },
    ),
    PublishedLayout("redux", "redux", "redux", (r"^redux_(up|down)\.",), {"redux_": ""}, {}),
)
