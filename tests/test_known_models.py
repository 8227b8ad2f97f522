"""Names of base models and adapters: what the table states, and what a call takes from it."""

from inspect import signature
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from imprompt import ImagePromptPipeline, Reference
from imprompt.checkpoints.adapters import describe, read_adapter
from imprompt.cli.generate import model_rows, models
from imprompt.encoders.matching import load_encoder
from imprompt.errors import MismatchError
from imprompt.families.base import pipeline_family
from imprompt.generation.references import AdapterChoice
from imprompt.models import MODELS, KnownAdapter, KnownModel, Location, Usual, find_adapter
from tests.parity.test_published import hunyuandit, instantx, xlabs
from tests.tiny import FEATURE_DIMS, pictures, seeded, tiny_encoder
from tests.tiny_pipelines import tiny_pipeline

PIPELINES = {
    "flux-dev": "FluxPipeline",
    "sd35-large": "StableDiffusion3Pipeline",
    "sd35-medium": "StableDiffusion3Pipeline",
    "kolors": "KolorsPipeline",
    "hunyuandit": "HunyuanDiTPipeline",
    "pixart-sigma": "PixArtSigmaPipeline",
    "chroma": "ChromaPipeline",
}
SIZE = {"width": 24, "height": 32, "seed": 1}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_model_is_opened_whole_with_its_pipelines_own_settings(name: str) -> None:
    with catch_warnings(action="ignore"):  # Kolors' runs torch.jit
        given = signature(getattr(diffusers, PIPELINES[name]).__call__).parameters
    assert MODELS[name].steps == given["num_inference_steps"].default
    assert MODELS[name].guidance == given["guidance_scale"].default
    assert pipeline_family(PIPELINES[name]).pipelines[PIPELINES[name]].plain is not None


def test_the_list_says_what_a_user_must_know(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row[2]: " ".join(row) for row in model_rows()}
    for file, words in {
        "InstantX/FLUX.1-dev-IP-Adapter:ip-adapter.bin": (
            *("siglip", "384 px", "128", "scale 0.7, 24 steps, guidance 3.5", "non-commercial"),
        ),
        "XLabs-AI/flux-ip-adapter-v2:ip_adapter.safetensors": (
            *("clip-vit-large-patch14", "224 px", "16", "scale 1, 50 steps, guidance 4"),
        ),
        "black-forest-labs/FLUX.1-Redux-dev:flux1-redux-dev.safetensors": (
            *("siglip", "384 px", "729", "scale 1, 50 steps, guidance 2.5", "non-commercial"),
        ),
        "Tencent-Hunyuan/IP-Adapter:ipa.pt": (
            *("encoder= gives", "scale 1, 100 steps", "Tencent Hunyuan community"),
        ),
        "Kwai-Kolors/Kolors-IP-Adapter-FaceID-Plus:ipa-faceid-plus.bin": (
            *("image_encoder", "square around the face", "scale 0.8, 25 steps"),
        ),
    }.items():
        assert all(word in rows[file] for word in words), rows[file]
    models()
    printed = "".join(capsys.readouterr().out.split())
    for row in model_rows():
        assert row[2].partition(":")[0][:20] in printed  # long names go on in the next line
        assert row[-1].replace(" ", "")[:12] in printed


