"""Transformers of the published sizes with random weights, and the compared ways to condition them.

They are the base alone, diffusers' own adapter where it has one, and ours. All share the weights of
the base. Shape letters as in `imprompt.adapter`; C channels.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models import attention_processor, embeddings
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor

from benchmarks.implementations import IMPROMPT, TEXT
from benchmarks.random_models import frozen
from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.families.base import family_of, find_family
from imprompt.families.forms import FORMS, AttentionForm
from imprompt.families.published import BASES, PIXART_SIGMA, SD35_MEDIUM
from imprompt.generation.compile import compile_base

PEER = "diffusers' adapter"
OURS_AS_PEER = "ours, in the form of diffusers' adapter"
EMBEDDING, TOKENS = 768, 4  # width of the image embedding, image tokens
PATCHES, SIGLIP, QUERIES = 729, 1152, 64  # what SD3's adapter reads: SigLIP's patches, and tokens
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class RandomTransformer:
    """A published transformer, and what a step of it is given.

    family  of base models
    config  of its class
    batch   rows of a step: two where its pipelines run guidance in one call
    text    text tokens
    side    of the latents, h and w
    form    published form of diffusers' adapter, if ours reads it
    """

    family: str
    config: Mapping[str, Any]
    batch: int
    text: int
    side: int
    form: AttentionForm | None = None


FLUX = BASES["flux-dev"].config
TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
TINY_FLUX = TINY | {"num_single_layers": 2, "axes_dims_rope": (4, 4, 8), "joint_attention_dim": 32}
TINY_SD3 = TINY | {"dual_attention_layers": (0,), "joint_attention_dim": 32}
XLABS = FORMS["xlabs"]
TRANSFORMERS = {
    "flux-dev": RandomTransformer("flux", FLUX, 1, 512, 128, XLABS),
    "sd3.5-medium": RandomTransformer("sd3", SD35_MEDIUM, 2, 333, 128),
    "pixart-sigma": RandomTransformer("pixart", PIXART_SIGMA, 2, 300, 128),
    # For a CPU and the tests.
    "flux-tiny": RandomTransformer("flux", FLUX | TINY_FLUX, 1, 8, 8, XLABS),
    "sd3-tiny": RandomTransformer(
        "sd3", SD35_MEDIUM | TINY_SD3 | {"caption_projection_dim": 32}, 2, 8, 8
    ),
    "pixart-tiny": RandomTransformer(
        "pixart", PIXART_SIGMA | TINY | {"cross_attention_dim": 32, "caption_channels": 32}, 2, 8, 8
    ),
}


class TransformerScene:
    """A base model on a device, the inputs of a step, and the calls that compute it."""

    def __init__(self, name: str, device: str, dtype: torch.dtype) -> None:
        self.of, self.device, self.dtype = TRANSFORMERS[name], device, dtype
        kind = find_family(self.of.family).classes[0]
        with torch.device(device), torch.no_grad():
            self.base = frozen(getattr(diffusers, kind)(**self.of.config), dtype)
            self.inputs = INPUTS[self.of.family](self)

    def noise(self, *shape: int) -> Tensor:
        """Return random numbers in the scene's precision."""
        return torch.randn(shape, dtype=self.dtype)

    def model(self) -> Any:
        """Copy the base model's modules around the same weights."""
        shared = [*self.base.parameters(), *self.base.buffers()]
        return copy.deepcopy(self.base, {id(weight): weight for weight in shared})

    def calls(self) -> dict[str, Callable[..., Call]]:
        """Return by name what makes the call of each implementation: one step without gradients.

        Their argument tells whether the model's forward pass is compiled, as the package does it.
        """
        made: dict[str, Callable[[], tuple[Any, Call]]] = {TEXT: self.alone}
        if self.of.family in PEERS:
            made[PEER] = partial(PEERS[self.of.family], self)
        made[IMPROMPT] = partial(self.ours, None)
        if self.of.form is not None:
            made[OURS_AS_PEER] = partial(self.ours, self.of.form)
        return {name: partial(made_call, make) for name, make in made.items()}

    def alone(self) -> tuple[Any, Call]:
        """Return the base model and its call."""
        model = self.model()
        return model, self.call(model)

    def call(self, model: Any, using: Callable[[], Any] = nullcontext, **given: Any) -> Call:
        """Return a call that computes a step; `given` makes more arguments anew in each call."""

        @torch.no_grad()
        def step() -> Tensor:
            with using():
                more = {name: make() for name, make in given.items()}
                return model(**self.inputs, **more, return_dict=False)[0]

        return step

    @torch.no_grad()
    def ours(self, form: AttentionForm | None) -> tuple[Any, Call]:
        """Return a model with our adapter, of a published form or None, and its call.

        The prompt is made once.
        """
        model = self.model()
        with torch.device(self.device):
            adapter = adapter_for(model, form).requires_grad_(False).to(self.dtype).attach(model)
            prompt = adapter.prompt(adapter.tokens(self.noise(self.of.batch, EMBEDDING)))
        return model, self.call(model, lambda: adapter.using(prompt))


def made_call(make: Callable[[], tuple[Any, Call]], compiled: bool = False) -> Call:
    """Return the call that `make` gives, with its model compiled or not."""
    model, call = make()
    if compiled:
        compile_base(model)
    return call


