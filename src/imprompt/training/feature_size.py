"""Size of encoded features: stated before they are written, and kept to a budget."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from imprompt.errors import SettingError
from imprompt.training.recipe import Data

GB = 1e9
PER_LATENT = 2 * 2  # bytes of a latent's mean and spread, in float16
LATENTS = "latents"


class FeatureSize(NamedTuple):
    """Bytes of one sample's features by part, with their precisions, and the number of samples.

    Headers and the tar's padding are not counted: some 2 kB a sample. Masked rows of a text are not
    stored, so that it takes less than stated; every further reference of a sample takes more.
    """

    parts: Mapping[str, tuple[int, str]]
    samples: int
    masked: bool

    @property
    def each(self) -> int:
        """Bytes of a sample with one reference, whose text has no masked rows."""
        return sum(size for size, _ in self.parts.values())

    @property
    def least(self) -> int:
        """Bytes that all samples take at least."""
        text = self.parts["text"][0] if self.masked else 0
        return (self.each - text) * self.samples

    def __str__(self) -> str:
        most = "up to " if self.masked else ""
        parts = ", ".join(
            f"{name} {in_bytes(size)} {dtype}" for name, (size, dtype) in self.parts.items()
        )
        return (
            f"{self.samples:,} samples of {most}{in_bytes(self.each)} ({parts}), "
            f"{most}{in_bytes(self.each * self.samples)} in all"
        )


def in_bytes(size: float) -> str:
    """Format a number of bytes in kB, MB or GB."""
    for unit, name in ((GB, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size / 1e3:.1f} kB"


def feature_size(plan: Mapping[str, Any], nulls: Mapping[str, Tensor], data: Data) -> FeatureSize:
    """Return the size of the features of a plan.

    nulls  stored features that replace dropped ones, (1, …): they have the shapes of all
    """
    places = max(wide * high for wide, high in plan["identity"]["buckets"]) // plan["unit"] ** 2
    latents = places * plan["channels"] * PER_LATENT * (1 + data.flip)
    parts = {LATENTS: (latents, "float16")}
    for name, null in nulls.items():
        parts[name] = null[0].nbytes, str(null.dtype).removeprefix("torch.")
    if data.columns.mask:
        parts["mask"] = places, "uint8"
    return FeatureSize(parts, plan["samples"], "text_mask" in nulls)


def check_budget(folder: Path, size: float, budget: float | None) -> None:
    """Raise SettingError if the features would take more bytes than the budget, in GB."""
    if budget is not None and size > budget * GB:
        raise SettingError(
            f"{folder} would hold {in_bytes(size)} of features, more than data.features_gb = "
            f"{budget:g}: allow more, or train without data.features"
        )
