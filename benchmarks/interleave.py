"""Interleaving: what is compared runs in one run, A, B, C, A, B, C, …

Ratios are taken within a round.
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
    """What is measured in a process of its own; made from a setting, which names its `device`."""

    def run(self, steps: int) -> float | None:
        """Take so many steps; give a loss, where there is one."""
        ...


class Timed(Protocol):
    """What is measured, as `interleave` calls it."""

    def run(self, steps: int) -> tuple[float, float | None]:
        """Take so many steps; give the seconds of one, and a loss, where there is one.

        The first run warms up.
        """
        ...

    def peak(self) -> tuple[float, float]:
        """The most memory held since the first run in 1e9 bytes: `Measured.peak` and `.reserved`.

        It ends the loop.
        """
        ...


@dataclass
class Measured:
    """What one of those compared took."""

    seconds: list[float] = field(default_factory=list)  # of a step, one number per round
    losses: list[float] = field(default_factory=list)  # one per round
    peak: float = 0.0  # 1e9 bytes: all tensors on a GPU; the resident process on a CPU
    reserved: float = 0.0  # 1e9 bytes: what PyTorch held of the GPU; on a CPU as `peak`


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return the ratios within each round, smallest first."""
    return sorted(a / b for a, b in zip(over, under, strict=True))


def interleave(
    loops: Mapping[str, Timed], rounds: int, steps: int, on_run: Callable[[str, float], None]
) -> dict[str, Measured]:
    """Run each for `steps` steps, in `rounds` rounds after a first that does not count."""
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
    """Seconds that the work took on the device, between two CUDA events or by the clock, and what
    it gave.
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
    """A call in this process; see `Timed`. It knows nothing of its memory, which it shares."""

    def __init__(self, call: Callable[[], Any], device: str) -> None:
        self.call, self.device = call, torch.device(device)

    def run(self, steps: int) -> tuple[float, None]:
        def work() -> None:
            for _ in range(steps):
                self.call()

        return timed(work, self.device)[0] / steps, None

    def peak(self) -> tuple[float, float]:
        return 0.0, 0.0


class Worker:
    """A loop in a process of its own, so that its peak memory is its own; see `Timed`.

    ImpromptError if it fails.
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
        return self._ask(steps)

    def peak(self) -> tuple[float, float]:
        found = self._ask(0)
        self._process.join()
        return found

    def _ask(self, steps: int) -> Any:
        try:
            self._pipe.send(steps)
            answer = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise ImpromptError(
                "a loop's process was killed, perhaps for the memory it took"
            ) from error
        if isinstance(answer, ImpromptError):
            raise answer
        return answer


def serve(pipe: Any, make: Callable[[Any], Loop], setting: Any) -> None:
    """The worker's side: it is asked for steps until it is asked for none."""
    device = torch.device(setting.device)
    try:
        steps, rounds = pipe.recv(), 0
        # now, so that no two loops are made at a time: that takes more memory than to have them
        loop = make(setting)
        while steps:
            seconds, loss = timed(lambda taken=steps: loop.run(taken), device)
            pipe.send((seconds / steps, loss))
            if not rounds:
                forget_peak(device)
            steps, rounds = pipe.recv(), rounds + 1
        pipe.send((peak_memory_gb(device), reserved_gb(device)))
    except Exception as error:  # whatever it is, it is shown where the table is printed
        name = getattr(make, "func", make).__name__  # partial(...) has none
        pipe.send(ImpromptError(f"{name}: {type(error).__name__}: {first_line(error)}"))


def reserved_gb(device: torch.device) -> float:
    return (
        torch.cuda.max_memory_reserved() / GB if device.type == "cuda" else peak_memory_gb(device)
    )


def forget_peak(device: torch.device) -> None:
    """Count the peak anew from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def memory_gb(device: torch.device) -> float:
    """What this process holds now, counted as `peak_memory_gb` counts the most that it held."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / GB
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / GB


def measure(loops: Mapping[str, Callable[[Any], Loop]], setting: Any, rounds: int, steps: int,
            on_run: Callable[[str, float], None]) -> dict[str, Measured]:  # fmt: skip
    """The loops at that setting, each in a process of its own."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(make, setting)) for name, make in loops.items()}
        return interleave(workers, rounds, steps, on_run)
