"""Training objective: what the model predicts, at which noise, and what each error weighs.

Shape letters as in `imprompt.training.features`; S timesteps of the noise schedule, numbered from
the least noisy.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from imprompt.errors import SettingError
from imprompt.training.recipe import NoiseSettings

Prediction = Literal["epsilon", "v_prediction", "flow"]
Coefficients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Shift = Callable[[Any, Tensor], float]  # a scheduler's configuration and latents -> μ
BUCKETS = 10

# α and σ of the noisy latents x_t = α · x0 + σ · ε -> l and n of the target l · x0 + n · ε.
TARGETS: dict[Prediction, Coefficients] = {
    # Ho et al. 2020 (arXiv 2006.11239), equation 14; equation 6 of the paper
    "epsilon": lambda alpha, _: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    # Salimans & Ho 2022 (arXiv 2202.00512), appendix D
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
    # Liu et al. 2022 (arXiv 2209.03003), equation 1, with time running from the picture to the
    # noise
    "flow": lambda alpha, _: (-torch.ones_like(alpha), torch.ones_like(alpha)),
}

# How timesteps are drawn where the recipe does not say: what diffusers trains with.
DRAWN: dict[Prediction, str] = {
    "epsilon": "uniform",
    "v_prediction": "uniform",
    "flow": "logit-normal",
}


class Schedule(NamedTuple):
    """A noise schedule: α, σ and timestep of every row."""

    alpha: Tensor  # (S,)
    sigma: Tensor  # (S,)
    timesteps: Tensor  # (S,) as the model takes them


class Losses(NamedTuple):
    """Losses of every sample (B,), in float32.

    `weighted` is the mean squared error weighted for training (by timestep and mask), `plain` the
    same error without weights.
    """

    weighted: Tensor
    plain: Tensor


class Objective(nn.Module):
    """The loss of a base model's scheduler, as tables over the timesteps.

    It has no weights; `to(device)` moves the tables.

    Raises SettingError for a scheduler that training does not know, or a zero terminal SNR that the
    model cannot learn at.
    """

    alpha: Tensor
    sigma: Tensor
    timesteps: Tensor
    of_latents: Tensor
    of_noise: Tensor
    weight: Tensor

    def __init__(self, scheduler: Any, noise: NoiseSettings, mu: Shift | None = None) -> None:
        """Compute the tables.

        mu  `imprompt.families.base.Family.mu` of the model, for `noise.shift` = "dynamic"
        """
        super().__init__()
        self.prediction_type: Prediction = prediction_type(scheduler)
        self.offset, self.power, self.mask_weight = noise.offset, noise.power, noise.mask_weight
        self.logit_normal = (noise.timesteps or DRAWN[self.prediction_type]) == "logit-normal"
        self.mean, self.std = noise.logit_mean, noise.logit_std
        self.shifted = None if noise.shift == "static" else dynamic_shift(scheduler, mu)
        alpha, sigma, timesteps = (flow if self.prediction_type == "flow" else diffusion)(
            scheduler, noise
        )
        of_latents, of_noise = TARGETS[self.prediction_type](alpha, sigma)
        weight = (
            torch.ones_like(alpha)
            if noise.min_snr is None
            else min_snr(alpha, sigma, of_latents, of_noise, noise.min_snr)
        )
        tables = {"alpha": alpha, "sigma": sigma, "timesteps": timesteps}
        for name, table in (
            tables | {"of_latents": of_latents, "of_noise": of_noise, "weight": weight}
        ).items():
            self.register_buffer(name, table, persistent=False)

    def draw(self, u: Tensor, latents: Tensor | None = None) -> Tensor:
        """Return the timesteps to train at (B,), as rows, for uniform numbers in [0, 1) (B,).

        `noise.power` above 1 makes noisier timesteps more frequent. Of the latents (B, C, h, w)
        only the size matters, and only where `noise.shift` is dynamic.
        """
        return self.row(u if self.power == 1 else 1 - (1 - u) ** self.power, latents)

    def row(self, u: Tensor, latents: Tensor | None = None) -> Tensor:
        """Return timesteps as rows of the tables (B,) for uniform numbers in [0, 1) (B,).

        They are drawn as `noise.timesteps` says, then shifted for latents (B, C, h, w) of that size
        if `noise.shift` is dynamic.
        """
        normal = self.mean + self.std * torch.special.ndtri(u)
        share = normal.sigmoid() if self.logit_normal else u
        if self.shifted is not None:
            assert latents is not None
            share = self.shifted(share, latents)
        # u may be rounded to 1
        return (share * len(self.alpha)).long().clamp_max(len(self.alpha) - 1)

    def shift(self, noise: Tensor, offset: Tensor) -> Tensor:
        """Shift noise (B, C, h, w) by one random number per channel, of strength `noise.offset`.

        `offset` (B, C, 1, 1) is standard normal.
        https://www.crosslabs.org/blog/diffusion-with-offset-noise
        """
        return noise + self.offset * offset

    def corrupt(
        self, latents: Tensor, noise: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add noise to latents at timesteps given as rows (B,).

        Latents and noise are (B, C, h, w). Return noisy latents, the model's timesteps (B,) and the
        target.
        """
        latents, noise = latents.float(), noise.float()
        alpha, sigma, of_latents, of_noise = (
            table[index].view(-1, 1, 1, 1)
            for table in (self.alpha, self.sigma, self.of_latents, self.of_noise)
        )
        return (
            alpha * latents + sigma * noise,
            self.timesteps[index],
            of_latents * latents + of_noise * noise,
        )

    def losses(
        self, prediction: Tensor, target: Tensor, index: Tensor, mask: Tensor | None = None
    ) -> Losses:
        """Return the losses (B,) of a prediction.

        Prediction and target are (B, C, h, w), timesteps rows (B,), mask (B, 1, h, w) in [0, 1].
        """
        errors = (prediction.float() - target.float()).square()
        plain = errors.mean((1, 2, 3))
        masked = (
            (errors * emphasis(mask, self.mask_weight)).mean((1, 2, 3))
            if mask is not None and self.mask_weight
            else plain
        )
        return Losses(self.weight[index] * masked, plain)


