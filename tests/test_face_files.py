"""Files of FaceID adapters: every layout there and back, the low-rank part with them, and what
their tensors cannot tell.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from imprompt.adapter import ImageKV, IPAdapter
from imprompt.attention.low_rank import PARTS, AttentionLowRank, ModelLowRank
from imprompt.checkpoints import layouts
from imprompt.checkpoints.adapters import (
    AdapterFile,
    adapter_file,
    build_adapter,
    describe,
    read_adapter,
    write_adapter,
)
from imprompt.errors import CheckpointError, SettingError
from imprompt.families import unet_layers
from imprompt.families.unet import UNET
from imprompt.generation.memory import MemoryOptions
from imprompt.generation.prepare import LoadedAdapter
from imprompt.generation.references import AdapterChoice
from imprompt.models import MODELS, KnownAdapter, KnownModel, Location, Usual, find_adapter
from imprompt.projections.mlp import FaceProjection
from imprompt.projections.resampler import FacePlusProjection, FacePlusV2Projection, Resampler
from imprompt.variants import BY_NAME, FACES, CheckpointEvidence, find_variant, of_kolors
from tests.test_checkpoints import LAYERS, ORIGIN, WIDTH, WRITTEN, assert_same_tensors, bare

ASKED = {
    "faceid-plus": "faceid-plus or faceid-plus-v2",
    "faceid-plus-v2": "faceid-plus or faceid-plus-v2",
    "portrait-unnorm": "portrait-unnorm or InstantID",
}
PROJECTIONS: dict[str, Callable[[], torch.nn.Module]] = {
    "faceid": lambda: FaceProjection(20, WIDTH, hidden=9),
    "portrait": lambda: FaceProjection(20, WIDTH, 16, hidden=9),
    "portrait-unnorm": lambda: Resampler(512, WIDTH, tokens=3, width=8, hidden=9, depth=2),
    "faceid-plus": lambda: FacePlusProjection(24, WIDTH, face_dim=20, inner=64, hidden=5, depth=6),
    "faceid-plus-v2": lambda: FacePlusV2Projection(
        24, WIDTH, face_dim=20, inner=64, hidden=5, depth=1
    ),
    "faceid-plus-kolors": lambda: FacePlusV2Projection(
        24, 2 * WIDTH, face_dim=20, tokens=6, inner=64, hidden=5, depth=2
    ),
}
TOKENS = {
    "faceid": 4,
    "portrait": 16,
    "portrait-unnorm": 3,
    "faceid-plus": 4,
    "faceid-plus-v2": 4,
    "faceid-plus-kolors": 6,
}


def lora_beside(layers: list[int], text: int, rank: int = 3) -> ModelLowRank:
    """For sites of these widths and the self-attention before each."""

    def sizes(width: int, cross: bool) -> dict[str, tuple[int, int, int]]:
        return {
            part: (text if cross and part in ("to_k", "to_v") else width, width, rank)
            for part in PARTS
        }

    return ModelLowRank(
        AttentionLowRank(sizes(width, cross)) for width in layers for cross in (False, True)
    )


def live(name: str) -> IPAdapter:
    torch.manual_seed(0)
    widths = [4 + number % 3 for number in range(16)]
    lora = lora_beside(widths, WIDTH) if find_variant(name).lora else None
    return IPAdapter(PROJECTIONS[name](), [ImageKV(WIDTH, width) for width in widths], UNET, lora)


def made(name: str, dtype: torch.dtype = torch.float32) -> AdapterFile:
    return adapter_file(live(name).to(dtype), find_variant(name), LAYERS, ORIGIN)


def refusal(path: Path, answer: str | None = None) -> str:
    with pytest.raises((CheckpointError, SettingError)) as caught:
        read_adapter(path, answer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def paper_tensors(name: str, folder: Path) -> dict[str, torch.Tensor]:
    write_adapter(folder / "whole.safetensors", bare(made(name)), "paper")
    return safetensors.torch.load_file(folder / "whole.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_every_layout_gives_back_the_bits(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    file = made(name, dtype)
    assert (file.tokens, file.token_dim) == (TOKENS[name], WIDTH)
    assert file.face_dim == (512 if name == "portrait-unnorm" else 20)
    for layout, suffix in WRITTEN:
        path = tmp_path / f"{layout}{suffix}"
        write_adapter(path, file, layout)
        read = read_adapter(path, name if suffix == ".bin" else None)
        assert_same_tensors(read, file)
        assert read.layout == layouts.ALIASES.get(layout, layout)
        assert read.header == (file.header if suffix == ".safetensors" else None)
        write_adapter(tmp_path / "back.safetensors", read)
        back = read_adapter(tmp_path / "back.safetensors")
        assert_same_tensors(back, file)
        assert back.layers == LAYERS
        assert back.variant.name == name


def test_the_names_of_the_low_rank_parts(tmp_path: Path) -> None:
    file = made("faceid")
    assert file.lora is not None
    block = "mid_block.attentions.0.transformer_blocks.0"
    names = {
        "imprompt": {
            f"lora.{block}.attn1.to_q.down.weight",
            f"lora.{block}.attn2.to_out.up.weight",
        },
        "paper": {"ip_adapter.0.to_q_lora.down.weight", "ip_adapter.31.to_out_lora.up.weight"},
        "modules": {
            "adapter_modules.30.to_k_lora.down.weight",
            "adapter_modules.1.to_v_lora.up.weight",
        },
    }
    for layout, some in names.items():
        write_adapter(tmp_path / "a.safetensors", file, layout)
        keys = safetensors.torch.load_file(tmp_path / "a.safetensors").keys()
        assert some <= keys
        assert len(keys) == 6 + 32 + 32 * 8
    write_adapter(tmp_path / "a.bin", file, "paper")
    nested = torch.load(tmp_path / "a.bin", weights_only=True)
    assert torch.equal(
        nested["ip_adapter"]["30.to_q_lora.up.weight"], file.lora[30]["to_q.up.weight"]
    )


@pytest.mark.parametrize("kept", ["unet", "both"])
def test_training_states_of_accelerate(tmp_path: Path, kept: str) -> None:
    file = made("faceid")
    state = {f"image_proj_model.{key}": tensor for key, tensor in file.projection.items()} | {
        "unet.conv_in.weight": torch.ones(3)
    }
    attentions = [name for layer in LAYERS for name in (layer.replace("attn2", "attn1"), layer)]
    for number, (name, parts) in enumerate(zip(attentions, file.lora or (), strict=True)):
        held = {key.replace(".", "_lora.", 1): tensor for key, tensor in parts.items()}
        if number % 2:
            held |= {
                f"to_{part}_ip.weight": tensor
                for part, tensor in zip("kv", file.kv[number // 2], strict=True)
            }
        state |= {f"unet.{name}.processor.{key}": tensor for key, tensor in held.items()}
        if kept == "both":
            state |= {
                f"adapter_modules.{number}.{key}": tensor.clone() for key, tensor in held.items()
            }
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    read = read_adapter(tmp_path)
    assert_same_tensors(read, file)
    assert read.layers == (LAYERS if kept == "unet" else None)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_live_adapter_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    adapter = live(name)
    write_adapter(
        tmp_path / "adapter.safetensors", adapter_file(adapter, find_variant(name), LAYERS)
    )
    file = read_adapter(tmp_path / "adapter.safetensors")
    loaded = build_adapter(file, UNET)
    ours, theirs = adapter.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (loaded.low_rank is not None) == file.variant.lora
    assert type(loaded.projection) is type(adapter.projection)


# What the tensors cannot tell


@pytest.mark.parametrize("name", PROJECTIONS)
def test_what_cannot_be_known_is_asked(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.bin"
    write_adapter(path, made(name), "paper")
    if name in ASKED:
        assert (
            refusal(path)
            == f"{path} is {ASKED[name]}, its tensors do not distinguish them: give one as variant="
        )
    else:
        assert read_adapter(path).variant.name == name
    read = read_adapter(path, name)
    assert read.variant.name == name
    assert type(build_adapter(read, UNET).projection) is find_variant(name).projection


def test_the_name_of_a_known_adapter_determines_its_variant(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_adapter(path, made("portrait-unnorm"), "paper")

    def read(stated: str | None, known: str) -> str:
        adapters = {"faces": KnownAdapter(Location("", str(path)), None, known)}
        model = KnownModel("own", "", Location(""), adapters=adapters)
        choice = AdapterChoice(adapter="faces", variant=stated)
        memory = MemoryOptions("cpu")
        loaded = LoadedAdapter.read(choice, model, object(), "cpu", torch.float32, None, memory)
        return loaded.file.variant.name

    assert read(None, "portrait-unnorm") == "portrait-unnorm"
    assert read("portrait-unnorm", "plus") == "portrait-unnorm"  # what the user states counts
    with pytest.raises(CheckpointError, match="do not distinguish them"):
        read(None, "")


def test_the_answer_is_kept_in_the_header(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.bin", made("faceid-plus"), "paper")
    write_adapter(
        tmp_path / "a.safetensors", read_adapter(tmp_path / "a.bin", "faceid-plus"), "paper", LAYERS
    )
    # the paper's layout has no header if the file had none
    assert "do not distinguish them" in refusal(tmp_path / "a.safetensors")
    write_adapter(tmp_path / "a.safetensors", read_adapter(tmp_path / "a.bin", "faceid-plus"))
    assert read_adapter(tmp_path / "a.safetensors").variant.name == "faceid-plus"


def test_an_answer_against_the_file_is_refused(tmp_path: Path) -> None:
    for name in ("faceid-plus", "portrait"):
        write_adapter(tmp_path / f"{name}.safetensors", made(name))
        write_adapter(tmp_path / f"{name}.bin", made(name), "paper")
    plus, portrait = tmp_path / "faceid-plus", tmp_path / "portrait"
    assert "header states faceid-plus, not faceid-plus-v2" in refusal(
        plus.with_suffix(".safetensors"), "faceid-plus-v2"
    )
    assert "faceid-plus-kolors by its tensors, not base" in refusal(
        plus.with_suffix(".bin"), "base"
    )
    assert "missing: ip_adapter.0.to_q_lora.down.weight" in refusal(
        portrait.with_suffix(".bin"), "faceid"
    )
    assert "unknown variant 'faceid2'; near: faceid" in refusal(plus.with_suffix(".bin"), "faceid2")


def test_a_plus_adapter_of_another_encoder_may_be_as_wide_as_a_face(tmp_path: Path) -> None:
    file = replace(made("portrait-unnorm"), variant=find_variant("plus"), header=None)
    write_adapter(tmp_path / "a.bin", file, "paper")
    assert "InstantID" in refusal(tmp_path / "a.bin")
    assert read_adapter(tmp_path / "a.bin", "plus").variant.name == "plus"
    write_adapter(tmp_path / "a.safetensors", read_adapter(tmp_path / "a.bin", "plus"))
    assert read_adapter(tmp_path / "a.safetensors").variant.name == "plus"


def test_what_is_said_of_a_file() -> None:
    rows = dict(describe(made("faceid-plus-v2")))
    assert rows["low-rank part"] == "rank 3, of 32 attentions"
    assert (
        rows["face encoder"]
        == "insightface's buffalo_l; its weights are for non-commercial research only"
    )
    assert (
        "24-wide penultimate hidden states of the aligned face, and a face embedding"
        in rows["suits"]
    )
    rows = dict(describe(made("faceid-plus-kolors")))
    assert rows["image tokens"] == "6, 1536 wide"
    assert rows["suits"].startswith("Kolors with 768-wide text and 16 cross-attentions")
    assert "insightface's antelopev2" in rows["face encoder"]
    file = replace(made("portrait"), header=None)
    assert (
        "face encoder: one with 20-wide face embedding (ArcFace, of unit length), e.g. "
        "insightface's buffalo_l" in file.suits()
    )


@pytest.mark.parametrize(
    ("name", "alike"), [("base", "light, light-v11"), ("plus", "plus-face, composition")]
)
def test_kinds_that_are_the_same_mathematics_are_named(name: str, alike: str) -> None:
    file = read_adapter(MODELS["emoji"].adapters[name].file.fetch_file())
    assert (
        dict(describe(file))["equivalent to"]
        == f"{alike}: its tensors do not distinguish them, and the result is the same"
    )


# Files that are not whole


def test_all_faults_are_named_in_one_line(tmp_path: Path) -> None:
    tensors = paper_tensors("faceid", tmp_path)
    del tensors["ip_adapter.4.to_q_lora.up.weight"], tensors["image_proj.norm.bias"]
    tensors |= {
        "ip_adapter.32.to_q_lora.up.weight": torch.ones(4, 3),
        "ip_adapter.1.to_k_lora.down.weight": torch.ones(3, 5),
    }
    tensors |= {
        "ip_adapter.6.to_out_lora.up.weight": torch.ones(4, 9),
        "ip_adapter.8.to_v_lora.up.weight": torch.ones(6, 3),
    }
    torch.save(tensors, tmp_path / "a.bin")
    line = refusal(tmp_path / "a.bin")
    assert "missing: image_proj.norm.bias, ip_adapter.4.to_q_lora.up.weight;" in line
    assert "unexpected: ip_adapter.32.to_q_lora.up.weight;" in line
    assert "ip_adapter.1.to_k_lora.down.weight [3, 5] instead of [3, 768]" in line
    assert "ip_adapter.6.to_out_lora.up.weight [4, 9] instead of [4, 3]" in line
    assert "ip_adapter.8.to_v_lora.up.weight [6, 3] instead of [5, 3]" in line


@pytest.mark.parametrize("name", ["faceid", "faceid-plus-kolors", "portrait-unnorm"])
def test_any_single_missing_or_misshapen_tensor_is_named(tmp_path: Path, name: str) -> None:
    tensors = paper_tensors(name, tmp_path)
    own = [
        key
        for key in tensors
        if "ip_adapter" not in key or key.startswith(("ip_adapter.9.", "ip_adapter.30."))
    ]
    for key in own:
        if key.endswith(
            (find_variant(name).signature, "proj.2.weight", ".latents", "layers.1.0.to_q.weight")
        ):
            continue  # the variant and the depth are told by these
        torch.save(
            {other: tensor for other, tensor in tensors.items() if other != key}, tmp_path / "a.bin"
        )
        assert f"missing: {key}" in refusal(tmp_path / "a.bin", name), key
        torch.save(tensors | {key: torch.ones(2, 3, 4, 5)}, tmp_path / "a.bin")
        assert f"{key} [2, 3, 4, 5]" in refusal(tmp_path / "a.bin", name), key


def test_a_file_that_lost_its_low_rank_part(tmp_path: Path) -> None:
    tensors = {
        key: tensor
        for key, tensor in paper_tensors("faceid-plus-v2", tmp_path).items()
        if "lora" not in key
    }
    torch.save(tensors, tmp_path / "a.bin")
    line = refusal(tmp_path / "a.bin", "faceid-plus-v2")
    assert line.count("_lora.") == 8
    assert "and 248 more" in line
    assert "faceid-plus or faceid-plus-v2" in refusal(tmp_path / "a.bin")


# Real sizes


def on_meta(
    name: str,
    text: int,
    blocks: unet_layers.UNetBlocks,
    widths: list[int],
    states: int,
    tokens: int,
    width: int,
) -> AdapterFile:
    """With the published projections' sizes; widths: of every site's keys."""
    layers = list(unet_layers.layer_names(blocks))
    with torch.device("meta"):
        kinds = {
            "faceid": lambda: FaceProjection(512, width, tokens),
            "portrait": lambda: FaceProjection(512, width, tokens),
            "portrait-unnorm": lambda: Resampler(512, width, tokens=tokens),
        }
        plus = FacePlusProjection if name == "faceid-plus" else FacePlusV2Projection
        projection = kinds.get(name, lambda: plus(states, width, tokens=tokens))()
        lora = lora_beside(widths, text, 128) if find_variant(name).lora else None
        adapter = IPAdapter(projection, [ImageKV(text, rows) for rows in widths], UNET, lora)
    return adapter_file(adapter, find_variant(name), layers)


def keys_of(base: str) -> list[int]:
    if base == "sd15":
        return [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
    return [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10


@pytest.mark.parametrize(
    ("name", "base", "tokens", "megabytes"),
    [  # of the published files, in half precision
        ("faceid", "sd15", 4, 96.7),
        ("faceid-plus", "sd15", 4, 157),
        ("faceid-plus-v2", "sd15", 4, 157),
        ("faceid", "sdxl", 4, 1070),
        ("faceid-plus-v2", "sdxl", 4, 1490),
    ],
)
def test_sizes_of_the_published_files(name: str, base: str, tokens: int, megabytes: float) -> None:
    text, blocks = (768, unet_layers.SD) if base == "sd15" else (2048, unet_layers.SDXL)
    file = on_meta(name, text, blocks, keys_of(base), 1280, tokens, text)
    assert 2 * file.parameters / 1e6 == pytest.approx(megabytes, rel=0.01)
    assert unet_layers.known_layers(text, len(file.kv)) == file.layers
    assert file.suits().startswith("SD 1.x" if base == "sd15" else "SDXL")


def test_kolors_of_its_own_sizes() -> None:
    file = on_meta("faceid-plus-kolors", 2048, unet_layers.SDXL, keys_of("sdxl"), 1024, 6, 4096)
    shapes = {key: tuple(tensor.shape) for key, tensor in file.projection.items()}
    assert shapes["proj.2.weight"] == (24576, 1024)
    assert shapes["perceiver_resampler.proj_in.weight"] == (4096, 1024)
    assert shapes["perceiver_resampler.layers.3.0.to_q.weight"] == (4096, 4096)
    assert sum(tensor.numel() for tensor in file.projection.values()) == pytest.approx(
        852e6, rel=0.001
    )
    assert (file.tokens, file.token_width, file.token_dim) == (6, 4096, 2048)
    assert file.suits().startswith(
        "Kolors with 2048-wide text and 70 cross-attentions; image encoder: CLIP ViT-L/14"
    )


def test_kolors_as_it_is_published(tmp_path: Path) -> None:
    """A nested pickle whose second half has another name than the paper's."""
    file = made("faceid-plus-kolors")
    numbered = {f"{2 * layer + 1}.to_{part}_ip.weight": tensor for layer, pair in enumerate(file.kv)
                for part, tensor in zip("kv", pair, strict=True)}  # fmt: skip
    torch.save(
        {"image_proj": file.projection, "adapter_modules": numbered},
        tmp_path / "ipa-faceid-plus.bin",
    )
    read = read_adapter(tmp_path / "ipa-faceid-plus.bin")
    assert_same_tensors(read, file)
    assert (read.layout, read.variant.name) == ("modules", "faceid-plus-kolors")


