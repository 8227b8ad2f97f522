"""Image features kept in memory and in folders: the encoder's own, bit for bit, and nobody
else's.
"""

import gc
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from imprompt.checkpoints.adapters import AdapterFile, read_adapter
from imprompt.cli.generate import ResultPlace, carry_out
from imprompt.encoders.feature_cache import (
    CachedFeatures,
    FeatureFolder,
    FeatureMemory,
    Store,
    files_of,
)
from imprompt.encoders.matching import load_encoder
from imprompt.encoders.noise import Noise
from imprompt.encoders.vision import VisionEncoder
from imprompt.errors import MismatchError, SettingError
from imprompt.generation.pipeline import ImagePromptPipeline
from imprompt.generation.references import Reference
from imprompt.generation.request import Request, read_request
from imprompt.images import open_image
from imprompt.models import MODELS, PACKAGED, Location
from imprompt.variants import VARIANTS, Feature
from tests.tiny import pictures

EMOJI = PACKAGED / "emoji"
ONE, TWO, THREE = pictures(3)
CPU, FLOAT = "cpu", torch.float32


def unopened() -> NoReturn:
    raise AssertionError("the encoder was opened")


def kept_by(
    store: Store, encoder: VisionEncoder | None, place: Path, dtype: torch.dtype = FLOAT
) -> CachedFeatures:
    """Features of `encoder`, as if it lay at `place`; None: of one that must not be opened."""
    return CachedFeatures(
        unopened if encoder is None else lambda: encoder, Location(str(place)), CPU, dtype, store
    )


def emoji_file(name: str = "plus", *, header: bool = True) -> AdapterFile:
    file = read_adapter(EMOJI / "adapters" / f"{name}.safetensors")
    return file if header else replace(file, header=None)


def emoji_encoder(file: AdapterFile, keep: Store, given: Path | None = None) -> CachedFeatures:
    encoder = load_encoder(file, None, MODELS["emoji"], given, CPU, FLOAT, keep)
    assert isinstance(encoder, CachedFeatures)
    return encoder


def other_encoder(folder: Path, by: float) -> Path:
    """The packaged image encoder, one weight moved."""
    shutil.copytree(EMOJI / "image_encoder", folder)
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"] = weights["visual_projection.weight"] + by
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return FeatureMemory(10**7) if request.param == "memory" else FeatureFolder(tmp_path / "kept")


def test_they_are_the_encoders_own_bit_for_bit(
    store: Store, encoder: VisionEncoder, tmp_path: Path
) -> None:
    for kept in (kept_by(store, encoder, tmp_path), kept_by(store, None, tmp_path)):
        for row in VARIANTS:
            own = torch.cat([encoder.features([picture], row.feature) for picture in (ONE, TWO)])
            assert torch.equal(kept.features([ONE, TWO], row.feature), own)
            assert torch.equal(kept.features([TWO], row.feature), own[1:])
            assert torch.equal(kept.null_features(row), encoder.null_features(row))


def test_pictures_are_made_ready_without_the_encoder(tmp_path: Path) -> None:
    padded = Reference(
        images=Image.new("RGB", (64, 32), "green"),
        crop="pad",
        sharpening=0.5,
        negative=Noise(kind="fade"),
    )
    made = []
    for opened in (True, False):
        pipe = ImagePromptPipeline.from_pretrained("emoji", device=CPU, keep_features=tmp_path)
        made.append(pipe(padded, seed=1, steps=2).images[0].tobytes())
        assert ("encoder" in vars(pipe.first.reader.encoder)) is opened
    assert made[0] == made[1]


def test_a_pipeline_makes_the_same_pictures(tmp_path: Path) -> None:
    pipe = ImagePromptPipeline.from_pretrained("emoji", adapter="plus", device=CPU)
    first = pipe(ONE, seed=1, steps=2).images[0]
    for opened in (True, False):
        kept = emoji_encoder(emoji_file(), FeatureFolder(tmp_path))
        pipe = ImagePromptPipeline(
            pipe.pipeline,
            replace(pipe.first, reader=replace(pipe.first.reader, encoder=kept)),
            model=pipe.model,
        )
        assert pipe(ONE, seed=1, steps=2).images[0].tobytes() == first.tobytes()
        assert ("encoder" in vars(kept)) is opened


