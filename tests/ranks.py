"""Training runs on several processes of this machine: every rank is told of the others as torchrun tells it."""

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from imprompt.cli import fail
from imprompt.errors import ImpromptError
from imprompt.training import loop
from imprompt.training.batches import Batch, Item, Shown
from imprompt.training.order import Draw
from imprompt.training.recipe import Recipe
from imprompt.training.step import Stepped, Trainer

Change = Callable[[int], None]  # of what is in a process, told its rank, before it trains

# Processes are forked from one that has imported everything, and holds nothing of the tests that ran before.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ranks", "tests.tiny"])
PATIENCE = 120  # seconds after which a run hangs


class Ended(NamedTuple):
    """How a run ended, by rank."""

    codes: list[int | None]  # -9: killed
    said: list[str]  # on standard error
    alone: float  # seconds from the end of the first rank to that of the last


def train(plan: Recipe, ranks: int, *changes: Change) -> Ended:
    """The run as `torchrun --nproc-per-node ranks` would start it; what it trained on is kept for `trained`."""
    notes = plan.output.with_name(f"{plan.output.name}-notes")
    notes.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [CONTEXT.Process(target=one, args=(plan, rank, ranks, port, notes, changes)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + PATIENCE
        wait([process.sentinel for process in processes], PATIENCE)
        first = time.monotonic()
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        alone = time.monotonic() - first
        return Ended([process.exitcode for process in processes], [(notes / f"{r}.err").read_text() for r in range(ranks)], alone)
    finally:
        for process in processes:
            process.kill()


def one(plan: Recipe, rank: int, ranks: int, port: int, notes: Path, changes: Sequence[Change]) -> None:
    """A process of the run."""
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(notes / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    torch.set_num_threads(1)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "localhost", **{key: str(value) for key, value in place.items()}}
    note(notes / f"{rank}.jsonl")
    for change in changes:
        change(rank)
    try:
        loop.train(plan)
    except ImpromptError as error:
        fail(str(error))


def note(file: Path) -> None:
    """Write down what every step trains on: a line [step, [[epoch, sample], …]]."""
    show, update = Shown.__getitem__, Trainer.update

    def shown(self: Shown, draw: Draw) -> Item:
        return show(self, draw) | {"name": (draw.epoch, draw.sample)}

    def updated(self: Trainer, step: int, parts: Iterable[Batch]) -> Stepped:
        seen = list(parts)
        with file.open("a") as lines:
            lines.write(json.dumps([step, [name for part in seen for name in part.names]]) + "\n")
        return update(self, step, seen)

    Shown.__getitem__, Trainer.update = shown, updated


class Killed(NamedTuple):
    """A rank is killed as step number `step` (from 0) begins."""

    rank: int
    step: int

    def __call__(self, rank: int) -> None:
        if rank == self.rank:
            before(self.step, lambda parts: os.kill(os.getpid(), signal.SIGKILL))


class Spoiled(NamedTuple):
    """A rank's latents of step number `step` (from 0) are no numbers."""

    rank: int
    step: int

    def __call__(self, rank: int) -> None:
        if rank == self.rank:
            before(self.step, lambda parts: [replace(part, latents=part.latents * torch.nan) for part in parts])


def before(chosen: int, change: Callable[[Iterable[Batch]], Any]) -> None:
    """Change what a step takes."""
    update = Trainer.update

    def updated(self: Trainer, step: int, parts: Iterable[Batch]) -> Stepped:
        return update(self, step, change(parts) if step == chosen else parts)

    Trainer.update = updated


def sharded(_rank: int) -> None:
    """FSDP2 on CPUs, for which accelerate has no switch."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    make = Accelerator.__init__

    def made(self: Accelerator, *args: Any, **kw: Any) -> None:
        make(self, *args, **kw)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP

    Accelerator.__init__ = made
