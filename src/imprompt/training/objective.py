"""What the adapted model is trained to predict. Shape letters as in `imprompt.training.data`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imprompt.errors import SettingError

Target = Callable[[Any, Tensor, Tensor, Tensor], Tensor]  # (schedule, latents, noise, timesteps) -> target

TARGETS: dict[str, Target] = {
    "epsilon": lambda _schedule, _latents, noise, _t: noise,
    "v_prediction": lambda schedule, latents, noise, t: schedule.get_velocity(latents, noise, t),
}


class Objective:
    """The noise-prediction loss (equation 6 of the paper), or its v form where the model's scheduler says so."""

    def __init__(self, scheduler: Any) -> None:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        self.schedule: Any = DDPMScheduler.from_config(scheduler.config)
        self.prediction_type: str = self.schedule.config["prediction_type"]
        if self.prediction_type not in TARGETS:
            raise SettingError(f"this model predicts {self.prediction_type!r}; training knows {', '.join(TARGETS)}")

    def corrupt(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents (B, C, h, w) -> noisy ones, their timesteps (B,), and the target."""
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        t = torch.randint(0, self.schedule.config["num_train_timesteps"], (len(latents),), generator=generator).to(latents.device)
        target = TARGETS[self.prediction_type](self.schedule, latents, noise, t)
        return self.schedule.add_noise(latents, noise, t), t, target

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction.float(), target.float())