def adapter_for(model: Any, form: AttentionForm | None) -> IPAdapter:
    """Build an adapter with random weights, of a published form or None, on the default device."""
    family = family_of(model)
    sizes = {name: family.size(layer) for name, layer in family.layers(model).items()}
    if form is None:
        width = next(iter(sizes.values())).text
        return IPAdapter.for_model(model, ImageProjection(EMBEDDING, width, TOKENS))
    width = model.config.joint_attention_dim
    states = [form.states(width, size.inner, bias=True) for size in form.of(sizes).values()]
    return IPAdapter(ImageProjection(EMBEDDING, width, TOKENS), states, family, form=form)


def flux_inputs(scene: TransformerScene) -> dict[str, Any]:
    """Return the arguments of Flux's forward pass; latents are packed by 2 × 2."""
    of, config, half = scene.of, scene.base.config, scene.of.side // 2
    places = torch.cartesian_prod(torch.arange(1), torch.arange(half), torch.arange(half))
    return {
        "hidden_states": scene.noise(of.batch, half**2, config.in_channels),
        "encoder_hidden_states": scene.noise(of.batch, of.text, config.joint_attention_dim),
        "pooled_projections": scene.noise(of.batch, config.pooled_projection_dim),
        "timestep": torch.full((of.batch,), 0.5, dtype=scene.dtype),
        "guidance": torch.full((of.batch,), 3.5, dtype=scene.dtype),
        "img_ids": places.to(scene.dtype),
        "txt_ids": torch.zeros(of.text, 3, dtype=scene.dtype),
    }


def sd3_inputs(scene: TransformerScene) -> dict[str, Any]:
    """Return the arguments of Stable Diffusion 3's forward pass."""
    of, config = scene.of, scene.base.config
    return {
        "hidden_states": scene.noise(of.batch, config.in_channels, of.side, of.side),
        "encoder_hidden_states": scene.noise(of.batch, of.text, config.joint_attention_dim),
        "pooled_projections": scene.noise(of.batch, config.pooled_projection_dim),
        "timestep": torch.full((of.batch,), 500),
    }


def pixart_inputs(scene: TransformerScene) -> dict[str, Any]:
    """Return the arguments of PixArt's forward pass."""
    of, config = scene.of, scene.base.config
    return {
        "hidden_states": scene.noise(of.batch, config.in_channels, of.side, of.side),
        "encoder_hidden_states": scene.noise(of.batch, of.text, config.caption_channels),
        "encoder_attention_mask": torch.ones(of.batch, of.text),
        "timestep": torch.full((of.batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


INPUTS: dict[str, Callable[[TransformerScene], dict[str, Any]]] = {
    "flux": flux_inputs,
    "sd3": sd3_inputs,
    "pixart": pixart_inputs,
}


@torch.no_grad()
def xlabs_of_diffusers(scene: TransformerScene) -> tuple[Any, Call]:
    """Return a model and its call with diffusers' form of XLabs' adapter for Flux."""
    model, width = scene.model(), scene.base.config.joint_attention_dim
    with torch.device(scene.device):
        projection = embeddings.ImageProjection(EMBEDDING, width, TOKENS)
        model.encoder_hid_proj = frozen(
            embeddings.MultiIPAdapterImageProjection([projection]), scene.dtype
        )
        embedding = scene.noise(scene.of.batch, 1, EMBEDDING)
        made = {
            name: processor
            if name.startswith("single")
            else FluxIPAdapterAttnProcessor(model.inner_dim, width, (TOKENS,), dtype=scene.dtype)
            for name, processor in model.attn_processors.items()
        }
    model.set_attn_processor(made)
    # the model takes the embeddings out of the dictionary that it is given
    given = {"ip_adapter_image_embeds": [embedding]}
    return model, scene.call(model, joint_attention_kwargs=given.copy)


@torch.no_grad()
def instantx_of_diffusers(scene: TransformerScene) -> tuple[Any, Call]:
    """Return a model and its call with diffusers' form of InstantX' adapter for Stable Diffusion 3.

    The second attentions of SD3.5-medium keep their processors: no file has weights for them.
    """
    model, head = scene.model(), scene.base.config.attention_head_dim
    width = head * scene.base.config.num_attention_heads
    with torch.device(scene.device):
        model.image_proj = frozen(
            embeddings.IPAdapterTimeImageProjection(SIGLIP, width, num_queries=QUERIES), scene.dtype
        )
        patches = scene.noise(scene.of.batch, PATCHES, SIGLIP)
        made = {
            name: processor
            if name.endswith("attn2.processor")
            else frozen(
                attention_processor.SD3IPAdapterJointAttnProcessor2_0(width, width, head),
                scene.dtype,
            )
            for name, processor in model.attn_processors.items()
        }
    model.set_attn_processor(made)
    given = {"ip_adapter_image_embeds": patches}
    return model, scene.call(model, joint_attention_kwargs=given.copy)


PEERS: dict[
    str, Callable[[TransformerScene], tuple[Any, Call]]
] = {  # PixArt: diffusers has no adapter
    "flux": xlabs_of_diffusers,
    "sd3": instantx_of_diffusers,
}
