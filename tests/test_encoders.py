"""Every kind of image encoder against transformers' own, and an adapter's life with each."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from imprompt import ImagePromptPipeline, Reference
from imprompt.checkpoints.adapters import describe, read_adapter
from imprompt.encoders.choices import Noise
from imprompt.encoders.feature_cache import CachedFeatures, FeatureFolder
from imprompt.encoders.kinds import KINDS
from imprompt.encoders.noise import noise_negative
from imprompt.encoders.preparation import Preparation, encoder_square, mean_colour, prepare, side_of
from imprompt.encoders.vision import VisionEncoder, describe_encoder, open_encoder, preprocess
from imprompt.errors import CheckpointError, ImpromptError, MismatchError, SettingError
from imprompt.families.published import ENCODERS, encoder_structure, published_encoder
from imprompt.models import Location
from imprompt.training.loop import train
from imprompt.variants import TRAINABLE, find_variant, levels_of
from tests.runs import losses, picture_folder, recipe, saved_pipeline
from tests.tiny import pictures, seeded

SIDE = 28
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 7,
}
CONFIGS: dict[str, Any] = {  # of the vision models alone
    "clip": transformers.CLIPVisionConfig(**TINY, intermediate_size=48, projection_dim=24),
    "siglip": transformers.SiglipVisionConfig(**TINY, intermediate_size=48),
    "dinov2": transformers.Dinov2Config(**TINY, mlp_ratio=2),
    "dinov2_with_registers": transformers.Dinov2WithRegistersConfig(
        **TINY, mlp_ratio=2, num_register_tokens=4
    ),
}
ROWS = {"clip": 17, "siglip": 16, "dinov2": 17, "dinov2_with_registers": 21}
SETTINGS: dict[str, dict[str, Any]] = {  # as their published preprocessor_config.json, at this side
    "clip": {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
    "siglip": {"size": {"height": SIDE, "width": SIDE}},
    "dinov2": {
        "size": {"shortest_edge": 32},
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
}
SETTINGS["dinov2_with_registers"] = SETTINGS["dinov2"]
FEATURES = ("pooled", "penultimate", "last", "levels 0", "levels 1,3")
SIZE = {"width": 32, "height": 32, "steps": 2}


@pytest.fixture(scope="module", params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random encoder of that kind, without a preprocessor_config.json."""
    return saved(name, tmp_path_factory.mktemp("encoders") / name)


def saved(name: str, folder: Path, seed: int = 0) -> Path:
    with seeded(seed):
        model = getattr(transformers, KINDS[name].model)(CONFIGS[name])
        for parameter in model.parameters():  # where it starts at zero too
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def opened(folder: Path) -> VisionEncoder:
    return open_encoder(Location(str(folder)), "cpu", torch.float32)


def with_processor(name: str, folder: Path, beside: Path, **changes: Any) -> Path:
    """A copy of the encoder with a preprocessor_config.json in it."""
    shutil.copytree(folder, beside)
    processor = getattr(transformers, KINDS[name].processor)(**SETTINGS[name] | changes)
    processor.save_pretrained(beside)
    return beside


def their_processor(folder: Path) -> Any:
    """Return the folder's processor by transformers alone; older ones need torchvision."""
    try:
        return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    except ImportError:
        pytest.skip("this transformers' AutoImageProcessor needs torchvision")


def theirs(folder: Path, image: Image.Image, feature: str) -> Tensor:
    """The feature by transformers alone."""
    processor = their_processor(folder)
    kind = KINDS[json.loads((folder / "config.json").read_text())["model_type"]]
    model = getattr(transformers, kind.model).from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(**processor(image, return_tensors="pt"), output_hidden_states=True)
    if feature == "pooled":
        return out.image_embeds if kind.name == "CLIP" else out.pooler_output
    if feature == "last":
        return out.last_hidden_state
    states = out.hidden_states
    if feature == "penultimate":
        return states[-2]
    return torch.cat([states[level] for level in levels_of(feature)], -1)


# What transformers gives


