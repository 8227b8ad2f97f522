"""`imprompt evaluate`: how well an adapter does, measured."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

KINDS = "auto, folder, coco or subjects"


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Measure a model and adapter over a set of pictures.", no_args_is_help=True, rich_markup_mode=None)
    for command in (run, report, compare):
        group.command()(command)
    app.add_typer(group, name="evaluate")


def run(
    pictures: Annotated[Path, typer.Argument(metavar="SET", help="Folder: with metadata.jsonl, COCO's, or subjects.")],
    kind: Annotated[str, typer.Option(help=f"What kind of set it is: {KINDS}.")] = "auto",
    protocol: Annotated[
        str, typer.Option(help="default, paper, paper-captioned or subjects; the options below change it.")
    ] = "default",
    model: Annotated[str, typer.Option(help="emoji, sd15, sdxl, a folder or a Hub id: see `imprompt models`.")] = "emoji",
    adapter: Annotated[str | None, typer.Option(help="base, plus, a file, a training run's state, or a Hub file.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Folder or Hub id of the image encoder, if the adapter does not say.")] = None,
    variant: Annotated[str | None, typer.Option(help="What the adapter's tensors cannot tell, such as faceid-plus-v2.")] = None,
    out: Annotated[Path, typer.Option(help="The run's folder; the same command again goes on with it.")] = Path("evaluation"),
    sweep: Annotated[
        list[str] | None, typer.Option(help="scale=0,0.5,1 (also guidance, steps, adapter, blocks); several give all pairs.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items, the first of the set.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Pictures per item.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture; picture k of item i has this + i × seeds + k.")] = None,
    captions: Annotated[bool | None, typer.Option("--captions/--no-captions", help="Whether captions are given as text.")] = None,
    scale: Annotated[float | None, typer.Option(help="How strongly the image prompt is heard.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="ddim, or default: the model's own.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    negative: Annotated[str | None, typer.Option(help="Text to keep away from.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures made at once.")] = None,
    clip: Annotated[
        str, typer.Option(help="The CLIP that measures: a folder or Hub id, or none.")
    ] = "openai/clip-vit-large-patch14",
    dino: Annotated[
        str, typer.Option(help="The DINO or DINOv2 that measures: a folder or Hub id, or none.")
    ] = "facebook/dino-vits16",
    inception: Annotated[
        Path | None, typer.Option(help="TorchScript file of Inception, for FID and KID; of CLIP's features if not given.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; the best there is if not given.")] = None,
    judge_device: Annotated[str | None, typer.Option(help="Where the judges compute; the same if not given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; by the device if not given.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of each process on a CPU; another number changes results by rounding.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be read, and count it.")] = False,
) -> None:
    """Make pictures for every item of a set and measure them. The same command again goes on; torchrun shares the work."""
    from rich.console import Console
    from rich.progress import Progress

    from imprompt.cli import loading, quiet
    from imprompt.errors import SettingError
    from imprompt.evaluation.protocols import protocol as named
    from imprompt.evaluation.protocols import read_sweep, settings_of

    changes: dict[str, Any] = {
        "limit": limit, "seeds": seeds, "seed": seed, "captions": captions, "scale": scale, "scheduler": scheduler, "steps": steps,
        "guidance": guidance, "negative_prompt": negative, "batch_size": batch_size,
    }  # fmt: skip
    points = read_sweep(sweep or [])
    if twice := next((axis for axis in points if (changes | {"adapter": adapter}).get(axis) is not None), ""):
        raise SettingError(f"--{twice} and --sweep {twice} are both given: give one of them")
    plan = named(protocol, **changes)
    settings_of(plan, points)  # what is wrong with it is told before torch is there
    with loading():
        from imprompt.evaluation.plan import Plan
        from imprompt.evaluation.run import evaluate

        quiet()
    asked: dict[str, Any] = {
        "path": pictures, "out": out, "kind": kind, "protocol_name": protocol, "protocol": plan, "sweep": points,
        "model": model, "adapter": adapter, "encoder": encoder, "variant": variant, "clip": given(clip), "dino": given(dino),
        "inception": None if inception is None else str(inception), "device": device, "judge_device": judge_device,
        "dtype": dtype, "skip_bad": skip_bad, "threads": threads,
    }  # fmt: skip
    tells = not int(os.environ.get("RANK", "0"))  # of several processes one tells
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (tells and console.is_terminal)) as progress:
        bar = progress.add_task("evaluating", total=None)
        summary = evaluate(Plan(**asked), lambda done, total: progress.update(bar, completed=done, total=total))
    if tells:
        print_summary(summary)
        print(f"{out / 'summary.json'}  see it: imprompt evaluate report {out}")


def given(source: str) -> str | None:
    return None if source == "none" else source


def print_summary(summary: dict[str, Any]) -> None:
    """A row for every setting, a column for every metric."""
    from rich.console import Console
    from rich.table import Table

    from imprompt.evaluation.metrics import METRICS

    there = [key for key in METRICS if any(key in setting["metrics"] for setting in summary["settings"])]
    table = Table("setting", "pictures", *(METRICS[key].title for key in there), box=None, pad_edge=False)
    for setting in summary["settings"]:
        cells = [said(setting["metrics"].get(key), METRICS[key].digits) for key in there]
        table.add_row(setting["name"], f"{setting['count']:,}", *cells)
    width: dict[str, Any] = {} if os.isatty(1) else {"width": 250}
    Console(**width).print(table)
    for note in summary["notes"]:
        print(note)


def said(told: dict[str, float | None] | None, digits: int) -> str:
    """A value, and half its interval's width."""
    if told is None or told["value"] is None:
        return ""
    value, low, high = told["value"], told["low"], told["high"]
    reach = "" if low is None or high is None else f" ± {(high - low) / 2:.{digits}f}"
    return f"{value:.{digits}f}{reach}"


def report(out: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write a run's tables, plots and pictures as one page, OUT/report.html."""
    from imprompt.evaluation.report import write_report

    print(write_report(out))


def compare(
    first: Annotated[Path, typer.Argument(help="A run's folder.")],
    second: Annotated[Path, typer.Argument(help="Another's.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("comparison.html"),
) -> None:
    """Write a page on the differences of two runs over the items that both have, with their intervals."""
    from imprompt.evaluation.report import write_comparison

    print(write_comparison(first, second, out))
