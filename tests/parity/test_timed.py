"""Published adapters whose tokens depend on the time: diffusers' own pictures, step by step.

The reference for SD3.5 is diffusers' implementation, for a step and for a whole pipeline.
"""

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from imprompt import ImagePromptPipeline, Reference
from imprompt.checkpoints.adapters import load_adapter, read_adapter, write_adapter
from imprompt.encoders.character import character_features
from imprompt.encoders.kinds import IMAGENET, dinov2_settings
from imprompt.encoders.vision import VisionEncoder
from imprompt.errors import CheckpointError, MismatchError, SettingError
from imprompt.families.base import family_of
from imprompt.families.processor import LayerConditioning, own_states
from imprompt.families.timed import at_time
from imprompt.generation.engine import Engine, SeatCall
from imprompt.prompt import ImagePrompt, stack_items
from tests.parity.test_published import CLOSE, PATCHES, E, Kind, sd3, xlabs
from tests.tiny import FEATURE_DIMS, TEXT_TOKENS, seeded, tiny_encoder
from tests.tiny_pipelines import tiny_pipeline
from tests.zoo import answer, specimen

TIMES = (900.0, 350.0)
MEDIUM: dict[str, Any] = {"dual_attention_layers": ()}  # SD 3 medium's blocks
SIZE = {"width": 24, "height": 32}
WIDTH = 16  # of the image encoder's hidden states


