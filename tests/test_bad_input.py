"""Bad input on the command line: one line that says what is wrong, exit code 2, and nothing
half-written.
"""

import errno
import json
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.utils import logging as diffusers_log
from huggingface_hub import constants as hub
from PIL import Image, PngImagePlugin
from transformers.utils import logging as transformers_log

from imprompt.adapter import ImageKV, ImageProjection, IPAdapter
from imprompt.checkpoints.adapters import Origin, read_adapter, save_adapter, write_adapter
from imprompt.cli import main
from imprompt.families.unet import UNET
from imprompt.generation.pipeline import ImagePromptPipeline
from imprompt.generation.request import Request
from imprompt.models import PACKAGED, hub_answers
from imprompt.training.state import save_state
from imprompt.variants import find_variant
from tests.tiny import FEATURE_DIMS, tiny_adapter, tiny_encoder
from tests.tiny_pipelines import PIPELINES

LOGS = (diffusers_log, transformers_log)
SIDE = 16  # pixels of the tiny model's pictures
MODEL = "--model {model} --adapter {adapter}"
RECIPE = """
model = "{model}"
output = "{run}"
[data]
source = "{pictures}"
[optimization]
steps = 1
precision = "fp32"
"""


# The files that the tables name


class Code:
    """A pickle of this touches a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


def save_model(at: Path) -> Any:
    pipe = PIPELINES["sd1"]()
    pipe.unet.register_to_config(sample_size=SIDE // 2)
    pipe.save_pretrained(at)
    return pipe


def save_adapters(at: Path, pipe: Any) -> None:
    """One that fits the model, and every kind of one that does not."""
    unet, row, names = pipe.unet, find_variant("base"), list(UNET.layers(pipe.unet))
    fit = tiny_adapter(unet)
    encoder = tiny_encoder()
    save_adapter(
        at / "adapter.safetensors",
        fit,
        row,
        names,
        Origin(encoder_fingerprint=encoder.fingerprint()),
    )
    whole = read_adapter(at / "adapter.safetensors")
    write_adapter(at / "plain.bin", whole, "paper")

    def other(name: str, token_dim: int, layers: int) -> None:
        pairs = [ImageKV(token_dim, 2) for _ in range(layers)]
        adapter = IPAdapter(ImageProjection(FEATURE_DIMS["pooled"], token_dim), pairs, UNET)
        save_adapter(at / name, adapter, row, [f"site.{n}" for n in range(layers)])

    other("sdxl.safetensors", 2048, 70)
    other("sites.safetensors", 32, len(names) + 1)
    data = (at / "adapter.safetensors").read_bytes()
    (at / "cut.safetensors").write_bytes(data[: len(data) // 2])
    (at / "garbage.safetensors").write_bytes(bytes(range(256)) * 20)
    (at / "empty.safetensors").touch()
    tensors = safetensors.torch.load_file(at / "adapter.safetensors")
    key = next(iter(tensors))
    safetensors.torch.save_file(
        {**tensors, key: tensors[key] * float("nan")}, at / "nan.safetensors", whole_metadata(at)
    )
    safetensors.torch.save_file(
        {k: t for k, t in tensors.items() if k != key}, at / "part.safetensors", whole_metadata(at)
    )
    safetensors.torch.save_file(
        {"unet.to_q_lora.down.weight": torch.ones(2, 2)}, at / "lora.safetensors"
    )
    torch.save({"image_proj": Code(at / "the code ran")}, at / "code.bin")
    (at / "newer-code.bin").write_bytes(
        pickle.dumps({"image_proj": Code(at / "the code ran")}, protocol=5)
    )
    (at / "notes.txt").write_text("no adapter")
    (at / "taken").touch()
    (at / "bare").mkdir()


def whole_metadata(at: Path) -> dict[str, str]:
    with safetensors.safe_open(at / "adapter.safetensors", "pt") as file:
        return file.metadata()


def save_models(at: Path, pipe: Any) -> None:
    """Image encoders that are not the adapter's, and folders that hold no model."""
    tiny_encoder(seed=99).model.save_pretrained(at / "encoder-weights")
    wide = type(pipe.image_encoder)(
        type(pipe.image_encoder.config)(
            **pipe.image_encoder.config.to_dict() | {"projection_dim": 40}
        )
    )
    wide.save_pretrained(at / "encoder-wide")
    for name in ("encoder-cut", "encoder-part"):
        shutil.copytree(at / "model" / "image_encoder", at / name)
    cut(at / "encoder-cut" / "model.safetensors")
    tensors = safetensors.torch.load_file(at / "encoder-part" / "model.safetensors")
    del tensors["visual_projection.weight"]
    safetensors.torch.save_file(
        tensors, at / "encoder-part" / "model.safetensors", {"format": "pt"}
    )
    shutil.copytree(at / "model", at / "model-cut")
    cut(at / "model-cut" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, index in (("model-odd", '{"_class_name": "NoPipeline"}'), ("model-damaged", "{")):
        (at / name).mkdir()
        (at / name / "model_index.json").write_text(index)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def save_pictures(at: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    cat = Image.fromarray(colours)
    cat.save(at / "cat.png")
    cat.save(at / "cat.jpg")
    (at / "cut.png").write_bytes((at / "cat.png").read_bytes()[:3000])
    (at / "empty.png").touch()
    (at / "text.png").write_text("no picture")
    Image.new("1", (10_001, 10_000)).save(at / "huge.png")
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(at / "animated.gif", save_all=True, append_images=frames[1:])
    cat.quantize(8).save(at / "palette.png", transparency=3)
    cat.convert("CMYK").save(at / "cmyk.jpg")
    Image.fromarray(colours[..., 0].astype(np.uint16) * 257).save(at / "deep.png")
    Image.new("RGBA", (30, 30), (255, 0, 0, 90)).save(at / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    cat.save(at / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1), "red").save(at / "dot.png")
    Image.new("RGB", (20_000, 10), "red").save(at / "strip.png")


def save_results(at: Path) -> None:
    """PNGs as results are, each wrong in one way."""

    def result(name: str, told: str) -> None:
        info = PngImagePlugin.PngInfo()
        info.add_itxt("imprompt", told)
        Image.new("RGB", (2, 2)).save(at / name, pnginfo=info)

    picture = {"path": str(at / "cat.png"), "sha256": "0" * 64}
    result("changed.png", json.dumps({"imprompt": "0", "images": [picture]}))
    result("vanished.png", json.dumps({"images": [{"path": str(at / "gone.png")}]}))
    result("damaged.png", "{")
    result("list.png", "[1]")
    result("newer.png", json.dumps({"images": [picture], "warp": 9}))
    result("poisoned.png", json.dumps({"images": [picture], "settings": {"steps": 0}}))
    named = {"images": [picture], "adapter": "fine"}
    adapters = ["base", {"adapter": "plus", "name": "fine"}]
    result("two.png", json.dumps({"images": [named, picture], "adapter": adapters}))
    result(
        "outside.png",
        json.dumps({"images": [str(at / "cat.png")], "only": 5, "settings": {"steps": 1}}),
    )


def save_recipes(at: Path) -> None:
    for name in ("pictures", "no-pictures", "bad-listing"):
        (at / name).mkdir()
    (at / "pictures" / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a"}')
    (at / "bad-listing" / "metadata.jsonl").write_text('{"file_name": "a.png"}\nno json')
    (at / "recipe.toml").write_text(
        RECIPE.format(model=at / "model", run=at / "run", pictures=at / "pictures")
    )
    (at / "short.toml").write_text('model = "emoji"')
    (at / "no.toml").write_text("model = ")
    (at / "binary.toml").write_bytes(b"\xff\xfe\x00")


@dataclass(frozen=True)
class World:
    """A folder of files, the names by which the tables call them, and the tiny model, loaded
    once.
    """

    folder: Path
    names: dict[str, Path]
    pipeline: ImagePromptPipeline


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    at = tmp_path_factory.mktemp("files")
    pipe = save_model(at / "model")
    save_adapters(at, pipe)
    save_models(at, pipe)
    save_pictures(at)
    save_results(at)
    save_recipes(at)
    adapter = at / "adapter.safetensors"
    loaded = ImagePromptPipeline.from_pretrained(str(at / "model"), adapter=adapter, device="cpu")
    return World(at, {"here": at, "model": at / "model", "adapter": adapter}, loaded)


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module", autouse=True)
def loud_again() -> Iterator[None]:
    """The commands silence the libraries; the other files' tests want to hear them."""
    before = [log.get_verbosity() for log in LOGS]
    yield
    for log, verbosity in zip(LOGS, before, strict=True):
        log.set_verbosity(verbosity)
        log.enable_progress_bar()


@pytest.fixture
def imprompt(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], Ended]:
    """Runs a command as the shell would; {names} are files, and {out} is a new folder."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    hub_answers.cache_clear()  # another test may have asked in this minute
    monkeypatch.chdir(tmp_path)

    def run(command: str) -> Ended:
        words = [
            word.format_map({**world.names, "out": tmp_path / "out"}) for word in command.split()
        ]
        monkeypatch.setattr(sys, "argv", ["imprompt", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(int(ended.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def loaded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find the model loaded already."""
    monkeypatch.setattr(Request, "load", lambda *_, **__: world.pipeline)


def files_in(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*")}


def assert_one_line(ended: Ended, words: str) -> None:
    assert ended.code == 2, ended
    assert ended.err.startswith("imprompt: ")
    assert ended.err.count("\n") == 1
    assert words in ended.err
    assert ended.out == ""


# The tables: what is wrong, the command, and what its one line says

WITH_CAT = f"generate {{here}}/cat.png --out {{out}} --steps 1 {MODEL}"
LIKE = "generate --like {here}/"
BAD_REQUESTS = [
    ("picture missing", "generate {here}/none.png", "none.png does not exist"),
    ("picture is a folder", "generate {here}/bare", "bare is a folder; name one picture in it"),
    ("picture empty", "generate {here}/empty.png", "empty.png is empty"),
    ("picture truncated", "generate {here}/cut.png", "cut.png is damaged, truncated"),
    (
        "picture is text",
        "generate {here}/text.png",
        "is not a picture of a known format (PNG, JPEG, WebP, …)",
    ),
    (
        "picture too large",
        "generate {here}/huge.png",
        "has 10001×10000 pixels, over the limit of 100,000,000 pixels; make it smaller",
    ),
    ("picture's name too long", "generate " + "a" * 300 + ".png", "File name too long"),
    ("second picture bad", "generate {here}/cat.png {here}/empty.png", "empty.png is empty"),
    ("no picture", "generate", "no image prompt was given: name at least one picture"),
    (
        "picture is an address",
        "generate https://example.com/cat.png",
        "https://example.com/cat.png: nothing is fetched from an address; download it first",
    ),
    ("init missing", "generate {here}/cat.png --init none.png", "none.png does not exist"),
    (
        "mask is text",
        "generate {here}/cat.png --init {here}/cat.png --mask {here}/text.png",
        "text.png is not a picture",
    ),
    (
        "mask without init",
        "generate {here}/cat.png --mask {here}/cat.png",
        "give that picture too (--init)",
    ),
    ("scale NaN", WITH_CAT + " --scale nan", "scale = nan: input should be a finite number"),
    ("scale infinite", WITH_CAT + " --scale=-inf", "scale = -inf: input should be a finite number"),
    (
        "scale huge",
        WITH_CAT + " --scale 1e9",
        "scale = 1000000000.0: input should be less than or equal to 10",
    ),
    (
        "guidance NaN",
        WITH_CAT + " --guidance nan",
        "guidance = nan: input should be a finite number",
    ),
    ("no steps", WITH_CAT + " --steps 0", "steps = 0: input should be greater than or equal to 1"),
    (
        "steps below zero",
        WITH_CAT + " --steps=-3",
        "steps = -3: input should be greater than or equal to 1",
    ),
    (
        "steps beyond the schedule",
        WITH_CAT + " --steps 5000",
        "steps = 5000: this model's noise schedule has 1000",
    ),
    (
        "no results",
        WITH_CAT + " -n 0",
        "num_images = 0: input should be greater than or equal to 1",
    ),
    (
        "seed below zero",
        WITH_CAT + " --seed=-1",
        "seed = -1: input should be greater than or equal to 0",
    ),
    (
        "seed too large",
        WITH_CAT + " --seed 99999999999999999999",
        "seed = 99999999999999999999: input should be",
    ),
    (
        "width odd",
        WITH_CAT + " --width 33",
        "width = 33: this model takes multiples of 8, such as 32 or 40",
    ),
    (
        "height odd",
        WITH_CAT + " --height 17",
        "height = 17: this model takes multiples of 8, such as 16 or 24",
    ),
    (
        "width too small",
        WITH_CAT + " --width 4",
        "width = 4: input should be greater than or equal to 8",
    ),
    (
        "height too large",
        WITH_CAT + " --height 100000",
        "height = 100000: input should be less than or equal to 16384",
    ),
    ("strength zero", WITH_CAT + " --strength 0", "strength = 0.0: input should be greater than 0"),
    (
        "strength above one",
        WITH_CAT + " --strength 1.5",
        "strength = 1.5: input should be less than or equal to 1",
    ),
    (
        "strength too weak",
        WITH_CAT + " --init {here}/cat.png --strength 0.5",
        "strength 0.5 of 1 steps leaves no step to run",
    ),
    (
        "batch of none",
        WITH_CAT + " --batch-size 0",
        "batch_size = 0: input should be greater than or equal to 1",
    ),
    (
        "unknown precision",
        WITH_CAT + " --dtype int3",
        "dtype = 'int3': input should be 'float32', 'float16' or 'bfloat16'",
    ),
    (
        "out is a JPEG",
        "generate {here}/cat.png --out a.jpg",
        "a.jpg: results are PNG files; give a name ending in .png, or a folder",
    ),
    (
        "out is a text",
        "generate {here}/cat.png --out {here}/notes.txt",
        "notes.txt: results are PNG files",
    ),
    (
        "out is a file",
        "generate {here}/cat.png --out {here}/taken",
        "taken is a file; a folder is needed",
    ),
    (
        "out is the prompt",
        "generate {here}/cat.png --out {here}/cat.png",
        "cat.png is one of the inputs: give another name",
    ),
    (
        "out is what it starts from",
        "generate {here}/dot.png --init {here}/cat.png --out {here}/cat.png",
        "cat.png is one of the inputs",
    ),
    (
        "out in a file",
        "generate {here}/cat.png --out {here}/notes.txt/sub/a.png",
        "notes.txt is a file; a folder is needed",
    ),
    (
        "out in a PNG",
        "generate {here}/cat.png --out {here}/cat.png/more",
        "cat.png is a file; a folder is needed",
    ),
    (
        "like a foreign PNG",
        "generate --like {here}/cat.png",
        "cat.png was not made by imprompt, or its metadata was removed",
    ),
    ("like a JPEG", "generate --like {here}/cat.jpg", "cat.jpg was not made by imprompt"),
    ("like nothing", "generate --like none.png", "none.png does not exist"),
    (
        "like, picture changed",
        "generate --like {here}/changed.png",
        "cat.png is not the picture that it was",
    ),
    ("like, picture vanished", "generate --like {here}/vanished.png", "gone.png does not exist"),
    (
        "like and a setting",
        "generate --like {here}/changed.png --seed 3",
        "cat.png is not the picture that it was",
    ),
    (
        "like and a bad setting",
        LIKE + "changed.png --steps 0",
        "steps = 0: input should be greater than",
    ),
    (
        "like and a bad window",
        LIKE + "changed.png --end 0",
        "start = 0.0, end = 0.0: give 0 <= start",
    ),
    (
        "like and a mask alone",
        LIKE + "changed.png --mask {here}/cat.png",
        "give that picture too (--init)",
    ),
    (
        "like and regions",
        LIKE + "changed.png --region a.png --region b.png",
        "2 regions for 1 image prompts",
    ),
    (
        "like and weights",
        LIKE + "two.png --weight 2 --weight 1",
        "2 weights for 1 pictures: give one for each",
    ),
    (
        "like and its adapters",
        LIKE + "two.png --adapter plus",
        "--adapter names one for all image prompts",
    ),
    (
        "like, none such changed",
        LIKE + "outside.png -n 2",
        "only = 5: the request makes no such picture",
    ),
    (
        "several adapters",
        "generate {here}/cat.png --adapter base --adapter plus",
        "state in a request file which adapter each picture is for",
    ),
    (
        "two negatives",
        "generate {here}/cat.png --noise fade --negative-image {here}/cat.png",
        "both set what to keep away from",
    ),
    (
        "weights alone",
        "generate {here}/cat.png --weight 2",
        "--weight weighs image prompts that are combined",
    ),
    (
        "regions",
        "generate {here}/cat.png --region a.png --region b.png",
        "2 regions for 1 image prompts",
    ),
    (
        "blocks",
        "generate {here}/cat.png --blocks [1]",
        "blocks = [1]: give a preset's name, a number, or a map of patterns",
    ),
    (
        "unknown combine",
        "generate {here}/cat.png --combine blend",
        "combine = 'blend': unknown; known: concat",
    ),
    (
        "controlnet alone",
        "generate {here}/cat.png --controlnet edges",
        "go together: give both, or neither",
    ),
    ("like, damaged", "generate --like {here}/damaged.png", "damaged.png: its metadata is damaged"),
    ("like, no object", "generate --like {here}/list.png", "list.png: its metadata is damaged"),
    (
        "like, newer",
        "generate --like {here}/newer.png",
        "from another version of imprompt (unknown setting 'warp'",
    ),
    (
        "like, poisoned",
        "generate --like {here}/poisoned.png",
        "(steps = 0: input should be greater than or equal to 1)",
    ),
    (
        "like, no such picture",
        "generate --like {here}/outside.png",
        "only = 5: this call makes 1 pictures",
    ),
    (
        "like and pictures",
        "generate {here}/cat.png {here}/cat.png {here}/cat.png --like {here}/two.png",
        "3 pictures for the 2 of the request: give as many, which take their places in turn",
    ),
]
WITHOUT = "generate {here}/cat.png --out {out} --steps 1 "
BAD_MODELS = [
    ("device unknown", WITH_CAT + " --device quantum", "device 'quantum' cannot be used here"),
    (
        "quantize unknown",
        WITH_CAT + " --quantize int3",
        "quantize = 'int3': input should be 'int8' or 'fp8'",
    ),
    (
        "offload unknown",
        WITH_CAT + " --offload half --device cpu",
        "unknown offload 'half'; known: model, sequential",
    ),
    (
        "offload of a CPU",
        WITH_CAT + " --offload model --device cpu",
        "spares a GPU's memory; the device here is cpu: leave it out",
    ),
    (
        "features in a file",
        WITH_CAT + " --keep-features {here}/taken",
        "taken is a file; a folder is needed",
    ),
    ("device computes nothing", WITH_CAT + " --device meta", "device 'meta' cannot be used here"),
    (
        "model unknown",
        WITHOUT + "--model emojii",
        "unknown model 'emojii'; known: emoji, sd15, sdxl, flux-dev, ",
    ),
    (
        "model folder bare",
        WITHOUT + "--model {here}/bare",
        "bare is not a model: it holds no model_index.json",
    ),
    (
        "model is an address",
        WITHOUT + "--model https://huggingface.co/a/b",
        "https://huggingface.co/a/b: nothing is fetched from an address; download it first",
    ),
    (
        "adapter is an address",
        WITHOUT + "--model {model} --adapter https://example.com/a.safetensors",
        "https://example.com/a.safetensors: nothing is fetched from an address",
    ),
    (
        "encoder is an address",
        WITH_CAT + " --encoder https://example.com/encoder",
        "https://example.com/encoder: nothing is fetched from an address",
    ),
    (
        "ControlNet is an address",
        WITH_CAT + " --control {here}/cat.png --controlnet https://example.com/net",
        "https://example.com/net: nothing is fetched from an address",
    ),
    ("model folder missing", WITHOUT + "--model {here}/none", "unknown model"),
    (
        "model of no pipeline",
        WITHOUT + "--model {here}/model-odd --adapter {adapter} --encoder {model}/image_encoder",
        "cannot be loaded",
    ),
    (
        "model's index damaged",
        WITHOUT
        + "--model {here}/model-damaged --adapter {adapter} --encoder {model}/image_encoder",
        "cannot be loaded",
    ),
    (
        "model truncated",
        WITHOUT + "--model {here}/model-cut --adapter {adapter}",
        "model-cut cannot be loaded",
    ),
    (
        "model on no Hub",
        WITHOUT + "--model nobody/nothing --adapter {adapter} --encoder {model}/image_encoder",
        "nobody/nothing cannot be loaded",
    ),
    ("no adapter", WITHOUT + "--model {model}", "no adapter is known for"),
    ("adapter unknown", WITHOUT + "--model {model} --adapter fancy", "no adapter 'fancy' for"),
    (
        "adapter unknown of known",
        WITHOUT + "--model sd15 --adapter pluss",
        "give one of base, plus, plus-face, full-face, base-vit-G, ",
    ),
    (
        "adapter missing",
        WITHOUT + "--model {model} --adapter {here}/none.safetensors",
        "none.safetensors",
    ),
    (
        "adapter on no Hub",
        WITHOUT + "--model {model} --adapter nobody/nothing/a.safetensors",
        "nobody/nothing:a.safetensors could not be downloaded",
    ),
    (
        "adapter's Hub name impossible",
        WITHOUT + "--model {model} --adapter no!/=/a.safetensors",
        "no!/=:a.safetensors could not be downloaded",
    ),
    (
        "adapter for SDXL",
        WITHOUT + "--model {model} --adapter {here}/sdxl.safetensors",
        "2048-wide text (SDXL); the text of this model is 32 wide",
    ),
    (
        "adapter for other sites",
        WITHOUT + "--model {model} --adapter {here}/sites.safetensors",
        "is for 17 cross-attentions; this model has 16",
    ),
    (
        "adapter truncated",
        WITHOUT + "--model {model} --adapter {here}/cut.safetensors",
        "cut.safetensors is damaged or cut short",
    ),
    (
        "adapter of NaN",
        WITHOUT + "--model {model} --adapter {here}/nan.safetensors",
        "nan.safetensors is corrupt, or from a training run that diverged",
    ),
    (
        "encoder too wide",
        WITH_CAT + " --encoder {here}/encoder-wide",
        "reads 24-wide pooled features",
    ),
    (
        "encoder of other weights",
        WITH_CAT + " --encoder {here}/encoder-weights",
        "trained with other weights of the image encoder",
    ),
    (
        "encoder missing",
        WITH_CAT + " --encoder nowhere",
        "no image encoder 'nowhere': give a folder with config.json",
    ),
    ("encoder bare", WITH_CAT + " --encoder {here}/bare", "no image encoder can be loaded from"),
    ("encoder truncated", WITH_CAT + " --encoder {here}/encoder-cut", "encoder-cut"),
    (
        "encoder half empty",
        WITH_CAT + " --encoder {here}/encoder-part",
        "encoder-part holds an incomplete CLIP image encoder: visual_projection.weight missing",
    ),
    (
        "encoder of text",
        WITH_CAT + " --encoder {model}/text_encoder",
        "text_encoder (it holds a clip_text_model, not a CLIP, SigLIP or DINOv2 image encoder)",
    ),
]
BAD_FILES = [
    ("inspect missing", "inspect none.safetensors", "none.safetensors: there is no such file"),
    (
        "inspect bare folder",
        "inspect {here}/bare",
        "bare holds no adapter: none of adapter.safetensors",
    ),
    (
        "inspect an address",
        "inspect https://example.com/a.safetensors",
        "https://example.com/a.safetensors: nothing is fetched from an address",
    ),
    ("inspect empty", "inspect {here}/empty.safetensors", "empty.safetensors is empty"),
    (
        "inspect garbage",
        "inspect {here}/garbage.safetensors",
        "garbage.safetensors is damaged or cut short",
    ),
    (
        "inspect truncated",
        "inspect {here}/cut.safetensors",
        "cut.safetensors is damaged or cut short",
    ),
    (
        "inspect part",
        "inspect {here}/part.safetensors",
        "part.safetensors is not a complete base adapter",
    ),
    (
        "inspect code",
        "inspect {here}/code.bin",
        "code.bin holds code, not only tensors; refused. Convert it",
    ),
    (
        "inspect newer code",
        "inspect {here}/newer-code.bin",
        "newer-code.bin is damaged or cut short, or holds more than tensors; refused",
    ),
    (
        "inspect LoRA",
        "inspect {here}/lora.safetensors",
        "lora.safetensors is a LoRA, not an image-prompt adapter",
    ),
    ("inspect text", "inspect {here}/notes.txt", "notes.txt: weights are read from .safetensors"),
    ("inspect picture", "inspect {here}/cat.png", "cat.png was not made by imprompt"),
    (
        "convert onto itself",
        "convert {adapter} {here}/./adapter.safetensors",
        "adapter.safetensors is one of the inputs",
    ),
    (
        "embed onto the adapter",
        "embed {here}/cat.png --adapter {adapter} --out {adapter}",
        "adapter.safetensors is one of the inputs",
    ),
    (
        "convert over a file",
        "convert {here}/plain.bin {here}/cut.safetensors",
        "cut.safetensors exists: give another name, or --force to replace it",
    ),
    (
        "embed over a file",
        "embed {here}/cat.png --out {here}/cut.safetensors",
        "cut.safetensors exists: give another name, or --force to replace it",
    ),
    (
        "embed into its encoder",
        "embed {here}/cat.png --encoder {here}/encoder-cut --out "
        "{here}/encoder-cut/model.safetensors --force",
        "model.safetensors is one of the inputs",
    ),
    ("convert missing", "convert none.bin {out}.safetensors", "none.bin: there is no such file"),
    ("convert code", "convert {here}/code.bin {out}.safetensors", "code.bin holds code"),
    (
        "convert to no folder",
        "convert {adapter} {out}/a.safetensors",
        "a.safetensors: No such file or directory",
    ),
    ("convert to a folder", "convert {adapter} {here}/bare", "not as a file without suffix"),
    (
        "convert to no such file",
        "convert {adapter} a.bin",
        "the imprompt layout is written as .safetensors, not as .bin",
    ),
    (
        "convert, sites unknown",
        "convert {here}/plain.bin {out}.safetensors",
        "name the base model that it was trained for (--model, or layers=)",
    ),
    (
        "convert, model unknown",
        "convert {here}/plain.bin {out}.safetensors --model emojii",
        "unknown model 'emojii'",
    ),
    (
        "convert, model has no UNet",
        "convert {here}/plain.bin {out}.safetensors --model {here}/model-odd",
        "this is a NoPipeline",
    ),
    ("train nothing", "train none.toml", "no recipe none.toml (No such file or directory)"),
    ("train a folder", "train {here}", "(Is a directory)"),
    ("train no TOML", "train {here}/no.toml", "no.toml is not valid TOML"),
    ("train binary", "train {here}/binary.toml", "binary.toml is not valid TOML"),
    ("train half a recipe", "train {here}/short.toml", "short.toml: output: Field required"),
    (
        "train no steps",
        "train {here}/recipe.toml --set optimization.steps=0",
        "optimization.steps = 0",
    ),
    (
        "train rate NaN",
        "train {here}/recipe.toml --set optimization.learning_rate=nan",
        "optimization.learning_rate = nan",
    ),
    (
        "train misspelt",
        "train {here}/recipe.toml --set optimization.step=9",
        "unknown key optimization.step; did you mean steps?",
    ),
    ("train set nothing", "train {here}/recipe.toml --set steps", "--set steps: write key=value"),
    (
        "train unknown model",
        "train {here}/recipe.toml --set model=emojii",
        "unknown model 'emojii'",
    ),
    (
        "train a truncated model",
        "train {here}/recipe.toml --set model={here}/model-cut",
        "model-cut cannot be loaded",
    ),
    (
        "train unknown encoder",
        "train {here}/recipe.toml --set encoder=nowhere",
        "no image encoder 'nowhere'",
    ),
    (
        "train no pictures",
        "train {here}/recipe.toml --set data.source={here}/no-pictures",
        "no-pictures holds no metadata.jsonl",
    ),
    (
        "train bad listing",
        "train {here}/recipe.toml --set data.source={here}/bad-listing",
        "metadata.jsonl, line 2: ",
    ),
    (
        "train into a file",
        "train {here}/recipe.toml --set output={here}/notes.txt",
        "notes.txt is a file; a folder is needed",
    ),
]


def table(rows: list[tuple[str, str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("command", "words"), [row[1:] for row in rows], ids=[row[0] for row in rows]
    )


@table(BAD_REQUESTS)
@pytest.mark.usefixtures("loaded")
def test_a_bad_request_is_one_line(
    command: str, words: str, imprompt: Callable[[str], Ended], world: World, tmp_path: Path
) -> None:
    before = files_in(world.folder)
    assert_one_line(imprompt(command), words)
    assert files_in(world.folder) == before
    assert files_in(tmp_path) == set()


@table(BAD_MODELS + BAD_FILES)
def test_a_bad_file_is_one_line(
    command: str, words: str, imprompt: Callable[[str], Ended], world: World, tmp_path: Path
) -> None:
    before = files_in(world.folder)
    assert_one_line(imprompt(command), words)
    assert files_in(world.folder) == before  # nor did the pickle's code run
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate --nope", "No such option"),
        ("generate {here}/cat.png --seed many", "Invalid value for '--seed'"),
        ("generate {here}/cat.png --scale high", "Invalid value for '--scale'"),
        ("convert a b --to c", "'c' is not one of"),
        ("inspect", "Missing argument"),
        ("paint", "No such command 'paint'"),
    ],
)
def test_a_misspelt_command_is_reported_how_it_is_written(
    command: str, words: str, imprompt: Callable[[str], Ended]
) -> None:
    ended = imprompt(command)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("Usage: ")
    assert words in ended.err.splitlines()[-1]
    assert len(ended.err.splitlines()) <= 4


# Odd, but right


@pytest.mark.parametrize(
    "command",
    [
        "{here}/animated.gif",
        "{here}/palette.png",
        "{here}/cmyk.jpg",
        "{here}/deep.png",
        "{here}/alpha.png",
        "{here}/turned.jpg",
        "{here}/dot.png",
        "{here}/strip.png",
        "{here}/cat.png --init {here}/dot.png --strength 1",
        "{here}/cat.png --init {here}/strip.png --strength 1 --mask {here}/alpha.png",
        "{here}/cat.png --scale=-1 --guidance 0",
    ],
)
@pytest.mark.usefixtures("loaded")
def test_an_odd_picture_is_used(
    command: str, imprompt: Callable[[str], Ended], tmp_path: Path
) -> None:
    ended = imprompt(f"generate {command} --steps 1 --seed 3 --out {{out}}")
    assert (ended.code, ended.err) == (0, "")
    made = [path for path in files_in(tmp_path) if path.is_file()]
    assert [path.suffix for path in made] == [".png"]
    assert ended.out == f"{made[0]}  seed 3\n"
    assert not made[0].name.startswith(".")
    Image.open(made[0]).load()


@pytest.mark.usefixtures("loaded")
def test_places_for_results(imprompt: Callable[[str], Ended], tmp_path: Path) -> None:
    """A name, a folder with a dot in its name, and a name that is taken."""
    (tmp_path / "v1.5").mkdir()
    for out, expected in (
        ("new/cat.png", "new/cat.png"),
        ("v1.5", "v1.5/cat-3.png"),
        ("v1.5 --scale 0.5", "v1.5/cat-3-2.png"),
    ):
        ended = imprompt(f"generate {{here}}/cat.png --steps 1 --seed 3 --out {out}")
        assert (ended.code, ended.err, ended.out) == (0, "", f"{expected}  seed 3\n")
    assert len([path for path in files_in(tmp_path) if path.is_file()]) == 3


def test_a_layout_is_called_by_all_its_names(
    imprompt: Callable[[str], Ended], tmp_path: Path
) -> None:
    target = tmp_path / "a.safetensors"
    assert imprompt(f"convert {{adapter}} {target} --to diffusers").code == 0
    rows = dict(line.split(maxsplit=1) for line in imprompt(f"inspect {target}").out.splitlines())
    assert rows["layout"] == "paper / diffusers"
    rows = dict(line.split(maxsplit=1) for line in imprompt("inspect {adapter}").out.splitlines())
    assert rows["layout"] == "imprompt"


# What goes wrong on the way


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.usefixtures("loaded")
def test_a_folder_that_may_not_be_written_to(
    imprompt: Callable[[str], Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the refusal is played."""
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(Request, "prepare", lambda *_: pytest.fail("it was computed first"))
    assert_one_line(
        imprompt("generate {here}/cat.png --out {out}"),
        "may not be written to (Permission denied); give another place",
    )
    assert_one_line(
        imprompt("train {here}/recipe.toml --set output={out}"),
        "may not be written to (Permission denied)",
    )
    assert files_in(tmp_path) == set()


def half_a_picture(error: BaseException) -> Callable[..., None]:
    def save(_picture: Image.Image, file: Any, *_: object, **__: object) -> None:
        Path(file).write_bytes(b"half a picture")
        raise error

    return save


@pytest.mark.parametrize("to", ["{out}", "{out}/a.png"])
@pytest.mark.usefixtures("loaded")
def test_a_full_disk(
    to: str, imprompt: Callable[[str], Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Image.Image, "save", half_a_picture(OSError(errno.ENOSPC, "No space left on device"))
    )
    ended = imprompt(f"generate {{here}}/cat.png --steps 1 --seed 3 --out {to}")
    assert_one_line(ended, ".png: No space left on device")
    assert files_in(tmp_path) <= {tmp_path / "out"}


@pytest.mark.parametrize("when", ["sampling", "saving"])
@pytest.mark.usefixtures("loaded")
def test_an_interrupt(
    when: str, imprompt: Callable[[str], Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if when == "sampling":
        monkeypatch.setattr(ImagePromptPipeline, "run", interrupt)
    else:
        monkeypatch.setattr(Image.Image, "save", half_a_picture(KeyboardInterrupt()))
    ended = imprompt("generate {here}/cat.png --steps 1 --out {out}")
    assert (ended.code, ended.out, ended.err) == (130, "", "")
    assert files_in(tmp_path) <= {tmp_path / "out"}


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), RuntimeError("writer")],
)
def test_a_training_state_is_whole_or_absent(error: BaseException, tmp_path: Path) -> None:
    def torn(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with pytest.raises(
        KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else Exception,
        match=r"state before it|^$",
    ):
        save_state(tmp_path / "run", 1, {"training.pt": torn}, {}, keep=1)
    assert files_in(tmp_path) == {tmp_path / "run"}


def test_the_packaged_weights_are_not_touched(imprompt: Callable[[str], Ended]) -> None:
    before = files_in(PACKAGED)
    assert_one_line(
        imprompt("generate {here}/cat.png --adapter fancy"),
        "give one of base, plus, a file, a folder",
    )
    assert files_in(PACKAGED) == before
