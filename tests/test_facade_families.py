"""`ImagePromptPipeline` over tiny random models of every family: what is made, and all that can be
composed.
"""

from collections.abc import Mapping
from inspect import Parameter, signature
from threading import Barrier
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from imprompt import ImagePromptPipeline, Reference
from imprompt.errors import SettingError
from imprompt.generation.blocks import block_map
from imprompt.generation.settings import Settings
from imprompt.generation.tasks import tasks_of
from tests.test_engine import together
from tests.tiny_pipelines import TINY, Saved, controlnet

pytestmark = [  # of names inside diffusers, and of its solvers under numpy 2
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]
SIZE = {"width": 32, "height": 64, "steps": 2}
RED, BLUE, GREEN = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "green"))
LEFT, RIGHT = Image.new("L", (32, 64)), Image.new("L", (32, 64), 255)
LEFT.paste(255, (0, 0, 16, 64))
RIGHT.paste(0, (0, 0, 16, 64))
GUIDED = {"guidance": 3.0}
NEVER_GUIDED = {"flux2"}  # their pipelines run no negative branch
# UNets and PixArt are in other files, Wan makes videos.
FACADE = [name for name in TINY if name not in {"sd1", "sdxl", "kolors", "pixart", "wan"}]
# Options of each call, where the default is for larger text encoders.
OPTIONS: dict[str, dict[str, Any]] = {
    "flux": {"true_cfg_scale": 3.0},
    "sana": {"complex_human_instruction": None},
    "flux2": {"text_encoder_out_layers": (0, 1, 2)},
}
# What a pipeline says of its pictures' sizes, where it makes no others; here they are tiny.
SIZES: dict[str, dict[str, Any]] = {
    "kandinsky5": {"resolutions": [(32, 64), (64, 32)]},
    "hidream": {"default_sample_size": 23},
}
ROUNDED = 1e-5  # of pixels between 0 and 1


class Opened:
    """One family's model, opened by the façade."""

    def __init__(self, saved: Saved) -> None:
        self.saved, self.name, self.pipe = saved, saved.name, saved.pipeline()
        self.family = self.pipe.family
        self.guided = self.name not in NEVER_GUIDED
        self.options = OPTIONS.get(self.name, {})
        vars(self.pipe.pipeline).update(SIZES.get(self.name, {}))

    def make(self, *image: Any, **settings: Any) -> np.ndarray:
        """Pixels (pictures, h, w, 3) between 0 and 1, of seed 1, with guidance."""
        more = settings.pop("pipeline_options", {})
        options = {"output_type": "np", **self.options, **more}
        asked = {"seed": 1, **SIZE, **GUIDED, **settings}
        return np.stack(self.pipe(*image, pipeline_options=options, **asked).images)

    def plain(self, guidance: float = 3.0, net: Any = None, **controls: Any) -> np.ndarray:
        """What diffusers' own pipeline makes of the same call, with a ControlNet if one is given.

        controls  the pipeline's options for it
        """
        pipeline: Any = type(self.pipe.pipeline).from_pretrained(self.saved.model)
        vars(pipeline).update(SIZES.get(self.name, {}))
        if net is not None:
            table = tasks_of(pipeline).controlled
            assert table is not None
            pipeline = getattr(diffusers, table.text)(**pipeline.components, controlnet=net)
        pipeline.set_progress_bar_config(disable=True)
        options = {
            **self.family.call_options(pipeline),
            **self.options,
            self.family.guidance: guidance,
            **({"negative_prompt": ""} if self.takes("negative_prompt") else {}),
        }
        with torch.no_grad():
            result = pipeline(
                prompt="a cat",
                width=SIZE["width"],
                height=SIZE["height"],
                num_inference_steps=SIZE["steps"],
                generator=[torch.Generator().manual_seed(1)],
                output_type="np",
                **options,
                **controls,
            )
        return result.images if hasattr(result, "images") else result.image

    def unguided(self) -> dict[str, Any]:
        """Settings without a negative branch."""
        if self.name == "flux":
            return {"pipeline_options": {"true_cfg_scale": 1.0}}
        return {"guidance": self.family.row.generation.unguided}

    def takes(self, option: str) -> bool:
        return option in self.parameters()

    def parameters(self) -> Mapping[str, Parameter]:
        return signature(self.pipe.pipeline.__call__).parameters


