"""Loops measured turn by turn in one run, each in a process of its own: so its peak memory is its own too."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from benchmarks.setting import Setting
from imprompt.errors import ImpromptError, first_line
from imprompt.training.watch import GB, peak_memory_gb


class Loop(Protocol):
    """What is measured; made from a `Setting`."""

    def run(self, steps: int) -> float:
        """Take so many steps; give a loss."""
        ...


class Turn(Protocol):
    """A loop as the one who takes turns sees it."""

    def run(self, steps: int) -> tuple[float, float]:
        """Take so many steps; give the seconds of one, and a loss. The first turn warms up."""
        ...

    def peak(self) -> tuple[float, float]:
        """The most memory held since the first turn in 1e9 bytes: `Measured.peak` and `.reserved`. It ends the loop."""
        ...


@dataclass
class Measured:
    """What a loop took."""

    seconds: list[float] = field(default_factory=list)  # of a step, one number per turn
    losses: list[float] = field(default_factory=list)  # one per turn
    peak: float = 0.0  # 1e9 bytes: all tensors on a GPU; the resident process on a CPU
    reserved: float = 0.0  # 1e9 bytes: what PyTorch held of the GPU; on a CPU as `peak`


def take_turns(loops: Mapping[str, Turn], rounds: int, steps: int, on_turn: Callable[[str, float], None]) -> dict[str, Measured]:
    """Every loop in turn, `rounds` times `steps` steps, after a first turn that does not count."""
    found = {name: Measured() for name in loops}
    for number in range(rounds + 1):
        for name, loop in loops.items():
            seconds, loss = loop.run(steps)
            on_turn(name, seconds)
            if number:
                found[name].seconds.append(seconds)
                found[name].losses.append(loss)
    for name, loop in loops.items():
        found[name].peak, found[name].reserved = loop.peak()
    return found


class Worker:
    """A loop in a process of its own; see `Turn`. ImpromptError if it fails."""

    def __init__(self, make: Callable[[Setting], Loop], setting: Setting) -> None:
        context = get_context("spawn")  # CUDA and OpenMP do not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, make, setting), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    def run(self, steps: int) -> tuple[float, float]:
        return self._ask(steps)

    def peak(self) -> tuple[float, float]:
        found = self._ask(0)
        self._process.join()
        return found

    def _ask(self, steps: int) -> tuple[float, float]:
        try:
            self._pipe.send(steps)
            answer = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise ImpromptError("a loop's process was killed, perhaps for the memory it took") from error
        if isinstance(answer, ImpromptError):
            raise answer
        return answer


def serve(pipe: Any, make: Callable[[Setting], Loop], setting: Setting) -> None:
    """The worker's side: it is asked for steps until it is asked for none."""
    device = torch.device(setting.device)
    try:
        steps, turns = pipe.recv(), 0
        loop = make(setting)  # now, so that no two loops are made at a time: that takes more memory than to have them
        while steps:
            start = time.perf_counter()
            loss = loop.run(steps)
            if device.type == "cuda":
                torch.cuda.synchronize()  # the paper's loop reads its loss before the backward pass
            pipe.send(((time.perf_counter() - start) / steps, loss))
            if not turns:
                forget_peak(device)
            steps, turns = pipe.recv(), turns + 1
        reserved = torch.cuda.max_memory_reserved() / GB if device.type == "cuda" else peak_memory_gb(device)
        pipe.send((peak_memory_gb(device), reserved))
    except Exception as error:  # whatever it is, it is told where the table is printed
        pipe.send(ImpromptError(f"{make.__name__}: {type(error).__name__}: {first_line(error)}"))


def forget_peak(device: torch.device) -> None:
    """Count the peak anew from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def measure(loops: Mapping[str, Callable[[Setting], Loop]], setting: Setting, rounds: int, steps: int,
            on_turn: Callable[[str, float], None]) -> dict[str, Measured]:  # fmt: skip
    """The loops at that setting, each in a process of its own."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(make, setting)) for name, make in loops.items()}
        return take_turns(workers, rounds, steps, on_turn)