@pytest.mark.parametrize(
    ("norm", "text", "kolors"), [(4096, 2048, True), (768, 768, False), (768, None, False)]
)
def test_kolors_is_known_by_two_widths(norm: int, text: int | None, kolors: bool) -> None:
    assert of_kolors(CheckpointEvidence({"norm.weight": (norm,)}, False, text)) is kolors
    assert not of_kolors(CheckpointEvidence({"norm.weight": (norm,)}, True, text))
    assert not of_kolors(CheckpointEvidence({}, False, text))


@pytest.mark.parametrize("name", ["faceid-plus", "faceid-plus-v2"])
def test_a_file_without_added_projections_is_told_what_is_missing(
    tmp_path: Path, name: str
) -> None:
    file = made(name)
    torch.save({"image_proj": file.projection, "ip_adapter": {}}, tmp_path / "a.bin")
    said = refusal(tmp_path / "a.bin")
    assert "is not a complete faceid-plus adapter (paper layout). missing: ip_adapter.*" in said
    assert "kolors" not in said.lower()


def test_kolors_plus_with_an_inner_width_of_its_own(tmp_path: Path) -> None:
    """Its resampler's attention is narrower than its tokens: 12 heads of 64 beside 2048 (here 2
    beside 192).
    """
    torch.manual_seed(1)
    resampler = Resampler(48, WIDTH, tokens=16, width=192, inner=128, hidden=300)
    file = adapter_file(
        IPAdapter(resampler, [ImageKV(WIDTH, 4) for _ in range(16)], UNET),
        find_variant("plus"),
        LAYERS,
    )
    write_adapter(tmp_path / "a.bin", file, "paper")
    read = read_adapter(tmp_path / "a.bin")
    loaded = build_adapter(read, UNET)
    assert read.variant.name == "plus"
    features = torch.randn(2, 7, 48)
    assert torch.equal(loaded.tokens(features), resampler(features))


