"""Known names: base models, the adapters made for them, and the image encoders these need."""

import gc
import logging
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

from imprompt.checkpoints.states import state_at
from imprompt.errors import CheckpointError, SettingError, first_line

PACKAGED = Path(__file__).parent / "weights"
HUB_PATIENCE = 5  # seconds that the Hub has to answer


@dataclass(frozen=True)
class Location:
    """A file or folder on the Hub, or inside this package where `repo` is empty."""

    repo: str
    path: str = ""

    def __str__(self) -> str:
        return (
            (f"{self.repo}:{self.path}" if self.path else self.repo)
            if self.repo
            else f"packaged:{self.path}"
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the form that `str` gives: "owner/name:path", "packaged:path" or a folder."""
        refuse_url(text)
        repo, _, path = text.partition(":")
        return cls("" if repo == "packaged" else repo, path)

    def inside(self, name: str) -> "Location":
        """Return the location of a file or folder inside this one."""
        return Location(self.repo, f"{self.path}/{name}" if self.path else name)

    def fetch_file(self) -> Path:
        """Return the path of the file on this disk, and download it if necessary.

        Raises CheckpointError if it could not be downloaded.
        """
        if not self.repo:
            return PACKAGED / self.path
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            cached = self.on_hub and not hub_answers(this_minute())
            return Path(hf_hub_download(self.repo, self.path, local_files_only=cached))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            # ValueError: the name is not a valid Hub id
            raise self._not_downloaded(error) from error

    def fetch_folder(self) -> tuple[str, str | None]:
        """Return the arguments of `from_pretrained`: (repository or folder, subfolder).

        If the Hub does not answer, it is the folder of its cache, or CheckpointError.
        """
        if not self.repo:
            return str(PACKAGED / self.path), None
        source = self.repo
        if self.on_hub and not hub_answers(this_minute()):
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import LocalEntryNotFoundError

            try:
                source = snapshot_download(self.repo, local_files_only=True)
            except (LocalEntryNotFoundError, OSError, ValueError) as error:
                raise self._not_downloaded(error) from error
        return source, self.path or None

    @property
    def on_hub(self) -> bool:
        """Whether it is neither packaged nor a folder on this disk."""
        return bool(self.repo) and not Path(self.repo).is_dir()

    def _not_downloaded(self, error: Exception) -> CheckpointError:
        why = first_line(error)
        if not hub_answers(this_minute()):
            why = "the Hub does not answer, and it is not in the cache"
        return CheckpointError(
            f"{self} could not be downloaded from the Hub ({why}); give a local file or folder"
        )


def this_minute() -> int:
    """Return the number of the current minute."""
    return int(time.monotonic() // 60)


@lru_cache(1)
def hub_answers(_minute: int) -> bool:
    """Return whether the Hub answers at all, asked once a minute.

    Its library would ask again and again, for half a minute, before it says so. Where
    HF_HUB_OFFLINE is set the library asks nothing, and this neither.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_PATIENCE)
    except Exception:  # of whichever library it is that sends requests
        return False
    return True


@dataclass(frozen=True)
class Usual:
    """Settings that an adapter is used with where none are given; None: the base model's."""

    scale: float = 1.0
    steps: int | None = None
    guidance: float | None = None

    def __str__(self) -> str:
        steps = None if self.steps is None else f"{self.steps} steps"
        guidance = None if self.guidance is None else f"guidance {self.guidance:g}"
        return ", ".join(filter(None, (f"scale {self.scale:g}", steps, guidance)))


@dataclass(frozen=True)
class KnownAdapter:
    """A named adapter: its file, and the image encoder that it was trained with, if it reads one.

    variant   where the tensors do not determine it
    licence   of its weights, where that is narrower than Apache-2.0
    usual     as its authors use it
    tokens    number of its image tokens, where it is stated
    prepares  how its encoder prepares a picture, where it is stated
    """

    file: Location
    encoder: Location | None
    variant: str = ""
    licence: str = ""
    usual: Usual = Usual()
    tokens: int | None = None
    prepares: str = ""


