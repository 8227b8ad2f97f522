"""Adapter files: safetensors with named keys and a JSON header, and the older layouts.

`read_adapter` reads and checks a file, `write_adapter` writes it in any layout, `load_adapter` and
`save_adapter` do the same for a live adapter. `imprompt.checkpoints.layouts` defines how layouts
name their tensors. Shape letters as in `imprompt.adapter`.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from imprompt.adapter import ImageKV, IPAdapter
from imprompt.attention.low_rank import AttentionLowRank, ModelLowRank
from imprompt.checkpoints import layouts
from imprompt.checkpoints.integrity import blank_projection, check_whole, shapes_of, text_dim
from imprompt.checkpoints.layouts import Layout
from imprompt.checkpoints.published import (
    by_file,
    check_form,
    file_tensors,
    files_at,
    form_named,
    module_tensors,
    published_layout,
)
from imprompt.checkpoints.spellings import original_spelling
from imprompt.checkpoints.states import state_at
from imprompt.checkpoints.tensors import INDEX, check_plain, read_tensors, some, write_tensors
from imprompt.errors import CheckpointError, MismatchError, SettingError, first_line
from imprompt.families.base import Family, family_of
from imprompt.families.forms import AttentionForm
from imprompt.families.published_files import PUBLISHED_LAYOUTS, PublishedLayout
from imprompt.families.text_rows import TextRowsAdapter
from imprompt.families.unet_layers import OLDEST, known_layers, numbered_layers
from imprompt.models import refuse_url
from imprompt.projections.resampler import HEAD_DIM, PUBLISHED, head_dim_of
from imprompt.untrusted import parse_json
from imprompt.variants import (
    BY_NAME,
    PACKS,
    CheckpointEvidence,
    Variant,
    bearing,
    find_variant,
)

FORMAT = 1
NEWER = ("feature", "head_dim", "faces", "form", "own_width")  # fields that the oldest headers lack
OURS = "image_kv.{layer}."  # prefix of a layer's tensors in the imprompt layout
METADATA_KEY = "imprompt"
TO_Q = "layers.0.0.to_q.weight"  # of a resampler's first attention
# Files that are read from a folder: an adapter of ours, accelerate's training states, an adapter
# that is stored with its encoder's name.
IN_FOLDERS = ("adapter.safetensors", "model.safetensors", "pytorch_model.bin", "ip_adapter.bin")


class Origin(BaseModel):
    """Origin of an adapter: facts that its tensors do not determine.

    An empty string means unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = ""  # the model that the adapter was trained for
    encoder: str = ""  # the image encoder whose features it reads
    encoder_fingerprint: str = ""
    faces: str = ""  # the face encoder whose embeddings it reads, if it reads faces
    prediction_type: Literal["epsilon", "v_prediction", "flow", ""] = ""
    training_steps: int | None = None
    licence: str = ""


