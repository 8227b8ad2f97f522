"""Define `imprompt embed`, which writes image features to a file."""

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from imprompt.errors import SettingError


def embed(
    images: Annotated[
        list[Path], typer.Argument(help="Pictures; the file holds the features of all.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write, .safetensors.")],
    model: Annotated[
        str, typer.Option(help="emoji, sd15, sdxl, a folder or a Hub id: see `imprompt models`.")
    ] = "emoji",
    adapter: Annotated[
        str | None,
        typer.Option(help="The adapter that will read them: base, plus, a file, or a Hub file."),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="Variant, if the adapter's tensors do not show it, such as faceid-plus-v2."
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of the image encoder, if the adapter does not name it."
        ),
    ] = None,
    crop: Annotated[
        str | None,
        typer.Option(
            help=(
                "Which part of a picture is used: center, top, bottom, left, right, pad, "
                "'pad black', squash or tiles; the image encoder's own way if not given."
            )
        ),
    ] = None,
    sharpening: Annotated[float, typer.Option(help="Sharpen at the encoder's size, 0 to 1.")] = 0.0,
    ignore: Annotated[
        Path | None,
        typer.Option(help="Mask: parts of a picture that are white in it are left out."),
    ] = None,
    face: Annotated[
        str | None,
        typer.Option(help="Of several faces (FaceID): largest, or a number from the left."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, mps or cpu; the best there is if not given.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; by the device if not given.")
    ] = None,
) -> None:
    """Encode pictures into a file that can be used as an image prompt in their place."""
    from rich.console import Console

    from imprompt.cli.console import loading, quiet
    from imprompt.encoders.embedding_files import SUFFIX, Embedding, save_embedding
    from imprompt.files import check_folder, refuse_inputs
    from imprompt.generation.references import Reference, hash_of

    if out.suffix != SUFFIX:
        raise SettingError(f"{out}: features are written to {SUFFIX} files; give such a name")
    check_folder(out.parent)
    refuse_inputs(out, [*images, *(Path(name) for name in (ignore, adapter) if name is not None)])
    fields = {
        "images": images,
        "crop": crop,
        "sharpening": sharpening,
        "ignore": ignore,
        "face": face,
    }
    reference = Reference.model_validate(fields)
    for picture in reference.images:
        picture.check()
    with Console(stderr=True).status(f"loading the image encoder for {model} …"), loading():
        quiet()
        reader = open_reader(model, adapter, variant, encoder, device, dtype)
    features, encoder_of = reader.features(reference)[0], reader.encoder
    out.parent.mkdir(parents=True, exist_ok=True)
    feature, hashes = reader.variant.feature, tuple(map(hash_of, images))
    embedding = Embedding(features, feature, encoder_of.source, encoder_of.fingerprint(), hashes)
    save_embedding(out, embedding)
    sizes = " and ".join("×".join(map(str, part.shape)) for part in embedding.parts)
    print(
        f"{out}  {feature} features"
        + (f" of {encoder_of.source}" if encoder_of.source else "")
        + f", {sizes}"
    )


def open_reader(
    model: str,
    adapter: str | None,
    variant: str | None,
    encoder: str | None,
    device: str | None,
    dtype: str | None,
) -> Any:
    """Load the image encoder for an adapter and return their `Reader`; SettingError."""
    import torch

    from imprompt.checkpoints.adapters import read_adapter
    from imprompt.encoders.matching import load_encoder
    from imprompt.generation.features import Reader
    from imprompt.generation.pipeline import check_device, default_device
    from imprompt.generation.settings import Precision
    from imprompt.models import find_adapter, find_model

    place = check_device(device) if device else default_device()
    kind = dtype or ("float16" if place.startswith("cuda") else "float32")
    if kind not in get_args(Precision):
        raise SettingError(f"dtype {kind!r} is not known; give float32, float16 or bfloat16")
    known = find_model(model)
    path, location, named = find_adapter(known, adapter)
    file = read_adapter(path, variant or named or None)
    return Reader(
        load_encoder(file, location, known, encoder, place, getattr(torch, kind)), file.variant
    )
