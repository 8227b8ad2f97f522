"""Image prompts as a user composes them: regions, several references and adapters, request files,
image guidance.
"""

import json
import threading
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor

from imprompt.adapter import IPAdapter
from imprompt.checkpoints.adapters import save_adapter
from imprompt.encoders.embedding_files import Embedding, save_embedding
from imprompt.encoders.face import Face, FaceFeatures
from imprompt.encoders.noise import Noise
from imprompt.errors import ImpromptError, MismatchError, SettingError
from imprompt.families.base import family_of
from imprompt.generation.features import Reader
from imprompt.generation.pipeline import ImagePromptPipeline, images_made
from imprompt.generation.prepare import Attached
from imprompt.generation.references import AdapterChoice, Reference
from imprompt.generation.request import Request, read_request, save_results
from imprompt.generation.settings import Settings
from imprompt.projections.mlp import FaceProjection
from imprompt.variants import find_variant
from tests.tiny import (
    freeze,
    noise,
    noise_inputs,
    pictures,
    random_prompt,
    seeded,
    tiny_adapter,
    tiny_encoder,
    tiny_unet,
)
from tests.tiny_pipelines import PIPELINES
from tests.ways import as_pipeline

BLUE, YELLOW, RED = (
    Image.new("RGB", (64, 64), colour) for colour in ((30, 60, 220), (240, 200, 0), (220, 20, 20))
)
QUICK: dict[str, Any] = {"steps": 6, "seed": 3}


def side(left: bool) -> Image.Image:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64) if left else (32, 0, 64, 64))
    return mask


LEFT, RIGHT = side(True), side(False)


@pytest.fixture(scope="module")
def pipe() -> ImagePromptPipeline:
    return ImagePromptPipeline.from_pretrained(
        "emoji", adapter=["base", AdapterChoice(adapter="plus", name="fine")], device="cpu"
    )


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(abs(pixels(one) - pixels(other)).max())


def colour(picture: Image.Image, left: bool) -> np.ndarray:
    """The median colour of the outer third of a half."""
    return np.median(pixels(picture)[:, :20] if left else pixels(picture)[:, -20:], axis=(0, 1))


def test_two_prompts_in_two_regions(pipe: ImagePromptPipeline) -> None:
    item = [Reference(images=BLUE, mask=LEFT), Reference(images=YELLOW, mask=RIGHT)]
    made = pipe(item, together=True, seed=1).images[0]
    # the world's own blue and yellow are not quite these
    assert np.abs(colour(made, True) - (30, 60, 220)).max() < 60
    assert np.abs(colour(made, False) - (240, 200, 0)).max() < 60
    # a list in the list is heard together too
    assert difference(made, pipe([item], seed=1).images[0]) == 0


def test_every_item_is_as_if_it_were_alone(pipe: ImagePromptPipeline) -> None:
    """Other images, scales, masks, windows, adapters and combinations beside each other in one
    forward pass.
    """
    items = [
        [
            Reference(images=BLUE, mask=LEFT),
            Reference(images=YELLOW, mask=RIGHT, scale=0.7, adapter="fine"),
        ],
        Reference(images=RED, start=0, end=0.5, easing="ease out"),
        Reference(images=[BLUE, RED], weights=[1, 2], negative=YELLOW),
        [
            Reference(
                images=[BLUE, YELLOW], combine="average", blocks={"up_blocks": 1, "mid_block": 0.5}
            ),
            YELLOW,
        ],
        BLUE,
    ]
    together = pipe(items, batch_size=len(items), **QUICK).images
    for number, item in enumerate(items):
        alone = pipe([item], **QUICK | {"seed": QUICK["seed"] + number}).images[0]
        assert difference(together[number], alone) <= 1, number
    assert min(difference(a, b) for i, a in enumerate(together) for b in together[:i]) > 5


def test_neighbours_in_a_batch_do_not_matter_at_all(pipe: ImagePromptPipeline) -> None:
    """Bit for bit, while the batch has the same size and asks the same kinds of prompt."""
    mine = Reference(images=RED, mask=LEFT, scale=0.8, start=0.2)
    others = [Reference(images=picture, mask=RIGHT, end=0.6) for picture in (BLUE, YELLOW)]
    first, second = (pipe([mine, other], **QUICK).images[0] for other in others)
    assert difference(first, second) == 0


def test_what_a_reference_does_not_say_is_the_plain_prompt(pipe: ImagePromptPipeline) -> None:
    plain = pipe(BLUE, scale=0.6, **QUICK).images[0]
    for same in (
        Reference(images=BLUE),
        Reference(images=BLUE, mask=Image.new("L", (40, 70), 255)),
        Reference(images=[BLUE, RED], weights=[1, 0]),
        Reference(images=BLUE, combine="norm-average", blocks={"*": 1}, boost=1),
        Reference(images=BLUE, scale=0.6, easing=((0, 1), (1, 1))),
    ):
        assert difference(pipe(same, scale=0.6, **QUICK).images[0], plain) <= 1, same


