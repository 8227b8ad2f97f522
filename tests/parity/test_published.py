"""Published adapters for transformers: their files, their sizes, and the pictures of the originals.

The reference is diffusers where it has the adapter, else attention written out from the original's
formula.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    ChromaTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.embeddings import apply_rotary_emb
from safetensors.torch import save_file
from torch import Tensor, nn

from imprompt.adapter import IPAdapter
from imprompt.checkpoints.adapters import (
    adapter_file,
    load_adapter,
    read_adapter,
    write_adapter,
)
from imprompt.checkpoints.published import check_form, module_tensors, published_layout
from imprompt.cli.adapters import LayoutName, convert
from imprompt.errors import CheckpointError, MismatchError, SettingError
from imprompt.families.base import find_family
from imprompt.families.forms import FORMS
from imprompt.families.published_files import PUBLISHED_LAYOUTS
from imprompt.projections.resampler import HEAD_DIM
from imprompt.variants import find_variant
from tests.tiny import seeded
from tests.zoo import answer, inputs_of, specimen

E, N = 8, 4  # width of the image embedding, image tokens
CLOSE = {"rtol": 0, "atol": 1e-5}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.5


def xlabs(width: int, inner: int, layers: int, tokens: int = N, embedding: int = E) -> Any:
    """A file as XLabs publishes it; every tensor is noise."""
    key = "double_blocks.{}.processor.ip_adapter_double_stream_{}_proj.{}"
    made = {
        "ip_adapter_proj_model.proj.weight": noise(tokens * width, embedding),
        "ip_adapter_proj_model.proj.bias": noise(tokens * width),
        "ip_adapter_proj_model.norm.weight": noise(width),
        "ip_adapter_proj_model.norm.bias": noise(width),
    }
    for layer in range(layers):
        for part in "kv":
            made[key.format(layer, part, "weight")] = noise(inner, width)
            made[key.format(layer, part, "bias")] = noise(inner)
    return made


def instantx(width: int, inner: int, layers: int, tokens: int = N, embedding: int = E) -> Any:
    made = {
        "image_proj.proj.0.weight": noise(2 * embedding, embedding),
        "image_proj.proj.0.bias": noise(2 * embedding),
        "image_proj.proj.2.weight": noise(tokens * width, 2 * embedding),
        "image_proj.proj.2.bias": noise(tokens * width),
        "image_proj.norm.weight": noise(width),
        "image_proj.norm.bias": noise(width),
    }
    for layer in range(layers):
        for part in "kv":
            made[f"ip_adapter.{layer}.to_{part}_ip.weight"] = noise(inner, width)
    return made


def hunyuandit(
    width: int, inner: int, layers: int, tokens: int = N, embedding: int = E, head: int = 8
) -> Any:
    made = {
        "ip_adapter_clip_len_trans_block.weight": noise(tokens * width, embedding),
        "ip_adapter_clip_len_trans_block.bias": noise(tokens * width),
        "ip_adapter_img_norm_cond.weight": noise(width),
        "ip_adapter_img_norm_cond.bias": noise(width),
    }
    for layer in range(layers):
        key = f"blocks.{layer}.attn2."
        made[key + "kv_proj_ip_adapter.weight"] = noise(2 * inner, width)
        made[key + "kv_proj_ip_adapter.bias"] = noise(2 * inner)
        made[key + "k_norm_ip_adapter.weight"] = noise(head)
        made[key + "k_norm_ip_adapter.bias"] = noise(head)
    return made


def time_resampler(width: int, tokens: int, embedding: int, inner: int, sinusoids: int) -> Any:
    """A resampler that is told the time, of four layers."""
    made = {
        "latents": noise(1, tokens, inner),
        "norm_out.weight": noise(width) + 1,
        "norm_out.bias": noise(width),
    }
    linears = {"proj_in": (inner, embedding), "proj_out": (width, inner)}
    linears |= {"time_embedding.linear_1": (inner, sinusoids)}
    linears |= {"time_embedding.linear_2": (inner, inner)}
    for layer in range(4):
        key, heads = f"layers.{layer}.", max(64, inner)
        for norm in ("0.norm1", "0.norm2", "1.0"):
            made |= {f"{key}{norm}.weight": noise(inner) + 1, f"{key}{norm}.bias": noise(inner)}
        made |= {
            f"{key}0.to_q.weight": noise(heads, inner),
            f"{key}0.to_kv.weight": noise(2 * heads, inner),
            f"{key}0.to_out.weight": noise(inner, heads),
            f"{key}1.1.weight": noise(4 * inner, inner),
            f"{key}1.3.weight": noise(inner, 4 * inner),
        }
        linears[f"{key}2.1"] = (4 * inner, inner)
    for name, sizes in linears.items():
        made |= {f"{name}.weight": noise(*sizes), f"{name}.bias": noise(sizes[0])}
    return made


def sd3(
    width: int,
    inner: int,
    layers: int,
    tokens: int = N,
    embedding: int = E,
    head: int = 8,
    inside: tuple[int, int] = (16, 8),
) -> Any:
    """A file as InstantX publishes it for SD3.5.

    inside  width of its resampler, and number of the time's sinusoids
    """
    projection = time_resampler(width, tokens, embedding, *inside)
    made = {f"image_proj.{key}": tensor for key, tensor in projection.items()}
    for layer in range(layers):
        key = f"ip_adapter.{layer}."
        made[key + "norm_ip.linear.weight"] = noise(2 * width, inside[0])
        made[key + "norm_ip.linear.bias"] = noise(2 * width)
        for part in "kv":
            made[f"{key}to_{part}_ip.weight"] = noise(inner, width)
        for norm in ("norm_q", "norm_k", "norm_ip_k"):
            made[f"{key}{norm}.weight"] = noise(head) + 1
    return made


def resampler(prefix: str, token_dim: int, width: int = 16, depth: int = 2) -> dict[str, Tensor]:
    made = {
        "latents": noise(1, N, width),
        "proj_in.weight": noise(width, E),
        "proj_in.bias": noise(width),
        "proj_out.weight": noise(token_dim, width),
        "proj_out.bias": noise(token_dim),
        "norm_out.weight": noise(token_dim),
        "norm_out.bias": noise(token_dim),
    }
    for layer in range(depth):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            made[f"layers.{layer}.{norm}.weight"] = noise(width)
            made[f"layers.{layer}.{norm}.bias"] = noise(width)
        made[f"layers.{layer}.0.to_q.weight"] = noise(HEAD_DIM, width)
        made[f"layers.{layer}.0.to_kv.weight"] = noise(2 * HEAD_DIM, width)
        made[f"layers.{layer}.0.to_out.weight"] = noise(width, HEAD_DIM)
        made[f"layers.{layer}.1.1.weight"] = noise(4 * width, width)
        made[f"layers.{layer}.1.3.weight"] = noise(width, 4 * width)
    return {prefix + key: tensor for key, tensor in made.items()}


def numbered(prefix: str, width: int, inner: int, layers: int) -> dict[str, Tensor]:
    names = [f"{prefix}{layer}.to_{part}_ip.weight" for layer in range(layers) for part in "kv"]
    return {name: noise(inner, width) for name in names}


def ai_toolkit(width: int, inner: int, layers: int) -> dict[str, Tensor]:
    return resampler("image_proj.", width) | numbered("ip_adapter.", width, inner, layers)


def ai_toolkit_pixart(width: int, inner: int, layers: int) -> dict[str, Tensor]:
    """Tokens as wide as the text before the model's own projection."""
    return resampler("image_proj.", width) | numbered("ip_adapter.", inner, inner, layers)


