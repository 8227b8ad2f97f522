"""Choose the diffusers pipeline for a task, over the networks of the one that is loaded.

A task starts from text or from a picture, with or without ControlNet.
"""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from imprompt.errors import CheckpointError, MismatchError, SettingError, first_line
from imprompt.families.base import TaskTable, base_of, family_of
from imprompt.generation.memory import MemoryOptions
from imprompt.generation.settings import Resolved
from imprompt.models import KnownModel, Location, load_weights, may_be_on_hub, refuse_url

# parameters of a pipeline's constructor that are not components
FLAGS = ("requires_safety_checker", "force_zeros_for_empty_prompt", "is_distilled")


class InputImages(NamedTuple):
    """Pictures that a call starts from or keeps to, in addition to its image prompts."""

    init: Image.Image | None = None
    mask: Image.Image | None = None  # white where `init` is redrawn
    control: Image.Image | None = None  # for ControlNet: edges, depth, ...


def task(
    pipeline: Any, start: InputImages, settings: Resolved, controlnet: Any, savers: MemoryOptions
) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline for the call, over the same networks, and its picture and size options.

    Raise SettingError if the pictures, or the strength of the first, do not fit the pipeline.
    """
    if start.control is not None and controlnet is None:
        raise SettingError(
            "a control image and a ControlNet go together: open the model with controlnet=...; a "
            "pipeline of your own that has one "
            "takes its picture in pipeline_options"
        )
    if start.init is None and start.mask is not None:
        raise SettingError(
            "mask_image marks what to redraw of a picture: give that picture as init_image"
        )
    if start.init is None:
        kind, options = "text", {}
    else:
        if int(settings.steps * settings.strength) < 1:
            raise SettingError(
                f"strength {settings.strength} of {settings.steps} steps leaves no step to run: "
                "raise either"
            )
        kind, options = (
            "image",
            {"image": resized_to(start.init, settings), "strength": settings.strength},
        )
        if start.mask is not None:
            kind, options = "inpaint", options | {"mask_image": resized_to(start.mask, settings)}
    chosen = as_pipeline(pipeline, kind, controlnet, savers)
    takes = inspect.signature(chosen.__call__).parameters
    if start.control is not None:
        options |= {
            "control_image" if "control_image" in takes else "image": resized_to(
                start.control, settings
            ),
            "controlnet_conditioning_scale": settings.control_scale,
        }
    size = {"width": settings.width, "height": settings.height}
    return chosen, options | {name: side for name, side in size.items() if name in takes}


def resized_to(picture: Image.Image, settings: Resolved) -> Image.Image:
    """Return the picture in the size of the settings."""
    return picture.resize(settings.size, Image.Resampling.LANCZOS)


def as_pipeline(pipeline: Any, kind: str, controlnet: Any, savers: MemoryOptions) -> Any:
    """Return the pipeline for a kind of task, named as in `Tasks`, over the same networks.

    Raise SettingError if diffusers has none for this pipeline.
    """
    own, table = type(pipeline).__name__, tasks_of(pipeline)
    names = table.plain if controlnet is None else table.controlled
    name = getattr(names, kind, "")
    if name == own or (kind == "text" and controlnet is None):
        return pipeline
    if not name:
        with_what = "from text" if kind == "text" else "from pictures"
        raise SettingError(
            f"a {own} has its own way to start {with_what}: give pictures in pipeline_options"
        )
    flags = {flag: value for flag, value in pipeline.config.items() if flag in FLAGS}
    extra = {} if controlnet is None else {"controlnet": controlnet}
    other_kind = getattr(import_module("diffusers"), name)
    takes = inspect.signature(other_kind.__init__).parameters
    parts = {part: own for part, own in pipeline.components.items() if part in takes}
    other = other_kind(**parts, **flags, **extra)
    other.set_progress_bar_config(disable=True)
    savers.again(other)
    return other


def tasks_of(pipeline: Any) -> TaskTable:
    """Return diffusers' pipelines over the same networks; empty if none are known."""
    return family_of(base_of(pipeline)).pipelines.get(type(pipeline).__name__, TaskTable())


def open_controlnet(name: str, model: KnownModel, pipeline: Any, dtype: torch.dtype) -> Any:
    """Load a ControlNet for the pipeline's base model on the CPU.

    `name` is one of the model's ControlNets, a folder, or a Hub id. Raise SettingError for an
    unknown name, CheckpointError if it cannot be loaded, or MismatchError if it was made for
    another base model.
    """
    refuse_url(name)
    family = family_of(base_of(pipeline))
    if tasks_of(pipeline).controlled is None or family.control is None:
        raise SettingError(
            f"no ControlNet is known for a {type(pipeline).__name__}: leave controlnet out"
        )
    if name not in model.controlnets and not Path(name).is_dir() and not may_be_on_hub(name):
        known = f"one of {', '.join(model.controlnets)}, " if model.controlnets else ""
        raise SettingError(
            f"no ControlNet {name!r} for {model.name}: give {known}a folder, or a Hub id owner/name"
        )
    place = model.controlnets.get(name) or Location(name)
    source, subfolder = place.fetch_folder()
    # a class of diffusers itself, which runs no code of a folder
    network = getattr(import_module("diffusers"), family.control.model)
    try:
        net: Any = load_weights(
            source,
            lambda variant: network.from_pretrained(
                source, subfolder=subfolder, dtype=dtype, variant=variant
            ),
            (subfolder or "",),
        )
    except Exception as error:  # a folder can be wrong in any way
        raise CheckpointError(
            f"no ControlNet can be loaded from {place} ({first_line(error)})"
        ) from error
    for what, (theirs, ours) in family.control_sizes(net, pipeline).items():
        if listed(theirs) != listed(ours):
            raise MismatchError(
                f"the ControlNet {name} was made for a base model with {what} {theirs}; this one "
                f"has {ours}"
            )
    return net.eval().requires_grad_(False)


def listed(value: Any) -> Any:
    """Return a tuple as a list, as a configuration has it after it was read from a file."""
    return list(value) if isinstance(value, list | tuple) else value
