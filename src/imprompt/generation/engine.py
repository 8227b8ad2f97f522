"""Run the base model for all requests that are active at the same time; only the engine calls it.

A request is a call of diffusers' own pipeline in which a `Seat` stands for the base model. Calls
that seats make at the same time become one call of the model: their rows are concatenated, each
with its own timestep, text and image prompts, and each seat gets its rows back. So requests with
other schedulers, steps, guidance and texts share batches, and can start and end between two steps,
while schedulers, tasks and pipelines stay diffusers'.

Shape letters: B rows of a call, C channels, h and w of the latents.
"""

import copy
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imprompt.attention.conditioning import for_rows
from imprompt.attention.image_guidance import in_halves, in_thirds
from imprompt.attention.injection import Scope
from imprompt.attention.text_cache import CachedValue
from imprompt.errors import MismatchError
from imprompt.families.base import Family, Injection, original
from imprompt.generation.schedule import SchedulerProgress
from imprompt.prompt import ImagePrompt, stack

PATIENCE = 0.2  # seconds that a call waits for requests that are between two steps


class Seat:
    """Stand-in for the base model in the pipeline of one request.

    prompts         image prompts for the rows of its calls
    image_guidance  a guidance scale for the image: see `imprompt.attention.image_guidance`; the
                    prompts are then for its branches
    """

    def __init__(self, engine: "Engine", prompts: Sequence[ImagePrompt] = (),
                 image_guidance: float | None = None) -> None:  # fmt: skip
        self.engine = engine
        self.scope = Scope(prompts, image_guidance)
        self.calls = 0
        self.caller = "pipeline"  # class of the pipeline that it is in
        self.progress = SchedulerProgress(None)  # of that pipeline's scheduler
        self.outside = False  # whether it holds the engine's lock `outside`
        self.waiting: SeatCall | None = None
        self.group: Hashable = None  # group of its last call, while it is in its loop
        self.read: dict[str, CachedValue] = {}  # values of tensors that no step changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base model for this request, together with other requests that wait."""
        given = self.engine.injection.by_name(args, kwargs)
        whole = given.pop("return_dict", True)
        scale = self.scope.image_guidance
        if scale is None:
            out = self.run(given)
        else:
            thirds = in_thirds(self.engine.family, given, self.scope.text_in_thirds)
            out = in_halves(self.run(thirds), scale)
        return SeatOutput(out) if whole else (out,)

    def run(self, given: dict[str, Any]) -> Tensor:
        """Run one call, conditioned on the image prompts."""
        self.calls += 1
        self.let_others_in()
        engine = self.engine
        latents, time, _ = engine.family.arguments
        given[time] = for_each_row(given[time], len(given[latents]))
        call = engine.family.call(engine.model, given, engine.injection.timesteps)
        positive = self.scope.branch(call, engine.family) if self.scope.prompts else None
        prompts = [self.progress.at_this_step(one, given[time]) for one in self.scope.prompts]
        try:
            prompts = [for_rows(prompt, call, positive) for prompt in prompts]
        except MismatchError as error:
            rows = max(prompt.rows for prompt in self.scope.prompts)
            raise MismatchError(
                f"a {self.caller} calls the base model with {call.rows} rows, and the image "
                f"prompts of this call are for {rows}: it runs the branches of guidance in a way "
                "of its own; give guidance=1, or another pipeline"
            ) from error
        return engine.submit(self, SeatCall(given, call.rows, prompts))

    def signature(self, call: "SeatCall") -> Hashable:
        """Return what must be equal in the arguments of two calls that share a batch."""
        family = self.engine.family

        def part(value: Any, name: str) -> Hashable:
            if name == family.arguments[1]:
                return None  # each row has its own timestep
            if name in family.lists and value is not None:
                return entry_key(value[0])
            if isinstance(value, Mapping):
                return tuple((key, part(own, key)) for key, own in sorted(value.items()))
            if isinstance(value, list | tuple):
                return tuple(part(own, name) for own in value)
            if not isinstance(value, Tensor):
                return value if isinstance(value, Hashable) else id(value)
            axis = family.axes.get(name, 0)
            if name not in family.shared and value.ndim and value.shape[axis] == call.rows:
                return value.dtype, (*value.shape[:axis], *value.shape[axis + 1 :])
            kept = self.read.setdefault(name, CachedValue())
            held = kept.get(lambda _: ([value], None), lambda: bytes_of(value))
            return value.dtype, tuple(value.shape), held

        return part(call.given, "")

    def keep_others_out(self) -> None:
        """Take the lock for encoding and decoding, which one request at a time may do."""
        if not self.outside:
            self.engine.outside.acquire()
            self.outside = True

    def let_others_in(self) -> None:
        """Release the lock that `keep_others_out` took."""
        if self.outside:
            self.outside = False
            self.engine.outside.release()

    def end_loop(self) -> None:
        """Leave the engine's batches and take the lock: what follows is after the sampling loop."""
        self.engine.leave(self)
        self.keep_others_out()