class Timed:
    """A tiny SD3 with the adapter, and diffusers' own with the same weights."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ip-adapter.bin"
        with seeded(11):
            self.tensors = sd3(32, 32, 3)
            self.features = torch.randn(2, PATCHES, E)
            self.rows = {
                "hidden_states": torch.randn(2, 4, 8, 8),
                "encoder_hidden_states": torch.randn(2, 6, 32),
                "pooled_projections": torch.randn(2, 32),
            }
        torch.save(nested(self.tensors), self.path)
        self.model, self.theirs = specimen("sd3", **MEDIUM), specimen("sd3", **MEDIUM)
        self.adapter = load_adapter(self.path, self.model)
        states = nested(self.tensors)
        self.theirs._load_ip_adapter_weights(states, low_cpu_mem_usage=False)

    def inputs(self, *items: int) -> dict[str, Tensor]:
        own = list(items)
        return {"timestep": torch.tensor(TIMES)[own], **{k: v[own] for k, v in self.rows.items()}}

    def prompt(self, *items: int, null: bool = False, scale: float = 0.7) -> ImagePrompt:
        """Of those items; with `null` two branches, the negative one of zero features."""
        made = self.adapter.tokens(self.features[list(items)])
        zeros = self.adapter.tokens(torch.zeros(1, PATCHES, E)) if null else None
        return self.adapter.prompt(made, zeros, scale=scale)

    def ours(self, inputs: dict[str, Any], *prompts: ImagePrompt) -> Tensor:
        with self.adapter.using(*prompts):
            return self.model(**inputs).sample

    def diffusers(self, inputs: dict[str, Any], features: Tensor, scale: float = 0.7) -> Tensor:
        for processor in self.theirs.attn_processors.values():
            processor.scale = scale
        given = {"ip_adapter_image_embeds": features}
        return self.theirs(**inputs, joint_attention_kwargs=given).sample


def nested(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """As the original file and diffusers hold them."""
    groups: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in tensors.items():
        outer, _, inner = key.partition(".")
        groups[outer][inner] = tensor
    return groups


@pytest.fixture
def timed(tmp_path: Path) -> Any:
    made = Timed(tmp_path)
    with torch.no_grad(), made.adapter.attached(made.model):
        yield made


def test_one_step_is_diffusers(timed: Timed) -> None:
    """Each item has its own timestep."""
    inputs = timed.inputs(0, 1)
    out, alone = timed.diffusers(inputs, timed.features), timed.model(**inputs).sample
    torch.testing.assert_close(timed.ours(inputs, timed.prompt(0, 1)), out, **CLOSE)
    assert (out - alone).abs().max() > 0.1
    swapped = inputs | {"timestep": inputs["timestep"].flip(0)}
    kept = timed.prompt(0, 1)
    at_other_times = timed.ours(swapped, kept)
    torch.testing.assert_close(at_other_times, timed.diffusers(swapped, timed.features), **CLOSE)
    fixed = [at_time(kept, time, timed.adapter.injection.sizes, torch.float32) for time in TIMES]
    assert not torch.allclose(*(one.keys[0] for one in fixed))  # the tokens follow the time


def test_the_original_file_and_diffusers_names_are_one_adapter(
    timed: Timed, tmp_path: Path
) -> None:
    file, inputs = read_adapter(timed.path), timed.inputs(0, 1)
    assert (file.layout, file.tokens, file.feature_dim) == ("instantx-sd3", 4, E)
    assert "8-wide penultimate hidden states" in file.suits()
    ours = timed.ours(inputs, timed.prompt(0, 1))
    for layout, name in (("instantx-sd3", "a.bin"), ("diffusers-sd3", "a.safetensors")):
        write_adapter(tmp_path / name, read_adapter(timed.path), layout)
        again = read_adapter(tmp_path / name)
        assert again.layout == layout
        assert again.projection.keys() == file.projection.keys()
        other = load_adapter(tmp_path / name, timed.model)
        with other.attached(timed.model):
            prompt = other.prompt(other.tokens(timed.features), scale=0.7)
            assert torch.equal(timed.ours(inputs, prompt), ours)
    back = torch.load(tmp_path / "a.bin")
    assert {outer: own.keys() for outer, own in back.items()} == {
        outer: own.keys() for outer, own in nested(timed.tensors).items()
    }
    for outer, own in nested(timed.tensors).items():
        assert all(torch.equal(back[outer][key], tensor) for key, tensor in own.items())


def test_diffusers_names_are_those_that_diffusers_holds(timed: Timed, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", read_adapter(timed.path), "diffusers-sd3")
    from safetensors.torch import load_file

    names = {key for key in load_file(tmp_path / "a.safetensors") if key.startswith("image_proj.")}
    assert names == {f"image_proj.{key}" for key in timed.theirs.image_proj.state_dict()}


def test_prompts_of_one_batch_equal_runs_alone(timed: Timed) -> None:
    together = timed.ours(timed.inputs(0, 1), timed.prompt(0, 1))
    for item in (0, 1):
        alone = timed.ours(timed.inputs(item), timed.prompt(item))
        torch.testing.assert_close(together[item : item + 1], alone, rtol=0, atol=1e-6)


def test_requests_at_other_times_share_a_call(timed: Timed) -> None:
    family = family_of(timed.model)
    engine = Engine(timed.model, family, timed.adapter.injection)
    calls = [SeatCall(timed.inputs(item), 1, [timed.prompt(item)]) for item in (0, 1)]
    alone = [engine.run([call])[0] for call in calls]
    for one, other in zip(engine.run(calls), alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    mixed = [calls[0], SeatCall(timed.inputs(1), 1, [])]
    outs = engine.run(mixed)
    torch.testing.assert_close(outs[0], alone[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(outs[1], timed.model(**timed.inputs(1)).sample, rtol=0, atol=1e-6)


def test_a_prompt_is_data(timed: Timed) -> None:
    """Copied, pickled, scaled, stacked: as the prompts of other adapters."""
    inputs, prompt = timed.inputs(0, 1), timed.prompt(0, 1)
    ours = timed.ours(inputs, prompt)
    assert torch.equal(timed.ours(inputs, copy.deepcopy(prompt)), ours)
    assert copy.deepcopy(prompt).form.adapter is timed.adapter
    assert torch.equal(timed.ours(inputs, pickle.loads(pickle.dumps(prompt))), ours)
    (items,) = stack_items([[timed.prompt(0)], [timed.prompt(1)]], (-1,))
    assert torch.equal(timed.ours(inputs, items), ours)
    assert prompt.bytes == prompt.patches.nbytes  # pyright: ignore[reportOptionalMemberAccess]
    alone = timed.model(**inputs).sample
    assert torch.equal(timed.ours(inputs, prompt, prompt.with_scale(0.0)), ours)
    assert not torch.allclose(timed.ours(inputs, prompt, timed.prompt(1, 0)), ours)
    mask = torch.zeros(1, 4, 4)
    assert torch.equal(timed.ours(inputs, prompt._replace(mask=mask)), alone)
    early, layers = torch.ones(3, 1, 100), torch.zeros(3)
    early[..., 30:] = 0  # the first item is early, the second is not
    windowed = timed.ours(inputs, prompt.with_scale(early))
    assert torch.equal(windowed[1], alone[1])
    assert not torch.allclose(windowed[0], alone[0])
    for layer in range(3):
        one = layers.clone()
        one[layer] = 1
        assert not torch.equal(timed.ours(inputs, prompt.with_scale(one)), alone)


def test_tokens_of_several_pictures_are_joined_in_the_one_softmax(timed: Timed) -> None:
    inputs, prompt = timed.inputs(0, 1), timed.prompt(0, 1)
    adapter, made = timed.adapter, timed.adapter.tokens(timed.features)
    twice = adapter.prompt(torch.stack([made, made], 1), scale=0.7)
    weighted = prompt._replace(bias=torch.full((1, 4), 2.0).log())  # weight 2: as given twice
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(timed.ours(inputs, twice), timed.ours(inputs, weighted), **close)
    assert not torch.allclose(timed.ours(inputs, twice), timed.ours(inputs, prompt))
    both = adapter.prompt(made[None], scale=0.7)  # two pictures, for all rows
    turned = adapter.prompt(made.flip(0)[None], scale=0.7)
    torch.testing.assert_close(timed.ours(inputs, both), timed.ours(inputs, turned), **close)
    one = both._replace(bias=torch.tensor([[0.0] * 4 + [-1e9] * 4]))
    alone = timed.prompt(0)
    torch.testing.assert_close(timed.ours(inputs, one), timed.ours(inputs, alone), **close)
    with pytest.raises(MismatchError, match=r"bias of shape \[1, 3\]: give \(1 or 2, 4 image"):
        timed.ours(inputs, prompt._replace(bias=torch.zeros(1, 3)))


def test_a_further_call_of_half_the_rows_is_the_positive_branch(timed: Timed) -> None:
    """As in SD3's skip-layer guidance, where diffusers merges both branches into one prompt."""
    both, inputs = timed.prompt(0, null=True), timed.inputs(0)
    twice = {name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in inputs.items()}
    zeros = torch.zeros(1, PATCHES, E)
    branches = torch.cat([zeros, timed.features[:1]])
    skipped = inputs | {"skip_layers": [1]}
    with timed.adapter.using(both):
        outs = [timed.model(**given).sample for given in (twice, inputs, skipped)]
    theirs = [
        timed.diffusers(twice, branches),
        timed.diffusers(inputs, timed.features[:1]),
        timed.diffusers(skipped, timed.features[:1]),
    ]
    for ours, expected in zip(outs, theirs, strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)
    assert not torch.allclose(outs[1], outs[2])
    for rows in (1, 4):  # alone, nothing tells that such a call is the positive branch
        own = {name: torch.cat([tensor] * rows) for name, tensor in inputs.items()}
        with pytest.raises(MismatchError, match=f"prepared for a batch of 2, .* a batch of {rows}"):
            timed.ours(own, both)


