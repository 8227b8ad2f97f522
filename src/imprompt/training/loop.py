"""The training run: one for all variants and families, alone or on many processes (`accelerate launch`, `torchrun`)."""

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from datetime import timedelta
from itertools import islice
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, NoReturn

import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor
from torch.distributed import DistError

from imprompt.adapter import IPAdapter
from imprompt.attention import family_of
from imprompt.checkpoint import Origin, load_adapter, save_adapter
from imprompt.errors import ImpromptError, SettingError, first_line
from imprompt.files import check_folder
from imprompt.training.batches import Batch, Composer, Item, Share
from imprompt.training.features import FeatureEncoder
from imprompt.training.model import AdaptedModel, best_device, measures, open_base, open_frozen, precision, ready, start_adapter
from imprompt.training.objective import Objective
from imprompt.training.recipe import Recipe
from imprompt.training.sources import BadSample, open_source
from imprompt.training.state import load_state, save_state
from imprompt.training.step import Diverged, Sentry, Trainer
from imprompt.training.supply import Bad, Supply, bad_of, encode_features, have_features, read_features, read_pictures
from imprompt.training.validation import Validator, held_out_loss
from imprompt.training.watch import Clock, Metrics, Row, Tracker, Watcher, open_trackers, peak_memory_gb
from imprompt.variants import variant

PATIENCE = timedelta(hours=2)  # with a process at work alone: the first one validates, or one has more to encode than others
HELD_OUT_DRAWS = 4  # timesteps at which every held-out sample's loss is measured


def train(recipe: Recipe, watcher: Watcher | None = None) -> Path:
    """Train to the end, from the latest state of `recipe.output` if there is one; give the folder of the last state."""
    with ends_told(recipe.output):
        run = Run(recipe, watcher or Watcher())
        try:
            run.go()
        finally:
            run.close()
    return recipe.output / "latest"


class Terminated(BaseException):
    """SIGTERM came; no error that the step at hand could deal with."""


