"""One optimizer step, on one process or many, and the state that is kept with the weights.

Shape letters as in `imprompt.training.features`.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from imprompt.errors import ImpromptError, SettingError
from imprompt.training.batches import Batch
from imprompt.training.compiled import compare_backward, own_parts
from imprompt.training.muon import Muon, weight_matrices
from imprompt.training.objective import ByTimestep, Losses, Objective
from imprompt.training.recipe import Optimization

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def build_adamw(model: nn.Module, plan: Optimization) -> torch.optim.Optimizer:
    """Return AdamW for all parameters of the model."""
    return torch.optim.AdamW(
        model.parameters(), plan.learning_rate, weight_decay=plan.weight_decay, fused=True
    )


def build_adamw_8bit(model: nn.Module, plan: Optimization) -> torch.optim.Optimizer:
    """Return bitsandbytes' 8-bit AdamW; raise SettingError if it is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise SettingError(
            "optimization.optimizer = 'adamw8bit' needs bitsandbytes: pip install 'imprompt[8bit]'"
        ) from error
    return AdamW8bit(model.parameters(), plan.learning_rate, weight_decay=plan.weight_decay)


def build_muon(model: nn.Module, plan: Optimization) -> torch.optim.Optimizer:
    """Return Muon for the model's weight matrices, with AdamW for its other parameters."""
    matrices = weight_matrices(model)
    taken = {*map(id, matrices)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    # Bfloat16 is faster, but amplifies gradient rounding, which depends on the number of processes.
    precision = torch.bfloat16 if torch.accelerator.is_available() else torch.float32
    return Muon(
        matrices, others, plan.learning_rate, weight_decay=plan.weight_decay, precision=precision
    )


# Builders of the optimizer of a module, all of whose parameters are trained.
OPTIMIZERS: dict[str, Callable[[nn.Module, Optimization], torch.optim.Optimizer]] = {
    "adamw": build_adamw,
    "adamw8bit": build_adamw_8bit,
    "muon": build_muon,
}

# Share of the learning rate, by the share of the steps that are done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


def learning_rate(step: int, plan: Optimization) -> float:
    """Return the learning rate of a step: a linear warm-up, then the schedule."""
    warm = min(1.0, (step + 1) / (plan.warmup + 1))
    return plan.learning_rate * warm * SCHEDULES[plan.schedule](step / plan.steps)


class Stepped(NamedTuple):
    """Result of a step, on the device.

    `loss` is the mean over all processes, `norm` that of the gradient before clipping.
    """

    loss: Tensor
    norm: Tensor


class Trainer:
    """The adapted model, its objective and its optimizer.

    model  an `AdaptedModel`; every process has one, and a share of each batch
    """

    def __init__(
        self, accelerator: Any, model: nn.Module, objective: Objective, plan: Optimization
    ) -> None:
        self.accelerator, self.plan, self.objective = (
            accelerator,
            plan,
            objective.to(accelerator.device),
        )
        optimizer = OPTIMIZERS[plan.optimizer](model, plan)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.by_timestep = ByTimestep(self.objective)
        # since the last log: weighted and plain losses, samples
        self.sums = torch.zeros(3, device=accelerator.device)
        self.average = Average(self.model.parameters(), plan.ema) if plan.ema else None
        # shapes of latents for which the compiled gradient is known to be right
        self.checked: set[torch.Size] = set()

    def losses(self, batch: Batch, index: Tensor) -> Losses:
        """Return the adapted model's losses (B,) at timesteps given as schedule rows (B,)."""
        noise = self.objective.shift(batch.noise, batch.offset)
        noisy, t, target = self.objective.corrupt(batch.latents, noise, index)
        prediction = self.model(noisy, t, batch.image, batch.conditions)
        return self.objective.losses(prediction, target, index, batch.mask)

    def update(self, step: int, parts: Iterable[Batch]) -> Stepped:
        """Take step number `step` (from 0) over the parts of this process's share of the batch."""
        loss = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(parts, 1):
            if self.plan.compile and number == 1 and batch.latents.shape not in self.checked:
                self._check_compiled(batch)
            with (
                nullcontext()
                if number == self.plan.accumulate
                else self.accelerator.no_sync(self.model)
            ):
                loss += self._backward(batch)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.plan.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.plan)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.step(self.model.parameters())
        return Stepped(
            self.accelerator.reduce(loss, "mean"),
            norm.full_tensor() if isinstance(norm, DTensor) else norm,
        )

    def _check_compiled(self, batch: Batch) -> None:
        """Raise SettingError if compiling the base has made a gradient wrong.

        Every new size of pictures may be compiled anew.

        All processes must call it together, before the step has a gradient.
        """

        def backward(part: Batch) -> None:
            losses = self.losses(part, self.objective.draw(part.u, part.latents))
            self.accelerator.backward((losses.weighted * part.weight).sum() / len(batch.names))

        samples = [partial(backward, sample) for sample in batch.samples()]
        found = compare_backward(self.model, partial(backward, batch), samples)
        wrong, compared = self.accelerator.reduce(found, "sum").tolist()
        if wrong:
            raise SettingError(
                f"optimization.compile = true gives {wrong / compared:.0%} of the adapter's "
                "weights a wrong gradient: PyTorch "
                f"{torch.__version__} miscompiles this model; give compile = false, another "
                "precision or another PyTorch"
            )
        if compared:
            self.checked.add(batch.latents.shape)

    def _backward(self, batch: Batch) -> Tensor:
        """Add the gradient of one part; return its share of the step's loss.

        A sample that could not be read has no weight.
        """
        index = self.objective.draw(batch.u, batch.latents)
        losses = self.losses(batch, index)
        loss = (losses.weighted * batch.weight).mean() / self.plan.accumulate
        self.accelerator.backward(loss)
        with torch.no_grad():
            self.by_timestep.add(losses.plain, index, batch.weight)
            self.sums += torch.stack(
                [
                    (losses.weighted * batch.weight).sum(),
                    (losses.plain * batch.weight).sum(),
                    batch.weight.sum(),
                ]
            )
        return loss.detach()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Allow forward passes without a backward pass.

        After such passes FSDP2 leaves the weights of all processes gathered; they are sharded again
        at the end.
        """
        try:
            yield
        finally:
            if isinstance(self.model, FSDPModule):
                self.model.reshard()

    def read_losses(self) -> tuple[float, float, dict[str, float]]:
        """Return the mean weighted loss, plain loss and losses by timestep since the last call.

        They are over all processes, which must call it together.
        """
        weighted, plain, samples = self.accelerator.reduce(self.sums, "sum").tolist()
        self.by_timestep.totals.copy_(self.accelerator.reduce(self.by_timestep.totals, "sum"))
        by_timestep = self.by_timestep.read()
        self.by_timestep.reset()
        self.sums.zero_()
        return weighted / max(samples, 1), plain / max(samples, 1), by_timestep

    def weights(self) -> dict[str, Tensor]:
        """Return the adapter's current weights, unsharded, on the CPU.

        All processes must call it together.
        """
        state: Any = get_model_state_dict(self.model, options=WHOLE)
        return {name.removeprefix("adapter."): value.clone() for name, value in state.items()}

    def state(self) -> dict[str, Any]:
        """Return what else a run needs to resume; all processes must call it together."""
        scaler = self.accelerator.scaler
        return {
            "optimizer": get_optimizer_state_dict(
                self.model, self.optimizer.optimizer, options=WHOLE
            ),
            "scaler": scaler.state_dict() if scaler else {},
            **(
                {"weights": self.weights(), "average_steps": self.average.steps}
                if self.average
                else {}
            ),
        }

    def load(self, adapter: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Resume from a state's adapter and what `state` returned."""
        self._load_weights(adapter)
        if self.average:
            self.average.start(self.model.parameters(), state["average_steps"])
            self._load_weights(state["weights"])
        set_optimizer_state_dict(
            self.model, self.optimizer.optimizer, state["optimizer"], options=WHOLE
        )
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        set_model_state_dict(
            self.model, {f"adapter.{name}": value for name, value in weights.items()}, options=WHOLE
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the model temporarily, if an average is kept."""
        if self.average is None:
            yield
            return
        with self.average.swapped_into(self.model.parameters()):
            yield


class Average:
    """The exponential moving average of the weights.

    It follows faster in the first steps, as in diffusers and TensorFlow.

    Every process averages its own part of sharded weights.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.start(parameters, 0)

    def start(self, parameters: Iterable[nn.Parameter], steps: int) -> None:
        """Set the average to the parameters, as after `steps` steps."""
        self.steps, self.means = steps, [own.clone() for own in own_parts(parameters)]

    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Update the average with the parameters of one more step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(self.means, own_parts(parameters), self.steps)

    @contextmanager
    def swapped_into(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Put the averages into the parameters temporarily."""
        parts = own_parts(parameters)
        kept = [part.clone() for part in parts]
        try:
            for part, mean in zip(parts, self.means, strict=True):
                part.copy_(mean)
            yield
        finally:
            for part, own in zip(parts, kept, strict=True):
                part.copy_(own)


class Diverged(ImpromptError):
    """A loss or gradient that is not a finite number any more."""


class NaNGuard:
    """Check that stops a run whose loss is NaN or infinite, at the step that made it so.

    A GPU's numbers are checked one step late, when they have arrived, so that the CPU never waits
    for them.
    """

    def __init__(self, gather: Callable[[list[str]], list[str]], scaled: bool) -> None:
        """Set up the check.

        gather  returns the sample names of all processes, given those of this process
        scaled  whether a gradient scaler handles infinite gradients
        """
        self._gather, self._scaled = gather, scaled
        self._pending: tuple[int, list[str], Tensor, Any] | None = None

    def watch(self, step: int, names: list[str], stepped: Stepped) -> None:
        """Check the previous step and store this one for later; on a CPU check it at once.

        All processes must call it together.
        """
        self.check()
        # NaN or infinite if the loss or the norm is
        value = stepped.loss if self._scaled else stepped.loss + 0 * stepped.norm
        there = torch.cuda.Event() if value.is_cuda else None
        self._pending = step, names, value.to("cpu", non_blocking=True), there
        if there is None:
            self.check()
        else:
            there.record()

    def check(self) -> None:
        """Raise Diverged if the stored step's loss is not finite."""
        if self._pending is None:
            return
        (step, names, value, there), self._pending = self._pending, None
        if there is not None:
            while not there.query():
                # a wait inside CUDA would block signals, as when another process has ended
                time.sleep(1e-3)
        if not math.isfinite(value.item()):
            raise Diverged(
                f"the loss of step {step} is {value.item()}; its samples: "
                f"{', '.join(self._gather(names))}"
            )