def test_half_precision_is_finite_and_near(timed: Timed) -> None:
    inputs = timed.inputs(0, 1)
    whole = timed.ours(inputs, timed.prompt(0, 1))
    model = specimen("sd3", **MEDIUM).to(torch.bfloat16)
    adapter = load_adapter(timed.path, model)
    adapter.image_kv.to(torch.bfloat16)
    half = {name: tensor.bfloat16() for name, tensor in inputs.items() if name != "timestep"}
    with adapter.attached(model):
        prompt = adapter.prompt(adapter.tokens(timed.features), scale=0.7)
        with adapter.using(prompt):
            out = model(**half, timestep=inputs["timestep"]).sample
    assert out.isfinite().all()
    assert (out.float() - whole).abs().max() < 0.1 * whole.abs().max()


def test_what_does_not_fit_is_one_line(timed: Timed, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="norms are for heads 8 wide; those of this model at"):
        load_adapter(
            timed.path, specimen("sd3", **MEDIUM, attention_head_dim=16, num_attention_heads=2)
        )
    prompt = timed.prompt(0)
    other = Kind("instantx", tmp_path)
    with (
        other.adapter.attached(other.model),
        pytest.raises(MismatchError, match="is of an adapter for sd3; this model is of the flux"),
        other.adapter.using(prompt),
    ):
        other.model(**other.inputs)
    tensors = timed.tensors | {"ip_adapter.1.norm_ip.linear.weight": torch.zeros(64, 9)}
    torch.save(nested(tensors), tmp_path / "told.bin")
    with pytest.raises(
        CheckpointError, match="layer 1 is told the time in 9 numbers; the projectio"
    ):
        read_adapter(tmp_path / "told.bin")
    timed.model.fuse_qkv_projections()  # it replaces the processors
    with pytest.raises(MismatchError, match="replaced the adapter's processor"):
        timed.ours(timed.inputs(0), prompt)
    with pytest.raises(
        MismatchError, match=r"read to_q of each attention, which this model does not"
    ):
        own_states({}, LayerConditioning((), torch.ones(1), slice(None), prompt.form, ()), 1)


