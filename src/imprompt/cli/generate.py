"""`imprompt generate`, `imprompt models` and `imprompt blocks`."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imprompt.errors import SettingError

if TYPE_CHECKING:
    from imprompt.sampling.record import Request


def register(app: typer.Typer) -> None:
    app.command()(generate)
    app.command()(models)
    app.command()(blocks)


def generate(
    context: typer.Context,
    images: Annotated[
        list[Path] | None, typer.Argument(help="Image prompts: each gives its own results.", show_default=False)
    ] = None,
    prompt: Annotated[str, typer.Option(help="Text that goes with the image prompt.")] = "",
    negative: Annotated[str, typer.Option(help="Text to keep away from.")] = "",
    scale: Annotated[float, typer.Option(help="How strongly the image prompt is heard; about 0.5 with a text.")] = 1.0,
    model: Annotated[str, typer.Option(help="emoji, sd15, sdxl, a folder or a Hub id: see `imprompt models`.")] = "emoji",
    adapter: Annotated[list[str] | None, typer.Option(help="base, plus, a file, a training run's state, or a Hub file.")] = None,
    variant: Annotated[str | None, typer.Option(help="What the adapter's tensors cannot tell, such as faceid-plus-v2.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Folder or Hub id of the image encoder, if the adapter does not say.")] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="Results per image prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Result i has seed + i; random if not given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; the model's own if not given.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the model's own if not given.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    together: Annotated[bool, typer.Option("--together", help="All image prompts prompt the same results.")] = False,
    combine: Annotated[
        str | None, typer.Option(help="What several become as one prompt: concat, add, subtract, average, norm-average, max, min.")
    ] = None,
    weight: Annotated[list[float] | None, typer.Option(help="Of each image prompt in turn, when they are combined.")] = None,
    region: Annotated[
        list[Path] | None, typer.Option(help="Mask: where the result hears the image prompt, or each of several in turn.")
    ] = None,
    overlap: Annotated[str, typer.Option(help="Where regions overlap: add, or normalise.")] = "add",
    blocks: Annotated[
        str,
        typer.Option(help="Which cross-attentions hear it: 'style transfer' or the like, or a map as JSON; see `imprompt blocks`"),
    ] = "linear",
    boost: Annotated[float, typer.Option(help="Of the second group of such blocks.")] = 1.0,
    start: Annotated[float, typer.Option(help="From which fraction of the noise schedule the image prompt is heard.")] = 0.0,
    end: Annotated[float, typer.Option(help="Up to which.")] = 1.0,
    easing: Annotated[str, typer.Option(help="How it comes and goes in between, such as 'ease out'.")] = "constant",
    negative_image: Annotated[list[Path] | None, typer.Option(help="Picture to keep away from, in place of no image.")] = None,
    noise: Annotated[str | None, typer.Option(help="Keep away from noise of it: fade, dissolve, gaussian or shuffle.")] = None,
    image_guidance: Annotated[
        float | None, typer.Option(help="A guidance scale for the image; --guidance is then for the text alone.")
    ] = None,
    crop: Annotated[
        str, typer.Option(help="What of it is seen: center, top, bottom, left, right, pad, 'pad black', squash or tiles.")
    ] = "center",
    sharpening: Annotated[float, typer.Option(help="Of the image prompt, 0 to 1.")] = 0.0,
    ignore: Annotated[Path | None, typer.Option(help="Mask: what of the image prompt is white there is not seen.")] = None,
    face: Annotated[str | None, typer.Option(help="Of several faces (FaceID): largest, or a number from the left.")] = None,
    init: Annotated[Path | None, typer.Option(help="Start from this picture (image to image).")] = None,
    mask: Annotated[Path | None, typer.Option(help="Redraw only the white part of --init (inpainting).")] = None,
    strength: Annotated[float, typer.Option(help="How much of --init is redrawn, 0 to 1.")] = 0.8,
    control: Annotated[Path | None, typer.Option(help="Keep to this picture of edges, depth or the like (ControlNet).")] = None,
    controlnet: Annotated[
        str | None, typer.Option(help="The ControlNet that reads --control: emoji's edges (white on black), a folder or a Hub id.")
    ] = None,
    control_scale: Annotated[float, typer.Option(help="How strongly it is kept to.")] = 1.0,
    out: Annotated[Path, typer.Option(help="Folder for the results, or a file name ending in .png.")] = Path("out"),
    like: Annotated[
        Path | None,
        typer.Option("--like", "--request", help="Repeat the picture in this PNG, or run the request in a TOML or JSON file."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; the best there is if not given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; by the device if not given.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures made at once.")] = 4,
    keep_features: Annotated[
        Path | None, typer.Option(help="Folder that keeps the image prompts' features: a repeated picture needs no image encoder.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Compile the model: slow at first, then faster on a GPU.")] = False,
    offload: Annotated[str | None, typer.Option(help="model or sequential: weights leave the GPU while they wait.")] = None,
    tiling: Annotated[bool, typer.Option("--tiling", help="Decode pictures one by one and in tiles: less memory.")] = False,
    quantize: Annotated[str | None, typer.Option(help="int8 or fp8: the UNet's matrices in 8 bits.")] = None,
) -> None:
    """Make pictures that follow an image prompt."""
    from imprompt.sampling.record import Request, read_request

    machine = {"device": device, "offload": offload, "keep_features": keep_features}
    if like is not None:
        if images:
            raise SettingError("--like and --request take their image prompts from that file: give either IMAGES or a file")
        if said_beside := [name for name in context.params if asked_for(context, name) and name not in BESIDE]:
            flag = said_beside[0].replace("_", "-")
            raise SettingError(
                f"--{flag} is not read beside --like or --request: change it in the file (`imprompt inspect` prints a PNG's)"
            )
        run(read_request(like), out, **machine)
        return
    if len(adapter or []) > 1:
        raise SettingError("several adapters: say which of them hears which picture in a request file (--request, docs/compose.md)")
    if noise and negative_image:
        raise SettingError("--noise and --negative-image both say what to keep away from: give one")
    said = {
        "blocks": block_map(blocks),
        "boost": boost,
        "start": start,
        "end": end,
        "easing": easing,
        "negative": {"kind": noise} if noise else negative_image,
        "crop": crop,
        "sharpening": sharpening,
        "ignore": ignore,
        "face": face,
    }
    asked = {
        "model": model,
        "adapter": adapter[0] if adapter else None,
        "encoder": encoder,
        "variant": variant,
        "images": references(images or [], combine, weight, region or [], said),
        "init_image": init,
        "mask_image": mask,
        "controlnet": controlnet,
        "control_image": control,
        "batch_size": batch_size,
        "dtype": dtype,
        "fast": fast,
        "tiling": tiling,
        "quantize": quantize,
        "settings": {
            "prompt": prompt,
            "negative_prompt": negative,
            "scale": scale,
            "num_images": num_images,
            "seed": seed,
            "steps": steps,
            "guidance": guidance,
            "width": width,
            "height": height,
            "together": together,
            "image_guidance": image_guidance,
            "overlap": overlap,
            "control_scale": control_scale,
            "strength": strength,
        },
    }
    run(Request.model_validate(asked), out, **machine)


BESIDE = ("like", "out", "device", "offload", "keep_features")  # what goes with a request, as it changes no pixels


def asked_for(context: typer.Context, name: str) -> bool:
    """Whether the user gave that option, and it is not its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def block_map(told: str) -> Any:
    """A preset's name, a number, or a map as JSON."""
    try:
        return json.loads(told)
    except ValueError:
        return told


