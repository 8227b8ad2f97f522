"""Define what is evaluated: a user's plan, and the chunks into which the work is split."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from imprompt.evaluation.protocols import Protocol, Setting
from imprompt.generation.settings import ADAPTER, EncoderName, ModelName, PrecisionName, VariantName
from imprompt.validation import Flag, Validated

if TYPE_CHECKING:
    from imprompt.evaluation.sets import Item

CLIP, DINO = "openai/clip-vit-large-patch14", "facebook/dino-vits16"  # metric encoders by default


def unless_none(source: str) -> str | None:
    """Return a metric encoder's source from a flag; None for the word "none"."""
    return None if source == "none" else source


class Plan(Validated, frozen=True):
    """An evaluation as a user configures it.

    `protocol_name` names the protocol that `protocol` was before it was changed.
    """

    path: Path
    out: Path
    kind: Annotated[
        str, Field(description="What kind of set it is: auto, folder, coco or subjects.")
    ] = "auto"
    protocol_name: str = "default"
    protocol: Protocol = Protocol()
    sweep: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    model: ModelName = "emoji"
    adapter: Annotated[str | None, Field(description=ADAPTER)] = None
    encoder: EncoderName = None
    variant: VariantName = None
    clip: Annotated[
        str | None,
        Flag(read=unless_none),
        Field(description="The CLIP that measures: a folder or Hub id, or none."),
    ] = CLIP
    dino: Annotated[
        str | None,
        Flag(read=unless_none),
        Field(description="The DINO or DINOv2 that measures: a folder or Hub id, or none."),
    ] = DINO
    inception: Annotated[
        str | None,
        Field(description="TorchScript file of Inception, for FID and KID; else CLIP's features."),
    ] = None
    device: Annotated[
        str | None, Field(description="cuda, mps or cpu; the best there is if not given.")
    ] = None
    judge_device: Annotated[
        str | None,
        Field(description="Where the judges compute; where pictures are made if not given."),
    ] = None
    dtype: PrecisionName = None
    skip_bad: Annotated[bool, Field(description="Leave out what cannot be read, and count it.")] = (
        False
    )
    threads: Annotated[
        int | None,
        Field(
            ge=1,
            description="CPU threads of each process; another number changes results by rounding.",
        ),
    ] = None


@dataclass(frozen=True)
class Chunk:
    """Items of one setting that are made and measured together.

    `first` is the number of its first item in the set.
    """

    setting: Setting
    items: "Sequence[Item]"
    first: int
    stem: Path  # of the files with its rows and its embeddings

    @property
    def pictures(self) -> int:
        """Number of pictures in the chunk."""
        return len(self.items) * self.setting.protocol.seeds

    @property
    def rows(self) -> Path:
        """File of the chunk's rows."""
        return self.stem.with_suffix(".jsonl")

    @property
    def embeddings(self) -> Path:
        """File of the embeddings of its pictures and their targets."""
        return self.stem.with_suffix(".safetensors")

    @property
    def table(self) -> Path:
        """File of the hashes of its rows and its embeddings."""
        return self.stem.with_suffix(".json")


def chunks_of(plan: Plan, settings: Sequence[Setting], items: "Sequence[Item]") -> list[Chunk]:
    """Return all chunks, setting by setting."""
    size = max(1, plan.protocol.batch_size // plan.protocol.seeds)
    return [
        Chunk(
            setting,
            items[first : first + size],
            first,
            plan.out / "parts" / setting.name / f"{first // size:06}",
        )
        for setting in settings
        for first in range(0, len(items), size)
    ]
