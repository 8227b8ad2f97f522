"""The training run, for all variants and families, on one process or many.

Several processes are started by `accelerate launch` or `torchrun`.
"""

from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from imprompt.adapter import IPAdapter
from imprompt.checkpoints.adapters import build_adapter, read_adapter, save_adapter
from imprompt.checkpoints.states import LATEST, state_at
from imprompt.errors import ImpromptError
from imprompt.families.base import family_of
from imprompt.files import lock_folder
from imprompt.training.augmented import AugmentedSample
from imprompt.training.batches import Batch
from imprompt.training.comparisons import (
    SAMPLES,
    ReferenceLosses,
    base_losses,
    check_base,
    reference_losses,
)
from imprompt.training.data_pipeline import Bad, bad_of
from imprompt.training.endings import explained_termination, stop_error
from imprompt.training.recipe import Recipe
from imprompt.training.samples import BadSample
from imprompt.training.setup import Setup, gathered, set_up
from imprompt.training.signals import StopRequest, Wish, Wishes
from imprompt.training.state import link_states, save_state
from imprompt.training.step import NaNGuard
from imprompt.training.validation import held_out_loss
from imprompt.training.watch import (
    Clock,
    LogRow,
    Metrics,
    Tracker,
    Watcher,
    open_trackers,
    peak_memory_gb,
)

HELD_OUT_DRAWS = 4  # timesteps at which every held-out sample's loss is measured


def train(recipe: Recipe, watcher: Watcher | None = None) -> Path:
    """Train to the last step, from the latest state of `recipe.output` if there is one.

    Return the folder of the last state. Raise Stopped if a signal ended it before: its state is
    saved.
    """
    with explained_termination(recipe.output) as request:
        watcher = watcher or Watcher()
        run = Run(set_up(recipe, watcher.encoded), watcher, request)
        try:
            run.go()
        finally:
            run.close()
    return state_at(recipe.output / LATEST)


def due(step: int, every: int | None, last: bool = False) -> bool:
    """Return whether something that is done every so many steps, if at all, is done after one.

    last  whether it is done now in any case
    """
    return bool(every) and (last or step % every == 0)