# --- The whole pipeline.


class Saved:
    """A pipeline and its image encoder in a folder, and diffusers' own with the adapter."""

    def __init__(self, folder: Path) -> None:
        self.model, self.path = folder / "model", folder / "ip-adapter.bin"
        with seeded(4):
            encoder = transformers.SiglipVisionModel(
                transformers.SiglipVisionConfig(
                    hidden_size=WIDTH,
                    intermediate_size=24,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    image_size=16,
                    patch_size=4,
                )
            ).eval()
            for parameter in encoder.parameters():
                parameter.data.normal_(std=0.5)  # so that pictures differ
        processor = transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16})
        with seeded(12):
            torch.save(nested(sd3(32, 32, 3, embedding=WIDTH)), self.path)
        self.theirs = tiny_pipeline("sd3", **MEDIUM)
        self.theirs.save_pretrained(self.model)
        encoder.save_pretrained(self.model / "image_encoder")
        processor.save_pretrained(self.model / "image_encoder")
        self.theirs.register_modules(image_encoder=encoder, feature_extractor=processor)
        self.theirs.load_ip_adapter(
            str(folder), weight_name=self.path.name, image_encoder_folder=None
        )

    def ours(self, **options: Any) -> ImagePromptPipeline:
        return ImagePromptPipeline.from_pretrained(
            str(self.model), adapter=self.path, device="cpu", **options
        )

    def diffusers(self, picture: Image.Image, scale: float, **call: Any) -> np.ndarray:
        self.theirs.set_ip_adapter_scale(scale)
        generator = [torch.Generator().manual_seed(3)]
        settings = {"num_inference_steps": 5, "max_sequence_length": TEXT_TOKENS, **SIZE, **call}
        made = self.theirs("a cat", ip_adapter_image=picture, generator=generator, **settings)
        return np.asarray(made.images[0]).astype(int)  # pyright: ignore


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("sd3"))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
RED = Image.new("RGB", (30, 20), "red")