@pytest.mark.parametrize("feature", FEATURES)
def test_features_are_those_of_transformers(
    name: str, folder: Path, feature: str, tmp_path: Path
) -> None:
    """Bit for bit, with a preprocessor_config.json and, by the row's own settings, without."""
    whole = with_processor(name, folder, tmp_path / "whole")
    for image in (*pictures(1), pictures(1)[0].resize((30, 47)), Image.new("RGB", (SIDE, SIDE))):
        expected = theirs(whole, image, feature)
        for place in (whole, folder):
            encoder = opened(place)
            found = encoder.features([image], feature)
            assert torch.equal(found, expected)
            assert encoder.structure.shape(feature) == found.shape[1:]
            assert encoder.feature_dim(feature) == found.shape[-1]


def test_rows_are_the_class_token_registers_and_patches(name: str, folder: Path) -> None:
    encoder = opened(folder)
    assert encoder.features(pictures(2), "last").shape == (2, ROWS[name], 32)
    assert encoder.structure.patches == ROWS[name]


def test_a_folder_says_how_its_pictures_are_made_ready(
    name: str, folder: Path, tmp_path: Path
) -> None:
    """Also under the name that transformers' processors of pictures and texts write."""
    other = {"image_mean": [0.2, 0.3, 0.4], "image_std": [0.5, 0.6, 0.7], "resample": 2}
    place = with_processor(name, folder, tmp_path / "other", **other)
    image = pictures(1)[0]
    expected = theirs(place, image, "pooled")
    assert torch.equal(opened(place).features([image], "pooled"), expected)
    assert not torch.equal(opened(folder).features([image], "pooled"), expected)
    said = json.loads((place / "preprocessor_config.json").read_text())
    (place / "preprocessor_config.json").unlink()
    (place / "processor_config.json").write_text(json.dumps({"image_processor": said}))
    assert torch.equal(opened(place).features([image], "pooled"), expected)


def test_a_vision_model_is_taken_out_of_a_whole_one(tmp_path: Path) -> None:
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 60,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = CONFIGS["siglip"].to_dict()
    whole: Any = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text, vision_config=vision)
    )
    whole.save_pretrained(tmp_path)
    encoder = opened(tmp_path)
    own = whole.vision_model.state_dict()
    assert all(torch.equal(own[key], weight) for key, weight in encoder.model.state_dict().items())
    assert encoder.features(pictures(1), "last").shape == (1, 16, 32)


# Sizes of what is published


@pytest.mark.parametrize(
    ("config", "side", "pooled", "hidden"),
    [
        (
            transformers.CLIPVisionConfig(
                hidden_size=1280,
                intermediate_size=5120,
                projection_dim=1024,
                num_hidden_layers=32,
                num_attention_heads=16,
                patch_size=14,
            ),
            224,
            (1024,),
            (257, 1280),
        ),
        (
            transformers.SiglipVisionConfig(
                hidden_size=1152,
                intermediate_size=4304,
                num_hidden_layers=27,
                num_attention_heads=16,
                image_size=384,
                patch_size=14,
            ),
            384,
            (1152,),
            (729, 1152),
        ),
        (
            transformers.Dinov2Config(
                hidden_size=1536,
                num_hidden_layers=40,
                num_attention_heads=24,
                image_size=518,
                patch_size=14,
                use_swiglu_ffn=True,
            ),
            224,
            (1536,),
            (257, 1536),
        ),
    ],
    ids=["CLIP ViT-H/14", "SigLIP so400m/14", "DINOv2 giant/14"],
)
def test_published_sizes(config: Any, side: int, pooled: Any, hidden: Any) -> None:
    """By a pass on the meta device, by the row, and by the table of published encoders."""
    kind = KINDS[config.model_type]
    processor = getattr(transformers, kind.processor)(**kind.settings(config))
    assert side_of(processor) == side
    with torch.device("meta"):
        encoder = VisionEncoder(getattr(transformers, kind.model)(config), processor)
        for feature, shape in (
            ("pooled", pooled),
            ("penultimate", hidden),
            ("last", hidden),
            ("levels 7,13,26", (hidden[0], 3 * hidden[1])),
        ):
            found = encoder.features_of(torch.empty(1, 3, side, side), feature)
            assert tuple(found.shape[1:]) == shape == encoder.structure.shape(feature)
    row = published_encoder("pooled", pooled[0])
    assert row is not None
    assert row.structure == encoder.structure


