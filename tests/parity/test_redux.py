"""FLUX.1 Redux: image prompts that are rows of the text.

The reference is diffusers' `FluxPriorReduxPipeline`, and a plain Flux that is given longer text.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from diffusers.pipelines.flux.pipeline_flux_prior_redux import FluxPriorReduxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from imprompt import ImagePromptPipeline, Reference
from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.checkpoints.adapters import (
    adapter_file,
    describe,
    load_adapter,
    read_adapter,
    write_adapter,
)
from imprompt.errors import CheckpointError, MismatchError, SettingError
from imprompt.families.text_rows import TextRowsAdapter
from imprompt.generation.references import AdapterChoice
from imprompt.prompt import ImagePrompt
from tests.parity.test_published import CLOSE, instantx, xlabs
from tests.tiny import FEATURE_DIMS, pictures, seeded, tiny_encoder
from tests.tiny_pipelines import tiny_pipeline
from tests.zoo import SIDE, TEXT, answer, inputs_of, specimen

WIDTH, E, ROWS = 32, 16, 5  # of the text, of the features, patches
SIZE = {"width": 24, "height": 32}
FELT = 5e-3  # 500 times the tolerance of CLOSE


def redux(width: int = WIDTH, embedding: int = E) -> dict[str, Tensor]:
    """A file as it is published; its rows are as large as those of a text."""
    states = ReduxImageEncoder(embedding, width).state_dict()
    return {name: 4 * tensor for name, tensor in states.items()}


def saved(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    with seeded(11):
        save_file(redux() if tensors is None else tensors, path := folder / "redux.safetensors")
    return path


class Scene:
    """A tiny Flux with the adapter attached, two items, and their pictures' features."""

    def __init__(self, folder: Path) -> None:
        self.path, self.model = saved(folder), specimen("flux")
        self.inputs = inputs_of("flux", 2)
        self.adapter = load_adapter(self.path, self.model)
        with seeded(5):
            self.features = torch.randn(2, ROWS, E)
        self.tokens = self.adapter.tokens(self.features)

    def prompt(self, scale: Any = 1.0, **fields: Any) -> ImagePrompt:
        return self.adapter.prompt(self.tokens, scale=scale)._replace(**fields)

    def ours(self, *prompts: ImagePrompt, **changes: Any) -> Tensor:
        with self.adapter.using(*prompts):
            return answer(self.model, self.inputs | changes)

    def longer(self, *tokens: Tensor) -> dict[str, Any]:
        """Return the arguments of a plain model with these rows after the words'."""
        text = torch.cat([self.inputs["encoder_hidden_states"], *tokens], 1)
        return self.inputs | {
            "encoder_hidden_states": text,
            "txt_ids": torch.zeros(text.shape[1], 3),
        }


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    with torch.no_grad(), made.adapter.attached(made.model):
        yield made


def test_weight_1_is_a_longer_text_and_weight_0_the_base_to_the_bit(scene: Scene) -> None:
    alone = answer(scene.model, scene.inputs)
    whole = scene.ours(scene.prompt())
    assert torch.equal(whole, answer(scene.model, scene.longer(scene.tokens)))
    assert (whole - alone).abs().max() > FELT
    assert torch.equal(scene.ours(scene.prompt(0.0)), alone)
    assert torch.equal(scene.ours(scene.prompt(mask=torch.zeros(1, 4, 4))), alone)
    assert torch.equal(answer(scene.model, scene.inputs), alone)