def made(pipe: ImagePromptPipeline, image: Any = NOISE, **call: Any) -> np.ndarray:
    settings = {"steps": 5, "guidance": 5.0, "seed": 3, "scale": 0.6, **SIZE, **call}
    return np.asarray(pipe(image, "a cat", **settings).images[0]).astype(int)


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_the_pictures_of_a_pipeline_are_those_of_diffusers(saved: Saved, guidance: float) -> None:
    """With guidance the negative branch reads zero features."""
    pipe = saved.ours()
    pictures = []
    for picture, scale in ((NOISE, 0.6), (RED, 0.6), (NOISE, 1.0)):
        wanted = saved.diffusers(picture, scale, guidance_scale=guidance)
        pictures.append(made(pipe, picture, scale=scale, guidance=guidance))
        assert np.array_equal(pictures[-1], wanted)
    least = 3 if guidance > 1 else 0
    assert all(abs(pictures[0] - other).max() > least for other in pictures[1:])


def test_a_pipeline_of_diffusers_with_the_adapter_attached_is_diffusers(saved: Saved) -> None:
    """Latents after five steps with guidance, without the facade and before any rounding."""
    call: Any = {"num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "latent", **SIZE}
    plain, outs = tiny_pipeline("sd3", **MEDIUM), []
    file = read_adapter(saved.path)
    adapter = load_adapter(saved.path, plain.transformer)
    features = saved.theirs.encode_image(NOISE, torch.device("cpu"))
    saved.theirs.set_ip_adapter_scale(0.6)
    with torch.no_grad(), adapter.attached(plain.transformer):
        null = adapter.tokens(torch.zeros_like(features))
        prompt = adapter.prompt(adapter.tokens(features), null, scale=0.6)
        for pipe, more in ((saved.theirs, {"ip_adapter_image": NOISE}), (plain, {})):
            generator = torch.Generator().manual_seed(3)
            with adapter.using(prompt) if pipe is plain else nullcontext():
                outs.append(pipe("a cat", generator=generator, **call, **more).images)
    assert features.shape == (1, 16, file.feature_dim)
    torch.testing.assert_close(outs[1], outs[0], **CLOSE)


def test_what_the_facade_does_with_other_prompts_it_does_with_these(saved: Saved) -> None:
    pipe = saved.ours()
    left = Image.new("L", (24, 32))
    left.paste(255, (0, 0, 12, 32))
    several = Reference(images=[NOISE, RED], weights=[1.0, 2.0])
    items = [NOISE, Reference(images=RED, mask=left, end=0.6), several, [NOISE, several]]
    settings: Any = {"steps": 3, "guidance": 3.0, "scale": 0.6, **SIZE}
    together = pipe(items, seed=5, **settings).images
    for number, item in enumerate(items):
        alone = pipe([item], seed=5 + number, **settings).images[0]
        gap = np.asarray(together[number]).astype(int) - np.asarray(alone).astype(int)
        assert abs(gap).max() <= 1
    average = Reference(images=[NOISE, RED], combine="average")
    assert abs(made(pipe, average) - made(pipe)).max() > 0
    assert abs(made(pipe, several) - made(pipe)).max() > 0
    same = Reference(images=[NOISE, NOISE], weights=[1.0, 0.0])
    assert np.array_equal(made(pipe, same), made(pipe))
    skipped = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}
    assert abs(made(pipe, pipeline_options=skipped) - made(pipe)).max() > 0
    assert abs(made(pipe, image_guidance=5.0) - made(pipe)).max() <= 1
    assert abs(made(pipe, image_guidance=9.0) - made(pipe)).max() > 1


