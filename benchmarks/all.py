"""Run every benchmark that suits the device, each with a time limit, and then write the page.

    python -m benchmarks.all                              # this machine: what `make bench` runs
    python -m benchmarks.all --device cuda --out DIR      # a GPU machine, in about 10 minutes

Each benchmark writes its numbers as soon as it has them: if its limit ends it, they are kept.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import page
from benchmarks.record import RESULTS, about, note

# Question, limit in seconds, and its further options. The most important come first.
STAGES: dict[str, tuple[tuple[str, int, tuple[str, ...]], ...]] = {
    "cuda": (
        ("step", 170, ()),
        ("transformers", 120, ("--rounds", "3")),
        ("growth", 50, ()),
        ("memory", 110, ()),
        ("training", 80, ("--rounds", "3", "--steps", "5")),
        ("cold", 30, ("--rounds", "2")),
        ("profile", 30, ()),
    ),
    "cpu": (
        ("operators", 600, ()),
        ("cold", 900, ()),
        ("step", 3600, ()),
        ("growth", 1800, ()),
        ("memory", 3600, ()),
        ("training", 1800, ()),
        ("profile", 600, ()),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; return the number of those that failed or exceeded their limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all", description=about(__doc__))
    parser.add_argument(
        "--device", choices=STAGES, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help=f"folder for the numbers ({RESULTS.name}/)"
    )
    parser.add_argument("--only", nargs="+", metavar="QUESTION", help="run only these benchmarks")
    args = parser.parse_args(arguments)
    stages = [row for row in STAGES[args.device] if args.only is None or row[0] in args.only]
    failed = [
        question for question, limit, asked in stages if not stage(question, limit, asked, args)
    ]
    if args.out == RESULTS:
        page.main()
    if failed:
        print(f"not completed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def stage(question: str, limit: int, asked: Sequence[str], args: argparse.Namespace) -> bool:
    """Run one benchmark within its limit; return whether it finished without an error."""
    record = args.out / page.file_of(question, args.device)
    command = [sys.executable, "-m", f"benchmarks.{question}", "--device", args.device, *asked]
    if args.out != RESULTS:
        command += ["--record", str(record)]
    start = time.monotonic()
    try:
        code = subprocess.run(command, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        code = None
    outcome = {0: "done", None: f"cut off at its limit of {limit} s"}.get(
        code, f"failed with exit code {code}"
    )
    note(f"{question}: {outcome} after {time.monotonic() - start:.0f} s")
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
