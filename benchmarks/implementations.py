"""The compared ways to make pictures: text-only diffusers, diffusers with its IP-Adapter, ours.

All have the same weights. Shape letters as in `imprompt.adapter`; B images, 2B with guidance: the
unconditional half first.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import random_models
from benchmarks.setting import PromptedSetting
from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.projections.resampler import Resampler
from imprompt.prompt import ImagePrompt
from imprompt.variants import find_variant

TEXT, PEER, IMPROMPT = "text only", "diffusers + IP-Adapter", "ours"
GUIDANCE = 7.5
PATCHES = 257  # hidden states of ViT-H: one a patch and one for the picture


@dataclass
class Scene:
    """One base model, its adapters, and the inputs of a step."""

    setting: PromptedSetting
    base: Any  # the UNet that all share the weights of
    adapters: Sequence[IPAdapter]
    latents: Tensor  # (2B, 4, h, w)
    text: Tensor  # (2B, T, D)
    added: Mapping[str, Tensor]  # SDXL's pooled text and sizes
    features: Tensor  # (pictures, E) or (pictures, patches, E): of each prompt
    nulls: Tensor  # of the same shape: "no image"

    def unet(self) -> Any:
        """Copy the base model's modules around the same weights.

        So image prompts can be given to each copy in its own way.
        """
        return copy.deepcopy(self.base, {id(weight): weight for weight in self.base.parameters()})

    def prompt_adapters(self) -> list[IPAdapter]:
        """Return the adapter of each prompt."""
        return [
            self.adapters[number % len(self.adapters)] for number in range(self.setting.prompts)
        ]

    def embeddings(self) -> Tensor:
        """Return diffusers' IP-Adapter's input for each prompt: embeddings (2B, pictures, ...)."""
        together = torch.stack([self.nulls, self.features]).to(self.base.dtype)
        return together.repeat_interleave(self.setting.batch, 0)

    def prompt(self, adapter: IPAdapter) -> ImagePrompt:
        """Return the scene's image prompt for an adapter of ours, which must be attached."""
        tokens, nulls = (
            adapter.tokens(shown).flatten(0, 1)[None] for shown in (self.features, self.nulls)
        )
        return adapter.prompt(tokens.repeat(self.setting.batch, 1, 1), nulls)


@dataclass
class Implementation:
    """A UNet with some way to give it image prompts, and the arguments of its calls."""

    unet: Any
    text: Tensor
    arguments: dict[str, Any] = field(default_factory=dict)

    def __call__(self, latents: Tensor, timestep: Tensor | int) -> Tensor:
        """Predict the noise once (2B, 4, h, w)."""
        return self.unet(latents, timestep, self.text, **self.arguments).sample


def scene(setting: PromptedSetting, adapters: int = 1, base: Any = None) -> Scene:
    """Build a scene with random weights of the published sizes on the setting's device.

    On the device "meta" weights have no contents.

    adapters  number of different adapters that the prompts use
    base      an existing UNet to use
    """
    of, dtype, double = setting.models, random_models.DTYPES[setting.precision], 2 * setting.batch
    with torch.device(setting.device):
        base = random_models.unet(of, dtype) if base is None else base
        known = find_variant(setting.variant)
        shape = (
            (of.vision["projection_dim"],)
            if known.feature == "pooled"
            else (PATCHES, of.vision["hidden_size"])
        )
        features, nulls = torch.randn(2, setting.pictures, *shape)
        added: dict[str, Tensor] = {}
        if of.pooled:
            sizes = torch.tensor(
                [setting.pixels, setting.pixels, 0, 0, setting.pixels, setting.pixels]
            )
            added = {
                "text_embeds": torch.randn(double, of.pooled, dtype=dtype),
                "time_ids": sizes.to(dtype).repeat(double, 1),
            }
        return Scene(
            setting=setting,
            base=base,
            adapters=[adapter_for(base, setting.variant, shape[-1]) for _ in range(adapters)],
            latents=torch.randn(double, 4, setting.side, setting.side, dtype=dtype),
            text=torch.randn(
                double, of.base.text_tokens, base.config.cross_attention_dim, dtype=dtype
            ),
            added=added,
            features=features,
            nulls=torch.zeros_like(nulls) if known.null == "zero embedding" else nulls,
        )