@dataclass(frozen=True)
class KnownModel:
    """A named base model; its first adapter is the default.

    steps, guidance  None: the defaults of its pipeline
    """

    name: str
    about: str
    base: Location
    adapters: Mapping[str, KnownAdapter] = field(default_factory=dict)
    controlnets: Mapping[str, Location] = field(default_factory=dict)
    steps: int | None = None
    guidance: float | None = None


IP = "h94/IP-Adapter"
VIT_H = Location(IP, "models/image_encoder")
BIG_G = Location(IP, "sdxl_models/image_encoder")
EMOJI_ENCODER = Location("", "emoji/image_encoder")


def _h94(folder: str, **files: tuple[str, Location]) -> dict[str, KnownAdapter]:
    return {
        name.replace("_", "-"): KnownAdapter(Location(IP, f"{folder}/{file}.safetensors"), encoder)
        for name, (file, encoder) in files.items()
    }


FACE_IP = "h94/IP-Adapter-FaceID"
NON_COMMERCIAL = "non-commercial research only, as the weights of insightface's face encoder"


def _faces(base: str, **variants: tuple[str, Location | None]) -> dict[str, KnownAdapter]:
    """Return the FaceID adapters of a base model by variant.

    Each is given by the part of its file's name between "ip-adapter-" and ".bin", and the encoder
    of the face's picture.
    """
    return {
        name.replace("_", "-"): KnownAdapter(
            Location(FACE_IP, f"ip-adapter-{file.format(base)}.bin"),
            encoder,
            name.replace("_", "-"),
            NON_COMMERCIAL,
        )
        for name, (file, encoder) in variants.items()
    }


CLIP_L = Location("openai/clip-vit-large-patch14")
SIGLIP = Location("google/siglip-so400m-patch14-384")
CLIP_L_336 = Location("Kwai-Kolors/Kolors-IP-Adapter-Plus", "image_encoder")
CUT, SQUASHED = "{} px: the short side, then the middle", "{} px: the whole picture, squashed"
FLUX_LICENCE = "FLUX.1-dev non-commercial"
OTHER_LICENCE = "see the repository"


def _xlabs(repo: str, tokens: int, licence: str) -> KnownAdapter:
    return KnownAdapter(
        Location(repo, "ip_adapter.safetensors"),
        CLIP_L,
        licence=licence,
        usual=Usual(1.0, 50, 4.0),
        tokens=tokens,
        prepares=CUT.format(224),
    )


