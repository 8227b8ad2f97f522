"""Define `imprompt inspect` and `imprompt convert`, for adapter files."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from imprompt.cli.console import Force


class LayoutName(StrEnum):
    """Layouts in which an adapter file can be written."""

    imprompt = "imprompt"
    paper = "paper"
    diffusers = "diffusers"
    xlabs = "xlabs"
    diffusers_xlabs = "diffusers-xlabs"
    instantx = "instantx"
    diffsynth = "diffsynth"
    hunyuandit = "hunyuandit"
    instantx_sd3 = "instantx-sd3"
    diffusers_sd3 = "diffusers-sd3"
    ai_toolkit = "ai-toolkit"
    ai_toolkit_pixart = "ai-toolkit-pixart"
    lynx = "lynx"
    instantcharacter = "instantcharacter"
    redux = "redux"


Answer = Annotated[
    str | None,
    typer.Option(help="Variant, if the file's tensors do not show it, such as faceid-plus-v2."),
]


HeadDim = Annotated[
    int | None,
    typer.Option(
        help="Width of the resampler's attention heads, if it is not 64: no tensor shows it."
    ),
]


def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            help="An adapter file, a folder that holds one, or a PNG that was generated."
        ),
    ],
    variant: Answer = None,
) -> None:
    """Describe an adapter file: for which model and image encoder, how many parameters.

    For a PNG, print its request as JSON.
    """
    from imprompt.checkpoints.adapters import describe, read_adapter
    from imprompt.cli.console import print_rows

    if file.suffix.lower() == ".png":
        from imprompt.generation.request import read_request

        print(read_request(file).model_dump_json(indent=1, exclude_defaults=True))
        return
    print_rows(describe(read_adapter(file, variant)))


def convert(
    source: Annotated[Path, typer.Argument(help="An adapter file in any known layout.")],
    target: Annotated[
        Path,
        typer.Argument(
            help="The file to write: .safetensors, .bin for the paper's layout, a folder for lynx."
        ),
    ],
    to: Annotated[
        LayoutName, typer.Option("--to", help="The layout to write.")
    ] = LayoutName.imprompt,
    model: Annotated[
        str | None,
        typer.Option(help="The base model, if the file only numbers the layers of an unknown one."),
    ] = None,
    variant: Answer = None,
    head_dim: HeadDim = None,
    force: Force = False,
) -> None:
    """Write an adapter in another layout, its weights bit for bit.

    A .bin has no place for the header; .safetensors keeps it.
    """
    from imprompt.checkpoints.adapters import read_adapter, write_adapter
    from imprompt.checkpoints.published import places_of
    from imprompt.files import check_output

    for place in places_of(to.value, target):
        check_output(place, [source], force)
    file = read_adapter(source, variant, head_dim)
    write_adapter(target, file, to.value, layers_of(model) if model else None)
    print(f"{target}  {to.value} layout")


def layers_of(model: str) -> list[str]:
    """Return the names of a base model's cross-attention layers, read from its configuration."""
    import torch

    from imprompt.errors import CheckpointError, first_line
    from imprompt.families.published import model_parts
    from imprompt.models import find_model, part_config

    known = find_model(model)
    family = model_parts(known)[1]
    config = part_config(known, family.component)
    try:
        with torch.device("meta"):
            base = family.build(config)
    except Exception as error:  # a folder can be wrong in any way
        raise CheckpointError(
            f"{model}: no base model can be read ({first_line(error)})"
        ) from error
    return list(family.layers(base))
