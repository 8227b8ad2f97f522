"""Progress of a run: the numbers of logged steps in a file, in trackers and in the terminal."""

import json
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from PIL import Image

from imprompt.errors import ImpromptError, SettingError, first_line
from imprompt.files import atomic_write
from imprompt.training.recipe import Recipe
from imprompt.training.samples import BadSample
from imprompt.untrusted import MAX_SETTINGS, parse_json, read_bytes, read_text

if TYPE_CHECKING:
    from rich.console import Console

GB = 1e9
LISTED_BAD = 10  # bad samples that are printed in the terminal; all are counted


@dataclass(frozen=True)
class LogRow:
    """Numbers of a logged step.

    Losses are means over the steps since the previous row. Times are those of these steps.
    """

    step: int
    epoch: float
    loss: float  # what is minimised: weighted if the recipe sets weights
    plain_loss: float  # without weights
    grad_norm: float  # before clipping
    learning_rate: float
    samples_per_second: float  # over all processes
    step_seconds: float
    data_wait: float  # share of the time spent waiting for data
    peak_memory_gb: float  # since the start
    bad: int  # samples that could not be read, so far
    by_timestep: dict[str, float] = field(default_factory=dict)  # by bucket, such as "loss/100-199"

    def scalars(self) -> dict[str, float]:
        """Return the numbers by their names in trackers.

        These are "train/loss" and so on, and the losses by timestep.
        """
        own = {
            f"train/{name}": value
            for name, value in asdict(self).items()
            if name not in ("step", "by_timestep")
        }
        return own | self.by_timestep


class Metrics:
    """The file RUN/metrics.jsonl: a JSON object with its "step" per line.

    Only the main process writes it.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / "metrics.jsonl"

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a line; raise ImpromptError if it cannot be written.

        Numbers keep all their digits. Those that JSON does not know (NaN, infinity) become null.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(as_json(row), allow_nan=False) + "\n")
        except OSError as error:
            raise ImpromptError(f"cannot write {self.path}: {first_line(error)}") from error

    def read(self) -> list[dict[str, Any]]:
        """Return the complete rows, without a last line that a kill has cut off."""
        text = read_bytes(self.path).decode(errors="replace") if self.path.exists() else ""
        return [row for line in text.split("\n") if (row := whole(line)) is not None]

    def cut(self, step: int) -> None:
        """Keep the rows up to `step`; raise ImpromptError if the file cannot be written.

        The resumed run writes later rows again. One that starts, at step 0, keeps none.
        """
        if not self.path.exists():
            return
        kept = [json.dumps(row) + "\n" for row in self.read() if row["step"] <= step and step]
        try:
            with atomic_write(self.path) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")
        except OSError as error:
            raise ImpromptError(f"cannot write {self.path}: {first_line(error)}") from error


def as_json(value: Any) -> Any:
    """Convert a value to JSON types.

    Tensors and NumPy's numbers become floats, numbers that are not finite None.
    """
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if value is None or isinstance(value, (str, int)):
        return value
    return number if math.isfinite(number := float(value)) else None


def whole(line: str) -> dict[str, Any] | None:
    """Return the row on a line of metrics.jsonl, or None if the line is incomplete."""
    try:
        row = parse_json(line, lenient=True)
    except SettingError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


class Pace(NamedTuple):
    """Speed of an interval's steps; its names are those of `LogRow`."""

    samples_per_second: float
    step_seconds: float
    data_wait: float


class Clock:
    """Clock of wall times over whole logging intervals, so that it never has to wait for a GPU.

    `now` returns seconds. What runs in `paused()` (saving, validating) counts for no step.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._restart()

    def _restart(self) -> None:
        self._began, self._waited, self._paused = self._now(), 0.0, 0.0
        self._steps = self._samples = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        began = self._now()
        yield
        self._waited += self._now() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside from that of the steps."""
        began = self._now()
        yield
        self._paused += self._now() - began

    def step(self, samples: int) -> None:
        """Count a completed step over `samples` of all processes."""
        self._steps += 1
        self._samples += samples

    def lap(self) -> Pace:
        """Return the pace of the steps since the last lap, which must be one or more."""
        seconds = max(self._now() - self._began - self._paused, 1e-9)
        pace = Pace(self._samples / seconds, seconds / self._steps, self._waited / seconds)
        self._restart()
        return pace