MODELS = {
    model.name: model
    for model in (
        KnownModel(
            "emoji",
            "small world of emoji, 128 px, packaged: works offline on a laptop",
            Location("", "emoji"),
            {
                name: KnownAdapter(
                    Location("", f"emoji/adapters/{name}.safetensors"), EMOJI_ENCODER
                )
                for name in ("base", "plus")
            },
            controlnets={"edges": Location("", "emoji/controlnets/edges")},
            steps=25,
            guidance=3.0,
        ),
        KnownModel(
            "sd15",
            "Stable Diffusion 1.5, 512 px",
            Location("stable-diffusion-v1-5/stable-diffusion-v1-5"),
            _h94(
                "models",
                base=("ip-adapter_sd15", VIT_H),
                plus=("ip-adapter-plus_sd15", VIT_H),
                plus_face=("ip-adapter-plus-face_sd15", VIT_H),
                full_face=("ip-adapter-full-face_sd15", VIT_H),
                base_vit_G=("ip-adapter_sd15_vit-G", BIG_G),
            )
            | _faces(
                "sd15",
                faceid=("faceid_{}", None),
                faceid_plus=("faceid-plus_{}", VIT_H),
                faceid_plus_v2=("faceid-plusv2_{}", VIT_H),
                portrait=("faceid-portrait-v11_{}", None),
            ),
            steps=50,
            guidance=7.5,
        ),
        KnownModel(
            "sdxl",
            "Stable Diffusion XL, 1024 px",
            Location("stabilityai/stable-diffusion-xl-base-1.0"),
            _h94(
                "sdxl_models",
                base=("ip-adapter_sdxl_vit-h", VIT_H),
                plus=("ip-adapter-plus_sdxl_vit-h", VIT_H),
                plus_face=("ip-adapter-plus-face_sdxl_vit-h", VIT_H),
                base_bigG=("ip-adapter_sdxl", BIG_G),
            )
            | _faces(
                "sdxl",
                faceid=("faceid_{}", None),
                faceid_plus_v2=("faceid-plusv2_{}", VIT_H),
                portrait=("faceid-portrait_{}", None),
                portrait_unnorm=("faceid-portrait_{}_unnorm", None),
            ),
            steps=50,
            guidance=7.5,
        ),
        KnownModel(
            "flux-dev",
            "FLUX.1-dev, 1024 px",
            Location("black-forest-labs/FLUX.1-dev"),
            {
                "xlabs-v2": _xlabs("XLabs-AI/flux-ip-adapter-v2", 16, ""),
                "xlabs": _xlabs("XLabs-AI/flux-ip-adapter", 4, FLUX_LICENCE),
                "instantx": KnownAdapter(
                    Location("InstantX/FLUX.1-dev-IP-Adapter", "ip-adapter.bin"),
                    SIGLIP,
                    licence=FLUX_LICENCE,
                    usual=Usual(0.7, 24, 3.5),
                    tokens=128,
                    prepares=SQUASHED.format(384),
                ),
                "redux": KnownAdapter(
                    Location("black-forest-labs/FLUX.1-Redux-dev", "flux1-redux-dev.safetensors"),
                    SIGLIP,
                    licence=FLUX_LICENCE,
                    usual=Usual(1.0, 50, 2.5),
                    tokens=729,
                    prepares=SQUASHED.format(384),
                ),
            },
            steps=28,
            guidance=3.5,
        ),
        KnownModel(
            "sd35-large",
            "Stable Diffusion 3.5 large, 1024 px",
            Location("stabilityai/stable-diffusion-3.5-large"),
            {
                "instantx": KnownAdapter(
                    Location("InstantX/SD3.5-Large-IP-Adapter", "ip-adapter.bin"),
                    SIGLIP,
                    licence="Stability AI community",
                    usual=Usual(0.5, 24, 5.0),
                    tokens=64,
                    prepares=SQUASHED.format(384),
                )
            },
            steps=28,
            guidance=7.0,
        ),
        KnownModel(
            "sd35-medium",
            "Stable Diffusion 3.5 medium, 1024 px",
            Location("stabilityai/stable-diffusion-3.5-medium"),
            steps=28,
            guidance=7.0,
        ),
        KnownModel(
            "kolors",
            "Kolors, 1024 px",
            Location("Kwai-Kolors/Kolors-diffusers"),
            {
                "plus": KnownAdapter(
                    Location("Kwai-Kolors/Kolors-IP-Adapter-Plus", "ip_adapter_plus_general.bin"),
                    CLIP_L_336,
                    licence=OTHER_LICENCE,
                    usual=Usual(0.5, 50, 5.0),
                    tokens=16,
                    prepares=CUT.format(336),
                ),
                "faceid-plus": KnownAdapter(
                    Location("Kwai-Kolors/Kolors-IP-Adapter-FaceID-Plus", "ipa-faceid-plus.bin"),
                    CLIP_L_336,
                    licence=OTHER_LICENCE,
                    usual=Usual(0.8, 25, 5.0),
                    tokens=6,
                    prepares="336 px: the square around the face",
                ),
            },
            steps=50,
            guidance=5.0,
        ),
        KnownModel(
            "hunyuandit",
            "HunyuanDiT 1.2, 1024 px",
            Location("Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers"),
            {
                "base": KnownAdapter(
                    Location("Tencent-Hunyuan/IP-Adapter", "ipa.pt"),
                    None,
                    variant="hunyuandit",
                    licence="Tencent Hunyuan community",
                    usual=Usual(1.0, 100),
                    tokens=8,
                    prepares="its own CLIP ViT-H/14, which encoder= gives; " + SQUASHED.format(224),
                )
            },
            steps=50,
            guidance=5.0,
        ),
        KnownModel(
            "pixart-sigma",
            "PixArt-Sigma XL, 1024 px",
            Location("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
            steps=20,
            guidance=4.5,
        ),
        KnownModel(
            "chroma",
            "Chroma1-HD, 1024 px",
            Location("lodestones/Chroma1-HD"),
            steps=35,
            guidance=5.0,
        ),
        KnownModel(
            "sana-06b",
            "Sana 0.6B, 1024 px",
            Location("Efficient-Large-Model/Sana_600M_1024px_diffusers"),
            steps=20,
            guidance=4.5,
        ),
        KnownModel(
            "z-image",
            "Z-Image, 1024 px",
            Location("Tongyi-MAI/Z-Image"),
            steps=50,
            guidance=5.0,
        ),
        KnownModel(
            "qwen-image",
            "Qwen-Image, 1024 px",
            Location("Qwen/Qwen-Image"),
            steps=50,
            guidance=4.0,
        ),
        KnownModel(
            "wan-13b",
            "Wan 2.1 1.3B, a video model, 480p",
            Location("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
            steps=50,
            guidance=5.0,
        ),
    )
}


def refuse_url(name: str | Path) -> None:
    """Raise SettingError for an address: nothing is fetched from one."""
    if found := re.match(r"([a-zA-Z][a-zA-Z+.-]+):/+(?=[^/])", str(name)):  # a Path joins slashes
        address = f"{found[1]}://{str(name)[found.end() :]}"
        raise SettingError(
            f"{address}: nothing is fetched from an address; download it first and give the file"
        )


def may_be_on_hub(name: str) -> bool:
    """Return whether a name has the form of a Hub id, owner/name."""
    return name.count("/") == 1 and not name.startswith((".", "/"))


def find_model(name: str) -> KnownModel:
    """Return the model of a name, folder or Hub id; SettingError if it is none of these."""
    if name in MODELS:
        return MODELS[name]
    refuse_url(name)
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "model_index.json").exists():
            raise SettingError(
                f"{name} is not a model: it holds no model_index.json "
                "(give a folder that diffusers saved)"
            )
        return KnownModel(name, "folder", Location(name))
    if may_be_on_hub(name):
        return KnownModel(name, "Hub", Location(name))
    raise SettingError(
        f"unknown model {name!r}; known: {', '.join(MODELS)}, a folder with model_index.json, or a "
        "Hub id owner/name"
    )


class FoundAdapter(NamedTuple):
    """File of an adapter, and what its name determines: its image encoder, variant and settings.

    An encoder of None or an empty variant means that the name does not determine it.
    """

    path: Path
    encoder: Location | None = None
    variant: str = ""
    usual: Usual = Usual()

    @classmethod
    def of(cls, known: KnownAdapter) -> Self:
        """Return the file of a known adapter, downloaded if necessary."""
        return cls(known.file.fetch_file(), known.encoder, known.variant, known.usual)


def find_adapter(model: KnownModel, name: str | None) -> FoundAdapter:
    """Return an adapter's file, and what its name determines.

    `name` is one of the model's adapters (None: its first), a file, a folder with a training state
    or run, or a file on the Hub as owner/repository/path.safetensors. Raises SettingError if it is
    none of these, CheckpointError if it could not be downloaded.
    """
    if name is None and model.adapters:
        name = next(iter(model.adapters))
    if name is None:
        raise SettingError(
            f"no adapter is known for {model.name}: give a file, a folder, or "
            "owner/repository/file.safetensors on the Hub"
        )
    if name in model.adapters:
        return FoundAdapter.of(model.adapters[name])
    refuse_url(name)
    if (place := state_at(Path(name))).exists():
        return FoundAdapter(place)
    owner, _, rest = name.partition("/")
    repository, _, path = rest.partition("/")
    if path and not name.startswith((".", "/")) and not Path(owner, repository).is_dir():
        place = Location(f"{owner}/{repository}", path)
        every = (one for each in MODELS.values() for one in each.adapters.values())
        known = next((one for one in every if one.file == place), KnownAdapter(place, None))
        return FoundAdapter.of(known)
    named = f"one of {', '.join(model.adapters)}, " if model.adapters else ""
    raise SettingError(
        f"no adapter {name!r} for {model.name}: give {named}a file, a folder, or "
        "owner/repository/file.safetensors on the Hub"
    )


WEIGHTS = re.compile(  # plain or of a variant, whole or a shard
    r"(diffusion_pytorch_|pytorch_)?model(-\d+-of-\d+)?(\.(?P<variant>\w+))?(-\d+-of-\d+)?"
    r"\.(safetensors|bin)"
)


def weights_variant(folder: Path, parts: Collection[str] = ("",)) -> str | None:
    """Return the variant of weights that a part of a folder has in place of plain ones, or None.

    It is "fp16" for diffusion_pytorch_model.fp16.safetensors. Parts that are not there are ignored.
    """
    for part in parts:
        names = [path.name for path in (folder / part).glob("*") if path.is_file()]
        held = {found["variant"] for name in names if (found := WEIGHTS.fullmatch(name))}
        if held and None not in held:
            return min(held)
    return None


def load_weights(
    source: str, load: Callable[[str | None], Any], parts: Collection[str] = ("",)
) -> Any:
    """Call `load` with the variant of weights that a folder or Hub repository holds.

    It is None for plain weights. On the Hub, "fp16" is tried where there are no plain ones.
    """
    if Path(source).is_dir():
        return load(weights_variant(Path(source), parts))
    try:
        return load(None)
    except OSError as error:
        if "file named" not in str(error):
            raise
        try:
            return load("fp16")
        except OSError:
            raise error from None  # what the plain ones lack is the fault


@contextmanager
def collector_waits() -> Iterator[None]:
    """Pause Python's cyclic garbage collector for the duration of a block.

    Importing and building create objects that stay, and searching them takes a second.
    """
    runs = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if runs:
            gc.enable()


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hold back what libraries log while they are imported, such as that others are missing."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


@collector_waits()
def open_pipeline(
    model: KnownModel, device: Any, *, without: Collection[str] = (), **options: Any
) -> Any:
    """Load the base model as a diffusers pipeline, without its image encoder.

    The components named in `without` are left out too. Raises CheckpointError if the model could
    not be downloaded or is damaged.
    """
    source, saved = model.base.fetch_folder()[0], index_of(model)
    try:
        with quiet_imports():
            from diffusers import pipelines
            from diffusers.pipelines.pipeline_utils import DiffusionPipeline

            # The pipeline's own class leaves out components that are None; DiffusionPipeline would
            # load an image encoder anyway.
            kind = getattr(pipelines, str(saved.get("_class_name")), DiffusionPipeline)
        absent = dict.fromkeys({"image_encoder", *without} & set(saved))
        pipeline = load_weights(
            source,
            lambda variant: kind.from_pretrained(
                source, **absent, **{"variant": variant} | options, trust_remote_code=False
            ),
            set(saved) - set(absent),
        )
    except Exception as error:  # a folder can be wrong in any way
        raise CheckpointError(
            f"the model {model.name} cannot be loaded ({first_line(error)})"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, silence_dtype_warnings=True)  # float16 may stay on the CPU at first


def index_of(model: KnownModel) -> dict[str, Any]:
    """Load a model's index of components; CheckpointError if it could not be loaded."""
    with quiet_imports():
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    source, _ = model.base.fetch_folder()
    try:
        saved: Any = DiffusionPipeline.load_config(source)
        return dict(saved)
    except Exception as error:  # a folder can be wrong in any way
        raise CheckpointError(
            f"the model {model.name} cannot be loaded ({first_line(error)})"
        ) from error


def part_config(model: KnownModel, part: str) -> dict[str, Any]:
    """Load the configuration of a model's component, such as "vae", without its weights.

    Raises CheckpointError if it could not be loaded.
    """
    with quiet_imports():
        from diffusers.models.auto_model import AutoModel

    source, _ = model.base.fetch_folder()
    try:
        config: Any = AutoModel.load_config(source, subfolder=part)
        return dict(config)
    except Exception as error:  # a folder can be wrong in any way
        raise CheckpointError(
            f"{model.name} holds no {part} that can be read ({first_line(error)})"
        ) from error
