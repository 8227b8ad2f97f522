"""Which of diffusers' pipelines does what, over the networks of one that is loaded: from text, from a picture, with ControlNet."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from imprompt.errors import CheckpointError, MismatchError, SettingError, first_line
from imprompt.models import KnownModel, Place, may_be_on_hub
from imprompt.sampling.memory import Savers
from imprompt.sampling.settings import Resolved

TEXT, IMAGE, INPAINT = range(3)
# By the class that the model was saved with: the class for each task, and the same with ControlNet.
TASKS = {
    "StableDiffusionPipeline": (
        ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
        (
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetInpaintPipeline",
        ),
    ),
    "StableDiffusionXLPipeline": (
        ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
        (
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
        ),
    ),
}
FLAGS = ("requires_safety_checker", "force_zeros_for_empty_prompt")  # of a pipeline's constructor, beside its components


class Start(NamedTuple):
    """The pictures that a call starts from or keeps to, beside its image prompts."""

    init: Image.Image | None = None
    mask: Image.Image | None = None  # what of `init` is drawn anew
    control: Image.Image | None = None  # what ControlNet reads: edges, depth, ...


def task(pipeline: Any, start: Start, settings: Resolved, controlnet: Any, savers: Savers) -> tuple[Any, dict[str, Any]]:
    """The pipeline for the call, over the same networks, and what it takes beside the prompts. SettingError."""
    size = {"width": settings.width, "height": settings.height}
    if start.control is not None and controlnet is None:
        raise SettingError(
            "a control image and a ControlNet go together: open the model with controlnet=...; a pipeline of your own that has one "
            "takes its picture in pipeline_options"
        )
    if start.init is None and start.mask is not None:
        raise SettingError("mask_image says what to redraw of a picture: give that picture as init_image")
    if start.init is None:
        control = "image"  # the name by which each of these pipelines takes it
        kind, options = TEXT, size
    else:
        if int(settings.steps * settings.strength) < 1:
            raise SettingError(f"strength {settings.strength} of {settings.steps} steps leaves no step to run: raise either")
        control = "control_image"
        kind, options = IMAGE, {"image": fitted(start.init, settings), "strength": settings.strength}
        if start.mask is not None:
            kind, options = INPAINT, options | size | {"mask_image": fitted(start.mask, settings)}
    if start.control is not None:
        options |= {control: fitted(start.control, settings), "controlnet_conditioning_scale": settings.control_scale}
    return as_pipeline(pipeline, kind, controlnet, savers), options


def fitted(picture: Image.Image, settings: Resolved) -> Image.Image:
    return picture.resize(settings.size, Image.Resampling.LANCZOS)


def as_pipeline(pipeline: Any, kind: int, controlnet: Any, savers: Savers) -> Any:
    import diffusers

    own = type(pipeline).__name__
    if own not in TASKS:
        if kind != TEXT or controlnet is not None:
            raise SettingError(f"a {own} has its own way to start from pictures: give them in pipeline_options")
        return pipeline
    name = TASKS[own][controlnet is not None][kind]
    if name == own:
        return pipeline
    flags = {flag: value for flag, value in pipeline.config.items() if flag in FLAGS}
    extra = {} if controlnet is None else {"controlnet": controlnet}
    other = getattr(diffusers, name)(**pipeline.components, **flags, **extra)
    other.set_progress_bar_config(disable=True)
    savers.again(other)
    return other


def open_controlnet(name: str, model: KnownModel, pipeline: Any, dtype: torch.dtype) -> Any:
    """A ControlNet for the pipeline's UNet, on the CPU: one of the model's by name, a folder, or a Hub id.

    CheckpointError, or MismatchError if it was made for another base model.
    """
    from diffusers.models.controlnets.controlnet import ControlNetModel

    if name not in model.controlnets and not Path(name).is_dir() and not may_be_on_hub(name):
        known = f"one of {', '.join(model.controlnets)}, " if model.controlnets else ""
        raise SettingError(f"no ControlNet {name!r} for {model.name}: give {known}a folder, or a Hub id owner/name")
    place = model.controlnets.get(name) or Place(name)
    source, subfolder = place.fetch_folder()
    try:
        net: Any = ControlNetModel.from_pretrained(source, subfolder=subfolder, torch_dtype=dtype)
    except Exception as error:  # a folder can be wrong in any way
        raise CheckpointError(f"no ControlNet can be loaded from {place} ({first_line(error)})") from error
    sizes = {what: (net.config[what], pipeline.unet.config[what]) for what in ("cross_attention_dim", "block_out_channels")}
    shrinks = 2 ** (len(net.config.conditioning_embedding_out_channels) - 1)
    sizes["pixels a latent"] = shrinks, pipeline.vae_scale_factor
    for what, (theirs, ours) in sizes.items():
        if listed(theirs) != listed(ours):
            raise MismatchError(f"the ControlNet {name} was made for a base model with {what} {theirs}; this one has {ours}")
    return net.eval().requires_grad_(False)


def listed(value: Any) -> Any:
    """A configuration's tuple is a list after it was read from a file."""
    return list(value) if isinstance(value, list | tuple) else value
