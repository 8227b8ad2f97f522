"""Write docs/reports/benchmarks.md from results/*.json: `python -m benchmarks.page`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import cold, growth, memory, operators, profile, step, training, transformers
from benchmarks.record import RESULTS, about, join

PAGE = Path(__file__).parents[1] / "docs" / "reports" / "benchmarks.md"
QUESTIONS: dict[str, ModuleType] = {
    "operators": operators,
    "step": step,
    "memory": memory,
    "cold": cold,
    "growth": growth,
    "training": training,
    "profile": profile,
    "transformers": transformers,
}
# operators are the same on every device, and transformers are too large for a CPU
ONLY = {"operators": "cpu", "transformers": "cuda"}
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
HEAD = """# Benchmarks

Made from `benchmarks/results/*.json` by `python -m benchmarks.page`; `make bench` measures anew
what this machine can. How each is measured: [benchmarks/README.md](../../benchmarks/README.md).

All models have the published sizes or, where it says *narrow*, as many layers at a tenth of the
width, and random weights: speed and memory depend on nothing else. What is compared runs in one
run, interleaved (A, B, C, A, B, C, …), with the same weights. Numbers are medians with
the smallest and largest; ratios (×, above 1 is faster) are taken within a round."""


def main() -> int:
    """Write the page; return the exit code 0."""
    PAGE.write_text(made(RESULTS))
    print(f"written: {PAGE}")
    return 0


def made(results: Path) -> str:
    """Return the whole page in Markdown."""
    return join(HEAD, *(chapter(question, results) for question in QUESTIONS)) + "\n"


def file_of(question: str, device: str) -> str:
    """Return the name of a question's record for a device."""
    return f"{question}-{device}.json"


def chapter(question: str, results: Path) -> str:
    """Return a question's tables for every device, or the command that measures them."""
    module = QUESTIONS[question]
    parts = [f"## {module.TITLE}", about(module.__doc__)]
    for device, name in DEVICES.items():
        path = results / file_of(question, device)
        if path.exists():
            rows = json.loads(path.read_text())
            parts += [origin(rows), module.section(rows)]
        elif ONLY.get(question, device) == device:
            parts.append(
                f"{name}: not measured yet; run `python -m benchmarks.{question} --device "
                f"{device}`."
            )
    return join(*parts)


def origin(rows: Mapping[str, Any]) -> str:
    """Return a line that states where, when and how a record was measured."""
    machine = rows["machine"]
    where = f"threads: {machine['threads']}, load before {machine['load']:.1f}"
    versions = ", ".join(f"{name} {version}" for name, version in rows["versions"].items())
    return f"**{machine['device']}**, {where}; {versions}; {rows['date'][:10]}; `{rows['command']}`"


if __name__ == "__main__":
    sys.exit(main())
