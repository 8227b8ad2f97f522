"""Published adapters in whole pipelines of several steps, on tiny random models.

The reference is diffusers' own `load_ip_adapter` where there is one, else the original's attention
in the same pipeline.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from imprompt import ImagePromptPipeline
from imprompt.checkpoints.adapters import load_adapter
from imprompt.families.base import base_of
from tests.parity.test_published import OFFICIAL, hunyuandit, instantx, xlabs
from tests.parts import tiny_t5
from tests.tiny import FEATURE_DIMS, paper_layout, pictures, seeded, tiny_adapter, tiny_encoder
from tests.tiny_pipelines import tiny_pipeline

E = FEATURE_DIMS["pooled"]
CLOSE = {"rtol": 0, "atol": 1e-5}
CALL = {"num_inference_steps": 4, "output_type": "latent", "return_dict": False}
TEXTS = {"prompt": "a cat", "negative_prompt": "a dog"}
# The name of T5 in the pipeline, options of a call with both branches of guidance, and the pipeline
# that starts from a picture.
BASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "flux": ("text_encoder_2", {"true_cfg_scale": 3.0}, "FluxImg2ImgPipeline"),
    "chroma": ("text_encoder", {"guidance_scale": 3.0}, "ChromaImg2ImgPipeline"),
}
VERSIONS = {"v1": (32, 4), "v2": (4096, 16)}  # diffusers knows v2 by 16 tokens of that width


class Features(NamedTuple):
    """Image features and those of no image."""

    own: Tensor
    null: Tensor

    @classmethod
    def drawn(cls, *shape: int) -> "Features":
        with seeded(5):
            return cls(torch.randn(1, *shape), torch.randn(1, *shape))


@torch.no_grad()
def run(pipeline: Any, height: int = 32, width: int = 24, **options: Any) -> Tensor:
    """Return the latents of a call from the same noise."""
    sizes = {"height": height, "width": width, "generator": torch.Generator().manual_seed(1)}
    return pipeline(**TEXTS | CALL | sizes | options)[0]


@torch.no_grad()
def ours(pipeline: Any, path: Path, features: Features, scale: float, **options: Any) -> Tensor:
    base = base_of(pipeline)
    adapter = load_adapter(path, base)
    with adapter.attached(base):
        both = adapter.tokens(features.own), adapter.tokens(features.null)
        with adapter.using(adapter.prompt(*both, scale=scale)):
            return run(pipeline, **options)


def saved(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path := folder / "adapter.safetensors")
    return path


def xlabs_file(folder: Path, version: str) -> Path:
    width, tokens = VERSIONS[version]
    with seeded(11):
        return saved(folder, xlabs(width, 32, 2, tokens, E))


def check(found: Tensor, wanted: Tensor, alone: Tensor) -> None:
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert (found - alone).abs().max() > 0.05  # the comparison means something


@pytest.mark.parametrize("start", [False, True], ids=["text", "picture"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_xlabs_is_diffusers(base: str, version: str, start: bool, tmp_path: Path) -> None:
    text_encoder, options, img2img = BASES[base]
    path, (width, _) = xlabs_file(tmp_path, version), VERSIONS[version]
    pipeline = tiny_pipeline(base, joint_attention_dim=width)
    pipeline.register_modules(**{text_encoder: tiny_t5(width)["text_encoder"]})
    if start:
        pipeline = getattr(diffusers, img2img)(**pipeline.components)
        pipeline.set_progress_bar_config(disable=True)
        options = options | {"image": pictures(1)[0], "strength": 0.8}
    features = Features.drawn(E)
    alone, found = run(pipeline, **options), ours(pipeline, path, features, 0.7, **options)
    pipeline.load_ip_adapter(
        str(tmp_path),
        weight_name=path.name,
        image_encoder_pretrained_model_name_or_path=None,
        low_cpu_mem_usage=False,
    )
    pipeline.set_ip_adapter_scale(0.7)
    given = {
        "ip_adapter_image_embeds": [features.own[:, None]],
        "negative_ip_adapter_image_embeds": [features.null[:, None]],
    }
    check(found, run(pipeline, **options, **given), alone)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_pictures_of_one_prompt_are_what_they_are_alone(base: str, tmp_path: Path) -> None:
    """Each branch of guidance is a call of two rows, as many as the prompt has of both branches."""
    _, options, _ = BASES[base]
    path, pipeline, features = xlabs_file(tmp_path, "v1"), tiny_pipeline(base), Features.drawn(E)

    def made(*seeds: int) -> Tensor:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        given = options | {"generator": noise, "num_images_per_prompt": len(seeds)}
        return ours(pipeline, path, features, 0.7, **given)

    torch.testing.assert_close(made(1, 2), torch.cat([made(1), made(2)]), **CLOSE)


# Pipeline, tensors of a file, options of the call; with guidance the negative branch comes first.
WRITTEN_OUT: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "instantx": ("flux", lambda: instantx(32, 32, 4, embedding=E), {}),
    "hunyuandit": (
        "hunyuandit",
        lambda: hunyuandit(8, 16, 2, embedding=E),
        {"height": 64, "width": 48, "guidance_scale": 3.0, "use_resolution_binning": False},
    ),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_attention_written_out(name: str, tmp_path: Path) -> None:
    base, tensors, options = WRITTEN_OUT[name]
    with seeded(11):
        path = saved(tmp_path, held := tensors())
    pipeline, features = tiny_pipeline(base), Features(Features.drawn(E).own, torch.zeros(1, E))
    alone, found = run(pipeline, **options), ours(pipeline, path, features, 0.7, **options)
    given = torch.cat([features.null, features.own]) if options else features.own
    OFFICIAL[name](base_of(pipeline), held, given, 0.7)
    check(found, run(pipeline, **options), alone)


@pytest.mark.parametrize("start", [False, True], ids=["text", "picture"])
def test_kolors_plus_is_diffusers(start: bool, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    pipeline, options = tiny_pipeline("kolors"), {"guidance_scale": 3.0, "height": 32, "width": 24}
    held = paper_layout(tiny_adapter(pipeline.unet, "plus"))
    flat = {f"{part}.{key}": one for part, own in held.items() for key, one in own.items()}
    path = saved(tmp_path, {key: tensor.contiguous() for key, tensor in flat.items()})
    if start:
        pipeline = diffusers.KolorsImg2ImgPipeline(**pipeline.components)
        pipeline.set_progress_bar_config(disable=True)
        options |= {"image": pictures(1)[0], "strength": 0.8}
    features = Features.drawn(257, FEATURE_DIMS["penultimate"])
    alone, found = run(pipeline, **options), ours(pipeline, path, features, 0.7, **options)
    pipeline.load_ip_adapter(
        str(tmp_path),
        subfolder="",
        weight_name=path.name,
        image_encoder_folder=None,
        low_cpu_mem_usage=False,
    )
    pipeline.set_ip_adapter_scale(0.7)
    both = torch.cat([features.null, features.own])[:, None]
    check(found, run(pipeline, **options, ip_adapter_image_embeds=[both]), alone)


class Facade:
    """A facade over a tiny pipeline with a published adapter, and its picture's features."""

    def __init__(self, pipeline: Any, path: Path, options: dict[str, Any]) -> None:
        self.encoder, self.picture = tiny_encoder(), pictures(1)[0]
        for part in (self.encoder.model, self.encoder.processor):
            part.save_pretrained(path.parent / "encoder")
        self.pipeline = pipeline
        self.facade = ImagePromptPipeline.from_pipeline(
            pipeline, path, encoder=path.parent / "encoder"
        )
        self.limit = self.facade.family.call_options(pipeline)  # of the text, among others
        self.options = {"output_type": "latent"} | options

    def made(self, **asked: Any) -> Tensor:
        """Return the latents of one call, and restore the base."""
        call = {"seed": 1, "steps": 4, "scale": 0.7, "width": 24, "height": 32} | asked
        images = self.facade(
            self.picture, "a cat", negative_prompt="a dog", pipeline_options=self.options, **call
        ).images
        self.facade.detach()
        return torch.stack([*images])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_facade_is_diffusers_black_negative_too(base: str, tmp_path: Path) -> None:
    """diffusers takes the picture of no image to be black, as XLabs does."""
    _, options, _ = BASES[base]
    path, pipeline = xlabs_file(tmp_path, "v1"), tiny_pipeline(base)
    one = Facade(pipeline, path, options if base == "flux" else {})
    found = one.made(**({} if base == "flux" else {"guidance": 3.0}))
    alone = run(pipeline, **options, **one.limit)
    parts = {"image_encoder": one.encoder.model, "feature_extractor": one.encoder.processor}
    theirs = type(pipeline)(**pipeline.components | parts)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_ip_adapter(str(tmp_path), weight_name=path.name, low_cpu_mem_usage=False)
    theirs.set_ip_adapter_scale(0.7)
    wanted = run(theirs, **options, ip_adapter_image=one.picture, **one.limit)
    check(found, wanted, alone)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_facade_opens_hunyuandit(tmp_path: Path) -> None:
    base, tensors, options = WRITTEN_OUT["hunyuandit"]
    with seeded(11):
        path = saved(tmp_path, tensors())
    one = Facade(tiny_pipeline(base), path, {})
    sizes = {name: options[name] for name in ("height", "width")}
    found = one.made(guidance=3.0, **sizes)
    feature = one.encoder.features([one.picture], "pooled")
    features = Features(feature, torch.zeros_like(feature))
    wanted = ours(one.pipeline, path, features, 0.7, **options)
    check(found, wanted, run(one.pipeline, **options))