@pytest.mark.parametrize(
    "said",
    [
        {"scale": 0.3},
        {"blocks": {"down_blocks": 1}},
        {"end": 0.3},
        {"easing": "ease out"},
        {"negative": YELLOW},
        {"negative": Noise(kind="shuffle")},
        {"embeds_scaling": "K+mean(V) w/ C penalty"},
        {"crop": "left"},
        {"crop": "tiles"},
        {"crop": "pad"},
        {"sharpening": 1.0},
        {"ignore": LEFT.resize((96, 48))},
        {"mask": LEFT},
        {"adapter": "fine"},
    ],
    ids=lambda said: next(iter(said)),
)
def test_everything_that_can_be_said_is_applied(
    pipe: ImagePromptPipeline, said: dict[str, Any]
) -> None:
    picture = Image.new("RGB", (96, 48), (200, 40, 90))
    picture.paste((20, 160, 60), (0, 0, 40, 48))
    picture.paste((250, 240, 230), (60, 10, 70, 40))
    plain, other = (pipe(Reference(images=picture, **own), **QUICK).images[0] for own in ({}, said))
    assert difference(plain, other) > 3
    assert difference(other, pipe(Reference(images=picture, **said), **QUICK).images[0]) == 0


def test_overlapping_regions(pipe: ImagePromptPipeline) -> None:
    twice = [Reference(images=BLUE, mask=LEFT)] * 2
    once = pipe(Reference(images=BLUE, mask=LEFT), **QUICK).images[0]
    assert difference(pipe([twice], overlap="normalise", **QUICK).images[0], once) <= 1
    assert difference(pipe([twice], overlap="add", **QUICK).images[0], once) > 5


def test_features_of_a_file_are_as_the_picture(pipe: ImagePromptPipeline, tmp_path: Path) -> None:
    file = tmp_path / "blue.safetensors"
    by = pipe.first.reader
    save_embedding(
        file,
        Embedding(
            by.encoder.features([BLUE, RED], "pooled"),
            "pooled",
            by.encoder.source,
            by.encoder.fingerprint(),
        ),
    )
    saved = pipe(Reference(images=file, weights=[2, 1]), **QUICK).images[0]
    assert (
        difference(saved, pipe(Reference(images=[BLUE, RED], weights=[2, 1]), **QUICK).images[0])
        == 0
    )
    with pytest.raises(MismatchError, match="this adapter reads penultimate"):
        pipe(Reference(images=file, adapter="fine"), **QUICK)


