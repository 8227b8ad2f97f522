"""Training runs on several processes of this machine: every rank is told of the others as torchrun
tells it.
"""

import gc
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
from torch.distributed.fsdp import FSDPModule

from imprompt.cli.console import fail
from imprompt.errors import ImpromptError
from imprompt.training import loop, setup
from imprompt.training.augmented import AugmentedSample, AugmentedSamples
from imprompt.training.batches import Batch
from imprompt.training.order import SampleIndex
from imprompt.training.recipe import Recipe
from imprompt.training.step import Stepped, Trainer

Change = Callable[[int], None]  # what befalls a process, told its rank, before it trains

# Processes are forked from one that has imported everything, and knows nothing of the tests before.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ranks", "tests.tiny_pipelines", "accelerate", "pytest"])
PATIENCE = 120  # seconds after which a run hangs


class Ended(NamedTuple):
    """How a run ended, by rank."""

    codes: list[int | None]  # -9: killed; None: it hung
    said: list[str]  # the last line on standard error
    between: float  # seconds from the first rank's end to the last one's


def train(plan: Recipe, ranks: int, *changes: Change) -> Ended:
    """The run as `torchrun --nproc-per-node ranks` would start it.

    `shown` tells what it trained on.
    """
    notes = notes_of(plan.output)
    notes.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=one, args=(plan, rank, ranks, port, changes))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + PATIENCE
        wait([process.sentinel for process in processes], PATIENCE)
        first = time.monotonic()
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = [
        (notes / f"{rank}.err").read_text().strip().rpartition("\n")[2] for rank in range(ranks)
    ]
    return Ended(codes, said, time.monotonic() - first)


def one(plan: Recipe, rank: int, ranks: int, port: int, changes: Sequence[Change]) -> None:
    """A process of the run."""
    gc.freeze()  # what is imported stays: no time goes into looking it through
    notes = notes_of(plan.output)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(notes / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    multiprocessing.set_start_method("fork", force=True)  # for the processes that read ahead
    torch.set_num_threads(1)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_PORT": port,
        }
        os.environ |= {
            "MASTER_ADDR": "localhost",
            **{key: str(value) for key, value in place.items()},
        }
    note(notes / f"{rank}.jsonl")
    for change in changes:
        change(rank)
    try:
        loop.train(plan)
    except ImpromptError as error:
        fail(str(error), error.code)


def notes_of(run: Path) -> Path:
    """Where the processes of a run write down what they do."""
    return run.with_name(f"{run.name}-notes")


def note(file: Path) -> None:
    """Write down what every step trains on: a line [step, [[epoch, sample], …]]."""
    show, update = AugmentedSamples.__getitem__, Trainer.update

    def named(self: AugmentedSamples, draw: SampleIndex) -> AugmentedSample:
        sample = show(self, draw)
        return replace(sample, names=[f"{sample.names[0]} {draw.epoch} {draw.sample}"])

    def updated(self: Trainer, step: int, parts: Iterable[Batch]) -> Stepped:
        seen = list(parts)
        draws = [list(map(int, name.split()[1:])) for part in seen for name in part.names]
        with file.open("a") as lines:
            lines.write(json.dumps([step, draws]) + "\n")
        return update(self, step, seen)

    AugmentedSamples.__getitem__, Trainer.update = named, updated


def shown(run: Path) -> list[dict[int, list[SampleIndex]]]:
    """What every rank trained on, by step; of a step that was taken again, the last."""
    files = sorted(notes_of(run).glob("*.jsonl"))
    lines = [map(json.loads, file.read_text().splitlines()) for file in files]
    return [
        {step: [SampleIndex(*draw) for draw in draws] for step, draws in rank} for rank in lines
    ]


class Struck(NamedTuple):
    """A rank gets a signal as step number `step` (from 0) begins."""

    rank: int
    step: int
    signal: int = signal.SIGKILL

    def __call__(self, rank: int) -> None:
        if rank == self.rank:
            before(self.step, self._strike)

    def _strike(self, parts: Iterable[Batch]) -> Iterable[Batch]:
        os.kill(os.getpid(), self.signal)
        return parts


def killed_encoding(rank: int) -> None:
    """The second rank is killed as it is to encode its part of the features."""
    if rank == 1:
        setup.encode_features = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


class Spoiled(NamedTuple):
    """A rank's latents of step number `step` (from 0) are no numbers."""

    rank: int
    step: int

    def __call__(self, rank: int) -> None:
        if rank == self.rank:
            before(
                self.step,
                lambda parts: [replace(part, latents=part.latents * torch.nan) for part in parts],
            )


def before(chosen: int, change: Callable[[Iterable[Batch]], Iterable[Batch]]) -> None:
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

    make, go = Accelerator.__init__, loop.Run.go

    def made(self: Accelerator, *args: Any, **kw: Any) -> None:
        make(self, *args, **kw)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP

    def gone(self: loop.Run) -> None:
        assert isinstance(self.trainer.model, FSDPModule)
        go(self)

    Accelerator.__init__, loop.Run.go = made, gone
