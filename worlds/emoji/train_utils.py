"""What the training stages share: budgets, folders and a resumable training loop."""

import time
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from imprompt.checkpoints.states import LATEST, state_at
from imprompt.files import atomic_write, lock_folder
from imprompt.training.endings import explained_termination
from imprompt.training.model import bf16_is_fast
from imprompt.training.muon import Muon, weight_matrices
from imprompt.training.state import save_state
from imprompt.training.step import Average, NaNGuard, Stepped
from imprompt.training.watch import Clock

from .glyphs import OWN, Glyphs, load_glyphs

HERE = Path(__file__).parent
BUDGETS = HERE / "budgets.toml"
SAVE_EVERY, LOG_EVERY = 90.0, 50  # seconds, steps
STATE = "training.pt"  # the file in a state's folder, named as in an adapter's
# former names of stages and of their modules, in older states that may still be resumed
FORMER_NAMES = {"metric-encoder": "judge", "glyph-classifier": "namer", "style-classifier": "hands"}
FORMER_MODULES = {"namer.": "classifier."}
# names of layers that take data or give results: Muon is for inner layers alone
ENDS = (
    "conv_in",
    "conv_out",
    "quant_conv",
    "patch_embedding",
    "heads",
    "temperature",
    "pos_embed",
    "x_embedder",
    "transformer.proj_out",
)


@dataclass(frozen=True)
class World:
    """A budget, the folder that the stages work in and the machine that they run on.

    budgets  the files that define a budget by its name: `budgets.toml`, and files that add to it
    """

    budget: str
    folder: Path
    seed: int = 0
    most: int | None = (
        None  # maximum steps of any stage, for a rehearsal; pools and pictures are then few as well
    )
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    budgets: tuple[Path, ...] = (BUDGETS,)

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The budget's settings by key, limited to `most` steps a stage if that is given."""
        plan: dict[str, Any] = {}
        for file in self.budgets:
            plan |= tomllib.loads(file.read_text())[self.budget]
        return plan if self.most is None else fewer(plan, self.most)

    def __getitem__(self, key: str) -> Any:
        return self.plan[key]

    @property
    def side(self) -> int:
        """Pixels a side of the world's pictures."""
        return self["side"]

    def glyphs(self, style: str = OWN) -> Glyphs:
        """Load the atlas of one drawing style onto this machine's device; scenes are drawn there.

        The atlas is drawn once and then read from the world's folder.
        """
        side = round(self.side * 0.875)
        path = self.folder / f"glyphs-{style}-{side}.pt"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            drawn = load_glyphs(style, side)
            with atomic_write(path) as temporary:
                torch.save(vars(drawn) | {"atlas": (drawn.atlas * 255).round().byte()}, temporary)
        glyphs = Glyphs(**torch.load(path, weights_only=True))
        return replace(glyphs, atlas=glyphs.atlas.to(self.device).float() / 255)

    def generator(self, *salt: int) -> torch.Generator:
        """Return a generator that depends on the seed and the salt alone.

        A resumed run therefore draws the same numbers as an uninterrupted one.
        """
        state = self.seed
        for number in salt:
            state = (state * 1_000_003 + number + 1) % 2**61
        return torch.Generator().manual_seed(state)


def fewer(plan: dict[str, Any], most: int) -> dict[str, Any]:
    """Limit a budget to `most` steps a stage, and to the few scenes that these need."""
    stages = {
        key: value | {"steps": min(value["steps"], most)}
        for key, value in plan.items()
        if isinstance(value, dict) and "steps" in value
    }
    return plan | stages | {key: min(plan[key], 16 * most) for key in ("pool", "prompts")}