def emphasis(mask: Tensor, weight: float) -> Tensor:
    """Convert a mask (B, 1, h, w) in [0, 1] to weights of that shape.

    Before division by their mean they are 1 + weight where the mask is white, 1 where it is black.

    The mean is that of each sample. So every sample counts equally, however much of it is white and
    also without a mask, and the loss does not depend on which samples share a batch, a part of it
    or a process.
    """
    weights = 1 + weight * mask
    return weights / weights.mean((1, 2, 3), keepdim=True)


def prediction_type(scheduler: Any) -> Prediction:
    """Return what the model of a diffusers scheduler predicts.

    Raise SettingError if training does not know it.
    """
    config, name = scheduler.config, type(scheduler).__name__
    stated = config.get("prediction_type")
    if name.startswith("FlowMatch") or stated == "flow_prediction" or config.get("use_flow_sigmas"):
        return "flow"
    if stated not in TARGETS:
        raise SettingError(
            f"this model predicts {stated!r} ({name}); training knows {', '.join(TARGETS)}"
        )
    if "beta_schedule" not in config:
        raise SettingError(
            f"this model's {name} has no schedule of betas; training knows those and flow matching"
        )
    return stated


def diffusion(scheduler: Any, noise: NoiseSettings) -> Schedule:
    """Return the schedule with α = √ᾱ and σ = √(1 - ᾱ) (Ho et al. 2020, equation 4).

    The model takes a timestep as its number. With zero terminal SNR the betas are rescaled as Lin
    et al. 2023 do (arXiv 2305.08891, algorithm 1).
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    rescale = noise.zero_terminal_snr or bool(scheduler.config.get("rescale_betas_zero_snr"))
    if rescale and prediction_type(scheduler) == "epsilon":
        raise SettingError(
            "zero terminal SNR (noise.zero_terminal_snr, or the model's own "
            "rescale_betas_zero_snr) needs a model that predicts v: "
            "at SNR 0 the input of this one is epsilon alone, which is what it predicts"
        )
    schedule: Any = DDPMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=rescale)
    signal: Tensor = schedule.alphas_cumprod
    return Schedule(signal.sqrt(), (1 - signal).sqrt(), torch.arange(len(signal)))


def flow(scheduler: Any, _: NoiseSettings) -> Schedule:
    """Return the schedule of flow matching, α = 1 - σ with diffusers' σ.

    σ is shifted as the scheduler's configuration states. The scheduler numbers a timestep as σ
    times the number of timesteps. A shift that depends on the picture's size
    (`use_dynamic_shifting`) is no part of the table: see `dynamic_shift`. The last timestep is pure
    noise: its SNR is zero in any case.
    """
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    config = scheduler.config
    schedule: Any = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=config["num_train_timesteps"],
        shift=config.get("shift", config.get("flow_shift", 1.0)),
        use_dynamic_shifting=config.get("use_dynamic_shifting", False),
    )
    sigma = schedule.sigmas.flip(0)
    return Schedule(1 - sigma, sigma, schedule.timesteps.flip(0))


def dynamic_shift(scheduler: Any, mu: Shift | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of shares σ of the noise (B,) and latents that gives shifted shares (B,).

    They are shifted as diffusers shifts those that it samples with, but for `shift_terminal`, which
    moves the last steps of sampling alone. Raise SettingError if the scheduler does not shift by
    the picture's size.
    """
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    config = scheduler.config
    if mu is None or not config.get("use_dynamic_shifting"):
        raise SettingError(
            f"noise.shift = 'dynamic': this model's {type(scheduler).__name__} does not shift by "
            "the picture's size (use_dynamic_shifting); leave it out, and its own shift is taken"
        )
    kind = config.get("time_shift_type", "exponential")
    theirs: Any = FlowMatchEulerDiscreteScheduler(time_shift_type=kind)
    return lambda share, latents: theirs.time_shift(mu(config, latents), 1.0, share)


