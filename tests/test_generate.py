"""The façade, on the packaged model: what a picture depends on, and what the other tasks do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image, ImageDraw
from transformers import CLIPVisionModelWithProjection

from imprompt.encoders.matching import check_encoder
from imprompt.errors import MismatchError, SettingError
from imprompt.generation.pipeline import ImagePromptPipeline
from imprompt.generation.request import Request, read_request, save_results
from imprompt.images import open_image
from imprompt.models import PACKAGED, load_weights, weights_variant

STEPS = 3


def picture(background: str, shape: str = "red") -> Image.Image:
    image = Image.new("RGB", (128, 128), background)
    ImageDraw.Draw(image).ellipse((32, 32, 96, 96), fill=shape)
    return image


BLUE, YELLOW = picture("blue"), picture("yellow", "green")


@pytest.fixture(scope="module")
def pipe() -> ImagePromptPipeline:
    return ImagePromptPipeline.from_pretrained("emoji", device="cpu")


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(values(a) - values(b)).max())


def test_each_picture_of_a_list_prompts_its_own_result(pipe: ImagePromptPipeline) -> None:
    both = pipe([BLUE, YELLOW], seed=3, steps=STEPS).images
    alone = [pipe(BLUE, seed=3, steps=STEPS).images[0], pipe(YELLOW, seed=4, steps=STEPS).images[0]]
    assert len(both) == 2
    assert all(difference(a, b) <= 1 for a, b in zip(both, alone, strict=True))
    assert difference(*both) > 20


def test_a_picture_depends_on_seed_and_number_alone(pipe: ImagePromptPipeline) -> None:
    whole = pipe(BLUE, num_images=5, seed=11, steps=STEPS, batch_size=5)
    parts = pipe(BLUE, num_images=5, seed=11, steps=STEPS, batch_size=2)
    last = pipe(BLUE, seed=15, steps=STEPS)
    assert whole.seeds == parts.seeds == [11, 12, 13, 14, 15]
    assert all(difference(a, b) <= 1 for a, b in zip(whole.images, parts.images, strict=True))
    assert difference(whole.images[4], last.images[0]) <= 1
    assert difference(whole.images[0], whole.images[1]) > 5


def test_one_picture_of_a_call_again_bit_for_bit(pipe: ImagePromptPipeline) -> None:
    whole = pipe([BLUE, YELLOW], num_images=3, seed=5, steps=STEPS, batch_size=4)
    for index in (0, 3, 5):
        again = pipe([BLUE, YELLOW], num_images=3, seed=5, steps=STEPS, batch_size=4, only=index)
        assert again.seeds == [5 + index]
        assert difference(whole.images[index], again.images[0]) == 0


def test_each_picture_of_a_list_has_its_own_text(pipe: ImagePromptPipeline) -> None:
    texts = ["a panda on blue", "a rocket"]
    options: dict[str, Any] = {
        "steps": STEPS,
        "scale": 0.5,
        "num_images": 2,
        "negative_prompt": "red",
    }
    both = pipe([BLUE, YELLOW], texts, seed=3, **options)
    alone = [
        *pipe(BLUE, texts[0], seed=3, **options).images,
        *pipe(YELLOW, texts[1], seed=5, **options).images,
    ]
    assert both.seeds == [3, 4, 5, 6]
    assert both.settings.prompt == tuple(texts)
    assert all(difference(a, b) <= 1 for a, b in zip(both.images, alone, strict=True))
    other = pipe([BLUE, YELLOW], texts[::-1], seed=3, **options).images
    assert min(difference(a, b) for a, b in zip(both.images, other, strict=True)) > 5
    again = pipe([BLUE, YELLOW], texts, seed=3, only=2, **options)
    assert difference(again.images[0], both.images[2]) == 0


def test_own_texts_beside_a_first_picture_and_in_a_request(
    pipe: ImagePromptPipeline, tmp_path: Path
) -> None:
    texts = ["a panda", "a rocket"]
    both = pipe([BLUE, YELLOW], texts, init_image=BLUE, seed=3, steps=STEPS).images
    alone = pipe(YELLOW, texts[1], init_image=BLUE, seed=4, steps=STEPS).images[0]
    assert difference(both[1], alone) <= 1
    for name, image in (("blue", BLUE), ("yellow", YELLOW)):
        image.save(tmp_path / f"{name}.png")
    settings = {"prompt": texts, "seed": 3, "steps": STEPS}
    request = Request.model_validate(
        {"images": [tmp_path / "blue.png", tmp_path / "yellow.png"], "settings": settings}
    )
    made = save_results(request.run(pipe), request, tmp_path / "out")
    assert read_request(made[1]).settings.prompt == tuple(texts)
    assert difference(open_image(made[1]), read_request(made[1]).run(pipe).images[0]) == 0


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a"], "1 texts for 2 image prompts: give one for all, or one for each"),
        (["a", 3], "prompt = .*: input should be a valid"),
    ],
)
def test_texts_that_do_not_fit(pipe: ImagePromptPipeline, texts: list[Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        pipe([BLUE, YELLOW], texts, steps=STEPS)


def test_pictures_together_prompt_one_result(pipe: ImagePromptPipeline) -> None:
    together = pipe([BLUE, YELLOW], together=True, num_images=2, seed=1, steps=STEPS)
    assert len(together.images) == 2
    twice = pipe([BLUE, BLUE], together=True, seed=1, steps=STEPS)
    once = pipe(BLUE, seed=1, steps=STEPS)
    # the same tokens twice weigh the same in a softmax
    assert difference(twice.images[0], once.images[0]) <= 1
    assert difference(together.images[0], once.images[0]) > 5


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_scale_zero_is_the_base_model(pipe: ImagePromptPipeline, guidance: float) -> None:
    ours = pipe(BLUE, "a panda", scale=0, seed=2, steps=STEPS, guidance=guidance).images[0]
    base = pipe.pipeline(
        "a panda",
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(2)],
    ).images[0]
    assert difference(ours, base) == 0


def test_image_to_image_and_inpainting(pipe: ImagePromptPipeline) -> None:
    start = picture("white", "black")
    weak, strong = (
        pipe(BLUE, init_image=start, strength=s, seed=1, steps=10).images[0] for s in (0.2, 1.0)
    )
    assert (
        np.abs(values(weak) - values(start)).mean() < np.abs(values(strong) - values(start)).mean()
    )
    mask = Image.new("L", (128, 128))
    mask.paste(255, (64, 0, 128, 128))
    painted = pipe(BLUE, init_image=start, mask_image=mask, strength=1.0, seed=1, steps=10).images[
        0
    ]
    assert np.array_equal(values(painted)[:, :64], values(start)[:, :64])
    assert np.abs(values(painted)[:, 80:] - values(start)[:, 80:]).mean() > 10


def test_sizes(pipe: ImagePromptPipeline) -> None:
    assert pipe(BLUE, width=96, height=48, seed=0, steps=1).images[0].size == (96, 48)
    wide = pipe(BLUE, init_image=Image.new("RGB", (400, 100)), seed=0, steps=2).images[0]
    assert wide.size == (256, 64)  # the native area in the first picture's shape
    with pytest.raises(SettingError, match=r"width = 66: .* multiples of 8, such as 64 or 72"):
        pipe(BLUE, width=66)


def test_any_diffusers_pipeline_in_three_lines(pipe: ImagePromptPipeline) -> None:
    from diffusers import StableDiffusionPipeline

    from imprompt.checkpoints.adapters import load_adapter

    ours = pipe(BLUE, "a rocket", scale=0.5, seed=8, steps=STEPS).images[0]
    plain = StableDiffusionPipeline.from_pretrained(PACKAGED / "emoji")
    plain.set_progress_bar_config(disable=True)
    file = PACKAGED / "emoji" / "adapters" / "base.safetensors"
    adapter = load_adapter(file, plain.unet).attach(plain.unet)
    encoder = pipe.first.reader.encoder
    tokens, null = (
        adapter.tokens(f)
        for f in (
            encoder.features([BLUE], "pooled"),
            encoder.null_features(pipe.first.reader.variant),
        )
    )
    with torch.no_grad():
        made = plain(
            "a rocket",
            num_inference_steps=STEPS,
            guidance_scale=pipe.model.guidance,
            generator=[torch.Generator().manual_seed(8)],
            cross_attention_kwargs={"ip_hidden_states": adapter.prompt(tokens, null, scale=0.5)},
        ).images[0]
    assert difference(ours, made) == 0


def test_diffusers_own_loader_gives_the_same_picture(
    pipe: ImagePromptPipeline, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    from imprompt.checkpoints.adapters import read_adapter, write_adapter

    write_adapter(
        tmp_path / "ip.safetensors",
        read_adapter(PACKAGED / "emoji" / "adapters" / "base.safetensors"),
        "diffusers",
    )
    theirs = StableDiffusionPipeline.from_pretrained(PACKAGED / "emoji")
    theirs.set_progress_bar_config(disable=True)
    theirs.load_ip_adapter(
        str(tmp_path),
        subfolder="",
        weight_name="ip.safetensors",
        image_encoder_folder=None,
        low_cpu_mem_usage=False,
    )
    theirs.set_ip_adapter_scale(0.7)
    made = theirs(
        "a panda",
        ip_adapter_image=BLUE,
        num_inference_steps=STEPS,
        guidance_scale=pipe.model.guidance,
        generator=[torch.Generator().manual_seed(4)],
    ).images[0]
    assert difference(pipe(BLUE, "a panda", scale=0.7, seed=4, steps=STEPS).images[0], made) <= 1


def test_weights_of_a_variant_are_found_by_themselves(
    pipe: ImagePromptPipeline, tmp_path: Path
) -> None:
    """A folder with *.fp16.safetensors alone, as many are: here the weights are the plain ones'."""
    world, edges = PACKAGED / "emoji", PACKAGED / "emoji" / "controlnets" / "edges"
    model, encoder, control = (tmp_path / name for name in ("model", "encoder", "control"))
    pipe.pipeline.save_pretrained(model, variant="fp16")
    CLIPVisionModelWithProjection.from_pretrained(world / "image_encoder").save_pretrained(
        encoder, variant="fp16"
    )
    ControlNetModel.from_pretrained(edges).save_pretrained(control, variant="fp16")
    weights = [path.name for path in tmp_path.rglob("*.safetensors")]
    assert len(weights) >= 5
    assert all(".fp16." in name for name in weights)
    assert [weights_variant(folder) for folder in (encoder, control, world / "unet")] == [
        "fp16",
        "fp16",
        None,
    ]
    own = {"adapter": world / "adapters" / "base.safetensors", "device": "cpu"}
    other = ImagePromptPipeline.from_pretrained(
        str(model), encoder=encoder, controlnet=control, **own
    )
    settings: dict[str, Any] = {"seed": 1, "steps": 2, "guidance": 3.0}
    assert difference(*(one(BLUE, **settings).images[0] for one in (pipe, other))) == 0
    with pytest.raises(SettingError, match=r"the adapter's variant here, such as faceid; .*fp16"):
        ImagePromptPipeline.from_pretrained(str(model), encoder=encoder, variant="fp16", **own)


