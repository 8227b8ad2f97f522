"""Settings: the sizes that all interleaved implementations are measured with."""

from dataclasses import dataclass

from benchmarks.random_models import RANDOM_MODELS, RandomModels


@dataclass(frozen=True)
class Setting:
    """Sizes that are measured: device, model, batch, pixels and precision."""

    device: str  # "cpu" or "cuda"
    model: str  # a key of RANDOM_MODELS
    batch: int  # samples a step, or images at once: with guidance the UNet sees twice as many
    pixels: int  # a side of the pictures
    precision: str  # "bf16", "fp16" or "fp32": of the frozen models, and of the paper's autocast

    @property
    def models(self) -> RandomModels:
        """The random models of this setting."""
        return RANDOM_MODELS[self.model]

    @property
    def side(self) -> int:
        """Latent pixels a side, h and w."""
        return self.pixels // self.models.base.unit


@dataclass(frozen=True)
class TrainingSetting(Setting):
    """A setting of a training loop."""

    checkpointing: bool = False  # gradient checkpointing in our loop; the paper's has none

    @property
    def samples(self) -> int:
        """Number of samples in a loop's data."""
        return 8 * self.batch


@dataclass(frozen=True)
class PromptedSetting(Setting):
    """A setting of pictures made from image prompts."""

    variant: str = "base"
    prompts: int = 1  # image prompts, each with its own attention
    pictures: int = 1  # in each prompt: the base variant makes 4 image tokens of each