@pytest.mark.parametrize(
    ("item", "settings", "says"),
    [
        (
            Reference(images=BLUE, adapter="plus"),
            {},
            "no adapter 'plus' is attached; there are 'base', 'fine'",
        ),
        (
            Reference(images=BLUE, blocks="styel transfer"),
            {},
            "unknown blocks 'styel transfer'; near: style transfer",
        ),
        (
            Reference(images=BLUE, blocks="composition"),
            {},
            "known for SD 1.x and SDXL only; for this model give a map",
        ),
        ([BLUE, []], {}, "no image prompt was given"),
        (Reference(images=BLUE, mask=Image.new("L", (8, 8))), {}, "a mask that is 0 everywhere"),
        (
            Reference(images=BLUE, ignore=Image.new("L", (8, 64))),
            {},
            "does not fit a picture of 64×64",
        ),
        ({"images": [], "mask": None}, {}, "images = []: name at least one picture"),
        ({"images": BLUE, "colour": 3}, {}, "unknown setting 'colour'; known: "),
        (
            BLUE,
            {"pipeline_options": {"guidance_scale": 2}},
            "pipeline_options['guidance_scale']: give it as guidance",
        ),
        (
            BLUE,
            {"pipeline_options": {"return_dict": False}},
            "pipeline_options['return_dict']: a call always returns a Result: leave it out",
        ),
        (
            BLUE,
            {"pipeline_options": {"ip_adapter_image": BLUE}},
            "pipeline_options['ip_adapter_image']: the call's first argument takes image prompts",
        ),
        (
            BLUE,
            {"pipeline_options": {"callback_on_step_end_tensor_inputs": ["latents"]}},
            "on_step is told of steps, not of tensors: leave it out",
        ),
        (
            BLUE,
            {"init_image": BLUE, "pipeline_options": {"image": BLUE}},
            "pipeline_options['image']: the call gives it already, by init_image",
        ),
        (
            BLUE,
            {"init_image": BLUE, "mask_image": LEFT, "pipeline_options": {"output_type": "np"}},
            "pipeline_options['output_type']: with mask_image only 'pil' can be made",
        ),
        (
            BLUE,
            {"pipeline_options": {"output_type": "numpy"}},
            "pipeline_options['output_type']: unknown; known: pil, np, pt, latent",
        ),
        (
            BLUE,
            {"pipeline_options": {"prompt_embeds": torch.zeros(3, 8, 192)}},
            "pipeline_options['prompt_embeds']: give a tensor of one row for all, or of 1",
        ),
        (
            BLUE,
            {"prompt": "a cat", "pipeline_options": {"prompt_embeds": torch.zeros(1, 8, 192)}},
            "pipeline_options['prompt_embeds']: give it or prompt, not both",
        ),
        (
            BLUE,
            {"pipeline_options": {"sigmas": [14.0, 3.0, 0.5]}},
            "a StableDiffusionPipeline refuses this call: The current scheduler class",
        ),
        (
            BLUE,
            {"num_images": 3, "pipeline_options": {"latents": torch.zeros(2, 4, 16, 16)}},
            "pipeline_options['latents']: give a tensor of one row for all, or of 3: one for each",
        ),
        (
            BLUE,
            {"pipeline_options": {"clip_skip": 99}},
            "a StableDiffusionPipeline refuses this call: tuple index out of range",
        ),
        (BLUE, {"num_inference_steps": 3}, "'num_inference_steps': give it as steps"),
        (BLUE, {"generator": None}, "'generator': give it as seed, a whole number"),
        (BLUE, {"num_images_per_prompt": 2}, "'num_images_per_prompt': give it as num_images"),
        (BLUE, {"guidance_scale": 2}, "unknown setting 'guidance_scale': give it as guidance"),
        (
            BLUE,
            {"image_guidance": 2, "guidance": 3, "pipeline_options": {"guidance_rescale": 0.5}},
            "do not go together",
        ),
        (BLUE, {"batch_size": 1.5}, "batch_size = 1.5"),
        (BLUE, {"cls": 1}, "unknown setting 'cls'"),
        (
            BLUE,
            {"image_guidance": 2, "guidance": 1},
            "image_guidance needs the text's guidance, which is off at 1.0",
        ),
        ([], {}, "no image prompt was given"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_wrong_use_is_one_line(
    pipe: ImagePromptPipeline, item: Any, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ImpromptError) as caught:
        pipe(item if isinstance(item, list) else [item], **QUICK | settings)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_encoded_texts_replace_words(pipe: ImagePromptPipeline) -> None:
    words = ["a rocket", "a cat"]
    encoded = [pipe.pipeline.encode_prompt(text, "cpu", 1, True) for text in (*words, "a")]
    texts, negatives = (torch.cat(part) for part in zip(*encoded, strict=True))
    settings: dict[str, Any] = QUICK | {"num_images": 2}
    one = pipe(BLUE, "a rocket", **settings).images
    given = {"prompt_embeds": texts[:1], "negative_prompt_embeds": negatives[:1]}
    for embeds in (given, {"prompt_embeds": texts[:1]}):
        for plain, same in zip(
            one, pipe(BLUE, pipeline_options=embeds, **settings).images, strict=True
        ):
            assert difference(plain, same) == 0
    each = pipe([BLUE, RED], words, negative_prompt="a", batch_size=3, **settings).images
    given = {"prompt_embeds": texts[:2], "negative_prompt_embeds": texts[2:]}
    for embeds, more in ((given, {}), ({"prompt_embeds": texts[:2]}, {"negative_prompt": "a"})):
        same = pipe([BLUE, RED], batch_size=3, pipeline_options=embeds, **settings, **more).images
        for number, plain in enumerate(each):
            assert difference(plain, same[number]) <= 1, number
    assert difference(each[0], each[2]) > 5


def test_first_latents_are_those_of_each_picture(pipe: ImagePromptPipeline) -> None:
    """In any batch, and they are what diffusers' own pipeline starts from."""
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = QUICK | {"num_images": 3, "scale": 0.0, "guidance": 3.0}
    own = pipe.pipeline(
        "a cat", num_inference_steps=6, guidance_scale=3.0, num_images_per_prompt=3, latents=latents
    ).images
    for batch in (3, 2, 1):
        made = pipe(
            BLUE, "a cat", batch_size=batch, pipeline_options={"latents": latents}, **settings
        )
        for picture, wanted in zip(made.images, own, strict=True):
            assert difference(picture, wanted) <= 1
    options = {"latents": latents}
    (last,) = pipe(BLUE, "a cat", batch_size=2, only=2, pipeline_options=options, **settings).images
    assert difference(last, own[2]) <= 1
    one, other, _ = pipe(
        BLUE, "a cat", batch_size=2, pipeline_options={"latents": latents[:1]}, **settings
    ).images
    assert difference(one, own[0]) <= 1
    assert difference(one, other) <= 1


def test_clip_skip_is_diffusers_own(pipe: ImagePromptPipeline) -> None:
    """Layers of the text encoder are left out for the text alone; its last norm stays."""
    encoder = pipe.pipeline.text_encoder
    names = list(encoder.state_dict())
    made = {
        skip: pipe(BLUE, "a cat", scale=0.0, pipeline_options={"clip_skip": skip}, **QUICK).images
        for skip in (None, 0, 1)
    }
    tokens = pipe.pipeline.tokenizer(
        "a cat", padding="max_length", max_length=24, return_tensors="pt"
    )
    with torch.no_grad():
        states = encoder(tokens.input_ids, output_hidden_states=True).hidden_states
        text = encoder.final_layer_norm(states[-2])
    encoded = pipe(BLUE, scale=0.0, pipeline_options={"prompt_embeds": text}, **QUICK).images
    assert difference(made[1][0], encoded[0]) == 0
    assert difference(made[0][0], made[None][0]) == 0
    assert difference(made[1][0], made[None][0]) > 2
    assert list(encoder.state_dict()) == names


@pytest.mark.parametrize("kind", ["np", "pt", "latent"])
def test_other_outputs_than_pictures(pipe: ImagePromptPipeline, kind: str) -> None:
    (made,) = pipe(BLUE, pipeline_options={"output_type": kind}, **QUICK).images
    shapes = {"np": (128, 128, 3), "pt": (3, 128, 128), "latent": (4, 16, 16)}
    assert tuple(made.shape) == shapes[kind]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"weights": [1]}, "1 weights for 2 pictures: give one for each"),
        ({"crop": "centre"}, "near: center"),
        ({"negative": {"kind": "disolve"}}, "near: dissolve"),
        ({"scale": 99}, "scale = 99"),
        ({"easing": "slow"}, "easing = 'slow': unknown; known: constant"),
        ({"start": 0.5, "end": 0.5}, "give 0 <= start < end <= 1"),
        ({"combine": "mix"}, "combine = 'mix': unknown; "),
        ({"embeds_scaling": "V"}, "embeds_scaling = 'V': unknown; known: V only"),
        ({"negative": []}, "name at least one picture"),
        ({"images": 3}, "a int is not a picture"),
        ({"mask": {"path": "a.png", "sha": ""}}, "unknown setting 'sha'; near: sha256"),
        ({"wieghts": [1, 2]}, "unknown setting 'wieghts'; near: weights"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_wrong_reference_is_one_line(said: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError) as caught:
        Reference(**{"images": ["a.png", "b.png"]} | said)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_request_file_is_what_the_picture_says(pipe: ImagePromptPipeline, tmp_path: Path) -> None:
    for name, picture in {"blue": BLUE, "red": RED, "left": LEFT}.items():
        picture.save(tmp_path / f"{name}.png")
    (tmp_path / "request.toml").write_text(
        """
        adapter = ["base", {adapter = "plus", name = "fine"}]
        images = [
            [
                {images = "blue.png", mask = "left.png"},
                {images = ["red.png", "blue.png"], weights = [2, 1], adapter = "fine"},
            ],
            "red.png",
        ]
        settings = {steps = 4, seed = 5, image_guidance = 2.0, overlap = "normalise"}
        """
    )
    request = read_request(tmp_path / "request.toml")
    result = request.run(pipe)
    paths = save_results(result, request, tmp_path / "out")
    for path, picture in zip(paths, result.images, strict=False):
        told = read_request(path)
        assert difference(told.run(pipe).images[0], picture) == 0
        assert [file.path for file in told.pictures()] == [file.path for file in request.pictures()]
        (tmp_path / "again.json").write_text(Image.open(path).text["imprompt"])
        assert read_request(tmp_path / "again.json") == told
    told = json.loads(Image.open(paths[1]).text["imprompt"])
    # a lone picture stays as simple as it was
    assert told["images"][1].keys() == {"path", "sha256"}
    assert told["images"][0][1]["weights"] == [2.0, 1.0]
    RED.save(tmp_path / "left.png")
    with pytest.raises(ImpromptError, match=r"left\.png is not the picture that it was"):
        [file.check() for file in read_request(paths[0]).pictures()]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.toml", "images = [", "is not valid TOML"),
        ("a.json", "[1]", "does not hold a request"),
        (
            "a.json",
            '{"images": ["a.png"], "modle": "emoji"}',
            "unknown setting 'modle'; near: model",
        ),
        (
            "a.toml",
            "images = ['a.png']\n[settings]\nstep = 3",
            "unknown setting 'step'; near: steps",
        ),
        ("a.toml", "images = [{images = 'a.png', blok = 1}]", "near: blocks"),
    ],
)
def test_a_wrong_request_file_is_one_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingError) as caught:
        read_request(tmp_path / name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_old_metadata_is_read_as_it_was() -> None:
    request = Request(
        images=[{"path": "a.png", "sha256": "1"}, {"path": "b.png"}], settings={"together": True}
    )
    assert request.images[0] == (Reference(images=[{"path": "a.png", "sha256": "1"}]),)
    assert json.loads(request.model_dump_json())["images"][1] == {"path": "b.png"}


@pytest.fixture(params=["sd1", "sdxl"])
def guided(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any], Any]:
    """A base model, its inputs for two items with guidance, and an adapter."""
    unet = tiny_unet(request.param)
    adapter = tiny_adapter(unet).attach(unet)
    inputs = noise_inputs(unet, 4)
    inputs["sample"], inputs["timestep"] = (
        inputs["sample"][:2].repeat(2, 1, 1, 1),
        torch.tensor(500),
    )
    if "added_cond_kwargs" in inputs:  # the size goes with the item, the pooled text with the half
        inputs["added_cond_kwargs"]["time_ids"][[1, 3]] += 8
    return unet, inputs, adapter


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, 7.0])
def test_image_guidance_is_the_sum_of_three(guided: Any, scale: float) -> None:
    unet, inputs, adapter = guided
    text, window = 7.0, torch.linspace(0.2, 1.5, 1000).expand(len(adapter.image_kv), 4, 1000)
    prompts = [
        random_prompt(adapter, 4)._replace(mask=torch.rand(4, 8, 4)),
        random_prompt(adapter, 4, window, seed=9),
    ]

    def part(of_text: int, of_image: int) -> Tensor:
        rows = slice(2 * of_text, 2 * of_text + 2)
        items = slice(2 * of_image, 2 * of_image + 2)
        own = {
            name: value[rows] if isinstance(value, Tensor) and value.ndim else value
            for name, value in inputs.items()
        }
        if "added_cond_kwargs" in own:
            own["added_cond_kwargs"] = {
                name: value[rows] for name, value in own["added_cond_kwargs"].items()
            }
        conditioned = [
            prompt._replace(
                keys=tuple(key[items] for key in prompt.keys),
                values=tuple(value[items] for value in prompt.values),
                scale=prompt.scale[:, items] if prompt.scale.shape[1] > 1 else prompt.scale,
                mask=None if prompt.mask is None else prompt.mask[items],
            )
            for prompt in prompts
        ]
        return noise(unet, own, conditioned)

    neither, image, both = part(0, 0), part(0, 1), part(1, 1)
    expected = neither + scale * (image - neither) + text * (both - image)
    halves = [prompt._replace(branches=2) for prompt in prompts]
    with adapter.using(*halves, image_guidance=scale):
        for _ in range(2):
            first, second = noise(unet, inputs).chunk(2)
    torch.testing.assert_close(first + text * (second - first), expected, rtol=0, atol=2e-5)
    plain, other = noise(unet, inputs, prompts).chunk(2)  # and nothing is left of it afterwards
    torch.testing.assert_close(
        torch.cat([plain, other]), torch.cat([neither, both]), rtol=0, atol=1e-5
    )


