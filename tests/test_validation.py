"""Validation beside training: it shows and measures what the adapter does, and leaves no trace in
what is trained.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from imprompt.adapter import IPAdapter
from imprompt.encoders.vision import VisionEncoder, preprocess
from imprompt.errors import CheckpointError, ImageError, ImpromptError, SettingError
from imprompt.generation.features import Reader
from imprompt.generation.pipeline import ImagePromptPipeline
from imprompt.generation.prepare import Attached
from imprompt.generation.settings import Settings
from imprompt.training.recipe import Recipe
from imprompt.training.validation import (
    CELL,
    GAP,
    MARGIN,
    Clip,
    Validator,
    cell_size,
    evaluating,
    held_out_loss,
    on_device,
    sampling_scheduler,
    schedule_places,
    sheet,
    similarities,
    wrapped,
)
from imprompt.variants import find_variant
from tests.parts import tiny_tokenizer
from tests.tiny import (
    noise,
    noise_inputs,
    pictures,
    seeded,
    smallest_unet,
    tiny_adapter,
    tiny_encoder,
)
from tests.tiny_pipelines import PIPELINES

CPU = torch.device("cpu")
SCALES = (0.5, 1.0)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Operators this small only wait for their threads, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(
    run: Path, optimization: dict[str, Any] | None = None, size: int | None = 16, **validation: Any
) -> Recipe:
    return Recipe.model_validate(
        {
            "model": "emoji",
            "output": run,
            "data": {"source": "pictures", "size": size},
            "optimization": {"steps": 10, **(optimization or {})},
            "validation": {"steps": 2, **validation},
        }
    )


class Outfit:
    """A tiny pipeline in training: base and adapter in train mode, the models around them not."""

    def __init__(self, base: str = "smallest") -> None:
        self.pipeline: Any = PIPELINES["sd1" if base == "smallest" else base]()
        if base == "smallest":
            self.pipeline.unet = smallest_unet()
        self.encoder = VisionEncoder(self.pipeline.image_encoder, self.pipeline.feature_extractor)
        self.adapter: IPAdapter = (
            tiny_adapter(self.pipeline.unet).attach(self.pipeline.unet).train()
        )
        self.pipeline.unet.train()

    def validator(self, plan: Recipe) -> Validator:
        return Validator(
            plan, self.pipeline, self.encoder, find_variant("base"), self.adapter, pictures(1)
        )

    def modules(self) -> list[nn.Module]:
        return [
            self.adapter,
            *(part for part in self.pipeline.components.values() if isinstance(part, nn.Module)),
        ]

    def state(self) -> dict[str, Any]:
        """All that training may depend on: every part's mode, every tensor by its address, dtype,
        values and flag, and so on.
        """
        parts = [part for module in self.modules() for part in module.modules()]
        tensors = [
            tensor
            for module in self.modules()
            for tensor in (*module.parameters(), *module.buffers())
        ]
        scheduler = self.pipeline.scheduler
        return {
            "modes": [part.training for part in parts],
            "tensors": [
                (id(t), t.data_ptr(), t.dtype, t.requires_grad, t.grad, t.double().sum().item())
                for t in tensors
            ],
            "processors": dict(self.pipeline.unet.attn_processors),
            "scheduler": (
                id(scheduler),
                dict(scheduler.config),
                scheduler.timesteps.tolist(),
                scheduler.num_inference_steps,
            ),
            "config": dict(self.pipeline.config),
            "random": torch.get_rng_state().tolist(),
        }


@pytest.mark.parametrize("base", PIPELINES)
def test_a_grid_leaves_everything_as_it_was(base: str, tmp_path: Path) -> None:
    outfit = Outfit(base)
    outfit.pipeline.unet.to(torch.bfloat16)  # the base in low precision, the models around it not
    validator = outfit.validator(recipe(tmp_path, scales=SCALES))
    before = outfit.state()
    path, scores = validator.grid(7)
    assert outfit.state() == before
    assert path == tmp_path / "validation" / "step-0000007.png"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert set(scores) == {
        f"clip_i (conditioning encoder){at}" for at in ("", " at scale 0.5", " at scale 1")
    }
    assert all(-1 <= score <= 1 for score in scores.values())


def test_everything_is_as_it_was_after_a_failure_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outfit = Outfit()
    validator = outfit.validator(recipe(tmp_path))
    before = outfit.state()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(outfit.pipeline.vae, "decode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        validator.grid(7)
    assert outfit.state() == before


def losses_of_two_steps(outfit: Outfit, validator: Validator | None) -> list[float]:
    """Training with the global random state, which a validation in between would disturb if it drew
    from it.
    """
    optimizer = torch.optim.AdamW(outfit.adapter.parameters(), lr=1e-2)
    losses = []
    with seeded(11):
        for step in range(2):
            inputs = noise_inputs(outfit.pipeline.unet, 2, seed=step)
            prompt = outfit.adapter.prompt(outfit.adapter.tokens(torch.randn(2, 24)))
            loss = (
                (noise(outfit.pipeline.unet, inputs, prompt) - torch.randn_like(inputs["sample"]))
                .square()
                .mean()
            )
            loss.backward()
            if validator is not None:
                validator.grid(step)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    plain, watched = Outfit(), Outfit()
    assert losses_of_two_steps(plain, None) == losses_of_two_steps(
        watched, watched.validator(recipe(tmp_path))
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.adapter.parameters(), watched.adapter.parameters(), strict=True)
    )


def test_a_compiled_base_is_not_compiled_anew(tmp_path: Path) -> None:
    outfit = Outfit()
    outfit.pipeline.unet.compile(backend=lambda *_: pytest.fail("compiled"))
    outfit.validator(recipe(tmp_path, {"compile": True})).grid(1)


def test_the_grid_shows_what_the_live_adapter_makes(tmp_path: Path) -> None:
    """The pictures under the headers are the façade's own, from the same seeds, with the guidance
    of the model.

    Training changes them.
    """
    outfit, texts = Outfit(), ("", "cat")
    prompts = [Image.new("RGB", (16, 16), colour) for colour in ("orange", "teal")]
    plan = recipe(tmp_path, {"batch_size": 2}, texts=texts, scales=SCALES, seed=5)
    validator = Validator(
        plan, outfit.pipeline, outfit.encoder, find_variant("base"), outfit.adapter, iter(prompts)
    )
    path, scores = validator.grid(1)
    pipe = ImagePromptPipeline(
        outfit.pipeline,
        Attached(outfit.adapter.eval(), Reader(outfit.encoder, find_variant("base"))),
    )
    size = {"width": 16, "height": 16}
    made = [
        pipe(prompts, text, scale=scale, seed=5, steps=2, guidance=3.0, batch_size=2, **size).images
        for text in texts
        for scale in SCALES
    ]
    assert len({results[1].tobytes() for results in made}) == 4
    expected = sheet(prompts, validator.columns, made, step=1)
    with Image.open(path) as grid:
        assert np.array_equal(np.asarray(grid), np.asarray(expected))
    side, high = cell_size((16, 16))[0], expected.height
    for column, results in enumerate([prompts, *made]):
        # the bottom row: its cells are the pictures, each pixel a square
        left = MARGIN + column * (side + GAP)
        cell = expected.crop((left, high - MARGIN - side, left + side, high - MARGIN))
        assert np.array_equal(
            np.asarray(cell), np.asarray(results[1].resize((side, side), Image.Resampling.NEAREST))
        )
    assert validator.grid(2)[1] == scores
    with torch.no_grad():
        outfit.adapter.projection.norm.weight.mul_(-1)
    assert validator.grid(3)[1] != scores


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP, tiny and random."""
    folder, tokenizer = tmp_path_factory.mktemp("clip"), tiny_tokenizer()
    narrow = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=11, **narrow, **ends)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **narrow)
    with seeded(21):
        model = CLIPModel(
            CLIPConfig(
                text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_scores_are_cosines(clip_folder: Path) -> None:
    """Against CLIPModel's own similarity."""
    clip, prompts = Clip(str(clip_folder)), pictures(2)
    columns = [Settings(prompt=text, scale=scale) for text in ("", "a cat") for scale in SCALES]
    made = [pictures(2, seed=10 + number) for number in range(4)]
    scores = similarities(clip, prompts, columns, made)
    tokens = clip.tokenizer(["a cat"], padding="max_length", max_length=11, return_tensors="pt")

    def said(results: Sequence[Image.Image]) -> float:
        out = clip.model(**tokens, pixel_values=preprocess(clip.processor, results))
        return (out.logits_per_image / clip.model.logit_scale.exp()).mean().item()

    def alike(results: Sequence[Image.Image]) -> float:
        ours, theirs = (
            clip.model.get_image_features(preprocess(clip.processor, p)).pooler_output
            for p in (results, prompts)
        )
        return nn.functional.cosine_similarity(ours, theirs).mean().item()

    each = [alike(results) for results in made]
    assert scores == pytest.approx(
        {
            "clip_i": np.mean(each),
            "clip_i at scale 0.5": (each[0] + each[2]) / 2,
            "clip_i at scale 1": (each[1] + each[3]) / 2,
            "clip_t": (said(made[2]) + said(made[3])) / 2,
            "clip_t at scale 0.5": said(made[2]),
            "clip_t at scale 1": said(made[3]),
        },
        abs=1e-5,
    )
    assert similarities(clip, prompts, columns[:1], [prompts]) == {"clip_i": pytest.approx(1)}
    assert clip.texts(["cat " * 50]).shape == (1, 12)  # too long a text is cut


def test_a_clip_measures_in_a_run(clip_folder: Path, tmp_path: Path) -> None:
    _, scores = (
        Outfit().validator(recipe(tmp_path, clip=str(clip_folder), texts=("", "cat"))).grid(1)
    )
    assert set(scores) == {"clip_i", "clip_t"}


def test_what_is_no_whole_clip_is_one_line(clip_folder: Path, tmp_path: Path) -> None:
    tiny_encoder().model.save_pretrained(tmp_path / "vision")
    (tmp_path / "dumb").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "dumb" / file).write_bytes((clip_folder / file).read_bytes())
    for folder, words in (
        ("vision", "not a whole CLIP"),
        ("dumb", "the tokenizer missing"),
        ("absent/", "no CLIP can be loaded"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            Clip(str(tmp_path / folder))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scales": (20,)}, "scale = 20"),
        ({"steps": 2000}, "steps = 2000"),
        ({"images": ("absent.png",)}, r"absent\.png does not exist"),
        ({"size": 17}, "width = 17"),
    ],
)
def test_wrong_plans_are_reported_before_training(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ImpromptError, match=words):
        Outfit().validator(recipe(tmp_path, **change))


def test_without_any_image_prompt_there_is_one_line(tmp_path: Path) -> None:
    outfit = Outfit()
    with pytest.raises(SettingError, match=r"validation\.images, or set data\.held_out"):
        Validator(
            recipe(tmp_path), outfit.pipeline, outfit.encoder, find_variant("base"), outfit.adapter
        )


def test_a_grid_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    validator = Outfit().validator(recipe(tmp_path))
    (tmp_path / "validation" / "step-0000001.png").mkdir(parents=True)
    with pytest.raises(ImageError, match="cannot write"):
        validator.grid(1)


@pytest.mark.parametrize(
    ("size", "shown"),
    [((64, 64), 128), ((100, 100), 200), ((128, 128), 128), ((512, 512), 512), ((1024, 1024), 512)],
)
def test_cells_are_whole_multiples_or_smaller(size: tuple[int, int], shown: int) -> None:
    assert cell_size(size) == (shown, shown)
    assert min(CELL) <= shown <= max(CELL)


@given(text=st.text(max_size=300), width=st.integers(20, 400))
def test_headers_stay_within_their_columns(text: str, width: int) -> None:
    from PIL import ImageFont

    font: Any = ImageFont.load_default(12)
    lines = wrapped(text, width, font)
    assert 1 <= len(lines) <= 3
    assert all(font.getlength(line) <= width for line in lines)
    if not any("…" in line for line in lines):
        assert " ".join(lines).split() == text.split()


def test_modules_are_elsewhere_for_a_while_and_then_their_own_again() -> None:
    first, second = nn.Linear(3, 3), nn.BatchNorm1d(3)
    second.weight = first.bias  # shared by both
    before = [
        (t, t.data_ptr(), t.dtype)
        for module in (first, second)
        for t in (*module.parameters(), *module.buffers())
    ]
    with on_device([first, second], CPU, torch.bfloat16), evaluating([first]):
        assert first.weight.dtype == second.running_mean.dtype == torch.bfloat16
        assert second.num_batches_tracked.dtype == torch.int64
        assert (first.training, second.training) == (False, True)
    assert first.training
    assert [(t, t.data_ptr(), t.dtype) for t, *_ in before] == before


def test_a_zero_terminal_snr_is_sampled_from_its_end() -> None:
    own = DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    rescaled = sampling_scheduler(own, zero_terminal_snr=True)
    rescaled.set_timesteps(4)
    assert rescaled.timesteps[0] == 999
    assert rescaled.alphas_cumprod[-1] < 1e-6 < own.alphas_cumprod[-1]
    assert dict(sampling_scheduler(own, zero_terminal_snr=False).config) == dict(own.config)
    assert sampling_scheduler(own, zero_terminal_snr=False) is not own


@given(count=st.integers(1, 60), draws=st.integers(1, 6), first=st.integers(0, 100))
def test_places_cover_the_schedule_evenly(count: int, draws: int, first: int) -> None:
    u = schedule_places(torch.arange(first, first + count), draws)
    assert u.shape == (count, draws)
    # every sample in every part once
    assert torch.equal((u * draws).long(), torch.arange(draws).expand(count, -1))
    within = torch.cat([(u[:, 0] * draws) % 1, torch.tensor([0.0, 1.0])]).sort().values
    assert within.diff().max() < 2 / count + 1e-9 or count == 1  # and no part of a part is left out
    # whatever others there are
    assert torch.equal(schedule_places(torch.arange(first, first + count)[:1], draws), u[:1])


@given(samples=st.integers(1, 30), batch=st.integers(1, 8), processes=st.integers(1, 3))
def test_the_held_out_loss_does_not_depend_on_the_batches(
    samples: int, batch: int, processes: int
) -> None:
    """A mean over samples and places, alone or over processes.

    Samples that cannot be read (every seventh) count for nothing.
    """

    def losses(numbers: Tensor, u: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return ((numbers + 1) * u**2).float()[numbers % 7 > 0]

    def batches(process: int) -> list[tuple[Tensor, Tensor]]:
        return [(part, part) for part in torch.arange(samples)[process::processes].split(batch)]

    sums: list[Tensor] = []
    for process in range(processes):
        held_out_loss(batches(process), losses, 3, lambda mine: sums.append(mine) or mine)
    got = held_out_loss([], losses, 3, lambda _: torch.stack(sums).sum(0))
    numbers = torch.arange(samples)
    expected = (
        ((numbers[:, None] + 1) * schedule_places(numbers, 3) ** 2)[numbers % 7 > 0].mean().item()
    )
    assert got == pytest.approx(expected, rel=1e-6) or (math.isnan(got) and samples == 1)
