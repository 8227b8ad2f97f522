"""A guidance scale for the image beside the one for the text, on any pipeline with guidance.

As in InstructPix2Pix (Brooks et al. 2022, arXiv 2211.09800, equation 3), with the image in the
place of the source picture:

    e(∅, ∅) + s_image (e(∅, image) − e(∅, ∅)) + s_text (e(text, image) − e(∅, image))

The pipeline calls the model with two branches. Three are run, and two are given back, of which the
pipeline's own formula makes that sum. A scale equal to the pipeline's own gives what the pipeline
gives by itself, but with `guidance_rescale`, which would measure another prediction. Each step
costs half as much again.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from imprompt.attention.text_cache import CachedValue
from imprompt.errors import MismatchError
from imprompt.families.base import Family

BRANCHES = (0, -1, -1)  # of the image prompts: none, the image without the text, both


def in_thirds(family: Family, given: Mapping[str, Any], kept: CachedValue) -> dict[str, Any]:
    """Return the arguments of a call with two branches as those of one with three.

    kept  holds the text, which must be the same tensor in every step
    """
    latents, _, text = family.arguments
    rows = len(given[latents])
    if rows % 2:
        raise MismatchError(
            "image guidance is for the two halves of classifier-free guidance; "
            f"this is a batch of {rows}"
        )

    def three(name: str, value: Any) -> Any:
        def parts(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or len(tensor) % rows:  # some of a video are for each frame
                return tensor
            half = len(tensor) // 2
            # The negative text is read twice, of anything else the positive half.
            middle = 0 if name in family.text_arguments else half
            return torch.cat([tensor[:half], tensor[middle : middle + half], tensor[half:]])

        if name == text and not value.is_inference():
            return kept.get(lambda _: ([value], None), lambda: parts(value))
        return tree_map_only(Tensor, parts, value)

    return {name: three(name, value) for name, value in given.items()}


def in_halves(noise: Tensor, scale: float) -> Tensor:
    """Return a and b, so that a + s_text (b − a) is the sum above for every s_text.

    noise  e(∅, ∅), e(∅, image) and e(text, image), one after the other
    """
    neither, image, both = noise.chunk(3)
    guided = torch.lerp(neither, image, scale)
    return torch.cat([guided, guided + (both - image)])