@pytest.mark.parametrize("missing", ["", "it does not appear to have a file named model"])
def test_weights_of_the_hub_are_tried_as_fp16(missing: str) -> None:
    tried = []

    def load(variant: str | None) -> str:
        tried.append(variant)
        if variant is None:
            raise OSError(missing or "no network")
        return "loaded"

    if missing:
        assert load_weights("owner/model", load) == "loaded"
        assert tried == [None, "fp16"]
    else:
        with pytest.raises(OSError, match="no network"):
            load_weights("owner/model", load)
        assert tried == [None]


def test_progress_is_reported(pipe: ImagePromptPipeline) -> None:
    told: list[tuple[int, int]] = []
    pipe(
        BLUE,
        num_images=3,
        batch_size=2,
        seed=0,
        steps=STEPS,
        on_step=lambda done, total: told.append((done, total)),
    )
    assert told == [(i, 2 * STEPS) for i in range(1, 2 * STEPS + 1)]


def test_a_png_repeats_its_picture(pipe: ImagePromptPipeline, tmp_path: Path) -> None:
    prompts = [tmp_path / "blue.png", tmp_path / "yellow.png"]
    for image, path in zip((BLUE, YELLOW), prompts, strict=True):
        image.save(path)
    request = Request(
        images=prompts, settings={"num_images": 2, "steps": STEPS, "prompt": "a “heart” ♥"}
    )
    result = request.run(pipe)
    paths = save_results(result, request, tmp_path / "out")
    names = ("blue", "blue", "yellow", "yellow")  # each of its own image prompt
    assert [p.name for p in paths] == [
        *(f"{name}-{seed}.png" for name, seed in zip(names, result.seeds, strict=True)),
        f"blue-{result.seeds[0]}-grid.png",
    ]
    for path in paths[:-1]:
        again = read_request(path).run(pipe)
        assert len(again.images) == 1
        assert difference(open_image(path), again.images[0]) == 0
    assert save_results(result, request, tmp_path / "out")[0] not in paths  # nothing is overwritten