def lynx(width: int, inner: int, layers: int) -> dict[str, Tensor]:
    return resampler("resampler.", width) | numbered("ip_layers.", width, inner, layers)


def character(
    width: int,
    inner: int,
    layers: int,
    tokens: int = N,
    embedding: int = 64,
    head: int = 16,
    inside: tuple[int, int] = (16, 8),
    blocks: int = 2,
) -> Any:
    """A file as InstantCharacter is published.

    blocks  number of each of the two kinds in its projection
    """
    read = time_resampler(width, tokens, embedding, *inside)
    made = {f"resampler.{key}": tensor for key, tensor in read.items()}
    for name in ("proj", "proj_cross_layer", "proj_cross_scale"):
        made |= linear(f"{name}.fc1", 2 * embedding, embedding)
        made |= linear(f"{name}.fc2", embedding, 2 * embedding)
    for number in range(blocks):
        for key in (f"cross_layer_blocks.{number}.", f"cross_scale_blocks.{number}."):
            for norm in ("norm1", "norm2", "norm3"):
                made[f"{key}{norm}.weight"] = noise(embedding) + 1
                made[f"{key}{norm}.bias"] = noise(embedding)
            for attention in ("attn1", "attn2"):
                for part in ("to_q", "to_k", "to_v"):
                    made[f"{key}{attention}.{part}.weight"] = noise(embedding, embedding)
                made |= linear(f"{key}{attention}.to_out.0", embedding, embedding)
            made |= linear(f"{key}ff.net.0.proj", 8 * embedding, embedding)
            made |= linear(f"{key}ff.net.2", embedding, 4 * embedding)
    made = {f"image_proj.{key}": tensor for key, tensor in made.items()}
    for layer in range(layers):
        key = f"ip_adapter.{layer}."
        for part in "kv":
            made |= linear(f"{key}to_{part}_ip", inner, width)
        made[key + "norm_ip_q.scale"] = noise(head) + 1
        made[key + "norm_ip_k.scale"] = noise(head) + 1
    return made


def linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
    return {
        f"{name}.weight": noise(rows, columns) * columns**-0.5,
        f"{name}.bias": noise(rows),
    }


PATCHES = 5  # rows of a feature that is not pooled
POOLED, HIDDEN = [(2, E)], [(2, PATCHES, E)]
# family, (text width, width of the heads together, layers of the specimen), maker, shapes of the
# features
KINDS: dict[str, tuple[str, tuple[int, ...], Callable[..., Any], list[tuple[int, ...]]]] = {
    "xlabs": ("flux", (32, 32, 2), xlabs, POOLED),
    "xlabs on chroma": ("chroma", (32, 32, 2), xlabs, POOLED),
    "instantx": ("flux", (32, 32, 4), instantx, POOLED),
    "hunyuandit": ("hunyuandit", (8, 16, 2), hunyuandit, POOLED),
    "instantx-sd3": ("sd3", (32, 32, 3), sd3, HIDDEN),
    "instantcharacter": (
        "flux",
        (32, 32, 4),
        character,
        [(2, 3 * PATCHES, 64), (2, PATCHES, 64), (2, 4 * PATCHES, 64)],
    ),
    "ai-toolkit": ("flux", (32, 32, 4), ai_toolkit, HIDDEN),
    "ai-toolkit-pixart": ("pixart", (8, 16, 2), ai_toolkit_pixart, HIDDEN),
    "lynx": ("wan", (10, 24, 1), lynx, POOLED),
}


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Write a file as it is published: Lynx' is two in a folder."""
    if "resampler.latents" not in tensors:
        save_file(tensors, path)
        return path
    path.mkdir(exist_ok=True)
    for name, prefix in (("resampler", "resampler."), ("ip_layers", "ip_layers.")):
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        save_file(own, path / f"{name}.safetensors")
    return path


class Kind:
    def __init__(self, name: str, folder: Path) -> None:
        self.family, sizes, make, features = KINDS[name]
        with seeded(11):
            self.tensors = make(*sizes)
            self.path = saved(folder / "adapter.safetensors", self.tensors)
            parts = tuple(map(torch.randn, features))
            self.embedding: Any = parts if len(parts) > 1 else parts[0]
        self.model, self.inputs = specimen(self.family), inputs_of(self.family, 2)
        self.adapter = load_adapter(self.path, self.model)

    def ours(self, scale: float = 0.7, adapter: IPAdapter | None = None, **fields: Any) -> Tensor:
        adapter = adapter or self.adapter
        with torch.no_grad(), adapter.attached(self.model):
            prompt = adapter.prompt(adapter.tokens(self.embedding), scale=scale)
            with adapter.using(prompt._replace(**fields)):
                return answer(self.model, self.inputs)

    def alone(self) -> Tensor:
        with torch.no_grad():
            return answer(self.model, self.inputs)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    return Kind(request.param, tmp_path)