def test_image_guidance_as_strong_as_the_text_s_changes_nothing(pipe: ImagePromptPipeline) -> None:
    plain = pipe(BLUE, "a rocket", scale=0.7, guidance=4, **QUICK).images[0]
    same, more = (
        pipe(BLUE, "a rocket", scale=0.7, guidance=4, image_guidance=s, **QUICK).images[0]
        for s in (4, 1)
    )
    assert difference(plain, same) <= 1
    assert difference(plain, more) > 5


def tiny_controlnet(unet: Any) -> Any:
    with seeded(11):
        net = freeze(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8)))
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(layer.weight, std=0.05)
    return net


def with_controlnet(pipe: Any) -> Any:
    name = type(pipe).__name__.replace("Pipeline", "ControlNetPipeline")
    return as_pipeline(pipe, name, controlnet=tiny_controlnet(pipe.unet))


def test_a_controlnet_in_every_task(tmp_path: Path) -> None:
    """The packaged one, which reads edges: given a square, even though no image prompt was in its
    training.
    """
    pipe = ImagePromptPipeline.from_pretrained("emoji", controlnet="edges", device="cpu")
    control = {"control_image": Image.new("L", (64, 64)), "control_scale": 1.0}
    control["control_image"].paste(255, (20, 20, 44, 44))
    tasks: list[dict[str, Any]] = [{}, {"init_image": RED}, {"init_image": RED, "mask_image": LEFT}]
    for task in tasks:
        plain, held = (
            pipe(BLUE, "a rocket", **QUICK, **task, **extra).images[0] for extra in ({}, control)
        )
        assert difference(plain, held) > 5, task
    with pytest.raises(SettingError, match="a control image and a ControlNet go together"):
        ImagePromptPipeline.from_pretrained("emoji", device="cpu")(BLUE, **QUICK, **control)
    with pytest.raises(
        SettingError,
        match="no ControlNet 'edgse' for emoji: give one of edges, a folder, or a Hub id",
    ):
        ImagePromptPipeline.from_pretrained("emoji", controlnet="edgse", device="cpu")
    tiny_controlnet(tiny_unet("sd1")).save_pretrained(tmp_path / "other")
    with pytest.raises(
        MismatchError, match="made for a base model with cross_attention_dim 768; this one has 192"
    ):
        ImagePromptPipeline.from_pretrained("emoji", controlnet=tmp_path / "other", device="cpu")
    with pytest.raises(SettingError, match="give both, or neither"):
        Request(images=["a.png"], controlnet="edges")