class Run:
    """The steps of a run, with its log, saved states and validation.

    request  the request to stop, looked at after every step
    """

    def __init__(self, setup: Setup, watcher: Watcher, request: StopRequest | None = None) -> None:
        self.setup, self.watcher = setup, watcher
        self.request = request or StopRequest()
        self.wishes = Wishes(setup.recipe.save_minutes, setup.accelerator.num_processes)
        self.trainer, self.data_pipeline = setup.trainer, setup.data_pipeline
        recipe, reader = setup.recipe, setup.data_pipeline.reader
        self.metrics = Metrics(recipe.output)
        self.trackers: list[Tracker] = []
        self.lock: FileLock | None = None
        first_step = setup.state.step if setup.state else 0
        self.bad = Bad(recipe.output, recipe.data.max_bad, reader, first_step, write=setup.main)
        self.seen: list[BadSample] = [*reader.bad_shards]  # found, but not reported yet

    def go(self) -> None:
        """Take every step after the latest state."""
        recipe, plan = self.setup.recipe, self.setup.recipe.optimization
        if self.setup.main:
            self.lock = lock_folder(recipe.output, "training into")
        self.setup.accelerator.wait_for_everyone()
        done = self._resume()
        self.setup.accelerator.wait_for_everyone()  # all have read the state that links lead to
        if self.setup.main:
            if done:
                link_states(recipe.output, done)
            self.metrics.cut(done)
            self.trackers = open_trackers(recipe, done, self.watcher.warned)
        if not done and recipe.check_base:
            self._check_base()
        self._count(done)
        self.request.stepping = True
        self.wishes.saved()
        clock = Clock()
        guard = NaNGuard(gathered, scaled=self.setup.accelerator.scaler is not None)
        samples = self.data_pipeline.samples_from(done) if done < plan.steps else iter(())
        for step in range(done, plan.steps):
            with clock.waiting():
                parts = list(islice(samples, plan.accumulate))
            self.seen += bad_of(parts)
            names = [name for part in parts for name in part.names]
            stepped = self.trainer.update(step, map(self.data_pipeline.compose, parts))
            guard.watch(step + 1, names, stepped)
            clock.step(plan.batch_size)
            self.watcher.advanced(step + 1)
            last = step + 1 == plan.steps
            wish = self.wishes.after_step(self.request)
            saving = last or wish > Wish.nothing or (step + 1) % recipe.save_every == 0
            validating = due(step + 1, recipe.validation.every)
            comparing = due(step + 1, recipe.validation.shuffled_every, last)
            if saving or validating or comparing or (step + 1) % recipe.logging.every == 0:
                guard.check()
                self._log(step + 1, clock, stepped.norm.item(), self._count(step + 1))
            with clock.paused():
                if comparing:
                    self._compare_references(step + 1)
                if validating:
                    self._validate(step + 1)
                # saved last: a resumed run reports again what its state does not include
                if saving:
                    self._save(step + 1)
            if wish == Wish.stop and not last:
                raise stop_error(self.request.received, recipe.output)

    def _resume(self) -> int:
        """Load the latest state; return the number of steps done."""
        if (state := self.setup.state) is None:
            return 0
        steps = self.setup.recipe.optimization.steps
        self.watcher.resumed(state.folder, state.step, steps, state.changed)
        for fault in state.damaged:
            self.watcher.warned(f"{fault}: resumed at step {state.step} instead")
        adapter = build_adapter(read_adapter(state.folder), self.setup.cpu_copy.family)
        self.trainer.load(adapter.state_dict(), state.training)
        if (samples := state.facts.samples) != len(self.data_pipeline.reader):
            raise ImpromptError(
                f"{self.setup.recipe.output} was started with {samples or 0:,} samples, "
                "the set has "
                f"{len(self.data_pipeline.reader):,} now: give another output, and start = "
                f"{str(state.folder)!r} to go on from there"
            )
        return state.step

    def _check_base(self) -> None:
        """Log the base's own loss; raise SettingError if a constant predicts as well."""
        batches = self._compared(self.data_pipeline.first_samples(SAMPLES))
        parts = base_losses(batches, self.trainer.objective, self._predict_alone)
        if not parts:
            return
        means = {
            "base_loss": fmean(part.base for part in parts),
            "constant_loss": fmean(part.constant for part in parts),
        }
        by_part = {f"base_loss/{part.timesteps}": part.base for part in parts}
        by_part |= {f"constant_loss/{part.timesteps}": part.constant for part in parts}
        self._log_scores(0, "base", means | by_part)
        self.watcher.compared(means)
        check_base(parts)

    def _predict_alone(self, noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """Return what the frozen base predicts without an image prompt; it is not compiled."""
        base = self.setup.base
        with torch.compiler.set_stance("force_eager"):
            return family_of(base).predict(base, None, noisy, timesteps, batch.conditions)

    def _compared(self, chosen: np.ndarray) -> list[Batch]:
        """Return batches of chosen samples, with fixed noise; bad ones have no weight."""
        pipeline = self.data_pipeline
        return [pipeline.compose(samples) for _, samples in pipeline.fixed_samples(chosen)]

    def reference_losses(self) -> ReferenceLosses | None:
        """Return the losses with own and with shuffled references, equal on every process.

        They are those of held-out samples, else of the first ones that are trained on.
        """
        held_out = self.data_pipeline.held_out[:SAMPLES]
        chosen = held_out if len(held_out) > 1 else self.data_pipeline.first_samples(SAMPLES)

        def losses(batch: Batch, index: Tensor) -> Tensor:
            return self.trainer.losses(batch, index).plain

        with self.trainer.averaged(), self.trainer.measuring():
            return reference_losses(self._compared(chosen), self.trainer.objective, losses)

    def _compare_references(self, step: int) -> None:
        """Log the losses with own and with shuffled references, and their difference."""
        if found := self.reference_losses():
            scores = {
                "own_loss": found.own,
                "shuffled_loss": found.shuffled,
                "shuffled_minus_own": found.shuffled - found.own,
            }
            self._log_scores(step, "validation", scores)
            self.watcher.compared(scores)

    def _count(self, step: int) -> int:
        """Report the bad samples that all processes found since the last call.

        Return how many there are up to `step`.
        """
        met, self.seen = gathered(self.seen), []
        for error in self.bad.add(met, step):
            self.watcher.bad(error)
        return self.bad.count

    def _log(self, step: int, clock: Clock, norm: float, bad: int) -> None:
        loss, plain, by_timestep = self.trainer.read_losses()
        if not self.setup.main:
            return
        row = LogRow(
            step=step,
            epoch=step * self.setup.recipe.optimization.batch_size / self.data_pipeline.samples,
            loss=loss,
            plain_loss=plain,
            grad_norm=norm,
            learning_rate=self.trainer.optimizer.param_groups[0]["lr"],
            **clock.lap()._asdict(),
            peak_memory_gb=peak_memory_gb(self.setup.device),
            bad=bad,
            by_timestep=by_timestep,
        )
        self.metrics.add(asdict(row))
        for tracker in self.trackers:
            tracker.log(row.scalars(), step)
        self.watcher.stepped(row)

    def _save(self, step: int) -> None:
        """Save a state: all processes gather their parts, and the first one writes."""
        facts: dict[str, Any] = {
            "recipe": self.setup.recipe.model_dump(mode="json"),
            "samples": len(self.data_pipeline.reader),
        }
        with self.trainer.averaged():
            weights = self.trainer.weights()
            if self.setup.recipe.data.held_out:
                facts["held_out_loss"] = self.held_out_loss()
                self._count(step)
        state = self.trainer.state()
        if self.setup.main:
            self._load_copy(weights)
            origin = self.setup.origin.model_copy(update={"training_steps": step})
            row, cpu_copy, layers = (
                self.setup.recipe.adapter_variant,
                self.setup.cpu_copy,
                self.setup.layers,
            )
            files: dict[str, Callable[[Path], None]] = {
                "adapter.safetensors": lambda path: save_adapter(
                    path, cpu_copy, row, layers, origin
                ),
                "training.pt": lambda path: torch.save(state, path),
            }
            if "held_out_loss" in facts:
                self._log_scores(step, "validation", {"held_out_loss": facts["held_out_loss"]})
            output, keep = self.setup.recipe.output, self.setup.recipe.keep
            self.watcher.saved(save_state(output, step, files, facts, keep, self.watcher.warned))
        self.setup.accelerator.wait_for_everyone()
        self.wishes.saved()

    def _load_copy(self, weights: dict[str, Tensor]) -> IPAdapter:
        self.setup.cpu_copy.load_state_dict(weights)
        return self.setup.cpu_copy

    def held_out_loss(self) -> float:
        """Return the mean loss of the held-out samples, equal on every process.

        Every process takes all samples, because sharded weights are gathered in every forward pass.
        """

        def losses(batch: Batch, u: Tensor) -> Tensor:
            u = u.to(self.setup.device).float()
            index = self.trainer.objective.row(u, batch.latents)
            return self.trainer.losses(batch, index).plain[batch.weight > 0]

        def composed(samples: AugmentedSample) -> Batch:
            self.seen += bad_of([samples])
            return self.data_pipeline.compose(samples)

        batches = (
            (torch.from_numpy(numbers), composed(samples))
            for numbers, samples in self.data_pipeline.held_out_samples()
        )
        with self.trainer.measuring():
            return held_out_loss(batches, losses, HELD_OUT_DRAWS)

    def _validate(self, step: int) -> None:
        with self.trainer.averaged():
            weights = self.trainer.weights()
        if self.setup.validator is not None:
            self._load_copy(weights).to(self.setup.device)
            path, scores = self.setup.validator.grid(step)
            self.setup.cpu_copy.cpu()
            self._log_scores(step, "validation", scores)
            for tracker in self.trackers:
                tracker.log_image("validation/grid", Image.open(path).convert("RGB"), step)
            self.watcher.validated(path, scores)
        self.setup.accelerator.wait_for_everyone()

    def _log_scores(self, step: int, group: str, scores: dict[str, float]) -> None:
        """Log numbers, which have the group before their names in trackers."""
        if not self.setup.main:
            return
        self.metrics.add({"step": step, **scores})
        for tracker in self.trackers:
            tracker.log({f"{group}/{name}": value for name, value in scores.items()}, step)

    def close(self) -> None:
        """Close the trackers and release the lock on the output folder."""
        for tracker in self.trackers:
            tracker.close()
        if self.lock is not None:
            self.lock.release()
