"""Adapter files: every layout there and back, and every way in which a file can be wrong."""

import json
import os
import pickle
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.loaders import UNet2DConditionLoadersMixin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from imprompt.adapter import ImageKV, ImageProjection, IPAdapter
from imprompt.checkpoints import layouts
from imprompt.checkpoints.adapters import (
    METADATA_KEY,
    AdapterFile,
    Origin,
    adapter_file,
    build_adapter,
    describe,
    read_adapter,
    save_adapter,
    write_adapter,
)
from imprompt.errors import CheckpointError, MismatchError, SettingError
from imprompt.families import unet_layers
from imprompt.families.unet import UNET
from imprompt.projections.mlp import FullProjection
from imprompt.projections.resampler import Resampler
from imprompt.variants import find_variant
from tests.tiny import seeded, smallest_unet

LAYERS = unet_layers.layer_names(unet_layers.SD)
ORIGIN = Origin(
    base="sd15",
    encoder="some/encoder",
    encoder_fingerprint="ab12",
    prediction_type="epsilon",
    training_steps=7,
    licence="MIT",
)
WIDTH = 768  # with 16 sites: SD 1.x


def plus(token_dim: int, tokens: int, depth: int) -> Resampler:
    return Resampler(24, token_dim, tokens=tokens, width=16, inner=64, hidden=40, depth=depth)


KINDS = {
    "base": lambda d: ImageProjection(12, d, 4),
    "base-8": lambda d: ImageProjection(12, d, 8),
    "plus-2-5": lambda d: plus(d, 5, 2),
    "plus-6-16": lambda d: plus(d, 16, 6),
    "full": lambda d: FullProjection(20, d),
}
TOKENS = {"base": 4, "base-8": 8, "plus-2-5": 5, "plus-6-16": 16, "full": None}
WRITTEN = [
    ("imprompt", ".safetensors"),
    *(
        (name, end)
        for name in ("paper", "modules", "diffusers")
        for end in (".safetensors", ".bin")
    ),
]


def live(
    kind: str = "base", token_dim: int = WIDTH, dtype: torch.dtype = torch.float32
) -> IPAdapter:
    torch.manual_seed(0)
    return IPAdapter(
        KINDS[kind](token_dim), [ImageKV(token_dim, 4 + i % 3) for i in range(16)], UNET
    ).to(dtype)


def made(
    kind: str = "base",
    dtype: torch.dtype = torch.float32,
    origin: Origin = ORIGIN,
    token_dim: int = WIDTH,
) -> AdapterFile:
    return adapter_file(
        live(kind, token_dim, dtype), find_variant(kind.split("-")[0]), LAYERS, origin
    )


def bare(file: AdapterFile) -> AdapterFile:
    """The same without its header, as an older file would hold it."""
    return replace(file, header=None, layers=None)


