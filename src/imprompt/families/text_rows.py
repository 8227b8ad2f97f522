"""Image prompts that are rows of the text: FLUX.1 Redux.

Redux projects every patch of a picture to a row as wide as the text, and the base model reads these
rows after those of the words. There are no keys or values of its own, and nothing is added to an
attention. The weight w of a prompt is continuous: log w is added to the scores of its rows in every
attention, so that 1 is what diffusers computes, 2 is as if each row were there twice, and at 0 no
rows are appended, which is the base model to the bit. Where a batch shares a call, every item has
its own weight.

With a mask, each of the picture's places attends to the image with its own weight, and rows of the
words with the least of these: where the mask leaves places out, words do not carry the image there.
Places that the mask leaves out are still reached through those inside, to which they attend.

Shape letters as in `imprompt.adapter`; R rows of the batch, K pictures, S rows of words, images and
latents together, I the picture's places.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imprompt.adapter import IPAdapter
from imprompt.attention.conditioning import resized, scale_at
from imprompt.errors import MismatchError
from imprompt.families.base import ModelCall, original
from imprompt.prompt import ImagePrompt

TEXT, IDS, LATENTS = "encoder_hidden_states", "txt_ids", "hidden_states"
KEYWORDS, MASK = "joint_attention_kwargs", "attention_mask"  # which reaches every attention


class TextRowsAdapter(IPAdapter):
    """Adapter that is a projection alone: its image tokens are rows of the text."""

    def check_fits(self, model: nn.Module) -> None:
        """Raise MismatchError, with both widths, unless the tokens are as wide as the text."""
        ours: Any = self.projection.down.out_features  # pyright: ignore
        theirs = original(model).config[self.form.text_rows]  # pyright: ignore
        if ours != theirs:
            raise MismatchError(
                f"this adapter makes rows of {ours}-wide text; the text of this model is {theirs} "
                "wide"
            )


class Weight(NamedTuple):
    """Weight of one prompt in one call.

    rows    (R or 1,)
    places  (R or 1, I): the share of it that the picture's places get, where there is a mask
    """

    rows: Tensor
    places: Tensor | None
    active: bool  # whether it is above 0 anywhere
    plain: bool  # whether it is 1 everywhere


def weights_of(
    prompts: Sequence[ImagePrompt], call: ModelCall, grid: tuple[int, ...]
) -> list[Weight]:
    """Return the weight of every prompt; this waits for the device once.

    Raise MismatchError for one that is below 0 or not the same in all layers.
    """
    scales = [scale_at(prompt.scale, call.place).float() for prompt in prompts]
    masks = [resized(prompt.mask, grid, torch.float32) for prompt in prompts]
    parts = [None if mask is None else mask[:, 0, :, 0] for mask in masks]
    facts = [
        (
            (scale < 0).any(),
            (scale != scale[:1]).any(),
            (scale[0] if part is None else scale[0, :, None] * part).any(),
            (scale == 1).all(),
        )
        for scale, part in zip(scales, parts, strict=True)
    ]
    found = []
    told = torch.stack([torch.stack(own) for own in facts]).tolist()
    for (below, uneven, active, plain), scale, part in zip(told, scales, parts, strict=True):
        if below or uneven:
            what = "below 0" if below else "not the same in all layers"
            raise MismatchError(
                f"a scale {what}: this image prompt is rows of the text, whose weight is one "
                "number, at least 0, for all layers"
            )
        found.append(Weight(scale[0], part, active, plain and part is None))
    return found


def with_rows(given: Mapping[str, Any], prompts: Sequence[ImagePrompt]) -> dict[str, Any]:
    """Return the arguments of a call with the prompts' rows after those of the words.

    Raise MismatchError if they are not as wide as these.
    """
    text, ids = given[TEXT], given[IDS]
    rows = [prompt.patches.flatten(1, 2) for prompt in prompts if prompt.patches is not None]
    if other := [own.shape[-1] for own in rows if own.shape[-1] != text.shape[-1]]:
        raise MismatchError(
            f"the image prompt is rows of {other[0]}-wide text; the text of this model is "
            f"{text.shape[-1]} wide"
        )
    more = [own.to(text).expand(len(text), -1, -1) for own in rows]
    places = ids.new_zeros(*ids.shape[:-2], sum(own.shape[1] for own in rows), ids.shape[-1])
    return {
        **given,
        TEXT: torch.cat([text, *more], 1),
        IDS: torch.cat([ids, places], -2),
    }


def with_bias(
    given: Mapping[str, Any],
    prompts: Sequence[ImagePrompt],
    weights: Sequence[Weight],
    picture: slice,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return the arguments of `with_rows` with the bias of all attentions, if there is one.

    picture  the picture's rows among all S

    Raise MismatchError if the call has another bias.
    """
    if all(one.plain for one in weights) and all(prompt.bias is None for prompt in prompts):
        return {**given}
    keywords = given.get(KEYWORDS) or {}
    if keywords.get(MASK) is not None:
        raise MismatchError(
            f"{KEYWORDS} has an {MASK}, which the weight of the image prompt would replace: leave "
            "it out, or give the image prompt weight 1"
        )
    text, latents = given[TEXT], given[LATENTS]
    size = text.shape[1] + latents.shape[1]
    masked = any(one.places is not None for one in weights)
    bias = torch.zeros(len(text), size if masked else 1, size, device=text.device)
    counts = [prompt.patches.shape[1:3].numel() for prompt in prompts if prompt.patches is not None]
    ends = accumulate(counts, initial=text.shape[1] - sum(counts))
    for prompt, weight, count, start in zip(prompts, weights, counts, ends, strict=False):
        own = slice(start, start + count)
        if weight.places is None:
            bias[:, :, own] = weight.rows.log()[:, None, None]
        else:
            seen = weight.places.amin(1, keepdim=True).repeat(len(text) // len(weight.places), size)
            seen[:, own], seen[:, picture] = 1, weight.places
            bias[:, :, own] = (weight.rows[:, None] * seen).log()[:, :, None]
        if prompt.bias is not None:
            bias[:, :, own] += prompt.bias[:, None]
    return {**given, KEYWORDS: {**keywords, MASK: bias[:, None].to(dtype)}}
