"""Our training loop at a setting: the package's own data pipeline and step, on encoded features.

Shape letters as in `imprompt.training.features`.
"""

from itertools import islice

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from benchmarks import random_models
from benchmarks.setting import TrainingSetting
from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.families.autoencoders import Normalization
from imprompt.training.augmented import FeatureContent
from imprompt.training.batches import Composer, RankSlice
from imprompt.training.data_pipeline import DataPipeline
from imprompt.training.model import AdaptedModel, prepare_base
from imprompt.training.objective import Objective
from imprompt.training.recipe import Data, NoiseSettings, Optimization
from imprompt.training.step import NaNGuard, Trainer


class OurLoop:
    """Steps of our loop at a setting."""

    compiled = False

    def __init__(self, setting: TrainingSetting) -> None:
        from accelerate import Accelerator

        of, device = setting.models, torch.device(setting.device)
        plan = Optimization(
            steps=1_000_000,
            batch_size=setting.batch,
            precision=setting.precision,  # pyright: ignore[reportArgumentType]
            checkpointing=setting.checkpointing,
            compile=self.compiled,
        )
        accelerator = Accelerator(
            mixed_precision="fp16" if plan.precision == "fp16" else "no", cpu=device.type == "cpu"
        )
        with device:
            base = random_models.unet(of, random_models.DTYPES[setting.precision])
        adapter = IPAdapter.for_model(
            base, ImageProjection(of.vision["projection_dim"], base.config.cross_attention_dim)
        ).float()
        objective = Objective(DDPMScheduler(**random_models.NOISE), NoiseSettings())
        self.trainer = Trainer(
            accelerator, AdaptedModel(prepare_base(base, plan, device), adapter), objective, plan
        )
        self.guard = NaNGuard(list, scaled=accelerator.scaler is not None)
        reader = MemoryReader(setting)
        self.data = DataPipeline(
            reader,
            Data(source="in memory", workers=0),
            seed=0,
            share=RankSlice(),
            batch=setting.batch,
            compose=Composer(
                reader.nulls, device, Normalization((0.0,), (of.vae["scaling_factor"],)), None
            ),
        )
        self.items = self.data.samples_from(0)
        self.step = 0

    def run(self, steps: int) -> float:
        """Take `steps` steps, read the losses as a log line does, and return their mean."""
        for item in islice(self.items, steps):
            stepped = self.trainer.update(self.step, map(self.data.compose, [item]))
            self.guard.watch(self.step + 1, item.names, stepped)
            self.step += 1
        self.guard.check()
        return self.trainer.read_losses()[0]


class CompiledLoop(OurLoop):
    """Steps of our loop at a setting, with the model compiled."""

    compiled = True


class MemoryReader:
    """Random encoded features in memory, in the form of `imprompt.training.cache.FeatureReader`.

    See `imprompt.training.batches.SampleReader`.
    """

    def __init__(self, setting: TrainingSetting) -> None:
        of, count = setting.models, setting.samples
        latent, embedding = (4, setting.side, setting.side), (of.vision["projection_dim"],)
        text = (of.base.text_tokens, of.base.config["cross_attention_dim"])
        self.latent = latent
        self.features: dict[str, Tensor] = {
            "mean": torch.randn(count, *latent),
            "spread": torch.rand(count, *latent),
            "image": torch.randn(count, *embedding),
        }
        self.conditions: dict[str, Tensor] = {"text": torch.randn(count, *text)}
        self.nulls = {"image": torch.zeros(1, *embedding), "text": torch.randn(1, *text)}
        if of.pooled:
            self.conditions["pooled"] = torch.randn(count, of.pooled)
            self.nulls["pooled"] = torch.randn(1, of.pooled)
        self.features, self.conditions = (
            {key: value.half() for key, value in part.items()}
            for part in (self.features, self.conditions)
        )
        if of.pooled:
            self.conditions["time_ids"] = torch.tensor(
                [[setting.pixels, setting.pixels, 0, 0] + 2 * [setting.pixels]] * count
            ).float()
        self.bucket, self.shards, self.bad_shards = np.zeros(count, int), [count], ()

    def __len__(self) -> int:
        return len(self.bucket)

    def name(self, index: int) -> str:
        """Return a sample's name."""
        return str(index)

    def latent_shape(self, index: int) -> tuple[int, int, int]:  # noqa: ARG002 - all have one
        """Return the shape of a sample's latents (C, h, w), which all samples share."""
        return self.latent

    def read(self, index: int, flip: bool, pick: float) -> FeatureContent:  # noqa: ARG002 - nothing is mirrored, one reference
        """Return a sample's features; it is never mirrored and has one reference."""
        conditions = {key: value[index] for key, value in self.conditions.items()}
        mean, spread, image = (value[index] for value in self.features.values())
        return FeatureContent(mean, spread, {"image": image}, conditions)

    def blank(self, index: int) -> FeatureContent:
        """Return features that stand in for a sample that is not readable."""
        return self.read(index, False, 0.0)
