"""Define `imprompt generate`, `imprompt models` and `imprompt blocks`."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from imprompt.cli.console import Force
from imprompt.errors import SettingError

if TYPE_CHECKING:
    from imprompt.cli.flags import FieldFlag, GivenFields
    from imprompt.generation.pipeline import OnStep
    from imprompt.generation.references import Reference
    from imprompt.generation.request import Request
    from imprompt.models import KnownAdapter


WITHOUT_FLAG = {  # fields that cannot be given on the command line, and why
    "Settings": {},
    "Reference": {
        "images": "they are the command's arguments",
        "adapter": "a command line names one adapter, for all image prompts: Request.adapter",
        "scale": "--scale is for all image prompts: Settings.scale",
        "embeds_scaling": "seldom used: in a request file",
        "face_scale": "seldom used: in a request file",
    },
    "Request": {
        "images": "they are the command's arguments",
        "settings": "its own fields are flags",
        "only": "it comes from a PNG: the picture of the call that the PNG holds",
        "weights": "it comes from a PNG: what made its picture",
    },
}


def field_flags() -> list["FieldFlag"]:
    """Return the flags that are fields of a request."""
    from imprompt.cli.flags import flags_of
    from imprompt.generation.references import Reference
    from imprompt.generation.request import Request
    from imprompt.generation.settings import Settings

    schemas = Settings, Reference, Request
    return [flag for schema in schemas for flag in flags_of(schema, WITHOUT_FLAG[schema.__name__])]


def generate_command() -> Callable[..., None]:
    """Return `generate` with its flags."""
    from imprompt.cli.flags import with_flags

    return with_flags(generate, field_flags())


def generate(
    given_fields: "GivenFields",
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Image prompts: each gives its own results.", show_default=False),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the results, or a file name ending in .png.")
    ] = Path("out"),
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            "--request",
            help="Repeat the picture in this PNG, or run the request in a TOML or JSON file; what "
            "else is given changes it.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, mps or cpu; the best there is if not given.")
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(help="model or sequential: weights leave the GPU while they are not in use."),
    ] = None,
    keep_features: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps the image prompts' features: a repeated picture needs no image "
            "encoder."
        ),
    ] = None,
    force: Force = False,
    record_paths: Annotated[
        bool,
        typer.Option(
            "--record-paths",
            help="Record absolute paths in the results, in place of names relative to them.",
        ),
    ] = False,
    allow_changed: Annotated[
        bool,
        typer.Option(
            "--allow-changed",
            help="Repeat a result although its pictures or weights have changed since.",
        ),
    ] = False,
) -> None:
    """Make the pictures of the request that a command line gives."""
    from imprompt.files import refuse_inputs
    from imprompt.generation.request import read_request

    named = images or []
    request = (
        new_request(named, given_fields)
        if like is None
        else changed_request(read_request(like), named, given_fields)
    )
    refuse_inputs(out, [*request.inputs(), *([] if like is None else [like])])
    place = ResultPlace(out, force, record_paths)
    machine = {"device": device, "offload": offload, "keep_features": keep_features}
    carry_out(request.unchecked() if allow_changed else request, place, **machine)


def new_request(images: Sequence[Path], given_fields: "GivenFields") -> "Request":
    """Return a request for these pictures with the fields that flags set; SettingError."""
    from imprompt.generation.references import Reference
    from imprompt.generation.request import Request
    from imprompt.generation.settings import Settings

    fields = given_fields[Reference]
    if "weights" in fields and "combine" not in fields:
        raise SettingError(
            "--weight weighs image prompts that are combined: say how with --combine"
        )
    items = with_fields(with_pictures([[{}]], images, "combine" in fields), fields)
    return Request.model_validate(
        given_fields[Request] | {"settings": given_fields[Settings], "images": items}
    )


def changed_request(
    request: "Request", images: Sequence[Path], given_fields: "GivenFields"
) -> "Request":
    """Return a request with other pictures, if any are given, and the fields that flags set.

    Raise SettingError if they do not fit the request.
    """
    from imprompt.generation.record import unchanged_by
    from imprompt.generation.references import Reference
    from imprompt.generation.request import Request
    from imprompt.generation.settings import Settings

    fields, settings = given_fields[Reference], given_fields[Settings]
    if images or settings.keys() & {"seed", "num_images"}:
        request = request.alone()
    items = [[dict(one) for one in item] for item in request.images]
    if "adapter" in given_fields[Request] and any(one["adapter"] for item in items for one in item):
        raise SettingError(
            "--adapter names one for all image prompts, but those of the file name their own: "
            "change it in the file (`imprompt inspect` prints a PNG's)"
        )
    if images:
        items = with_pictures(items, images, "combine" in fields)
    own: dict[str, Any] = {
        "settings": dict(request.settings) | settings,
        "images": with_fields(items, fields),
        "weights": unchanged_by(given_fields[Request], request.weights),
    }
    return request.changed(given_fields[Request] | own)


Items = list[list[dict[str, Any]]]  # fields of the references that each result follows


def with_pictures(items: Items, images: Sequence[Path], combined: bool) -> Items:
    """Return image prompts with other pictures, which take the places of the old ones in turn.

    Fields of a single picture apply to any number of new ones; `combined` makes them one image
    prompt. Raise SettingError if the numbers differ.
    """
    places = [place for item in items for one in item for place in one.get("images", [None])]
    if len(places) == 1:
        one = items[0][0]
        groups = [list(images)] if combined else [[image] for image in images]
        return [[one | {"images": group}] for group in groups if group]
    if len(places) != len(images):
        raise SettingError(
            f"{len(images)} pictures for the {len(places)} of the request: give as many, which "
            "take their places in turn"
        )
    left = iter(images)
    return [
        [one | {"images": [next(left) for _ in one["images"]]} for one in item] for item in items
    ]


def with_fields(items: Items, fields: dict[str, Any]) -> "list[list[Reference]]":
    """Return the references of image prompts with the fields that flags set for each.

    Each takes the next region, if there are several. Raise SettingError if their number does not
    fit.
    """
    from imprompt.generation.references import Reference

    count = sum(map(len, items))
    regions = fields.get("mask", [])
    if len(regions) > 1 and "combine" in fields:
        raise SettingError(
            "image prompts that are combined share one region: give one, or leave --combine out"
        )
    if len(regions) not in (0, 1, count):
        raise SettingError(
            f"{len(regions)} regions for {count} image prompts: give one for all, or one for each"
        )
    masks = iter([{"mask": region} for region in regions * (count if len(regions) == 1 else 1)])
    return [
        [Reference.model_validate(one | fields | next(masks, {})) for one in item] for item in items
    ]


class ResultPlace(NamedTuple):
    """Where results go, whether a file there is replaced, and whether they record paths."""

    out: Path
    force: bool = False
    record_paths: bool = False


@contextmanager
def sampling_bar(console: Any) -> "Iterator[OnStep]":
    """Show a bar on a terminal; yield what reports its steps."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("sampling"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    sampling = bar.add_task("sampling", total=None)
    with bar:
        yield lambda done, total: bar.update(sampling, completed=done, total=total)


