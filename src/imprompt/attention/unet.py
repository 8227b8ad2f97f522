"""Stable Diffusion 1.x, 2.x and SDXL: the UNet's `attn2` layers are the text cross-attentions (section 3.2.2).

Shape letters as in `adapter.py`; C is the width of the hidden states.
"""

from typing import Any

from torch import Tensor, nn

from imprompt.adapter import attention, split_heads
from imprompt.attention.graft import Graft, Step
from imprompt.errors import MismatchError


class DecoupledAttention:
    """diffusers' attention-processor call with the image's attention added. It holds no weights."""

    def __init__(self, site: int) -> None:
        self.site = site

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, temb: Tensor | None = None,  # noqa: ARG002 - diffusers passes it
                 ip_hidden_states: Step | None = None) -> Tensor:  # fmt: skip
        """hidden_states (B, L, C), encoder_hidden_states (B, T, D), mask (B·H, 1, T) or None -> (B, L, C)."""
        if not isinstance(ip_hidden_states, Step | None):
            raise MismatchError("give cross_attention_kwargs by name: the hook that prepares image prompts does not find them else")
        step, text = ip_hidden_states, hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            mask: Tensor = attn.prepare_attention_mask(attention_mask, text.shape[1], text.shape[0])
            attention_mask = mask.unflatten(0, (-1, attn.heads))
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        prepared = step.text[self.site] if step is not None and step.source is text else None
        key, value = prepared or (split_heads(attn.to_k(text), attn.heads), split_heads(attn.to_v(text), attn.heads))
        if step is None:
            out = attention(query, key, value, attention_mask)
        else:
            out = step.attention(self.site, query, key, value, attention_mask)
        out = out.transpose(1, 2).flatten(2)  # (B, H, L, d) -> (B, L, H·d)
        return attn.to_out[1](attn.to_out[0](out))


class UNetFamily:
    """See `imprompt.adapter.Family`."""

    name = "unet"
    arguments = ("sample", "timestep", "encoder_hidden_states")

    def matches(self, model: nn.Module) -> bool:
        return hasattr(model, "attn_processors") and hasattr(model, "down_blocks") and bool(self.sites(model))

    def sites(self, model: Any) -> dict[str, Any]:
        # attn_processors walks down blocks, up blocks, then the middle: the order of the published numbers.
        names = (name.removesuffix(".processor") for name in model.attn_processors)
        return {name: model.get_submodule(name) for name in names if name.endswith("attn2")}

    def processor(self, site: int) -> DecoupledAttention:
        return DecoupledAttention(site)

    def join(self, model: nn.Module) -> Graft:
        return Graft.of(model, self)

    def sizes(self, model: Any, height: int, width: int) -> list[tuple[int, int]]:
        levels = len(model.config.block_out_channels)  # each half of the one before, rounded up
        return [(-(-height // 2**level), -(-width // 2**level)) for level in range(levels)]


FAMILY = UNetFamily()