def test_what_the_facade_cannot_do_is_refused_before_a_step(saved: Saved, tmp_path: Path) -> None:
    pipe = saved.ours()
    steps: list[int] = []
    with pytest.raises(SettingError, match=r"embeds_scaling = 'K\+V': .* leave it out"):
        made(pipe, Reference(images=NOISE, embeds_scaling="K+V"), on_step=steps.append)
    assert not steps
    other = tiny_encoder()
    for part in (other.model, other.processor):
        part.save_pretrained(tmp_path / "encoder")
    with pytest.raises(MismatchError, match=r"reads 16-wide penultimate features .* gives 32-wide"):
        saved.ours(encoder=tmp_path / "encoder")


def test_compiled_it_is_one_graph_for_all_times(
    saved: Saved, counter: CompileCounterWithBackend
) -> None:
    fast, plain = saved.ours(compile=True), saved.ours()
    for call in ({}, {"scale": 0.3}, {"scale": 0.0}, {"image": RED, "steps": 2}):
        assert abs(made(fast, **call) - made(plain, **call)).max() <= 1
        assert counter.frame_count == 1


# --- InstantCharacter: its attention and projection, written out from the original's.


def heads_of(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class Original:
    """What the original computes, of the tensors in its file."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str) -> None:
        self.t = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.t[f"{name}.weight"], self.t.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.t[f"{name}.weight"], self.t[f"{name}.bias"], eps)

    def block(self, key: str, x: Tensor, other: Tensor) -> Tensor:
        """diffusers' BasicTransformerBlock: itself, the other features, GEGLU."""
        for number in (1, 2):
            own = self.norm(f"{key}norm{number}", x, 1e-6)
            read, name = (own, other)[number - 1], f"{key}attn{number}."
            q, k, v = (
                heads_of(self.linear(f"{name}to_{part}", given), 64)
                for part, given in (("q", own), ("k", read), ("v", read))
            )
            x = x + self.linear(f"{name}to_out.0", attend(q, k, v))
        gated = self.linear(f"{key}ff.net.0.proj", self.norm(f"{key}norm3", x, 1e-6))
        value, gate = gated.chunk(2, -1)
        return x + self.linear(f"{key}ff.net.2", value * F.gelu(gate))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x), approximate="tanh"))

    def resample(self, x: Tensor, time: Tensor) -> Tensor:
        half = self.t["time_embedding.linear_1.weight"].shape[1] // 2
        angle = time[:, None] * 10000 ** (-torch.arange(half) / half)
        moment = self.linear("time_embedding.linear_1", torch.cat([angle.cos(), angle.sin()], 1))
        moment = self.linear("time_embedding.linear_2", F.silu(moment))[:, None]
        x = self.linear("proj_in", x) + moment
        latents = self.t["latents"].expand(len(x), -1, -1)
        for layer in range(4):
            key = f"layers.{layer}."
            shift, scale, late, more = self.linear(f"{key}2.1", F.silu(moment)).chunk(4, -1)
            own = self.norm(f"{key}0.norm2", latents) * (1 + scale) + shift
            both = torch.cat([self.norm(f"{key}0.norm1", x), own], 1)
            k, v = self.linear(f"{key}0.to_kv", both).chunk(2, -1)
            q = self.linear(f"{key}0.to_q", own)
            out = attend(*(heads_of(part, 64) for part in (q, k, v)))
            latents = latents + self.linear(f"{key}0.to_out", out)
            fed = self.norm(f"{key}1.0", latents) * (1 + more) + late
            latents = latents + self.linear(f"{key}1.3", F.gelu(self.linear(f"{key}1.1", fed)))
        return self.norm("norm_out", self.linear("proj_out", latents))

    def project(self, shallow: Tensor, deep: Tensor, tiles: Tensor) -> Tensor:
        layers = scales = deep
        for number in range(2):
            layers = self.block(f"cross_layer_blocks.{number}.", layers, shallow)
            scales = self.block(f"cross_scale_blocks.{number}.", scales, tiles)
        layers, scales = self.mlp("proj_cross_layer", layers), self.mlp("proj_cross_scale", scales)
        return torch.cat([self.mlp("proj", deep) + scales, layers], 1)