def test_the_commands_take_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from imprompt.cli.adapters import LayoutName, convert, inspect

    write_adapter(tmp_path / "a.bin", made("faceid-plus-v2"), "paper")
    with pytest.raises(CheckpointError, match="give one as variant="):
        inspect(tmp_path / "a.bin")
    convert(
        tmp_path / "a.bin",
        tmp_path / "b.safetensors",
        LayoutName.imprompt,
        variant="faceid-plus-v2",
    )
    inspect(tmp_path / "b.safetensors")
    assert re.search(r"\nvariant +faceid-plus-v2\n", capsys.readouterr().out)


# The names that a user may say


def test_known_faceid_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Location, "fetch_file", lambda self: Path(self.path))
    for model in (MODELS["sd15"], MODELS["sdxl"]):
        known = {name: row for name, row in model.adapters.items() if row.licence}
        assert {"faceid", "faceid-plus-v2", "portrait"} <= known.keys() <= BY_NAME.keys()
        for name, row in known.items():
            found = find_adapter(model, name)
            assert found == (Path(row.file.path), row.encoder, name, row.usual)
            assert (row.encoder is not None) == (find_variant(name).image_feature is not None)
            assert "non-commercial" in row.licence
            assert find_adapter(MODELS["emoji"], f"{row.file.repo}/{row.file.path}") == found
    assert find_adapter(MODELS["sd15"], "base").variant == ""
    other = (Path("file.bin"), None, "", Usual())
    assert find_adapter(MODELS["sd15"], "some/repository/file.bin") == other


def test_every_variant_is_made_here() -> None:
    assert PROJECTIONS.keys() == {row.name for row in FACES}