def assert_same_tensors(one: AdapterFile, other: AdapterFile) -> None:
    assert one.variant is other.variant
    assert one.projection.keys() == other.projection.keys()
    pairs = [(tensor, other.projection[key]) for key, tensor in one.projection.items()]
    pairs += [
        pair
        for ours, theirs in zip(one.kv, other.kv, strict=True)
        for pair in zip(ours, theirs, strict=True)
    ]
    assert (one.lora is None) == (other.lora is None)
    for parts, others in zip(one.lora or (), other.lora or (), strict=True):
        assert parts.keys() == others.keys()
        pairs += [(tensor, others[key]) for key, tensor in parts.items()]
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def refusal(path: Path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        read_adapter(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


def paper_tensors(file: AdapterFile, folder: Path) -> dict[str, torch.Tensor]:
    write_adapter(folder / "whole.safetensors", bare(file), "paper")
    return safetensors.torch.load_file(folder / "whole.safetensors")


# Layouts, there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_back_the_bits(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    file = made(kind, dtype)
    assert file.tokens == TOKENS[kind]
    assert (file.token_dim, file.feature_dim) == (
        WIDTH,
        {"base": 12, "plus": 24, "full": 20}[file.variant.name],
    )
    for layout, suffix in WRITTEN:
        path = tmp_path / f"{layout}{suffix}"
        write_adapter(path, file, layout)
        read = read_adapter(path)
        assert_same_tensors(read, file)
        assert read.layout == layouts.ALIASES.get(layout, layout)
        if suffix == ".safetensors":
            assert read.header == file.header
            assert read.layers == LAYERS
        else:
            assert (read.header, read.layers) == (None, None)
        # names of the sites from the table of known models
        write_adapter(tmp_path / "back.safetensors", read)
        back = read_adapter(tmp_path / "back.safetensors")
        assert_same_tensors(back, file)
        assert back.layers == LAYERS
        rederived = (
            file.header
            if suffix == ".safetensors"
            else file.header.model_copy(update=Origin().model_dump())
        )
        assert back.header == rederived


def test_the_names_of_each_layout(tmp_path: Path) -> None:
    file = made()
    names = {
        "imprompt": {
            "projection.proj.weight",
            "image_kv.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight",
        },
        "paper": {
            "image_proj.proj.weight",
            "ip_adapter.1.to_k_ip.weight",
            "ip_adapter.31.to_v_ip.weight",
        },
        "modules": {
            "image_proj_model.proj.weight",
            "adapter_modules.1.to_k_ip.weight",
            "adapter_modules.31.to_v_ip.weight",
        },
    }
    for layout, some in names.items():
        write_adapter(tmp_path / "a.safetensors", file, layout)
        keys = safetensors.torch.load_file(tmp_path / "a.safetensors").keys()
        assert some <= keys
        assert len(keys) == 4 + 32
    for layout, outer in (("paper", "ip_adapter"), ("modules", "adapter_modules")):
        write_adapter(tmp_path / "a.bin", file, layout)
        nested = torch.load(tmp_path / "a.bin", weights_only=True)
        assert nested.keys() == {"image_proj", outer}
        assert torch.equal(nested[outer]["31.to_v_ip.weight"], file.kv[15][1])
    assert (tmp_path / "a.bin").stat().st_size < sum(
        tensor.nbytes for tensor in file.tensors
    ) + 30_000


def test_flat_pickles_are_read_too(tmp_path: Path) -> None:
    file = made("plus-2-5")
    torch.save(paper_tensors(file, tmp_path), tmp_path / "flat.pt")
    assert_same_tensors(read_adapter(tmp_path / "flat.pt"), file)
    torch.save(
        paper_tensors(file, tmp_path), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False
    )
    assert_same_tensors(read_adapter(tmp_path / "old.ckpt"), file)


@pytest.mark.parametrize("kept", ["unet", "both"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_training_states_of_accelerate(tmp_path: Path, kept: str, name: str) -> None:
    file = made("plus-2-5")
    state = {f"image_proj_model.{key}": tensor for key, tensor in file.projection.items()}
    state |= {
        "unet.conv_in.weight": torch.ones(3),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight": torch.ones(2, 2),
    }
    for number, (layer, (key, value)) in enumerate(zip(LAYERS, file.kv, strict=True)):
        state |= {
            f"unet.{layer}.processor.to_k_ip.weight": key,
            f"unet.{layer}.processor.to_v_ip.weight": value,
        }
        if kept == "both":
            state |= {
                f"adapter_modules.{2 * number + 1}.to_{part}_ip.weight": t.clone()
                for part, t in (("k", key), ("v", value))
            }
    if name.endswith(".bin"):
        torch.save(state, tmp_path / name)
    else:
        safetensors.torch.save_file(state, tmp_path / name)
    read = read_adapter(tmp_path)  # the folder
    assert_same_tensors(read, file)
    assert read.layers == (LAYERS if kept == "unet" else None)
    write_adapter(tmp_path / "adapter.safetensors", read)
    assert read_adapter(tmp_path).layout == "imprompt"
    assert read_adapter(tmp_path).layers == LAYERS


def test_diffusers_takes_what_is_written_for_it(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=32,
        layers_per_block=1,
        **kinds,
    )
    torch.manual_seed(0)
    adapter = IPAdapter.for_model(unet, ImageProjection(12, 32))
    file = adapter_file(adapter, find_variant("base"), list(UNET.layers(unet)))
    write_adapter(tmp_path / "a.bin", file, "diffusers")
    unet._load_ip_adapter_weights([torch.load(tmp_path / "a.bin", weights_only=True)])
    for layer, (key, value) in zip(UNET.layers(unet).values(), file.kv, strict=True):
        assert torch.equal(layer.processor.to_k_ip[0].weight, key)
        assert torch.equal(layer.processor.to_v_ip[0].weight, value)


def test_a_live_adapter_comes_back_as_it_was(tmp_path: Path) -> None:
    for kind in KINDS:
        adapter = live(kind)
        save_adapter(
            tmp_path / "adapter.safetensors",
            adapter,
            find_variant(kind.split("-")[0]),
            LAYERS,
            ORIGIN,
        )
        file = read_adapter(tmp_path / "adapter.safetensors")
        loaded = build_adapter(file, UNET)
        ours, theirs = adapter.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        assert file.header == made(kind).header
        features = (
            torch.randn(2, file.feature_dim)
            if kind.startswith("base")
            else torch.randn(2, 3, file.feature_dim)
        )
        assert torch.equal(adapter.tokens(features), loaded.tokens(features))


def test_half_precision_is_loaded_as_float32_and_draws_no_random_numbers(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.bin", made("plus-2-5", torch.float16), "paper")
    before = torch.get_rng_state()
    file = read_adapter(tmp_path / "a.bin")
    adapter = build_adapter(file, UNET)
    assert torch.equal(torch.get_rng_state(), before)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    assert file.kv[0][0].dtype == torch.float16


def test_another_family_is_refused(tmp_path: Path) -> None:
    class Other:
        name = "flux"
        layers = processor = None

    write_adapter(tmp_path / "a.safetensors", made())
    with pytest.raises(MismatchError, match=r"unet family.*flux family"):
        build_adapter(read_adapter(tmp_path / "a.safetensors"), Other())


# What a file says


def test_header_and_description(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", made(), "diffusers")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        told = json.loads(file.metadata()[METADATA_KEY])
    assert told["format"] == 1
    assert told["layers"] == list(LAYERS)
    assert told["encoder"] == "some/encoder"
    rows = dict(describe(read_adapter(tmp_path / "a.safetensors")))
    assert rows["layout"] == "paper / diffusers"
    assert rows["image tokens"] == "4, 768 wide"
    assert rows["training steps"] == "7"
    assert rows["base"] == "sd15"
    assert rows["precision"] == "float32"
    write_adapter(tmp_path / "a.bin", made("full"), "paper")
    rows = dict(describe(read_adapter(tmp_path / "a.bin")))
    assert rows["image tokens"] == "one per patch, 768 wide"
    assert rows["header"].startswith("none")
    assert all(isinstance(value, str) for value in rows.values())


@pytest.mark.parametrize(
    ("row", "feature_dim", "token_dim", "layers", "says"),
    [
        (
            "base",
            1024,
            768,
            16,
            "SD 1.x with 768-wide text and 16 cross-attentions; image encoder: OpenCLIP ViT-H/14 "
            "with 1024-wide pooled",
        ),
        (
            "base",
            1280,
            2048,
            70,
            "SDXL with 2048-wide text and 70 cross-attentions; image encoder: OpenCLIP ViT-bigG/14 "
            "with 1280-wide",
        ),
        (
            "plus",
            1280,
            2048,
            70,
            "SDXL .* ViT-H/14 with 1280-wide penultimate hidden states, e.g. h94/IP-Adapter "
            "models/image_encoder$",
        ),
        ("plus", 1024, 1024, 16, "SD 2.x .* CLIP ViT-L/14"),
        (
            "base",
            99,
            100,
            3,
            "a model with 100-wide text and 3 cross-attentions; image encoder: one with 99-wide "
            "pooled embedding$",
        ),
    ],
)
def test_what_an_adapter_suits(
    row: str, feature_dim: int, token_dim: int, layers: int, says: str
) -> None:
    with torch.device("meta"):
        projection = (
            ImageProjection(feature_dim, token_dim)
            if row == "base"
            else Resampler(feature_dim, token_dim, width=64)
        )
        adapter = IPAdapter(projection, [ImageKV(token_dim, 8) for _ in range(layers)], UNET)
    file = adapter_file(adapter, find_variant(row), [str(layer) for layer in range(layers)])
    assert re.search(says, file.suits())


SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}


@pytest.mark.parametrize(
    ("config", "blocks", "embeddings"),
    [
        (SD15, unet_layers.SD, {1024: 22_319_616}),
        (SDXL, unet_layers.SDXL, {1024: 349_188_096, 1280: 351_285_248}),
    ],
    ids=["SD 1.5", "SDXL"],
)
def test_real_models_on_the_meta_device(
    config: dict, blocks: unet_layers.UNetBlocks, embeddings: dict[int, int]
) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        assert list(UNET.layers(unet)) == list(unet_layers.layer_names(blocks))
        assert unet_layers.in_model_order(
            reversed(unet_layers.layer_names(blocks))
        ) == unet_layers.layer_names(blocks)
        for width, parameters in embeddings.items():
            adapter = IPAdapter.for_model(
                unet, ImageProjection(width, config["cross_attention_dim"])
            )
            file = adapter_file(adapter, find_variant("base"), list(UNET.layers(unet)))
            assert file.parameters == parameters
            assert unet_layers.known_layers(file.token_dim, len(file.kv)) == file.layers


# Files that are wrong


def test_all_faults_are_named_in_one_line(tmp_path: Path) -> None:
    tensors = paper_tensors(made(), tmp_path)
    del (
        tensors["image_proj.norm.bias"],
        tensors["ip_adapter.3.to_k_ip.weight"],
        tensors["ip_adapter.3.to_v_ip.weight"],
    )
    tensors |= {
        "image_proj.extra.weight": torch.ones(2),
        "ip_adapter.2.to_k_ip.weight": torch.ones(4, WIDTH),
    }
    tensors |= {
        "image_proj.proj.bias": torch.ones(5),
        "ip_adapter.5.to_k_ip.weight": torch.ones(6, 1024),
    }
    tensors |= {"ip_adapter.7.to_v_ip.weight": torch.ones(9, WIDTH)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    line = refusal(tmp_path / "a.safetensors")
    assert (
        "missing: image_proj.norm.bias, ip_adapter.3.to_k_ip.weight, ip_adapter.3.to_v_ip.weight;"
        in line
    )
    unexpected = line.split("unexpected: ")[1].split(";")[0]
    assert set(unexpected.split(", ")) == {"image_proj.extra.weight", "ip_adapter.2.to_k_ip.weight"}
    assert "image_proj.proj.bias [5] instead of [3072]" in line
    assert "ip_adapter.5.to_k_ip.weight [6, 1024] instead of [6, 768]" in line
    assert "ip_adapter.7.to_v_ip.weight [9, 768] instead of [4, 768]" in line
    assert (
        "SD 1.x with 768-wide text and 16 cross-attentions; image encoder: one with 12-wide pooled "
        "embedding" in line
    )


@pytest.mark.parametrize("kind", ["base", "plus-2-5", "full"])
def test_any_single_missing_or_misshapen_tensor_is_named(tmp_path: Path, kind: str) -> None:
    tensors = paper_tensors(made(kind, token_dim=64), tmp_path)
    for key in [
        key
        for key in tensors
        if "ip_adapter" not in key or key.startswith(("ip_adapter.9.", "ip_adapter.31."))
    ]:
        if "layers.1.0.to_q" in key or key.endswith((".latents", "j.proj.weight", "proj.3.weight")):
            continue  # the depth and the variant are told by these
        torch.save(
            {name: tensor for name, tensor in tensors.items() if name != key}, tmp_path / "a.bin"
        )
        line = refusal(tmp_path / "a.bin")
        assert f"missing: {key}" in line, key
        assert "made for a model with 64-wide text" in line, key
        torch.save(tensors | {key: torch.ones(2, 3, 4, 5)}, tmp_path / "a.bin")
        assert f"{key} [2, 3, 4, 5]" in refusal(tmp_path / "a.bin"), key


def test_long_lists_are_cut(tmp_path: Path) -> None:
    tensors = {
        key: tensor
        for key, tensor in paper_tensors(made("plus-6-16"), tmp_path).items()
        if "norm" not in key
    }
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    line = refusal(tmp_path / "a.safetensors")
    assert "and 18 more" in line
    assert len(line) < 1200


@pytest.mark.parametrize("half", ["image_proj.", "ip_adapter."])
def test_half_a_file_is_no_adapter(tmp_path: Path, half: str) -> None:
    tensors = {
        key: tensor
        for key, tensor in paper_tensors(made(), tmp_path).items()
        if key.startswith(half)
    }
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    line = refusal(tmp_path / "a.safetensors")
    assert (
        "missing: ip_adapter.*.to_k_ip.weight" if half == "image_proj." else "no image projection"
    ) in line


def test_sizes_that_make_no_projection(tmp_path: Path) -> None:
    tensors = paper_tensors(made("plus-2-5"), tmp_path)
    tensors["image_proj.latents"] = torch.ones(3)
    torch.save(tensors, tmp_path / "a.bin")
    assert "misshapen: image_proj.latents [3]" in refusal(tmp_path / "a.bin")
    tensors = paper_tensors(made(), tmp_path)
    torch.save(tensors | {"image_proj.proj.weight": torch.ones(3070, 12)}, tmp_path / "a.bin")
    assert "image_proj.proj.weight [3070, 12] instead of [2304, 12]" in refusal(tmp_path / "a.bin")


def test_values_that_are_no_plain_tensors(tmp_path: Path) -> None:
    tensors = paper_tensors(made(), tmp_path)
    odd = {
        "strength": 5,
        "image_proj.proj.bias": torch.ones(3072, dtype=torch.int64),
        "image_proj.norm.bias": torch.ones(1).expand(10**9),
        "ip_adapter.1.to_k_ip.weight": torch.ones(4, WIDTH).to_sparse(),
        "ip_adapter.3.to_k_ip.weight": torch.ones(0, WIDTH),
        "ip_adapter.5.to_k_ip.weight": torch.ones(4, WIDTH, device="meta"),
    }
    torch.save(tensors | odd, tmp_path / "a.bin")
    line = refusal(tmp_path / "a.bin")
    assert "not plain tensors" in line
    assert all(key in line for key in odd)


FOREIGN = {
    "a CSGO adapter": ["content_image_proj.latents", "ip_adapter.1.to_k_ip_content.weight"],
    "an IP-Adapter-Instruct adapter": [
        "image_proj.latents",
        "image_proj.proj_new_input.weight",
        "ip_adapter.1.to_k_ip.weight",
    ],
    "an SD3 adapter": [
        "image_proj.latents",
        "image_proj.time_embedding.linear_1.weight",
        "ip_adapter.0.to_k_ip.weight",
    ],
    "an InstantCharacter adapter": [
        "image_proj.proj.weight",
        "ip_adapter.0.norm_ip_q.weight",
        "ip_adapter.0.to_k_ip.weight",
    ],
    "an adapter for Flux": ["image_proj.proj.weight", "ip_adapter.0.to_k_ip.weight"],
    "Lynx' reference-latent adapter": ["0.to_k_ref.weight", "0.to_v_ref.weight"],
    "a LoRA": ["unet.down_blocks.0.attn1.processor.to_q_lora.down.weight"],
    "an image encoder": ["vision_model.embeddings.class_embedding", "visual_projection.weight"],
    "a base model": ["model.diffusion_model.input_blocks.0.0.weight"],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_things_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    safetensors.torch.save_file(
        {key: torch.ones(2) for key in FOREIGN[kind]}, tmp_path / "a.safetensors"
    )
    assert f"is {kind}" in refusal(tmp_path / "a.safetensors")


def test_missing_empty_unknown_and_garbage_files(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "a.safetensors")
    assert "holds no adapter" in refusal(tmp_path)
    for suffix in (".safetensors", ".bin", ".pt", ".ckpt"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(b"")
        assert "is empty" in refusal(path)
        path.write_bytes(b"all sorts of things" * 100)
        assert "damaged" in refusal(path)
    (tmp_path / "a.png").write_bytes(b"x")
    assert ".safetensors" in refusal(tmp_path / "a.png")
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "b.safetensors")
    assert "not an image-prompt adapter of a known layout; it holds x" in refusal(
        tmp_path / "b.safetensors"
    )
    torch.save([torch.ones(2)], tmp_path / "b.bin")
    assert "known layout" in refusal(tmp_path / "b.bin")


@pytest.fixture(scope="module", params=[".safetensors", ".bin"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a few kB, to be cut and damaged."""
    path = tmp_path_factory.mktemp("small") / f"whole{request.param}"
    write_adapter(path, made(token_dim=4), "paper")
    return path


def test_every_cut_is_noticed(small: Path, tmp_path: Path) -> None:
    whole, path = small.read_bytes(), tmp_path / f"cut{small.suffix}"
    for length in {
        *range(1, 40),
        *range(40, len(whole), len(whole) // 60),
        *range(len(whole) - 30, len(whole)),
    }:
        path.write_bytes(whole[:length])
        refusal(path)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damage_never_escapes_as_another_error(
    small: Path, tmp_path: Path, data: st.DataObject
) -> None:
    damaged = bytearray(small.read_bytes())
    for at in data.draw(
        st.lists(st.integers(0, len(damaged) - 1) | st.integers(0, 3000), min_size=1, max_size=3)
    ):
        damaged[min(at, len(damaged) - 1)] = data.draw(st.integers(0, 255))
    path = tmp_path / f"damaged{small.suffix}"
    path.write_bytes(damaged)
    with suppress(CheckpointError):  # damage inside the numbers cannot be seen
        assert read_adapter(path).parameters > 0


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("form", ["zip", "legacy", "raw"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.bin"
    held = {"image_proj": {"proj.weight": Evil(canary)}, "ip_adapter": {}}
    if form == "raw":
        path.write_bytes(pickle.dumps(held, protocol=2))
    else:
        torch.save(held, path, _use_new_zipfile_serialization=form == "zip")
    assert (
        "holds code, not only tensors; refused. Convert it to safetensors if you trust it"
        in refusal(path)
    )
    assert not canary.exists()
    path.write_bytes(pickle.dumps(held, protocol=4))
    refusal(path)
    assert not canary.exists()


def with_header(path: Path, header: str) -> Path:
    write_adapter(path, made())
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {METADATA_KEY: header})
    return path


def test_headers_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    good = made().header.model_dump()
    assert "future" in refusal(with_header(path, json.dumps(good | {"future": 1})))
    assert "format 2" in refusal(with_header(path, json.dumps(good | {"format": 2})))
    assert "not valid JSON" in refusal(with_header(path, "{"))
    assert "not valid JSON" in refusal(with_header(path, "[" * 100_000))
    assert "cannot read" in refusal(with_header(path, "3"))
    assert "tokens 5, the tensors 4" in refusal(with_header(path, json.dumps(good | {"tokens": 5})))
    assert "variant plus, the tensors base" in refusal(
        with_header(path, json.dumps(good | {"variant": "plus"}))
    )
    assert "missing: image_kv.more.to_k" in refusal(
        with_header(path, json.dumps(good | {"layers": [*LAYERS, "more"]}))
    )
    assert "unexpected: image_kv." in refusal(
        with_header(path, json.dumps(good | {"layers": LAYERS[1:]}))
    )


def test_an_adapter_stripped_of_its_header_is_still_read(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", made())
    safetensors.torch.save_file(
        safetensors.torch.load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors"
    )
    read = read_adapter(tmp_path / "a.safetensors")
    assert read.header is None
    assert read.layers == LAYERS
    assert_same_tensors(read, made())


# Writing


def test_layers_names_that_are_not_known_are_asked_for(tmp_path: Path) -> None:
    file = bare(made(token_dim=96))
    with pytest.raises(
        CheckpointError,
        match=r"16 cross-attentions, and no known model .* 96-wide text: name the base model",
    ):
        write_adapter(tmp_path / "a.safetensors", file)
    with pytest.raises(CheckpointError, match="is for 16 cross-attentions; 2 are named"):
        write_adapter(tmp_path / "a.safetensors", file, layers=["a", "b"] * 8)
    names = [f"place.{i}" for i in range(16)]
    write_adapter(tmp_path / "a.safetensors", file, layers=names)
    assert read_adapter(tmp_path / "a.safetensors").layers == tuple(names)
    assert_same_tensors(read_adapter(tmp_path / "a.safetensors"), file)


@pytest.mark.parametrize(
    ("layout", "name", "says"),
    [
        ("imprompt", "a.bin", "written as .safetensors, not as .bin"),
        ("paper", "a.pt", "written as .safetensors or .bin, not as .pt"),
        ("modules", "a", "not as a file without suffix"),
        (
            "accelerate state",
            "a.safetensors",
            "unknown layout 'accelerate state' to write; known: imprompt, paper, modules, "
            "diffusers",
        ),
        ("imprompt", "no/such/a.safetensors", "cannot write"),
        ("paper", "no/such/a.bin", "cannot write"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, layout: str, name: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        write_adapter(tmp_path / name, made(), layout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "at",
    ["imprompt.checkpoints.tensors.save_file", "torch.save", "os.fsync", "pathlib.Path.replace"],
)
@pytest.mark.parametrize(
    "error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "interrupt"]
)
def test_an_interrupted_write_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, error: BaseException
) -> None:
    path = tmp_path / ("a.bin" if at == "torch.save" else "a.safetensors")
    write_adapter(path, made(), "paper")
    old = path.read_bytes()

    def fail(*args: object) -> None:
        if at.endswith(("save_file", "torch.save")):
            Path(str(args[1])).write_bytes(b"a part")
        raise error

    monkeypatch.setattr(at, fail)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        write_adapter(path, made("full"), "paper")
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_readable_by_others_as_the_umask_says(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    for suffix in (".safetensors", ".bin"):
        write_adapter(tmp_path / f"a{suffix}", made(), "paper")
        assert (tmp_path / f"a{suffix}").stat().st_mode == plain.stat().st_mode


def test_one_adapter_gives_the_same_bytes_every_time(tmp_path: Path) -> None:
    for number in range(12):
        write_adapter(tmp_path / f"{number}.safetensors", made())
    (held,) = {path.read_bytes() for path in tmp_path.iterdir()}
    length = int.from_bytes(held[:8], "little")
    assert length % 8 == 0
    assert list(json.loads(held[8 : 8 + length])["__metadata__"]) == ["format", "imprompt"]


def test_heads_of_another_width(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No tensor shows how wide a resampler's heads are: 32 and 64 compute something else."""
    unet = smallest_unet()
    layers = [*UNET.layers(unet)]
    with seeded(1):
        resampler = Resampler(24, 32, tokens=3, width=64, inner=64, depth=2, head_dim=32)
        adapter = IPAdapter.for_model(unet, resampler)
    features = torch.randn(1, 5, 24)
    expected, own = adapter.tokens(features), tmp_path / "own.safetensors"

    def tokens(path: Path, **said: int) -> Tensor:
        return build_adapter(read_adapter(path, **said), UNET).tokens(features)

    save_adapter(own, adapter, find_variant("plus"), layers)
    header = read_adapter(own).header
    assert header is not None
    assert header.head_dim == 32
    assert torch.equal(tokens(own), expected)
    assert not caplog.records
    with pytest.raises(SettingError, match="its header states heads 32 wide, not 64"):
        read_adapter(own, head_dim=64)

    foreign, written = tmp_path / "foreign.safetensors", tmp_path / "written.safetensors"
    bare = replace(read_adapter(own), header=None)
    write_adapter(foreign, bare, "paper")
    assert not torch.allclose(tokens(foreign), expected)
    assert "its resampler are taken to be 64 wide" in caplog.text
    assert torch.equal(tokens(foreign, head_dim=32), expected)
    with pytest.raises(SettingError, match="head_dim = 48 does not divide its resampler's 64"):
        read_adapter(foreign, head_dim=48)
    write_adapter(written, read_adapter(foreign, head_dim=32), layers=layers)
    assert torch.equal(tokens(written), expected)
    write_adapter(foreign, made(), "paper")
    with pytest.raises(SettingError, match=r"head_dim = 32 .*: it has no resampler"):
        read_adapter(foreign, head_dim=32)


def test_a_published_shape_needs_no_word_on_its_heads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unet = smallest_unet()
    adapter = IPAdapter.for_model(unet, Resampler(24, 32, tokens=3, width=768, hidden=8, depth=1))
    layers = [*UNET.layers(unet)]
    file = adapter_file(adapter, find_variant("plus"), layers)
    assert file.header is not None
    assert "head_dim" not in file.header.as_json()
    write_adapter(tmp_path / "a.safetensors", replace(file, header=None), "paper")
    assert read_adapter(tmp_path / "a.safetensors").head_dim is None
    assert not caplog.records


def nested_in(wrappers: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The tensors under the names that a training script wraps them in."""
    wrapped: Any = {}
    for key, tensor in tensors.items():
        outer, inner = key.split(".", 1)
        wrapped[f"{outer}.module.{inner}" if wrappers == "inner" else key] = tensor
    for name in reversed(wrappers.split(".")) if wrappers != "inner" else ():
        prefix = name in ("module", "_orig_mod")
        wrapped = {f"{name}.{key}": t for key, t in wrapped.items()} if prefix else {name: wrapped}
    return wrapped


@pytest.mark.parametrize(
    "wrappers",
    ["module", "_orig_mod", "state_dict", "model", "ema", "inner", "state_dict.ema_model.module"],
)
def test_wrappers_of_training_scripts_are_taken_off(wrappers: str, tmp_path: Path) -> None:
    file = made()
    wrapped = nested_in(wrappers, paper_tensors(file, tmp_path))
    torch.save(wrapped | {"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "a.bin")
    assert_same_tensors(bare(file), read_adapter(tmp_path / "a.bin"))


def test_two_adapters_in_one_file_are_not_chosen_from(tmp_path: Path) -> None:
    tensors = paper_tensors(made(), tmp_path)
    torch.save({"model": tensors, "ema": dict(tensors)}, tmp_path / "a.bin")
    said = "a.bin holds an adapter under each of model, ema: save one of them alone"
    assert said in refusal(tmp_path / "a.bin")
    torch.save({"shadow_params": [*tensors.values()], "decay": 0.9}, tmp_path / "b.bin")
    assert "averaged weights without the names of their tensors" in refusal(tmp_path / "b.bin")


def split_in_two(file: AdapterFile, at: Path) -> Path:
    """Write the tensors to two files with an index; return it."""
    tensors = paper_tensors(file, at)
    at = at / "split"
    at.mkdir()
    named = {key: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, key in enumerate(tensors)}
    for name in set(named.values()):
        safetensors.torch.save_file(
            {key: tensors[key] for key in tensors if named[key] == name}, at / name
        )
    (at / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    return at / "model.safetensors.index.json"


def test_a_split_file_is_read_by_its_index(tmp_path: Path) -> None:
    file = made()
    index = split_in_two(file, tmp_path)
    for path in (index, index.parent):
        assert_same_tensors(bare(file), read_adapter(path))
    named = json.loads(index.read_text())["weight_map"]
    for change, words in (
        ({"image_proj.more": "model-00001-of-00002.safetensors"}, "its files lack image_proj.more"),
        ({"image_proj.more": "../a.safetensors"}, "names a file outside its folder: ../a.safeten"),
        ({"image_proj.more": 3}, "weight_map.image_proj.more = 3: input should be a valid string"),
    ):
        index.write_text(json.dumps({"weight_map": named | change}))
        assert words in refusal(index)
    index.write_text(json.dumps({"weight_map": named | {"image_proj.more": "b.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"b.safetensors: there is no such file"):
        read_adapter(index)


@pytest.mark.parametrize("stated", [0, 1])
def test_a_tensor_in_two_parts_is_read_from_the_one_that_the_index_names(
    stated: int, tmp_path: Path
) -> None:
    key, index = "image_proj.norm.bias", split_in_two(made(), tmp_path)
    named = json.loads(index.read_text())["weight_map"]
    parts = sorted(set(named.values()))
    for number, part in enumerate(parts):
        tensors = safetensors.torch.load_file(index.with_name(part))
        value = torch.full((made().token_dim,), float(number))
        safetensors.torch.save_file(tensors | {key: value}, index.with_name(part))
    index.write_text(json.dumps({"weight_map": named | {key: parts[stated]}}))
    assert read_adapter(index).projection["norm.bias"].unique().tolist() == [stated]


def test_diffusers_spelling_of_a_resampler_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = Resampler(24, WIDTH, tokens=4, width=64, depth=4)
    file = replace(made("plus-2-5"), projection=dict(own.state_dict()))
    file = replace(bare(file), variant=find_variant("plus"))
    write_adapter(tmp_path / "a.safetensors", file, "paper")
    convert = UNet2DConditionLoadersMixin._convert_ip_adapter_image_proj_to_diffusers
    theirs = convert(SimpleNamespace(), dict(own.state_dict()), low_cpu_mem_usage=False)
    respelt = {f"image_proj.{key}": tensor for key, tensor in theirs.state_dict().items()}
    assert "image_proj.layers.0.attn.to_q.weight" in respelt
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    layers = {key: tensor for key, tensor in tensors.items() if key.startswith("ip_adapter.")}
    safetensors.torch.save_file(respelt | layers, tmp_path / "b.safetensors")
    assert_same_tensors(
        read_adapter(tmp_path / "a.safetensors"), read_adapter(tmp_path / "b.safetensors")
    )
