"""Define `imprompt embed`, which writes image features to a file."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imprompt.cli.console import Force
from imprompt.errors import SettingError

if TYPE_CHECKING:
    from imprompt.cli.flags import GivenFields
    from imprompt.generation.request import Request

FIELDS = {  # fields of a request that are flags here too
    "Reference": ("crop", "sharpening", "ignore", "face"),
    "Request": ("model", "adapter", "variant", "encoder", "dtype"),
}


def embed_command() -> Callable[..., None]:
    """Return `embed` with its flags."""
    from imprompt.cli.flags import flags_of, with_flags
    from imprompt.generation.references import Reference
    from imprompt.generation.request import Request

    flags = [flag for schema in (Request, Reference) for flag in flags_of(schema, {})]
    return with_flags(embed, [flag for flag in flags if flag.field in FIELDS[flag.schema.__name__]])


def embed(
    given_fields: "GivenFields",
    images: Annotated[
        list[Path], typer.Argument(help="Pictures; the file holds the features of all.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write, .safetensors.")],
    device: Annotated[
        str | None, typer.Option(help="cuda, mps or cpu; the best there is if not given.")
    ] = None,
    force: Force = False,
) -> None:
    """Encode pictures into a file that can be used as an image prompt in their place."""
    from rich.console import Console

    from imprompt.cli.console import loading, quiet
    from imprompt.encoders.embedding_files import SUFFIX, Embedding, save_embedding
    from imprompt.files import check_folder, check_output, sha256
    from imprompt.generation.record import recorded_name
    from imprompt.generation.references import Reference
    from imprompt.generation.request import Request

    if out.suffix != SUFFIX:
        raise SettingError(f"{out}: features are written to {SUFFIX} files; give such a name")
    check_folder(out.parent)
    reference = Reference.model_validate(given_fields[Reference] | {"images": images})
    request = Request.model_validate(given_fields[Request] | {"images": [reference]})
    check_output(out, request.inputs(), force)
    for picture in request.pictures():
        picture.check()
    with Console(stderr=True).status(f"loading the image encoder for {request.model} …"), loading():
        quiet()
        reader = open_reader(request, device)
    features, encoder_of = reader.features(reference)[0], reader.encoder
    out.parent.mkdir(parents=True, exist_ok=True)
    feature, hashes = reader.variant.feature, tuple(map(sha256, images))
    source = recorded_name(encoder_of.source, out.parent) if encoder_of.source else ""
    embedding = Embedding(features, feature, source, encoder_of.fingerprint(), hashes)
    save_embedding(out, embedding)
    sizes = " and ".join("×".join(map(str, part.shape)) for part in embedding.parts)
    print(
        f"{out}  {feature} features"
        + (f" of {encoder_of.source}" if encoder_of.source else "")
        + f", {sizes}"
    )


def open_reader(request: "Request", device: str | None) -> Any:
    """Load the image encoder for a request's adapter and return their `Reader`; SettingError."""
    import torch

    from imprompt.checkpoints.adapters import read_adapter
    from imprompt.encoders.matching import load_encoder
    from imprompt.generation.features import Reader
    from imprompt.generation.pipeline import check_device, default_device
    from imprompt.models import find_adapter, find_model

    place = check_device(device) if device else default_device()
    dtype = request.dtype or ("float16" if place.startswith("cuda") else "float32")
    known = find_model(request.model)
    path, location, named, _ = find_adapter(known, request.adapter)
    file = read_adapter(path, request.variant or named or None)
    return Reader(
        load_encoder(file, location, known, request.encoder, place, getattr(torch, dtype)),
        file.variant,
    )