class Header(Origin):
    """Header of a file in the imprompt layout, stored as JSON in the safetensors metadata.

    feature   what it reads of the image encoder, where that is not the variant's own feature
    head_dim  width of a resampler's attention heads, where it is not the published one
    form      way to attend, of an adapter that has one: `imprompt.families.forms`

    own_width  whether its tokens have another width than the text of its base model
    """

    format: Literal[1] = FORMAT
    variant: str
    feature: str = ""
    head_dim: int | None = Field(None, ge=1)
    form: str = ""
    own_width: bool = False
    family: str
    tokens: int | None  # None: one per patch
    token_dim: int
    feature_dim: int
    # the packaged adapters' files still name the field `sites`
    layers: tuple[str, ...] = Field(validation_alias=AliasChoices("layers", "sites"))

    def as_json(self) -> str:
        """Return the header as JSON.

        What is in `NEWER` is left out where it is usual, so that an older imprompt reads the
        file.
        """
        usual = {name for name in NEWER if not getattr(self, name)}
        return self.model_dump_json(exclude=usual)


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """Contents of an adapter file.

    projection  tensors by the names that the projection's module uses
    kv          W'_k and W'_v of every layer, each (H·d, D), in the base model's order
    layers      module names of the cross-attentions; None if the file only numbers them
    header      None if the file has none
    lora        low-rank parts of every attention, self-attentions too, by the names that
                `AttentionLowRank` uses; None if there are none
    head_dim    width of a resampler's attention heads; None: the published one
    form        way to attend, of an adapter for a transformer that has one
    more        tensors of every layer beside W'_k and W'_v, by the names in the form's module
    folder      where the file was read, from which its header names folders of weights
    """

    variant: Variant
    projection: dict[str, Tensor]
    kv: list[tuple[Tensor, Tensor]]
    layers: tuple[str, ...] | None
    header: Header | None
    layout: str
    lora: list[dict[str, Tensor]] | None = None
    head_dim: int | None = None
    form: AttentionForm | None = None
    more: list[dict[str, Tensor]] | None = None
    folder: Path | None = None

    @property
    def states(self) -> list[dict[str, Tensor]]:
        """Tensors of every layer, by the names in the layer's module."""
        more = self.more or [{}] * len(self.kv)
        return [
            {"to_k.weight": key, "to_v.weight": value, **rest}
            for (key, value), rest in zip(self.kv, more, strict=True)
        ]

    @property
    def feature_dim(self) -> int:
        """Width E of the features; of the hidden states if a face embedding is read too."""
        return self.projection[self.variant.feature_key].shape[-1]

    @property
    def face_dim(self) -> int | None:
        """Width of the face embedding; None if the variant reads none."""
        # the first if hidden states are read too
        keys = ("proj.0.weight", self.variant.feature_key)
        return (
            self.projection[next(key for key in keys if key in self.projection)].shape[-1]
            if self.variant.faces
            else None
        )

    @property
    def faces(self) -> str:
        """Face encoder whose embeddings it reads: the header's, else the variant's own."""
        return (self.header.faces if self.header is not None else "") or self.variant.faces

    @property
    def token_dim(self) -> int:
        """Token width D, which the added projections read; without these, the tokens' own."""
        return self.kv[0][0].shape[1] if self.kv else self.token_width

    @property
    def tokens(self) -> int | None:
        """Number of image tokens N, or None if every patch becomes a token."""
        return self.variant.token_shape(shapes_of(self.projection))[0]

    @property
    def token_width(self) -> int:
        """Width of the projection's image tokens: D, except in Kolors' FaceID."""
        return self.variant.token_shape(shapes_of(self.projection))[1]

    @property
    def own_width(self) -> bool:
        """Whether the header states that D is another width than that of the base's text."""
        return self.header is not None and self.header.own_width

    @property
    def ranks(self) -> list[int]:
        """Lowest and highest rank of the low-rank parts; empty if there are none."""
        found = [
            len(tensor)
            for parts in self.lora or ()
            for name, tensor in parts.items()
            if ".down." in name
        ]
        return [min(found), max(found)] if found else []

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the file: of the projection, of the layers, and low-rank parts."""
        lora = [tensor for attention in self.lora or () for tensor in attention.values()]
        layers = [tensor for layer in self.states for tensor in layer.values()]
        return [*self.projection.values(), *layers, *lora]

    @property
    def parameters(self) -> int:
        """Number of parameters in all tensors."""
        return sum(tensor.numel() for tensor in self.tensors)

    def suits(self) -> str:
        """Return the base model and image encoder that the adapter was probably made for.

        They are inferred from its sizes.
        """
        if self.form is not None and self.form.families:
            bases = " and ".join(self.form.families)
            sizes = (
                f"{self.token_width}-wide text"
                if self.form.text_rows
                else f"{len(self.kv)} conditioned layers"
            )
            return f"base models of the {bases} family with {sizes}; " + layouts.encoder_of(
                self.variant, self.feature_dim
            )
        if self.header is not None and self.own_width:
            return (
                f"base models of the {self.header.family} family with {len(self.kv)} conditioned "
                f"layers; image encoder: one with {self.feature_dim}-wide features"
            )
        return layouts.suits(self.variant, self.feature_dim, self.token_dim, len(self.kv))


def read_adapter(
    path: str | os.PathLike[str], variant: str | None = None, head_dim: int | None = None
) -> AdapterFile:
    """Read an adapter of any known layout from a file, or from a folder that holds one.

    The folder may be a training run: then its newest whole state is read.

    `variant` is needed where the tensors do not determine it: faceid-plus or faceid-plus-v2,
    portrait-unnorm or InstantID. `head_dim` is the width of a resampler's attention heads, which
    tensors do not determine: without it, what the header states, or else that of all published
    files; a warning says where that is assumed for another shape. Raises CheckpointError, one
    line, if the file is missing, damaged, unsafe, of another kind, ambiguous, or incomplete: then
    every missing, unexpected and misshapen tensor is named at once. Raises SettingError if
    `variant` or `head_dim` contradicts the file.
    """
    refuse_url(os.fspath(path))
    file, tensors, metadata = _held(Path(path))
    if published := published_layout(tensors):
        return _read_published(file, published, tensors, variant)
    if METADATA_KEY not in metadata and (kind := layouts.foreign(tensors)):
        raise CheckpointError(f"{file} is {kind}")
    layout = layouts.layout_of(tensors)
    if layout is None:
        raise CheckpointError(
            f"{file} is not an image-prompt adapter of a known layout; it holds "
            f"{some(tensors) or 'no tensors'}"
        )
    check_plain(file, tensors)
    tensors = original_spelling(tensors, layout.projection)
    projection = _under(layout.projection, tensors)
    header = _read_header(file, metadata)
    form = form_named(header.form, file) if header and header.form else None
    if header and form and form.families:
        found = _read_ours(file, layout, tensors, projection, header)
        _check_header(file, found)
        return found
    shapes, layers = shapes_of(tensors), _layer_labels(layout, tensors, header)
    seen = CheckpointEvidence(
        shapes_of(projection), layout.has_lora(tensors), text_dim(layout, layers, shapes)
    )
    row = _reading(file, _variant_of(file, seen, header, variant), header)
    head_dim = _head_dim(file, seen, header, head_dim)
    check_whole(file, row, layout, layers, shapes, head_dim)
    kv = [(tensors[layout.key(layer, "k")], tensors[layout.key(layer, "v")]) for layer in layers]
    names = header.layers if header else None if layout.numbered else layers
    lora = (
        [layout.lora_keys(attention) for attention in layout.attentions(layers)]
        if row.lora
        else None
    )
    parts = [{name: tensors[key] for name, key in keys.items()} for keys in lora] if lora else None
    found = AdapterFile(
        row, projection, kv, names, header, layout.name, parts, head_dim, form, folder=file.parent
    )
    _check_header(file, found)
    return found


def _held(path: Path) -> tuple[Path, dict[str, Any], dict[str, str]]:
    """Return the file to read for `path`, the adapter's tensors and the file's metadata.

    For an adapter that is kept in several files it is the path itself.
    """
    if several := files_at(path):
        found: dict[str, Any] = {}
        for prefix, file in several.items():
            tensors, _ = read_tensors(file, partial(layouts.adapter_keys, file))
            found |= {prefix + key: tensor for key, tensor in tensors.items()}
        return path, found, {}
    file = _file_at(path)
    return file, *read_tensors(file, partial(layouts.adapter_keys, file))


def _read_published(
    path: Path, row: PublishedLayout, tensors: dict[str, Tensor], variant: str | None
) -> AdapterFile:
    """Return the contents of a file in a published layout for transformers."""
    if variant not in (None, row.variant):
        raise SettingError(f"{path} is {row.variant} by its tensors, not {variant}")
    check_plain(path, tensors)
    projection, layers = module_tensors(row, tensors, path)
    found = _of_form(path, row.form, row.variant, projection, layers, row.name)
    if not row.layer:
        return found
    names = (row.layer.format(row.every * number) for number in range(len(layers)))
    return replace(found, layers=tuple(names))


def _beside_weights(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a layer other than the matrices of W'_k and W'_v."""
    matrices = ("to_k.weight", "to_v.weight")
    return {name: tensor for name, tensor in layer.items() if name not in matrices}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose keys have that prefix, by their keys without it."""
    return {key.removeprefix(prefix): one for key, one in tensors.items() if key.startswith(prefix)}


def _read_ours(
    path: Path,
    layout: layouts.Layout,
    tensors: dict[str, Tensor],
    projection: dict[str, Tensor],
    header: Header,
) -> AdapterFile:
    """Return the contents of a file of a published form in the imprompt layout."""
    layers = [_under(OURS.format(layer=name), tensors) for name in header.layers]
    if len(projection) + sum(map(len, layers)) != len(tensors):
        raise CheckpointError(f"{path} has tensors of layers that its header does not name")
    return _of_form(path, header.form, header.variant, projection, layers, layout.name, header)


def _of_form(
    path: Path,
    form: str,
    variant: str,
    projection: dict[str, Tensor],
    layers: list[dict[str, Tensor]],
    layout: str,
    header: Header | None = None,
) -> AdapterFile:
    """Return the contents of a file of a published form, after a check of all shapes."""
    own, row = form_named(form, path), find_variant(variant)
    check_form(path, own, projection, layers, row)
    kv = [(layer["to_k.weight"], layer["to_v.weight"]) for layer in layers]
    more = [_beside_weights(layer) for layer in layers]
    names = header.layers if header else None
    return AdapterFile(
        row, projection, kv, names, header, layout, form=own, more=more, folder=path.parent
    )


def write_adapter(
    path: str | os.PathLike[str],
    file: AdapterFile,
    layout: str = "imprompt",
    layers: Sequence[str] | None = None,
) -> None:
    """Write an adapter, tensors bit for bit; the file appears completely or not at all.

    The imprompt layout needs the names of the layers: `layers`, else the file's own, else those of
    a known base model. Raises CheckpointError for an unknown layout or suffix, for unknown layers,
    or if the file cannot be written.
    """
    path = Path(path)
    if row := next((own for own in PUBLISHED_LAYOUTS if own.name == layout), None):
        if file.form is None or file.form.name != row.form:
            raise CheckpointError(f"the {layout} layout is for other adapters than this one")
        tensors = file_tensors(row, file.projection, file.states)
        for place, own in by_file(row, tensors, path).items():
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"cannot write {place}: {first_line(error)}") from error
            write_tensors(place, own, {})
        return
    form = layouts.layout_to_write(layout, path.suffix)
    if file.form is not None:
        if form.numbered or file.form.text_rows:
            own = [row.name for row in PUBLISHED_LAYOUTS if row.form == file.form.name]
            others = " or ".join([*["imprompt"] * (not file.form.text_rows), *own])
            raise CheckpointError(f"the {form.name} layout cannot hold it: write {others}")
        layers = layers and [*file.form.of(dict.fromkeys(layers))]
    if file.own_width and form.numbered:
        raise CheckpointError(
            f"the {form.name} layout cannot hold it: its readers take the image tokens to be as "
            f"wide as the text, these are {file.token_dim} wide; write imprompt"
        )
    header = file.header if form.numbered else _named_header(file, layers)
    labels = header.layers if header and not form.numbered else numbered_layers(len(file.kv))
    tensors = {form.projection + key: tensor for key, tensor in file.projection.items()}
    for label, pair in zip(labels, file.kv, strict=True):
        tensors |= {form.key(label, part): tensor for part, tensor in zip("kv", pair, strict=True)}
    for label, more in zip(labels if file.more else (), file.more or (), strict=True):
        tensors |= {OURS.format(layer=label) + name: tensor for name, tensor in more.items()}
    for label, parts in zip(
        form.attentions(labels) if file.lora else (), file.lora or (), strict=True
    ):
        tensors |= {key: parts[name] for name, key in form.lora_keys(label).items()}
    write_tensors(path, tensors, {METADATA_KEY: header.as_json()} if header else {})


def load_adapter(
    path: str | os.PathLike[str], model: nn.Module, variant: str | None = None
) -> IPAdapter:
    """Load an adapter for that base model from a file; `adapter.attach(model)` attaches it.

    variant  as for `read_adapter`

    Raises the errors of `read_adapter` and `build_adapter`, and MismatchError if it does not fit
    the model.
    """
    adapter = build_adapter(read_adapter(path, variant), family_of(model))
    adapter.check_fits(model)
    return adapter


def build_adapter(file: AdapterFile, family: Family) -> IPAdapter:
    """Build the live adapter of a file, its weights in float32 on the CPU.

    Raises MismatchError if it was made for another family of base models.
    """
    own = file.header.family if file.header else OLDEST  # the only one of older layouts
    fits = file.form.fits(own) if file.form else (own,)
    if family.name not in fits:
        raise MismatchError(
            f"this adapter is for base models of the {' or '.join(fits)} family; this one is of "
            f"the {family.name} family"
        )
    projection = blank_projection(file.variant, shapes_of(file.projection), file.head_dim)
    with torch.device("meta"):
        image_kv = [
            ImageKV(states["to_k.weight"].shape[1], states["to_k.weight"].shape[0])
            if file.form is None
            else file.form.states.from_shapes(shapes_of(states))
            for states in file.states
        ]
        lora = [AttentionLowRank.from_shapes(shapes_of(parts)) for parts in file.lora or ()]
    _fill(projection, file.projection)
    for module, states in zip(image_kv, file.states, strict=True):
        _fill(module, states)
    for module, parts in zip(lora, file.lora or (), strict=True):
        _fill(module, parts)
    low_rank = ModelLowRank(lora) if lora else None
    kind = TextRowsAdapter if file.form is not None and file.form.text_rows else IPAdapter
    return kind(projection, image_kv, family, low_rank, file.form, file.own_width)


def adapter_file(
    adapter: IPAdapter, variant: Variant, layers: Sequence[str], origin: Origin | None = None
) -> AdapterFile:
    """Return a live adapter in the form of a file; the tensors are the adapter's own, not copies.

    layers  names of the cross-attentions that it is for: `adapter.family.layers(model)`
    """
    pairs: list[Any] = list(adapter.image_kv)
    kv = [(pair.to_k.weight.detach(), pair.to_v.weight.detach()) for pair in pairs]
    lora = (
        [dict(parts.state_dict()) for parts in adapter.low_rank]
        if adapter.low_rank is not None
        else None
    )
    bare = AdapterFile(
        variant,
        adapter.projection.state_dict(),
        kv,
        tuple(layers),
        None,
        "imprompt",
        lora,
        _unusual(head_dim_of(adapter.projection)),
        adapter.form,
        [_beside_weights(pair.state_dict()) for pair in pairs] if adapter.form else None,
    )
    header = Header(
        **_facts(bare),
        feature="" if variant == find_variant(variant.name) else variant.feature,
        head_dim=bare.head_dim,
        form=adapter.form.name if adapter.form else "",
        own_width=adapter.own_width,
        family=adapter.family.name,
        layers=tuple(layers),
        **(origin or Origin()).model_dump(),
    )
    return replace(bare, header=header)


def save_adapter(
    path: str | os.PathLike[str],
    adapter: IPAdapter,
    variant: Variant,
    layers: Sequence[str],
    origin: Origin | None = None,
) -> None:
    """Write a live adapter in the imprompt layout.

    The arguments are those of `adapter_file`, the errors those of `write_adapter`.
    """
    write_adapter(path, adapter_file(adapter, variant, layers, origin))


def describe(file: AdapterFile) -> list[tuple[str, str]]:
    """Return labels and values that describe a file to a person."""
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in file.tensors})
    rows = [
        ("layout", " / ".join((file.layout, *layouts.other_names(file.layout)))),
        ("variant", file.variant.name),
        *_variant_rows(file.variant, file.faces),
        ("image tokens", f"{file.tokens or 'one per patch'}, {file.token_width} wide"),
        *(
            [
                (
                    "low-rank part",
                    f"rank {' to '.join(map(str, dict.fromkeys(file.ranks)))}, of {len(file.lora)} "
                    "attentions",
                )
            ]
            if file.lora
            else []
        ),
        ("parameters", f"{file.parameters:,}"),
        ("precision", ", ".join(dtypes)),
        ("size", f"{sum(tensor.nbytes for tensor in file.tensors) / 1e6:,.1f} MB"),
        ("suits", file.suits()),
    ]
    if file.header is None:
        return [*rows, ("header", "none: this file does not state its origin")]
    facts = [
        (name.replace("_", " "), getattr(file.header, name))
        for name in Origin.model_fields
        if name != "faces"
    ]
    return [
        *rows,
        ("family", file.header.family),
        *(
            (label, f"{value:,}" if isinstance(value, int) else value or "unknown")
            for label, value in facts
        ),
    ]


def _variant_rows(row: Variant, faces: str) -> list[tuple[str, str]]:
    """Return labels and values that describe a variant, and its face encoder, beyond its name."""
    equivalent_to = (
        [
            (
                "equivalent to",
                f"{', '.join(row.equivalent_to)}: its tensors do not distinguish them, and "
                "the result is the same",
            )
        ]
        if row.equivalent_to
        else []
    )
    return equivalent_to + (
        [
            (
                "face encoder",
                f"insightface's {faces}; its weights are for non-commercial research only"
                if faces in PACKS
                else faces,
            )
        ]
        if faces
        else []
    )


def _file_at(path: Path) -> Path:
    """Return the file to read for `path`, which may be a folder: of a state, or a training run."""
    folders = [folder for folder in (path, state_at(path)) if folder.is_dir()]
    named = [folder / name for folder in folders for name in IN_FOLDERS]
    split = [index for folder in folders for index in sorted(folder.glob(f"*{INDEX}"))]
    found = next((file for file in (*named, *split) if file.is_file()), None)
    if found is None and path.is_dir():
        raise CheckpointError(f"{path} holds no adapter: none of {', '.join(IN_FOLDERS)} is in it")
    return found or path


def _fill(blank: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    blank.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)


def _read_header(path: Path, metadata: Mapping[str, str]) -> Header | None:
    if METADATA_KEY not in metadata:
        return None
    try:
        fields = parse_json(metadata[METADATA_KEY])
        if isinstance(fields, dict) and fields.get("format") != FORMAT:
            theirs = repr(fields.get("format"))
            raise CheckpointError(
                f"{path} has a header of format {theirs}; this imprompt reads format {FORMAT}, a "
                "newer one may read it"
            )
        return Header.model_validate(fields)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'header'}: {fault['msg']}"
            for fault in error.errors()
        ]
        raise CheckpointError(
            f"{path} has a header that this imprompt cannot read ({some(faults)})"
        ) from error
    except SettingError as error:
        raise CheckpointError(f"{path} has a header that is not valid JSON: {error}") from error


def _variant_of(
    path: Path, seen: CheckpointEvidence, header: Header | None, variant_name: str | None
) -> Variant:
    """Return the variant that the tensors, the header and the user determine.

    The tensors take precedence; the header and the user resolve what they leave open.
    """
    wanted = find_variant(variant_name) if variant_name else None
    stated = BY_NAME.get(header.variant) if header else None
    if wanted and stated and wanted is not stated:
        raise SettingError(f"{path}: its header states {stated.name}, not {wanted.name}")
    rows = bearing(seen.projection)
    if wanted and rows and wanted not in rows:
        raise SettingError(
            f"{path} is {' or '.join(row.name for row in rows)} by its tensors, not {wanted.name}"
        )
    stated = wanted or stated
    if stated is not None and (stated in rows or not rows):
        return stated
    if not rows:
        raise CheckpointError(
            f"{path} holds no image projection of a known variant ({', '.join(BY_NAME)}); it has "
            f"{some(seen.projection) or 'none'}"
        )
    likely = [row for row in rows if row.where(seen)] or rows
    names = [
        *(row.name for row in likely),
        *(name for row in likely for name in row.ambiguous_with),
    ]
    whole = seen.text_dim is not None  # else what is missing is said, whatever the variant
    if len(names) > 1 and header is None and whole:
        raise CheckpointError(
            f"{path} is {' or '.join(names)}, its tensors do not distinguish them: "
            "give one as variant="
        )
    return likely[0]


def _reading(path: Path, row: Variant, header: Header | None) -> Variant:
    """Return the row with the feature that the header names."""
    try:
        return row.reading(header.feature if header else None)
    except SettingError as error:
        raise CheckpointError(f"{path} has a header that contradicts itself: {error}") from error


def _unusual(head_dim: int | None) -> int | None:
    """Return a width of heads, or None if it is the published one."""
    return None if head_dim == HEAD_DIM else head_dim


def _head_dim(
    path: Path, seen: CheckpointEvidence, header: Header | None, given: int | None
) -> int | None:
    """Return the width of a resampler's heads that the user or the header states, if unusual."""
    inner = next((shape[0] for key, shape in seen.projection.items() if key.endswith(TO_Q)), None)
    stated = (header.head_dim or HEAD_DIM) if header else None
    if given is None:
        if stated is None and inner is not None and inner not in PUBLISHED:
            logging.getLogger(__name__).warning(
                "%s: the heads of its resampler are taken to be %d wide, as in all published "
                "files; its shape is of none of them: give head_dim if they are not",
                path,
                HEAD_DIM,
            )
        return _unusual(stated)
    if inner is None or given < 1 or inner % given:
        raise SettingError(
            f"{path}: head_dim = {given} does not divide "
            + ("anything: it has no resampler" if inner is None else f"its resampler's {inner}")
        )
    if stated not in (None, given):
        raise SettingError(f"{path}: its header states heads {stated} wide, not {given}")
    return _unusual(given)