@contextmanager
def ends_told(output: Path) -> Iterator[None]:
    """What ends a run before its last step, as an error that says how to go on.

    Launchers send SIGTERM to the processes that are left when one has ended, schedulers before they take the machine.
    """

    def end(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first is enough: what follows is told in peace
        raise Terminated

    before = signal.signal(signal.SIGTERM, end) if current_thread() is main_thread() else None
    try:
        yield
    except Terminated as error:
        raise ImpromptError(f"{TOLD}. {left(output)}") from error
    except Diverged as error:
        raise ImpromptError(f"{error}. {left(output)}") from error
    except RuntimeError as error:
        if (what := end_of_another(error)) is None:
            raise
        raise ImpromptError(f"{what}. {left(output)}") from error
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def left(output: Path) -> str:
    """What there is to go on from."""
    latest = output / "latest"
    if not latest.exists():
        return "No state was saved yet; the same command starts again"
    return f"The last good state is {latest.resolve()}; the same command goes on from there"


TOLD = "this process was told to end (SIGTERM), as when another of its run has"
# How gloo, NCCL and the store that processes meet in say that the process at the other end is gone or silent.
LOST = re.compile(r"connection (was likely )?(closed|reset|refused)|broken pipe|remote p(rocess|eer)|aborted|time(d |-)?out", re.I)


def end_of_another(error: RuntimeError) -> str | None:
    """Which process ended, if `error` says that one did; gloo's errors have no type of their own, but name its source."""
    said = str(error)
    why = re.sub(r"^\[\S+\] |\. This is typically .*|\. ?$", "", first_line(error))  # without gloo's source and guesses
    if said.startswith("DataLoader worker"):
        return TOLD if "signal: Terminated" in said else f"a process that reads samples has ended ({why})"
    distributed = isinstance(error, DistError) or "/gloo/transport/" in said
    return f"another process of this run has ended ({why})" if distributed and LOST.search(said) else None


class Run:
    """Everything that a run holds, put together from its recipe."""

    def __init__(self, recipe: Recipe, watcher: Watcher) -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        self.recipe, self.watcher = recipe, watcher
        check_folder(recipe.output)
        self.lock: FileLock | None = None
        measured = measures(recipe)
        # What is wrong with the set is told before the models are loaded.
        self.source = None if have_features(recipe) else open_source(recipe.data)
        self.state = load_state(recipe.output, recipe)
        kind = precision(recipe, best_device())
        self.accelerator = Accelerator(
            mixed_precision="fp16" if kind == "fp16" else "no",
            cpu=not torch.accelerator.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        self.accelerator.wait_for_everyone()  # one that ended sooner, of a wrong recipe, would break the others' start
        check_engine(self.accelerator)
        self.device: torch.device = self.accelerator.device
        self.main: bool = self.accelerator.is_main_process
        self.share = self._share()
        pipeline, frozen = self._models()
        self.frozen = frozen
        if recipe.data.features is not None:
            reader = read_features(recipe, measured)
            nulls, identity = reader.nulls, reader.identity
        else:
            assert frozen is not None
            assert self.source is not None
            reader = read_pictures(recipe, self.source, measured, frozen)
            nulls, identity = frozen.nulls(), frozen.identity(recipe.data)
        self.base = pipeline.unet
        adapter = start_adapter(recipe, self.base, nulls["image"].shape[-1])
        self.twin = deepcopy(adapter)  # on the CPU: what is saved, and what validation hears with
        objective = Objective(pipeline.scheduler, recipe.noise)
        model = AdaptedModel(ready(self.base, recipe.optimization, self.device), adapter)
        self.sites = list(family_of(self.base).sites(self.base))
        self.trainer = Trainer(self.accelerator, model, objective, recipe.optimization)
        online = frozen if recipe.data.features is None else None
        compose = Composer(nulls, self.device, measured.scaling, measured.shift, online)
        self.supply = Supply(reader, recipe.data, recipe.seed, self.share, recipe.optimization.batch_size, compose)
        self.origin = Origin(
            base=recipe.model,
            encoder=identity["encoder"],
            encoder_fingerprint=identity["encoder_fingerprint"],
            prediction_type=objective.prediction_type,
            licence=recipe.licence,
        )
        self.validator = self._validator(pipeline, frozen)
        self.metrics = Metrics(recipe.output)
        self.trackers: list[Tracker] = []
        self.bad = Bad(recipe.output, recipe.data.max_bad, reader, self.state.step if self.state else 0, write=self.main)
        self.seen: list[BadSample] = [*reader.bad_shards]  # and not told of yet

    def _share(self) -> Share:
        plan, ranks = self.recipe.optimization, self.accelerator.num_processes
        if plan.batch_size % (ranks * plan.accumulate):
            raise ImpromptError(
                f"optimization.batch_size = {plan.batch_size} cannot be shared by {ranks} processes in {plan.accumulate} "
                f"parts each: give a multiple of {ranks * plan.accumulate}"
            )
        return Share(self.accelerator.process_index, ranks, plan.accumulate)

    def _models(self) -> tuple[Any, FeatureEncoder | None]:
        """The base model's pipeline, and the frozen models around it as far as this run needs them."""
        recipe, cached = self.recipe, self.recipe.data.features is not None
        if cached and any(self._gathered([self.source is not None])):
            encoders = open_frozen(recipe, open_base(recipe, self.device, whole=True))
            encode_features(recipe, self.source or open_source(recipe.data), encoders, self.share, self.watcher.encoded)
            self.accelerator.wait_for_everyone()
        around = not cached or recipe.validation.every is not None
        pipeline = open_base(recipe, torch.device("cpu") if cached else self.device, whole=around)
        return pipeline, open_frozen(recipe, pipeline) if around else None

    def _validator(self, pipeline: Any, frozen: FeatureEncoder | None) -> Validator | None:
        if self.recipe.validation.every is None or not self.main:
            return None
        assert frozen is not None
        self.twin.attach(self.base)
        return Validator(self.recipe, pipeline, frozen.encoder, frozen.variant, self.twin, self._held_out_pictures())

    def _held_out_pictures(self) -> Iterator[Image.Image]:
        source = self.source or open_source(self.recipe.data)
        for index in self.supply.held_out.tolist():
            try:
                yield source.read(index).references[0]()
            except BadSample:
                continue

    def go(self) -> None:
        """Every step from the state on."""
        recipe, plan = self.recipe, self.recipe.optimization
        if self.main:
            self.lock = claimed(recipe.output)
        self.accelerator.wait_for_everyone()
        done = self._resume()
        if self.main:
            self.metrics.cut(done)
            self.trackers = open_trackers(recipe, done, self.watcher.warned)
        self._count(done)
        clock = Clock()
        sentry = Sentry(self._gathered, scaled=self.accelerator.scaler is not None)
        items = self.supply.items(done) if done < plan.steps else iter(())
        for step in range(done, plan.steps):
            with clock.waiting():
                parts = list(islice(items, plan.accumulate))
            self.seen += bad_of(parts)
            names = [name for part in parts for name in part["name"]]
            stepped = self.trainer.update(step, map(self.supply.compose, parts))
            sentry.watch(step + 1, names, stepped)
            clock.step(plan.batch_size)
            self.watcher.advanced(step + 1)
            last = step + 1 == plan.steps
            saving, validating = last or (step + 1) % recipe.save_every == 0, self._validates(step + 1)
            if saving or validating or (step + 1) % recipe.logging.every == 0:
                sentry.check()
                self._log(step + 1, clock, stepped.norm.item(), self._count(step + 1))
            with clock.paused():
                if validating:
                    self._validate(step + 1)
                if saving:  # last: what a state does not cover is told again when the run goes on
                    self._save(step + 1)

    def _resume(self) -> int:
        """Take up the latest state; give the steps done."""
        if self.state is None:
            return 0
        adapter, _ = load_adapter(self.state.folder, self.twin.family)
        self.trainer.load(adapter.state_dict(), self.state.training)
        if self.state.facts["samples"] != len(self.supply.reader):
            raise ImpromptError(
                f"{self.recipe.output} was begun with {self.state.facts['samples']:,} samples, the set has "
                f"{len(self.supply.reader):,} now: give another output, and start = {str(self.state.folder)!r} to go on from there"
            )
        return self.state.step

    def _validates(self, step: int) -> bool:
        return self.recipe.validation.every is not None and step % self.recipe.validation.every == 0

    def _gathered(self, mine: list[Any]) -> list[Any]:
        """The lists of all processes, joined."""
        from accelerate.utils import gather_object

        return gather_object(mine)

    def _count(self, step: int) -> int:
        """Tell of the bad samples that all processes met since the last time; give how many there are up to `step`."""
        met, self.seen = self._gathered(self.seen), []
        for error in self.bad.add(met, step):
            self.watcher.bad(error)
        return self.bad.count

    def _log(self, step: int, clock: Clock, norm: float, bad: int) -> None:
        loss, plain, by_timestep = self.trainer.tell()
        if not self.main:
            return
        row = Row(
            step=step,
            epoch=step * self.recipe.optimization.batch_size / self.supply.samples,
            loss=loss,
            plain_loss=plain,
            grad_norm=norm,
            learning_rate=self.trainer.optimizer.param_groups[0]["lr"],
            **clock.lap()._asdict(),
            peak_memory_gb=peak_memory_gb(self.device),
            bad=bad,
            by_timestep=by_timestep,
        )
        self.metrics.add(asdict(row))
        for tracker in self.trackers:
            tracker.log(row.scalars(), step)
        self.watcher.stepped(row)

    def _save(self, step: int) -> None:
        """All processes together: their parts are put together, and the first one writes."""
        facts: dict[str, Any] = {"recipe": self.recipe.model_dump(mode="json"), "samples": len(self.supply.reader)}
        with self.trainer.averaged():
            weights = self.trainer.weights()
            if self.recipe.data.held_out:
                facts["held_out_loss"] = self.held_out_loss()
                self._count(step)
        state = self.trainer.state()
        if self.main:
            self._wear(weights)
            origin = self.origin.model_copy(update={"training_steps": step})
            files: dict[str, Callable[[Path], None]] = {
                "adapter.safetensors": lambda path: save_adapter(path, self.twin, variant(self.recipe.variant), self.sites, origin),
                "training.pt": lambda path: torch.save(state, path),
            }
            if "held_out_loss" in facts:
                self._tell(step, {"held_out_loss": facts["held_out_loss"]})
            self.watcher.saved(save_state(self.recipe.output, step, files, facts, self.recipe.keep))
        self.accelerator.wait_for_everyone()

    def _wear(self, weights: dict[str, Tensor]) -> IPAdapter:
        self.twin.load_state_dict(weights)
        return self.twin

    def held_out_loss(self) -> float:
        """The same on every process, which all take all samples: sharded weights are gathered in every forward pass."""

        def losses(batch: Batch, u: Tensor) -> Tensor:
            index = self.trainer.objective.row(u.to(self.device).float())
            return self.trainer.losses(batch, index).plain[batch.weight > 0]

        def composed(item: Item) -> Batch:
            self.seen += bad_of([item])
            return self.supply.compose(item)

        batches = ((torch.from_numpy(numbers), composed(item)) for numbers, item in self.supply.held_out_items())
        with self.trainer.measuring():
            return held_out_loss(batches, losses, HELD_OUT_DRAWS)

    def _validate(self, step: int) -> None:
        with self.trainer.averaged():
            weights = self.trainer.weights()
        if self.validator is not None:
            self._wear(weights).to(self.device)
            path, scores = self.validator.grid(step)
            self.twin.cpu()
            self._tell(step, scores)
            for tracker in self.trackers:
                tracker.log_image("validation/grid", Image.open(path).convert("RGB"), step)
            self.watcher.validated(path, scores)
        self.accelerator.wait_for_everyone()

    def _tell(self, step: int, scores: dict[str, float]) -> None:
        self.metrics.add({"step": step, **scores})
        for tracker in self.trackers:
            tracker.log({f"validation/{name}": value for name, value in scores.items()}, step)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
        if self.lock is not None:
            self.lock.release()


def check_engine(accelerator: Any) -> None:
    """SettingError for a launcher's engine whose states could not be put together here."""
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM") or (kind == "FSDP" and not accelerator.is_fsdp2):
        raise SettingError(
            f"the launcher asks for {kind}: training runs on DDP (the default) or FSDP2 (accelerate launch --use_fsdp "
            "--fsdp_version 2); an adapter's weights and optimizer are small enough for either"
        )


def claimed(output: Path) -> FileLock:
    """The sole right to write into a run's folder, which ends with this process at the latest."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(output / ".lock", blocking=False).acquire().lock
    except Timeout as error:
        raise SettingError(f"another process is training into {output}: wait for it, or give another output") from error