def references(images: list[Path], combine: str | None, weights: list[float] | None, regions: list[Path],
               said: dict[str, Any]) -> list[Any]:  # fmt: skip
    """The flags as a request's image prompts. `said` goes for each of them."""
    from imprompt.sampling.references import Reference

    if len(regions) not in (0, 1, len(images)):
        raise SettingError(f"{len(regions)} regions for {len(images)} image prompts: give one for all, or one for each")
    if weights is not None and combine is None:
        raise SettingError("--weight weighs image prompts that are combined: say how with --combine")
    if combine is not None:
        if len(regions) > 1:
            raise SettingError("image prompts that are combined share one region: give one, or leave --combine out")
        groups = [images] if images else []
    else:
        groups = [[image] for image in images]
    masks = regions * len(groups) if len(regions) == 1 else regions or [None] * len(groups)
    weighed = {} if combine is None else {"combine": combine, "weights": weights}
    return [
        Reference.model_validate(said | weighed | {"images": group, "mask": mask})
        for group, mask in zip(groups, masks, strict=True)
    ]


def run(request: "Request", out: Path, **machine: Any) -> list[Path]:
    """Check, load, make, write; say what was made. `machine`: see `Request.load`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from imprompt.cli import loading, quiet
    from imprompt.files import check_folder, refuse_inputs
    from imprompt.sampling.record import results_at, save_results

    check_folder(results_at(out)[0])
    for picture in request.pictures():
        picture.check()
    refuse_inputs(out, [picture.path for picture in request.pictures()])
    console = Console(stderr=True)
    with console.status(f"loading {request.model} …"), loading():
        quiet()
        pipeline = request.load(**machine)
    columns = (TextColumn("sampling"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("sampling", total=None)
        result = request.run(pipeline, lambda done, total: progress.update(bar, completed=done, total=total))
    paths = save_results(result, request, out)
    for path, seed in zip(paths, result.seeds, strict=False):
        print(f"{path}  seed {seed}")
    for path in paths[len(result.seeds) :]:
        print(f"{path}  all of them")
    return paths


def models() -> None:
    """List the models and adapters that can be named, and where they come from."""
    from rich.console import Console
    from rich.table import Table

    from imprompt.models import MODELS

    table = Table("model", "adapter", "file", "image encoder", "licence", box=None, pad_edge=False)
    for model in MODELS.values():
        table.add_row(model.name, "", str(model.base), model.about)
        for name, known in model.adapters.items():
            table.add_row("", name, str(known.file), str(known.encoder or "none: a face encoder"), known.licence)
    width: dict[str, Any] = {} if os.isatty(1) else {"width": 200}
    Console(**width).print(table)


def blocks(
    model: Annotated[str | None, typer.Option(help="List that model's own blocks instead, for a map.")] = None,
) -> None:
    """List the presets for --blocks: which cross-attentions hear an image prompt, and how strongly."""
    from imprompt.cli import print_rows, quiet
    from imprompt.cli.adapters import sites_of
    from imprompt.sampling.blocks import presets, transformers

    if model is None:
        print_rows(list(presets().items()))
        return
    quiet()
    sites = sites_of(model)
    print_rows([(name, f"{sum(site.startswith(name + '.') for site in sites)} cross-attentions") for name in transformers(sites)])
