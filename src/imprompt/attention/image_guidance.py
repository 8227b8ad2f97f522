"""A second guidance scale, for the image, on any pipeline with guidance for the text.

As in InstructPix2Pix (Brooks et al. 2022, arXiv 2211.09800, equation 3), with the image in the
place of the source picture:

    e(∅, ∅) + s_image (e(∅, image) − e(∅, ∅)) + s_text (e(text, image) − e(∅, image))

The pipeline calls the model with two branches. The model runs three, and returns two, from which
the pipeline's own formula computes that sum. A scale equal to the pipeline's own leaves the result
unchanged, except with `guidance_rescale`, which would measure another prediction. Each step costs
half as much again.
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
    """Convert the arguments of a call with two branches to those of a call with three.

    kept  cache of the converted text, which must be the same tensor in every step

    Raises MismatchError for a batch that has no two halves, the negative one first.
    """
    if family.positive_first:
        raise MismatchError(
            f"image guidance is not supported for base models of the {family.name} family, which "
            "take the branches of guidance in another order"
        )
    latents, _, text = family.arguments
    rows = len(given[latents])
    if rows % 2:
        raise MismatchError(
            "image guidance needs the two halves of classifier-free guidance; "
            f"this is a batch of {rows}"
        )

    def three(name: str, value: Any) -> Any:
        axis = family.axes.get(name, 0)

        def parts(tensor: Tensor) -> Tensor:
            # some tensors of a video are per frame
            if tensor.ndim <= axis or tensor.shape[axis] % rows:
                return tensor
            negative, positive = tensor.chunk(2, axis)
            # The middle third is the negative text, and the positive half of any other argument.
            middle = negative if name in family.text_arguments else positive
            return torch.cat([negative, middle, positive], axis)

        if name in family.shared:
            return value
        if name == text and not value.is_inference():
            return kept.get(lambda _: ([value], None), lambda: parts(value))
        return tree_map_only(Tensor, parts, value)

    return {name: three(name, value) for name, value in given.items()}


def in_halves(noise: Tensor, scale: float) -> Tensor:
    """Return a and b such that a + s_text (b − a) is the guided prediction for every s_text.

    That prediction is the sum in this module's docstring.

    noise  e(∅, ∅), e(∅, image) and e(text, image), concatenated
    """
    neither, image, both = noise.chunk(3)
    guided = torch.lerp(neither, image, scale)
    return torch.cat([guided, guided + (both - image)])
