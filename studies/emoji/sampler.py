"""The shipped parts together: `Sampler` samples many prompts at once in diffusers' own pipelines.

Shape letters: N pictures, S pixels a side.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from torch import Tensor

from imprompt.checkpoints.adapters import load_adapter, read_adapter
from imprompt.encoders.vision import open_encoder
from imprompt.families.base import family_of
from imprompt.models import Location
from imprompt.prompt import ImagePrompt
from worlds.emoji.assemble import SHIPPED
from worlds.emoji.control import EDGES
from worlds.emoji.scenes import to_image

from .measures import to_tensor

FRONT = "plus"
STEPS, GUIDANCE = 25, 3.0


class Condition(NamedTuple):
    """An image prompt for each of N results."""

    pictures: Tensor  # (N, 3, S, S)
    scale: float | Tensor = 1.0  # or by layer (layers,), the raw block map
    mask: Tensor | None = None  # (1, h, w)


class Sampler:
    """A base in diffusers' own pipelines with a shipped adapter attached.

    style  folder of a LoRA that fine-tunes the base to another drawing style
    """

    def __init__(self, style: Path | None = None, adapter: str = FRONT) -> None:
        self.pipe: Any = StableDiffusionPipeline.from_pretrained(SHIPPED)
        self.pipe.set_progress_bar_config(disable=True)
        if style is not None:
            self.pipe.load_lora_weights(style)
        self.encoder = open_encoder(Location(str(SHIPPED / "image_encoder")), "cpu", torch.float32)
        self.layers = list(family_of(self.pipe.unet).layers(self.pipe.unet))
        self.file = read_adapter(SHIPPED / "adapters" / f"{adapter}.safetensors")
        self.adapter = load_adapter(SHIPPED / "adapters" / f"{adapter}.safetensors", self.pipe.unet)
        self.adapter.attach(self.pipe.unet)

    @cached_property
    def controlled(self) -> Any:
        """The ControlNet pipeline of diffusers, over the same components."""
        net = ControlNetModel.from_pretrained(EDGES)
        pipe = StableDiffusionControlNetPipeline(
            **self.pipe.components, controlnet=net, requires_safety_checker=False
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def prompt(self, condition: Condition) -> ImagePrompt:
        """Encode a condition's pictures and build the adapter's image prompt."""
        images, feature = (
            [to_image(picture) for picture in condition.pictures],
            self.file.variant.feature,
        )
        tokens = self.adapter.tokens(self.encoder.features(images, feature))
        null = self.adapter.tokens(self.encoder.null_features(self.file.variant))
        return self.adapter.prompt(tokens, null, condition.scale)._replace(mask=condition.mask)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *conditions: Condition,
        texts: Sequence[str] = (),
        maps: Tensor | None = None,
        seed: int = 0,
        steps: int = STEPS,
    ) -> Tensor:
        """Sample `count` results (N, 3, S, S); result i has seed + i.

        maps  edge maps (N, 3, S, S) of the outlines that the ControlNet keeps
        """
        pipe = self.pipe if maps is None else self.controlled
        prompts = (
            {"ip_hidden_states": [self.prompt(one) for one in conditions]} if conditions else None
        )
        images = pipe(
            list(texts) or [""] * count,
            **({} if maps is None else {"image": maps}),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
            cross_attention_kwargs=prompts,
        ).images
        return to_tensor(images)
