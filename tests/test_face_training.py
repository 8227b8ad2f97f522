"""FaceID adapters in training: where faces come from, what is bad, the low-rank part, and files
that diffusers reads.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imprompt.checkpoints.adapters import describe, load_adapter, read_adapter, write_adapter
from imprompt.encoders import face_sources
from imprompt.encoders.embedding_files import Embedding, load_embedding, save_embedding
from imprompt.encoders.face import Face, InsightFace
from imprompt.encoders.face_sources import open_face_source
from imprompt.encoders.vision import VisionEncoder
from imprompt.errors import ImageError, ImpromptError, MismatchError, SettingError
from imprompt.families.unet import UNET
from imprompt.generation.pipeline import ImagePromptPipeline
from imprompt.generation.references import Reference
from imprompt.training import loop
from imprompt.training.cache import FeatureReader, read_manifest
from imprompt.training.model import start_adapter
from imprompt.training.recipe import Recipe
from imprompt.training.watch import LogRow, Metrics, Watcher
from imprompt.variants import FACES, TRAINABLE, find_variant
from tests.commands import smallest_model
from tests.parity.test_diffusers import run, set_their_scale, start
from tests.runs import (
    COLOURS,
    begun,
    losses,
    names,
    of_variant,
    picture_folder,
    recipe,
    saved_pipeline,
    stored_faces,
    tensors,
)
from tests.tiny import noise, noise_inputs, smallest_unet

NAMES = [row.name for row in FACES if row.name in TRAINABLE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("faces") / "set")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smallest_model(tmp_path_factory.mktemp("models"))


def plan_of(name: str, folder: Path, run: Path, model: Path, steps: int = 4, **more: Any) -> Recipe:
    given = of_variant(name, folder) | {"model": str(model)} | more
    return recipe(folder, run, steps, **given | {"data": {"size": 16, **more.get("data", {})}})


# The low-rank part


def test_a_new_low_rank_part_adds_nothing_and_is_of_the_published_rank() -> None:
    base = smallest_unet()
    plan = Recipe.model_validate(
        {
            "model": "sd15",
            "variant": "faceid",
            "output": "run",
            "data": {"source": "set"},
            "optimization": {"steps": 1},
        }
    )
    adapter = start_adapter(plan, base, {"face": 512}).attach(base)
    assert len(adapter.low_rank) == len(UNET.attentions(base)) == 2 * len(adapter.image_kv)
    for part in adapter.low_rank:
        for layer in (part.to_q, part.to_k, part.to_v, part.to_out):
            assert layer.down.out_features == layer.up.in_features == 128
            assert layer.up.weight.abs().max() == 0
            assert layer.down.weight.std().item() == pytest.approx(1 / 128, rel=0.1)
    inputs = noise_inputs(base, 1)
    with torch.no_grad():
        prompt = adapter.prompt(adapter.tokens(torch.ones(1, 512)))
        with_part = noise(base, inputs, prompt)
        without = noise(base, inputs, prompt._replace(low_rank=()))
        torch.testing.assert_close(with_part, without, rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_part_of_the_low_rank_part(
    checkpointing: bool, folder: Path, model: Path, tmp_path: Path
) -> None:
    plan = plan_of(
        "faceid", folder, tmp_path, model, 3, optimization={"checkpointing": checkpointing}
    )
    run = begun(plan)
    before = run.trainer.weights()
    assert sum(".up." in name for name in before) == 4 * 8
    run.go()
    after = run.trainer.weights()
    # Weight decay alone moves down by 1e-5 of itself a step; its gradient moves it by the rate.
    moved = {name: (after[name] - before[name]).abs().max() for name in before}
    assert all(moved[name] > 5e-4 for name in before if "low_rank" in name)


def test_sharded_or_not_the_weights_of_a_training_step_are_never_old(folder: Path) -> None:
    assert folder.exists()
    base = smallest_unet()
    plan = Recipe.model_validate(
        {
            "model": "sd15",
            "variant": "faceid",
            "rank": 2,
            "output": "run",
            "data": {"source": "set"},
            "optimization": {"steps": 1},
        }
    )
    part = start_adapter(plan, base, {"face": 20}).low_rank
    kept = part.weights(torch.bfloat16)
    assert kept is not part.weights(torch.bfloat16)
    with torch.no_grad():
        first = part.weights(torch.bfloat16)
        assert first is part.weights(torch.bfloat16)
        version = part[0].to_q.up.weight._version
        part[0].to_q.up.weight.data.fill_(1.0)  # as FSDP2 gathers weights: no version tells of it
        assert part[0].to_q.up.weight._version == version
    part.weights(torch.bfloat16)  # a training step
    with torch.no_grad():
        assert part.weights(torch.bfloat16)[0].to_q[1].eq(1).all()


# Faces of the set


@pytest.mark.parametrize("name", NAMES)
def test_features_encoded_once_train_as_pictures_do(
    name: str, folder: Path, model: Path, tmp_path: Path
) -> None:
    online = plan_of(name, folder, tmp_path / "pictures", model)
    cached = plan_of(
        name, folder, tmp_path / "features", model, data={"features": tmp_path / "kept"}
    )
    for plan in (online, cached):
        loop.train(plan)
    assert losses(tmp_path / "pictures") == pytest.approx(losses(tmp_path / "features"), rel=5e-3)
    row, reader = find_variant(name), FeatureReader(tmp_path / "kept")
    stored = load_embedding(online.faces or "").features
    for index in range(len(COLOURS)):
        image = reader.read(index, False, 0.0).image
        assert list(image) == ["face", "image"][: 1 + (row.image_feature is not None)]
        face = stored[index]
        raw = row.feature.startswith("raw")
        torch.testing.assert_close(image["face"], face if raw else face / face.norm())
        assert image["face"].dtype == torch.float32
    assert reader.nulls["face"].eq(0).all()
    assert reader.identity["faces"] == online.faces
    assert reader.identity["face_encoder"] == "our-faces"


def test_of_faceid_plus_the_states_are_those_of_the_crop(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    """A stored face has its whole picture as its crop."""
    plan = plan_of("faceid-plus-v2", folder, tmp_path / "run", model, 1)
    loop.train(plan.model_copy(update={"data": plan.data.model_copy(
        update={"features": tmp_path / "kept"})}))  # fmt: skip
    pipe = ImagePromptPipeline.from_pretrained(
        str(model), adapter=tmp_path / "run" / "latest", device="cpu"
    )
    vision: VisionEncoder = pipe.first.reader.encoder.vision
    reader = FeatureReader(tmp_path / "kept")
    states = vision.features([Image.open(folder / "3.png").convert("RGB")], "penultimate")[0]
    torch.testing.assert_close(reader.read(3, False, 0).image["image"].float(), states,
                               rtol=2e-3, atol=2e-3)  # fmt: skip
    nulls = pipe.first.reader.encoder.null_features(find_variant("faceid-plus-v2"))[1]
    torch.testing.assert_close(reader.nulls["image"].float(), nulls, rtol=2e-3, atol=2e-3)


class Finder:
    """Finds no face in the third picture (blue's), and is told which of several to take."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def encode_face(self, image: Image.Image, face: Any = None) -> Face:
        self.asked.append(face)
        colour = torch.tensor(np.asarray(image.convert("RGB"))[0, 0] / 255.0)
        if colour.tolist() == [0, 0, 1]:
            raise ImageError("no face was found in the picture")
        return Face(5 * torch.cat([colour.float(), torch.ones(509)]), image, image)


def test_a_picture_without_a_face_is_bad_and_the_largest_face_is_read(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = Finder()
    monkeypatch.setattr(face_sources, "face_encoder", lambda *_: finder)
    changes = {"faces": "buffalo_l", "data": {"max_bad": 0.2}}
    online = plan_of("faceid", folder, tmp_path / "online", model, **changes)
    latest = loop.train(online)
    assert set(finder.asked) == {"largest"}
    (row,) = map(json.loads, (tmp_path / "online" / "bad.jsonl").read_text().splitlines())
    assert (Path(row["name"]).name, row["why"]) == ("2.png", "no face was found in the picture")
    changes["data"] = changes["data"] | {"features": tmp_path / "kept"}
    loop.train(plan_of("faceid", folder, tmp_path / "cached", model, **changes))
    (bad,) = read_manifest(tmp_path / "kept")["bad"]
    assert (Path(bad["name"]).name, bad["kind"]) == ("2.png", "no face")
    assert losses(tmp_path / "online") == pytest.approx(losses(tmp_path / "cached"), rel=5e-3)
    changes["data"] = {"max_bad": 0.1, "features": tmp_path / "none"}
    with pytest.raises(ImpromptError, match=r"1 of 7 samples are bad \(1 no face\), more than"):
        loop.train(plan_of("faceid", folder, tmp_path / "strict", model, **changes))
    file = read_adapter(latest)
    assert file.header is not None
    assert (file.faces, file.face_dim) == ("buffalo_l", 512)
    assert dict(describe(file))["face encoder"].startswith("insightface's buffalo_l; its weights")


def test_a_picture_that_the_file_does_not_name_is_bad(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    held = load_embedding(stored_faces(folder))
    some = tmp_path / "some.safetensors"
    save_embedding(some, held._replace(features=held.features[1:], pictures=held.pictures[1:]))
    changes = {"faces": str(some), "data": {"max_bad": 0.2}}
    loop.train(plan_of("faceid", folder, tmp_path / "run", model, **changes))
    (row,) = map(json.loads, (tmp_path / "run" / "bad.jsonl").read_text().splitlines())
    assert Path(row["name"]).name == "0.png"
    assert row["why"] == f"{some} holds no face embedding of it"


def test_other_faces_are_other_features(folder: Path, model: Path, tmp_path: Path) -> None:
    kept = {"features": tmp_path / "kept"}
    loop.train(plan_of("faceid", folder, tmp_path / "one", model, 1, data=kept))
    other = tmp_path / "other.safetensors"
    other.write_bytes(stored_faces(folder).read_bytes())
    with pytest.raises(SettingError, match=r"features of faces .*\(this recipe: .*other"):
        loop.train(plan_of("faceid", folder, tmp_path / "two", model, 1, faces=str(other),
                           data=kept))  # fmt: skip
    with pytest.raises(SettingError, match=r'feature "face" .this recipe: "raw face"'):
        loop.train(plan_of("portrait-unnorm", folder, tmp_path / "two", model, 1, data=kept))


@pytest.mark.parametrize(
    ("embedding", "feature", "words"),
    [
        (Embedding(torch.ones(2, 8), "pooled", "", "", ("a", "b")), "face",
         "holds pooled features, not face embeddings"),
        (Embedding(torch.ones(2, 8), "face", "", "", ("a", "a")), "face",
         "holds 2 face embeddings and the hashes of 1 pictures: it must name one picture for each"),
        (Embedding(torch.ones(2, 8), "face", "", "", ()), "face", "the hashes of 0 pictures"),
        (Embedding(torch.ones(2, 8), "face", "", "", ("a", "b")), "raw face",
         'of unit length; this variant .*: store them as feature "raw face"'),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_such_faces_is_one_line(
    embedding: Embedding, feature: str, words: str, tmp_path: Path
) -> None:
    save_embedding(tmp_path / "faces.safetensors", embedding)
    with pytest.raises(MismatchError, match=words):
        open_face_source(str(tmp_path / "faces.safetensors"), feature)


def test_faces_that_are_not_known_are_one_line() -> None:
    with pytest.raises(
        SettingError,
        match=r"^faces = 'bufalo': give one of insightface's packages of weights \(buffalo_l, "
        r".*\), or a folder of such files, or a \.safetensors file of embeddings$",
    ):
        open_face_source("bufalo", "face")


def test_a_folder_of_weights_is_a_face_encoder_and_travels(tmp_path: Path) -> None:
    import pickle

    source: Any = open_face_source(str(tmp_path), "face")
    copy = pickle.loads(pickle.dumps(source))
    assert isinstance(copy.finder, InsightFace)
    assert (copy.finder.pack, copy.finder.device, copy.width) == (str(tmp_path), "cpu", 512)


# Whole runs


class Stop(Exception):
    pass


class StopAfter(Watcher):
    """Ends a run after five steps, as a crash would."""

    def stepped(self, row: LogRow) -> None:
        if row.step == 5:
            raise Stop


@pytest.mark.parametrize("name", ["faceid", "faceid-plus-v2"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_run_goes_on_as_if_it_had_not(
    name: str, optimizer: str, folder: Path, model: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "data": {"features": tmp_path / "kept", "flip": True, "held_out": 1},
        "optimization": {"optimizer": optimizer, "ema": 0.9},
    }
    whole = loop.train(plan_of(name, folder, tmp_path / "whole", model, 6, **changes))
    parts = plan_of(name, folder, tmp_path / "parts", model, 6, **changes)
    with pytest.raises(Stop):
        loop.train(parts, StopAfter())
    again = loop.train(parts)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(again), strict=True))
    assert any("low_rank" in key for key in torch.load(again / "training.pt")["weights"])


def test_a_run_starts_from_a_given_adapter(folder: Path, model: Path, tmp_path: Path) -> None:
    first = loop.train(plan_of("faceid", folder, tmp_path / "first", model, 2))
    changes = {"start": str(first), "rank": None}
    run = begun(plan_of("faceid", folder, tmp_path / "second", model, 2, **changes))
    given = load_adapter(first, run.setup.base).state_dict()
    assert all(torch.equal(given[key], value) for key, value in run.trainer.weights().items())
    for more, words in (
        ({"rank": 8}, r"low-rank part of rank 4; the recipe asks for rank 8: leave rank out"),
        (
            {"faces": str(wider(folder))},
            "of 20-wide features; this recipe trains a faceid one of 24-wide",
        ),
    ):
        with pytest.raises(MismatchError, match=words):
            begun(plan_of("faceid", folder, tmp_path / "third", model, 2, **changes | more))


def wider(folder: Path) -> Path:
    held = load_embedding(stored_faces(folder))
    path = folder.with_name("wider.safetensors")
    save_embedding(path, held._replace(features=torch.ones(len(held.pictures), 24)))
    return path


@pytest.mark.parametrize("name", ["faceid", "faceid-plus"])
def test_validation_prompts_with_faces(
    name: str, folder: Path, model: Path, tmp_path: Path
) -> None:
    validation = {"every": 2, "steps": 2, "texts": ["a cat"]}
    held_out = plan_of(
        name, folder, tmp_path / "held", model, 2, validation=validation, data={"held_out": 2}
    )
    named = plan_of(
        name, folder, tmp_path / "named", model, 2,
        validation=validation | {"images": [str(folder / f"{number}.png") for number in range(5)]},
    )  # fmt: skip
    for plan, count in ((held_out, 2), (named, 5)):
        run = begun(plan)
        assert run.setup.validator is not None
        prompts = run.setup.validator.prompts
        assert [type(prompt) for prompt in prompts] == [Face] * count
        run.go()
        assert names(plan.output / "validation") == ["step-0000002.png"]
    other = tmp_path / "other.png"
    Image.new("RGB", (16, 16)).save(other)
    wrong = validation | {"images": [str(other)]}
    with pytest.raises(ImpromptError, match=r"other\.png: .* holds no face embedding of it$"):
        begun(plan_of(name, folder, tmp_path / "wrong", model, 2, validation=wrong))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variant": "base", "rank": 4},
         "rank is an option of faceid-plus, faceid-plus-v2, faceid only"),
        ({"variant": "plus", "faces": "buffalo_l"}, "faces is an option of portrait-unnorm, "),
        ({"variant": "faceid", "depth": 2},
         "depth is an option of plus, portrait-unnorm, faceid-plus, faceid-plus-v2 only"),
        ({"variant": "faceid", "encoder": "somewhere"},
         "encoder is an option of base, full, plus, faceid-plus, faceid-plus-v2 only"),
        ({"variant": "faceid", "feature": "last"}, "the faceid variant reads face and no other"),
        ({"variant": "faceid-plus-kolors"}, "unknown variant 'faceid-plus-kolors'; known: base, "),
    ],
)  # fmt: skip
def test_options_of_other_variants_are_one_line(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        recipe("set", tmp_path, **changes)


# What comes out


@pytest.mark.parametrize("name", ["faceid", "faceid-plus", "faceid-plus-v2", "portrait"])
@torch.no_grad()
def test_diffusers_makes_the_same_pixels_of_what_was_trained(
    name: str, folder: Path, tmp_path: Path
) -> None:
    """Exported in the paper's layout, with its low-rank part, from a run that moved it."""
    model = saved_pipeline(tmp_path / "sd1", "sd1")
    changes = {"rank": 4, "depth": 4} if "plus" in name else of_variant(name, folder)
    plan = plan_of(
        name, folder, tmp_path / "run", model, 3,
        **{**changes, "optimization": {"learning_rate": 0.03}, "data": {"size": 32}},
    )  # fmt: skip
    with torch.enable_grad():
        file = read_adapter(loop.train(plan))
    exported = tmp_path / "ip-adapter.safetensors"
    write_adapter(exported, file, "diffusers")
    again = read_adapter(exported, name)
    assert all(torch.equal(a, b) for a, b in zip(file.tensors, again.tensors, strict=True))

    pipe = ImagePromptPipeline.from_pretrained(str(model), adapter=exported, variant=name,
                                               device="cpu")  # fmt: skip
    ours, row = pipe.pipeline, find_variant(name)
    theirs = type(ours).from_pretrained(model)
    theirs.load_ip_adapter(str(tmp_path), subfolder="", weight_name=exported.name,
                           image_encoder_folder=None, low_cpu_mem_usage=False)  # fmt: skip
    set_their_scale(theirs.unet, 0.8)
    face = torch.randn(20, generator=torch.Generator().manual_seed(3))
    crop = Image.open(folder / "1.png").convert("RGB")
    reader = pipe.first.reader
    features, _ = reader.features(Reference(images=Face(face, crop)))
    nulls = reader.null_features()
    parts = features if isinstance(features, tuple) else (features,)
    none = nulls if isinstance(nulls, tuple) else (nulls,)
    if row.image_feature:
        (projection,) = theirs.unet.encoder_hid_proj.image_projection_layers
        projection.clip_embeds = torch.cat([none[1], parts[1]])[:, None]
        projection.shortcut = name == "faceid-plus-v2"
    adapter = pipe.first.adapter
    prompt = adapter.prompt(adapter.tokens(parts), adapter.tokens(none), 0.8)
    made = run(ours, ["a cat"], start(1), cross_attention_kwargs={"ip_hidden_states": prompt})
    both = torch.cat([none[0], parts[0]])[:, None]
    expected = run(theirs, ["a cat"], start(1), ip_adapter_image_embeds=[both])
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    plain = prompt._replace(low_rank=())
    without = run(ours, ["a cat"], start(1), cross_attention_kwargs={"ip_hidden_states": plain})
    assert (made - without).abs().max() > 1e-3 or not row.lora


def test_an_adapter_of_ones_own_face_encoder_asks_for_it(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    latest = loop.train(plan_of("faceid", folder, tmp_path / "run", model, 2))
    file = read_adapter(latest)
    assert file.faces == "our-faces"
    assert dict(describe(file))["face encoder"] == "our-faces"

    class Own:
        def encode_face(self, image: Image.Image, face: Any = None) -> Face:  # noqa: ARG002
            return Face(torch.arange(20.0), image, image)

    size = {"steps": 2, "width": 16, "height": 16}
    picture = str(folder / "0.png")
    pipe = ImagePromptPipeline.from_pretrained(str(model), adapter=latest, device="cpu")
    with pytest.raises(
        SettingError,
        match=r"^this adapter reads faces as our-faces embeds them, which is not one of "
        r"insightface's .*: give that face encoder as faces=, or faces as imprompt\.Face$",
    ):
        pipe(picture, **size)
    given = pipe(Face(torch.arange(20.0)), seed=1, **size).images[0]
    own = ImagePromptPipeline.from_pretrained(str(model), adapter=latest, device="cpu", faces=Own())
    assert np.array_equal(np.asarray(given), np.asarray(own(picture, seed=1, **size).images[0]))


def test_metrics_of_a_validation_without_a_measure_are_none(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    validation = {"every": 1, "steps": 2}
    plan = plan_of(
        "faceid", folder, tmp_path, model, 1, validation=validation, data={"held_out": 1}
    )
    loop.train(plan)
    assert not any("clip_i" in key for row in Metrics(tmp_path).read() for key in row)