def test_idle_at_scale_zero_and_detached_the_base_is_bit_equal(kind: Kind) -> None:
    alone = kind.alone()
    assert torch.equal(kind.ours(0.0), alone)
    assert (kind.ours() - alone).abs().max() > 0.05
    assert torch.equal(kind.alone(), alone)


def test_it_is_read_written_and_converted_without_loss(kind: Kind, tmp_path: Path) -> None:
    file = read_adapter(kind.path)
    assert file.parameters == sum(tensor.numel() for tensor in kind.tensors.values())
    assert file.tokens == N
    back, own = tmp_path / "back.safetensors", tmp_path / "own.safetensors"
    write_adapter(back, file, file.layout)
    again = read_adapter(back)
    assert again.layout == file.layout
    for one, other in zip(file.tensors, again.tensors, strict=True):
        assert torch.equal(one, other)
    family = find_family(kind.family)
    layers = [*kind.adapter.form.of(family.layers(kind.model))]
    write_adapter(own, file, layers=layers)
    converted = load_adapter(own, kind.model)
    assert torch.equal(kind.ours(adapter=converted), kind.ours())
    live = adapter_file(kind.adapter, file.variant, layers)
    write_adapter(own, live)
    assert torch.equal(kind.ours(adapter=load_adapter(own, kind.model)), kind.ours())


def test_a_mask_limits_it_to_the_picture(kind: Kind) -> None:
    assert torch.equal(kind.ours(mask=torch.zeros(1, 4, 4)), kind.alone())


def test_an_item_without_a_mask_is_the_same_beside_one_with_a_mask(kind: Kind) -> None:
    """Where text is conditioned too, others in the batch do not change whether it is."""
    half = torch.ones(4, 4)
    half[:, 2:] = 0
    plain, masked = kind.ours(), kind.ours(mask=half[None])
    both = kind.ours(mask=torch.stack([torch.ones(4, 4), half]))
    torch.testing.assert_close(both[0], plain[0], **CLOSE)
    torch.testing.assert_close(both[1], masked[1], **CLOSE)
    assert not torch.allclose(plain[1], masked[1], atol=1e-4)


