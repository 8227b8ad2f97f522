"""The objective against diffusers' own schedulers, and against the algebra that it follows from."""

import json
import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st

from imprompt.errors import SettingError
from imprompt.families.base import mu_by_places
from imprompt.training.objective import BUCKETS, TARGETS, ByTimestep, Objective, emphasis
from imprompt.training.recipe import NoiseSettings

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V: dict[str, Any] = SD | {"prediction_type": "v_prediction"}
DIFFUSION = {
    "sd15": PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1),
    "sdxl": EulerDiscreteScheduler(**SD, timestep_spacing="leading"),
    "sd2-v": DDIMScheduler(**V),
    "emoji": DDIMScheduler(**V, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    "linear": DDPMScheduler(num_train_timesteps=100),
    "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
}
FLOW = {
    "sd3": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flux": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    "sana": DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
    "wan": UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0
    ),
}
ALL = DIFFUSION | FLOW
BATCH = 6
seeds = st.integers(0, 2**31)
names = st.sampled_from(list(ALL))


def objective(name: str, **noise: Any) -> Objective:
    return Objective(ALL[name], NoiseSettings(**noise))


def drawn(goal: Objective, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, noise and timesteps as rows."""
    random = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, BATCH, 4, 6, 5, generator=random)
    return latents, noise, goal.draw(torch.rand(BATCH, generator=random))


def reference(name: str) -> DDPMScheduler:
    return DDPMScheduler.from_config(ALL[name].config)


@given(st.sampled_from(list(DIFFUSION)), seeds)
def test_diffusion_is_that_of_diffusers(name: str, seed: int) -> None:
    goal, theirs = objective(name), reference(name)
    latents, noise, index = drawn(goal, seed)
    noisy, t, target = goal.corrupt(latents, noise, index)
    assert torch.equal(t, index)
    assert torch.equal(noisy, theirs.add_noise(latents, noise, t))
    assert goal.prediction_type == theirs.config["prediction_type"]
    assert torch.equal(
        target,
        noise if goal.prediction_type == "epsilon" else theirs.get_velocity(latents, noise, t),
    )


@given(st.sampled_from(["sd3", "flux"]), seeds)
def test_flow_is_that_of_diffusers(name: str, seed: int) -> None:
    goal = objective(name)
    latents, noise, index = drawn(goal, seed)
    noisy, t, target = goal.corrupt(latents, noise, index)
    assert goal.prediction_type == "flow"
    assert torch.equal(noisy, FLOW[name].scale_noise(latents, t, noise))
    assert torch.equal(target, noise - latents)


# of diffusers under numpy 2
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["sana", "wan"])
def test_solvers_of_flows_have_the_sigmas_they_sample_with(name: str) -> None:
    scheduler = type(FLOW[name]).from_config(FLOW[name].config)
    scheduler.set_timesteps(1000)
    sigma = objective(name).sigma
    assert torch.allclose(
        scheduler.sigmas[:-1].flip(0), sigma, atol=1.1e-3 * FLOW[name].config["flow_shift"]
    )


@given(names, seeds)
def test_the_picture_follows_from_the_target(name: str, seed: int) -> None:
    """x_t and the target are two equations in x0 and ε.

    The weights of min-SNR rest on the solution.
    """
    goal = objective(name)
    latents, noise, index = drawn(goal, seed)
    noisy, _, target = (part.double() for part in goal.corrupt(latents, noise, index))
    alpha, sigma, low, high = (
        table.double()[index].view(-1, 1, 1, 1)
        for table in (goal.alpha, goal.sigma, goal.of_latents, goal.of_noise)
    )
    solved = (high * noisy - sigma * target) / (high * alpha - low * sigma)
    assert torch.allclose(solved, latents.double(), atol=1e-4)


@pytest.mark.parametrize("name", DIFFUSION)
def test_snr_is_that_of_diffusers(name: str) -> None:
    goal = objective(name)
    assert torch.equal((goal.alpha / goal.sigma) ** 2, compute_snr(reference(name), goal.timesteps))
    assert (goal.sigma.diff() > 0).all()


@given(names, st.floats(0.1, 50))
def test_min_snr_is_that_of_its_paper(name: str, gamma: float) -> None:
    goal = objective(name, min_snr=gamma)
    snr = (goal.alpha.double() / goal.sigma.double()) ** 2
    capped = snr.clamp_max(gamma)
    expected = {
        "epsilon": capped / snr,
        "v_prediction": capped / (snr + 1),
        "flow": capped * goal.sigma.double() ** 2,
    }
    assert torch.allclose(goal.weight.double(), expected[goal.prediction_type], rtol=1e-5)


@given(names, seeds, st.sampled_from([None, 5.0]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_losses_are_of_each_sample(
    name: str, seed: int, gamma: float | None, dtype: torch.dtype
) -> None:
    goal = objective(name, min_snr=gamma)
    _, noise, index = drawn(goal, seed)
    prediction = noise.roll(1, 0).to(dtype)
    weighted, plain = goal.losses(prediction, noise, index)
    assert plain.dtype == weighted.dtype == torch.float32
    assert torch.allclose(
        plain,
        torch.stack(
            [((a.float() - b) ** 2).mean() for a, b in zip(prediction, noise, strict=True)]
        ),
    )
    assert torch.equal(weighted, plain * goal.weight[index])
    assert gamma is not None or torch.equal(weighted, plain)


@given(names, seeds, st.floats(0.1, 50), st.sampled_from([None, 5.0]))
def test_a_mask_weighs_errors_by_place(
    name: str, seed: int, weight: float, gamma: float | None
) -> None:
    goal = objective(name, min_snr=gamma, mask_weight=weight)
    latents, noise, index = drawn(goal, seed)
    mask = torch.rand(BATCH, 1, 6, 5, generator=torch.Generator().manual_seed(seed))
    mask[0], mask[1] = 0, 1  # both count evenly
    weighted, plain = goal.losses(latents, noise, index, mask)
    assert torch.equal(plain, goal.losses(latents, noise, index).plain)
    assert torch.equal(weighted[0], (goal.weight[index] * plain)[0])
    assert torch.allclose(weighted[:2], (goal.weight[index] * plain)[:2])
    for number in range(BATCH):
        own = 1 + weight * mask[number].double()
        expected = (
            ((latents[number].double() - noise[number]) ** 2 * own).mean()
            / own.mean()
            * goal.weight[index[number]]
        )
        assert weighted[number].item() == pytest.approx(expected.item(), rel=1e-4)
    for number in range(BATCH):  # whatever else is in the batch
        one = slice(number, number + 1)
        alone = goal.losses(latents[one], noise[one], index[one], mask[one]).weighted
        assert alone.item() == pytest.approx(weighted[number].item(), rel=1e-5)


def test_white_weighs_one_and_the_weight_times_black() -> None:
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :1] = 1
    weights = emphasis(mask, 3.0)
    assert weights[0, 0, 0, 0] == pytest.approx(4 * weights[0, 0, 3, 3])
    assert torch.allclose(weights.mean((1, 2, 3)), torch.ones(2))


@given(names, seeds)
def test_a_weight_of_zero_is_no_mask_bit_for_bit(name: str, seed: int) -> None:
    goal = objective(name, min_snr=5.0)
    latents, noise, index = drawn(goal, seed)
    without = goal.losses(latents, noise, index)
    for weight, mask in (
        (0.0, torch.rand(BATCH, 1, 6, 5)),
        (3.0, torch.zeros(BATCH, 1, 6, 5)),
        (3.0, None),
    ):
        losses = objective(name, min_snr=5.0, mask_weight=weight).losses(
            latents, noise, index, mask
        )
        assert all(torch.equal(one, other) for one, other in zip(losses, without, strict=True))


@given(names, st.floats(0, 1, exclude_max=True, width=32))
def test_a_draw_is_a_row_and_grows_with_u(name: str, u: float) -> None:
    goal = objective(name)
    low, high, last = goal.draw(torch.tensor([u, min(u + 0.01, 1), 1.0])).tolist()
    assert 0 <= low <= high <= last == len(goal.alpha) - 1


def test_draws_are_even_for_diffusion_and_logit_normal_for_flow() -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert set(torch.bincount(objective("sd15").draw(u)).tolist()) == {100}
    share = (objective("sd3").draw(u) + 0.5) / 1000
    normal = (share / (1 - share)).log()
    assert (normal.mean().abs() < 1e-3, abs(normal.std() - 1) < 1e-2) == (True, True)


EVEN = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_uniform_draws_every_timestep_as_often(name: str) -> None:
    assert set(torch.bincount(objective(name, timesteps="uniform").draw(EVEN)).tolist()) == {100}


@given(names, st.floats(-1.5, 1.5), st.floats(0.3, 1.5))
def test_logit_normal_has_its_mean_and_deviation(name: str, mean: float, std: float) -> None:
    goal = objective(name, timesteps="logit-normal", logit_mean=mean, logit_std=std)
    rows = len(goal.alpha)
    share = (goal.draw(EVEN).double() + 0.5) / rows
    for point in (0.1, 0.3, 0.5, 0.7, 0.9):  # its distribution function
        logit = torch.tensor(point, dtype=torch.float64).logit()
        expected = torch.special.ndtr((logit - mean) / std).item()
        assert (share < point).double().mean().item() == pytest.approx(expected, abs=0.05)
    middle = share.median().logit().item()
    assert middle == pytest.approx(mean, abs=8 / rows)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("timesteps", ["uniform", "logit-normal"])
@pytest.mark.parametrize("side", [16, 64, 128])
def test_a_dynamic_shift_is_that_of_sampling(kind: Any, timesteps: str, side: int) -> None:
    """The sigmas that a pipeline samples with, for a picture of that size, are the quantiles."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    plain, shifted = (
        Objective(scheduler, NoiseSettings(timesteps=timesteps, shift=shift), mu_by_places)
        for shift in ("static", "dynamic")
    )
    latents = torch.empty(1, 16, side, side)
    steps, (few, many), (low, high) = 50, (256, 4096), (0.5, 1.15)
    mu = calculate_shift(side * side // 4, few, many, low, high)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    u = (torch.arange(steps, 0, -1).double() / steps).clamp_max(1 - 1e-9)
    if timesteps == "logit-normal":  # the same shares of noise
        u = torch.special.ndtr(u.logit())
    drawn = shifted.sigma[shifted.draw(u, latents)]
    assert torch.allclose(drawn, scheduler.sigmas[:-1].float(), atol=2.1e-3)
    assert torch.equal(shifted.sigma, plain.sigma)  # the table stays
    median = shifted.draw(EVEN, latents).double().median() / 1000
    factor = math.exp(mu) if kind == "exponential" else mu  # of the odds of the noise
    assert median.item() == pytest.approx(factor / (factor + 1), abs=2e-3)
    assert plain.draw(EVEN, latents).double().median().item() == 499


@given(names, st.floats(1.1, 4))
def test_a_power_draws_noisier_timesteps_more_often(name: str, power: float) -> None:
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    goal = objective(name, power=power)
    assert torch.equal(goal.row(u), objective(name).draw(u))  # what is held out is measured evenly
    share = goal.draw(u).double() / len(goal.alpha)
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    quartiles = objective(name).draw(1 - (1 - at) ** power).double() / len(goal.alpha)
    assert torch.allclose(share.quantile(at), quartiles, atol=1 / len(goal.alpha) + 1e-3)


def test_offset_noise_moves_whole_channels() -> None:
    noise, offset = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 1, 1)
    moved = objective("sdxl", offset=0.05).shift(noise, offset)
    assert torch.allclose(moved - noise, 0.05 * offset.expand_as(noise), atol=1e-6)
    assert torch.equal(objective("sdxl").shift(noise, offset), noise)


