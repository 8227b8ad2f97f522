"""Stage 3: the base model, a latent diffusion UNet and its text encoder, trained together.

It predicts v with a zero-SNR schedule. Shape letters: N scenes, C channels of a latent, h latent
pixels a side, T tokens of a text, D width of a text state.
"""

from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel

from imprompt.training.objective import emphasis

from .pool import Pool, open_pool
from .text import open_tokenizer
from .train_utils import World, fit, rank

TEXT_DROP = 0.12  # for classifier-free guidance
# extra weight of the figure over the background, in the loss of additions to the base
FIGURE = 3.0


def build_scheduler() -> DDIMScheduler:
    """Return the base's DDIM scheduler: v-prediction, zero SNR at the last timestep."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def build_unet(world: World) -> UNet2DConditionModel:
    """Build an untrained UNet with attention at the levels that the budget names.

    At the finest level, attention would cost as much as the whole rest.
    """
    plan = world["unet"]
    return UNet2DConditionModel(
        sample_size=world.side // 8,
        in_channels=world["vae"]["latent"],
        out_channels=world["vae"]["latent"],
        block_out_channels=plan["channels"],
        layers_per_block=plan["layers"],
        down_block_types=[("DownBlock2D", "CrossAttnDownBlock2D")[on] for on in plan["attention"]],
        up_block_types=[
            ("UpBlock2D", "CrossAttnUpBlock2D")[on] for on in reversed(plan["attention"])
        ],
        cross_attention_dim=world["text"]["width"],
        attention_head_dim=plan["heads"],
        norm_num_groups=plan["groups"],
    )


def relaxed(step: int, steps: int, first: float, last: float) -> float:
    """Return the extra weight of the figure at a step: `first`, then linearly to `last`.

    It changes in the last third of the steps.
    """
    return first + (last - first) * min(1.0, max(0.0, 3 * step / steps - 2))


class NoisyBatch(NamedTuple):
    """The training data of one step of the base, or of an addition to it."""

    noisy: Tensor  # (N, C, h, h)
    t: Tensor  # (N,)
    velocity: Tensor  # (N, C, h, h), to be predicted
    figures: Tensor  # (N, 1, h, h)
    ids: Tensor  # (N, T), of the captions
    index: Tensor  # (N,), of the scenes in their pool


def loss(v: Tensor, batch: NoisyBatch, figure: float = FIGURE) -> Tensor:
    """Compute the mean square error of a predicted velocity (N, C, h, h), weighted by figure.

    Where the figure is, errors weigh 1 + `figure` times as much.
    """
    return ((v.float() - batch.velocity).square() * emphasis(batch.figures, figure)).mean()


def sample_batch(
    world: World,
    pool: Pool,
    tokenizer: Any,
    scheduler: Any,
    count: int,
    generator: torch.Generator,
    *,
    drop: float = TEXT_DROP,
    power: float = 1.0,
) -> NoisyBatch:
    """Draw scenes of the pool and add noise at random timesteps.

    drop   share of the captions that are empty
    power  1 draws timesteps uniformly; larger values draw noisier ones more often
    """
    index = pool.draw(count, generator)
    words = pool.captions(index, drop, generator)
    ids = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
    x = pool.latents[index].float()
    noise = torch.randn(x.shape, generator=generator)
    share = 1 - torch.rand(count, generator=generator) ** power
    t = (
        (share * scheduler.config.num_train_timesteps)
        .long()
        .clamp_max(scheduler.config.num_train_timesteps - 1)
    )
    parts = (
        scheduler.add_noise(x, noise, t),
        t,
        scheduler.get_velocity(x, noise, t),
        pool.figures[index].float(),
        ids,
    )
    return NoisyBatch(*(part.to(world.device) for part in parts), index)


def train(world: World) -> None:
    """Train the UNet and its text encoder, and save the base model."""
    torch.manual_seed(world.seed + 3)
    plan, scheduler, pool = world["unet"], build_scheduler(), open_pool(world)
    tokenizer = open_tokenizer(world)
    # trained further, with the UNet
    text = CLIPTextModel.from_pretrained(world.folder / "clip" / "text_encoder").float()
    unet = build_unet(world)
    if world.device == "cpu":
        # attention this small is a third faster on a CPU without the fused kernel
        unet.set_attn_processor(AttnProcessor())
    here = plan["batch"] // rank()[1]

    def losses(step: int) -> dict[str, Tensor]:
        batch = sample_batch(
            world, pool, tokenizer, scheduler, here, world.generator(21, step, rank()[0])
        )
        v = unet(batch.noisy, batch.t, text(batch.ids).last_hidden_state, return_dict=False)[0]
        return {"v": loss(v, batch, relaxed(step, plan["steps"], *plan["figure"]))}

    modules = nn.ModuleDict({"unet": unet, "text": text})
    fit(
        world,
        "unet",
        modules,
        losses,
        steps=plan["steps"],
        lr=plan["lr"],
        batch=plan["batch"],
        average=0.999,
    )
    if rank()[0] == 0:
        vae = AutoencoderKL.from_pretrained(world.folder / "vae")
        pipeline = StableDiffusionPipeline(
            vae, text.float(), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
        )
        pipeline.save_pretrained(world.folder / "base")
        print("unet: the base model is saved")