def bytes_of(value: Tensor) -> bytes:
    """Return the values of a tensor as bytes."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def for_each_row(timestep: Any, rows: int) -> Any:
    """Return a timestep for each row, from one for all or one for each branch of guidance."""
    if isinstance(timestep, Tensor) and timestep.numel() not in (1, rows):
        return timestep[:1].expand(rows)
    return timestep


def entry_key(value: Any) -> Hashable:
    """Return what must be equal in two entries of a list: shapes of tensors, values of the rest."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return tuple(map(entry_key, value)) if isinstance(value, list | tuple) else value


class SeatOutput(NamedTuple):
    """Output of a seat, read by name or by index as diffusers' own."""

    sample: Any


class SeatCall:
    """One call of the base model whose output a seat waits for."""

    def __init__(self, given: dict[str, Any], rows: int, prompts: Sequence[ImagePrompt]) -> None:
        self.given, self.rows, self.prompts = given, rows, list(prompts)
        self.out: Tensor | None = None
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether the call was run."""
        return self.out is not None or self.error is not None


class Engine:
    """Runner of a base model for all seats; several threads may share it."""

    def __init__(self, model: nn.Module, family: Family, injection: Injection) -> None:
        self.model, self.family, self.injection = model, family, injection
        self.changed = threading.Condition()
        self.seats: list[Seat] = []  # in their loops, in the order of arrival
        self.busy = False
        self.kept: dict[Hashable, CachedValue] = {}  # merged values that stay the same over steps
        self.outside = threading.RLock()  # encoding and decoding: one request at a time

    @property
    def device(self) -> torch.device:
        """Device on which the model computes."""
        return next(self.model.parameters()).device

    def use(self, model: nn.Module) -> None:
        """Call `model` from now on, if it has the same weights, such as a compiled one.

        Raise MismatchError if it is another model.
        """
        if model is self.model:
            return
        if original(model) is not original(self.model):
            raise MismatchError(
                "the pipeline's base model was exchanged: attach the adapters to the new one, by "
                "from_pipeline"
            )
        self.injection.hook(model)
        self.model = model

    def submit(self, seat: Seat, call: SeatCall) -> Tensor:
        """Submit a call and wait for its output.

        The thread that finds the model free runs all waiting calls of its group.
        """
        with self.changed:
            if seat not in self.seats:
                self.seats.append(seat)
            seat.waiting, seat.group = call, self.group(seat, call)
            self.changed.notify_all()
            patience = PATIENCE
            while not call.done:
                if self.busy:
                    self.changed.wait()
                elif self.complete(seat.group) or patience <= 0:
                    self.lead(
                        [one for one in self.seats if one.waiting and one.group == seat.group]
                    )
                elif not self.changed.wait(patience):
                    patience = 0
        if call.error is not None:
            raise call.error
        assert call.out is not None
        return call.out

    def complete(self, group: Hashable) -> bool:
        """Return whether all seats of the group wait, so that no other call is to come."""
        return all(seat.waiting for seat in self.seats if seat.group == group)

    def lead(self, seats: Sequence[Seat]) -> None:
        """Run the calls of these seats without holding the lock in the meantime."""
        calls = [seat.waiting for seat in seats if seat.waiting]
        self.busy = True
        self.changed.release()
        try:
            self.tick(calls)
        finally:
            self.changed.acquire()
            self.busy = False
            for seat in seats:
                if seat.waiting and seat.waiting.done:
                    seat.waiting = None
            self.changed.notify_all()

    def leave(self, seat: Seat) -> None:
        """Remove a seat whose loop has ended, so that no call waits for it."""
        with self.changed:
            if seat in self.seats:
                self.seats.remove(seat)
                seat.group = None
                self.changed.notify_all()

    def group(self, seat: Seat, call: SeatCall) -> Hashable:
        """Return what must be equal for calls to be run as one."""
        kinds = {id(prompt.low_rank) for prompt in call.prompts if prompt.low_rank}
        return frozenset(kinds), seat.signature(call)

    def tick(self, calls: Sequence[SeatCall]) -> None:
        """Run calls as one; if that fails, run each alone, so that only the faulty one fails."""
        try:
            outs = self.run(calls)
        except Exception as error:
            if len(calls) == 1:
                calls[0].error = error
                return
            for call in calls:
                self.tick([call])
            return
        for call, out in zip(calls, outs, strict=True):
            call.out = out

    def run(self, calls: Sequence[SeatCall]) -> Sequence[Tensor]:
        """Return the output (B, C, h, w) of every call."""
        if len(calls) == 1:
            return [self.model_output(calls[0].given, calls[0].prompts)]
        rows = [call.rows for call in calls]
        sets = [prompt for call in calls for prompt in call.prompts]
        prompts = self.keep(
            "prompts", [*sets, *rows], lambda: stack([(c.rows, c.prompts) for c in calls])
        )
        given = self.merged("", [call.given for call in calls], rows)
        out = self.model_output(given, prompts)
        if isinstance(out, Tensor):
            return out.split(rows)
        ends = [sum(rows[: number + 1]) for number in range(len(rows))]
        return [out[end - count : end] for end, count in zip(ends, rows, strict=True)]

    def model_output(self, given: Mapping[str, Any], prompts: Sequence[ImagePrompt]) -> Tensor:
        """Call the model with these arguments and image prompts, without gradients."""
        with torch.no_grad(), self.injection.using(prompts, timed=True):
            out = self.model(**given, return_dict=False)
        return out[0] if isinstance(out, tuple) else out

    def merged(self, path: str, values: Sequence[Any], rows: Sequence[int]) -> Any:
        """Merge the arguments of several calls into those of one call."""
        first, argument = values[0], path.rpartition(".")[2]
        if argument in self.family.shared:
            return first
        if argument in self.family.lists and first is not None:
            return [entry for value in values for entry in value]
        if isinstance(first, Mapping):
            return {
                name: self.merged(f"{path}.{name}", [value[name] for value in values], rows)
                for name in first
            }
        if isinstance(first, list | tuple):
            several = zip(*values, strict=True)
            return [self.merged(f"{path}.{n}", own, rows) for n, own in enumerate(several)]
        if argument == self.family.arguments[1] and torch.as_tensor(first).ndim < 2:
            # each row has its own timestep
            times = [torch.as_tensor(v, device=self.device) for v in values]
            return torch.cat([t.reshape(-1).expand(n) for t, n in zip(times, rows, strict=True)])
        if isinstance(first, Tensor):
            axis = self.family.axes.get(argument, 0)
            return self.keep(path, list(values), lambda: torch.cat(list(values), axis))
        return first

    def keep(self, path: str, sources: list[Any], compute: Callable[[], Any]) -> Any:
        """Return what the step before computed from the same sources, or compute it."""
        if path == "." + self.family.arguments[0]:  # latents are new in every step
            return compute()
        value = self.kept.setdefault(path, CachedValue())
        return value.get(lambda _: (sources, None), compute)

    @contextmanager
    def request(self, pipeline: Any, seat: Seat) -> Iterator[Any]:
        """Yield a copy of the pipeline with the seat as its base model and a scheduler of its own.

        Its work before and after the sampling loop is done for one request at a time. Raise
        MismatchError if the pipeline has image prompts and never called the base model.
        """
        own = copy.copy(pipeline)
        own.__dict__[self.family.component] = seat
        own.__dict__["scheduler"] = copy.deepcopy(pipeline.scheduler)
        seat.caller, seat.progress = type(pipeline).__name__, SchedulerProgress(own.scheduler)
        seat.keep_others_out()
        try:
            yield own
        finally:
            self.leave(seat)
            seat.let_others_in()
        if seat.scope.prompts and not seat.calls:
            raise MismatchError(
                "the image prompts never reached the base model: the pipeline did not call it"
            )
