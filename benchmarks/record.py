"""Records: numbers with the machine, versions and command that they were measured with.

They are written to results/ as JSON, and read again for the pages.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.interleave import Measured, ratios
from benchmarks.random_models import DTYPES
from imprompt.cli.console import quiet
from imprompt.files import atomic_write

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Bar:
    """A limit that a measured number must meet."""

    what: str
    value: float
    bar: float
    most: bool = False  # whether the number must be at most the bar, not at least

    @property
    def met(self) -> bool:
        """Whether the number meets the bar."""
        return self.value <= self.bar if self.most else self.value >= self.bar

    def line(self) -> str:
        """Return a line that states the number, the bar and whether it is reached."""
        side = "at most" if self.most else "at least"
        return (
            f"{'reached' if self.met else 'MISSED'}: {self.what}: {self.value:.4g}, {side} "
            f"{self.bar:g} is required"
        )


@dataclass(frozen=True)
class Outcome:
    """The interleaved measurements of a setting's loops; `row()` is their form in JSON."""

    setting: Mapping[str, Any]  # a `Setting`'s fields, and others that identify it
    loops: dict[str, Measured]
    flops: float = 0.0  # of one whole sample or image
    ceiling: float = 0.0  # FLOP/s of a large matrix product

    def rate(self, name: str) -> float:
        """Return the samples or images a second in the median round."""
        return self.setting["batch"] / median(self.loops[name].seconds)

    def share(self, name: str) -> float:
        """Return the share of the ceiling that a loop reaches, for `flops` a sample."""
        return self.rate(name) * self.flops / self.ceiling

    def times(self, name: str, other: str) -> list[float]:
        """Return how many times faster `name` is than `other` in each round, smallest first."""
        return ratios(self.loops[other].seconds, self.loops[name].seconds)

    def row(self) -> dict[str, Any]:
        """Return the outcome as a row for JSON, without empty measurements."""
        loops = {
            name: {key: value for key, value in asdict(loop).items() if value}
            for name, loop in self.loops.items()
        }
        return {**asdict(self), "setting": dict(self.setting), "loops": loops}

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> "Outcome":
        """Read an outcome from its row."""
        loops = {name: Measured(**loop) for name, loop in row["loops"].items()}
        return cls(row["setting"], loops, row.get("flops", 0.0), row.get("ceiling", 0.0))


class Record:
    """The results of one command, written after each measurement.

    An interrupted run therefore keeps what was measured.
    """

    def __init__(
        self,
        question: str,
        arguments: Sequence[str] | None,
        device: str,
        path: Path | None,
        packages: Iterable[str] = PACKAGES,
    ) -> None:
        """Start a record of a command.

        path  where the record is written; None does not write it
        """
        command = sys.argv[1:] if arguments is None else arguments
        self.path = path
        self.rows: dict[str, Any] = {
            "command": " ".join([f"python -m benchmarks.{question}", *command]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(device),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in packages},
            "outcomes": [],
            "skipped": [],
            "bars": [],
        }

    def add(self, outcome: Mapping[str, Any], bars: Iterable[Bar] = ()) -> None:
        """Add an outcome's row and its bars, and write the record."""
        self.rows["outcomes"].append(dict(outcome))
        self.rows["bars"] += [asdict(bar) | {"met": bar.met} for bar in bars]
        self.write()

    def skip(self, what: str, why: str) -> None:
        """Add something that was not measured, with the reason, and write the record."""
        self.rows["skipped"].append({"what": what, "why": why})
        self.write()

    def write(self) -> None:
        """Write the record to its path, if it has one."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(self.rows, indent=1) + "\n")

    def show(self, section: str) -> None:
        """Print a section, and the path of the record."""
        print(section)
        if self.path is not None:
            print(f"written: {self.path}")


def about(doc: str | None) -> str:
    """Return the first paragraph of a module's docstring as one line."""
    return " ".join((doc or "").partition("\n\n")[0].split())


def options(question: str, doc: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{question}", description=about(doc)
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        help=f"measured rounds, after one to warm up ({rounds})",
    )
    parser.add_argument(
        "--record", type=Path, help=f"file for the numbers ({RESULTS.name}/{question}-DEVICE.json)"
    )
    parser.set_defaults(question=question)
    return parser


def parsed(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, narrows: Iterable[str] = ()
) -> argparse.Namespace:
    """Parse the options.

    A run that measures only a part is recorded only where --record names a file.

    narrows  names of the options that limit a run to a part
    """
    args = parser.parse_args(arguments)
    quiet()
    whole = all(getattr(args, name) == parser.get_default(name) for name in narrows)
    if args.record is None and whole:
        args.record = RESULTS / f"{args.question}-{args.device}.json"
    return args


def machine(device: str) -> dict[str, Any]:
    """Describe the machine: device, cores, threads, load and system."""
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # mean number of running processes in the last minute: others disturb a measurement
        "load": os.getloadavg()[0],
        "system": platform.platform(),
    }


def device_name(device: str) -> str:
    """Return the name of the GPU, or the number and model of the CPU's cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} cores of {next(names, platform.machine())}"


def matrix_rate(device: str, precision: str, side: int = 0, repeats: int = 10) -> float:
    """Measure the FLOP/s of a matrix product of side³, as the median of `repeats`.

    The default side is 8192 on a GPU and 2048 on a CPU.
    """
    side = side or (8192 if device == "cuda" else 2048)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    left, right = torch.randn(2, side, side, device=device).to(DTYPES[precision])
    seconds = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        torch.mm(left, right)
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / median(seconds[1:])


def note(*words: object) -> None:
    """Print a line with the time on standard error, as progress."""
    print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        f"| {' | '.join(line)} |" if line[0] != "---" else f"|{'|'.join(line)}|" for line in lines
    )


def join(*parts: str) -> str:
    """Join paragraphs and tables in Markdown, without the empty ones."""
    return "\n\n".join(part for part in parts if part)


def spread(values: Sequence[float], form: str) -> str:
    """Format the median, and the smallest and largest value; a dash if there is none."""
    return (
        f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})" if values else "-"
    )


def verdicts(rows: Mapping[str, Any]) -> str:
    """Write a record's bars as a list in Markdown."""
    bars = [
        Bar(**{key: value for key, value in bar.items() if key != "met"}) for bar in rows["bars"]
    ]
    return "\n".join(f"- {bar.line()}" for bar in bars)


def left_out(rows: Mapping[str, Any]) -> str:
    """Write what a record lists as not measured as a list in Markdown."""
    return "\n".join(
        f"- not measured: {row['what']}: {row['why']}" for row in rows.get("skipped", ())
    )
