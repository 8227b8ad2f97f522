"""What is measured: one setting for all loops."""

from dataclasses import dataclass

from benchmarks.stand_ins import STAND_INS, StandIn


@dataclass(frozen=True)
class Setting:
    device: str  # "cpu" or "cuda"
    model: str  # a name in STAND_INS
    batch: int  # samples a step
    pixels: int  # a side of the training pictures
    precision: str  # "bf16", "fp16" or "fp32": of the frozen models, and of the paper's autocast
    checkpointing: bool = False  # of our loop; the paper's has none

    @property
    def stand_in(self) -> StandIn:
        return STAND_INS[self.model]

    @property
    def samples(self) -> int:
        """In a loop's data."""
        return 8 * self.batch

    @property
    def side(self) -> int:
        """h and w of the latents."""
        return self.pixels // self.stand_in.base.unit
