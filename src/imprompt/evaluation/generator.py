"""Load the model that makes an evaluation's pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import nn

from imprompt.encoders.feature_cache import FeatureMemory
from imprompt.evaluation.metric_encoders import describe_preprocessing, weights_hash
from imprompt.evaluation.plan import Plan
from imprompt.evaluation.protocols import Setting
from imprompt.evaluation.sets import Item
from imprompt.families.base import base_of
from imprompt.generation.blocks import block_map
from imprompt.generation.pipeline import ImagePromptPipeline
from imprompt.generation.references import Reference
from imprompt.generation.settings import Settings
from imprompt.models import find_model

# bytes of image prompts' features to keep: all pictures of an item use the same ones
KEPT = 2**28


class Generator:
    """A base model, with one adapter at a time, that makes the pictures."""

    def __init__(self, plan: Plan, device: str) -> None:
        self.plan, self.worn = plan, plan.sweep.get("adapter", (plan.adapter,))[0]
        self.memory = FeatureMemory(KEPT)
        dtype = getattr(torch, plan.dtype) if plan.dtype else None
        self.pipe = ImagePromptPipeline.from_pretrained(
            plan.model, device=device, dtype=dtype, **self._adapter_options()
        )
        base = self.pipe.pipeline
        if plan.protocol.scheduler == "ddim":
            from diffusers.schedulers.scheduling_ddim import DDIMScheduler

            # DDIM clips by default, which is for pixels and not for latents
            own = base.scheduler.config
            latent: Any = {
                "clip_sample": own.get("clip_sample", False),
                "set_alpha_to_one": own.get("set_alpha_to_one", False),
            }
            base.scheduler = DDIMScheduler.from_config(own, **latent)

    def _adapter_options(self) -> dict[str, Any]:
        options = {"adapter": self.worn, "encoder": self.plan.encoder, "variant": self.plan.variant}
        return {**options, "keep_features": self.memory}

    def swap_in(self, adapter: str | None) -> None:
        """Replace the adapter on the base model by another one."""
        if adapter is None or adapter == self.worn:
            return
        self.pipe.detach()
        self.worn = adapter
        self.pipe = ImagePromptPipeline.from_pipeline(
            self.pipe.pipeline, model=self.plan.model, **self._adapter_options()
        )

    def check(self, setting: Setting) -> None:
        """Raise SettingError if this model cannot make the setting's pictures."""
        self.pipe.resolve(Settings(steps=setting.protocol.steps))
        block_map(list(self.pipe.first.adapter.injection.layers), blocks_of(setting))

    def make(self, setting: Setting, items: Sequence[Item], first: int) -> list[Image]:
        """Make the pictures of `items`: all of an item, then all of the next.

        `first` is the number of the first item in the set.
        """
        self.swap_in(setting.adapter)
        how = setting.protocol
        blocks = blocks_of(setting)
        prompts = [
            Reference(images=reference_of(item, k), blocks=blocks)
            for item in items
            for k in range(how.seeds)
        ]
        texts = [item.caption if how.captions else "" for item in items for _ in range(how.seeds)]
        return self.pipe(
            prompts,
            texts,
            negative_prompt=how.negative_prompt,
            scale=how.scale,
            steps=how.steps,
            guidance=how.guidance,
            seed=how.seed + first * how.seeds,
            batch_size=how.batch_size,
        ).images

    def facts(self) -> dict[str, Any]:
        """Return what a run's record states about the models."""
        base, plan = self.pipe.pipeline, self.plan
        known, adapters = find_model(plan.model), []
        for name in plan.sweep.get("adapter", (plan.adapter,)):
            self.swap_in(name)
            worn = self.pipe.first
            encoder = {
                "source": worn.reader.encoder.source,
                "fingerprint": worn.reader.encoder.fingerprint(),
            }
            if processor := getattr(worn.reader.encoder, "processor", None):
                # a face encoder has no processor
                encoder["preprocessing"] = describe_preprocessing(processor)
            adapters.append(
                {
                    "name": name or worn.name,
                    "sha256": weights_hash(worn.adapter.state_dict()),
                    "encoder": encoder,
                }
            )
        parts = {
            name: part for name, part in base.components.items() if isinstance(part, nn.Module)
        }
        return {
            "model": {
                "name": plan.model,
                "base": str(known.base),
                "sha256": {name: weights_hash(part.state_dict()) for name, part in parts.items()},
                "scheduler": type(base.scheduler).__name__,
                "scheduler_config": {
                    key: value
                    for key, value in base.scheduler.config.items()
                    if not key.startswith("_")
                },
            },
            "adapters": adapters,
            "dtype": str(base_of(base).dtype).removeprefix("torch."),
        }


def blocks_of(setting: Setting) -> Any:
    """Return the blocks of a setting: a number if it is one, otherwise a preset's name."""
    options = setting.axes.get("blocks", "linear")
    try:
        return float(options)
    except ValueError:
        return options


def reference_of(item: Item, number: int) -> Path:
    """Return the image prompt for picture `number` of an item; references take turns."""
    return item.references[number % len(item.references)]