@pytest.mark.parametrize("base", PIPELINES)
def test_on_a_pipeline_of_diffusers(base: str) -> None:
    """Any that is loaded already; here its own text to image, and the same with ControlNet."""
    plain, control = PIPELINES[base](), with_controlnet(PIPELINES[base]())
    results = []
    for pipeline in (plain, control):
        live = tiny_adapter(pipeline.unet).attach(pipeline.unet)
        pipe = ImagePromptPipeline(
            pipeline, Attached(live, Reader(tiny_encoder(), find_variant("base")))
        )
        options = {"image": pictures(1)[0].resize((32, 32))} if pipeline is control else {}
        settings: dict[str, Any] = {
            "steps": 2,
            "seed": 1,
            "width": 32,
            "height": 32,
            "pipeline_options": options,
        }
        halves = [
            Reference(images=pictures(1)[0], mask=LEFT),
            Reference(images=pictures(2)[1], mask=RIGHT, blocks=0.5),
        ]
        results.append(pipe([halves], **settings).images[0])
        assert difference(results[-1], pipe(BLUE, scale=0, **settings).images[0]) > 0
        pipe.detach()
        assert not pipeline.unet._forward_pre_hooks
    assert difference(*results) > 0
    with pytest.raises(SettingError, match="has its own way to start from pictures"):
        ImagePromptPipeline(
            control,
            Attached(live.attach(control.unet), Reader(tiny_encoder(), find_variant("base"))),
        )(BLUE, init_image=BLUE, steps=2)