def adapter_for(base: Any, name: str, feature_dim: int) -> IPAdapter:
    """Build an adapter of a variant with random weights, on the default device."""
    kind: Any = Resampler if name == "plus" else ImageProjection
    projection = kind(feature_dim, base.config.cross_attention_dim)
    return IPAdapter.for_model(base, projection).requires_grad_(False)


def text_only(of: Scene) -> Implementation:
    """Return diffusers' UNet without an image prompt."""
    return Implementation(of.unet(), of.text, {"added_cond_kwargs": dict(of.added)})


def diffusers_ip_adapter(of: Scene) -> Implementation:
    """Return diffusers' UNet with its own IP-Adapter, loaded with the weights of our adapters."""
    unet = of.unet()
    layouts = [paper_layout(adapter) for adapter in of.prompt_adapters()]
    with torch.device(of.setting.device):
        unet._load_ip_adapter_weights(layouts, low_cpu_mem_usage=False)
    embeddings = [of.embeddings()] * len(layouts)
    return Implementation(
        unet, of.text, {"added_cond_kwargs": {**of.added, "image_embeds": embeddings}}
    )


def with_imprompt(of: Scene) -> Implementation:
    """Return a UNet with our adapters attached, and the image prompts prepared."""
    unet = of.unet()
    if of.setting.device == "cuda":
        # channels last as the package loads it; a copy, since the others share the base's weights
        unet = copy.deepcopy(of.base).to(memory_format=torch.channels_last)
    for adapter in of.adapters:
        adapter.detach()  # from the UNet of an earlier measurement
        adapter.attach(unet)
    prompts = [of.prompt(adapter) for adapter in of.prompt_adapters()]
    given: Any = prompts[0] if len(prompts) == 1 else prompts
    return Implementation(
        unet,
        of.text,
        {
            "added_cond_kwargs": dict(of.added),
            "cross_attention_kwargs": {"ip_hidden_states": given},
        },
    )


def stepper(of: Scene, implementation: Implementation) -> Callable[[], Tensor]:
    """Return a call that predicts the noise of the scene's latents once."""
    timestep = torch.tensor(500, device=of.setting.device)
    return torch.no_grad()(lambda: implementation(of.latents, timestep))


@torch.no_grad()
def prompt_arguments(of: Scene, name: str) -> dict[str, Any]:
    """Return the pipeline arguments that give the scene's first image prompt as an embedding.

    name  implementation whose UNet the pipeline has
    """
    if name == PEER:
        return {"ip_adapter_image_embeds": [torch.stack([of.nulls, of.features]).to(of.base.dtype)]}
    return (
        {"cross_attention_kwargs": {"ip_hidden_states": of.prompt(of.adapters[0])}}
        if name == IMPROMPT
        else {}
    )


def pipeline_arguments(setting: PromptedSetting, steps: int) -> dict[str, Any]:
    """Return the arguments that every pipeline is called with."""
    return {
        "prompt": "a picture of a thing",
        "num_images_per_prompt": setting.batch,
        "num_inference_steps": steps,
        "guidance_scale": GUIDANCE,
        "width": setting.pixels,
        "height": setting.pixels,
    }


IMPLEMENTATIONS: dict[str, Callable[[Scene], Implementation]] = {
    TEXT: text_only,
    PEER: diffusers_ip_adapter,
    IMPROMPT: with_imprompt,
}


def paper_layout(adapter: IPAdapter) -> dict[str, dict[str, Tensor]]:
    """Return the adapter in the layout of the paper's checkpoints.

    There, cross-attention i is attention processor 2i + 1.
    """
    image_kv = {
        f"{2 * number + 1}.to_{part}_ip.weight": getattr(kv, f"to_{part}").weight.detach()
        for number, kv in enumerate(adapter.image_kv)
        for part in "kv"
    }
    return {"image_proj": dict(adapter.projection.state_dict()), "ip_adapter": image_kv}
