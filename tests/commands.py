"""`imprompt` commands as processes of their own, which end by themselves or are killed, also in the
middle of saving.
"""

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from imprompt.cli import main
from imprompt.training import loop, setup
from imprompt.training.recipe import Recipe
from tests.ranks import CONTEXT, PATIENCE
from tests.tiny import SMALLEST, seeded
from tests.tiny_pipelines import tiny_pipeline

# What a command imports as it runs, and pytest, which every process under it imports.
CONTEXT.set_forkserver_preload(
    [__name__, "accelerate", "diffusers.guiders", "rich.progress", "pytest"]
)
# Functions by which files come, go and reach the disk.
DISK = {"open", "mkdir", "fsync", "rename", "replace", "symlink", "unlink", "rmdir"}


# Families beside the UNet, one of each kind: its cross-attentions, joint attentions, both kinds of
# Flux's blocks.
KINDS = ("pixart", "sd3", "flux")


def smallest_model(folder: Path, kind: str = "unet") -> Path:
    """A pipeline whose image encoder has five tokens, as a user's folder.

    A UNet has four cross-attentions.
    """
    encoder, processor = smallest_encoder()
    pipeline = tiny_pipeline("sd1", **SMALLEST) if kind == "unet" else tiny_pipeline(kind)
    pipeline.save_pretrained(folder)
    for part in (encoder, processor):
        part.save_pretrained(folder / "image_encoder")
    return folder


def smallest_encoder() -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessorPil]:
    """A CLIP of five tokens, and its processor."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        projection_dim=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    with seeded(1):
        encoder = CLIPVisionModelWithProjection(config)
    side = config.image_size
    return encoder, CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def written(plan: Recipe, path: Path) -> Path:
    """The recipe as a TOML file."""
    path.write_text("\n".join(toml(plan.model_dump(mode="json", exclude_none=True))))
    return path


def toml(group: Mapping[str, Any], name: str = "") -> Iterator[str]:
    """The lines of a table: its own values, then its groups.

    What JSON calls them TOML does, but for null.
    """
    if name:
        yield f"[{name}]"
    groups = {key: value for key, value in group.items() if isinstance(value, dict)}
    yield from (f"{key} = {json.dumps(value)}" for key, value in group.items() if key not in groups)
    for key, value in groups.items():
        yield from toml(value, f"{name}.{key}" if name else key)


class After(NamedTuple):
    """A process is killed so many seconds after its start."""

    seconds: float


class Saving(NamedTuple):
    """A process kills itself at an event in saving, counted from 1 over all states that it
    saves.
    """

    event: int
    disk: bool  # only calls of and returns from disk functions count, else those of all functions


class Ended(NamedTuple):
    """How a command ended."""

    code: int | None  # -9: killed; None: it hung
    said: str  # on standard error
    seconds: float  # from its start
    doing: str  # what it was doing last
    # of every state that was saved: how many events it took, on the disk and in all
    saves: list[list[int]]


def imprompt(
    arguments: Sequence[str],
    notes: Path,
    kill: After | Saving | None = None,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run a command in a new process. notes: the folder for what it says."""
    notes.mkdir(parents=True, exist_ok=True)
    (notes / "doing").write_text("starting")
    (notes / "saves").write_text("")
    process = CONTEXT.Process(target=command, args=(arguments, notes, kill, environment or {}))
    process.start()
    began = time.monotonic()
    try:
        process.join(kill.seconds if isinstance(kill, After) else PATIENCE)
        hung = process.is_alive() and not isinstance(kill, After)
    finally:
        process.kill()
        process.join()
    seconds = time.monotonic() - began
    saves = [list(map(int, line.split())) for line in (notes / "saves").read_text().splitlines()]
    said, doing = ((notes / name).read_text() for name in ("err", "doing"))
    return Ended(None if hung else process.exitcode, said, seconds, doing.strip(), saves)


def command(
    arguments: Sequence[str],
    notes: Path,
    kill: After | Saving | None,
    environment: Mapping[str, str],
) -> None:
    """What the new process does."""
    gc.freeze()  # what is imported stays: no time goes into looking it through
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(notes / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    torch.set_num_threads(1)
    # for the processes that read ahead, as in a user's process
    multiprocessing.set_start_method("fork", force=True)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    tell(notes, Events(kill if isinstance(kill, Saving) else None))
    sys.argv = ["imprompt", *arguments]
    main()


def tell(notes: Path, events: "Events") -> None:
    """Write down what training is doing."""
    doing = os.open(notes / "doing", os.O_WRONLY)

    def told(name: str, work: Callable[..., Any], then: str = "starting") -> Callable[..., Any]:
        def working(*args: Any, **kwargs: Any) -> Any:
            os.pwrite(doing, name.ljust(8).encode(), 0)
            result = work(*args, **kwargs)
            os.pwrite(doing, then.ljust(8).encode(), 0)
            return result

        return working

    save_state = loop.save_state

    def save(*args: Any) -> Path:
        before = events.counts.copy()
        sys.setprofile(events)
        state = save_state(*args)
        sys.setprofile(None)
        with (notes / "saves").open("a") as lines:
            lines.write(
                " ".join(str(count - was) for count, was in zip(events.counts, before, strict=True))
                + "\n"
            )
        return state

    setup.encode_features = told("encoding", setup.encode_features)
    loop.Run.go = told("training", loop.Run.go)
    loop.save_state = told("saving", save, "training")


class Events:
    """Counts the calls and returns of functions, and kills the process at one of them."""

    def __init__(self, kill: Saving | None) -> None:
        self.kill, self.counts = kill, [0, 0]  # on the disk, all

    def __call__(self, _frame: FrameType, event: str, function: Any) -> None:
        self.counts[0] += (
            event.startswith("c_")
            and function.__module__ in ("posix", "io", "_io")
            and function.__name__ in DISK
        )
        self.counts[1] += 1
        if self.kill is not None and self.counts[not self.kill.disk] == self.kill.event:
            os.kill(os.getpid(), signal.SIGKILL)