OTHER_WAYS: list[tuple[str, dict[str, Any], str]] = [  # pipelines, options and what is said
    (
        "StableDiffusionSAGPipeline",
        {"guidance": 5.0},
        "StableDiffusionSAGPipeline calls the base model with 1 rows, .* are for 2",
    ),
    ("StableDiffusionSAGPipeline", {"guidance": 1.0}, ""),
    (
        "StableDiffusionAttendAndExcitePipeline",
        {"guidance": 5.0, "pipeline_options": {"token_indices": [1]}},
        "AttendAndExcitePipeline calls the base model with 1 rows, .* are for 2",
    ),
    (
        "StableDiffusionAttendAndExcitePipeline",
        {"guidance": 1.0, "pipeline_options": {"token_indices": [1]}},
        "AttendExciteAttnProcessor replaced the adapter's processor .*in every call does not go",
    ),
    (
        "StableDiffusionSAGPipeline",
        {"guidance": 5.0, "image_guidance": 2.0},
        r"image_guidance does not go .* guidance of a StableDiffusionSAGPipeline \(sag_scale\)",
    ),
    (
        "StableDiffusionAttendAndExcitePipeline",
        {"guidance": 5.0, "image_guidance": 2.0, "pipeline_options": {"token_indices": [1]}},
        r"image_guidance .* StableDiffusionAttendAndExcitePipeline \(token_indices\)",
    ),
    (
        "StableDiffusionPAGPipeline",
        {"guidance": 5.0, "image_guidance": 2.0},
        r"image_guidance .* StableDiffusionPAGPipeline \(pag_scale\)",
    ),
    ("TextToVideoZeroSDXLPipeline", {}, "does not take num_images_per_prompt, so that settings do"),
    ("LEditsPPPipelineStableDiffusionXL", {}, "does not take prompt and num_images_per_prompt and"),
    ("TextToVideoZeroPipeline", {}, "does not take num_images_per_prompt, so that settings do"),
    ("LEditsPPPipelineStableDiffusion", {}, "does not take prompt and num_images_per_prompt and"),
    ("StableDiffusionPanoramaPipeline", {}, ""),
    (
        "StableDiffusionInstructPix2PixPipeline",
        {},
        "InstructPix2PixPipeline refuses this call: `image` input cannot be undefined",
    ),
]


@pytest.mark.parametrize(("name", "settings", "says"), OTHER_WAYS)
def test_a_pipeline_of_another_way_follows_the_picture_or_says_why_not(
    name: str, settings: dict[str, Any], says: str
) -> None:
    pipeline = PIPELINES["sdxl" if "XL" in name else "sd1"]()
    pipeline.unet.register_to_config(_diffusers_version=diffusers.__version__, sample_size=64)

    def made(**more: Any) -> Image.Image:
        own = as_pipeline(pipeline, name)
        live = Attached(
            tiny_adapter(own.unet).attach(own.unet), Reader(tiny_encoder(), find_variant("base"))
        )
        pipe = ImagePromptPipeline(own, live)
        sizes = {"steps": 2, "seed": 1, "width": 32, "height": 32}
        return pipe(BLUE, "a b", **sizes | settings | more).images[0]

    if says:
        with pytest.raises(ImpromptError, match=says):
            made()
    else:
        assert difference(made(), made(scale=0.0)) > 5


def test_a_result_without_images_is_said() -> None:
    with pytest.raises(MismatchError, match="a StableDiffusionPipeline gives frames, not images"):
        images_made({"frames": []}, PIPELINES["sd1"]())


def test_published_presets_on_a_model_of_their_structure() -> None:
    pipeline = PIPELINES["sdxl"]()
    with seeded(1):
        live = tiny_adapter(pipeline.unet).attach(pipeline.unet)
    pipe = ImagePromptPipeline(
        pipeline, Attached(live, Reader(tiny_encoder(), find_variant("base")))
    )
    settings: dict[str, Any] = {"steps": 2, "seed": 1, "width": 32, "height": 32}
    picture = pictures(1)[0]
    named = pipe(Reference(images=picture, blocks="style transfer"), **settings).images[0]
    mapped = pipe(
        Reference(images=picture, blocks={"up_blocks.0.attentions.1": 1.0}), **settings
    ).images[0]
    precise = pipe(Reference(images=picture, blocks="style transfer precise"), **settings).images[0]
    assert difference(named, mapped) == 0
    assert family_of(pipeline.unet).layers(pipeline.unet)
    assert difference(named, precise) > 0


def test_several_adapters_say_their_own() -> None:
    with pytest.raises(SettingError, match="encoder and variant are for a single adapter"):
        ImagePromptPipeline.from_pretrained(
            "emoji", adapter=["base", "plus"], encoder="elsewhere", device="cpu"
        )
    with pytest.raises(
        SettingError, match="two adapters are called 'base': give each its own name"
    ):
        ImagePromptPipeline.from_pretrained("emoji", adapter=["base", "base"], device="cpu")


