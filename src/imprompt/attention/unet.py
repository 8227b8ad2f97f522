"""Stable Diffusion 1.x, 2.x and SDXL: the UNet's `attn2` layers are the text cross-attentions (section 3.2.2).

Shape letters as in `adapter.py`; C is the width of the hidden states.
"""

from typing import Any

from torch import Tensor, nn

from imprompt.adapter import attention, split_heads
from imprompt.attention.graft import Graft
from imprompt.attention.lora import projected, text_states
from imprompt.attention.step import Step
from imprompt.errors import MismatchError


class DecoupledAttention:
    """diffusers' attention-processor call with the image's attention added. It holds no weights.

    At a self-attention, where `site` is None, it is diffusers' own attention, with the low-rank part that an adapter may have.
    """

    def __init__(self, attention: int, site: int | None) -> None:
        self.attention, self.site = attention, site

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
        lora = step.lora[self.attention] if step is not None and step.lora else None
        query = split_heads(projected(attn.to_q, hidden_states, lora and lora.to_q), attn.heads)
        prepared = step.text[self.site] if step is not None and self.site is not None and step.source is text else None
        key, value = prepared or text_states(attn, text, lora)
        if step is None or self.site is None:
            out = attention(query, key, value, attention_mask)
        else:
            out = step.attention(self.site, query, key, value, attention_mask)
        out = out.transpose(1, 2).flatten(2)  # (B, H, L, d) -> (B, L, H·d)
        return attn.to_out[1](projected(attn.to_out[0], out, lora and lora.to_out))


class UNetFamily:
    """See `imprompt.adapter.Family`."""

    name = "unet"
    arguments = ("sample", "timestep", "encoder_hidden_states")

    def matches(self, model: nn.Module) -> bool:
        return hasattr(model, "attn_processors") and hasattr(model, "down_blocks") and bool(self.sites(model))

    def attentions(self, model: Any) -> dict[str, Any]:
        # attn_processors walks down blocks, up blocks, then the middle: the order of the published numbers.
        names = (name.removesuffix(".processor") for name in model.attn_processors)
        ours = (name for name in names if name.endswith(("attn1", "attn2")) and "motion_modules" not in name.split("."))
        return {name: model.get_submodule(name) for name in ours}

    def sites(self, model: Any) -> dict[str, Any]:
        return {name: attention for name, attention in self.attentions(model).items() if name.endswith("attn2")}

    def processor(self, attention: int, site: int | None) -> DecoupledAttention:
        return DecoupledAttention(attention, site)

    def join(self, model: nn.Module, lora: bool = False) -> Graft:
        return Graft.of(model, self, lora)

    def sizes(self, model: Any, height: int, width: int) -> list[tuple[int, int]]:
        levels = len(model.config.block_out_channels)  # each half of the one before, rounded up
        return [(-(-height // 2**level), -(-width // 2**level)) for level in range(levels)]


FAMILY = UNetFamily()
