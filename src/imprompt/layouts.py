"""Facts about adapter files: how each layout names its tensors, which files are something else, what the sizes speak of."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from imprompt.errors import CheckpointError
from imprompt.structures import published_encoder
from imprompt.variants import Feature, Variant


@dataclass(frozen=True)
class Layout:
    """One way to name an adapter's tensors, for reading and for writing.

    projection  what stands before the names that the projection's own module uses
    kv          key of one added projection: {part} is k or v, {site} the site's name or number
    lora        key of one low-rank part: {part} is q, k, v or out, {half} is down or up, {site} any attention's name or number
    numbered    site i is called 2·i + 1: its place among all attention processors of a UNet, self-attention included
    suffixes    of the files that are written so; none where the layout is only read
    """

    name: str
    projection: str
    kv: str
    lora: str
    numbered: bool
    suffixes: tuple[str, ...]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        site = r"([1-9]\\d{0,2})" if self.numbered else "(.+)"  # doubled backslash: it is used as a replacement
        return re.compile(re.sub(r"\\{site\\}", site, re.escape(self.kv)).replace(r"\{part\}", "[kv]"))

    @cached_property
    def _of_lora(self) -> re.Pattern[str]:
        holes = {"site": ".+", "part": "(q|k|v|out)", "half": "(down|up)"}
        return re.compile(re.sub(r"\\{(\w+)\\}", lambda hole: holes[hole[1]], re.escape(self.lora)))

    def key(self, site: str, part: str) -> str:
        return self.kv.format(site=site, part=part)

    def lora_keys(self, attention: str) -> dict[str, str]:
        """Names by which `attention.lora.AttentionLoRA` knows its tensors -> keys, at that attention."""
        return {
            f"to_{part}.{half}.weight": self.lora.format(site=attention, part=part, half=half)
            for part in ("q", "k", "v", "out")
            for half in ("down", "up")
        }

    def has_lora(self, keys: Iterable[str]) -> bool:
        return any(self._of_lora.fullmatch(key) for key in keys)

    def attentions(self, sites: Sequence[str]) -> tuple[str, ...]:
        """What it calls all attentions of a UNet, in the base model's order: before each site there is a self-attention."""
        if self.numbered:
            return tuple(str(number) for number in range(2 * len(sites)))
        return tuple(name for site in sites for name in (site.removesuffix("attn2") + "attn1", site))

    def sites_in(self, keys: Iterable[str]) -> tuple[str, ...]:
        """The names or numbers of all sites that should be there, judged by those that are."""
        found = {match[1] for key in keys if (match := self._pattern.fullmatch(key))}
        return self.numbers((max(map(int, found), default=0) + 1) // 2) if self.numbered else in_model_order(found)

    @staticmethod
    def numbers(count: int) -> tuple[str, ...]:
        return tuple(str(2 * site + 1) for site in range(count))


# In the order in which they are tried. "modules" is one layout in two dresses: flat, and nested in a pickle.
# fmt: off
LAYOUTS = (
    Layout("imprompt", "projection.", "image_kv.{site}.to_{part}.weight", "lora.{site}.to_{part}.{half}.weight",
           False, (".safetensors",)),
    Layout("paper", "image_proj.", "ip_adapter.{site}.to_{part}_ip.weight", "ip_adapter.{site}.to_{part}_lora.{half}.weight",
           True, (".safetensors", ".bin")),
    Layout("modules", "image_proj_model.", "adapter_modules.{site}.to_{part}_ip.weight",
           "adapter_modules.{site}.to_{part}_lora.{half}.weight", True, (".safetensors",)),
    Layout("modules", "image_proj.", "adapter_modules.{site}.to_{part}_ip.weight",
           "adapter_modules.{site}.to_{part}_lora.{half}.weight", True, (".bin",)),
    Layout("accelerate state", "image_proj_model.", "unet.{site}.processor.to_{part}_ip.weight",
           "unet.{site}.processor.to_{part}_lora.{half}.weight", False, ()),
)
# fmt: on
ALIASES = {"diffusers": "paper"}

# (what it is, patterns that all occur among its keys), most telling first.
FOREIGN = (
    ("a CSGO adapter: not supported yet", (r"content_image_proj\.|to_[kv]_ip_content",)),
    ("an IP-Adapter-Instruct adapter: not supported yet", (r"proj_(new|prompt)_input\.",)),
    ("an SD3 adapter with a TimeResampler: not supported yet", (r"time_embedding\.linear_1\.|layers\.\d+\.2\.1\.|\.norm_ip\.",)),
    ("a Flux adapter by XLabs: not supported yet", (r"ip_adapter_double_stream|ip_adapter_proj_model\.|\.to_[kv]_ip\.bias$",)),
    ("an adapter for Flux or another transformer model: not supported yet", (r"^ip_?adapter(_modules)?\.0\.to_k_ip\.",)),
)
# The same of files without an image projection.
NO_ADAPTERS = (
    ("a LoRA, not an image-prompt adapter", (r"(?i)lora",)),
    ("an image encoder, not an adapter", (r"^(vision_model|visual)\.",)),
    ("a base model, not an adapter", (r"^(state_dict\.)?model\.diffusion_model\.|^conv_in\.weight$",)),
)


class UNetBlocks(NamedTuple):
    """Where a UNet has text cross-attentions: (attentions, transformer blocks in each) of every block."""

    down: tuple[tuple[int, int], ...]
    up: tuple[tuple[int, int], ...]
    mid: tuple[int, int]


SD = UNetBlocks(down=((2, 1), (2, 1), (2, 1), (0, 0)), up=((0, 0), (3, 1), (3, 1), (3, 1)), mid=(1, 1))
SDXL = UNetBlocks(down=((0, 0), (2, 2), (2, 10)), up=((3, 10), (3, 2), (0, 0)), mid=(1, 10))

# (text width, cross-attentions) -> base model
MODELS = {
    (768, 16): ("SD 1.x", SD),
    (1024, 16): ("SD 2.x", SD),
    (2048, 70): ("SDXL", SDXL),
}

FEATURES: dict[Feature, str] = {
    "pooled": "pooled embedding",
    "penultimate": "penultimate hidden states",
    "face": "face embedding (ArcFace, of unit length)",
    "raw face": "face embedding (ArcFace, not normalised)",
    "face and crop": "penultimate hidden states of the aligned face, beside a face embedding (ArcFace, of unit length)",
    "raw face and square": "penultimate hidden states of the face's square, beside a face embedding (ArcFace, not normalised)",
}
REGISTRATION_ORDER = ("down_blocks", "up_blocks", "mid_block")  # of diffusers' UNets: the middle comes last


def wanted(keys: Collection[str]) -> list[str]:
    """The keys without the frozen base model that accelerate's training states carry along.

    Such a state may hold the adapter twice, as `adapter_modules.*` and inside `unet.*`: the former is kept. So is a LoRA
    without one, by which a file that is no adapter is known.
    """
    twice, alone = any(key.startswith("adapter_modules.") for key in keys), not projects(keys)
    return [
        key
        for key in keys
        if not key.startswith("unet.") or (".processor." in key and not twice) or (alone and "lora" in key.lower())
    ]


def projects(keys: Collection[str]) -> bool:
    """Whether there is an image projection of any layout among them."""
    return any(key.startswith(tuple(layout.projection for layout in LAYOUTS)) for key in keys)


def foreign(keys: Collection[str]) -> str | None:
    """What a file with these keys is, if it is a known thing that is not an adapter which is read here."""
    for what, patterns in FOREIGN if projects(keys) else (*FOREIGN, *NO_ADAPTERS):
        if all(any(re.search(pattern, key) for key in keys) for pattern in patterns):
            return what
    return None


def layout_of(keys: Collection[str]) -> Layout | None:
    """The layout that these keys speak of most, None if no layout knows any of them."""

    def known_halves(layout: Layout) -> int:
        return any(key.startswith(layout.projection) for key in keys) + bool(layout.sites_in(keys))

    best = max(LAYOUTS, key=known_halves)
    return best if known_halves(best) else None


def layout_to_write(name: str, suffix: str) -> Layout:
    """The row for that name and file suffix; CheckpointError, with what there is, if none."""
    name = ALIASES.get(name, name)
    suffixes = {suffix: layout for layout in LAYOUTS if layout.name == name for suffix in layout.suffixes}
    if not suffixes:
        known = dict.fromkeys([*(layout.name for layout in LAYOUTS if layout.suffixes), *ALIASES])
        raise CheckpointError(f"unknown layout {name!r} to write; known: {', '.join(known)}")
    if suffix not in suffixes:
        raise CheckpointError(
            f"the {name} layout is written as {' or '.join(suffixes)}, not as {suffix or 'a file without suffix'}"
        )
    return suffixes[suffix]


def in_model_order(names: Iterable[str]) -> tuple[str, ...]:
    """Site names in the order in which diffusers registers them."""

    def place(name: str) -> tuple[bool, int, list[int], str]:
        block = name.split(".")[0]
        known = block in REGISTRATION_ORDER
        return not known, REGISTRATION_ORDER.index(block) if known else 0, [int(n) for n in re.findall(r"\d+", name)], name

    return tuple(sorted(names, key=place))


def site_names(blocks: UNetBlocks) -> tuple[str, ...]:
    """Module names of the text cross-attentions, in the order of diffusers' `attn_processors`."""

    def of_block(block: str, attentions: int, depth: int) -> Iterator[str]:
        for attention in range(attentions):
            yield from (f"{block}.attentions.{attention}.transformer_blocks.{i}.attn2" for i in range(depth))

    numbered = [(f"down_blocks.{i}", row) for i, row in enumerate(blocks.down)]
    numbered += [(f"up_blocks.{i}", row) for i, row in enumerate(blocks.up)]
    return tuple(name for block, row in [*numbered, ("mid_block", blocks.mid)] for name in of_block(block, *row))


def known_sites(token_dim: int, count: int) -> tuple[str, ...] | None:
    """The site names of the known model with so many cross-attentions to text of that width."""
    model = MODELS.get((token_dim, count))
    return site_names(model[1]) if model else None


def suits(row: Variant, feature_dim: int | None, token_dim: int | None, sites: int) -> str:
    """Which base model and image encoder an adapter of these sizes was probably made for, in words."""
    model = MODELS[token_dim, sites][0] if token_dim and (token_dim, sites) in MODELS else "a model"
    text = f"{'Kolors' if row.widened else model} with {token_dim or '?'}-wide text and {sites} cross-attentions"
    if feature_dim is None:
        return text
    known = published_encoder(row.feature, feature_dim)
    kind = "image" if row.clip_feature else "face"
    text += f"; {kind} encoder: {known.name if known else 'one'} with {feature_dim}-wide {FEATURES[row.feature]}"
    places = ([f"{known.place.repo} {known.place.path}".rstrip()] if known else []) + (
        [f"insightface's {row.faces}"] if row.faces else []
    )
    return text + (f", e.g. {' and '.join(places)}" if places else "")
