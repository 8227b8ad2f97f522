"""Training of every family that it is supported for, against the family's own pipeline.

What is predicted in training, with time, sign and packing, is what the pipeline hands to its
scheduler; then a few steps of a whole run.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.checkpoints.adapters import build_adapter, read_adapter
from imprompt.errors import SettingError
from imprompt.families.autoencoders import find_autoencoder
from imprompt.families.base import base_of
from imprompt.families.published import model_parts
from imprompt.families.rows import FAMILIES, ROWS
from imprompt.models import KnownModel, Location
from imprompt.training.augmented import stack_values
from imprompt.training.encoding import stored
from imprompt.training.loop import train
from imprompt.training.model import AdaptedModel, prepare_base
from imprompt.training.objective import Objective
from imprompt.training.recipe import NoiseSettings, Optimization
from tests.runs import losses, picture_folder, recipe
from tests.tiny import FEATURE_DIMS, seeded
from tests.tiny_pipelines import TRAINED, save_model, tiny_pipeline
from tests.zoo import specimen

pytestmark = [  # of diffusers' solvers under numpy 2, and of names inside its Chroma
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]

CAPTIONS = ["a cat", "two dogs"]
SIDES = (8, 12)  # h, w of the latents
OTHER_SIDES = {"sana": (16, 32), "wan": (8, 16)}  # whose pipelines want pixels in larger steps
SIZES = Tensor([1024, 1024, 0, 0, 8 * SIDES[0], 8 * SIDES[1]])  # HunyuanDiT's usual ones
# How pipelines are called without guidance, and with nothing done to sizes and captions.
CALLS: dict[str, dict[str, Any]] = {
    "pixart": {"use_resolution_binning": False, "clean_caption": False},
    "flux": {"guidance_scale": 3.5},
    "sana": {"use_resolution_binning": False},
    "z-image": {"guidance_scale": 0.0},
    "qwen-image": {"guidance_scale": None},
    "wan": {"num_frames": 1},
    "hunyuandit": {"use_resolution_binning": False},
}


@pytest.fixture(scope="module", params=TRAINED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(name: str) -> Any:
    return tiny_pipeline(TRAINED[name])


class Step(NamedTuple):
    """What a pipeline hands to its scheduler."""

    answer: Tensor
    timestep: Tensor
    latents: Tensor


class Layout(NamedTuple):
    """How a pipeline lays latents (B, C, h, w) out, and back."""

    there: Callable[[Any, Tensor], Tensor]
    back: Callable[[Any, Tensor], Tensor]


def flat_back(pipeline: Any, rows: Tensor) -> Tensor:
    height, width = (side * pipeline.vae_scale_factor for side in SIDES)
    made = pipeline._unpack_latents(rows, height, width, pipeline.vae_scale_factor)
    return made[:, :, 0] if made.ndim == 5 else made


FLAT = Layout(lambda pipe, x: pipe._pack_latents(x, len(x), x.shape[1], *x.shape[2:]), flat_back)
LAYOUTS = {
    "flux": FLAT,
    "qwen-image": FLAT,
    "chroma": FLAT,
    "wan": Layout(lambda _, x: x[:, :, None], lambda _, x: x[:, :, 0]),
    "flux2": Layout(
        lambda pipe, x: pipe._patchify_latents(x),
        lambda pipe, x: pipe._unpatchify_latents(x.mT.unflatten(2, [side // 2 for side in SIDES])),
    ),
}
AS_IT_IS = Layout(lambda _, x: x, lambda _, x: x)


def call(name: str, pipeline: Any, latents: Tensor, **changes: Any) -> None:
    """Run the family's own pipeline from those latents, without guidance."""
    unit = getattr(pipeline, "vae_scale_factor", None) or pipeline.vae_scale_factor_spatial
    height, width = (side * unit for side in latents.shape[2:])
    options = FAMILIES[name].text_limit(pipeline)
    pipeline(
        height=height,
        width=width,
        latents=LAYOUTS.get(name, AS_IT_IS).there(pipeline, latents),
        **{"guidance_scale": 1.0} | options | CALLS.get(name, {}) | changes,
    )


def own_steps(name: str, pipeline: Any, latents: Tensor) -> list[Step]:
    """Return what two steps of the pipeline hand to its scheduler."""
    found: list[Step] = []
    step, back = pipeline.scheduler.step, LAYOUTS.get(name, AS_IT_IS).back

    def record(answer: Tensor, timestep: Tensor, sample: Tensor, **more: Any) -> Any:
        found.append(Step(back(pipeline, answer), timestep, back(pipeline, sample)))
        return step(answer, timestep, sample, **more)

    with mock.patch.object(pipeline.scheduler, "step", record):
        call(name, pipeline, latents, prompt=[*CAPTIONS], num_inference_steps=2,
             output_type="latent")  # fmt: skip
    return found


def latents_of(name: str, pipeline: Any) -> Tensor:
    channels = FAMILIES[name].latent_channels(base_of(pipeline).config)
    with seeded(4):
        return torch.randn(2, channels, *OTHER_SIDES.get(name, SIDES))