def test_the_encoder_is_checked(pipe: ImagePromptPipeline) -> None:
    from imprompt.checkpoints.adapters import read_adapter

    file = read_adapter(PACKAGED / "emoji" / "adapters" / "base.safetensors")
    check_encoder(pipe.first.reader.encoder, file)
    weight = pipe.first.reader.encoder.model.visual_projection.weight
    before = weight.data.clone()
    try:
        weight.data += 1
        with pytest.raises(MismatchError, match="other weights of the image encoder"):
            check_encoder(pipe.first.reader.encoder, file)
    finally:
        weight.data.copy_(before)


@pytest.mark.parametrize("name", ["base", "plus"])
def test_the_shipped_adapters_follow_the_picture(name: str) -> None:
    """Meaning, not structure: the result's background is the image prompt's, and not another's."""
    pipe = ImagePromptPipeline.from_pretrained("emoji", adapter=name, device="cpu")
    made = pipe([BLUE, YELLOW], num_images=2, seed=21, steps=12).images
    rim = [values(image)[:4].mean((0, 1)) for image in made]
    blue, yellow = np.array((0, 0, 255)), np.array((255, 255, 0))
    for colour, own, other in (
        (rim[0], blue, yellow),
        (rim[1], blue, yellow),
        (rim[2], yellow, blue),
        (rim[3], yellow, blue),
    ):
        assert np.abs(colour - own).mean() < 0.5 * np.abs(colour - other).mean()


