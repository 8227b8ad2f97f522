"""A training state on disk: a folder that is whole or absent, and is also a loadable adapter."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from imprompt.errors import CheckpointError, first_line


def save_state(run: Path, step: int, write_adapter: Any, optimizer: torch.optim.Optimizer, keep: int) -> Path:
    """Write RUN/step-N beside, flush it to disk, rename it, point RUN/latest to it; only then drop the oldest states."""
    final, aside = run / f"step-{step:07d}", run / f".step-{step:07d}.part"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write_adapter(aside / "adapter.safetensors")
        torch.save(optimizer.state_dict(), aside / "optimizer.pt")
        (aside / "state.json").write_text(json.dumps({"step": step}))
        for path in (*aside.iterdir(), aside):
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's own writer
        raise CheckpointError(f"cannot write {final}: {first_line(error)}; the state before it is whole") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    pointer = run / ".latest.part"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(final.name)
    pointer.replace(run / "latest")
    _flush(run)
    for old in sorted(run.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def load_state(run: Path) -> tuple[int, Path, dict[str, Any]] | None:
    """(step, folder, optimizer state) of the latest state; None if there is none yet."""
    folder = run / "latest"
    if not folder.exists():
        return None
    try:
        step = json.loads((folder / "state.json").read_text())["step"]
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{folder} is damaged ({first_line(error)}); remove it and point latest to an older step") from error
    return step, folder, optimizer


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