def conditions(name: str, pipeline: Any, captions: list[str] = CAPTIONS) -> dict[str, Tensor]:
    text = FAMILIES[name].encode_text(pipeline, captions)
    return {**text, "time_ids": SIZES.expand(len(captions), -1)}


@torch.no_grad()
def test_it_predicts_what_the_pipeline_hands_to_its_scheduler(name: str, pipeline: Any) -> None:
    base, family, given = base_of(pipeline), FAMILIES[name], conditions(name, pipeline)
    steps = own_steps(name, pipeline, latents_of(name, pipeline))
    assert len(steps) == 2
    for answer, timestep, latents in steps:
        time = timestep.expand(2).float()
        made = family.predict(base, None, latents, time, given)
        assert torch.allclose(made, answer, atol=1e-5), (made - answer).abs().max()
        others = (  # of which none is equal: the time, the sign and the text are told
            family.predict(base, None, latents, time - 20, given),
            -made,
            family.predict(base, None, latents, time, conditions(name, pipeline, CAPTIONS[::-1])),
        )
        assert all((other - answer).abs().max() > 3e-5 for other in others)


@torch.no_grad()
def test_half_precision_is_near(name: str, pipeline: Any) -> None:
    """In bfloat16, with features as they are read: all are float32."""
    base, family, latents = base_of(pipeline), FAMILIES[name], latents_of(name, pipeline)
    given = {key: value.float() for key, value in conditions(name, pipeline).items()}
    time = torch.tensor([250.0, 800.0])
    exact = family.predict(base, None, latents, time, given)
    half = copy.deepcopy(base).to(torch.bfloat16)
    near = family.predict(half, None, latents, time, given)
    assert near.dtype == torch.bfloat16
    assert (near - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_the_scheduler_follows_the_objective(pipeline: Any) -> None:
    """A model that is never wrong takes noisy latents along the schedule that training knows."""
    goal = Objective(pipeline.scheduler, NoiseSettings())
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(
        10, **({"mu": 0.5} if scheduler.config.get("use_dynamic_shifting") else {})
    )
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    if goal.prediction_type != "flow":
        index = scheduler.timesteps[4].expand(2).long()
        noisy, _, target = goal.corrupt(latents, noise, index)
        found = scheduler.step(target, scheduler.timesteps[4], noisy)
        assert torch.allclose(found.pred_original_sample, latents, atol=1e-4)
        return
    sigma, after = (scheduler.sigmas[number].item() for number in (0, 1))
    assert scheduler.timesteps[0].item() == pytest.approx(1000 * sigma, abs=1)  # DPM's are whole
    noisy = (1 - sigma) * latents + sigma * noise
    index = torch.tensor([999, 999])
    target = goal.corrupt(latents, noise, index)[2]
    moved = scheduler.step(target, scheduler.timesteps[0], noisy).prev_sample
    assert torch.allclose(moved, (1 - after) * latents + after * noise, atol=1e-3)


def test_time_is_what_the_progress_of_prompts_reads(name: str) -> None:
    timestep = torch.tensor([0.0, 100.0, 500.0, 999.0])
    told = FAMILIES[name].training.time(timestep)
    assert torch.allclose(ROWS[name].progress(told, 1000), 1 - timestep / 1000, atol=2e-3)


class Decoded(Exception):
    """What an autoencoder was asked to decode."""


@torch.no_grad()
def test_latents_are_what_the_pipeline_decodes(name: str, pipeline: Any) -> None:
    latents = latents_of(name, pipeline)[:1]
    vae, kind = pipeline.vae, find_autoencoder(type(pipeline.vae).__name__)
    unit = kind.unit(vae.config)
    assert kind.channels(vae.config) == latents.shape[1]
    pixels = torch.rand(1, 3, *(side * unit for side in latents.shape[2:])) * 2 - 1
    encoded, spread = kind.encode(vae, pixels)
    assert encoded.shape == spread.shape == latents.shape
    shift, scaling = (Tensor(part).view(-1, 1, 1) for part in kind.normalize(vae.config))
    made = (encoded - shift) * scaling

    def step(*_: Any, **__: Any) -> tuple[Tensor]:
        there = LAYOUTS.get(name, AS_IT_IS).there(pipeline, made)
        return (pipeline._pack_latents(there) if name == "flux2" else there,)

    def decode(given: Tensor, **_: Any) -> Any:
        raise Decoded(given)

    with (
        mock.patch.object(pipeline.scheduler, "step", step),
        mock.patch.object(vae, "decode", decode),
        pytest.raises(Decoded) as caught,
    ):
        call(name, pipeline, latents, prompt="a cat", num_inference_steps=1, output_type="pt")
    (decoded,) = caught.value.args
    plain = vae.encode(pixels[:, :, None] if decoded.ndim == 5 else pixels)
    plain = plain.latent if hasattr(plain, "latent") else plain.latent_dist.mean
    assert torch.allclose(decoded, plain, atol=1e-5)


def test_an_empty_caption_is_the_negative_branch(name: str, pipeline: Any) -> None:
    """As the pipeline encodes it, beside a caption and alone."""
    family = FAMILIES[name]
    together, alone = (family.encode_text(pipeline, captions) for captions in (["a", ""], [""]))
    negative = {
        "sana": lambda: pipeline.encode_prompt("a", True, **family.text_limit(pipeline))[2],
        "lumina2": lambda: pipeline.encode_prompt("a", True, **family.text_limit(pipeline))[2],
    }
    for key, value in alone.items():
        assert torch.allclose(together[key][1:].float(), value.float(), atol=1e-5)
    if name in negative:
        assert torch.allclose(alone["text"], negative[name](), atol=1e-5)


def test_shapes_of_conditions_are_those_that_are_encoded(name: str, pipeline: Any) -> None:
    family = FAMILIES[name]
    given = conditions(name, pipeline)
    stated = family.condition_shapes(base_of(pipeline).config, given["text"].shape[1])
    assert {key: given[key].shape[1:] for key in stated} == stated
    assert set(stated) | {"time_ids"} == set(given)


def test_gradients_reach_all_of_the_adapter_and_nothing_else(name: str, pipeline: Any) -> None:
    base, family = base_of(pipeline), FAMILIES[name]
    with seeded(3):
        width = family.size(next(iter(family.layers(base).values()))).text
        adapter = IPAdapter.for_model(base, ImageProjection(FEATURE_DIMS["pooled"], width))
        for kv in adapter.image_kv:
            kv.to_v.weight.data.normal_(std=0.1)  # many new adapters start at zero
        image = {"image": torch.randn(2, FEATURE_DIMS["pooled"])}
    model = AdaptedModel(base, adapter)
    latents = latents_of(name, pipeline)
    given = {key: value.clone() for key, value in conditions(name, pipeline).items()}
    made = model(latents, torch.tensor([300.0, 700.0]), image, given)
    plain = family.predict(base, None, latents, torch.tensor([300.0, 700.0]), given)
    assert (made - plain).abs().max() > 1e-6
    (made - latents).square().mean().backward()
    adapter.detach()
    grads = {key: weight.grad for key, weight in adapter.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads.values())
    assert all(weight.grad is None for weight in base.parameters())


# PixArt, Flux and SD 3 are trained in tests.test_other_families.
@pytest.mark.parametrize("name", sorted(TRAINED.keys() - {"pixart", "flux", "sd3"}))
def test_a_recipe_trains_it(name: str, tmp_path: Path) -> None:
    model, output = tmp_path / "model", tmp_path / "run"
    pipeline = tiny_pipeline(TRAINED[name])
    save_model(pipeline, model)
    dynamic = pipeline.scheduler.config.get("use_dynamic_shifting")
    plan = recipe(
        picture_folder(tmp_path / "set"),
        output,
        2,
        model=str(model),
        encoder=str(model / "image_encoder"),
        data={"size": 64, "features": tmp_path / "features", "held_out": 2},
        noise={"shift": "dynamic" if dynamic else "static"},
    )
    last = train(plan)
    assert len(losses(output)) == 2
    assert np.isfinite(losses(output)).all()
    file = read_adapter(last)
    assert file.header is not None
    assert file.header.family == name
    with build_adapter(file, FAMILIES[name]).attached(base_of(pipeline)) as adapter:
        prompt = adapter.prompt(adapter.tokens(torch.randn(2, FEATURE_DIMS["pooled"])), scale=3.0)
        given, latents = conditions(name, pipeline), latents_of(name, pipeline)
        with torch.no_grad():
            made, plain = (
                FAMILIES[name].predict(base_of(pipeline), one, latents, torch.ones(2) * 500, given)
                for one in (prompt, None)
            )
    assert (made - plain).abs().max() > 1e-6
    online = plan.model_copy(update={"output": tmp_path / "online"})
    online = online.model_copy(update={"data": plan.data.model_copy(update={"features": None})})
    train(online)
    assert losses(tmp_path / "online") == pytest.approx(losses(output), rel=2e-3)  # float16 on disk


def test_states_beyond_half_precision_are_not_stored_as_infinity() -> None:
    """Those of language models before their last norm may be, and one sample's decide alone."""
    small, large = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, -1e5]])
    one, other = (stored({"text": states, "text_mask": states > 0}) for states in (small, large))
    assert [kept["text"].dtype for kept in (one, other)] == [torch.float16, torch.bfloat16]
    both = stack_values([one, other])["text"].float()
    assert torch.allclose(both, torch.stack([small, large]), rtol=4e-3)
    assert stored({"face": large})["face"].dtype == torch.float32


def test_a_pipeline_that_samples_in_another_way_is_refused(tmp_path: Path) -> None:
    tiny_pipeline("wan").save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"boundary_ratio": 0.875}))
    with pytest.raises(SettingError, match=r"a WanPipeline with boundary_ratio = 0\.875, which"):
        model_parts(KnownModel("mine", "", Location(str(tmp_path))))


def test_checkpointing_needs_a_model_that_has_it() -> None:
    plan = Optimization(steps=1, checkpointing=True)
    with pytest.raises(SettingError, match="a HunyuanDiT2DModel does not support it"):
        prepare_base(specimen("hunyuandit"), plan, torch.device("cpu"))
