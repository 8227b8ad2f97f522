"""Read, check and write files of adapters that others published for transformers.

How their tensors are named is a table: see `imprompt.families.published_files`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imprompt.checkpoints.integrity import blank_projection, shapes_of
from imprompt.checkpoints.tensors import some
from imprompt.errors import CheckpointError
from imprompt.families.forms import FORMS, NEW_FORMS, AttentionForm
from imprompt.families.published_files import PUBLISHED_LAYOUTS, PublishedLayout
from imprompt.variants import Variant

Tensors = dict[str, Tensor]


def published_layout(tensors: Mapping[str, Any]) -> PublishedLayout | None:
    """Return the published layout of a file with these tensors, by their keys and sizes."""

    def occurs(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in tensors)

    def fits(row: PublishedLayout) -> bool:
        return all(map(occurs, row.signature)) and row.where(tensors)

    return next(filter(fits, PUBLISHED_LAYOUTS), None)


def files_at(path: Path) -> dict[str, Path]:
    """Return the files of an adapter that is kept in several, by the prefix of their tensors.

    path  the folder that holds all of them, or one of them; for another one the result is empty
    """
    for row in PUBLISHED_LAYOUTS:
        whole = bool(row.files) and all((path / name).is_file() for name in row.files)
        if whole or path.name in row.files:
            folder = path if whole else path.parent
            return {prefix: folder / name for name, prefix in row.files.items()}
    return {}


def places_of(layout: str, target: Path) -> list[Path]:
    """Return the files that an adapter is written to in that layout: `target`, or files in it."""
    row = next((own for own in PUBLISHED_LAYOUTS if own.name == layout), None)
    return [target / name for name in row.files] if row and row.files else [target]


def by_file(row: PublishedLayout, tensors: Tensors, path: Path) -> dict[Path, Tensors]:
    """Return the tensors of every file that an adapter is written to at `path`, by their keys."""
    if not row.files:
        return {path: tensors}
    return {
        path / name: {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
        for name, prefix in row.files.items()
    }


def module_tensors(
    row: PublishedLayout, tensors: Tensors, path: Path
) -> tuple[Tensors, list[Tensors]]:
    """Return the projection's tensors and every layer's, by the names in their modules.

    Raise CheckpointError, naming them all, if keys are missing or unexpected.
    """
    projection = {
        row.module_name(key): tensor
        for key, tensor in tensors.items()
        if key.startswith(tuple(row.projection))
    }
    wanted = {key: (layer, names) for layer, names, key in row.names(row.count(tensors))}
    missing = [key for key in wanted if key not in tensors]
    unexpected = [
        key for key in tensors if key not in wanted and not key.startswith(tuple(row.projection))
    ]
    if missing or unexpected:
        faults = [f"lacks {some(missing)}"] * bool(missing)
        faults += [f"has unexpected {some(unexpected)}"] * bool(unexpected)
        raise CheckpointError(f"{path}, a file of {row.name}, {' and '.join(faults)}")
    layers: list[Tensors] = [{} for _ in range(row.count(tensors))]
    for key, (layer, names) in wanted.items():
        several = names.split("+")
        parts = tensors[key].chunk(len(several)) if len(several) > 1 else (tensors[key],)
        layers[layer] |= dict(zip(several, parts, strict=True))
    return projection, layers


def file_tensors(row: PublishedLayout, projection: Tensors, layers: list[Tensors]) -> Tensors:
    """Return the tensors of a file, the inverse of `module_tensors`."""
    tensors: Tensors = {row.file_key(name): tensor for name, tensor in projection.items()}
    for layer, names, key in row.names(len(layers)):
        parts = [layers[layer][name] for name in names.split("+")]
        tensors[key] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tensors


def check_form(path: Path, form: AttentionForm, projection: Tensors, layers: list[Tensors],
               variant: Variant) -> None:  # fmt: skip
    """Raise CheckpointError, naming the first, if a tensor has another shape than its module's."""
    held: list[tuple[str, Tensors]] = [("the projection", projection)]
    held += [(f"layer {number}", layer) for number, layer in enumerate(layers)]
    token_dim, time_dim = None, None
    for where, tensors in held:
        shapes = shapes_of(tensors)
        try:
            with torch.device("meta"):
                blank = (
                    blank_projection(variant, shapes)
                    if token_dim is None
                    else form.states.from_shapes(shapes)
                )
        except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: the shapes of {where} do not fit together") from error
        needed = shapes_of(blank.state_dict())
        for name in {**needed, **shapes}:
            ours, theirs = shapes.get(name), needed.get(name)
            if ours != theirs:
                raise CheckpointError(
                    f"{path}: {name} of {where} has shape {ours}; it should have {theirs}"
                )
        if token_dim is None:
            token_dim, time_dim = variant.token_shape(shapes)[1], getattr(blank, "time_dim", None)
        elif needed["to_k.weight"][1] != token_dim and not form.widened:
            raise CheckpointError(
                f"{path}: {where} reads tokens {needed['to_k.weight'][1]} wide; the projection's "
                f"are {token_dim} wide"
            )
        elif (told := getattr(blank, "time_dim", time_dim)) != time_dim:
            raise CheckpointError(
                f"{path}: {where} is told the time in {told} numbers; the projection embeds it in "
                f"{time_dim}"
            )


def form_named(name: str, path: Path) -> AttentionForm:
    """Return the form that a header names; CheckpointError if it is not known."""
    if name not in FORMS | NEW_FORMS:
        raise CheckpointError(f"{path}: unknown form {name!r} of an adapter for a transformer")
    return (FORMS | NEW_FORMS)[name]