def test_faces() -> None:
    """A FaceID adapter beside one for whole pictures.

    Faces come from the user, or from an encoder that the user gives.
    """
    pipeline = PIPELINES["sd1"]()
    width = pipeline.unet.config.cross_attention_dim
    with seeded(5):
        face_id = IPAdapter.for_model(pipeline.unet, FaceProjection(512, width))
        embeddings = torch.randn(2, 512)

    class Finder:
        def encode_face(self, image: Image.Image, face: Any = None) -> Face:
            assert image.size == (64, 64)
            return Face(embeddings[int(face or 0)])

    whole = Attached(
        tiny_adapter(pipeline.unet).attach(pipeline.unet),
        Reader(tiny_encoder(), find_variant("base"), "whole"),
    )
    faces = Attached(
        face_id.attach(pipeline.unet),
        Reader(FaceFeatures(Finder()), find_variant("faceid"), "faces"),
    )
    pipe = ImagePromptPipeline(pipeline, [whole, faces])
    settings: dict[str, Any] = {"steps": 2, "seed": 1, "width": 32, "height": 32}
    found = pipe(Reference(images=BLUE, adapter="faces", face=1), **settings).images[0]
    given = pipe(Reference(images=Face(embeddings[1]), adapter="faces"), **settings).images[0]
    first = pipe(Reference(images=BLUE, adapter="faces"), **settings).images[0]
    assert difference(found, given) == 0
    assert difference(found, first) > 0
    both = pipe(
        [[Reference(images=BLUE, adapter="faces", mask=LEFT), Reference(images=RED)]], **settings
    ).images[0]
    assert difference(both, first) > 0
    for wrong, says in (
        (
            Reference(images=BLUE, face=0),
            "whole reads whole pictures .base.; a face is for a FaceID adapter",
        ),
        (Reference(images=Face(embeddings[0])), "whole reads whole pictures"),
        (Reference(images=BLUE, adapter="faces", crop="pad"), "faces reads faces .faceid."),
        (
            Reference(images=BLUE, adapter="faces", negative=Noise(kind="fade")),
            "noise are for whole pictures",
        ),
    ):
        with pytest.raises(SettingError, match=says):
            pipe(wrong, **settings)


def test_tiles_have_their_picture_s_weight(pipe: ImagePromptPipeline) -> None:
    wide = Image.new("RGB", (128, 64), (200, 40, 90))
    wide.paste((20, 160, 60), (64, 0, 128, 64))
    left, right = wide.crop((0, 0, 64, 64)), wide.crop((64, 0, 128, 64))
    tiled = pipe(Reference(images=[wide, BLUE], weights=[1, 2], crop="tiles"), **QUICK).images[0]
    assert (
        difference(
            tiled, pipe(Reference(images=[left, right, BLUE], weights=[1, 1, 2]), **QUICK).images[0]
        )
        == 0
    )
    average = pipe(
        Reference(images=[wide, BLUE], weights=[2, 1], crop="tiles", combine="average"), **QUICK
    ).images[0]
    same = pipe(
        Reference(images=[left, right, BLUE], weights=[1, 1, 1], combine="average"), **QUICK
    ).images[0]
    assert difference(average, same) <= 1


def test_a_list_in_the_list_applies_together(pipe: ImagePromptPipeline) -> None:
    assert (
        difference(
            pipe([[BLUE, RED]], **QUICK).images[0],
            pipe([BLUE, RED], together=True, **QUICK).images[0],
        )
        == 0
    )


def test_an_inactive_reference_takes_no_share(pipe: ImagePromptPipeline) -> None:
    alone = pipe(Reference(images=RED, mask=LEFT), **QUICK).images[0]
    for unconditioned in (Reference(images=BLUE, scale=0), Reference(images=BLUE, blocks={})):
        assert (
            difference(
                pipe(
                    [[Reference(images=RED, mask=LEFT), unconditioned]],
                    overlap="normalise",
                    **QUICK,
                ).images[0],
                alone,
            )
            <= 1
        )


def test_what_is_ignored_is_not_in_noise_either(pipe: ImagePromptPipeline) -> None:
    made = []
    for hidden in ("black", "white"):
        picture = BLUE.copy()
        picture.paste(hidden, (0, 0, 32, 64))
        made.append(
            pipe(
                Reference(images=picture, ignore=LEFT, negative=Noise(kind="fade", strength=0.3)),
                **QUICK,
            ).images[0]
        )
    assert difference(*made) == 0
    assert (
        difference(
            made[0],
            pipe(Reference(images=picture, ignore=LEFT, negative="fade"), **QUICK).images[0],
        )
        > 0
    )


@torch.no_grad()
def test_image_guidance_is_of_its_own_thread_and_works_in_inference_mode(guided: Any) -> None:
    unet, inputs, adapter = guided
    prompt = random_prompt(adapter, 4)
    plain, found = noise(unet, inputs, prompt), []
    with adapter.using(prompt._replace(branches=2), image_guidance=3.0):
        mine = noise(unet, inputs)

        def elsewhere() -> None:
            with torch.no_grad():
                found.append(noise(unet, inputs, prompt))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with torch.inference_mode():
            torch.testing.assert_close(noise(unet, inputs), mine, rtol=0, atol=1e-5)
        with pytest.raises(MismatchError, match="this is a batch of 3"):
            noise(unet, noise_inputs(unet, 3))
    assert torch.equal(found[0], plain)
    assert (mine - plain).abs().max() > 1e-3