class Character:
    """The official attention for Flux: a query of its own, no rotary, the picture's rows alone."""

    def __init__(self, own: Original, tokens: Tensor, text: int, scale: float) -> None:
        self.own, self.tokens, self.text, self.scale = own, tokens, text, scale

    def normed(self, name: str, x: Tensor) -> Tensor:
        rms = x.norm(2, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return self.own.t[f"{name}.scale"] * (x / (rms + 1e-6))

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,  # noqa: ARG002 - passed on by its signature
        image_rotary_emb: Any = None,
    ) -> Any:
        plain: Any = FluxAttnProcessor()
        query = attn.to_q(hidden_states)
        start = self.text if encoder_hidden_states is None else 0
        width = attn.head_dim
        key, value = (self.own.linear(f"to_{part}_ip", self.tokens) for part in "kv")
        image = self.scale * attend(
            self.normed("norm_ip_q", heads_of(query[:, start:], width)),
            self.normed("norm_ip_k", heads_of(key, width)),
            heads_of(value, width),
        )
        out = plain(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)
        if encoder_hidden_states is None:
            return torch.cat([out[:, :start], out[:, start:] + image], 1)
        # the output layer is linear: what is added before it is added after it by its weight
        return out[0] + F.linear(image, attn.to_out[0].weight), out[1]


def test_instantcharacter_is_the_official_formula(tmp_path: Path) -> None:
    """At two times: the items' own timesteps."""
    kind, theirs = Kind("instantcharacter", tmp_path), specimen("flux")
    kind.inputs["timestep"] = torch.tensor(TIMES) / 1000
    projection = Original(kind.tensors, "image_proj.")
    patches = projection.project(*kind.embedding)
    tokens = Original(kind.tensors, "image_proj.resampler.").resample(
        patches, kind.inputs["timestep"] * 1000
    )
    text = kind.inputs["encoder_hidden_states"].shape[1]
    names = [name for name, module in theirs.named_modules() if name.endswith(".attn")]
    for number, name in enumerate(names):
        own = Original(kind.tensors, f"ip_adapter.{number}.")
        theirs.get_submodule(name).processor = Character(own, tokens, text, 0.7)
    with torch.no_grad():
        out, ours = answer(theirs, kind.inputs), kind.ours()
        at_one_time = kind.inputs | {"timestep": torch.full((2,), TIMES[0] / 1000)}
        torch.testing.assert_close(ours, out, **CLOSE)
        made = kind.adapter.tokens(kind.embedding)
        read = kind.adapter.projection.at(made, torch.tensor(TIMES))[0]  # pyright: ignore
    torch.testing.assert_close(read, tokens, rtol=0, atol=1e-4)
    assert len(names) == 4
    assert not torch.equal(answer(theirs, at_one_time), out)


def tiny_vision(kind: str, patch: int = 4) -> VisionEncoder:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 16}
    more = {"intermediate_size": 24} if kind == "Siglip" else {"mlp_ratio": 2}
    config = getattr(transformers, f"{kind}VisionConfig" if kind == "Siglip" else f"{kind}Config")
    model = getattr(transformers, f"{kind}VisionModel" if kind == "Siglip" else f"{kind}Model")
    with seeded(21):
        made = model(config(patch_size=patch, **sizes, **more))
    if kind == "Siglip":
        return VisionEncoder(
            made, transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16})
        )
    return VisionEncoder(made, transformers.BitImageProcessorPil(**dinov2_settings(made.config)))


