"""Early ends of a training run, reported as errors that say how to resume.

A run's folder has one process that writes.
"""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

from torch.distributed import DistError

from imprompt.checkpoints.states import newest_state
from imprompt.errors import ImpromptError, SettingError, Stopped, first_line
from imprompt.files import lock_folder
from imprompt.training.signals import SIGNALS, StopRequest, Terminated
from imprompt.training.step import Diverged

TERMINATED = "this process was told to end (SIGTERM), as when another process of its run has ended"
CAUSES: dict[int, str] = {
    signal.SIGINT: "this process was interrupted (Ctrl-C)",
    signal.SIGTERM: TERMINATED,
}


@contextmanager
def explained_termination(output: Path) -> Iterator[StopRequest]:
    """Turn what ends a run before its last step into an error that says how to resume.

    Launchers send SIGTERM to the remaining processes when one has ended; schedulers send it before
    they take the machine. Yield the request to stop, which a run may look at after every step.
    """
    request = StopRequest(said=not int(os.environ.get("RANK", "0")))
    main = current_thread() is main_thread()
    before = {each: signal.signal(each, request) for each in SIGNALS} if main else {}
    try:
        yield request
    except Terminated as error:
        raise stop_error(request.received, output) from error
    except Diverged as error:
        raise ImpromptError(f"{error}. {resume_hint(output)}") from error
    except RuntimeError as error:
        if (what := end_of_another(error)) is None:
            raise
        raise ImpromptError(f"{what}. {resume_hint(output)}") from error
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def stop_error(number: int, output: Path) -> Stopped:
    """Return the error of a run that a signal ended; 0: another process of it received one."""
    cause = CAUSES.get(number, "another process of this run was told to end")
    return Stopped(f"{cause}. {resume_hint(output)}", number or signal.SIGTERM)


def resume_hint(output: Path) -> str:
    """Return a sentence that names the state from which the run can resume."""
    if (state := newest_state(output)) is None:
        return "No state was saved yet; the same command starts again"
    return f"The last good state is {state.resolve()}; the same command goes on from there"


# messages of gloo, NCCL and the rendezvous store for a process that has ended or does not answer
LOST = re.compile(
    r"connection (was likely )?(closed|reset|refused)|broken pipe|remote "
    r"p(rocess|eer)|aborted|time(d |-)?out",
    re.I,
)


def end_of_another(error: RuntimeError) -> str | None:
    """Return which process ended, if `error` means that one did.

    Gloo's errors have no special type, but name their source file.
    """
    message = str(error)
    # without gloo's source file and guesses
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


@contextmanager
def locked_features(folder: Path, processes: Any) -> Iterator[None]:
    """Hold the sole right to fill a folder of features, for all processes of one launch together.

    processes  accelerate's Accelerator or PartialState

    Raise SettingError in all of them if another launch has it.
    """
    from accelerate.utils import gather_object

    lock, faults = None, []
    if processes.is_main_process:
        try:
            lock = lock_folder(folder, "encoding features into")
        except SettingError as error:
            faults.append(str(error))
    if faults := gather_object(faults):  # the others wait here until the lock is held
        raise SettingError(faults[0])
    try:
        yield
        processes.wait_for_everyone()
    finally:
        if lock is not None:
            lock.release()
