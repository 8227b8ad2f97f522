"""Time from a new process to its first picture: `imprompt generate` and a script of diffusers.

    python -m benchmarks.cold

Every number is of a whole process, start and end included. The files that it reads are in the
system's cache: the first round, which does not count, has read them.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.interleave import interleave
from benchmarks.record import (
    Bar,
    Outcome,
    Record,
    join,
    note,
    options,
    parsed,
    spread,
    table,
    verdicts,
)
from imprompt.checkpoints.adapters import read_adapter, write_adapter
from imprompt.cli import demo
from imprompt.errors import ImpromptError
from imprompt.models import PACKAGED

TITLE = "From a cold process to the first picture"
PICTURE = PACKAGED / "emoji" / "demo.png"
GENERATE, DEMO, HELP = "imprompt generate", "imprompt demo", "imprompt --help"
SCRIPT = "a script of diffusers"
BARS = {DEMO: 10.0, HELP: 0.3}  # seconds


class Process:
    """A command that is timed as a process of its own; implements `benchmarks.interleave.Timed`."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = command

    def run(self, steps: int) -> tuple[float, None]:
        """Run the command `steps` times; return the seconds of one run, and None.

        Raises ImpromptError if the command fails.
        """
        start = time.perf_counter()
        for _ in range(steps):
            done = subprocess.run(self.command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ImpromptError(
                    f"{' '.join(self.command)} failed: {done.stderr.strip()[-500:]}"
                )
        return (time.perf_counter() - start) / steps, None

    def peak(self) -> tuple[float, float]:
        """Return zeros: the memory is not measured."""
        return 0.0, 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, record and print; return the exit code, 1 if a command fails."""
    args = parsed(options("cold", __doc__), arguments)
    record = Record("cold", arguments, args.device, args.record)
    try:
        for found in run(args):
            record.add(found.row(), bars_of(found))
    except ImpromptError as error:
        print(error, file=sys.stderr)
        return 1
    record.show(section(record.rows))
    return 0


def run(args: argparse.Namespace) -> Iterator[Outcome]:
    """Measure the commands of each task."""
    with tempfile.TemporaryDirectory() as folder:
        for what, batch, commands in compared(Path(folder), args.device):
            timed = {name: Process(command) for name, command in commands.items()}
            loops = interleave(
                timed, args.rounds, 1, lambda name, seconds: note(f"{name}: {seconds:.2f} s")
            )
            yield Outcome(
                {"device": args.device, "model": "emoji", "what": what, "batch": batch}, loops
            )


def compared(folder: Path, device: str) -> Iterator[tuple[str, int, dict[str, list[str]]]]:
    """Yield each task, the number of its pictures, and the commands that do it, by name."""
    adapter, out = folder / "emoji.safetensors", folder / "out.png"
    write_adapter(
        adapter, read_adapter(PACKAGED / "emoji" / "adapters" / "base.safetensors"), layout="paper"
    )
    imprompt = [sys.executable, "-m", "imprompt"]
    theirs = [
        sys.executable,
        "-m",
        "benchmarks.cold_diffusers",
        str(adapter),
        str(PICTURE),
        str(out),
        device,
    ]
    generate = [
        *imprompt,
        "generate",
        str(PICTURE),
        "--seed",
        "7",
        "--out",
        str(out),
        "--device",
        device,
    ]
    yield "the first picture", 1, {SCRIPT: theirs, GENERATE: generate}
    yield (
        "the demo",
        demo.RESULTS * len(demo.LABELS),
        {DEMO: [*imprompt, "demo", "--out", str(folder / "demo")]},
    )
    yield "the help page", 1, {HELP: [*imprompt, "--help"]}


def bars_of(found: Outcome) -> list[Bar]:
    """Return the bars of the commands that have one."""
    bars = {name: BARS[name] for name in found.loops if name in BARS}
    return [
        Bar(f"seconds, {name}", median(found.loops[name].seconds), bar, most=True)
        for name, bar in bars.items()
    ]


def section(rows: Mapping[str, Any]) -> str:
    """Return a record's tables in Markdown."""
    lines = []
    for found in map(Outcome.read, rows["outcomes"]):
        for name, loop in found.loops.items():
            times = spread(found.times(name, SCRIPT), ".2f") if SCRIPT in found.loops else "-"
            lines.append((found.setting["what"], name, spread(loop.seconds, ".2f"), times))
    return join(table(("what", "by", "s (range)", f"× {SCRIPT}"), lines), verdicts(rows))


if __name__ == "__main__":
    sys.exit(main())