def test_weight_2_is_each_row_twice_and_the_weight_is_continuous(scene: Scene) -> None:
    twice = answer(scene.model, scene.longer(scene.tokens, scene.tokens))
    torch.testing.assert_close(scene.ours(scene.prompt(2.0)), twice, **CLOSE)
    halves = scene.ours(scene.prompt(0.5), scene.prompt(0.5))
    torch.testing.assert_close(halves, scene.ours(scene.prompt()), **CLOSE)
    bias = torch.log(torch.tensor([1.0, 2, 1, 1, 1]))[None]  # by token, as pictures have weights
    longer = torch.cat([scene.tokens, scene.tokens[:, 1:2]], 1)
    second = answer(scene.model, scene.longer(longer))
    torch.testing.assert_close(scene.ours(scene.prompt(bias=bias)), second, **CLOSE)
    alone = answer(scene.model, scene.inputs)
    gaps = [
        float((scene.ours(scene.prompt(weight)) - alone).abs().max())
        for weight in (1e-6, 1e-3, 0.1, 0.3, 1.0)
    ]
    assert gaps == sorted(gaps)
    assert gaps[0] < 1e-4 < FELT < gaps[-1]


def test_prompts_of_one_batch_equal_runs_alone(scene: Scene) -> None:
    scales = torch.tensor([0.4, 1.7]), torch.tensor([0.0, 0.6])
    for scale in scales:
        table = scale.expand(4, -1)
        together = scene.ours(scene.prompt(table))
        for item, weight in enumerate(scale.tolist()):
            one = slice(item, item + 1)
            own = {
                name: value if name.endswith("ids") else value[one]
                for name, value in scene.inputs.items()
            }
            prompt = scene.adapter.prompt(scene.tokens[one], scale=weight)
            torch.testing.assert_close(scene.ours(prompt, **own), together[one], **CLOSE)


