"""`imprompt embed`: image features as a file."""

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from imprompt.errors import MismatchError, SettingError


def register(app: typer.Typer) -> None:
    app.command()(embed)


def embed(
    images: Annotated[list[Path], typer.Argument(help="Pictures; the file holds the features of all.")],
    out: Annotated[Path, typer.Option(help="The file to write, .safetensors.")],
    model: Annotated[str, typer.Option(help="emoji, sd15, sdxl, a folder or a Hub id: see `imprompt models`.")] = "emoji",
    adapter: Annotated[
        str | None, typer.Option(help="The adapter that is to read them: base, plus, a file, or a Hub file.")
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="Folder or Hub id of the image encoder, if the adapter does not say.")] = None,
    crop: Annotated[
        str, typer.Option(help="What of a picture is seen: center, top, bottom, left, right, pad, 'pad black', squash, tiles.")
    ] = "center",
    sharpening: Annotated[float, typer.Option(help="Sharpen at the encoder's size, 0 to 1.")] = 0.0,
    ignore: Annotated[Path | None, typer.Option(help="A mask: what is white there is not seen.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; the best there is if not given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; by the device if not given.")] = None,
) -> None:
    """Encode pictures once, into a file that is taken wherever a picture is taken as an image prompt."""
    from rich.console import Console

    from imprompt.cli import loading, quiet
    from imprompt.encoders.embeddings import SUFFIX, Embedding, save_embedding
    from imprompt.encoders.preparation import Preparation, prepare
    from imprompt.files import check_folder
    from imprompt.images import open_image, open_mask

    if out.suffix != SUFFIX:
        raise SettingError(f"{out}: features are written to {SUFFIX} files; give such a name")
    check_folder(out.parent)
    preparation = Preparation.check(crop=crop, sharpening=sharpening, ignore=open_mask(ignore) if ignore else None)
    pictures = [open_image(path) for path in images]
    with Console(stderr=True).status(f"loading the image encoder for {model} …"), loading():
        quiet()
        feature, vision = open_for(model, adapter, encoder, device, dtype)
    ready = [square for picture in pictures for square in prepare(picture, preparation, vision)]
    hashes = tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in images)
    features = vision.features(ready, feature)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_embedding(out, Embedding(features, feature, vision.source, vision.fingerprint(), hashes))
    print(f"{out}  {feature} features of {vision.source}, {'×'.join(map(str, features.shape))}")


def open_for(model: str, adapter: str | None, encoder: str | None, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """Which feature an adapter reads, and the image encoder that gives it."""
    import torch

    from imprompt.checkpoint import read_adapter
    from imprompt.encoders.embeddings import RANKS
    from imprompt.encoders.opening import load_encoder
    from imprompt.models import find_adapter, find_model
    from imprompt.sampling.generate import check_device, default_device

    place = check_device(device) if device else default_device()
    kind = dtype or ("float16" if place.startswith("cuda") else "float32")
    if kind not in ("float32", "float16", "bfloat16"):
        raise SettingError(f"dtype {kind!r} is not known; give float32, float16 or bfloat16")
    known = find_model(model)
    path, told, *_ = find_adapter(known, adapter)
    file = read_adapter(path)
    if file.variant.feature not in RANKS.values():
        raise MismatchError(
            f"this adapter reads {file.variant.feature} features; {' and '.join(RANKS.values())} ones are made here"
        )
    return file.variant.feature, load_encoder(file, told, known, encoder, place, getattr(torch, kind))
