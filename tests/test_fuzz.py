"""Mutations of good inputs, by kind: read or refused in one line, in time and within memory.

The readers and mutations are in tests/fuzz_target.py; each runs in a process of its own with a
limit on its memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz_target import KINDS, MEMORY

ROOT = Path(__file__).parents[1]
FEW, MANY, SEED = 40, 2000, 1


def fuzzed(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Run the target in another process; return its figures, one row for each kind."""
    folders = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_target", kind, str(count), str(seed)],
        capture_output=True,
        text=True,
        timeout=600 + count,
        env=os.environ | {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        check=False,
    )
    assert not done.returncode, done.stderr[-2000:]
    print(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows: list[dict[str, Any]], count: int) -> None:
    assert not {row["kind"]: row["faults"] for row in rows if row["faults"]}
    assert all(row["read"] + row["refused"] == count for row in rows)
    assert all(row["peak_mb"] << 20 < 2 * MEMORY for row in rows)  # the libraries' own is the rest


def test_a_few_mutations_of_every_kind() -> None:
    rows = fuzzed("all", FEW, SEED)
    assert [row["kind"] for row in rows] == [*KINDS]
    assert all(row["refused"] for row in rows if row["kind"] != "metrics")
    check(rows, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutations(kind: str) -> None:
    check(fuzzed(kind, MANY, SEED + 1), MANY)