def test_the_face_is_the_encoders(encoder: VisionEncoder, tmp_path: Path) -> None:
    kept = kept_by(FeatureMemory(0), encoder, tmp_path)
    assert kept.source == str(tmp_path)
    assert kept.fingerprint() == encoder.fingerprint()
    assert kept.feature_dim("penultimate") == encoder.feature_dim("penultimate")
    assert (kept.model, kept.processor) == (encoder.model, encoder.processor)


def test_a_picture_is_known_by_its_pixels(encoder: VisionEncoder, tmp_path: Path) -> None:
    for name in ("a.png", "b.bmp"):
        ONE.save(tmp_path / name)
    store = FeatureFolder(tmp_path / "kept")
    kept_by(store, encoder, tmp_path).features([open_image(tmp_path / "a.png")], "pooled")
    kept_by(store, None, tmp_path).features([open_image(tmp_path / "b.bmp")], "pooled")
    changed = ONE.copy()
    changed.putpixel((3, 5), (1, 2, 3))
    turned = Image.frombytes("RGB", (ONE.height, ONE.width), ONE.tobytes())
    for other in (changed, turned):
        with pytest.raises(AssertionError, match="was opened"):
            kept_by(store, None, tmp_path).features([other], "pooled")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    held = bytearray(path.read_bytes())
    held[-1] ^= 1
    path.write_bytes(held)


def swap(path: Path) -> None:
    """Another picture's features under this one's name."""
    other = next(file for file in path.parent.glob("*.safetensors") if file != path)
    shutil.copy(other, path)


@pytest.mark.parametrize(
    "damage",
    [cut, flip, swap, lambda path: path.write_text(""), lambda path: path.write_text("{}" * 9)],
)
def test_a_damaged_file_is_encoded_anew(
    damage: Callable[[Path], None], encoder: VisionEncoder, tmp_path: Path
) -> None:
    store, place = FeatureFolder(tmp_path / "kept"), tmp_path
    kept_by(store, encoder, place).features([ONE], "pooled")
    (path,) = store.folder.iterdir()
    kept_by(store, encoder, place).features([TWO], "pooled")
    damage(path)
    assert torch.equal(
        kept_by(store, encoder, place).features([ONE], "pooled"), encoder.features([ONE], "pooled")
    )
    kept_by(store, None, place).features([ONE, TWO], "pooled")  # and kept again


def test_other_facts_are_other_features(encoder: VisionEncoder, tmp_path: Path) -> None:
    store, place, other = FeatureFolder(tmp_path / "kept"), tmp_path / "one", tmp_path / "two"
    place.mkdir()
    other.mkdir()
    kept_by(store, encoder, place).features([ONE], "pooled")

    def refused(kept: CachedFeatures, feature: Feature = "pooled") -> None:
        with pytest.raises(AssertionError, match="was opened"):
            kept.features([ONE], feature)

    refused(kept_by(store, None, other))
    refused(kept_by(store, None, place, torch.float16))
    refused(kept_by(store, None, place), "penultimate")
    refused(CachedFeatures(unopened, Location(str(place)), CPU, FLOAT, store, width=7))
    refused(
        CachedFeatures(
            unopened, Location(str(place)), CPU, FLOAT, store, fingerprint="0123456789abcdef"
        )
    )
    (place / "model.safetensors").write_text("other weights")
    refused(kept_by(store, None, place))


def test_memory_is_bounded_in_bytes_and_forgets_the_oldest(
    encoder: VisionEncoder, tmp_path: Path
) -> None:
    feature = encoder.features([ONE], "pooled")
    store = FeatureMemory(2 * feature.nbytes)
    kept = kept_by(store, encoder, tmp_path)
    for picture in (ONE, TWO, ONE, THREE):  # TWO was asked for longest ago
        kept.features([picture], "pooled")
    assert store.bytes == store.max_bytes
    kept_by(store, None, tmp_path).features([ONE, THREE], "pooled")
    with pytest.raises(AssertionError, match="was opened"):
        kept_by(store, None, tmp_path).features([TWO], "pooled")
    assert kept.features([TWO], "penultimate").nbytes > store.max_bytes
    assert store.bytes <= store.max_bytes


