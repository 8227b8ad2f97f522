"""Autoencoders of base models: a row for each class of diffusers' ones.

Latents are those of a picture, (B, C, h, w), also where the autoencoder makes videos of it. Shape
letters as in `imprompt.adapter`; C channels of latents, h and w their height and width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from imprompt.errors import SettingError

Config = Mapping[str, Any]


class Normalization(NamedTuple):
    """Numbers, one or C of each, by which latents become (latents - shift) · scaling."""

    shift: tuple[float, ...]
    scaling: tuple[float, ...]


@dataclass(frozen=True)
class Autoencoder:
    """What is particular to one class of autoencoders.

    encode     (model, pixels (B, 3, H, W) in [-1, 1]) -> mean and standard deviation of the
               latents, (B, C, h, w), not normalised yet
    unit       (configuration) -> pixels a side that one latent stands for
    channels   (configuration) -> C
    normalize  (configuration) -> the normalisation that the base model was trained with
    """

    encode: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    unit: Callable[[Config], int]
    channels: Callable[[Config], int]
    normalize: Callable[[Config], Normalization]


def of_picture(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of a posterior."""
    posterior = vae.encode(pixels).latent_dist
    return posterior.mean, posterior.std


def of_one_frame(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation for a video of a single frame, (B, C, 1, h, w) there."""
    posterior = vae.encode(pixels[:, :, None]).latent_dist
    return posterior.mean[:, :, 0], posterior.std[:, :, 0]


def without_noise(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the latents of an autoencoder that is not variational; they deviate by zero."""
    latents = vae.encode(pixels).latent
    return latents, torch.zeros_like(latents)


def by_batch_norm(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, normalised by the statistics in the weights of Flux.2's.

    These are of the channels of 2 × 2 latents, packed.
    """
    mean, spread = (F.pixel_unshuffle(part, 2) for part in of_picture(vae, pixels))
    norm, epsilon = vae.bn, vae.config.batch_norm_eps
    deviation = (norm.running_var.view(-1, 1, 1) + epsilon).sqrt()
    mean = (mean - norm.running_mean.view(-1, 1, 1)) / deviation
    return F.pixel_shuffle(mean, 2), F.pixel_shuffle(spread / deviation, 2)


def by_levels(key: str) -> Callable[[Config], int]:
    """Return a unit that doubles with every level but the first; `key` lists their channels."""
    return lambda config: 2 ** (len(config[key]) - 1)


def by_factor(config: Config) -> Normalization:
    """Return the normalisation by one factor, and one shift if there is any."""
    return Normalization(
        (config.get("shift_factor") or 0.0,), (config.get("scaling_factor", 0.18215),)
    )


def by_channel(config: Config) -> Normalization:
    """Return the normalisation by each channel's mean and standard deviation."""
    scaling = tuple(1 / deviation for deviation in config["latents_std"])
    return Normalization(tuple(config["latents_mean"]), scaling)


def latent_channels(config: Config) -> int:
    """Return C as most configurations state it."""
    return config["latent_channels"]


AUTOENCODERS = {
    "AutoencoderKL": Autoencoder(
        of_picture, by_levels("block_out_channels"), latent_channels, by_factor
    ),
    "AutoencoderDC": Autoencoder(
        without_noise, by_levels("encoder_block_out_channels"), latent_channels, by_factor
    ),
    "AutoencoderKLQwenImage": Autoencoder(
        of_one_frame,
        lambda config: 2 ** len(config["temperal_downsample"]),
        lambda config: config["z_dim"],
        by_channel,
    ),
    "AutoencoderKLWan": Autoencoder(
        of_one_frame,
        lambda config: config["scale_factor_spatial"],
        lambda config: config["z_dim"],
        by_channel,
    ),
    "AutoencoderKLFlux2": Autoencoder(
        by_batch_norm,
        by_levels("block_out_channels"),
        latent_channels,
        lambda _config: Normalization((0.0,), (1.0,)),
    ),
}


def find_autoencoder(name: str) -> Autoencoder:
    """Return the row of a class of autoencoders; SettingError if training does not know it."""
    if name not in AUTOENCODERS:
        raise SettingError(
            f"training does not know the autoencoder {name}; it knows {', '.join(AUTOENCODERS)}"
        )
    return AUTOENCODERS[name]
