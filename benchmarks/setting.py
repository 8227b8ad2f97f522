"""What is measured: one setting for all that are interleaved."""

from dataclasses import dataclass

from benchmarks.random_models import RANDOM_MODELS, RandomModels


@dataclass(frozen=True)
class Setting:
    device: str  # "cpu" or "cuda"
    model: str  # a name in RANDOM_MODELS
    batch: int  # samples a step, or images at once: with guidance the UNet sees twice as many
    pixels: int  # a side of the pictures
    precision: str  # "bf16", "fp16" or "fp32": of the frozen models, and of the paper's autocast

    @property
    def models(self) -> RandomModels:
        return RANDOM_MODELS[self.model]

    @property
    def side(self) -> int:
        """h and w of the latents."""
        return self.pixels // self.models.base.unit


@dataclass(frozen=True)
class TrainingSetting(Setting):
    checkpointing: bool = False  # of our loop; the paper's has none

    @property
    def samples(self) -> int:
        """In a loop's data."""
        return 8 * self.batch


@dataclass(frozen=True)
class PromptedSetting(Setting):
    """Pictures made from image prompts."""

    variant: str = "base"
    prompts: int = 1  # image prompts, each applied by an attention of its own
    pictures: int = 1  # in each prompt: the base variant makes 4 image tokens of each