def test_an_adapter_that_names_weights_refuses_features_of_others(tmp_path: Path) -> None:
    store, place = FeatureFolder(tmp_path / "kept"), other_encoder(tmp_path / "other", 0.5)
    emoji_encoder(emoji_file(header=False), store, place).features([ONE], "penultimate")
    emoji_encoder(emoji_file(header=False), store, place).features([ONE], "penultimate")
    strict = emoji_encoder(emoji_file(), store, place)
    with pytest.raises(MismatchError, match="other weights of the image encoder"):
        strict.features([ONE], "penultimate")


def test_a_wrong_width_is_refused_as_without_kept_features(tmp_path: Path) -> None:
    store = FeatureFolder(tmp_path / "kept")
    emoji_encoder(emoji_file("base"), store).features([ONE], "pooled")
    wide = emoji_file("base", header=False)
    wide = replace(wide, projection={**wide.projection, "proj.weight": torch.zeros(8, 999)})
    with pytest.raises(MismatchError, match="999-wide"):
        emoji_encoder(wide, store, EMOJI / "image_encoder").features([ONE], "pooled")


def test_an_empty_store_opens_and_checks_the_encoder_at_once(store: Store, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="other weights of the image encoder"):
        emoji_encoder(emoji_file(), store, other_encoder(tmp_path / "other", 0.5))


def test_without_a_header_another_encoders_name_is_another_encoder(tmp_path: Path) -> None:
    store, own, other = (
        FeatureFolder(tmp_path / "kept"),
        EMOJI / "image_encoder",
        other_encoder(tmp_path / "other", 0.5),
    )
    made: list[Tensor] = [
        emoji_encoder(emoji_file("base", header=False), store, place).features([ONE], "pooled")
        for place in (own, other)
    ]
    assert not torch.equal(*made)


def test_a_folder_that_cannot_be_is_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="is a file"):
        FeatureFolder(tmp_path / "file")


def test_a_folder_that_is_lost_is_reported(encoder: VisionEncoder, tmp_path: Path) -> None:
    kept = kept_by(FeatureFolder(tmp_path / "kept"), encoder, tmp_path)
    (tmp_path / "kept").write_text("")
    with pytest.raises(SettingError, match="give another folder"):
        kept.features([ONE], "pooled")


def test_an_encoder_on_the_hub_is_known_by_its_revision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def download(*place: str, local_files_only: bool) -> str:
        assert not local_files_only
        asked.append(place)
        return str(tmp_path / "snapshots" / "a1b2c3" / place[1])

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("imprompt.models.hub_answers", lambda _: True)
    assert files_of(Location("owner/name", "models/image_encoder")).endswith(
        "a1b2c3/models/image_encoder"
    )
    # its weights are left where they are
    assert asked == [("owner/name", "models/image_encoder/config.json")]


def test_a_repeated_command_opens_no_encoder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ONE.save(tmp_path / "one.png")
    settings = {"steps": 2, "seed": 3, "num_images": 2}
    request = Request(adapter="plus", images=[tmp_path / "one.png"], settings=settings)
    plain = carry_out(request, ResultPlace(tmp_path / "plain"), device=CPU)
    carry_out(request, ResultPlace(tmp_path / "first"), device=CPU, keep_features=tmp_path / "kept")
    monkeypatch.setattr("imprompt.encoders.vision.open_encoder", unopened)
    again = carry_out(
        request, ResultPlace(tmp_path / "again"), device=CPU, keep_features=tmp_path / "kept"
    )
    assert [open_image(path).tobytes() for path in again] == [
        open_image(path).tobytes() for path in plain
    ]
    assert "kept" not in read_request(again[0]).model_dump_json()
    gc.unfreeze()
