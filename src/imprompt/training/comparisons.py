"""Comparisons of losses that a run logs: of the base, and of references.

Every process takes all samples, because sharded weights are gathered in every forward pass. Shape
letters as in `imprompt.training.features`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from imprompt.errors import SettingError
from imprompt.training.batches import Batch
from imprompt.training.objective import Objective
from imprompt.training.validation import schedule_places

SAMPLES = 16  # that a comparison takes
DRAWS = 32  # timesteps that are measured in all, at least
PARTS = 4  # of these timesteps, ordered by their noise, in which the base is compared

Predict = Callable[[Tensor, Tensor, Batch], Tensor]
"""(noisy latents, timesteps, batch) -> the base's prediction, without an image prompt."""
Losses = Callable[[Batch, Tensor], Tensor]
"""(batch, schedule rows (B,)) -> plain losses (B,) of the adapted model."""


class BaseLosses(NamedTuple):
    """Loss of the frozen base by itself and of the best constant, at some timesteps."""

    timesteps: str  # such as "0-249"
    base: float
    constant: float


class ReferenceLosses(NamedTuple):
    """Loss of the adapted model with every sample's own reference, and with another sample's."""

    own: float
    shuffled: float


def drawn(objective: Objective, batches: Sequence[Batch]) -> Iterator[tuple[int, Tensor]]:
    """Yield every batch's number several times, with schedule rows (B,).

    The rows are spread evenly over what is trained at.
    """
    ends = torch.tensor([0, *(len(batch.names) for batch in batches)]).cumsum(0)
    draws = -(-DRAWS // int(ends[-1]))
    for number, batch in enumerate(batches):
        places = schedule_places(torch.arange(int(ends[number]), int(ends[number + 1])), draws)
        for u in places.to(batch.u).unbind(1):
            yield number, objective.draw(u)


@torch.no_grad()
def base_losses(
    batches: Sequence[Batch], objective: Objective, predict: Predict
) -> list[BaseLosses]:
    """Measure the frozen base's own loss beside that of the best constant prediction.

    It is measured in PARTS equal parts of the timesteps, drawn as training draws them, from the
    least noisy to the noisiest. The constant is one number per latent channel and part: the
    target's mean over the part's samples and places, so that its loss is the target's variance.
    The parts matter: a base that is told a time that runs backwards is right in the middle.

    Return an empty list if fewer than PARTS timesteps of samples can be measured.
    """
    rows: list[Tensor] = []  # of every sample: its schedule row and loss, its target's moments
    for number, index in drawn(objective, batches):
        batch = batches[number]
        noise = objective.shift(batch.noise, batch.offset)
        noisy, timesteps, target = objective.corrupt(batch.latents, noise, index)
        loss = objective.losses(predict(noisy, timesteps, batch), target, index).plain
        moments = [target.mean((2, 3)), target.square().mean((2, 3))]
        rows.append(torch.cat([torch.stack([index, loss], 1), *moments], 1)[batch.weight > 0])
    measured = torch.cat(rows).double().cpu()
    if len(measured) < PARTS:
        return []
    measured = measured[measured[:, 0].argsort(stable=True)]
    return [part_losses(part, objective.timesteps) for part in measured.tensor_split(PARTS)]


def part_losses(rows: Tensor, timesteps: Tensor) -> BaseLosses:
    """Return the losses of a part; its rows are (samples, 2 + 2 · C), see `base_losses`."""
    base, (mean, square) = rows[:, 1].mean(), rows[:, 2:].mean(0).chunk(2)
    ends = timesteps[rows[[0, -1], 0].long()].tolist()
    constant = (square - mean.square()).mean()
    return BaseLosses(f"{ends[0]:.0f}-{ends[1]:.0f}", base.item(), constant.item())


def check_base(parts: Sequence[BaseLosses]) -> None:
    """Raise SettingError, with both losses, unless the base's is below a constant's everywhere."""
    for part in parts:
        if part.base < part.constant:
            continue
        raise SettingError(
            f"the base model's own loss is {part.base:.4f} at timesteps {part.timesteps}, not "
            f"below the {part.constant:.4f} of the best constant prediction: the base is "
            "untrained, or the VAE's scaling, the time or the sign of its prediction is wrong; "
            "check_base = false trains all the same"
        )


@torch.no_grad()
def reference_losses(
    batches: Sequence[Batch], objective: Objective, losses: Losses
) -> ReferenceLosses | None:
    """Measure the loss with own references and with shuffled ones, at equal noise and timesteps.

    The losses are equal as long as the adapter adds nothing, or the same to every picture; own
    references below shuffled ones show that it follows them, which the loss alone does not.

    Return None if fewer than two samples could be read.
    """
    if sum(int((batch.weight > 0).sum()) for batch in batches) < 2:
        return None
    found: list[Tensor] = []  # of every sample that was read: (own, shuffled)
    others = shuffled(batches)
    for number, index in drawn(objective, batches):
        pair = torch.stack([losses(batch[number], index) for batch in (batches, others)], 1)
        found.append(pair[batches[number].weight > 0])
    return ReferenceLosses(*torch.cat(found).double().mean(0).tolist())


def shuffled(batches: Sequence[Batch]) -> list[Batch]:
    """Return the batches with the image features of the sample before, of those that were read."""
    read = torch.cat([batch.weight for batch in batches]) > 0
    giver = torch.arange(len(read), device=read.device)
    giver[read] = giver[read].roll(1)
    sizes = [len(batch.names) for batch in batches]
    images = {
        part: torch.cat([batch.image[part] for batch in batches])[giver].split(sizes)
        for part in batches[0].image
    }
    return [
        replace(batch, image={part: given[number] for part, given in images.items()})
        for number, batch in enumerate(batches)
    ]
