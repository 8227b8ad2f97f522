"""Requests to save or stop between two steps: by signals, and by the time since the last state."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AFTER_STEP = b"imprompt: finishing this step, then saving; a second signal ends at once\n"


class Terminated(BaseException):
    """Arrival of a signal; a BaseException, so that the current step does not handle it."""


@dataclass
class StopRequest:
    """Signals that ask a run to end: the first after its step, the second at once.

    stepping  whether steps are taken, so that there is something to save; otherwise the first
              signal ends at once too
    received  number of the first signal, or 0
    said      whether this process says that it goes on until its step is done
    """

    stepping: bool = False
    received: int = 0
    said: bool = True

    def __call__(self, number: int, _frame: object) -> None:
        """Receive a signal; raise Terminated if it ends the run at once."""
        if self.stepping and not self.received:
            self.received = number
            if self.said:
                os.write(2, AFTER_STEP)
            return
        self.received = self.received or number
        for each in SIGNALS:  # ignore further signals, so that the error is reported
            signal.signal(each, signal.SIG_IGN)
        raise Terminated


def ignore_signals(_worker: int) -> None:
    """Leave it to a reading process's parent to end it.

    A terminal's Ctrl-C and a scheduler's SIGTERM go to a whole group of processes: this one leaves
    it. SIGTERM from its parent still ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


class Wish(IntEnum):
    """What a process wants done after a step; of several processes the greatest counts."""

    nothing = 0
    save = 1
    stop = 2


class Wishes:
    """Agreement of a run's processes on saving or stopping after a step.

    minutes  a state is wanted when the last one is so old; None: never for that
    ranks    number of processes; they agree on CPUs, so that no GPU is waited for
    now      returns seconds
    """

    def __init__(
        self, minutes: float | None, ranks: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.minutes, self.now = minutes, now
        self._group: Any = torch.distributed.new_group(backend="gloo") if ranks > 1 else None
        self.saved()

    def saved(self) -> None:
        """Count the minutes anew."""
        self._since = self.now()

    def after_step(self, request: StopRequest) -> Wish:
        """Return what one process or more want; every process calls it after every step."""
        due = self.minutes is not None and self.now() - self._since >= 60 * self.minutes
        own = Wish.stop if request.received else Wish.save if due else Wish.nothing
        if self._group is None:
            return own
        agreed = torch.tensor(int(own))
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, self._group)
        return Wish(int(agreed))