def test_what_does_not_fit_is_one_line(kind: Kind, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="this adapter is for base models of the"):
        load_adapter(kind.path, specimen("sana"))
    with pytest.raises(SettingError, match="by its tensors, not full"):
        read_adapter(kind.path, "full")
    damaged = tmp_path / "damaged.safetensors"
    last = list(kind.tensors)[-1]
    saved(damaged, {key: one for key, one in kind.tensors.items() if key != last})
    with pytest.raises(CheckpointError, match=f"lacks .*{last.split('.')[-2]}"):
        read_adapter(damaged)
    saved(damaged, kind.tensors | {last: torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"has shape|do not fit together"):
        read_adapter(damaged)
    extra = "ip_layers.extra" if damaged.is_dir() else "extra"
    saved(damaged, kind.tensors | {extra: torch.zeros(3)})
    with pytest.raises(CheckpointError, match=f"has unexpected {extra}"):
        read_adapter(damaged)


@pytest.mark.parametrize("name", ["xlabs", "xlabs on chroma"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_xlabs_is_diffusers(name: str, tmp_path: Path) -> None:
    kind = Kind(name, tmp_path)
    theirs: Any = specimen(kind.family)
    own = read_adapter(kind.path)
    states = {
        "image_proj": own.projection,
        "ip_adapter": {
            f"{number}.{key.replace('.', '_ip.')}": tensor
            for number, layer in enumerate(own.states)
            for key, tensor in layer.items()
        },
    }
    theirs._load_ip_adapter_weights([states], low_cpu_mem_usage=False)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.7]
    with torch.no_grad():
        given = {"ip_adapter_image_embeds": [kind.embedding[:, None]]}
        out = answer(theirs, kind.inputs | {"joint_attention_kwargs": given})
    torch.testing.assert_close(kind.ours(), out, **CLOSE)


class InstantX:
    """The official attention for Flux: two softmaxes, added before the output layer to all rows."""

    def __init__(self, tokens: Tensor, to_k: Tensor, to_v: Tensor, scale: float) -> None:
        self.tokens, self.to_k, self.to_v, self.scale = tokens, to_k, to_v, scale

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,  # noqa: ARG002 - passed on by its signature
        image_rotary_emb: Any = None,
    ) -> Any:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1))

        q, k, v = (heads(f(hidden_states)) for f in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        key = heads(self.tokens @ self.to_k.T)
        key = key * (key.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
        value = heads(self.tokens @ self.to_v.T)
        image = attend(q, key, value) * self.scale
        text = 0
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.shape[1]
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            tq, tk, tv = (heads(f(encoder_hidden_states)) for f in added)
            q = torch.cat([attn.norm_added_q(tq), q], 1)
            k = torch.cat([attn.norm_added_k(tk), k], 1)
            v = torch.cat([tv, v], 1)
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        out = attend(q, k, v)
        if encoder_hidden_states is None:
            return out + image
        return attn.to_out[0](out[:, text:] + image), attn.to_add_out(out[:, :text])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, L, H, d), its heads joined."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def as_instantx(model: nn.Module, t: dict[str, Tensor], embedding: Tensor, scale: float) -> None:
    """Let a Flux attend as the original does."""
    hidden = F.gelu(embedding @ t["image_proj.proj.0.weight"].T + t["image_proj.proj.0.bias"])
    spread = hidden @ t["image_proj.proj.2.weight"].T + t["image_proj.proj.2.bias"]
    norm = t["image_proj.norm.weight"], t["image_proj.norm.bias"]
    tokens = F.layer_norm(spread.view(len(embedding), N, -1), norm[0].shape, *norm)
    for number, layer in enumerate(attentions(model, ".attn")):
        pair = [t[f"ip_adapter.{number}.to_{part}_ip.weight"] for part in "kv"]
        layer.processor = InstantX(tokens, *pair, scale=scale)


def attentions(model: nn.Module, ending: str) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith(ending)]


class HunyuanDiT:
    """The official attention: the image's query is rotated, its keys pass a layer norm."""

    def __init__(self, tokens: Tensor, tensors: dict[str, Tensor], scale: float) -> None:
        self.tokens, self.t, self.scale = tokens, tensors, scale

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,  # noqa: ARG002 - passed on by its signature
        image_rotary_emb: Any = None,
    ) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q = attn.norm_q(heads(attn.to_q(hidden_states)))
        k = attn.norm_k(heads(attn.to_k(encoder_hidden_states)))
        v = heads(attn.to_v(encoder_hidden_states))
        q = apply_rotary_emb(q, image_rotary_emb)
        both = self.tokens @ self.t["kv_proj_ip_adapter.weight"].T
        key, value = map(heads, (both + self.t["kv_proj_ip_adapter.bias"]).chunk(2, -1))
        norm = self.t["k_norm_ip_adapter.weight"], self.t["k_norm_ip_adapter.bias"]
        key = F.layer_norm(key, key.shape[-1:], *norm, eps=1e-6)
        out = F.scaled_dot_product_attention(q, k, v)
        out = out + self.scale * F.scaled_dot_product_attention(q, key, value)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def as_hunyuandit(model: nn.Module, t: dict[str, Tensor], embedding: Tensor, scale: float) -> None:
    """Let a HunyuanDiT attend as the original does."""
    unit = F.normalize(embedding, dim=-1)
    block = "ip_adapter_clip_len_trans_block."
    spread = unit @ t[block + "weight"].T + t[block + "bias"]
    norm = t["ip_adapter_img_norm_cond.weight"], t["ip_adapter_img_norm_cond.bias"]
    tokens = F.layer_norm(spread.reshape(len(unit), -1, N).mT, norm[0].shape, *norm)
    for number, layer in enumerate(attentions(model, "attn2")):
        prefix = f"blocks.{number}.attn2."
        own = {k.removeprefix(prefix): v for k, v in t.items() if k.startswith(prefix)}
        layer.processor = HunyuanDiT(tokens, own, scale)