def peak_memory_gb(device: torch.device) -> float:
    """Return the most memory that this process has held at once, in 1e9 bytes.

    It is PyTorch's on a CUDA device, else the resident set.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    import resource

    # bytes; getrusage counts in bytes on macOS, in KiB on Linux
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB


class Tracker(Protocol):
    """A page with curves and pictures; only the main process has one."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to the curve of every name."""
        ...

    def log_image(self, name: str, picture: Image.Image, step: int) -> None:
        """Add a picture under its name."""
        ...

    def close(self) -> None:
        """Write what is buffered and end the connection."""
        ...


class TensorBoard:
    """Event files in RUN/tensorboard.

    What an earlier part of the run wrote after step `start` is hidden there.
    """

    def __init__(self, recipe: Recipe, start: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(
            str(recipe.output / "tensorboard"), purge_step=start + 1 if start else 0
        )
        if not start:
            self._writer.add_text("recipe", f"```json\n{recipe.model_dump_json(indent=2)}\n```", 0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to the curve of every name, and flush the file."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # so that a kill loses nothing

    def log_image(self, name: str, picture: Image.Image, step: int) -> None:
        """Add an RGB picture under its name, and flush the file."""
        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, continued when training resumes.

    It ignores steps that it has already logged, so none is doubled.
    """

    def __init__(self, recipe: Recipe, start: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports] - an extra

        recipe.output.mkdir(parents=True, exist_ok=True)
        mark = recipe.output / "wandb-id"
        if not start or not mark.exists():
            mark.write_text(secrets.token_hex(8))
        self._image = wandb.Image
        self._run = wandb.init(
            project="imprompt",
            name=recipe.output.name,
            dir=str(recipe.output),
            id=read_text(mark, MAX_SETTINGS),
            resume="allow",
            config=recipe.model_dump(mode="json"),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send one point for the curve of every name."""
        self._run.log(dict(values), step=step)

    def log_image(self, name: str, picture: Image.Image, step: int) -> None:
        """Send a picture under its name."""
        self._run.log({name: self._image(picture)}, step=step)

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


# Name in recipes -> the tracker, and the extra that installs what it needs.
TRACKERS: dict[str, tuple[Callable[[Recipe, int], Tracker], str]] = {
    "tensorboard": (TensorBoard, "train"),
    "wandb": (WandB, "wandb"),
}


def open_trackers(recipe: Recipe, start: int, warn: Callable[[str], None]) -> list[Tracker]:
    """Open the recipe's trackers, for a run that resumes after step `start`.

    One that is not installed is left out with a warning.

    Raise SettingError if one cannot start, such as W&B without a login.
    """
    trackers = []
    for name in recipe.logging.to:
        make, extra = TRACKERS[name]
        try:
            trackers.append(make(recipe, start))
        except ImportError:
            warn(
                f"{name} is not installed, so nothing is logged to it; pip install "
                f"'imprompt[{extra}]' installs it"
            )
        except Exception as error:  # another library's error, of any type
            raise SettingError(
                f"{name} cannot be started ({first_line(error)}); fix that, or leave it out of "
                "logging.to"
            ) from error
    return trackers


class Watcher:
    """Receiver of a run's events; this one ignores them."""

    def encoded(self, done: int, total: int) -> None:
        """Receive how many samples' features are encoded, and how many there are."""

    def advanced(self, step: int) -> None:
        """Receive the number of steps done (on a GPU: queued)."""

    def stepped(self, row: LogRow) -> None:
        """Receive the numbers of a logged step."""

    def resumed(self, state: Path, step: int, steps: int, changed: Sequence[str]) -> None:
        """Receive the state that the run goes on from, and what the recipe changes since."""

    def saved(self, folder: Path) -> None:
        """Receive the folder of a saved state."""

    def validated(self, path: Path, scores: Mapping[str, float]) -> None:
        """Receive the path of a grid of pictures, and its scores."""

    def compared(self, losses: Mapping[str, float]) -> None:
        """Receive losses that belong together: see `imprompt.training.comparisons`."""

    def bad(self, sample: BadSample) -> None:
        """Receive a sample that could not be used."""

    def warned(self, line: str) -> None:
        """Receive a warning of one line."""


class ProgressWatcher(Watcher):
    """Progress in a terminal: a bar above a line of numbers.

    Plain lines where the output is not a terminal.

    >>> with ProgressWatcher(steps=1000) as watcher:
    ...     train(recipe, watcher)
    """

    def __init__(self, steps: int, console: "Console | None" = None) -> None:
        from rich.console import Console

        self.steps = steps
        self.console = console or Console()
        self._progress = bars(self.console)
        self._encoding = self._progress.add_task("encoding", total=None, visible=False)
        self._training = self._progress.add_task("training", total=steps, visible=False)
        self._tenths = self._bad = 0

    def __enter__(self) -> Self:
        if self.console.is_interactive:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_interactive:
            self._progress.stop()

    def encoded(self, done: int, total: int) -> None:
        """Update the encoding bar, or print a line at every tenth."""
        self._progress.update(self._encoding, completed=done, total=total, visible=done < total)
        tenths = 10 * done // total
        if not self.console.is_interactive and tenths > self._tenths:
            self._say(f"encoded {done} of {total}")
        self._tenths = tenths

    def advanced(self, step: int) -> None:
        """Update the training bar."""
        self._progress.update(self._training, completed=step, visible=True)

    def stepped(self, row: LogRow) -> None:
        """Update the numbers under the bar, or print them in a line."""
        self.advanced(row.step)
        self._progress.update(self._training, numbers=numbers(row, self.steps))
        if not self.console.is_interactive:
            self._say(f"step {row.step} of {self.steps}  {numbers(row, self.steps)}")

    def resumed(self, state: Path, step: int, steps: int, changed: Sequence[str]) -> None:
        """Print the step that the run goes on from, and every value that changed."""
        finished = " (finished: nothing is left to train)" if step >= steps else ""
        self._say(f"resumed at step {step:,} of {steps:,} from {state}{finished}")
        if changed:
            self._say(f"changed since: {', '.join(changed)}")

    def saved(self, folder: Path) -> None:
        """Print the folder of a saved state."""
        self._say(f"saved {folder}")

    def validated(self, path: Path, scores: Mapping[str, float]) -> None:
        """Print the path of the grid, and its scores."""
        self._say(
            "  ".join(
                [f"validated {path}", *(f"{name} {value:.4f}" for name, value in scores.items())]
            )
        )

    def compared(self, losses: Mapping[str, float]) -> None:
        """Print losses that belong together."""
        self._say("  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))

    def bad(self, sample: BadSample) -> None:
        """Print the first LISTED_BAD samples that could not be used."""
        self._bad += 1
        if self._bad <= LISTED_BAD:
            self._say(
                f"bad sample {sample}"
                + ("; further ones are only counted" if self._bad == LISTED_BAD else "")
            )

    def warned(self, line: str) -> None:
        """Print a warning."""
        self._say(f"warning: {line}")

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)


def bars(console: "Console") -> Any:
    """Return rich's progress, with the task's numbers on a separate line.

    They do not fit next to a bar.
    """
    from rich.console import RenderableType
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text

    class TwoLines(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table([task for task in self.tasks if task.visible])
            for task in self.tasks:
                if task.visible and "numbers" in task.fields:
                    yield Text(task.fields["numbers"], style="cyan")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    return TwoLines(*columns, console=console)


def numbers(row: LogRow, steps: int) -> str:
    """Format a row as one line for a person; the time left is that of the steps alone."""
    left = timedelta(seconds=round((steps - row.step) * row.step_seconds))
    seconds, rate = row.step_seconds, row.samples_per_second
    parts = [
        f"loss {row.loss:.4f}",
        f"{rate:,.0f} samples/s" if rate >= 10 else f"{rate:.2f} samples/s",
        f"{seconds:.2f} s/step" if seconds >= 1 else f"{1000 * seconds:.0f} ms/step",
        f"data wait {row.data_wait:.0%}",
        f"{row.peak_memory_gb:.1f} GB",
        f"{left} left",
    ]
    return "  ".join(parts + ([f"{row.bad} bad"] if row.bad else []))