def differs(one: np.ndarray, other: np.ndarray, by: float = 1e-3) -> bool:
    return bool(np.abs(one - other).max() > by)


@pytest.fixture(scope="module", params=FACADE)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp(request.param)
    return Opened(Saved(folder, request.param))


def test_it_follows_an_image_prompt_and_repeats_by_seed(opened: Opened) -> None:
    red = opened.make(RED)
    assert red.shape == (1, SIZE["height"], SIZE["width"], 3)
    assert np.array_equal(red, opened.make(RED))
    assert differs(red, opened.make(RED, seed=2))
    assert differs(red, opened.make(BLUE))
    assert differs(red, opened.make(RED, prompt="a cat"), 1e-5)


def test_scale_zero_is_the_plain_pipeline_bit_for_bit(opened: Opened) -> None:
    for guidance in (1.0, 3.0):
        made = opened.make(RED, prompt="a cat", scale=0.0, guidance=guidance)
        assert np.array_equal(made, opened.plain(guidance)), guidance
    assert differs(opened.make(RED, prompt="a cat", scale=1e-2), made, 0)


def test_pictures_of_a_batch_are_what_they_are_alone(opened: Opened) -> None:
    several = opened.make(RED, num_images=3, seed=5)
    for number, one in enumerate(several):
        np.testing.assert_allclose(opened.make(RED, seed=5 + number)[0], one, atol=ROUNDED)
    items = [Reference(images=RED, scale=0.3), BLUE, Reference(images=RED, mask=LEFT, end=0.1)]
    texts = ["a cat", "a dog and " * 3, ""]
    batch = opened.make(items, texts, seed=5)
    for number, (item, text) in enumerate(zip(items, texts, strict=True)):
        alone = opened.make(item, text, seed=5 + number)[0]
        np.testing.assert_allclose(alone, batch[number], atol=ROUNDED)


def test_references_are_composed_by_masks_windows_and_easing(opened: Opened) -> None:
    red = opened.make(RED)
    halves = [Reference(images=RED, mask=LEFT), Reference(images=RED, mask=RIGHT)]
    np.testing.assert_allclose(opened.make(halves, together=True), red, atol=1e-4)
    left = opened.make(halves[0])
    both = opened.make([halves[0], Reference(images=BLUE, mask=RIGHT)], together=True)
    assert differs(left, red)
    assert differs(both, red)
    assert differs(both, left)
    none = opened.make(RED, scale=0.0)
    between = Reference(images=RED, start=0.6, end=0.9)  # where neither of two steps is
    assert np.array_equal(opened.make(between), none)
    early = opened.make(Reference(images=RED, end=0.1))  # the first of two steps
    late = opened.make(Reference(images=RED, start=0.1))
    assert differs(early, none, 1e-5)
    assert differs(late, none, 1e-5)
    assert differs(early, late, 1e-5)
    assert differs(opened.make(Reference(images=RED, easing="ease in")), red)


def test_blocks_are_chosen_by_the_familys_own_names_and_by_presets(opened: Opened) -> None:
    layers = list(opened.pipe.first.adapter.injection.layers)
    red, none = opened.make(RED), opened.make(RED, scale=0.0)

    def by(blocks: Any) -> np.ndarray:
        return opened.make(Reference(images=RED, blocks=blocks))

    assert np.array_equal(by({"*": 1.0}), red)
    assert np.array_equal(by(dict.fromkeys(layers, 1.0)), red)
    first = by({layers[0]: 1.0})
    assert differs(first, red, 1e-5)
    assert differs(first, none, 1e-5)
    factors = block_map(layers, "ease in").factors
    assert torch.equal(factors, factors.sort(descending=bool(factors[0] > factors[-1])).values)
    deep = by("ease in")
    assert np.array_equal(deep, by(dict(zip(layers, factors.tolist(), strict=True))))
    assert differs(deep, red, 1e-5)
    with pytest.raises(SettingError, match="no cross-attention layer's name begins with it"):
        by({"up_blocks": 1.0})
    with pytest.raises(SettingError, match=r"are known for SD 1\.x and SDXL only"):
        by("style transfer")