def test_a_mask_limits_what_attends_to_the_places_inside(scene: Scene) -> None:
    """Compared with a plain Flux that is given longer text and the mask of all attentions."""
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, :, : SIDE // 2] = 1
    end, size = TEXT + ROWS, TEXT + ROWS + SIDE * SIDE
    seen = torch.zeros(size)
    seen[TEXT:end], seen[end:] = 0.7, 0.7 * mask.flatten()
    bias = torch.zeros(1, 1, size, size)
    bias[..., TEXT:end] = seen.log()[:, None]
    longer = scene.longer(scene.tokens) | {"joint_attention_kwargs": {"attention_mask": bias}}
    found = scene.ours(scene.prompt(0.7, mask=mask))
    torch.testing.assert_close(found, answer(scene.model, longer), **CLOSE)
    change = (found - answer(scene.model, scene.inputs)).abs().mean((0, 2)).view(SIDE, SIDE)
    assert change[:, : SIDE // 2].mean() > 2 * change[:, SIDE // 2 :].mean()


def test_a_window_follows_progress_and_outside_of_it_the_base_is_bit_equal(scene: Scene) -> None:
    window = torch.zeros(4, 1, 101)
    window[..., 40:] = torch.linspace(0, 1, 61)
    prompt = scene.prompt(window)
    for sigma, weight in ((0.9, 0.0), (0.3, 0.5), (0.0, 1.0)):
        time = {"timestep": torch.full((2,), sigma)}
        own = scene.ours(scene.prompt(weight), **time)
        torch.testing.assert_close(scene.ours(prompt, **time), own, **CLOSE)
    early = {"timestep": torch.full((2,), 0.9)}
    assert torch.equal(scene.ours(prompt, **early), answer(scene.model, scene.inputs | early))
    times = torch.tensor([0.9, 0.3])  # of requests that share a call
    table = torch.tensor([0.0, 0.5]).expand(4, -1)
    torch.testing.assert_close(
        scene.ours(prompt, timestep=times), scene.ours(scene.prompt(table), timestep=times), **CLOSE
    )


def others(folder: Path, model: Any) -> dict[str, tuple[IPAdapter, Tensor]]:
    """Adapters of other kinds for the model, and the features that they read."""
    found: dict[str, tuple[IPAdapter, Tensor]] = {}
    with seeded(12):
        for name, make, layers in (("xlabs", xlabs, 2), ("instantx", instantx, 4)):
            save_file(make(WIDTH, WIDTH, layers), path := folder / f"{name}.safetensors")
            found[name] = load_adapter(path, model), torch.randn(2, 8)
        new = IPAdapter.for_model(model, ImageProjection(8, WIDTH))
        for parameter in new.parameters():
            parameter.data += 0.5 * torch.randn_like(parameter)
        found["new"] = new, torch.randn(2, 8)
    return found


@pytest.mark.parametrize("name", ["xlabs", "instantx", "new"])
def test_adapters_of_other_kinds_join_and_find_the_picture(
    scene: Scene, tmp_path: Path, name: str
) -> None:
    """Compared with the other adapter on a Flux that is given longer text; with a mask too."""
    other, features = others(tmp_path, scene.model)[name]
    with other.attached(scene.model):
        prompt = other.prompt(other.tokens(features), scale=0.8)
        mask = torch.zeros(1, SIDE, SIDE)
        mask[:, : SIDE // 2] = 1
        for one in (prompt, prompt._replace(mask=mask)):
            with other.using(one):
                wanted = answer(scene.model, scene.longer(scene.tokens))
                alone = answer(scene.model, scene.inputs)
            found = scene.ours(one, scene.prompt())
            torch.testing.assert_close(found, wanted, **CLOSE)
            torch.testing.assert_close(scene.ours(scene.prompt(), one), wanted, **CLOSE)
            assert torch.equal(scene.ours(one, scene.prompt(0.0)), alone)
            assert (found - alone).abs().max() > FELT
            assert (found - scene.ours(scene.prompt())).abs().max() > FELT


def test_guidance_in_calls_of_their_own(scene: Scene) -> None:
    """The negative branch has its own rows, or none; the positive one is called first."""
    null = scene.adapter.tokens(torch.zeros(1, ROWS, E))
    inputs = {name: x if name.endswith("ids") else x[:1] for name, x in scene.inputs.items()}
    other = {"encoder_hidden_states": torch.randn(1, TEXT, WIDTH)}
    first = scene.adapter.prompt(scene.tokens[:1])
    for prompt, negative in (
        (scene.adapter.prompt(scene.tokens[:1], null), scene.adapter.prompt(null)),
        (first.positive_alone(), first.with_scale(0.0)),
    ):
        with scene.adapter.using(prompt):
            branches = [answer(scene.model, inputs | changes) for changes in ({}, other)]
        assert torch.equal(branches[0], scene.ours(first, **inputs))
        assert torch.equal(branches[1], scene.ours(negative, **inputs | other))
    assert torch.equal(branches[1], answer(scene.model, inputs | other))


def test_half_precision_is_finite_and_near(scene: Scene) -> None:
    wanted = scene.ours(scene.prompt(0.4))
    scene.model.to(torch.bfloat16)
    inputs = {
        name: x if name.endswith("ids") else x.to(torch.bfloat16)
        for name, x in scene.inputs.items()
    }
    found = scene.ours(scene.prompt(0.4), **inputs)
    assert found.dtype == torch.bfloat16
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_what_does_not_fit_is_one_line(scene: Scene) -> None:
    with pytest.raises(MismatchError, match=r"makes rows of 32-wide text; the text .* is 48 wide"):
        load_adapter(scene.path, specimen("flux", joint_attention_dim=48))
    with pytest.raises(MismatchError, match="this adapter is for base models of the flux family"):
        load_adapter(scene.path, specimen("chroma"))
    by_layer = torch.tensor([1.0, 1.0, 0.5, 1.0])
    for scale, said in ((-0.5, "below 0"), (by_layer, "not the same in all layers")):
        with pytest.raises(MismatchError, match=f"a scale {said}: .* at least 0, for all layers"):
            scene.ours(scene.prompt(scale))
    bias = {"joint_attention_kwargs": {"attention_mask": torch.zeros(1, 1, 1, 4)}}
    with pytest.raises(MismatchError, match="has an attention_mask, which the weight of the image"):
        scene.ours(scene.prompt(0.5), **bias)
    narrow = scene.prompt(patches=torch.randn(2, 1, ROWS, 8))
    with pytest.raises(MismatchError, match="is rows of 8-wide text; the text of this model is 32"):
        scene.ours(narrow)
    assert torch.equal(
        scene.ours(scene.prompt()), answer(scene.model, scene.longer(scene.tokens))
    )  # no failed call left anything behind


# --- The file.


def test_it_is_read_described_and_written_in_its_own_layout(scene: Scene, tmp_path: Path) -> None:
    file = read_adapter(scene.path)
    assert (file.variant.name, file.variant.feature, file.layout) == ("redux", "last", "redux")
    assert (file.tokens, file.token_dim, file.feature_dim) == (None, WIDTH, E)
    assert isinstance(scene.adapter, TextRowsAdapter)
    facts = dict(describe(file))
    assert facts["image tokens"] == "one per patch, 32 wide"
    assert "of the flux family with 32-wide text; image encoder" in facts["suits"]
    assert "16-wide last hidden states" in facts["suits"]
    layers = [*scene.adapter.family.layers(scene.model)]
    for one in (file, adapter_file(scene.adapter, file.variant, layers)):
        write_adapter(back := tmp_path / "back.safetensors", one, "redux")
        own = load_file(back)
        assert own.keys() == redux().keys()
        assert all(torch.equal(own[key], one) for key, one in load_file(scene.path).items())
        for layout in ("imprompt", "paper"):
            with pytest.raises(
                CheckpointError, match=f"{layout} layout cannot hold it: write redux"
            ):
                write_adapter(tmp_path / "no.safetensors", one, layout, layers)
    with pytest.raises(CheckpointError, match="the xlabs layout is for other adapters"):
        write_adapter(tmp_path / "no.safetensors", file, "xlabs")


@pytest.mark.parametrize("key", redux())
def test_a_damaged_file_is_one_line(key: str, tmp_path: Path) -> None:
    tensors = redux()
    for damaged, said in (
        ({name: x for name, x in tensors.items() if name != key}, r"should have|fit together"),
        (tensors | {key: torch.zeros(3)}, r"should have|fit together"),
        (tensors | {"extra": torch.zeros(3)}, "has unexpected extra"),
        (tensors | {key: tensors[key] * torch.nan}, "NaN or infinite numbers"),
    ):
        with pytest.raises(CheckpointError, match=said) as raised:
            read_adapter(saved(tmp_path, damaged))
        assert "\n" not in str(raised.value)


def test_its_size_is_that_of_the_published_file(tmp_path: Path) -> None:
    with torch.device("meta"):
        assert sum(one.numel() for one in redux(4096, 1152).values()) == 64_503_808
    small = {key: one[..., :1152] if "up" in key else one for key, one in redux(8, 1152).items()}
    facts = dict(describe(read_adapter(saved(tmp_path, small))))
    assert "SigLIP so400m/14 with 1152-wide last hidden states, e.g. google/" in facts["suits"]


# --- Whole pipelines.


class Whole:
    """A tiny Flux pipeline, Redux' file and its SigLIP, and diffusers' prior of the same parts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pipeline = folder, tiny_pipeline("flux")
        with seeded(4):
            config = transformers.SiglipVisionConfig(
                hidden_size=E,
                intermediate_size=24,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=16,
                patch_size=4,
            )
            encoder = transformers.SiglipVisionModel(config).eval()
            for parameter in encoder.parameters():
                parameter.data.normal_(std=0.5)  # so that pictures differ
        side = {"height": 16, "width": 16}
        encoder.save_pretrained(folder / "encoder")
        transformers.SiglipImageProcessorPil(size=side).save_pretrained(folder / "encoder")
        self.path, embedder = saved(folder), ReduxImageEncoder(E, WIDTH)
        embedder.load_state_dict(load_file(self.path))
        own = self.pipeline
        self.prior = FluxPriorReduxPipeline(
            image_encoder=encoder,
            feature_extractor=transformers.SiglipImageProcessorPil(size=side),
            image_embedder=embedder,
            text_encoder=own.text_encoder,
            tokenizer=own.tokenizer,
            text_encoder_2=own.text_encoder_2,
            tokenizer_2=own.tokenizer_2,
        )

    def ours(self, **options: Any) -> ImagePromptPipeline:
        return ImagePromptPipeline.from_pipeline(
            self.pipeline, self.path, encoder=self.folder / "encoder", **options
        )

    def made(self, image: Any, facade: ImagePromptPipeline | None = None, **asked: Any) -> Tensor:
        """Return the latents of a call of the facade with texts of 512 tokens, as the prior's."""
        pipe, options = facade or self.ours(), asked.pop("options", {})
        call = {"seed": 3, "steps": 4, "guidance": 2.5, **SIZE, **asked}
        images = pipe(
            image,
            "a cat",
            pipeline_options={"output_type": "latent", "max_sequence_length": 512} | options,
            **call,
        ).images
        if facade is None:
            pipe.detach()
        return torch.stack([*images])

    @torch.no_grad()
    def diffusers(self, **given: Any) -> Tensor:
        """Return the latents of diffusers' own pipeline."""
        call = {"num_inference_steps": 4, "guidance_scale": 2.5, "output_type": "latent", **SIZE}
        generator = [torch.Generator().manual_seed(3)]
        return self.pipeline(generator=generator, return_dict=False, **call | given)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("redux"))


ONE, OTHER = pictures(1)[0], Image.new("RGB", (40, 40), "red")
LONG = {"prompt": "a cat", "max_sequence_length": 512}


def test_a_whole_pipeline_is_diffusers_prior(whole: Whole) -> None:
    """Four steps; with the adapter attached to diffusers' pipeline, and by the facade."""
    given = {**whole.prior(ONE, prompt="a cat")}
    wanted, alone = whole.diffusers(**given), whole.diffusers(**LONG)
    adapter = load_adapter(whole.path, whole.pipeline.transformer)
    facade = whole.ours()
    features = facade.first.reader.features(Reference(images=ONE))[0]
    facade.detach()
    with torch.no_grad(), adapter.attached(whole.pipeline.transformer):
        prompt = adapter.prompt(adapter.tokens(features))
        with adapter.using(prompt):
            torch.testing.assert_close(whole.diffusers(**LONG), wanted, **CLOSE)
    assert (wanted - alone).abs().max() > FELT
    torch.testing.assert_close(whole.made(ONE), wanted, **CLOSE)
    assert torch.equal(whole.made(ONE, scale=0.0), alone)
    assert (whole.made(OTHER) - wanted).abs().max() > FELT
    gaps = [float((whole.made(ONE, scale=x) - alone).abs().max()) for x in (0.01, 0.2, 1.0)]
    assert gaps == sorted(gaps)


def test_true_guidance_leaves_the_negative_branch_without_it_or_with_its_own(whole: Whole) -> None:
    options = {"options": {"true_cfg_scale": 3.0}}
    given = {**whole.prior(ONE, prompt="a cat"), "true_cfg_scale": 3.0}

    other = whole.prior(OTHER, prompt="")
    for image, negative in (
        (ONE, {"negative_prompt": "", "max_sequence_length": 512}),
        (
            Reference(images=ONE, negative=OTHER),
            {f"negative_{name}": value for name, value in other.items()},
        ),
    ):
        wanted = whole.diffusers(**given, **negative)
        torch.testing.assert_close(whole.made(image, **options), wanted, **CLOSE)
    late = whole.made(Reference(images=ONE, start=0.9), **options)
    assert (late - whole.made(ONE, **options)).abs().max() > FELT


def test_references_have_weights_masks_windows_and_batches_of_their_own(whole: Whole) -> None:
    pipe = whole.ours()
    left = Image.new("L", (24, 32))
    left.paste(255, (0, 0, 12, 32))
    pair = [Reference(images=ONE, scale=0.7), Reference(images=OTHER, scale=0.3)]
    several = Reference(images=[ONE, OTHER], weights=[0.7, 0.3])
    items = [
        ONE,
        Reference(images=ONE, mask=left, end=0.6),
        Reference(images=OTHER, scale=0.0),
        Reference(images=OTHER, start=0.2, easing="ease in", scale=0.4),
        several,
        pair,
    ]
    for options in ({}, {"options": {"true_cfg_scale": 3.0}}):
        together = whole.made(items, pipe, batch_size=3, **options)
        for number, item in enumerate(items):
            alone = whole.made([item], pipe, **options | {"seed": 3 + number})
            torch.testing.assert_close(together[number], alone[0], rtol=0, atol=1e-4)
    white = Reference(images=ONE, mask=Image.new("L", (8, 8), 255))
    torch.testing.assert_close(whole.made(white, pipe), whole.made(ONE, pipe), **CLOSE)
    both = whole.made(pair, pipe, together=True)
    torch.testing.assert_close(both, whole.made(several, pipe), **CLOSE)
    swapped = whole.made([*reversed(pair)], pipe, together=True)
    torch.testing.assert_close(both, swapped, **CLOSE)  # all rows of the text have one place
    for item in pair:
        assert (whole.made(item, pipe) - both).abs().max() > FELT
    pipe.detach()


def test_it_joins_another_adapter_in_the_facade(whole: Whole, tmp_path: Path) -> None:
    encoder = tiny_encoder()
    for part in (encoder.model, encoder.processor):
        part.save_pretrained(tmp_path / "encoder")
    with seeded(12):
        save_file(
            instantx(WIDTH, WIDTH, 4, embedding=FEATURE_DIMS["pooled"]),
            path := tmp_path / "instantx.safetensors",
        )
    choices = [
        AdapterChoice(adapter=str(whole.path), name="redux", encoder=str(whole.folder / "encoder")),
        AdapterChoice(adapter=str(path), name="instantx", encoder=str(tmp_path / "encoder")),
    ]
    pipe = ImagePromptPipeline.from_pipeline(whole.pipeline, choices)

    def made(one: float, other: float) -> Tensor:
        references = [
            Reference(images=ONE, adapter="redux", scale=one),
            Reference(images=OTHER, adapter="instantx", scale=other),
        ]
        return whole.made(references, pipe, together=True)

    found, first, second = made(1.0, 0.7), made(1.0, 0.0), made(0.0, 0.7)
    pipe.detach()
    torch.testing.assert_close(first, whole.made(ONE), **CLOSE)
    assert (found - first).abs().max() > FELT
    assert (found - second).abs().max() > FELT


def test_what_the_facade_cannot_do_is_refused_before_a_step(whole: Whole) -> None:
    pipe, steps = whole.ours(), []
    for asked, said in (
        ({"scale": -0.5}, "appends rows to the text: its weight is at least 0"),
        ({"blocks": {"single_transformer_blocks": 0.5}}, "the same in all layers, so leave blocks"),
        ({"embeds_scaling": "K+V"}, r"embeds_scaling = 'K\+V': .* leave it out"),
    ):
        with pytest.raises(SettingError, match=said) as raised:
            pipe(Reference(images=ONE, **asked), on_step=lambda *own: steps.append(own), **SIZE)
        assert "\n" not in str(raised.value)
    pipe.detach()
    assert not steps
    assert np.isfinite(whole.made(ONE).numpy()).all()


def test_compiled_weight_1_other_weights_and_0_are_a_graph_each(
    tmp_path: Path, counter: CompileCounterWithBackend
) -> None:
    own = Whole(tmp_path)
    plain, calls = own.ours(), [(1.0, 1), (0.4, 2), (0.7, 2), (0.0, 3), (1.0, 3), (0.2, 3)]
    wanted = [own.made(ONE, plain, scale=scale) for scale, _ in calls]
    fast = ImagePromptPipeline(own.pipeline, plain.first, compile=True)
    for (scale, graphs), latents in zip(calls, wanted, strict=True):
        made = own.made(ONE, fast, scale=scale)
        torch.testing.assert_close(made, latents, rtol=0, atol=1e-4)
        assert counter.frame_count == graphs