def _layer_labels(layout: Layout, keys: Iterable[str], header: Header | None) -> tuple[str, ...]:
    """Return the layout's names of the layers, in the base model's order."""
    if header is None:
        return layout.layers_in(keys)
    return numbered_layers(len(header.layers)) if layout.numbered else header.layers


def _check_header(path: Path, file: AdapterFile) -> None:
    """Raise CheckpointError if the header contradicts the tensors."""
    stated = file.header.model_dump() if file.header else {}
    wrong = [
        f"{name} {stated[name]}, the tensors {fact}"
        for name, fact in _facts(file).items()
        if stated and stated[name] != fact
    ]
    if wrong:
        raise CheckpointError(f"{path}: its header states {'; '.join(wrong)}")


def _facts(file: AdapterFile) -> dict[str, Any]:
    """Return the fields of a header that the tensors determine."""
    return {
        "variant": file.variant.name,
        "tokens": file.tokens,
        "token_dim": file.token_dim,
        "feature_dim": file.feature_dim,
    }


def _named_header(file: AdapterFile, layers: Sequence[str] | None) -> Header:
    """Return the file's header, or a new one, with the names of the layers."""
    names = layers or file.layers or known_layers(file.token_dim, len(file.kv))
    if names is None:
        raise CheckpointError(
            f"this adapter only numbers its {len(file.kv)} cross-attentions, and no known model "
            "has that many "
            f"with {file.token_dim}-wide text: name the base model that it was trained for "
            "(--model, or layers=)"
        )
    if len(set(names)) != len(file.kv):
        raise CheckpointError(
            f"this adapter is for {len(file.kv)} cross-attentions; {len(set(names))} are named"
        )
    if file.header:
        return file.header.model_copy(update={"layers": tuple(names)})
    return Header(
        **_facts(file),
        head_dim=file.head_dim,
        form=file.form.name if file.form else "",
        family=file.form.families[0] if file.form else OLDEST,
        layers=tuple(names),
    )