def test_features_of_instantcharacter_are_the_official_ones(tmp_path: Path) -> None:
    """SigLIP's and DINOv2's, of the whole picture at several levels and of four tiles."""
    siglip, dinov2 = tiny_vision("Siglip"), tiny_vision("Dinov2")
    levels = ("levels 1,2,4", "levels 0,2,3")
    shallow, deep, tiles = character_features(NOISE, siglip, dinov2, levels)
    square = NOISE.resize((30, 30))
    small, large = square.resize((16, 16)), square.resize((32, 32))
    corners = [(0, 0), (16, 0), (0, 16), (16, 16)]
    cut = [large.crop((x, y, x + 16, y + 16)) for x, y in corners]
    mean, std = (torch.tensor(IMAGENET[f"image_{name}"]).view(3, 1, 1) for name in ("mean", "std"))

    def of(pictures: list[Image.Image]) -> list[Any]:
        raw = torch.stack([torch.tensor(np.asarray(one)) for one in pictures]).permute(0, 3, 1, 2)
        raw = raw / 255
        with torch.no_grad():
            return [
                siglip.model((raw - 0.5) / 0.5, output_hidden_states=True),
                dinov2.model((raw - mean) / std, output_hidden_states=True),
            ]

    one, other = of([small])
    wanted = torch.cat([one.last_hidden_state, other.last_hidden_state[:, 1:]], 2)
    torch.testing.assert_close(deep, wanted, **CLOSE)
    pairs = zip((1, 2, 4), (0, 2, 3), strict=True)
    by_level = [
        torch.cat([one.hidden_states[a], other.hidden_states[b][:, 1:]], 2) for a, b in pairs
    ]
    torch.testing.assert_close(shallow, torch.cat(by_level, 1), **CLOSE)
    one, other = of(cut)
    wanted = torch.cat([one.last_hidden_state, other.last_hidden_state[:, 1:]], 2).reshape(
        1, 64, 64
    )
    torch.testing.assert_close(tiles, wanted, **CLOSE)
    with pytest.raises(MismatchError, match="SigLIP gives 16 patches and DINOv2 4: InstantCharac"):
        character_features(NOISE, siglip, tiny_vision("Dinov2", 8), levels)
    kind = Kind("instantcharacter", tmp_path)
    with torch.no_grad(), kind.adapter.attached(kind.model):
        prompt = kind.adapter.prompt(kind.adapter.tokens((shallow, deep, tiles)))
        assert prompt.patches is not None
        assert prompt.patches.shape == (1, 1, 32, 16)
        with kind.adapter.using(prompt):
            assert answer(kind.model, kind.inputs).isfinite().all()


def test_a_pipeline_says_that_instantcharacter_reads_two_encoders(tmp_path: Path) -> None:
    kind = Kind("instantcharacter", tmp_path)
    tiny_pipeline("flux").save_pretrained(tmp_path / "flux")
    assert "64-wide features of SigLIP and DINOv2 together" in read_adapter(kind.path).suits()
    with pytest.raises(
        MismatchError, match="reads SigLIP and DINOv2 together, and a pipeline load"
    ):
        ImagePromptPipeline.from_pretrained(str(tmp_path / "flux"), adapter=kind.path, device="cpu")


def test_an_adapter_of_some_layers_goes_through_a_pipeline(tmp_path: Path) -> None:
    """XLabs' conditions the double blocks alone: its scales are for these."""
    with seeded(13):
        save_file(xlabs(32, 32, 2, embedding=FEATURE_DIMS["pooled"]), tmp_path / "a.safetensors")
    tiny_pipeline("flux").save_pretrained(tmp_path / "model")
    encoder = tiny_encoder()
    for part in (encoder.model, encoder.processor):
        part.save_pretrained(tmp_path / "model" / "image_encoder")
    pipe = ImagePromptPipeline.from_pretrained(
        str(tmp_path / "model"), adapter=tmp_path / "a.safetensors", device="cpu"
    )
    alone = made(pipe, scale=0.0, guidance=1.0)
    assert abs(made(pipe, guidance=1.0) - alone).max() > 0
    assert np.array_equal(made(pipe, Reference(images=NOISE, blocks=0.0), guidance=1.0), alone)
