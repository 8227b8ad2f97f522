"""Image features as files, which can be used without the picture and the image encoder.

The files of this package are safetensors with a JSON header that names the encoder. The community's
`.ipadpt` files, a tensor that torch saved, are read too; they do not name their encoder, so only
rank and width of their features can be checked. Shape letters as in `imprompt.adapter`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from imprompt.checkpoints.tensors import check_plain, load_pickle, read_tensors, some, write_tensors
from imprompt.errors import CheckpointError, MismatchError, SettingError, first_line
from imprompt.untrusted import parse_json

KEY = "imprompt"  # of the file's metadata
FORMAT = 1
SUFFIX, FOREIGN = ".safetensors", ".ipadpt"
RANKS = {2: "pooled", 3: "penultimate"}  # feature by rank, if the file does not name it


class Embedding(NamedTuple):
    """Features of one picture or several, and where they come from.

    An empty string means unknown.

    features     (K, E) or (K, patches, E) with K rows; a tuple of such tensors if an adapter reads
                 several (a face and its picture)
    feature      which of the encoder's features: see `Variant.feature`
    encoder      the image encoder's name
    fingerprint  hash of the encoder's weights: see `VisionEncoder.fingerprint`
    pictures     SHA-256 of every picture's file
    """

    features: Tensor | tuple[Tensor, ...]
    feature: str = ""
    encoder: str = ""
    fingerprint: str = ""
    pictures: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Features as a tuple, of one tensor or several."""
        return (self.features,) if isinstance(self.features, Tensor) else self.features


class FeatureSpec(NamedTuple):
    """Image features that an adapter reads; an empty string means unknown.

    width  E of the features; of the last tensor if there are several
    """

    feature: str
    width: int
    encoder: str = ""
    fingerprint: str = ""

    @classmethod
    def of(cls, file: Any) -> Self:
        """Return what an `AdapterFile` reads."""
        told = (
            (file.header.encoder, file.header.encoder_fingerprint)
            if file.header is not None
            else ()
        )
        return cls(file.variant.feature, file.feature_dim, *told)


class EmbeddingHeader(BaseModel):
    """Header of an embedding file, stored as JSON in the safetensors metadata."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = FORMAT
    holds: Literal["image features"] = "image features"
    feature: str
    encoder: str
    fingerprint: str
    pictures: tuple[str, ...]


def save_embedding(path: str | Path, embedding: Embedding) -> None:
    """Write a `.safetensors` file with the features bit for bit, completely or not at all.

    Raise CheckpointError if it cannot be written.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise CheckpointError(f"{path}: features are written to {SUFFIX} files")
    facts = {name: value for name, value in embedding._asdict().items() if name != "features"}
    check_features(path, embedding)
    write_tensors(
        path, names_of(embedding.parts), {KEY: EmbeddingHeader(**facts).model_dump_json()}
    )


def load_embedding(path: str | Path) -> Embedding:
    """Read features, on the CPU, from this package's `.safetensors` or from an `.ipadpt` file.

    Raise CheckpointError, one line, if the file is missing, damaged, unsafe, or holds something
    else.
    """
    path = Path(path)
    embedding = _foreign(path) if path.suffix.lower() == FOREIGN else _ours(path)
    check_features(path, embedding)
    return embedding


def check_embedding(
    embedding: Embedding, reads: FeatureSpec, name: str | Path = "these features"
) -> None:
    """Raise MismatchError unless an adapter that reads `reads` can use these features.

    Fingerprints are compared only if both are known. `name` names the features in the message.
    """
    by = f" of {embedding.encoder}" if embedding.encoder else ""
    made = f"{name}: {embedding.feature} features{by}, {embedding.parts[-1].shape[-1]} wide"
    needs = f"this adapter reads {reads.feature} ones, {reads.width} wide" + (
        f", of {reads.encoder}" if reads.encoder else ""
    )
    if (embedding.feature, embedding.parts[-1].shape[-1]) != (reads.feature, reads.width):
        raise MismatchError(f"{made}; {needs}")
    prints = {embedding.fingerprint, reads.fingerprint} - {""}
    # in bfloat16 the fingerprint is of rounded weights
    if len(prints) > 1 and all(part.dtype != torch.bfloat16 for part in embedding.parts):
        raise MismatchError(
            f"{made}, were made by an encoder of other weights (fingerprint "
            f"{embedding.fingerprint}); "
            f"{needs} (fingerprint {reads.fingerprint})"
        )


def check_features(path: Path, embedding: Embedding) -> None:
    """Raise CheckpointError unless all features are dense and finite (K, …), with the same K."""
    parts = embedding.parts
    check_plain(path, names_of(parts))
    shapes = [tuple(part.shape) for part in parts]
    if any(len(shape) not in RANKS for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        shapes_found = ", ".join("×".join(map(str, shape)) or "a single number" for shape in shapes)
        raise CheckpointError(
            f"{path} holds no image features: a tensor of {shapes_found} is neither (K, E) nor (K, "
            "patches, E)"
        )


def names_of(parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return the features by their names in a file, "features.0" and so on."""
    return {f"features.{number}": part for number, part in enumerate(parts)}


def _ours(path: Path) -> Embedding:
    held, metadata = read_tensors(
        path, lambda keys: {key: key for key in keys if key.startswith("features.")}
    )
    header = _header(path, metadata)
    if header is None or not held:
        raise CheckpointError(f"{path} holds no image features as imprompt embed writes them")
    parts: tuple[Tensor, ...] = tuple(held[name] for name in sorted(held))
    return Embedding(
        parts[0] if len(parts) == 1 else parts, **header.model_dump(exclude={"format", "holds"})
    )


def _header(path: Path, metadata: Mapping[str, str]) -> EmbeddingHeader | None:
    """Return the header of an embedding file; None for another, such as an adapter's."""
    try:
        told = parse_json(metadata.get(KEY, "null"))
    except SettingError as error:
        raise CheckpointError(f"{path} has a header that is not valid JSON: {error}") from error
    if not isinstance(told, dict) or told.get("holds") != "image features":
        return None
    if told.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is of format {told.get('format')!r}; this imprompt reads format {FORMAT}, a "
            "newer one may read it"
        )
    try:
        return EmbeddingHeader.model_validate(told)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise CheckpointError(
            f"{path} has a header that this imprompt cannot read ({some(faults)})"
        ) from error


def _foreign(path: Path) -> Embedding:
    """Read an `.ipadpt` file; the rank of its features decides which feature they are.

    It is a tensor, as ComfyUI's node packs write it, or a list with the one of an adapter, as
    diffusers' `prepare_ip_adapter_image_embeds` returns it.
    """
    try:
        held = load_pickle(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    if isinstance(held, list) and len(held) == 1:
        held = _without_negative(held[0])
    if not isinstance(held, Tensor):
        raise CheckpointError(
            f"{path} holds a {type(held).__name__} instead of one tensor: save the features of one "
            "adapter alone"
        )
    check_plain(path, names_of((held,)))
    if held.ndim == 3 and held.shape[1] == 1:  # of one "patch": pooled
        held = held[:, 0]
    return Embedding(held, RANKS.get(held.ndim, ""))


def _without_negative(held: Any) -> Any:
    """Return the features (K, …) of diffusers' (1, K, …), or (2, K, …) with the negative first.

    The adapter's own features of no image stand in place of the negative.
    """
    if (
        isinstance(held, Tensor)
        and held.layout == torch.strided
        and held.ndim > 2
        and len(held) in (1, 2)
    ):
        return held[-1]
    return held
