"""Training states on disk: folders that are complete or absent, and are also loadable adapters.

RUN/step-0001000/adapter.safetensors   the adapter to use: of the averaged weights if a moving
                                       average is kept
                 training.pt           what else a run needs to resume: optimizer, gradient scaler,
                                       weights not averaged
                 state.json            the step, the recipe, the held-out loss
RUN/latest, RUN/best                   links to the newest state and to that of the lowest held-out
                                       loss
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from imprompt.checkpoints.tensors import load_pickle
from imprompt.errors import CheckpointError, ImpromptError, SettingError, first_line
from imprompt.files import flush
from imprompt.training.recipe import Recipe
from imprompt.untrusted import StoredTable, read_json

# Keys of a recipe that a run keeps from first to last step; others may change when it resumes.
FIXED = (
    *("model", "variant", "tokens", "depth", "encoder", "feature", "start", "seed"),
    *(
        f"data.{key}"
        for key in ("source", "size", "buckets", "bucket_step", "max_aspect", "held_out")
    ),
    *(f"optimization.{key}" for key in ("batch_size", "optimizer", "ema")),
)
Write = Callable[[Path], None]


class StateFacts(StoredTable):
    """Content of state.json that tells how good a state is."""

    step: Annotated[int, Field(ge=0)]
    held_out_loss: float | None = None


class WholeStateFacts(StateFacts):
    """Content of state.json that a run needs to resume."""

    recipe: dict[str, Any]


@dataclass(frozen=True)
class State:
    """A state that was read."""

    folder: Path
    facts: dict[str, Any]  # state.json
    training: dict[str, Any]  # training.pt

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.facts["step"]


def save_state(
    run: Path, step: int, files: Mapping[str, Write], facts: dict[str, Any], keep: int
) -> Path:
    """Save a state as RUN/step-N, and return that folder.

    Write it to a temporary folder, flush it to disk, rename it, and link RUN/latest to it. Only
    then remove the oldest states. Raise CheckpointError if it cannot be written.
    """
    final, temporary = run / f"step-{step:07d}", run / f".step-{step:07d}.part"
    for torn in run.glob(".step-*.part"):  # left over by a killed process
        shutil.rmtree(torn, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, write in files.items():
            write(temporary / name)
        (temporary / "state.json").write_text(json.dumps({"step": step, **facts}, indent=1))
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        if final.exists():  # left over by a run that stopped before it linked the state
            _drop(final)
        temporary.rename(final)
        flush(run)
    except (OSError, RuntimeError) as error:  # RuntimeError: PyTorch's file writer
        raise CheckpointError(
            f"cannot write {final}: {first_line(error)}; the state before it is whole"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if _better(facts.get("held_out_loss"), run / "best"):
        _point(run / "best", final)
    _point(run / "latest", final)
    kept = {final.resolve(), (run / "best").resolve()} | {
        path.resolve() for path in sorted(run.glob("step-*"))[-keep:]
    }
    for old in run.glob("step-*"):
        if old.resolve() not in kept:
            _drop(old)
    return final


def _drop(folder: Path) -> None:
    """Remove a state; if a kill interrupts it, what remains does not look like a state."""
    temporary = folder.with_name(f".{folder.name}.old.part")
    folder.rename(temporary)
    shutil.rmtree(temporary)


def load_state(run: Path, recipe: Recipe) -> State | None:
    """Read the latest state of a run; return None if there is none yet.

    Raise SettingError, naming the keys, if it was started with another recipe; CheckpointError if
    it is damaged.
    """
    folder = run / "latest"
    if not folder.exists():
        return None
    try:
        facts = read_json(folder / "state.json", WholeStateFacts, lenient=True)
        training, stored = load_pickle(folder / "training.pt"), facts["recipe"]
    except (OSError, ImpromptError) as error:
        raise CheckpointError(
            f"{folder} is damaged ({first_line(error)}); remove it and point latest to an older "
            "step"
        ) from error
    now = recipe.model_dump(mode="json")
    changed = [
        f"{key} = {_at(stored, key)!r} (now {_at(now, key)!r})"
        for key in FIXED
        if _at(stored, key) != _at(now, key)
    ]
    if changed:
        raise SettingError(
            f"{run} was started with {', '.join(changed)}: give another output, or the old values"
        )
    return State(folder, facts, training)


def _at(recipe: Mapping[str, Any], key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _better(loss: float | None, best: Path) -> bool:
    if loss is None or not best.exists():
        return loss is not None
    lowest = read_json(best / "state.json", StateFacts, lenient=True).get("held_out_loss")
    return lowest is None or loss < lowest


def _point(link: Path, folder: Path) -> None:
    temporary = link.with_name(f".{link.name}.part")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    temporary.replace(link)
    flush(link.parent)
