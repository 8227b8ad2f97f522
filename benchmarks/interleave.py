"""Interleaving: implementations are measured in one run, in turn (A, B, C, A, B, C, …).

Ratios are computed within a round.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch

from imprompt.errors import ImpromptError, first_line
from imprompt.training.watch import GB, peak_memory_gb

T = TypeVar("T")


class Loop(Protocol):
    """A loop that is measured in a process of its own.

    It is made from a setting, which names its `device`.
    """

    def run(self, steps: int) -> float | None:
        """Take `steps` steps; return a loss, or None if there is none."""
        ...


class Timed(Protocol):
    """A measured implementation, as `interleave` calls it."""

    def run(self, steps: int) -> tuple[float, float | None]:
        """Take `steps` steps; return the seconds of one, and a loss or None.

        The first run warms up.
        """
        ...

    def peak(self) -> tuple[float, float]:
        """Return the most memory used since the first run, in 1e9 bytes.

        These are `Measured.peak` and `.reserved`. Ends the loop.
        """
        ...


@dataclass
class Measured:
    """Time and memory of one implementation."""

    seconds: list[float] = field(default_factory=list)  # of a step, one number per round
    losses: list[float] = field(default_factory=list)  # one per round
    peak: float = 0.0  # 1e9 bytes: all tensors on a GPU; the resident process on a CPU
    reserved: float = 0.0  # 1e9 bytes: reserved by PyTorch on a GPU; on a CPU as `peak`


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return the ratios within each round, smallest first."""
    return sorted(a / b for a, b in zip(over, under, strict=True))


def interleave(
    loops: Mapping[str, Timed], rounds: int, steps: int, on_run: Callable[[str, float], None]
) -> dict[str, Measured]:
    """Run each loop for `steps` steps in `rounds` rounds, after a first round that does not count.

    on_run  called with a loop's name and its seconds of a step, after each run
    """
    found = {name: Measured() for name in loops}
    for number in range(rounds + 1):
        for name, loop in loops.items():
            seconds, loss = loop.run(steps)
            on_run(name, seconds)
            if number:
                found[name].seconds.append(seconds)
                found[name].losses += [] if loss is None else [loss]
    for name, loop in loops.items():
        found[name].peak, found[name].reserved = loop.peak()
    return found


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Return the seconds that a call took on the device, and its result.

    The time is taken between two CUDA events on a GPU, by the clock on a CPU.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, result
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


class InThisProcess:
    """A call that is timed in this process; implements `Timed`.

    Its memory is not measured, because others use the same process.
    """

    def __init__(self, call: Callable[[], Any], device: str) -> None:
        self.call, self.device = call, torch.device(device)

    def run(self, steps: int) -> tuple[float, None]:
        """Call it `steps` times; return the seconds of one call, and None."""

        def work() -> None:
            for _ in range(steps):
                self.call()

        return timed(work, self.device)[0] / steps, None

    def peak(self) -> tuple[float, float]:
        """Return zeros: the memory is not measured."""
        return 0.0, 0.0


class Worker:
    """A loop in a process of its own, so that its peak memory is measured alone.

    Implements `Timed`. Its methods raise ImpromptError if the loop fails.
    """

    def __init__(self, make: Callable[[Any], Loop], setting: Any) -> None:
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

    def run(self, steps: int) -> tuple[float, float | None]:
        """Take `steps` steps in the process; return the seconds of one, and a loss or None."""
        return self._ask(steps)

    def peak(self) -> tuple[float, float]:
        """End the process; return its peak memory, `Measured.peak` and `.reserved`."""
        found = self._ask(0)
        self._process.join()
        return found

    def _ask(self, steps: int) -> Any:
        try:
            self._pipe.send(steps)
            answer = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise ImpromptError(
                "a loop's process was killed, perhaps because it used too much memory"
            ) from error
        if isinstance(answer, ImpromptError):
            raise answer
        return answer


def serve(pipe: Any, make: Callable[[Any], Loop], setting: Any) -> None:
    """Run a loop in the worker's process: receive numbers of steps until a 0, send results."""
    device = torch.device(setting.device)
    try:
        steps, rounds = pipe.recv(), 0
        # made on the first request, so one at a time: making a loop takes the most memory
        loop = make(setting)
        while steps:
            seconds, loss = timed(lambda taken=steps: loop.run(taken), device)
            pipe.send((seconds / steps, loss))
            if not rounds:
                forget_peak(device)
            steps, rounds = pipe.recv(), rounds + 1
        pipe.send((peak_memory_gb(device), reserved_gb(device)))
    except Exception as error:  # any error is sent to the process that prints the table
        name = getattr(make, "func", make).__name__  # partial(...) has no name
        pipe.send(ImpromptError(f"{name}: {type(error).__name__}: {first_line(error)}"))


def reserved_gb(device: torch.device) -> float:
    """Return the most memory that PyTorch reserved on the GPU; on a CPU the peak."""
    return (
        torch.cuda.max_memory_reserved() / GB if device.type == "cuda" else peak_memory_gb(device)
    )


def forget_peak(device: torch.device) -> None:
    """Reset the peak memory, so that it is counted from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def memory_gb(device: torch.device) -> float:
    """Return the memory that this process uses now, counted as in `peak_memory_gb`."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / GB
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / GB


def measure(loops: Mapping[str, Callable[[Any], Loop]], setting: Any, rounds: int, steps: int,
            on_run: Callable[[str, float], None]) -> dict[str, Measured]:  # fmt: skip
    """Measure the loops at a setting, each in a process of its own."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(make, setting)) for name, make in loops.items()}
        return interleave(workers, rounds, steps, on_run)
