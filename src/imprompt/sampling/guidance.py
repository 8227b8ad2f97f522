"""A guidance scale for the image beside the one for the text, on any pipeline with classifier-free guidance.

As in InstructPix2Pix (Brooks et al. 2022, arXiv 2211.09800, equation 3), with the image in the place of the source picture:

    e(∅, ∅) + s_image (e(∅, image) − e(∅, ∅)) + s_text (e(text, image) − e(∅, image))

The pipeline sees its own two halves; hooks around the base model run three parts, and give back two of which the pipeline's own
formula makes that sum. Shape letters as in `imprompt.adapter`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from imprompt.adapter import ImagePrompt
from imprompt.attention.graft import Computed
from imprompt.attention.step import KEY
from imprompt.errors import MismatchError

TEXT = ("encoder_hidden_states", "added_cond_kwargs", "encoder_attention_mask", "class_labels")


@contextmanager
def image_guidance(model: nn.Module, scale: float) -> Iterator[None]:
    """Inside, a pipeline that runs `model` guides by the image with this scale, and by the text with its own guidance scale.

    Its image prompts must hold both halves. A scale equal to the pipeline's own gives what the pipeline gives by itself, but with
    `guidance_rescale`, which would measure another prediction. Each step costs half as much again.
    """
    kept: dict[str, Computed] = {}
    mine = threading.get_ident()  # another thread that runs the model meanwhile guides as it would

    def thirds(name: str, value: Any, batch: int) -> Any:
        """Tensors of both halves -> of three parts: no text and no image, no text, both."""

        def three(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or len(tensor) % batch:  # of a video some have an item for each frame
                return tensor
            half = len(tensor) // 2
            middle = 0 if name in TEXT else half  # the text's unconditional half is heard twice, anything else's conditional one
            return torch.cat([tensor[:half], tensor[middle : middle + half], tensor[half:]])

        # The text is the same tensor in every step, so that the graft knows it to be the same.
        if name == "encoder_hidden_states" and not value.is_inference():
            return kept.setdefault(name, Computed()).get(lambda _: ([value], None), lambda: three(value))
        return tree_map_only(Tensor, three, value)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != mine:
            return None
        given = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        batch = len(given["sample"])
        if batch % 2:
            raise MismatchError(f"image guidance is for the two halves of classifier-free guidance; this is a batch of {batch}")
        told = given.get("cross_attention_kwargs") or {}
        prompts = kept.setdefault(KEY, Computed()).get(lambda _: ([told.get(KEY)], None), lambda: in_thirds(told.get(KEY)))
        new = {name: thirds(name, value, batch) for name, value in given.items() if name != "cross_attention_kwargs"}
        return (), {**new, "cross_attention_kwargs": {**told, KEY: prompts}}

    def after(_: nn.Module, __: Any, out: Any) -> Any:
        if threading.get_ident() != mine:
            return None
        if isinstance(out, tuple):
            return (in_halves(out[0], scale), *out[1:])
        out.sample = in_halves(out.sample, scale)
        return out

    hooks = model.register_forward_pre_hook(before, with_kwargs=True, prepend=True), model.register_forward_hook(after)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def in_halves(noise: Tensor, scale: float) -> Tensor:
    """e(∅, ∅), e(∅, image), e(text, image) -> a and b, so that a + s_text (b − a) is the sum above for every s_text."""
    neither, image, both = noise.chunk(3)
    guided = torch.lerp(neither, image, scale)
    return torch.cat([guided, guided + (both - image)])


def in_thirds(prompts: Any) -> Any:
    """Image prompts of both halves -> of three parts, the last two with the image."""
    if isinstance(prompts, list | tuple) and not isinstance(prompts, ImagePrompt):
        return [in_thirds(prompt) for prompt in prompts]
    if prompts is None:
        return None
    if (batch := len(prompts.keys[0])) % 2:
        raise MismatchError(f"image guidance needs image prompts of both halves; this one is for a batch of {batch}")

    def three(tensor: Tensor, items: int = 0) -> Tensor:
        if tensor.shape[items] != batch:
            return tensor
        none, image = tensor.chunk(2, items)
        return torch.cat([none, image, image], items)

    return prompts._replace(
        keys=tuple(map(three, prompts.keys)),
        values=tuple(map(three, prompts.values)),
        scale=three(prompts.scale, 1),
        mask=None if prompts.mask is None else three(prompts.mask),
        bias=None if prompts.bias is None else three(prompts.bias),
    )