def tokens_of(t: dict[str, Tensor], prefix: str, features: Tensor) -> Tensor:
    """The paper's resampler: learned queries read the patches and each other."""
    t = {key.removeprefix(prefix): tensor for key, tensor in t.items() if key.startswith(prefix)}

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"])

    x = linear("proj_in", features if features.ndim == 3 else features[:, None])
    y = t["latents"].expand(len(x), -1, -1)
    for layer in ("layers.0.", "layers.1."):
        own = norm(layer + "0.norm2", y)
        read = torch.cat([norm(layer + "0.norm1", x), own], 1)
        k, v = linear(layer + "0.to_kv", read).chunk(2, -1)
        out = attend(*(z[:, :, None] for z in (linear(layer + "0.to_q", own), k, v)))
        y = y + linear(layer + "0.to_out", out)
        hidden = F.gelu(linear(layer + "1.1", norm(layer + "1.0", y)))
        y = y + linear(layer + "1.3", hidden)
    return norm("norm_out", linear("proj_out", y))


class Own:
    """W'_k and W'_v of one layer, the image tokens that they read, and the scale."""

    def __init__(self, t: dict[str, Tensor], prefix: str, tokens: Tensor, scale: float) -> None:
        self.key, self.value = (tokens @ t[f"{prefix}.to_{part}_ip.weight"].T for part in "kv")
        self.scale = scale


