"""The training loop: one for all variants and families."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imprompt.adapter import IPAdapter
from imprompt.attention import family_of
from imprompt.checkpoint import Origin, load_adapter, save_adapter
from imprompt.encoders.vision import VisionEncoder
from imprompt.errors import ImpromptError, MismatchError, SettingError
from imprompt.files import check_folder
from imprompt.models import KnownModel, Place, find_model, open_pipeline
from imprompt.training.data import Features, batch_rows, encode, read_metadata, take
from imprompt.training.objective import Objective
from imprompt.training.recipe import Recipe
from imprompt.training.state import load_state, save_state
from imprompt.variants import Variant, variant

LOG_EVERY = 25  # steps


class Watcher:
    """What the loop tells as it goes; this one is silent."""

    def encoded(self, done: int, total: int) -> None: ...

    def stepped(self, step: int, steps: int, loss: float, rate: float) -> None: ...

    def saved(self, folder: Path) -> None: ...


class AdaptedModel(nn.Module):
    """The frozen base model heard through the adapter. Only the adapter is registered: it alone is trained and saved."""

    def __init__(self, base: nn.Module, adapter: IPAdapter) -> None:
        super().__init__()
        self.adapter = adapter.attach(base)
        self._base = (base.requires_grad_(False),)

    def forward(self, noisy: Tensor, t: Tensor, text: Tensor, image: Tensor) -> Tensor:
        """noisy (B, C, h, w), timesteps (B,), text (B, T, D), image features -> prediction (B, C, h, w)"""
        prompt = self.adapter.prompt(self.adapter.tokens(image))
        return self._base[0](noisy, t, text, cross_attention_kwargs={"ip_hidden_states": prompt}).sample


@dataclass(frozen=True)
class Outfit:
    """What a run trains with."""

    pipeline: Any
    encoder: VisionEncoder
    variant: Variant
    adapter: IPAdapter
    sites: list[str]


def outfit(recipe: Recipe, device: torch.device) -> Outfit:
    """Load the base model and the image encoder of a recipe, and start an adapter beside them."""
    from imprompt.encoders.vision import given_place, open_encoder

    model, row = find_model(recipe.model), variant(recipe.variant)
    pipeline = open_pipeline(model, device)
    if type(pipeline).__name__ != "StableDiffusionPipeline":
        raise SettingError(f"{recipe.model} is a {type(pipeline).__name__}; training knows StableDiffusionPipeline so far")
    place = given_place(recipe.encoder) if recipe.encoder else default_encoder(model)
    encoder = open_encoder(place, device, torch.float32)
    family = family_of(pipeline.unet)
    sites = family.sites(pipeline.unet)
    token_dim = next(iter(sites.values())).to_k.in_features
    sizes = {key: value for key, value in (("tokens", recipe.tokens), ("depth", recipe.depth)) if value is not None}
    torch.manual_seed(recipe.seed)
    projection = row.projection(encoder.feature_dim(row.feature), token_dim, **sizes)
    return Outfit(pipeline, encoder, row, IPAdapter.beside(pipeline.unet, family, projection), list(sites))


def default_encoder(model: KnownModel) -> Place:
    """The image encoder of a model's first adapter, or the one in the model's own folder."""
    if model.adapters:
        return next(iter(model.adapters.values())).encoder
    return Place(f"{model.base.repo}/image_encoder")


def train(recipe: Recipe, watcher: Watcher | None = None) -> Path:
    """Train to the end, from the latest state of `recipe.output` if there is one; give the folder of the last state."""
    from accelerate import Accelerator

    check_folder(recipe.output)
    read_metadata(recipe.data.folder)  # what is wrong is told before the models are loaded
    watcher, plan = watcher or Watcher(), recipe.optimization
    accelerator = Accelerator(mixed_precision=precision(plan.precision))
    processes, rank = accelerator.num_processes, accelerator.process_index
    if plan.batch_size % processes:
        raise SettingError(f"optimization.batch_size = {plan.batch_size} does not divide by {processes} processes")
    kit = outfit(recipe, accelerator.device)
    features = encode(recipe.data, kit.pipeline, kit.encoder, kit.variant, watcher.encoded)
    objective = Objective(kit.pipeline.scheduler)
    origin = Origin(
        base=recipe.model,
        encoder=kit.encoder.source,
        encoder_fingerprint=kit.encoder.fingerprint(),
        prediction_type=objective.prediction_type,  # pyright: ignore[reportArgumentType]
        licence=recipe.licence,
    )
    if accelerator.device.type == "cpu":
        kit.pipeline.unet.set_attn_processor(unfused())
    model = AdaptedModel(kit.pipeline.unet.to(memory_format=torch.channels_last).train(), kit.adapter)
    optimizer = torch.optim.AdamW(kit.adapter.parameters(), plan.learning_rate, weight_decay=plan.weight_decay)
    done = resume(recipe.output, kit.adapter, optimizer)
    wrapped, optimizer = accelerator.prepare(model, optimizer)

    def save(step: int) -> None:
        now = origin.model_copy(update={"training_steps": step})
        folder = save_state(
            recipe.output,
            step,
            lambda path: save_adapter(path, kit.adapter, kit.variant, kit.sites, now),
            optimizer.optimizer,
            recipe.keep,
        )
        watcher.saved(folder)

    clock, counted = time.monotonic(), done
    losses: list[Tensor] = []
    for step in range(done, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        batch = step_batch(step, recipe, features, kit.pipeline.vae.config.scaling_factor, rank, processes)
        generator = torch.Generator().manual_seed((recipe.seed * 1_000_003 + step) * 1_009 + rank)
        noisy, t, target = objective.corrupt(batch.latents.to(accelerator.device), generator)
        with accelerator.autocast():
            prediction = wrapped(noisy, t, batch.text.to(accelerator.device), batch.image.to(accelerator.device))
        loss = objective.loss(prediction, target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(kit.adapter.parameters(), plan.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        last = step + 1 == plan.steps
        if (step + 1) % LOG_EVERY == 0 or last:
            mean = torch.stack(losses).mean().item()
            if not math.isfinite(mean):
                raise ImpromptError(f"the loss is {mean} near step {step + 1}; the last good state is {recipe.output / 'latest'}")
            rate = (step + 1 - counted) * plan.batch_size / (time.monotonic() - clock)
            clock, counted, losses = time.monotonic(), step + 1, []
            if accelerator.is_main_process:
                log(recipe.output, {"step": step + 1, "loss": round(mean, 5), "samples_per_second": round(rate, 1)})
                watcher.stepped(step + 1, plan.steps, mean, rate)
        if ((step + 1) % recipe.save_every == 0 or last) and accelerator.is_main_process:
            save(step + 1)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return recipe.output / "latest"


def step_batch(step: int, recipe: Recipe, features: Features, scaling: float, rank: int, processes: int) -> Any:
    """This process's share of the step's batch; the batch of all processes is a function of step and seed alone."""
    plan = recipe.optimization
    rows = batch_rows(step, plan.batch_size, len(features), recipe.seed).chunk(processes)[rank]
    return take(
        features, rows, recipe.data, scaling, torch.Generator().manual_seed((recipe.seed * 1_000_033 + step) * 1_009 + rank)
    )


def resume(run: Path, adapter: IPAdapter, optimizer: torch.optim.Optimizer) -> int:
    """Continue from the latest state of the run; give the steps done."""
    if (state := load_state(run)) is None:
        return 0
    step, folder, optimizer_state = state
    saved, _ = load_adapter(folder, adapter.family)
    try:
        adapter.load_state_dict(saved.state_dict())
        optimizer.load_state_dict(optimizer_state)
    except (RuntimeError, ValueError) as error:
        raise MismatchError(f"{folder} is of another adapter than the recipe's: give another output, or the old recipe") from error
    return step


def unfused() -> Any:
    """diffusers' attention without the fused kernel, whose backward pass is slow on CPUs."""
    from diffusers.models.attention_processor import AttnProcessor

    return AttnProcessor()


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then constant or a cosine to zero."""
    plan = recipe.optimization
    warm = min(1.0, (step + 1) / (plan.warmup + 1))
    shape: dict[str, Callable[[], float]] = {
        "constant": lambda: 1.0,
        "cosine": lambda: 0.5 * (1 + math.cos(math.pi * step / plan.steps)),
    }
    return plan.learning_rate * warm * shape[plan.schedule]()


def precision(asked: str) -> str:
    """accelerate's name: bf16 where the machine is fast at it, if the recipe leaves it open."""
    if asked == "auto":
        return "bf16" if bf16_is_fast() else "no"
    return {"fp32": "no", "bf16": "bf16"}[asked]


def bf16_is_fast() -> bool:
    """On any recent GPU, and on CPUs with its instructions."""
    return torch.cuda.is_available() or bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def log(run: Path, row: dict[str, Any]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