def min_snr(
    alpha: Tensor, sigma: Tensor, of_latents: Tensor, of_noise: Tensor, gamma: float
) -> Tensor:
    """Return the weights (S,) of Hang et al. 2023 (arXiv 2303.09556, section 3.4).

    They are min(SNR, γ) on the error in x0, whatever the model predicts. An error in the target
    l · x0 + n · ε is σ / (n · α - l · σ) times as large in x0, because x_t is known. For ε that
    gives min(SNR, γ) / SNR, for v min(SNR, γ) / (SNR + 1).
    """
    alpha, sigma, of_latents, of_noise = (
        table.double() for table in (alpha, sigma, of_latents, of_noise)
    )
    error_in_x0 = sigma / (of_noise * alpha - of_latents * sigma)
    return ((alpha / sigma).square().clamp_max(gamma) * error_in_x0.square()).float()


class ByTimestep(nn.Module):
    """The mean loss in each of `BUCKETS` equal parts of the schedule.

    Adding never waits for the device.

    `totals` (2, BUCKETS), losses and samples, is its whole state; summed over the ranks, it is that
    of all of them.
    """

    totals: Tensor

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.timesteps = len(objective.alpha)
        self.register_buffer("totals", objective.alpha.new_zeros(2, BUCKETS), persistent=False)
        part = self.bucket(torch.arange(self.timesteps, device=objective.alpha.device))
        power = torch.stack([objective.alpha, objective.sigma]).square()
        signal, noise = torch.zeros_like(self.totals).index_add_(1, part, power)
        self.decibels = (10 * (signal / noise).log10()).tolist()
        self.names = [
            f"{row[0]:03d}-{row[-1]:03d}"
            for row in ((part == number).nonzero().flatten() for number in range(BUCKETS))
        ]

    def bucket(self, index: Tensor) -> Tensor:
        """Return the part of the schedule (B,) for timesteps given as rows (B,)."""
        return index * BUCKETS // self.timesteps

    @torch.no_grad()
    def add(self, losses: Tensor, index: Tensor, count: Tensor) -> None:
        """Add losses (B,) at timesteps given as rows (B,).

        `count` (B,) is 1 for a sample, 0 for one that could not be read.
        """
        self.totals.index_add_(1, self.bucket(index), torch.stack([losses * count, count]))

    def read(self) -> dict[str, float]:
        """Return loss and signal-to-noise ratio of every part that has samples.

        "loss/100-199" and so on, and "snr_db/100-199": the power of the signal over that of the
        noise, in decibels.
        """
        rows = zip(self.names, *self.totals.tolist(), self.decibels, strict=True)
        seen = [(name, total / count, decibels) for name, total, count, decibels in rows if count]
        return {f"loss/{name}": loss for name, loss, _ in seen} | {
            f"snr_db/{name}": decibels for name, _, decibels in seen
        }

    def reset(self) -> None:
        """Set the totals to zero."""
        self.totals.zero_()
