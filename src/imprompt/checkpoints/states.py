"""Training states on disk: folders that are complete or absent, and are also loadable adapters.

RUN/step-0001000/adapter.safetensors   the adapter to use: of the averaged weights if a moving
                                       average is kept
                 training.pt           what else a run needs to resume: optimizer, gradient scaler,
                                       weights not averaged
                 state.json            the step, the recipe, the held-out loss, and the SHA-256 of
                                       the other files
RUN/latest, RUN/best                   links to the newest state and to that of the lowest held-out
                                       loss, where the disk has links

The states alone say which is the newest and which the best: the links only serve other programs.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from imprompt.errors import CheckpointError, SettingError, first_line
from imprompt.files import sha256
from imprompt.untrusted import StoredTable, checked, parse_json, read_text

STATE_NAME = re.compile(r"step-(\d+)")
LATEST, BEST = "latest", "best"


class StateFacts(StoredTable):
    """Contents of a state's state.json.

    files  SHA-256 of every other file of the state, by name; states of older versions have none
    """

    model_config = ConfigDict(frozen=True)  # with StoredTable's

    step: Annotated[int, Field(ge=0)]
    recipe: dict[str, Any] = Field(default_factory=dict)
    samples: int | None = None
    held_out_loss: float | None = None
    files: dict[str, str] = Field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Held-out loss; infinity if none was measured or it was not a number."""
        loss = self.held_out_loss
        return math.inf if loss is None or math.isnan(loss) else loss


def read_facts(state: Path) -> StateFacts:
    """Read a state's state.json; raise CheckpointError if it is missing or damaged."""
    file = state / "state.json"
    try:
        held = checked(parse_json(read_text(file), lenient=True), StateFacts, "it")
    except SettingError as error:
        raise CheckpointError(f"{file} is damaged ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({first_line(error)})") from error
    facts = StateFacts(**held)
    named = STATE_NAME.fullmatch(state.name)
    if named and int(named[1]) != facts.step:
        raise CheckpointError(f"{file} is damaged (it states step {facts.step})")
    return facts


def check_state(state: Path) -> StateFacts:
    """Read a state's facts and all its files.

    Raise CheckpointError, which names the file, if one is not what was written.
    """
    facts = read_facts(state)
    for name, digest in facts.files.items():
        file = state / name
        try:
            if not file.is_file():
                raise CheckpointError(f"{file} is missing")
            if sha256(file) != digest:
                raise CheckpointError(f"{file} is damaged (another sha256)")
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({first_line(error)})") from error
    return facts


def states_of(run: Path) -> list[Path]:
    """Return the folders of a run's states, whole or damaged, oldest first.

    A folder in the place of a link, as copying without links leaves it, is a state too.
    """
    numbered = [
        (int(named[1]), path)
        for path in run.glob("step-*")
        if (named := STATE_NAME.fullmatch(path.name)) and path.is_dir()
    ]
    steps = {step for step, _ in numbered}
    for copy in filter(is_copy, (run / LATEST, run / BEST)):
        if (step := _step(copy)) not in steps:
            steps.add(step)
            numbered.append((step, copy))
    return [path for _, path in sorted(numbered)]


def is_copy(link: Path) -> bool:
    """Return whether a folder stands in the place of a link."""
    return link.is_dir() and not link.is_symlink()


def _step(state: Path) -> int:
    """Return a state's step; -1 if it is damaged, so that it is older than all others."""
    try:
        return read_facts(state).step
    except CheckpointError:
        return -1


def _is_whole(state: Path) -> bool:
    try:
        check_state(state)
    except CheckpointError:
        return False
    return True


def newest_state(run: Path) -> Path | None:
    """Return a run's newest whole state, or None if it has none."""
    return next(filter(_is_whole, reversed(states_of(run))), None)


def best_state(run: Path) -> Path | None:
    """Return a run's state of the lowest held-out loss; None if none was measured."""
    losses: dict[Path, float] = {}
    for state in states_of(run):
        try:
            losses[state] = read_facts(state).loss
        except CheckpointError:  # damaged: the next best takes its place
            continue
    best = min(losses, key=lambda state: losses[state], default=None)
    return best if best is not None and losses[best] < math.inf else None


def state_at(path: Path) -> Path:
    """Return the state that a path means, or the path itself if it means none.

    RUN is its newest state; so are RUN/latest and RUN/best where links were lost or the disk has
    none.
    """
    if path.is_dir():
        return path if not states_of(path) else newest_state(path) or path
    chosen = {LATEST: newest_state, BEST: best_state}.get(path.name)
    return (chosen(path.parent) if chosen and not path.is_file() else None) or path