def test_a_negative_image_is_what_guidance_moves_away_from(opened: Opened) -> None:
    reference = Reference(images=RED, negative=BLUE)
    if not opened.guided:
        with pytest.raises(SettingError, match="negative"):
            opened.make(reference)
        return
    made = opened.make(reference)
    assert differs(made, opened.make(RED))
    assert differs(made, opened.make(Reference(images=RED, negative=GREEN)))
    with pytest.raises(SettingError, match="negative"):
        opened.make(reference, **opened.unguided())


def test_each_branch_of_guidance_gets_its_own_image_prompt(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with the positive text have the picture's keys, all others those of no picture."""
    engine, seen = opened.pipe.engine, []
    model_output, name = engine.model_output, opened.family.arguments[2]

    def output(given: Any, prompts: Any) -> Any:
        seen.append([*zip(given[name], prompts[0].keys[0], strict=True)])
        return model_output(given, prompts)

    monkeypatch.setattr(engine, "model_output", output)
    asked = {"prompt": "a cat", "num_images": 2}
    opened.make(RED, **opened.unguided(), **asked)
    text, key = seen[0][0]
    seen.clear()
    opened.make(RED, **asked)
    found = [
        (own.shape == text.shape and torch.allclose(own, text, atol=1e-4), torch.equal(keys, key))
        for rows in seen
        for own, keys in rows
    ]
    assert all(positive == has_key for positive, has_key in found)
    assert len({has_key for _, has_key in found}) == 1 + opened.guided


def test_image_guidance_is_applied_or_refused(opened: Opened) -> None:
    if opened.family.separate_branches or opened.family.positive_first:
        with pytest.raises(SettingError, match=r"image_guidance needs .* leave it out"):
            opened.make(RED, image_guidance=2.0)
        return
    plain, more = (opened.make(RED, prompt="a cat", image_guidance=by) for by in (3.0, 9.0))
    np.testing.assert_allclose(plain, opened.make(RED, prompt="a cat"), atol=1e-4)
    assert differs(plain, more)


def test_requests_of_other_steps_share_calls_and_make_their_own_pictures(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = [
        {"steps": 3, "seed": 1},
        {"steps": 4, "seed": 2, "prompt": "a cat", "scale": 0.5},
        {"steps": 2, "seed": 3, "num_images": 2},
        {"steps": 3, "seed": 4, "width": 64, "height": 32},
    ]
    reference = Reference(images=BLUE, end=0.7)
    jobs = [lambda call=call: opened.make(reference, **call) for call in calls]
    alone = [run() for run in jobs]
    sizes: list[int] = []
    engine, all_there = opened.pipe.engine, Barrier(len(calls))
    engine_run, submit = engine.run, engine.submit

    def run(calls: Any) -> Any:
        outs = engine_run(calls)
        sizes.append(len(calls))
        return outs

    def submit_together(seat: Any, call: Any) -> Any:
        if seat.calls == 1:  # its first call
            all_there.wait(60)
        return submit(seat, call)

    monkeypatch.setattr(engine, "run", run)
    monkeypatch.setattr(engine, "submit", submit_together)
    for wanted, found in zip(alone, together(jobs), strict=True):
        np.testing.assert_allclose(found, wanted, atol=ROUNDED)
    assert max(sizes) > 1


def test_a_picture_to_start_from_where_diffusers_has_a_pipeline(opened: Opened) -> None:
    tasks = tasks_of(opened.pipe.pipeline).plain
    assert tasks is not None
    for kind, pictures in (
        ("image", {"init_image": BLUE}),
        ("inpaint", {"init_image": BLUE, "mask_image": LEFT}),
    ):
        asked = {"seed": 1, "strength": 0.6, **SIZE, "steps": 4, **GUIDED, **pictures}
        asked["pipeline_options"] = opened.options
        if not getattr(tasks, kind):
            with pytest.raises(SettingError, match="own way to start from pictures"):
                opened.pipe(RED, **asked)
            continue
        red, none = (
            np.asarray(opened.pipe(RED, scale=scale, **asked).images[0]) / 255 for scale in (1, 0)
        )
        assert red.shape == (SIZE["height"], SIZE["width"], 3)
        assert differs(red, none)
        if kind == "inpaint":
            assert np.array_equal(red[:, 16:], none[:, 16:])


def test_what_a_pipeline_does_not_take_is_refused_in_one_line(opened: Opened) -> None:
    if not opened.takes("negative_prompt"):
        with pytest.raises(SettingError, match="takes no negative_prompt: leave it out"):
            opened.make(RED, negative_prompt="a dog")
    else:
        assert differs(opened.make(RED, negative_prompt="a dog"), opened.make(RED), 1e-6)
    own = opened.family.guidance
    other = "guidance_scale" if own == "true_cfg_scale" else "true_cfg_scale"
    with pytest.raises(SettingError, match="give it as guidance"):
        opened.make(RED, pipeline_options={own: 2.0})
    if not opened.takes(other):
        with pytest.raises(SettingError, match=r"has no such option; give guidance"):
            opened.make(RED, pipeline_options={other: 2.0})
    with pytest.raises(SettingError, match="this model takes multiples of"):
        opened.make(RED, width=33)


def test_defaults_are_the_pipelines_own(opened: Opened) -> None:
    pipe: ImagePromptPipeline = opened.pipe
    if opened.name in SIZES:
        with pytest.raises(SettingError, match=r"makes \d+ × \d+ of it: give these"):
            pipe.prepare(RED, Settings())
        return
    found = pipe.prepare(RED, Settings()).settings
    takes = opened.parameters()
    assert found.steps == takes["num_inference_steps"].default
    assert found.guidance == takes[opened.family.guidance].default
    native, unit = opened.family.native_side(pipe.pipeline), opened.family.side_unit(pipe.pipeline)
    assert found.size == (max(native, unit),) * 2


def test_a_controlnet_where_diffusers_has_a_pipeline(opened: Opened) -> None:
    kind, table = opened.family.control, tasks_of(opened.pipe.pipeline)
    if kind is None or table.controlled is None:
        with pytest.raises(SettingError, match=r"no ControlNet is known for a \w+: leave"):
            opened.saved.pipeline(controlnet=str(opened.saved.model))
        return
    folder = opened.saved.model.parent / "control"
    base: Any = opened.pipe.engine.model
    controlnet(kind.model, base.config).save_pretrained(folder)
    pipe = opened.saved.pipeline(controlnet=folder)
    options = {"output_type": "np", **opened.options}
    asked = {"seed": 1, **SIZE, **GUIDED, "prompt": "a cat", "pipeline_options": options}
    lines, flat = (np.stack(pipe(RED, control_image=one, **asked).images) for one in (LEFT, RIGHT))
    assert differs(lines, flat)
    assert differs(lines, opened.make(RED, prompt="a cat"))
    weak = np.stack(pipe(RED, control_image=LEFT, control_scale=0.1, **asked).images)
    assert differs(weak, lines)
    none = np.stack(pipe(RED, control_image=LEFT, scale=0.0, **asked).images)
    assert differs(none, lines)
    plain = opened.plain(net=pipe.controlnet, control_image=LEFT.convert("RGB"))
    np.testing.assert_allclose(none, plain, rtol=0, atol=1e-6)  # other weights' places in memory
    for name, more in (("image", {}), ("inpaint", {"mask_image": LEFT})):
        start = {"init_image": BLUE, "strength": 0.6, **more, **asked, "steps": 4}
        start["pipeline_options"] = {}
        if getattr(table.controlled, name):
            made = (pipe(RED, control_image=one, **start).images[0] for one in (LEFT, RIGHT))
            assert differs(*(np.asarray(one) / 255 for one in made))
        else:
            with pytest.raises(SettingError, match="own way to start from pictures"):
                pipe(RED, control_image=LEFT, **start)


def test_a_pipeline_that_is_loaded_takes_an_adapter_in_three_lines(opened: Opened) -> None:
    saved, kind = opened.saved, type(opened.pipe.pipeline)
    own: Any = kind.from_pretrained(saved.model)
    own.set_progress_bar_config(disable=True)
    vars(own).update(SIZES.get(opened.name, {}))
    pipe = ImagePromptPipeline.from_pipeline(own, saved.file, encoder=saved.model / "image_encoder")
    options = {"output_type": "np", **opened.options}
    made = pipe(RED, "a cat", scale=0.6, seed=1, **SIZE, **GUIDED, pipeline_options=options).images
    np.testing.assert_allclose(made, opened.make(RED, prompt="a cat", scale=0.6), atol=1e-5)
