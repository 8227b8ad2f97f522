"""What ends a training run before its last step, and how that is told.

A run's folder has one process that writes.
"""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import NoReturn

from filelock import FileLock, Timeout
from torch.distributed import DistError

from imprompt.errors import ImpromptError, SettingError, first_line
from imprompt.training.step import Diverged


class Terminated(BaseException):
    """SIGTERM came; no error that the step at hand could deal with."""


@contextmanager
def explained_termination(output: Path) -> Iterator[None]:
    """What ends a run before its last step, as an error that says how to go on.

    Launchers send SIGTERM to the processes that are left when one has ended, schedulers before they
    take the machine.
    """

    def end(*_: object) -> NoReturn:
        # the first is enough: what follows is told in peace
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, end) if current_thread() is main_thread() else None
    try:
        yield
    except Terminated as error:
        raise ImpromptError(f"{TERMINATED}. {resume_hint(output)}") from error
    except Diverged as error:
        raise ImpromptError(f"{error}. {resume_hint(output)}") from error
    except RuntimeError as error:
        if (what := end_of_another(error)) is None:
            raise
        raise ImpromptError(f"{what}. {resume_hint(output)}") from error
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def resume_hint(output: Path) -> str:
    """What there is to go on from."""
    latest = output / "latest"
    if not latest.exists():
        return "No state was saved yet; the same command starts again"
    return f"The last good state is {latest.resolve()}; the same command goes on from there"


TERMINATED = "this process was told to end (SIGTERM), as when another of its run has"
# How gloo, NCCL and the store that processes meet in say that the process at the other end is gone
# or silent.
LOST = re.compile(
    r"connection (was likely )?(closed|reset|refused)|broken pipe|remote "
    r"p(rocess|eer)|aborted|time(d |-)?out",
    re.I,
)


def end_of_another(error: RuntimeError) -> str | None:
    """Which process ended, if `error` says that one did.

    Gloo's errors have no type of their own, but name its source.
    """
    message = str(error)
    # without gloo's source and guesses
    why = re.sub(r"^\[\S+\] |\. This is typically .*|\. ?$", "", first_line(error))
    if message.startswith("DataLoader worker"):
        return (
            TERMINATED
            if "signal: Terminated" in message
            else f"a process that reads samples has ended ({why})"
        )
    distributed = isinstance(error, DistError) or "/gloo/transport/" in message
    return (
        f"another process of this run has ended ({why})"
        if distributed and LOST.search(message)
        else None
    )


def lock_output(output: Path) -> FileLock:
    """The sole right to write into a run's folder, which ends with this process at the latest."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(output / ".lock", blocking=False).acquire().lock
    except Timeout as error:
        raise SettingError(
            f"another process is training into {output}: wait for it, or give another output"
        ) from error