def test_a_hub_file_of_a_known_adapter_is_that_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Location, "fetch_file", lambda self: Path(self.path))
    found = find_adapter(MODELS["chroma"], "XLabs-AI/flux-ip-adapter-v2/ip_adapter.safetensors")
    assert found == find_adapter(MODELS["flux-dev"], None)
    assert (found.encoder, found.usual) == (
        Location("openai/clip-vit-large-patch14"),
        Usual(1.0, 50, 4.0),
    )


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name of a tiny Flux with two adapters, which are used differently."""
    encoder = tiny_encoder()
    for part in (encoder.model, encoder.processor):
        part.save_pretrained(tmp_path / "encoder")
    place, usual = Location(str(tmp_path / "encoder")), (Usual(0.4, 3, 2.0), Usual(0.9, 2))
    adapters = {}
    for name, make, own in zip(("xlabs", "instantx"), (xlabs, instantx), usual, strict=True):
        path = tmp_path / f"{name}.safetensors"
        with seeded(11):
            layers = 2 if name == "xlabs" else 4
            save_file(make(32, 32, layers, embedding=FEATURE_DIMS["pooled"]), path)
        adapters[name] = KnownAdapter(Location("", str(path)), place, usual=own)
    monkeypatch.setitem(MODELS, "tiny", KnownModel("tiny", "", Location(""), adapters))
    return "tiny"


def latents(pipe: ImagePromptPipeline, image: Any, **asked: Any) -> tuple[torch.Tensor, Any]:
    made = pipe(image, pipeline_options={"output_type": "latent"}, **SIZE | asked)
    return torch.stack([*made.images]), made.settings


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_is_used_as_is_usual_where_nothing_is_said(model: str) -> None:
    pipe = ImagePromptPipeline.from_pipeline(tiny_pipeline("flux"), model=model)
    picture = pictures(1)[0]
    found, settings = latents(pipe, picture)
    assert (settings.scale, settings.steps, settings.guidance) == (0.4, 3, 2.0)
    said, _ = latents(pipe, picture, scale=0.4, steps=3, guidance=2.0)
    assert torch.equal(found, said)
    other, settings = latents(pipe, picture, scale=1.0, steps=2)
    assert (settings.scale, settings.steps) == (1.0, 2)
    assert not torch.equal(found, other)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_each_of_several_adapters_has_its_own_usual_scale(model: str) -> None:
    both = [AdapterChoice(adapter=name, name=name) for name in ("xlabs", "instantx")]
    pipe = ImagePromptPipeline.from_pipeline(tiny_pipeline("flux"), both, model=model)
    one, other = pictures(2)

    def pair(*scales: float | None) -> list[Reference]:
        return [
            Reference(images=image, adapter=name, scale=scale)
            for image, name, scale in zip((one, other), ("xlabs", "instantx"), scales, strict=True)
        ]

    found, settings = latents(pipe, pair(None, None), together=True)
    assert (settings.scale, settings.steps) == (None, 3)
    assert torch.equal(found, latents(pipe, pair(0.4, 0.9), together=True)[0])
    alike, _ = latents(pipe, pair(None, None), together=True, scale=0.4)
    assert not torch.equal(found, alike)


# Sizes at which an encoder would be taken for another, or cannot be told.
UNKNOWN = {
    "instantx": (instantx, (8, 8, 2, 2, 1152), "does not state their image encoder: give it with"),
    "xlabs": (xlabs, (8, 8, 2, 2, 768), "does not state their image encoder: give it with"),
    "hunyuandit": (hunyuandit, (8, 8, 2, 2, 1024), "HunyuanDiT's own CLIP ViT-H/14, which no"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_encoder_that_no_tensor_tells_is_asked_for(name: str, tmp_path: Path) -> None:
    make, sizes, said = UNKNOWN[name]
    save_file(make(*sizes), path := tmp_path / "a.safetensors")
    file, nowhere = read_adapter(path), KnownModel("own", "", Location(str(tmp_path)))
    with pytest.raises(MismatchError, match=said):
        load_encoder(file, None, nowhere, None, "cpu", torch.float32)
    encoder = tiny_encoder()
    for part in (encoder.model, encoder.processor):
        part.save_pretrained(tmp_path / "encoder")
    with pytest.raises(MismatchError, match=f"{sizes[-1]}-wide pooled features .* gives 24-wide"):
        load_encoder(file, None, nowhere, tmp_path / "encoder", "cpu", torch.float32)
    (suits,) = (value for label, value in describe(file) if label == "suits")
    assert {"instantx": "SigLIP so400m/14", "xlabs": "CLIP ViT-L/14"}.get(name, "own CLIP") in suits
