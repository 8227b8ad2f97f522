"""Numbers with what they were measured on, by what command: written to results/ as JSON, and read
again for the pages.
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
    """What a number must reach."""

    what: str
    value: float
    bar: float
    most: bool = False  # the number is to be at most the bar, not at least

    @property
    def met(self) -> bool:
        return self.value <= self.bar if self.most else self.value >= self.bar

    def line(self) -> str:
        side = "at most" if self.most else "at least"
        return (
            f"{'reached' if self.met else 'MISSED'}: {self.what}: {self.value:.4g}, {side} "
            f"{self.bar:g} is asked"
        )


@dataclass(frozen=True)
class Outcome:
    """A setting's loops, measured interleaved. As JSON it is `row()`."""

    setting: Mapping[str, Any]  # a `Setting`'s fields, and what else tells it from others
    loops: dict[str, Measured]
    flops: float = 0.0  # of a sample or an image, as a whole
    ceiling: float = 0.0  # FLOP/s of a large matrix product

    def rate(self, name: str) -> float:
        """Samples or images a second in the median round."""
        return self.setting["batch"] / median(self.loops[name].seconds)

    def share(self, name: str) -> float:
        """Of the ceiling that its own arithmetic reaches."""
        return self.rate(name) * self.flops / self.ceiling

    def times(self, name: str, other: str) -> list[float]:
        """How many times faster than the other, one number per round, smallest first."""
        return ratios(self.loops[other].seconds, self.loops[name].seconds)

    def row(self) -> dict[str, Any]:
        loops = {
            name: {key: value for key, value in asdict(loop).items() if value}
            for name, loop in self.loops.items()
        }
        return {**asdict(self), "setting": dict(self.setting), "loops": loops}

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> "Outcome":
        loops = {name: Measured(**loop) for name, loop in row["loops"].items()}
        return cls(row["setting"], loops, row.get("flops", 0.0), row.get("ceiling", 0.0))


class Record:
    """What one command found, written again whenever there is more: who cuts it off keeps what was
    measured.
    """

    def __init__(
        self,
        question: str,
        arguments: Sequence[str] | None,
        device: str,
        path: Path | None,
        packages: Iterable[str] = PACKAGES,
    ) -> None:
        """`path`: where it is written; None keeps it."""
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
        self.rows["outcomes"].append(dict(outcome))
        self.rows["bars"] += [asdict(bar) | {"met": bar.met} for bar in bars]
        self.write()

    def skip(self, what: str, why: str) -> None:
        """Something that was not measured, and the reason."""
        self.rows["skipped"].append({"what": what, "why": why})
        self.write()

    def write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(self.rows, indent=1) + "\n")

    def show(self, section: str) -> None:
        """Print the tables, what the bars say, and where it all is."""
        print(section)
        if self.path is not None:
            print(f"written: {self.path}")


def about(doc: str | None) -> str:
    """Return the first paragraph of a module's docstring as one line."""
    return " ".join((doc or "").partition("\n\n")[0].split())


def options(question: str, doc: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{question}", description=about(doc)
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds that count ({rounds})")
    parser.add_argument(
        "--record", type=Path, help=f"where the numbers go ({RESULTS.name}/{question}-DEVICE.json)"
    )
    parser.set_defaults(question=question)
    return parser


def parsed(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, narrows: Iterable[str] = ()
) -> argparse.Namespace:
    """The options. A run that asks for less than all (`narrows`: options that do) is recorded only
    where --record says.
    """
    args = parser.parse_args(arguments)
    quiet()
    whole = all(getattr(args, name) == parser.get_default(name) for name in narrows)
    if args.record is None and whole:
        args.record = RESULTS / f"{args.question}-{args.device}.json"
    return args


def machine(device: str) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # processes running in the minute before: beside others, a measurement is worth little
        "load": os.getloadavg()[0],
        "system": platform.platform(),
    }


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} cores of {next(names, platform.machine())}"


def matrix_rate(device: str, precision: str, side: int = 0, repeats: int = 10) -> float:
    """FLOP/s of a matrix product of side³, 8192³ on a GPU and 2048³ on a CPU if not given.

    The median of `repeats`.
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
    """A line on standard error while it runs."""
    print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        f"| {' | '.join(line)} |" if line[0] != "---" else f"|{'|'.join(line)}|" for line in lines
    )


def join(*parts: str) -> str:
    """Paragraphs and tables in markdown, less the empty ones."""
    return "\n\n".join(part for part in parts if part)


def spread(values: Sequence[float], form: str) -> str:
    """The median, and the smallest and largest."""
    return (
        f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})" if values else "-"
    )


def verdicts(rows: Mapping[str, Any]) -> str:
    """What the bars of a record say, a list in markdown."""
    bars = [
        Bar(**{key: value for key, value in bar.items() if key != "met"}) for bar in rows["bars"]
    ]
    return "\n".join(f"- {bar.line()}" for bar in bars)


def left_out(rows: Mapping[str, Any]) -> str:
    """What a record says was not measured, a list in markdown."""
    return "\n".join(
        f"- not measured: {row['what']}: {row['why']}" for row in rows.get("skipped", ())
    )
