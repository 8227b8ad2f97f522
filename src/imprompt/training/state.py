"""A training state on disk: a folder that is whole or absent, and is also a loadable adapter.

RUN/step-0001000/adapter.safetensors   the adapter to use: of the averaged weights where a moving
                                       average is kept
                 training.pt           what else a run needs to go on: optimizer, gradient scaler,
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
from typing import Any

import torch

from imprompt.errors import CheckpointError, SettingError, first_line
from imprompt.files import flush
from imprompt.training.recipe import Recipe

# What a run keeps from its first step to its last; everything else of a recipe may change when it
# is resumed.
FIXED = (
    *("model", "variant", "tokens", "depth", "encoder", "feature", "start", "seed"),
    *(
        f"data.{key}"
        for key in ("source", "size", "buckets", "bucket_step", "max_aspect", "held_out")
    ),
    *(f"optimization.{key}" for key in ("batch_size", "optimizer", "ema")),
)
Write = Callable[[Path], None]


@dataclass(frozen=True)
class State:
    """A state that was read."""

    folder: Path
    facts: dict[str, Any]  # state.json
    training: dict[str, Any]  # training.pt

    @property
    def step(self) -> int:
        return self.facts["step"]


def save_state(
    run: Path, step: int, files: Mapping[str, Write], facts: dict[str, Any], keep: int
) -> Path:
    """Write RUN/step-N beside, flush it to disk, rename it, point RUN/latest to it.

    Only then drop the oldest states.
    """
    final, temporary = run / f"step-{step:07d}", run / f".step-{step:07d}.part"
    for torn in run.glob(".step-*.part"):  # of a process that was killed
        shutil.rmtree(torn, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, write in files.items():
            write(temporary / name)
        (temporary / "state.json").write_text(json.dumps({"step": step, **facts}, indent=1))
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        if final.exists():  # of a run that was stopped before it could point to it
            _drop(final)
        temporary.rename(final)
        flush(run)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's own writer
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
    """Remove a state; what a kill leaves of it does not look like one."""
    temporary = folder.with_name(f".{folder.name}.old.part")
    folder.rename(temporary)
    shutil.rmtree(temporary)


def load_state(run: Path, recipe: Recipe) -> State | None:
    """The latest state of a run; None if there is none yet.

    SettingError, naming the keys, if another recipe began it.
    """
    folder = run / "latest"
    if not folder.exists():
        return None
    try:
        facts = json.loads((folder / "state.json").read_text())
        training = torch.load(folder / "training.pt", weights_only=True, map_location="cpu")
        stored = facts["recipe"]
    except Exception as error:  # a damaged pickle raises nearly anything
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
            f"{run} was begun with {', '.join(changed)}: give another output, or the old values"
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
    return loss < json.loads((best / "state.json").read_text())["held_out_loss"]


def _point(link: Path, folder: Path) -> None:
    temporary = link.with_name(f".{link.name}.part")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    temporary.replace(link)
    flush(link.parent)
