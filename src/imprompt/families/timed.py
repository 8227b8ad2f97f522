"""Image prompts whose tokens depend on the time: keys and values are made at each step.

Some published adapters project an image to tokens by a network that is told the timestep, so that
keys and values cannot be made once. A prompt of theirs holds what does not depend on the time, the
patches, with the rows of a batch like any other part of a prompt, and no keys or values; its form
holds the adapter. Before each call of the model, `at_time` makes all layers' keys and values with
the timestep of that call, or of each row, and what follows is the same as for every other prompt.
So such prompts are scaled, masked, windowed, copied and stacked as others are. What changes keys
before a step, such as a scale that acts on them, is refused where it is asked for. A pickled prompt
holds its adapter's weights; a copied one shares them.

Shape letters as in `imprompt.adapter`; R rows, K pictures whose tokens are joined, P patches of
each, W their width.
"""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from imprompt.families.base import LayerSize
from imprompt.families.forms import AttentionForm
from imprompt.prompt import ImagePrompt


def at_time(
    prompt: ImagePrompt, timestep: Any, sizes: Mapping[str, LayerSize], dtype: torch.dtype
) -> ImagePrompt:
    """Return a prompt with the keys and values that it has at a timestep.

    timestep  (), (1,) or (R,) as the model gets it
    sizes     of the layers that the prompt's form conditions
    """
    form, patches = prompt.form, prompt.patches
    assert patches is not None
    time = torch.as_tensor(timestep, device=patches.device).reshape(-1) * form.time
    rows, pictures = max(len(patches), len(time)), patches.shape[1]
    tokens, moment = form.adapter.projection.at(
        patches.expand(rows, -1, -1, -1).flatten(0, 1),
        time.expand(rows).repeat_interleave(pictures),
    )
    tokens = tokens.unflatten(0, (rows, pictures)).flatten(1, 2)  # (R, K·N, D)
    made = [
        kv.at(tokens, size.heads, moment[::pictures])
        for kv, size in zip(form.adapter.image_kv, sizes.values(), strict=True)
    ]
    keys, values = zip(*made, strict=True)
    return prompt._replace(
        keys=tuple(key.to(dtype) for key in keys),
        values=tuple(value.to(dtype) for value in values),
        patches=None,
    )


def norms_of(form: AttentionForm | None, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Return, by layer, the weights (d,) of an adapter's own norms of query and keys, if any."""
    if form is None or form.adapter is None:
        return []
    return [
        tuple(attrgetter(name)(kv).to(dtype) for name in kv.norms) for kv in form.adapter.image_kv
    ]
