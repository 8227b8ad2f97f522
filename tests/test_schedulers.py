"""Windows under every scheduler of diffusers: each prompt applies when it should, or one line says
why not.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import schedulers

from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.errors import ImpromptError, MismatchError
from imprompt.families.base import base_of, family_of
from imprompt.generation.features import Reader
from imprompt.generation.pipeline import ImagePromptPipeline
from imprompt.generation.prepare import Attached
from imprompt.generation.references import Reference
from imprompt.variants import find_variant
from tests.tiny import (
    FEATURE_DIMS,
    noise_inputs,
    pictures,
    random_prompt,
    seeded,
    smallest_unet,
    tiny_adapter,
    tiny_encoder,
)
from tests.tiny_pipelines import PIPELINES, tiny_pipeline
from tests.ways import as_pipeline

STEPS = 8
CLASSES = {
    name: getattr(schedulers, name)
    for name in dir(schedulers)  # they are imported when they are asked for
    if name.endswith("Scheduler") and not name.startswith("Flax")
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # numpy's, from inside diffusers
    # torchsde's: in single precision, diffusers' last sigma is rounded to just outside the range
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),
]
FOR_UNETS = {  # a row each of docs/compose.md
    *("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "CogVideoXDDIM", "PNDM", "LCM", "TCD"),
    *("DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "SASolver"),
    *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete"),
    *("KDPM2Discrete", "KDPM2AncestralDiscrete"),
    *("EDMEuler", "EDMDPMSolverMultistep", "IPNDM", "CMStochasticIterative"),
    *("CosineDPMSolverMultistep", "DPMSolverSDE", "LMSDiscrete"),  # with torchsde, scipy
}
INVERSE = {"DDIMInverse", "DPMSolverMultistepInverse"}  # they go from the picture to noise
FOR_FLUX = {"FlowMatchEulerDiscrete", "FlowMatchLCM"}
OF_OTHER_MODELS = {  # they cannot be made from the settings of a text-to-image scheduler
    *("Amused", "Helios", "HeliosDMD", "RFD4Proteina", "VQDiffusion", "UnCLIP"),
}
SETTINGS: dict[str, dict[str, Any]] = {  # other settings of a class that change its timesteps
    "EulerDiscrete": {
        "timestep_type": "continuous",
        "prediction_type": "v_prediction",
        "use_karras_sigmas": True,
        "sigma_min": 0.002,
        "sigma_max": 120.0,
    },
    "DPMSolverMultistep": {"use_karras_sigmas": True},
    "DDIM": {"timestep_spacing": "trailing"},
    "EulerAncestralDiscrete": {"timestep_spacing": "leading"},
}


def facade(pipeline: Any, adapter: IPAdapter) -> ImagePromptPipeline:
    base = base_of(pipeline)
    return ImagePromptPipeline(
        pipeline, Attached(adapter.attach(base), Reader(tiny_encoder(), find_variant("base")))
    )


@pytest.fixture(scope="module")
def unet() -> ImagePromptPipeline:
    pipeline = PIPELINES["sd1"]()
    pipeline.unet = smallest_unet()
    return facade(pipeline, tiny_adapter(pipeline.unet))


@pytest.fixture(scope="module")
def pixart() -> ImagePromptPipeline:
    return of_another_family("pixart")


@pytest.fixture(scope="module")
def flux() -> ImagePromptPipeline:
    return of_another_family("flux")


def of_another_family(name: str) -> ImagePromptPipeline:
    pipeline = tiny_pipeline(name)
    base = base_of(pipeline)
    width = family_of(base).size(next(iter(family_of(base).layers(base).values()))).text
    with seeded(3):
        adapter = IPAdapter.for_model(base, ImageProjection(FEATURE_DIMS["pooled"], width))
    return facade(pipeline, adapter)


def applied(
    pipe: ImagePromptPipeline, scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> list[list[bool]]:
    """Return which of two prompts, of the first and the second half, applied in each call."""
    seen: list[list[bool]] = []
    module = "imprompt.families." + ("unet" if pipe.family.name == "unet" else "transformers")
    original = __import__(module, fromlist=["weights_at"]).weights_at

    def weights_at(*args: Any) -> Any:
        (weights,) = (found := original(*args)).values()
        seen.append([bool(part.any()) for part in weights[0]])
        return found

    monkeypatch.setattr(f"{module}.weights_at", weights_at)
    monkeypatch.setattr(pipe.pipeline, "scheduler", scheduler)
    picture = pictures(1)[0]
    halves = [Reference(images=picture, end=0.5), Reference(images=picture, start=0.5)]
    pipe(
        [halves],
        steps=STEPS,
        seed=0,
        width=32,
        height=32,
        guidance=1.0 if pipe.family.name == "flux" else 3.0,
        pipeline_options={"output_type": "latent"},
    )
    return seen


def check_halves(seen: list[list[bool]]) -> None:
    assert len(seen) >= STEPS
    assert all(first != second for first, second in seen)  # never none, never both
    second = [applies for _, applies in seen]
    assert second == sorted(second)
    assert not second[0]
    assert second[-1]


def made(name: str, pipe: ImagePromptPipeline, **settings: Any) -> Any:
    return CLASSES[f"{name}Scheduler"].from_config(pipe.pipeline.scheduler.config, **settings)


CASES = [(name, {}) for name in sorted(FOR_UNETS)] + [*SETTINGS.items()]


@pytest.mark.parametrize(
    ("name", "settings"), CASES, ids=[f"{name} {' '.join(more)}".strip() for name, more in CASES]
)
def test_windows_apply_by_progress(
    unet: ImagePromptPipeline, name: str, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = applied(unet, made(name, unet, **settings), monkeypatch)
    check_halves(seen)
    # PNDM begins with twelve calls in the first third
    least = 0.2 if name == "PNDM" else 0.25
    assert least <= sum(second for _, second in seen) / len(seen) <= 0.75


@pytest.mark.parametrize(
    ("name", "settings"), CASES, ids=[f"{name} {' '.join(more)}".strip() for name, more in CASES]
)
def test_windows_of_pixart_apply_by_progress(
    pixart: ImagePromptPipeline, name: str, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_halves(applied(pixart, made(name, pixart, **settings), monkeypatch))


@pytest.mark.parametrize("name", sorted(FOR_FLUX))
def test_windows_of_flow_matching_apply_by_sigma(
    flux: ImagePromptPipeline, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_halves(applied(flux, made(name, flux), monkeypatch))


@pytest.mark.parametrize(
    "name",
    sorted(
        {name.removesuffix("Scheduler") for name in CLASSES} - FOR_UNETS - INVERSE - OF_OTHER_MODELS
    ),
)
def test_a_scheduler_that_does_not_fit_is_refused_in_one_line(
    unet: ImagePromptPipeline, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImpromptError) as caught:
        applied(unet, made(name, unet), monkeypatch)
    assert "\n" not in str(caught.value)


def test_the_page_names_every_scheduler() -> None:
    page = (Path(__file__).parents[1] / "docs" / "compose.md").read_text("utf-8")
    table = page.partition("### Which schedulers")[2].partition("Without `Image")[0]
    named = re.findall(r"`(\w+)`", table)
    others = {name.removesuffix("Scheduler") for name in CLASSES}
    assert {*named} == others - INVERSE - OF_OTHER_MODELS


@pytest.mark.parametrize("name", ["EDMEuler", "CMStochasticIterative", "IPNDM"])
def test_without_the_facade_what_cannot_be_told_is_refused(name: str) -> None:
    model = smallest_unet()
    adapter = tiny_adapter(model).attach(model)
    window = torch.ones(len(adapter.image_kv), 1, 1000)
    window[..., 500:] = 0
    prompt = random_prompt(adapter, 1, window)
    scheduler = CLASSES[f"{name}Scheduler"]()
    scheduler.set_timesteps(STEPS)
    inputs = noise_inputs(model, 1)
    said = "a scale that changes over time needs the timesteps that the model was trained with"
    with pytest.raises(MismatchError, match=said), adapter.using(prompt):
        model(**inputs | {"timestep": scheduler.timesteps[0]})
    for times in ([999, 500, 0], [980.3, 500.1, 0.4], [0]):  # a model's own
        with adapter.using(prompt):
            for timestep in times:
                model(**inputs | {"timestep": torch.tensor(timestep)})


@pytest.mark.parametrize("name", ["EDMEuler", "CMStochasticIterative", "IPNDM"])
def test_by_keyword_what_cannot_be_told_is_refused(unet: ImagePromptPipeline, name: str) -> None:
    pipeline = unet.pipeline
    adapter = tiny_adapter(pipeline.unet)
    with adapter.attached(pipeline.unet):
        window = torch.ones(len(adapter.image_kv), 1, 1000)
        window[..., 500:] = 0

        def run(scheduler: Any) -> list[float]:
            own = as_pipeline(pipeline, "StableDiffusionPipeline", scheduler=scheduler)
            prompt = random_prompt(adapter, 1, window)
            times: list[float] = []
            own(
                "a cat",
                num_inference_steps=STEPS,
                guidance_scale=1.0,
                width=32,
                height=32,
                output_type="latent",
                cross_attention_kwargs={"ip_hidden_states": prompt},
                callback_on_step_end=lambda _pipe, _step, time, _held: times.append(time) or {},
            )
            return times

        with pytest.raises(MismatchError, match="a scale that changes over time needs the timest"):
            run(made(name, unet))
        assert len(run(made("EulerDiscrete", unet, use_karras_sigmas=True))) == STEPS
