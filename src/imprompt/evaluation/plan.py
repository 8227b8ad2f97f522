"""What is evaluated: a plan as a user gives it, and the chunks that its work is taken in."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from imprompt.checked import Checked
from imprompt.evaluation.judges import CLIP, DINO
from imprompt.evaluation.protocols import Protocol, Setting
from imprompt.evaluation.sets import Item
from imprompt.sampling.settings import Precision


class Plan(Checked, frozen=True):
    """An evaluation as a user asks for it.

    protocol_name   what `protocol` was before values were changed
    clip, dino      folders or Hub ids of the judges; None: none
    inception       a TorchScript file, whose features FID and KID then take in place of CLIP's
    judge_device    where they compute; where the pictures are made if not given
    skip_bad        leave out the items whose pictures cannot be used
    threads         of each process on a CPU; as many as torch takes if not given. Another number changes results by rounding
    """

    path: Path
    out: Path
    kind: str = "auto"
    protocol_name: str = "default"
    protocol: Protocol = Protocol()
    sweep: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    model: str = "emoji"
    adapter: str | None = None
    encoder: str | None = None
    variant: str | None = None
    clip: str | None = CLIP
    dino: str | None = DINO
    inception: str | None = None
    device: str | None = None
    judge_device: str | None = None
    dtype: Precision | None = None
    skip_bad: bool = False
    threads: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True)
class Chunk:
    """Items of one setting that are made and measured together; `first` is the number of the first in the set."""

    setting: Setting
    items: Sequence[Item]
    first: int
    stem: Path  # of the files with its rows and its embeddings

    @property
    def pictures(self) -> int:
        return len(self.items) * self.setting.protocol.seeds

    @property
    def rows(self) -> Path:
        return self.stem.with_suffix(".jsonl")

    @property
    def embeddings(self) -> Path:
        return self.stem.with_suffix(".safetensors")


def chunks_of(plan: Plan, settings: Sequence[Setting], items: Sequence[Item]) -> list[Chunk]:
    """All chunks, setting by setting."""
    size = max(1, plan.protocol.batch_size // plan.protocol.seeds)
    return [
        Chunk(setting, items[first : first + size], first, plan.out / "parts" / setting.name / f"{first // size:06}")
        for setting in settings
        for first in range(0, len(items), size)
    ]
