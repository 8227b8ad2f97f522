"""Layouts of adapter files.

For each layout, how its tensors are named; for other files, how they are recognised; for sizes,
which base model and image encoder they belong to.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from imprompt.errors import CheckpointError
from imprompt.families.published import published_encoder
from imprompt.families.unet_layers import (
    MODELS,
    STATE_PREFIX,
    in_model_order,
    numbered_attentions,
    numbered_layers,
    with_self_attentions,
)
from imprompt.variants import PACKS, Feature, Variant


@dataclass(frozen=True)
class Layout:
    """One way to name an adapter's tensors, for reading and for writing.

    projection  prefix of the names that the projection's own module uses
    kv          key of one added projection: {part} is k or v, {layer} the layer's name or number
    lora        key of one low-rank part: {part} is q, k, v or out, {half} is down or up, {layer}
                any attention's name or number
    numbered    layers are identified by number: see `imprompt.families.unet_layers`
    suffixes    of the files that are written in this layout; none if it is only read
    """

    name: str
    projection: str
    kv: str
    lora: str
    numbered: bool
    suffixes: tuple[str, ...]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # doubled backslash: the string is a replacement in `re.sub`
        layer = r"([1-9]\\d{0,2})" if self.numbered else "(.+)"
        return re.compile(
            re.sub(r"\\{layer\\}", layer, re.escape(self.kv)).replace(r"\{part\}", "[kv]")
        )

    @cached_property
    def _of_lora(self) -> re.Pattern[str]:
        holes = {"layer": ".+", "part": "(q|k|v|out)", "half": "(down|up)"}
        return re.compile(re.sub(r"\\{(\w+)\\}", lambda hole: holes[hole[1]], re.escape(self.lora)))

    def key(self, layer: str, part: str) -> str:
        """Return the key of a layer's added projection; `part` is k or v."""
        return self.kv.format(layer=layer, part=part)

    def lora_keys(self, attention: str) -> dict[str, str]:
        """Return the keys of an attention's low-rank part, by the names of its tensors.

        The names are those in `attention.low_rank.AttentionLowRank`.
        """
        return {
            f"to_{part}.{half}.weight": self.lora.format(layer=attention, part=part, half=half)
            for part in ("q", "k", "v", "out")
            for half in ("down", "up")
        }

    def has_lora(self, keys: Iterable[str]) -> bool:
        """Return whether a low-rank part is among these keys."""
        return any(self._of_lora.fullmatch(key) for key in keys)

    def attentions(self, layers: Sequence[str]) -> tuple[str, ...]:
        """Return the layout's names of all attentions, self-attentions too.

        They are in the base model's order.
        """
        return numbered_attentions(len(layers)) if self.numbered else with_self_attentions(layers)

    def layers_in(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Return the names or numbers of all layers that a file with these keys should have.

        A numbered layout has all layers up to the highest number that occurs.
        """
        found = {match[1] for key in keys if (match := self._pattern.fullmatch(key))}
        return (
            numbered_layers((max(map(int, found), default=0) + 1) // 2)
            if self.numbered
            else in_model_order(found)
        )


# In the order in which they are tried. "modules" is one layout in two forms: flat, and nested in a
# pickle.
LAYOUTS = (
    Layout(
        "imprompt",
        "projection.",
        "image_kv.{layer}.to_{part}.weight",
        "lora.{layer}.to_{part}.{half}.weight",
        False,
        (".safetensors",),
    ),
    Layout(
        "paper",
        "image_proj.",
        "ip_adapter.{layer}.to_{part}_ip.weight",
        "ip_adapter.{layer}.to_{part}_lora.{half}.weight",
        True,
        (".safetensors", ".bin"),
    ),
    Layout(
        "modules",
        "image_proj_model.",
        "adapter_modules.{layer}.to_{part}_ip.weight",
        "adapter_modules.{layer}.to_{part}_lora.{half}.weight",
        True,
        (".safetensors",),
    ),
    Layout(
        "modules",
        "image_proj.",
        "adapter_modules.{layer}.to_{part}_ip.weight",
        "adapter_modules.{layer}.to_{part}_lora.{half}.weight",
        True,
        (".bin",),
    ),
    Layout(
        "accelerate state",
        "image_proj_model.",
        f"{STATE_PREFIX}{{layer}}.processor.to_{{part}}_ip.weight",
        f"{STATE_PREFIX}{{layer}}.processor.to_{{part}}_lora.{{half}}.weight",
        False,
        (),
    ),
)
ALIASES = {"diffusers": "paper"}

# (what the file is, patterns that all occur among its keys), the most specific first.
FOREIGN = (
    ("a CSGO adapter: not supported yet", (r"content_image_proj\.|to_[kv]_ip_content",)),
    ("an IP-Adapter-Instruct adapter: not supported yet", (r"proj_(new|prompt)_input\.",)),
    (
        "an SD3 adapter with a TimeResampler, but not complete as InstantX published it",
        (r"time_embedding\.linear_1\.|layers\.\d+\.2\.1\.|\.norm_ip\.",),
    ),
    (
        "an InstantCharacter adapter, but not complete as its authors published it",
        (r"\.norm_ip_q\.",),
    ),
    (
        "Lynx' full form, whose registers and reference-latent adapter are not supported: give the "
        "lite form",
        (r"^ip_layers\.\d+\.(registers|to_[kv]_ip\.bias)$",),
    ),
    (
        "Lynx' reference-latent adapter, of its full form: not supported; give the lite form",
        (r"^\d+\.to_[kv]_ref\.",),
    ),
    ("a PuLID adapter: not supported yet", (r"^pulid_ca\.",)),
    (
        "an adapter for Flux or another transformer model: not supported yet",
        (r"^ip_?adapter(_modules)?\.0\.to_k_ip\.",),
    ),
)
# Files without an image projection, in the form of `FOREIGN`.
NO_ADAPTERS = (
    (
        "averaged weights without the names of their tensors: save the module's state_dict",
        (r"^(\w+\.)?shadow_params$",),
    ),
    ("a LoRA, not an image-prompt adapter", (r"(?i)lora",)),
    ("an image encoder, not an adapter", (r"^(vision_model|visual)\.",)),
    (
        "a base model, not an adapter",
        (r"^(state_dict\.)?model\.diffusion_model\.|^conv_in\.weight$",),
    ),
)


# Parts of keys that a wrapper of the module adds: torch's data parallel, torch.compile.
INNER = ("module", "_orig_mod")
# Names under which training scripts save the module, averaged weights among them.
OUTER = (
    *("state_dict", "model_state_dict", "model", "net", "network", "adapter", "params"),
    *("ema", "ema_model", "model_ema", "ema_state_dict", "averaged"),
)
# What they save next to it.
BESIDE = (
    *("epoch", "step", "global_step", "iteration", "loss", "config", "args", "hyper_parameters"),
    *("optimizer", "optimizer_state_dict", "optimizer_states", "scheduler", "lr_scheduler"),
    *("lr_schedulers", "scaler", "callbacks", "loops", "pytorch-lightning_version", "version"),
)


FEATURES: dict[Feature, str] = {
    "pooled": "pooled embedding",
    "penultimate": "penultimate hidden states",
    "last": "last hidden states",
    "character": "features of SigLIP and DINOv2 together",
    "face": "face embedding (ArcFace, of unit length)",
    "raw face": "face embedding (ArcFace, not normalised)",
    "face and crop": (
        "penultimate hidden states of the aligned face, and a face embedding (ArcFace, of unit "
        "length)"
    ),
    "raw face and square": (
        "penultimate hidden states of the face's square, and a face embedding (ArcFace, not "
        "normalised)"
    ),
}


def adapter_keys(path: Path, held: Collection[str]) -> dict[str, str]:
    """Return the adapter's keys, without wrappers, as a mapping to the keys of the file.

    Those of the frozen base model in accelerate's training states are left out. Such a state may
    hold the adapter twice, as `adapter_modules.*` and inside the base model: the former is kept. A
    LoRA is kept too if there is no image projection, because it identifies a file that is not an
    adapter. Raise CheckpointError if there are several adapters.
    """
    try:
        keys = unwrapped(held)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error
    twice, alone = any(key.startswith("adapter_modules.") for key in keys), not projects(keys)
    return {
        key: own
        for key, own in keys.items()
        if not key.startswith(STATE_PREFIX)
        or (".processor." in key and not twice)
        or (alone and "lora" in key.lower())
    }


def unwrapped(keys: Collection[str]) -> dict[str, str]:
    """Return the keys of an adapter inside wrappers, by their names without them.

    INNER wrappers are left out wherever they stand. Of OUTER ones, the group that holds an image
    projection is taken, and what stands BESIDE it is left out. Without such a group, all keys are
    returned as they are. Raise ValueError if several groups hold an adapter.
    """
    plain = {".".join(part for part in key.split(".") if part not in INNER): key for key in keys}
    if projects(plain):
        return {name: key for name, key in plain.items() if name.split(".")[0] not in BESIDE}
    groups: dict[str, dict[str, str]] = {}
    for name, key in plain.items():
        outer, _, rest = name.partition(".")
        if outer in OUTER and rest:
            groups.setdefault(outer, {})[rest] = key
    found = {outer: inner for outer, group in groups.items() if projects(inner := unwrapped(group))}
    if len(found) > 1:
        raise ValueError(
            f"holds an adapter under each of {', '.join(found)}: save one of them alone"
        )
    for outer, inner in found.items():
        return {name: groups[outer][key] for name, key in inner.items()}
    return {key: key for key in keys}


def projects(keys: Collection[str]) -> bool:
    """Return whether an image projection of any layout is among these keys."""
    return any(key.startswith(tuple(layout.projection for layout in LAYOUTS)) for key in keys)


def foreign(keys: Collection[str]) -> str | None:
    """Return what a file with these keys is, if it is a known kind that cannot be read here.

    Returns None for any other file.
    """
    for what, patterns in FOREIGN if projects(keys) else (*FOREIGN, *NO_ADAPTERS):
        if all(any(re.search(pattern, key) for key in keys) for pattern in patterns):
            return what
    return None


def layout_of(keys: Collection[str]) -> Layout | None:
    """Return the layout that fits these keys best; None if no layout fits any of them."""

    def known_halves(layout: Layout) -> int:
        return any(key.startswith(layout.projection) for key in keys) + bool(layout.layers_in(keys))

    best = max(LAYOUTS, key=known_halves)
    return best if known_halves(best) else None


def other_names(name: str) -> list[str]:
    """Return the other names of a layout: files of either name are the same."""
    return [alias for alias, layout in ALIASES.items() if layout == name]


def layout_to_write(name: str, suffix: str) -> Layout:
    """Return the layout of that name and file suffix.

    Raises CheckpointError, with the possible ones, if there is none.
    """
    name = ALIASES.get(name, name)
    suffixes = {
        suffix: layout for layout in LAYOUTS if layout.name == name for suffix in layout.suffixes
    }
    if not suffixes:
        known = dict.fromkeys([*(layout.name for layout in LAYOUTS if layout.suffixes), *ALIASES])
        raise CheckpointError(f"unknown layout {name!r} to write; known: {', '.join(known)}")
    if suffix not in suffixes:
        raise CheckpointError(
            f"the {name} layout is written as {' or '.join(suffixes)}, not as "
            f"{suffix or 'a file without suffix'}"
        )
    return suffixes[suffix]


def suits(row: Variant, feature_dim: int | None, token_dim: int | None, layers: int) -> str:
    """Return which base model and image encoder an adapter of these sizes was probably made for.

    The result is a phrase for messages.
    """
    model = (
        MODELS[token_dim, layers][0] if token_dim and (token_dim, layers) in MODELS else "a model"
    )
    text = (
        f"{'Kolors' if row.widened else model} with {token_dim or '?'}-wide text and {layers} "
        "cross-attentions"
    )
    return text if feature_dim is None else f"{text}; {encoder_of(row, feature_dim)}"


def encoder_of(row: Variant, feature_dim: int) -> str:
    """Return which encoder an adapter was probably made for, as a phrase for messages."""
    known = None if row.own_encoder else published_encoder(row.feature, feature_dim)
    kind = "image" if row.image_feature else "face"
    name = row.own_encoder or (known.name if known else "one")
    feature = FEATURES.get(row.feature, f"hidden states ({row.feature})")
    places = [f"{known.place.repo} {known.place.path}".rstrip()] if known else []
    places += [f"insightface's {row.faces}" if row.faces in PACKS else row.faces] * bool(row.faces)
    text = f"{kind} encoder: {name} with {feature_dim}-wide {feature}"
    return text + (f", e.g. {' and '.join(places)}" if places else "")