def rank() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share_gradients(modules: nn.Module) -> None:
    """Average the gradients over the processes, in one message."""
    gradients = [p.grad for p in modules.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients]) / rank()[1]
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return a step's learning rate: linear warm-up over 100 steps, constant, then down to zero.

    It falls in the last third; as long as it is constant, `steps` may still be raised.
    """
    return peak * min((step + 1) / 100, 1.0, max(0.0, (1 - step / steps) * 3))


def optimizer_of(modules: nn.Module, lr: float, weight_decay: float) -> Muon:
    """Build an optimizer: Muon for inner matrices and convolutions, AdamW for all other weights.

    The others are the first and last layers, norms, biases and embeddings.
    """
    ends = {id(p) for name, p in modules.named_parameters() if any(end in name for end in ENDS)}
    matrices = [p for p in weight_matrices(modules) if id(p) not in ends]
    inner = {id(p) for p in matrices}
    return Muon(
        matrices,
        [p for p in modules.parameters() if id(p) not in inner],
        lr,
        weight_decay=weight_decay,
    )


class Training:
    """The modules of a stage with their optimizer and moving average: all that a state contains."""

    def __init__(
        self, modules: nn.ModuleDict, lr: float, weight_decay: float, average: float | None
    ) -> None:
        self.modules = modules
        self.optimizer = optimizer_of(modules, lr, weight_decay)
        self.average = Average(modules.parameters(), average) if average else None

    def state(self, step: int) -> dict[str, Any]:
        """Return what a run needs to continue after `step` steps."""
        averaged = self.average.means if self.average else []
        own = zip(self.modules.parameters(), averaged, strict=False)
        means = {id(parameter): mean for parameter, mean in own}
        # weights that are tied have a mean under each of their names
        names = self.modules.named_parameters(remove_duplicate=False)
        return {
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mean": {name: means[id(one)] for name, one in names if id(one) in means},
            "step": step,
        }

    def load(self, state: dict[str, Any]) -> int:
        """Load a state and return the number of steps that are done."""
        if self.average:
            self.modules.load_state_dict({**state["modules"], **state["mean"]})
            self.average.start(self.modules.parameters(), state["step"])
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"]

    def step(self, losses: dict[str, Tensor], lr: float) -> Stepped:
        """Take one optimizer step on the sum of the losses."""
        total = torch.stack([value.float() for value in losses.values()]).sum()
        total.backward()
        if rank()[1] > 1:
            share_gradients(self.modules)
        norm = nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.step(self.modules.parameters())
        return Stepped(total.detach(), norm)

    def finish(self) -> nn.ModuleDict:
        """Return the modules with their averaged weights, ready for use."""
        if self.average:
            with torch.no_grad():
                for own, mean in zip(self.modules.parameters(), self.average.means, strict=True):
                    own.copy_(mean)
        return self.modules.eval()


def load_state(world: World, name: str) -> dict[str, Any] | None:
    """Load the last state of a stage; None if there is none.

    Older states are files in the world's folder, some under a former name of the stage.
    """
    former = (world.folder / f"{one}.state" for one in (name, FORMER_NAMES.get(name, name)))
    files = (state_at(states_of(world, name) / LATEST) / STATE, *former)
    file = next((path for path in files if path.exists()), None)
    if file is None:
        return None
    state = torch.load(file, weights_only=True, map_location=world.device)
    for part in ("modules", "mean"):
        state[part] = {named_now(key): value for key, value in state[part].items()}
    return state


def named_now(key: str) -> str:
    """Return a weight's present name, given its name in a state, which may be a former one."""
    for old, new in FORMER_MODULES.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def states_of(world: World, name: str) -> Path:
    """Return the folder of a stage's states."""
    return world.folder / "states" / name


def fit(
    world: World,
    name: str,
    modules: nn.ModuleDict,
    loss_of: Callable[[int], dict[str, Tensor]],
    *,
    steps: int,
    lr: float,
    batch: int,
    average: float | None = None,
    weight_decay: float = 0.01,
) -> nn.ModuleDict:
    """Minimise the sum of the losses of `loss_of(step)`, starting from the stage's last state.

    Everything random in a step depends on the world's seed and the step alone: a resumed run gives
    the weights of an uninterrupted one. With `average` the weights returned are their exponential
    moving average.
    """
    modules.to(world.device).train()
    training = Training(modules, lr, weight_decay, average)
    folder, first = states_of(world, name), rank()[0] == 0
    with ExitStack() as stack:
        stack.enter_context(explained_termination(folder))
        if first:
            stack.callback(lock_folder(folder, "training into").release)
        start = 0
        if (state := load_state(world, name)) is not None:
            start = training.load(state)
            print(f"{name}: resumed at step {start}", flush=True)
        clock, guard, log = Clock(), NaNGuard(list, scaled=False), LossLog(name, steps)
        saved = time.monotonic()
        for step in range(start, steps):
            torch.manual_seed(world.generator(96, step, rank()[0]).initial_seed())
            with torch.autocast(world.device, torch.bfloat16, enabled=bf16_is_fast()):
                losses = loss_of(step)
            stepped = training.step(losses, learning_rate(step, steps, lr))
            guard.watch(step + 1, [f"those drawn for {name}"], stepped)
            clock.step(batch)
            log.add(losses)
            last = step + 1 == steps
            if (step + 1) % LOG_EVERY == 0 and first:
                log.print(step + 1, clock.lap().samples_per_second)
            if first and (last or time.monotonic() - saved > SAVE_EVERY):
                guard.check()
                with clock.paused():
                    files = {STATE: partial(torch.save, training.state(step + 1))}
                    save_state(folder, step + 1, files, {}, keep=1)
                saved = time.monotonic()
    return training.finish()


class LossLog:
    """Running means of a stage's losses, printed with its speed."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps
        self.means: dict[str, Tensor] = {}

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add the losses of a step to the running means; they stay on their device."""
        for key, value in losses.items():
            now = value.detach().float()
            self.means[key] = self.means.get(key, now).lerp(now, 0.02)

    def print(self, step: int, samples_per_second: float) -> None:
        """Print a line with the step, the samples per second and the mean losses."""
        means = "  ".join(f"{key} {value.item():.4f}" for key, value in self.means.items())
        pace = f"{samples_per_second:.0f} samples/s"
        print(f"{self.name} {step}/{self.steps}  {pace}  {means}", flush=True)
