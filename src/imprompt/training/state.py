"""Writer and reader of a run's states: `imprompt.checkpoints.states` describes them."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from imprompt.checkpoints.states import (
    BEST,
    LATEST,
    StateFacts,
    best_state,
    check_state,
    is_copy,
    read_facts,
    states_of,
)
from imprompt.checkpoints.tensors import load_pickle
from imprompt.errors import CheckpointError, SettingError, first_line
from imprompt.files import flush, sha256
from imprompt.training.recipe import Recipe

# Keys of a recipe that a run keeps from first to last step; others may change when it resumes.
FIXED = (
    *(
        "model",
        "variant",
        "tokens",
        "depth",
        "encoder",
        "feature",
        "faces",
        "token_width",
        "qk_norm",
        "rank",
        "start",
        "seed",
    ),
    *(
        f"data.{key}"
        for key in ("source", "size", "buckets", "bucket_step", "max_aspect", "held_out")
    ),
    *(f"optimization.{key}" for key in ("batch_size", "optimizer", "ema")),
)
UNSAID = ("output",)  # keys whose change is no news: a run may be moved
Write = Callable[[Path], None]
Warn = Callable[[str], None]


@dataclass(frozen=True)
class State:
    """A state that was read.

    training  contents of training.pt
    changed   values of the recipe that differ from the state's, as "key = now (was before)"
    damaged   why newer states were passed over
    """

    folder: Path
    facts: StateFacts
    training: dict[str, Any]
    changed: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.facts.step


def save_state(
    run: Path,
    step: int,
    files: Mapping[str, Write],
    facts: dict[str, Any],
    keep: int,
    warn: Warn = lambda _line: None,
) -> Path:
    """Save a state as RUN/step-N, and return that folder.

    Write it to a temporary folder, flush it to disk, rename it, and link RUN/latest to it. Only
    then remove the oldest states. Raise CheckpointError if it cannot be written.

    warn  receives a line for every state that is damaged: it is left where it is
    """
    final, temporary = run / f"step-{step:07d}", run / f".step-{step:07d}.part"
    for torn in run.glob(".step-*.part"):  # left over by a killed process
        shutil.rmtree(torn, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, write in files.items():
            write(temporary / name)
        digests = {name: sha256(temporary / name) for name in files}
        (temporary / "state.json").write_text(
            json.dumps({"step": step, **facts, "files": digests}, indent=1)
        )
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        if final.exists():  # a damaged state, which the run passed over when it resumed
            _drop(final)
        temporary.rename(final)
        flush(run)
    except (OSError, RuntimeError) as error:  # RuntimeError: PyTorch's file writer
        raise CheckpointError(
            f"cannot write {final}: {first_line(error)}; the state before it is whole"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    best = link_states(run, step)
    whole = list(_readable(run, warn))
    for old in {*whole} - {final, best, *whole[-keep:]}:
        _drop(old)
    return final


def link_states(run: Path, step: int) -> Path | None:
    """Link RUN/latest to the state of that step and RUN/best to the best one; return the latter.

    A run that is resumed does it too, as a kill may come between a state and its links.
    """
    for copy in filter(is_copy, (run / LATEST, run / BEST)):
        _make_room(copy)
    best = best_state(run)
    if best is not None:
        _link(run / BEST, best)
    _link(run / LATEST, run / f"step-{step:07d}")
    return best


def _readable(run: Path, warn: Warn) -> Iterator[Path]:
    """Yield the states whose facts can be read, oldest first; warn of the others."""
    for state in states_of(run):
        try:
            read_facts(state)
        except CheckpointError as error:
            warn(f"{error}; the state is left as it is: remove {state} if you do not need it")
        else:
            yield state


def _make_room(copy: Path) -> None:
    """Give a state that was copied to the place of a link the name of a state.

    Remove it if it equals the state of that name; leave it under another name if it does not.
    """
    own = copy / "state.json"
    try:
        named = copy.with_name(f"step-{read_facts(copy).step:07d}")
    except CheckpointError:
        named = copy.with_name(f"{copy.name}-damaged")
    other = named / "state.json"
    if own.exists() and other.exists() and own.read_bytes() == other.read_bytes():
        _drop(copy)  # the hashes in these files are equal too
        return
    names = (named if n == 1 else named.with_name(f"{copy.name}-{n}") for n in count(1))
    copy.rename(next(name for name in names if not name.exists()))


def _drop(folder: Path) -> None:
    """Remove a state; if a kill interrupts it, what remains does not look like a state."""
    temporary = folder.with_name(f".{folder.name}.old.part")
    folder.rename(temporary)
    shutil.rmtree(temporary)


def _link(link: Path, folder: Path) -> None:
    """Link to a folder beside; on a disk without links, leave no link that leads elsewhere."""
    temporary = link.with_name(f".{link.name}.part")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(folder.name)
        temporary.replace(link)
    except OSError:
        link.unlink(missing_ok=True)
    flush(link.parent)


def load_state(run: Path, recipe: Recipe) -> State | None:
    """Read the newest whole state of a run; return None if there is none yet.

    Raise SettingError, naming the keys, if it was started with another recipe, or is finished and
    the recipe asks for something else; CheckpointError if all its states are damaged.
    """
    damaged: list[str] = []
    for folder in reversed(states_of(run)):
        try:
            facts, training = _read_state(folder)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        changed = changed_values(facts.recipe, recipe)
        _refuse(run, facts, changed, recipe)
        said = tuple(f"{key} = {now!r} (was {was!r})" for key, (was, now) in changed.items())
        return State(folder, facts, training, said, tuple(damaged))
    if damaged:
        raise CheckpointError(
            f"{run} holds no whole state: {'; '.join(damaged)}; remove its step-* folders to start "
            "again, or give another output"
        )
    return None


def _read_state(folder: Path) -> tuple[StateFacts, dict[str, Any]]:
    facts = check_state(folder)
    file = folder / "training.pt"
    try:
        return facts, load_pickle(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({first_line(error)})") from error


def changed_values(stored: Mapping[str, Any], recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the keys of a recipe whose values differ from stored ones, with (stored, now).

    A key that an older version did not know is not compared, except those that may not change.
    """
    before, now = dict(_leaves(stored)), dict(_leaves(recipe.model_dump(mode="json")))
    return {
        key: (before.get(key), value)
        for key, value in now.items()
        if key not in UNSAID and before.get(key) != value and (key in before or key in FIXED)
    }


def _leaves(group: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in group.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _refuse(
    run: Path, facts: StateFacts, changed: Mapping[str, tuple[Any, Any]], recipe: Recipe
) -> None:
    """Raise SettingError if a change cannot be made, or comes too late to have an effect."""
    fixed = [
        f"{key} = {was!r} (now {now!r})" for key, (was, now) in changed.items() if key in FIXED
    ]
    if fixed:
        raise SettingError(
            f"{run} was started with {', '.join(fixed)}: give another output, or the old values"
        )
    if changed and facts.step >= recipe.optimization.steps:
        said = ", ".join(f"{key} = {now!r} (was {was!r})" for key, (was, now) in changed.items())
        raise SettingError(
            f"{run} has taken its {facts.step:,} steps, so {said} has no effect: give "
            f"optimization.steps above {facts.step}, or another output with start = {str(run)!r}"
        )
