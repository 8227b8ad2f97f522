"""Stage 3: a base model and its text encoders, trained together on the pool's latents.

`BASES` has a row for each kind: the UNet that the package contains, and two diffusion transformers
beside it. All are trained by one loop, by the objective that the package takes from the pipeline's
scheduler. Shape letters: N scenes, C channels of a latent, h latent pixels a side.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imprompt.families.base import pipeline_family
from imprompt.training.objective import Objective, emphasis
from imprompt.training.recipe import NoiseSettings

from .diffusion_transformers import build_dit, build_mmdit
from .pool import Pool, open_pool
from .train_utils import World, fit, rank
from .unet import build_unet_pipeline

TEXT_DROP = 0.12  # for classifier-free guidance
# extra weight of the figure over the background, in the loss of additions to the base
FIGURE = 3.0


class Base(NamedTuple):
    """A kind of base models.

    build    function that returns an untrained diffusers pipeline for a world
    trained  names of modules in states -> the pipeline's components that are trained
    folder   the trained pipeline's, in the world's folder
    """

    build: Callable[[World], Any]
    trained: Mapping[str, str]
    folder: str


BASES = {  # by the name of the stage, and of its settings in a budget
    "unet": Base(build_unet_pipeline, {"unet": "unet", "text": "text_encoder"}, "base"),
    "dit": Base(build_dit, {"transformer": "transformer", "text": "text_encoder"}, "dit"),
    "mmdit": Base(
        build_mmdit,
        {"transformer": "transformer", "text": "text_encoder_2", "pooled": "text_encoder"},
        "mmdit",
    ),
}


def relaxed(step: int, steps: int, first: float, last: float) -> float:
    """Return the extra weight of the figure at a step: `first`, then linearly to `last`.

    It changes in the last third of the steps.
    """
    return first + (last - first) * min(1.0, max(0.0, 3 * step / steps - 2))


class NoisyBatch(NamedTuple):
    """The training data of one step of a base, or of an addition to it."""

    noisy: Tensor  # (N, C, h, h)
    t: Tensor  # (N,), as the model takes timesteps
    target: Tensor  # (N, C, h, h), to be predicted
    figures: Tensor  # (N, 1, h, h)
    captions: list[str]
    index: Tensor  # (N,), of the scenes in their pool


def loss(prediction: Tensor, batch: NoisyBatch, figure: float = FIGURE) -> Tensor:
    """Compute the mean square error of a prediction (N, C, h, h), weighted by figure.

    Where the figure is, errors weigh 1 + `figure` times as much.
    """
    return ((prediction.float() - batch.target).square() * emphasis(batch.figures, figure)).mean()


def sample_batch(
    world: World,
    pool: Pool,
    objective: Objective,
    count: int,
    generator: torch.Generator,
    *,
    drop: float = TEXT_DROP,
) -> NoisyBatch:
    """Draw scenes of the pool and add noise at random timesteps, as the objective draws them.

    drop  share of the captions that are empty
    """
    index = pool.draw(count, generator)
    captions = pool.captions(index, drop, generator)
    latents = pool.latents[index].float()
    noise = torch.randn(latents.shape, generator=generator)
    rows = objective.draw(1 - torch.rand(count, generator=generator))
    parts = (*objective.corrupt(latents, noise, rows), pool.figures[index].float())
    noisy, t, target, covered = (part.to(world.device) for part in parts)
    return NoisyBatch(noisy, t, target, covered, captions, index)


def train(world: World, name: str) -> None:
    """Train the base of that name with its text encoders, and save its whole pipeline."""
    torch.manual_seed(world.seed + 3)
    plan, row, pool = world[name], BASES[name], open_pool(world)
    pipeline = row.build(world).to(world.device)
    family = pipeline_family(type(pipeline).__name__)
    model = getattr(pipeline, family.component)
    objective, here = Objective(pipeline.scheduler, NoiseSettings()), plan["batch"] // rank()[1]

    def losses(step: int) -> dict[str, Tensor]:
        generator = world.generator(21, step, rank()[0])
        batch = sample_batch(world, pool, objective, here, generator)
        texts = family.encode_text(pipeline, batch.captions)
        found = family.predict(model, None, batch.noisy, batch.t, texts)
        return {"loss": loss(found, batch, relaxed(step, plan["steps"], *plan["figure"]))}

    fit(
        world,
        name,
        nn.ModuleDict({key: getattr(pipeline, part) for key, part in row.trained.items()}),
        losses,
        steps=plan["steps"],
        lr=plan["lr"],
        batch=plan["batch"],
        average=0.999,
    )
    if rank()[0] == 0:
        pipeline.save_pretrained(world.folder / row.folder)
        for part in ("image_encoder", "feature_extractor"):  # which adapters are trained with
            shutil.copytree(
                world.folder / "clip" / part, world.folder / row.folder / part, dirs_exist_ok=True
            )
        print(f"{name}: the base model is saved")


train_unet, train_dit, train_mmdit = (partial(train, name=name) for name in BASES)