def test_sdxl_in_every_task(tmp_path: Path) -> None:
    """A tiny model of SDXL's structure from a folder, with a plus adapter from a file."""
    from tiny import tiny_adapter, tiny_encoder
    from tiny_pipelines import tiny_pipeline

    from imprompt.checkpoints.adapters import Origin, save_adapter
    from imprompt.variants import find_variant

    model, encoder = tiny_pipeline("sdxl"), tiny_encoder()
    model.save_pretrained(tmp_path)
    encoder.model.save_pretrained(tmp_path / "image_encoder")
    layers = list(tiny_adapter(model.unet, "plus").family.layers(model.unet))
    save_adapter(
        tmp_path / "plus.safetensors",
        tiny_adapter(model.unet, "plus"),
        find_variant("plus"),
        layers,
        Origin(base="tiny"),
    )
    pipe = ImagePromptPipeline.from_pretrained(
        str(tmp_path), adapter=tmp_path / "plus.safetensors", device="cpu"
    )
    options: dict[str, Any] = {"seed": 1, "steps": 2, "guidance": 5.0, "width": 64, "height": 64}
    alone = pipe(BLUE, "a panda", **options).images[0]
    assert difference(alone, pipe(YELLOW, "a panda", **options).images[0]) > 0
    start, mask = Image.new("RGB", alone.size, "white"), Image.new("L", alone.size, 255)
    for extra in ({"init_image": start}, {"init_image": start, "mask_image": mask}):
        made = pipe(BLUE, **options, **extra, strength=1.0).images[0]
        assert made.size == alone.size
        assert np.isfinite(values(made)).all()


def test_half_precision_projects_in_float32() -> None:
    """A resampler's values leave float16's range; keys and values are as the base model's."""
    half = ImagePromptPipeline.from_pretrained(
        "emoji", adapter="plus", device="cpu", dtype=torch.bfloat16
    )
    assert {weight.dtype for weight in half.first.adapter.projection.parameters()} == {
        torch.float32
    }
    assert {weight.dtype for weight in half.first.adapter.image_kv.parameters()} == {torch.bfloat16}
    whole = ImagePromptPipeline.from_pretrained("emoji", adapter="plus", device="cpu")
    ours, theirs = (values(pipe(BLUE, seed=1, steps=STEPS).images[0]) for pipe in (half, whole))
    assert np.abs(ours - theirs).mean() < 6