PUBLISHED = [  # preprocessor_config.json, but for what all say alike
    (  # openai/clip-vit-large-patch14
        transformers.CLIPVisionConfig(image_size=224),
        {
            "feature_extractor_type": "CLIPFeatureExtractor",
            "do_center_crop": True,
            "crop_size": 224,
            "size": 224,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    ),
    (  # google/siglip-so400m-patch14-384
        transformers.SiglipVisionConfig(image_size=384, patch_size=14),
        {
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "SiglipProcessor",
            "size": {"height": 384, "width": 384},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    ),
    (  # facebook/dinov2-giant, whose configuration says 518 pixels
        transformers.Dinov2Config(image_size=518),
        {
            "image_processor_type": "BitImageProcessor",
            "do_center_crop": True,
            "crop_size": {"height": 224, "width": 224},
            "size": {"shortest_edge": 256},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
    ),
]


@pytest.mark.parametrize(("config", "said"), PUBLISHED, ids=["CLIP", "SigLIP", "DINOv2"])
def test_a_kinds_own_settings_are_the_published_ones(
    config: Any, said: dict[str, Any], tmp_path: Path
) -> None:
    both = {"do_resize": True, "do_normalize": True, "resample": 3}
    config.save_pretrained(tmp_path)
    image = pictures(1)[0].resize((500, 333))
    (own, published) = (
        preprocess(describe_encoder(Location(str(tmp_path))).processor, [image])
        for text in (None, json.dumps(said | both))
        if text is None or (tmp_path / "preprocessor_config.json").write_text(text)
    )
    assert torch.equal(own, published)


def test_an_encoder_in_a_folder_tells_its_structure_without_weights(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    assert encoder_structure(Location(str(tmp_path))) == opened(folder).structure


def test_the_tables_agree() -> None:
    assert {row.structure.kind for row in ENCODERS} <= {kind.name for kind in KINDS.values()}
    assert {*CONFIGS} < {*KINDS}
    for name, config in CONFIGS.items():
        assert KINDS[config.model_type] is KINDS[name]


# No image


def test_what_stands_for_no_image(folder: Path) -> None:
    encoder = opened(folder)
    zero = torch.zeros(1, 3, SIDE, SIDE)
    base, plus = find_variant("base"), find_variant("plus")
    assert torch.equal(encoder.null_features(base), torch.zeros(1, encoder.structure.pooled))
    for row in (plus, plus.reading("last"), plus.reading("levels 1,3")):
        found = encoder.null_features(row)
        assert torch.equal(found, encoder.features_of(zero, row.feature))
        assert found.any()


def test_kept_features_are_the_encoders(folder: Path, tmp_path: Path) -> None:
    """And a processor is had without the weights."""
    encoder, place = opened(folder), Location(str(folder))
    rows = [find_variant("base"), find_variant("full").reading("levels 1,3")]

    def closed() -> VisionEncoder:
        raise AssertionError("opened")

    for opener in (lambda: encoder, closed):
        kept = CachedFeatures(opener, place, "cpu", torch.float32, FeatureFolder(tmp_path))
        assert torch.equal(
            preprocess(kept.processor, pictures(1)), preprocess(encoder.processor, pictures(1))
        )
        if opener is closed:
            kept._fingerprint = encoder.fingerprint()
        for row in rows:
            assert torch.equal(
                kept.features(pictures(2), row.feature),
                encoder.features(pictures(2), row.feature),
            )
            assert torch.equal(kept.null_features(row), encoder.null_features(row))


# Crops


def striped(size: tuple[int, int]) -> Image.Image:
    """Red, then green, then blue along the longer side, a third each."""
    image = Image.new("RGB", size, "lime")
    width, height = size
    ends = (
        [(0, 0, width // 3, height), (width - width // 3, 0, width, height)]
        if width > height
        else [(0, 0, width, height // 3), (0, height - height // 3, width, height)]
    )
    for box, colour in zip(ends, ("red", "blue"), strict=True):
        ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=colour)
    return image


def seen(encoder: VisionEncoder, image: Image.Image, crop: str | None) -> np.ndarray:
    (made,) = prepare(image, Preparation(crop=crop), encoder)
    return np.asarray(encoder_square(made, encoder.processor)).astype(int)


RED, LIME, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.mark.parametrize("size", [(168, 56), (56, 168)])
def test_crops_show_what_they_say(folder: Path, size: tuple[int, int]) -> None:
    encoder, image, wide = opened(folder), striped(size), size[0] > size[1]
    start, end = ("left", "right") if wide else ("top", "bottom")
    along = slice(None), SIDE // 2
    for crop, colour in ((start, RED), ("center", LIME), (end, BLUE)):
        # at the edges resampling mixes in what is beside
        assert (seen(encoder, image, crop)[2:-2, 2:-2] == colour).all(), crop
    for across in ("top", "bottom") if wide else ("left", "right"):
        assert np.array_equal(seen(encoder, image, across), seen(encoder, image, "center"))
    squashed = seen(encoder, image, "squash")
    line = squashed[along[::-1]] if wide else squashed[along]
    assert [tuple(line[at]) for at in (0, SIDE // 2, SIDE - 1)] == [RED, LIME, BLUE]
    padded = seen(encoder, image, "pad")
    edge, line = (padded[0], padded[SIDE // 2]) if wide else (padded[:, 0], padded[:, SIDE // 2])
    assert (edge == mean_colour(encoder.processor)).all()
    assert [tuple(line[at]) for at in (0, SIDE // 2, SIDE - 1)] == [RED, LIME, BLUE]
    tiles = prepare(image, Preparation(crop="tiles"), encoder)
    shown = [np.asarray(encoder_square(tile, encoder.processor)) for tile in tiles]
    assert all((one == colour).all() for one, colour in zip(shown, (RED, LIME, BLUE), strict=True))


@pytest.mark.parametrize("size", [(168, 56), (56, 168), (SIDE, SIDE)])
def test_by_itself_siglip_sees_all_and_others_the_middle(
    name: str, folder: Path, size: tuple[int, int]
) -> None:
    encoder, image = opened(folder), striped(size)
    own = "squash" if name == "siglip" else "center"
    assert np.array_equal(seen(encoder, image, None), seen(encoder, image, own))
    assert prepare(image, Preparation(), encoder) == [image]


@pytest.mark.parametrize("crop", [None, "center", "left", "pad", "squash", "tiles"])
def test_what_is_made_ready_stays_as_it_is(folder: Path, crop: str | None) -> None:
    """Sharpened squares and noise reach the network pixel by pixel."""
    encoder, image = opened(folder), pictures(1)[0]
    for made in prepare(image, Preparation(crop=crop, sharpening=0.6), encoder):
        square = encoder_square(made, encoder.processor)
        (again,) = prepare(square, Preparation(crop="squash"), encoder)
        assert np.array_equal(encoder_square(again, encoder.processor), square)
    negative = noise_negative(image, Noise(kind="fade", strength=0.0), encoder)
    assert np.array_equal(
        encoder_square(negative, encoder.processor), encoder_square(image, encoder.processor)
    )


@pytest.mark.parametrize("crop", [None, "center", "top", "left", "pad", "squash", "tiles"])
@pytest.mark.parametrize("size", [(1, 1), (5_000, 2), (3, 900)])
def test_pictures_of_any_shape_become_features(
    folder: Path, crop: str | None, size: tuple[int, int]
) -> None:
    encoder = opened(folder)
    made = prepare(Image.new("RGB", size, "red"), Preparation(crop=crop), encoder)
    features = encoder.features(made, "pooled")
    assert features.shape == (len(made), encoder.structure.pooled)
    assert features.isfinite().all()


# Training, loading, generating


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_pipeline(tmp_path_factory.mktemp("models") / "sd1", "sd1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures"))


LIVES = [
    ("siglip", "base", None),
    ("siglip", "plus", None),
    ("siglip", "full", "last"),
    ("siglip", "plus", "levels 1,3"),
    ("dinov2", "base", None),
    ("dinov2", "plus", "levels 0,1,2"),
    ("dinov2", "full", None),
    ("dinov2_with_registers", "plus", "last"),
]


@pytest.mark.parametrize(("kind", "variant", "feature"), LIVES)
def test_an_adapter_is_trained_saved_loaded_and_used(
    kind: str, variant: str, feature: str | None, model: Path, source: Path, tmp_path: Path
) -> None:
    """On features encoded once; with the encoder's fingerprint; with that encoder alone."""
    place = saved(kind, tmp_path / "encoder")
    sizes = {"depth": 1} if variant == "plus" else {}
    plan = recipe(
        source,
        tmp_path / "run",
        2,
        model=str(model),
        variant=variant,
        encoder=str(place),
        feature=feature,
        data={"size": 32, "features": tmp_path / "features"},
        **sizes,
    )
    latest = train(plan)
    assert len(losses(tmp_path / "run")) == 2
    assert np.isfinite(losses(tmp_path / "run")).all()
    file, encoder = read_adapter(latest), opened(place)
    row = TRAINABLE[variant].reading(feature)
    assert file.header is not None
    assert (file.variant, file.feature_dim) == (row, encoder.feature_dim(row.feature))
    assert file.header.encoder == f"../{place.name}"  # from the run
    assert file.header.encoder_fingerprint == encoder.fingerprint()
    assert dict(describe(file))["encoder"] == f"../{place.name}"

    pipe = ImagePromptPipeline.from_pretrained(str(model), adapter=latest, device="cpu")
    reader: Any = pipe.first.reader
    image = pictures(1)[0]
    assert torch.equal(reader.encoder.features([image], row.feature),
                       encoder.features([image], row.feature))  # fmt: skip
    one, other, cropped = (
        np.asarray(pipe(Reference(images=picture, **said), seed=1, **SIZE).images[0])
        for picture, said in (
            (image, {}),
            (Image.new("RGB", (40, 40), "red"), {}),
            (image, {"crop": "pad", "sharpening": 0.5, "negative": "fade"}),
        )
    )
    assert one.shape == (32, 32, 3)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, cropped)

    others = saved(kind, tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match="trained with other weights of the image encoder"):
        ImagePromptPipeline.from_pretrained(
            str(model), adapter=latest, encoder=others, device="cpu"
        )
    clip = saved("clip", tmp_path / "clip")
    with pytest.raises(MismatchError, match=r"other weights|gives 24-wide ones"):
        ImagePromptPipeline.from_pretrained(str(model), adapter=latest, encoder=clip, device="cpu")


def test_features_of_another_kind_of_encoder_are_refused(
    model: Path, source: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "features"
    places = {kind: saved(kind, tmp_path / kind) for kind in ("siglip", "dinov2")}
    common = {"model": str(model), "variant": "plus", "depth": 1}
    data = {"size": 32, "features": kept}
    train(recipe(source, tmp_path / "a", 1, encoder=str(places["siglip"]), data=data, **common))
    with pytest.raises(SettingError, match="holds features of encoder"):
        train(recipe(source, tmp_path / "b", 1, encoder=str(places["dinov2"]), data=data, **common))
    with pytest.raises(SettingError, match=r"feature .*penultimate.*last"):
        train(
            recipe(
                source,
                tmp_path / "c",
                1,
                encoder=str(places["siglip"]),
                feature="last",
                data=data,
                **common,
            )
        )


# One line


def refused(place: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edited(folder: Path, beside: Path, **changes: Any) -> Path:
    """A copy whose configuration says otherwise."""
    shutil.copytree(folder, beside)
    config = json.loads((beside / "config.json").read_text()) | changes
    (beside / "config.json").write_text(json.dumps(config))
    return beside


@pytest.mark.parametrize("model_type", ["siglip_text_model", "siglip2", "vit", "nobody's"])
def test_an_unknown_kind_says_which_are_known(
    folder: Path, model_type: str, tmp_path: Path
) -> None:
    place = edited(folder, tmp_path / "other", model_type=model_type)
    assert refused(place).endswith(
        f"(it holds a {model_type}, not a CLIP, SigLIP or DINOv2 image encoder)"
    )


def test_missing_weights_are_an_error(name: str, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "part"
    shutil.copytree(folder, place)
    weights = load_file(place / "model.safetensors")
    lost = sorted(weights)[0]
    del weights[lost]
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    assert f"holds an incomplete {KINDS[name].name} image encoder: {lost} missing" in refused(place)
    (place / "model.safetensors").unlink()
    assert "no image encoder can be loaded from" in refused(place)


def test_a_processor_that_cannot_serve_is_an_error(name: str, folder: Path, tmp_path: Path) -> None:
    place = with_processor(name, folder, tmp_path / "odd")
    said = json.loads((place / "preprocessor_config.json").read_text())
    if name in ("clip", "siglip"):
        half = {"height": SIDE // 2, "width": SIDE // 2}
        odd = said | {"do_center_crop": True, "crop_size": half}
        (place / "preprocessor_config.json").write_text(json.dumps(odd))
        assert "makes pictures of 14 × 14 pixels; it reads 28 × 28" in refused(place)
    for changes in (
        {"do_center_crop": False, "size": {"shortest_edge": SIDE}},
        {"do_center_crop": True, "crop_size": {"height": SIDE, "width": 2 * SIDE}},
    ):
        (place / "preprocessor_config.json").write_text(json.dumps(said | changes))
        assert "its image processor does not make squares of one size" in refused(place)
    (place / "preprocessor_config.json").write_text("{")
    assert "no image encoder can be loaded from" in refused(place)


def test_no_code_of_a_folder_runs(name: str, folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    place = with_processor(name, folder, tmp_path / "coded")
    (place / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass M: pass\n")
    for file in ("config.json", "preprocessor_config.json"):
        said = json.loads((place / file).read_text())
        said["auto_map"] = dict.fromkeys(
            ("AutoConfig", "AutoModel", "AutoImageProcessor"), "mine.M"
        )
        (place / file).write_text(json.dumps(said))
    assert opened(place).features(pictures(1), "pooled").isfinite().all()
    assert not ran.exists()


@pytest.mark.parametrize("feature", ["levels 4", "levels 1,9", "face", "face and crop", "tokens"])
def test_a_feature_that_is_not_given_says_which_are(name: str, folder: Path, feature: str) -> None:
    encoder, kind = opened(folder), KINDS[name].name
    for ask in (encoder.feature_dim, lambda one: encoder.features(pictures(1), one)):
        with pytest.raises(MismatchError) as caught:
            ask(feature)
        assert str(caught.value).startswith(
            f"a {kind} image encoder gives no {feature}: this one gives pooled, penultimate, last "
            "and levels 0 to 3"
        )
        assert ("imprompt.encoders.face" in str(caught.value)) == ("face" in feature)


def test_a_siglip_without_its_head_gives_no_pooled_feature(tmp_path: Path) -> None:
    config = transformers.SiglipVisionConfig(**TINY, intermediate_size=48, vision_use_head=False)
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path)
    encoder = opened(tmp_path)
    assert encoder.features(pictures(1), "last").shape == (1, 16, 32)
    with pytest.raises(MismatchError, match="gives no pooled: this one gives penultimate, last"):
        encoder.null_features(find_variant("base"))


@pytest.mark.parametrize(
    "feature", ["levels", "levels ", "levels 1, 2", "levels 2,1", "levels 1,1", "levels -1",
                "levels 01", "levels 1,", "levels1", "levels 1\n"]
)  # fmt: skip
def test_levels_have_one_spelling(feature: str) -> None:
    with pytest.raises(SettingError, match="write levels as rising numbers"):
        levels_of(feature)


@pytest.mark.parametrize(
    ("variant", "feature", "words"),
    [
        ("base", "last", "the base variant reads pooled and no other"),
        ("plus", "pooled", "the plus variant reads penultimate, last or levels"),
        ("full", "face", "the full variant reads penultimate, last or levels"),
        ("plus", "levels 2,1", "write levels as rising numbers"),
        ("faceid", "last", "the faceid variant reads face and no other"),
    ],
)
def test_a_variant_reads_what_its_projection_can(variant: str, feature: str, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        find_variant(variant).reading(feature)
    assert find_variant(variant).reading(None) is find_variant(variant)


def test_a_run_says_what_its_encoder_does_not_give(
    model: Path, source: Path, tmp_path: Path
) -> None:
    place = saved("siglip", tmp_path / "encoder")
    plan = recipe(
        source,
        tmp_path / "run",
        1,
        model=str(model),
        variant="plus",
        encoder=str(place),
        feature="levels 2,7",
        data={"size": 32},
    )
    with pytest.raises(ImpromptError, match=r"gives no levels 2,7: .* levels 0 to 3"):
        train(plan)


def test_descriptions_need_no_weights(name: str, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]
    found = describe_encoder(Location(str(tmp_path)))
    assert (found.kind, found.structure.patches) == (KINDS[name], ROWS[name])
