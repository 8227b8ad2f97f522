"""What every stage of the world's training shares: a budget, a folder, a resumable loop."""

import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from imprompt.files import atomic_write
from imprompt.training.model import bf16_is_fast
from imprompt.training.muon import Muon, weight_matrices

from .glyphs import OWN, Glyphs, load_glyphs

HERE = Path(__file__).parent
BUDGETS = HERE / "budgets.toml"
SAVE_EVERY = 90.0  # seconds
# what a stage was called when states that may still be resumed were written, and its module in them
FORMER_NAMES = {"metric-encoder": "judge", "glyph-classifier": "namer", "style-classifier": "hands"}
FORMER_MODULES = {"namer.": "classifier."}
# names of layers between a model and data
ENDS = ("conv_in", "conv_out", "quant_conv", "patch_embedding", "heads", "temperature")


@dataclass(frozen=True)
class World:
    """A budget, the folder that the stages work in and the machine they run on.

    budgets  the files that say what a budget is, by its name: `budgets.toml`, and others beside it
    """

    budget: str
    folder: Path
    seed: int = 0
    most: int | None = (
        None  # steps of any stage, for a rehearsal: pools and pictures are then few as well
    )
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    budgets: tuple[Path, ...] = (BUDGETS,)

    @cached_property
    def plan(self) -> dict[str, Any]:
        plan: dict[str, Any] = {}
        for file in self.budgets:
            plan |= tomllib.loads(file.read_text())[self.budget]
        return plan if self.most is None else fewer(plan, self.most)

    def __getitem__(self, key: str) -> Any:
        return self.plan[key]

    @property
    def side(self) -> int:
        return self["side"]

    def glyphs(self, style: str = OWN) -> Glyphs:
        """The atlas in one drawing style, on this machine's device: scenes are drawn there.

        Drawn once, then read from the world's folder.
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
        """A generator that depends on the seed and the salt alone, so that a resumed run draws what
        it would have.
        """
        state = self.seed
        for number in salt:
            state = (state * 1_000_003 + number + 1) % 2**61
        return torch.Generator().manual_seed(state)


def fewer(plan: dict[str, Any], most: int) -> dict[str, Any]:
    """A budget with at most so many steps a stage, and as few scenes as they need."""
    stages = {
        key: value | {"steps": min(value["steps"], most)}
        for key, value in plan.items()
        if isinstance(value, dict) and "steps" in value
    }
    return plan | stages | {key: min(plan[key], 16 * most) for key in ("pool", "prompts")}


def rank() -> tuple[int, int]:
    """This process's number and how many there are (started by torchrun), or (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share_gradients(modules: nn.Module) -> None:
    """Average the gradients over the processes, in one message."""
    gradients = [p.grad for p in modules.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients]) / rank()[1]
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, level, then down to zero in the last third.

    While it is level `steps` may still be raised.
    """
    return peak * min((step + 1) / 100, 1.0, max(0.0, (1 - step / steps) * 3))


def optimizer_of(modules: nn.Module, lr: float, weight_decay: float) -> Muon:
    """Muon for the inner matrices and convolutions, AdamW for the rest: the first and last layers,
    norms, biases, embeddings.
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


def load_state(world: World, name: str) -> dict[str, Any] | None:
    """Return the last state of a stage, under its name or its former one; None if there is none."""
    names = [name, FORMER_NAMES.get(name, name)]
    files = [path for one in names if (path := world.folder / f"{one}.state").exists()]
    if not files:
        return None
    state = torch.load(files[0], weights_only=True, map_location=world.device)
    for former, now in FORMER_MODULES.items():
        state["modules"] = {
            now + key.removeprefix(former) if key.startswith(former) else key: value
            for key, value in state["modules"].items()
        }
    return state


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
    """Minimise the sum of the losses that `loss_of(step)` returns.

    Resumes from the last state in the world's folder.

    With `average` an exponential moving average of the weights is kept and returned in place of the
    last ones.
    """
    state_file = world.folder / f"{name}.state"
    modules.to(world.device).train()
    optimizer = optimizer_of(modules, lr, weight_decay)
    mean = {k: v.detach().clone() for k, v in modules.state_dict().items()} if average else {}
    start = 0
    if (state := load_state(world, name)) is not None:
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        mean, start = state["mean"], state["step"]
        print(f"{name}: resumed at step {start}", flush=True)

    def save(step: int) -> None:
        if rank()[0]:
            return
        state = {
            "modules": modules.state_dict(),
            "optimizer": optimizer.state_dict(),
            "mean": mean,
            "step": step,
        }
        with atomic_write(state_file) as temporary:
            torch.save(state, temporary)

    amp = bf16_is_fast()
    clock = saved = time.monotonic()
    counted = start
    seen: dict[str, float] = {}
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        with torch.autocast(world.device, torch.bfloat16, enabled=amp):
            losses = loss_of(step)
        total = torch.stack([value.float() for value in losses.values()]).sum()
        total.backward()
        if rank()[1] > 1:
            share_gradients(modules)
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if average:
            keep = min(average, (step + 1) / (step + 10))
            with torch.no_grad():
                for key, value in modules.state_dict().items():
                    mean[key].lerp_(value, 1 - keep) if value.is_floating_point() else mean[
                        key
                    ].copy_(value)
        if not total.isfinite():
            raise RuntimeError(
                f"{name}: the loss is {total.item()} at step {step}; the last state is {state_file}"
            )
        for key, value in losses.items():
            seen[key] = seen.get(key, value.item()) * 0.98 + value.item() * 0.02
        if (step + 1) % 50 == 0 and rank()[0] == 0:
            rate = (step + 1 - counted) * batch / (time.monotonic() - clock)
            clock, counted = time.monotonic(), step + 1
            means = "  ".join(f"{key} {value:.4f}" for key, value in seen.items())
            print(f"{name} {step + 1}/{steps}  {rate:.0f} samples/s  {means}", flush=True)
        if time.monotonic() - saved > SAVE_EVERY:
            save(step + 1)
            saved = time.monotonic()
    save(steps)
    if average:
        modules.load_state_dict(mean)
    return modules.eval()
