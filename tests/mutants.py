"""Put small faults into the code and count how many the tests notice: `python -m tests.mutants`.

A sample of cosmic-ray's mutants (another operator, another number, a negated condition, a loop that
is left early), the same for the same seed, each in a copy of the repository with the tests of its
room. What no test notices is printed as a diff and kept in `runs/mutants/survivors.diff`.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.plugins import get_operator, operator_names
from cosmic_ray.work_item import MutationSpec, TestOutcome

ROOT = Path(__file__).parents[1]
PACKAGE = "src/imprompt"
COPY = ROOT / "runs" / "mutants"
SECONDS = 900  # a run of a room's tests that takes longer has noticed the fault


class Room(NamedTuple):
    """Code that is mutated, and the tests that are to notice: those of it, cheapest first."""

    code: tuple[str, ...]
    tests: tuple[str, ...]


ROOMS = {
    "attention": Room(
        ("adapter.py", "prompt.py", "attention/injection.py", "attention/conditioning.py",
         "attention/low_rank.py", "attention/text_cache.py", "attention/image_guidance.py",
         "families/processor.py", "families/unet.py", "families/transformers.py"),
        ("test_families", "test_adapter", "test_controls", "test_injection", "test_lora",
         "test_other_families", "test_faces", "parity/test_diffusers",
         "parity/test_diffusers_faces", "parity/test_diffusers_controls"),
    ),
    "generation": Room(
        ("generation/combine.py", "generation/blocks.py", "generation/prepare.py",
         "generation/engine.py", "generation/pipeline.py", "generation/references.py",
         "generation/request.py", "generation/features.py"),
        ("test_blocks", "test_controls", "test_request", "test_engine", "test_generate",
         "test_compose", "test_kept", "test_bad_input", "test_same_pixels"),
    ),
    "training": Room(
        ("training/batches.py", "training/objective.py", "training/step.py", "training/loop.py",
         "training/order.py", "training/state.py", "training/data_pipeline.py",
         "training/muon.py", "training/cache.py", "training/buckets.py"),
        ("test_order", "test_objective", "test_muon", "test_training", "test_cache",
         "test_damaged", "test_validation", "test_sources"),
    ),
    "checkpoints": Room(
        ("checkpoints/adapters.py", "checkpoints/layouts.py", "checkpoints/integrity.py",
         "checkpoints/tensors.py", "variants.py"),
        ("test_checkpoints", "test_face_files", "test_embeddings", "test_bad_input"),
    ),
}  # fmt: skip

# What changes no result: a type hint, a decorator, the name of a variable; and `1` for `0` in every
# index of a shape comment is a fault that Python itself reports, as good as killed.
LEFT_OUT = ("core/VariableInserter", "core/VariableReplacer", "core/RemoveDecorator",
            "core/ReplaceBinaryOperator_BitOr")  # fmt: skip


def mutants(paths: list[Path]) -> Iterator[MutationSpec]:
    """Yield every mutant of these files."""
    for path in paths:
        tree = get_ast_from_path(path)
        for name in operator_names():
            operator = get_operator(name)
            if operator.arguments() or name.startswith(LEFT_OUT):
                continue
            places = (at for node in ast_nodes(tree) for at in operator().mutation_positions(node))
            for occurrence, (start, end) in enumerate(places):
                yield MutationSpec(path, name, occurrence, start, end)


def one_a_place(found: list[MutationSpec], chance: random.Random) -> list[MutationSpec]:
    """Return one mutant of each place in the code, so that `+` is not drawn eleven times."""
    chance.shuffle(found)
    places = {(one.module_path, one.start_pos): one for one in found}
    return sorted(places.values(), key=lambda one: (one.module_path, one.start_pos))


def sample(room: Room, count: int, seed: int) -> list[MutationSpec]:
    """Return `count` mutants of a room, in the working directory; the same for the same seed."""
    chance = random.Random(seed)
    found = one_a_place(list(mutants([Path(PACKAGE, name) for name in room.code])), chance)
    return chance.sample(found, min(count, len(found)))


def survives(mutant: MutationSpec, room: Room) -> str | None:
    """Run the room's tests on a mutant; return its diff if they pass, None if they notice it."""
    tests = " ".join(f"tests/{name}.py" for name in room.tests)
    options = "-q -x -p no:cacheprovider -p no:warnings --no-header --tb=no"
    command = f"{sys.executable} -m pytest {options} {tests}"
    result = mutate_and_test([mutant], command, SECONDS)
    return result.diff if result.test_outcome == TestOutcome.SURVIVED else None


def copy_repository() -> None:
    """Put what git knows of this tree, as it is now, into the folder of mutants."""
    shutil.rmtree(COPY, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", ROOT, COPY], check=True)
    changed = subprocess.run(
        ["git", "diff", "HEAD", "--binary"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    if changed:
        subprocess.run(["git", "apply"], cwd=COPY, input=changed, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS))
    parser.add_argument("--count", type=int, default=25, help="mutants of a room")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    copy_repository()
    os.chdir(COPY)
    os.environ |= {"PYTHONPATH": f"{COPY / 'src'}{os.pathsep}{COPY}", "OMP_NUM_THREADS": "1"}
    killed: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    for name in args.rooms:
        room = ROOMS[name]
        for mutant in sample(room, args.count, args.seed):
            diff = survives(mutant, room)
            tried[name] += 1
            killed[name] += diff is None
            where = f"{mutant.module_path}:{mutant.start_pos[0]} {mutant.operator_name}"
            print("killed  " if diff is None else "SURVIVED", where, flush=True)
            if diff is not None:
                with (COPY.parent / "survivors.diff").open("a") as file:
                    file.write(diff + "\n")
        print(f"{name}: {killed[name]} of {tried[name]} noticed", flush=True)
    print(f"all: {killed.total()} of {tried.total()} = {killed.total() / tried.total():.0%}")


if __name__ == "__main__":
    main()
