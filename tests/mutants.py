"""Put small faults into the code and count how many the tests notice: `python -m tests.mutants`.

A sample of cosmic-ray's mutants (another operator, another number, a negated condition, a loop that
is left early), the same for the same seed, each in a copy of the repository with the tests of its
room. The tests have to pass without a fault first. The diffs of faults that no test notices are
added to `runs/survivors.diff`.
"""

import argparse
import os
import random
import shlex
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_and_test, mutate_code
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
         "attention/low_rank.py", "attention/text_cache.py",
         "families/processor.py", "families/unet.py", "families/transformers.py"),
        ("test_families", "test_injection", "test_controls", "test_lora",
         "parity/test_diffusers_controls", "parity/test_diffusers_faces",
         "parity/test_diffusers", "test_adapter", "test_other_families", "test_faces"),
    ),
    "generation": Room(
        ("generation/combine.py", "generation/blocks.py", "generation/prepare.py",
         "generation/engine.py", "generation/pipeline.py", "generation/references.py",
         "generation/request.py", "generation/features.py", "attention/image_guidance.py"),
        ("test_blocks", "test_kept", "parity/test_diffusers_controls", "test_bad_input",
         "test_controls", "test_request", "test_face_files", "test_generate", "test_engine",
         "test_compose", "test_same_pixels"),
    ),
    "training": Room(
        ("training/batches.py", "training/objective.py", "training/step.py", "training/loop.py",
         "training/order.py", "training/state.py", "training/data_pipeline.py",
         "training/muon.py", "training/cache.py", "training/buckets.py"),
        ("test_order", "test_objective", "test_muon", "test_sources", "test_validation",
         "test_cache", "test_damaged", "test_training"),
    ),
    "checkpoints": Room(
        ("checkpoints/adapters.py", "checkpoints/layouts.py", "checkpoints/integrity.py",
         "checkpoints/tensors.py", "variants.py"),
        ("test_bad_input", "test_checkpoints", "test_embeddings", "test_face_files"),
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
    return list(islice(filter(compiles, chance.sample(found, len(found))), count))


def compiles(mutant: MutationSpec) -> bool:
    """Return whether a mutant is Python: `//` for the `*` of a signature is no fault to notice."""
    operator = get_operator(mutant.operator_name)()
    code = mutate_code(mutant.module_path.read_text(), operator, mutant.occurrence)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            compile(code, mutant.module_path, "exec")
        except SyntaxError:
            return False
    return True


def command(room: Room) -> list[str]:
    """Return the command that runs the room's tests up to the first that fails."""
    # With the settings of the repository: where a plugin is left out, tests fail without a fault.
    options = ("-q", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=no")
    return [sys.executable, "-m", "pytest", *options, *(f"tests/{name}.py" for name in room.tests)]


def survives(mutant: MutationSpec, room: Room) -> str | None:
    """Run the room's tests on a mutant; return its diff if they pass, None if they notice it."""
    result = mutate_and_test([mutant], shlex.join(command(room)), SECONDS)
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
        if subprocess.run(command(room)).returncode:
            sys.exit(f"{name}: the tests fail without a fault, so they cannot notice one")
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