def check_place(request: "Request", place: ResultPlace) -> None:
    """Raise SettingError if results cannot be written to a place, before weights are read."""
    from imprompt.files import check_folder, check_output
    from imprompt.generation.request import results_at, text_in

    folder, named = results_at(place.out)
    check_folder(folder)
    single = named and len(request.numbers) == 1
    if single and text_in(place.out) is None:  # one of ours may be the very result
        check_output(place.out, [], place.force)


def carry_out(request: "Request", place: ResultPlace, **machine: Any) -> list[Path]:
    """Check and load a request, write each of its pictures when it is made, and print their paths.

    Pictures that are there already, made by the same request, are kept. `machine`: see
    `Request.load`.
    """
    from rich.console import Console

    from imprompt.cli.console import loading, quiet
    from imprompt.files import check_output
    from imprompt.generation.record import check_weights
    from imprompt.generation.request import ResultFiles, write_results

    check_place(request, place)
    for picture in request.pictures():
        picture.check()
    console = Console(stderr=True)
    with console.status(f"loading {request.model} …"), loading():
        quiet()
        pipeline = request.load(**machine)
    check_weights(request.weights, pipeline.weights)
    written: list[tuple[Path, int | None]] = []
    try:
        with sampling_bar(console) as on_step:
            job = request.prepare(pipeline)
            files = ResultFiles.of(
                request, job.settings, pipeline.weights, place.out, paths=place.record_paths
            )
            found = {} if place.force else {n: files.there(n) for n in request.numbers}
            kept = {number: path for number, path in found.items() if path is not None}
            if kept:
                print(f"{len(kept):,} of {len(request.numbers):,} were there")
            elif files.single:
                check_output(files.path(None), [], place.force)
            if len(job.rounds) > 1 and request.settings.seed is None:
                seed = job.settings.seed
                console.print(f"seed {seed}: if this is stopped, it goes on with --seed {seed}")
            made = pipeline.make(job.without(kept), on_step)
            for result in write_results(made, files, kept):
                written.append(result)
    finally:
        for path, seed in written:
            print(f"{path}  all of them" if seed is None else f"{path}  seed {seed}")
    return [path for path, _ in written]


def encoder_text(known: "KnownAdapter") -> str:
    """Return which image encoder an adapter reads, and how that prepares a picture."""
    parts = [str(known.encoder or ""), known.prepares]
    return "; ".join(filter(None, parts)) or "none: a face encoder"


def model_rows() -> Iterator[tuple[str, ...]]:
    """Yield a row of the list for every known model, and for every adapter after it."""
    from imprompt.models import MODELS

    for model in MODELS.values():
        usual = f"{model.steps} steps, guidance {model.guidance:g}"
        yield model.name, "", str(model.base), model.about, "", usual, ""
        for name, known in model.adapters.items():
            tokens = str(known.tokens or "")
            yield (
                *("", name, str(known.file), encoder_text(known)),
                *(tokens, str(known.usual), known.licence),
            )


def models() -> None:
    """List the models and adapters that can be named, and where they come from."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for head in ("model", "adapter", "file", "image encoder", "tokens", "usual", "licence"):
        table.add_column(head, overflow="fold")
    for row in model_rows():
        table.add_row(*row)
    width: dict[str, Any] = {} if os.isatty(1) else {"width": 400}
    Console(**width).print(table)


def blocks(
    model: Annotated[
        str | None, typer.Option(help="List that model's own blocks instead, for a map.")
    ] = None,
) -> None:
    """List the presets for --blocks: which cross-attentions are conditioned, and how strongly."""
    from imprompt.cli.adapters import layers_of
    from imprompt.cli.console import print_rows, quiet
    from imprompt.generation.blocks import presets, transformers

    if model is None:
        print_rows(list(presets().items()))
        return
    quiet()
    layers = layers_of(model)
    print_rows(
        [
            (name, f"{sum(layer.startswith(name + '.') for layer in layers)} cross-attentions")
            for name in transformers(layers)
        ]
    )