@pytest.mark.parametrize(
    "stated", [{"prediction_type": "flow_prediction"}, {"use_flow_sigmas": True}]
)
def test_one_setting_of_a_flow_is_enough(stated: dict[str, Any]) -> None:
    scheduler = DPMSolverMultistepScheduler(flow_shift=3.0, **stated)
    goal = Objective(scheduler, NoiseSettings())
    assert goal.prediction_type == "flow"
    assert torch.equal(goal.sigma, objective("sana").sigma)


def test_zero_terminal_snr_by_the_recipe_or_by_the_model() -> None:
    by_recipe, by_model = objective("sd2-v", zero_terminal_snr=True), objective("emoji")
    assert torch.equal(by_recipe.alpha, by_model.alpha)
    assert (by_model.alpha[-1], by_model.sigma[-1]) == (0, 1)
    assert objective("sd2-v").alpha[-1] > 0
    assert objective("emoji", min_snr=5).weight.isfinite().all()
    assert objective("sd3", zero_terminal_snr=True).alpha[-1] == 0  # as without


@pytest.mark.parametrize(
    ("scheduler", "noise", "words"),
    [
        (
            DDPMScheduler(prediction_type="sample"),
            {},
            "predicts 'sample'.* training knows epsilon, v_prediction, flow$",
        ),
        (EDMEulerScheduler(), {}, "EDMEulerScheduler has no schedule of betas"),
        (DIFFUSION["sd15"], {"zero_terminal_snr": True}, "needs a model that predicts v"),
        (DDIMScheduler(**SD, rescale_betas_zero_snr=True), {}, "needs a model that predicts v"),
        (FLOW["sd3"], {"shift": "dynamic"}, "does not shift by the picture's size"),
        (DIFFUSION["sd15"], {"shift": "dynamic"}, "PNDMScheduler does not shift"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    scheduler: Any, noise: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingError, match=words) as caught:
        Objective(scheduler, NoiseSettings(**noise))
    assert "\n" not in str(caught.value)


def test_every_target_is_known_by_its_name() -> None:
    assert {objective(name).prediction_type for name in ALL} == set(TARGETS)


def test_the_tables_move_and_are_no_state() -> None:
    goal = objective("sd3")
    assert not goal.state_dict()
    assert not list(goal.parameters())
    assert all(table.device.type == "meta" for table in goal.to("meta").buffers())


@given(
    names,
    st.lists(
        st.tuples(st.floats(0, 10, width=32), st.floats(0, 1, exclude_max=True), st.booleans()),
        min_size=1,
    ),
)
def test_losses_by_timestep(name: str, seen: list[tuple[float, float, bool]]) -> None:
    goal = objective(name)
    losses, u, real = (torch.tensor(column) for column in zip(*seen, strict=True))
    index = goal.draw(u)
    whole, halves = ByTimestep(goal), [ByTimestep(goal), ByTimestep(goal)]
    whole.add(losses, index, real.float())
    for half, part in zip(halves, torch.arange(len(losses)).tensor_split(2), strict=True):
        half.add(losses[part], index[part], real[part].float())
    halves[0].totals += halves[1].totals  # as an all-reduce does
    size = len(goal.alpha) // BUCKETS
    expected: dict[str, list[float]] = {}
    for loss, row, counts in zip(losses.tolist(), index.tolist(), real.tolist(), strict=True):
        if counts:
            low = row // size * size
            expected.setdefault(f"loss/{low:03d}-{low + size - 1:03d}", []).append(loss)
    for one in (whole, halves[0]):
        read = {key: value for key, value in one.read().items() if key.startswith("loss")}
        assert read == {
            key: pytest.approx(sum(all_) / len(all_), rel=1e-5, abs=1e-5)
            for key, all_ in expected.items()
        }
    whole.reset()
    assert whole.read() == {}


@pytest.mark.parametrize("name", ALL)
def test_snr_by_timestep_falls_and_is_a_number(name: str) -> None:
    table = ByTimestep(goal := objective(name))
    index = torch.arange(len(goal.alpha))
    table.add(torch.ones(len(index)), index, torch.ones(len(index)))
    read = table.read()
    decibels = [value for key, value in read.items() if key.startswith("snr_db/")]
    assert len(decibels) == BUCKETS
    assert sorted(decibels, reverse=True) == decibels
    assert json.loads(json.dumps(read, allow_nan=False)) == read
