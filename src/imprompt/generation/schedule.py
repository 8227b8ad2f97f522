"""How far a call has come through the noise schedule, where its timestep alone does not tell it.

Most schedulers of diffusers number their steps by the timesteps that a model was trained with, from
which a family computes progress. Others (EDM, Euler with continuous timesteps, IPNDM, consistency
models) have numbers of their own; progress is then the place in the scheduler's list of steps.
"""

from functools import cached_property
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from imprompt.attention.conditioning import scale_at
from imprompt.errors import SettingError
from imprompt.families.base import schedule_place
from imprompt.prompt import ImagePrompt

SMALL = 2  # no list of training timesteps with fractions stays below
STEP = ("model_output", "timestep", "sample")  # what pipelines give a scheduler's step


def check_scheduler(scheduler: Any) -> None:
    """Raise SettingError unless a text-to-image pipeline can run the scheduler's step."""
    kind = type(scheduler).__name__
    if not hasattr(scheduler, "step") or "num_train_timesteps" not in scheduler.config:
        raise SettingError(f"a {kind} is not for text-to-image models: choose another scheduler")
    takes = signature(scheduler.step).parameters.values()
    needs = [one.name for one in takes if one.default is Parameter.empty and one.kind.value < 2]
    if more := [name for name in needs if name not in STEP]:
        raise SettingError(
            f"a {kind}'s step needs {' and '.join(more)}, which pipelines do not give: choose "
            "another scheduler"
        )


class SchedulerProgress:
    """Progress of one request through the steps of its scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    @cached_property
    def has_own_numbers(self) -> bool:
        """Whether the timesteps are not those that the model was trained with."""
        times: Tensor = self.scheduler.timesteps
        small = times.max() <= SMALL and bool((times != times.round()).any())
        trained = self.scheduler.config.num_train_timesteps
        return bool(times.min() < 0 or times.max() > trained or small)

    def progress(self, timestep: Any) -> Tensor:
        """Return the share () of all steps that come before the step of this timestep."""
        times: Tensor = self.scheduler.timesteps
        now = torch.as_tensor(timestep).flatten()[0].to(times)
        return (times - now).abs().argmin() / len(times)

    def at_this_step(self, prompt: ImagePrompt, timestep: Any) -> ImagePrompt:
        """Return a prompt with the scale that it has at this timestep, if only the list tells it.

        Otherwise return the prompt as it is.
        """
        if prompt.scale.ndim == 2 or not self.has_own_numbers:
            return prompt
        progress = self.progress(timestep)
        return prompt._replace(
            scale=scale_at(prompt.scale, lambda points: schedule_place(progress, points))
        )