class AIToolkit(Own):
    """ai-toolkit's attention for Flux: all rows attend to the image, their query rotated."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,  # noqa: ARG002 - passed on by its signature
        image_rotary_emb: Any = None,
    ) -> Any:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1))

        q, k, v = (heads(f(hidden_states)) for f in (attn.to_q, attn.to_k, attn.to_v))
        q, k, text = attn.norm_q(q), attn.norm_k(k), 0
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.shape[1]
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            tq, tk, tv = (heads(f(encoder_hidden_states)) for f in added)
            q = torch.cat([attn.norm_added_q(tq), q], 1)
            k = torch.cat([attn.norm_added_k(tk), k], 1)
            v = torch.cat([tv, v], 1)
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        out = attend(q, k, v) + self.scale * attend(q, heads(self.key), heads(self.value))
        if encoder_hidden_states is None:
            return out
        return attn.to_out[0](out[:, text:]), attn.to_add_out(out[:, :text])


class CrossAttention(Own):
    """ai-toolkit's attention for PixArt, and Lynx' for Wan, whose keys are normalised."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,  # noqa: ARG002 - passed on by its signature
        rotary_emb: Any = None,  # noqa: ARG002 - Wan's cross-attentions have none
    ) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1))

        q, key = attn.to_q(hidden_states), self.key
        k, v = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
            key = key * (key.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
        q, k, v, key, value = map(heads, (q, k, v, key, self.value))
        return attn.to_out[0](attend(q, k, v) + self.scale * attend(q, key, value))


def as_ai_toolkit(model: nn.Module, t: dict[str, Tensor], features: Tensor, scale: float) -> None:
    tokens = tokens_of(t, "image_proj.", features)
    for number, layer in enumerate(attentions(model, ".attn")):
        layer.processor = AIToolkit(t, f"ip_adapter.{number}", tokens, scale)


def as_ai_toolkit_pixart(model: Any, t: dict[str, Tensor], features: Tensor, scale: float) -> None:
    """The tokens are joined to the text before the model projects it."""
    tokens = model.caption_projection(tokens_of(t, "image_proj.", features))
    for number, layer in enumerate(attentions(model, "attn2")):
        layer.processor = CrossAttention(t, f"ip_adapter.{number}", tokens, scale)


def as_lynx(model: nn.Module, t: dict[str, Tensor], features: Tensor, scale: float) -> None:
    """Every second block attends to the image."""
    tokens = tokens_of(t, "resampler.", features)
    for number, layer in enumerate(attentions(model, "attn2")[::2]):
        layer.processor = CrossAttention(t, f"ip_layers.{number}", tokens, scale)


OFFICIAL = {
    "instantx": as_instantx,
    "hunyuandit": as_hunyuandit,
    "ai-toolkit": as_ai_toolkit,
    "ai-toolkit-pixart": as_ai_toolkit_pixart,
    "lynx": as_lynx,
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_it_is_the_official_formula(name: str, tmp_path: Path) -> None:
    kind = Kind(name, tmp_path)
    theirs = specimen(kind.family)
    with torch.no_grad():
        OFFICIAL[name](theirs, kind.tensors, kind.embedding, 0.7)
        torch.testing.assert_close(kind.ours(), answer(theirs, kind.inputs), **CLOSE)


def test_lynx_is_two_files_of_which_either_names_both(tmp_path: Path) -> None:
    kind = Kind("lynx", tmp_path)
    whole = read_adapter(kind.path)
    for name in ("resampler.safetensors", "ip_layers.safetensors"):
        for one, other in zip(read_adapter(kind.path / name).tensors, whole.tensors, strict=True):
            assert torch.equal(one, other)
    assert whole.layers == ("blocks.0.attn2",)
    assert read_adapter(kind.path).faces == "facexlib's arcface"
    (kind.path / "resampler.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"resampler\.safetensors: there is no such file"):
        read_adapter(kind.path / "ip_layers.safetensors")


def test_convert_writes_lynx_as_a_folder_and_replaces_nothing(tmp_path: Path) -> None:
    kind, own, folder = Kind("lynx", tmp_path), tmp_path / "own.safetensors", tmp_path / "folder"
    convert(kind.path, own)
    convert(own, folder, LayoutName.lynx)
    assert {file.name for file in folder.iterdir()} == {file.name for file in kind.path.iterdir()}
    for one, other in zip(read_adapter(folder).tensors, read_adapter(own).tensors, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(SettingError, match=r"resampler\.safetensors exists"):
        convert(own, folder, LayoutName.lynx)
    with pytest.raises(CheckpointError, match="cannot write"):
        convert(own, own / "inside", LayoutName.lynx)


@pytest.mark.parametrize("more", ["registers", "to_k_ip.bias"])
def test_the_full_form_of_lynx_is_refused_by_name(more: str, tmp_path: Path) -> None:
    tensors = Kind("lynx", tmp_path).tensors | {f"ip_layers.0.{more}": torch.zeros(24)}
    with pytest.raises(CheckpointError, match="full form, whose registers and reference-latent"):
        read_adapter(saved(tmp_path / "full", tensors))


def test_an_adapter_of_ai_toolkit_is_for_flux_or_pixart_by_its_widths(tmp_path: Path) -> None:
    for name, wrong in (("ai-toolkit", "pixart"), ("ai-toolkit-pixart", "flux")):
        with pytest.raises(MismatchError, match="this adapter is for base models of the"):
            load_adapter(Kind(name, tmp_path).path, specimen(wrong))


def test_a_copied_prompt_is_heard_as_its_original(kind: Kind) -> None:
    """Its form is another object, equal to the one of a prompt beside it."""
    adapter = kind.adapter
    with torch.no_grad(), adapter.attached(kind.model):
        one, other = (adapter.prompt(adapter.tokens(kind.embedding), scale=x) for x in (0.7, 0.3))
        outs = []
        for second in (other, other._replace(form=replace(other.form))):
            with adapter.using(one, second):
                outs.append(answer(kind.model, kind.inputs))
    assert torch.equal(*outs)


def test_forms_of_several_adapters_join_in_one_call(tmp_path: Path) -> None:
    """XLabs' and InstantX' prompts together: each alone is what it is with the other at 0."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = Kind("xlabs", tmp_path / "one"), Kind("instantx", tmp_path / "two")
    first, second = one.adapter, load_adapter(two.path, one.model)
    with torch.no_grad(), first.attached(one.model), second.attached(one.model):
        a, b = (
            first.prompt(first.tokens(one.embedding)),
            second.prompt(second.tokens(one.embedding)),
        )
        outs = []
        for left, right in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
            with first.using(a.with_scale(left), b.with_scale(right)):
                outs.append(answer(one.model, one.inputs))
        with first.using(a):
            alone = answer(one.model, one.inputs)
        with second.using(b):
            other = answer(one.model, one.inputs)
    torch.testing.assert_close(outs[0], alone, **CLOSE)
    torch.testing.assert_close(outs[1], other, **CLOSE)
    assert (outs[2] - alone).abs().max() > 0.05


# As published: family's class and its layers, sizes of the file, parameters.
SIZES = [
    ("XLabs v1", FluxTransformer2DModel, {}, xlabs, (4096, 3072, 19, 4, 768), 490_874_880),
    ("XLabs v2", FluxTransformer2DModel, {}, xlabs, (4096, 3072, 19, 16, 768), 528_672_768),
    ("XLabs v2", ChromaTransformer2DModel, {}, xlabs, (4096, 3072, 19, 16, 768), 528_672_768),
    (
        "InstantX",
        FluxTransformer2DModel,
        {},
        instantx,
        (4096, 3072, 57, 128, 1152),
        2_645_600_512,
    ),
    (
        "HunyuanDiT",
        HunyuanDiT2DModel,
        {
            "num_layers": 40,
            "hidden_size": 1408,
            "num_attention_heads": 16,
            "attention_head_dim": 88,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 128,
        },
        hunyuandit,
        (1024, 1408, 40, 8, 1024, 88),
        123_861_888,
    ),
    (
        "InstantX for SD3.5-Large",
        SD3Transformer2DModel,
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "attention_head_dim": 64,
            "caption_projection_dim": 2432,
        },
        sd3,
        (2432, 2432, 38, 64, 1152, 64, (1280, 320)),
        797_925_888,
    ),
    (
        "InstantCharacter",
        FluxTransformer2DModel,
        {},
        character,
        (4096, 3072, 57, 1024, 2688, 128, (1280, 320), 4),
        1_434_816_768 + 1_360_116_096,  # of its layers, and of its projection; the file has 5.59 GB
    ),
]


@pytest.mark.parametrize(("name", "kind", "config", "make", "sizes", "count"), SIZES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sizes_are_those_of_the_published_files(
    name: str, kind: Any, config: dict[str, Any], make: Any, sizes: tuple[int, ...], count: int
) -> None:
    with torch.device("meta"):
        tensors, model = make(*sizes), kind(**config)
    assert sum(tensor.numel() for tensor in tensors.values()) == count, name
    row = published_layout(tensors)
    assert row is not None
    projection, layers = module_tensors(row, tensors, Path("file"))
    form = FORMS[row.form]
    check_form(Path("file"), form, projection, layers, find_variant(row.variant))
    family = find_family(form.families[0] if kind is not ChromaTransformer2DModel else "chroma")
    found = form.of(family.layers(model))
    assert len(found) == len(layers)
    for layer, states in zip(found.values(), layers, strict=True):
        assert family.size(layer).inner == states["to_k.weight"].shape[0]


def test_the_layers_of_instantcharacter_are_as_many_as_published() -> None:
    with torch.device("meta"):
        tensors = character(4096, 3072, 57, 1, 64, 128)
    own = [tensor for key, tensor in tensors.items() if key.startswith("ip_adapter.")]
    assert sum(tensor.numel() for tensor in own) == 1_434_816_768


def test_every_layout_and_form_is_tested() -> None:
    assert {row.form for row in PUBLISHED_LAYOUTS} == FORMS.keys()
    assert {row.name for row in PUBLISHED_LAYOUTS} < {layout.value for layout in LayoutName}
    assert {name.split()[0] for name in KINDS} | {"redux"} == FORMS.keys()  # see test_redux
