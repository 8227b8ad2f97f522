"""What every stage of the world's training shares: a budget, a place, a resumable loop."""

import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from imprompt.files import written_whole
from imprompt.training.model import bf16_is_fast

from .glyphs import Glyphs, load_glyphs

HERE = Path(__file__).parent
SAVE_EVERY = 90.0  # seconds


@dataclass(frozen=True)
class World:
    """A budget of `budgets.toml`, the folder that the stages work in and the machine they run on."""

    budget: str
    folder: Path
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def plan(self) -> dict[str, Any]:
        return tomllib.loads((HERE / "budgets.toml").read_text())[self.budget]

    def __getitem__(self, key: str) -> Any:
        return self.plan[key]

    @property
    def side(self) -> int:
        return self["side"]

    def glyphs(self) -> Glyphs:
        """The atlas, on this machine's device: scenes are drawn there."""
        glyphs = load_glyphs(self["glyphs"], round(self.side * 0.875))
        return replace(glyphs, atlas=glyphs.atlas.to(self.device))

    def generator(self, *salt: int) -> torch.Generator:
        """A generator that depends on the seed and the salt alone, so that a resumed run draws what it would have."""
        state = self.seed
        for number in salt:
            state = (state * 1_000_003 + number + 1) % 2**61
        return torch.Generator().manual_seed(state)


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
    """Linear warm-up over the first 3 %, then a cosine to zero."""
    warm = max(1, steps * 3 // 100)
    return peak * min((step + 1) / warm, 0.5 * (1 + cos(pi * min(step / steps, 1))))


def fit(world: World, name: str, modules: nn.ModuleDict, loss_of: Callable[[int], dict[str, Tensor]], *,
        steps: int, lr: float, batch: int, average: float | None = None, weight_decay: float = 0.01) -> nn.ModuleDict:  # fmt: skip
    """Minimise the sum of the losses that `loss_of(step)` returns; resumes from the last state in the world's folder.

    With `average` an exponential moving average of the weights is kept and returned in place of the last ones.
    """
    state_file = world.folder / f"{name}.state"
    modules.to(world.device).train()
    optimizer = torch.optim.AdamW(modules.parameters(), lr, weight_decay=weight_decay, fused=True)
    mean = {k: v.detach().clone() for k, v in modules.state_dict().items()} if average else {}
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=world.device)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        mean, start = state["mean"], state["step"]
        print(f"{name}: resumed at step {start}", flush=True)

    def save(step: int) -> None:
        if rank()[0]:
            return
        state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "mean": mean, "step": step}
        with written_whole(state_file) as aside:
            torch.save(state, aside)

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
                    mean[key].lerp_(value, 1 - keep) if value.is_floating_point() else mean[key].copy_(value)
        if not total.isfinite():
            raise RuntimeError(f"{name}: the loss is {total.item()} at step {step}; the last state is {state_file}")
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