@torch.no_grad()
def test_image_guidance_of_a_video() -> None:
    frames, unet = 2, tiny_unet("sd1")
    config = {
        "block_out_channels": (16, 32, 64, 64),
        "motion_norm_num_groups": 8,
        "motion_num_attention_heads": 2,
    }
    with seeded(4):
        moving = diffusers.UNetMotionModel.from_unet2d(unet, diffusers.MotionAdapter(**config))
        latents, text = torch.randn(1, 4, frames, 16, 8), torch.randn(2, 11, 768)
    adapter = tiny_adapter(moving).attach(moving)

    def part(of_text: int, of_image: int) -> Tensor:
        prompt = random_prompt(adapter, 2)
        half = [
            tuple(x[of_image, None].expand(frames, -1, -1, -1) for x in states)
            for states in (prompt.keys, prompt.values)
        ]
        words = text[of_text].expand(frames, -1, -1)
        conditioned = {"ip_hidden_states": prompt._replace(keys=half[0], values=half[1])}
        return moving(latents, 500, words, cross_attention_kwargs=conditioned).sample

    neither, image, both = part(0, 0), part(0, 1), part(1, 1)
    whole = random_prompt(adapter, 2)
    keys, values = (
        tuple(x.repeat_interleave(frames, 0) for x in states)
        for states in (whole.keys, whole.values)
    )
    with adapter.using(whole._replace(keys=keys, values=values, branches=2), image_guidance=2.0):
        twice = moving(latents.repeat(2, 1, 1, 1, 1), 500, text.repeat_interleave(frames, 0)).sample
    first, second = twice.chunk(2)
    expected = neither + 2 * (image - neither) + 5 * (both - image)
    torch.testing.assert_close(first + 5 * (second - first), expected, rtol=0, atol=2e-5)


def test_a_failed_attachment_leaves_the_base_model_alone(pipe: ImagePromptPipeline) -> None:
    other = diffusers.StableDiffusionPipeline(
        **pipe.pipeline.components | {"unet": tiny_unet("sd1")}, requires_safety_checker=False
    )
    own = dict(other.unet.attn_processors)
    with pytest.raises(MismatchError, match="192-wide text"):
        ImagePromptPipeline.from_pipeline(other, ["base", "plus"], model="emoji")
    with pytest.raises(SettingError, match="two adapters are called 'plus'"):
        ImagePromptPipeline.from_pipeline(other, ["base", "plus", "plus"], model="emoji")
    with pytest.raises(SettingError, match="name at least one"):
        ImagePromptPipeline.from_pipeline(other, [], model="emoji")
    assert all(other.unet.attn_processors[name] is processor for name, processor in own.items())
    assert not other.unet._forward_pre_hooks


def test_a_later_adapter_that_fails_takes_the_earlier_ones_off(tmp_path: Path) -> None:
    pipeline = PIPELINES["sd1"]()
    encoder = tmp_path / "encoder"
    tiny_encoder().model.save_pretrained(encoder)
    tiny_encoder().processor.save_pretrained(encoder)
    row = find_variant("base")
    models = {"good": pipeline.unet, "bad": tiny_unet("sd1", cross_attention_dim=48)}
    for name, unet in models.items():
        layers = [*family_of(unet).layers(unet)]
        save_adapter(tmp_path / f"{name}.safetensors", tiny_adapter(unet), row, layers)
    good, bad = (
        AdapterChoice(adapter=str(tmp_path / f"{name}.safetensors"), encoder=str(encoder))
        for name in models
    )
    own = dict(pipeline.unet.attn_processors)
    with pytest.raises(MismatchError, match="trained for 48-wide text"):
        ImagePromptPipeline.from_pipeline(pipeline, [good, bad])
    assert all(pipeline.unet.attn_processors[name] is kept for name, kept in own.items())
    assert not pipeline.unet._forward_pre_hooks
    ImagePromptPipeline.from_pipeline(pipeline, [good])


@pytest.mark.parametrize("turned", [False, True])
def test_a_mask_has_the_rows_and_columns_of_the_latents(
    pipe: ImagePromptPipeline, turned: bool
) -> None:
    stripes = Image.new("L", (96, 48))  # one latent wide each
    for left in range(0, 96, 16):
        stripes.paste(255, (left, 0, left + 8, 48))
    expected = torch.tensor([1.0, 0.0]).repeat(6).expand(1, 6, 12)
    width, height = stripes.size
    if turned:
        stripes, expected = stripes.transpose(Image.Transpose.TRANSPOSE), expected.mT
        width, height = height, width
    settings = Settings(width=width, height=height, **QUICK)
    ((prepared,),) = pipe.prepare(Reference(images=BLUE, mask=stripes), settings).references
    assert prepared.mask is not None
    assert torch.equal(prepared.mask, expected)


def test_windows_of_a_scheduler_with_numbers_of_its_own(pipe: ImagePromptPipeline) -> None:
    edm = diffusers.StableDiffusionPipeline(
        **pipe.pipeline.components, requires_safety_checker=False
    )
    edm.scheduler = diffusers.EDMEulerScheduler()
    other = ImagePromptPipeline(edm, pipe.first)
    whole, half, none = (
        other(Reference(images=BLUE, **window), **QUICK).images[0]
        for window in ({}, {"end": 0.5}, {"scale": 0.0})
    )
    assert difference(half, whole) > 5
    assert difference(half, none) > 5


def test_paths_of_weights_are_the_request_s_folder_s(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.safetensors").touch()
    (tmp_path / "sub" / "a.json").write_text(
        '{"adapter": ["base", {"adapter": "mine.safetensors"}], "images": ["a.png"], '
        '"model": "emoji"}'
    )
    request = read_request(tmp_path / "sub" / "a.json")
    assert request.model == "emoji"
    assert request.adapter[0] == "base"
    assert request.adapter[1].adapter == str(tmp_path / "sub" / "mine.safetensors")
    assert [file.path for file in request.pictures()] == [tmp_path / "sub" / "a.png"]
