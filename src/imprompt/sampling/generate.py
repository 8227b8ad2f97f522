"""The façade: a picture in, pictures out, on a diffusers pipeline that stays diffusers' own."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from secrets import randbelow
from typing import Any, Self

import torch
from PIL import Image

from imprompt.adapter import ImagePrompt
from imprompt.attention.step import KEY
from imprompt.checked import near
from imprompt.encoders.kept import FeatureFolder, Store
from imprompt.errors import MismatchError, SettingError, first_line
from imprompt.images import open_image, open_mask
from imprompt.models import KnownModel, Place, find_model, open_pipeline
from imprompt.sampling.attached import Attached, Call, Opened, Ready, choices, joined_to, share
from imprompt.sampling.batches import batched
from imprompt.sampling.guidance import image_guidance
from imprompt.sampling.memory import Savers
from imprompt.sampling.references import AdapterChoice, Item, Reference, items_of
from imprompt.sampling.settings import MAX_SIDE, Resolved, Settings
from imprompt.sampling.tasks import TASKS, Start, open_controlnet, task

Picture = str | Path | Image.Image
ImageInput = Picture | Reference
Choice = str | Path | AdapterChoice
OnStep = Callable[[int, int], None]  # (steps done, steps in all)


@dataclass(frozen=True)
class Result:
    """Pictures, the seed of each (picture i of a call has seed + i), and the settings with every default filled in."""

    images: list[Image.Image]
    seeds: list[int]
    settings: Resolved


class ImagePromptPipeline:
    """A diffusers pipeline with image-prompt adapters attached.

    >>> pipe = ImagePromptPipeline.from_pretrained("emoji")
    >>> pipe("cat.png", prompt="a rocket", scale=0.6, num_images=4, seed=7).images
    >>> left, right = Reference(images="cat.png", mask="left.png"), Reference(images="dog.png", mask="right.png")
    >>> pipe([left, right], together=True).images
    """

    def __init__(self, pipeline: Any, adapters: Attached | Sequence[Attached], *, model: KnownModel | None = None,
                 controlnet: Any = None, compile: bool = False, savers: Savers | None = None) -> None:  # fmt: skip
        """`adapters` must be attached to `pipeline.unet` already; `compile` as in `from_pretrained`, `savers` were applied."""
        several = [adapters] if isinstance(adapters, Attached) else list(adapters)
        self.pipeline = pipeline
        self.adapters = {attached.name: attached for attached in several}
        self.model = model or KnownModel("", "", Place(""))
        self.savers = savers or Savers(str(pipeline.device))
        self.controlnet = controlnet
        self.compiled = compile
        if compile:
            if self.savers.offload:
                raise SettingError(
                    f"offload = {self.savers.offload!r} moves weights, and what is compiled needs them in place: use one"
                )
            from imprompt.sampling.compiled import compile_base

            compile_base(pipeline.unet)

    @property
    def first(self) -> Attached:
        """The adapter that hears references which name none."""
        return next(iter(self.adapters.values()))

    @classmethod
    def from_pretrained(cls, model: str = "emoji", *, adapter: Choice | Sequence[Choice] | None = None,
                        encoder: str | Path | None = None, variant: str | None = None, faces: Any = None,
                        controlnet: str | Path | None = None, device: str | None = None,
                        dtype: torch.dtype | None = None, compile: bool = False,
                        offload: str | None = None, tiling: bool = False, quantize: str | None = None,
                        keep_features: str | Path | Store | None = None, **options: Any) -> Self:  # fmt: skip
        """Load a model by name ("emoji", "sd15", "sdxl"), folder or Hub id, with an adapter by name, file, folder or Hub file.

        That adapter, image encoder and base model were made for each other is checked before anything runs
        (MismatchError). Several adapters are a list, of names, files or `AdapterChoice`s. `encoder` and `variant` are what a single
        adapter does not say; `faces` encodes faces for FaceID (insightface if not given): see `imprompt.encoders.face`.
        `controlnet` is one that the model knows by name, a folder or a Hub id, for calls with a `control_image`.
        `compile` makes the first steps of a new size slow and all others faster (on a GPU). `offload` ("model",
        "sequential"), `tiling` and `quantize` ("int8", "fp8") save memory: see `imprompt.sampling.memory`. `keep_features`
        is a folder, or a `FeatureMemory`, that keeps the features of image prompts, so that no picture is encoded twice.
        `options` go to the diffusers pipeline's own `from_pretrained`.
        """
        device = check_device(device) if device else default_device()
        dtype = dtype or (torch.float16 if device.startswith("cuda") else torch.float32)
        savers = Savers.check(device, offload, tiling, quantize)
        keep = FeatureFolder(keep_features) if isinstance(keep_features, (str, Path)) else keep_features
        known = find_model(str(model))
        opened = [Opened.read(choice, known, faces, device, dtype, keep, savers) for choice in choices(adapter, encoder, variant)]
        pipeline = open_pipeline(known, savers.opens_on, dtype=dtype, **options)
        if type(pipeline).__name__ not in TASKS:
            raise MismatchError(f"{model} is a {type(pipeline).__name__}; image prompts are known for {', '.join(TASKS)}")
        savers.lighten(pipeline)
        with joined_to(pipeline.unet, opened, dtype) as attached:
            savers.place(pipeline, *(one.adapter for one in attached))
        if device.startswith("cuda") and offload is None:
            for part in (pipeline.unet, pipeline.vae):
                part.to(memory_format=torch.channels_last)  # as convolutions in low precision read it
        net = None if controlnet is None else open_controlnet(str(controlnet), known, pipeline, dtype)
        if net is not None:
            savers.bring(net)
        return cls(pipeline, attached, model=known, controlnet=net, compile=compile, savers=savers)

    @classmethod
    def from_pipeline(cls, pipeline: Any, adapter: Choice | Sequence[Choice] | None = None, *, model: str = "",
                      encoder: str | Path | None = None, variant: str | None = None, faces: Any = None,
                      keep_features: str | Path | Store | None = None) -> Self:  # fmt: skip
        """Attach adapters to a pipeline of diffusers that is loaded already, such as one with ControlNet.

        `model` is the name of the base model that it was made from, if its adapters are to be said by name. The pipeline keeps its
        device and precision.
        """
        known = find_model(model) if model else KnownModel(type(pipeline).__name__, "", Place(""))
        keep = FeatureFolder(keep_features) if isinstance(keep_features, (str, Path)) else keep_features
        device, dtype = str(pipeline._execution_device), pipeline.unet.dtype  # under offload it is not where the weights wait
        savers = Savers(device)
        opened = [Opened.read(choice, known, faces, device, dtype, keep, savers) for choice in choices(adapter, encoder, variant)]
        with joined_to(pipeline.unet, opened, dtype) as attached:
            for one in attached:
                one.adapter.to(device)
        return cls(pipeline, attached, model=known, savers=savers)

    def detach(self) -> None:
        """Give the base model back as it was."""
        for attached in self.adapters.values():
            attached.adapter.detach()

    @torch.no_grad()
    def __call__(self, image: ImageInput | Sequence[ImageInput | Sequence[ImageInput]],
                 prompt: str | Sequence[str] = "", *,
                 init_image: Picture | None = None, mask_image: Picture | None = None, control_image: Picture | None = None,
                 batch_size: int = 4, only: int | None = None, on_step: OnStep | None = None,
                 pipeline_options: dict[str, Any] | None = None, **settings: Any) -> Result:  # fmt: skip
        """Make pictures that follow `image`: a picture, a file of features, or a `Reference`, which says more about it.

        A list of them gives one result each (× num_images); with `together=True` they all prompt the same result, as do those
        of a list in the list. Each item has its own references, scales, masks and windows; its own text if `prompt` is a list.
        `init_image` starts from a picture (`strength` of it is redrawn); `mask_image` redraws its white part only;
        `control_image` is what ControlNet reads (`control_scale` says how strongly).
        Picture i depends on seed and i alone: another `batch_size` changes it by rounding at most, and `only=i` makes
        picture i of the call again bit for bit (on the same machine). Other settings: see `Settings`;
        `pipeline_options` go to the call of diffusers' pipeline.
        """
        begin, control = (None if picture is None else open_image(picture) for picture in (init_image, control_image))
        start = Start(begin, None if mask_image is None else open_mask(mask_image), control)
        chosen = self.resolve(Settings(prompt=prompt, **settings), begin or control)
        items = items_of(image, chosen.together)
        if not isinstance(chosen.prompt, str) and len(chosen.prompt) != len(items):
            raise SettingError(f"{len(chosen.prompt)} texts for {len(items)} image prompts: give one for all, or one for each")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise SettingError(f"batch_size = {batch_size!r}: make at least one picture at once")
        pipeline, options = task(self.pipeline, start, chosen, self.controlnet if control else None, self.savers)
        guided = chosen.guidance > 1 and self.pipeline.unet.config.time_cond_proj_dim is None  # as diffusers decides
        if chosen.image_guidance is not None and not guided:
            raise SettingError(
                f"image_guidance goes beside the text's guidance, which is off at {chosen.guidance}: give more than 1"
            )
        extra = own_options(pipeline_options, pipeline, chosen)
        for item in items:
            self.check(item)
        call = self._call(chosen, guided)
        heard = [self.hear(item, call) for item in items]
        total = len(items) * chosen.num_images
        rounds = [range(i, min(i + batch_size, total)) for i in range(0, total, batch_size)]
        filled = len(rounds[0]) if self.compiled else 0  # a smaller last batch would be compiled anew
        if only is not None:
            if only not in range(total):
                raise SettingError(f"only = {only}: this call makes {total} pictures, the first is 0")
            rounds = [chunk for chunk in rounds if only in chunk]
        steps = chosen.steps if begin is None else int(chosen.steps * chosen.strength)
        made: dict[int, Image.Image] = {}
        for number, chunk in enumerate(rounds):
            batch = [*chunk, *[chunk[-1]] * (filled - len(chunk))]
            prompts = prompts_for([heard[i // chosen.num_images] for i in batch], guided)
            with nullcontext() if chosen.image_guidance is None else image_guidance(pipeline.unet, chosen.image_guidance):
                results = pipeline(
                    **worded(chosen, batch),
                    num_inference_steps=chosen.steps,
                    guidance_scale=chosen.guidance,
                    generator=[torch.Generator().manual_seed(chosen.seed + i) for i in batch],
                    cross_attention_kwargs={**extra.get("cross_attention_kwargs", {}), KEY: prompts},
                    callback_on_step_end=reporter(on_step, number * steps, steps, len(rounds) * steps),
                    **options,
                    **{name: value for name, value in extra.items() if name != "cross_attention_kwargs"},
                ).images
            made |= dict(zip(chunk, results[: len(chunk)], strict=True))
        if begin is not None and start.mask is not None:
            made = {i: keep_outside(picture, begin, start.mask) for i, picture in made.items()}
        kept = [i for i in made if only is None or i == only]
        return Result([made[i] for i in kept], [chosen.seed + i for i in kept], chosen)

    def _call(self, settings: Resolved, guided: bool) -> Call:
        unit, timesteps = self.pipeline.vae_scale_factor, self.pipeline.scheduler.config.num_train_timesteps
        size = settings.height // unit, settings.width // unit
        return Call(guided, settings.scale, settings.overlap, size, timesteps, settings.seed, {})

    def check(self, item: Item) -> None:
        """Raise SettingError if a reference asks what the pipeline cannot do; before anything is encoded."""
        for reference in item:
            if reference.adapter is not None and reference.adapter not in self.adapters:
                raise SettingError(f"no adapter {reference.adapter!r} is attached; there are {', '.join(map(repr, self.adapters))}")
            self.hears(reference).reader.check(reference)
            if reference.timed and type(self.pipeline.scheduler).__name__.startswith("EDM"):
                raise SettingError("start, end and easing are told by the training timestep, which this EDM scheduler has not")

    def hears(self, reference: Reference) -> Attached:
        return self.first if reference.adapter is None else self.adapters[reference.adapter]

    def hear(self, item: Item, call: Call) -> list[Ready]:
        """What one result hears, encoded. What is silent is left out; a graph keeps its inputs."""
        ready = share([self.hears(reference).hear(reference, call) for reference in item], call.overlap)
        return [one for one in ready if one.audible or self.compiled]

    def resolve(self, settings: Settings, start: Image.Image | None = None) -> Resolved:
        """Every default filled in: the model's steps, guidance and size, and a seed if none was given."""
        unit = self.pipeline.vae_scale_factor
        native = (self.pipeline.unet.config.sample_size or 64) * unit  # 64 latents a side where the model does not say
        ratio = 1.0 if start is None else (start.width / start.height) ** 0.5  # the native area in the first picture's shape
        width, height = (min(max(unit, round(native * side / unit) * unit), MAX_SIDE // unit * unit) for side in (ratio, 1 / ratio))
        own = {"steps": self.model.steps, "guidance": self.model.guidance, "width": width, "height": height}
        given = {name: value for name, value in settings.model_dump().items() if value is not None}
        resolved = Resolved.model_validate({"seed": randbelow(2**31), **own, **given})
        for name, value in (("width", resolved.width), ("height", resolved.height)):
            if value % unit:
                near = " or ".join(str(n * unit) for n in (value // unit, value // unit + 1) if n)
                raise SettingError(f"{name} = {value}: this model's VAE takes multiples of {unit}, such as {near}")
        if resolved.steps > (most := self.pipeline.scheduler.config.num_train_timesteps):
            raise SettingError(f"steps = {resolved.steps}: this model's noise schedule has {most}, give fewer")
        return resolved


def prompts_for(batch: Sequence[list[Ready]], guided: bool) -> list[ImagePrompt] | None:
    """What the items of a batch hear; None if that is nothing. One that several items hear is projected once."""
    ready = {id(one): one for item in batch for one in item}
    made = {key: one.prompt() for key, one in ready.items()}
    return batched([[made[id(one)] for one in item] for item in batch], guided) or None


def worded(settings: Resolved, batch: Sequence[int]) -> dict[str, Any]:
    """The texts of a batch's pictures as diffusers takes them: one for all is encoded once."""
    if isinstance(settings.prompt, str):
        texts, negative, each = settings.prompt, settings.negative_prompt, len(batch)
    else:
        texts, each = [settings.prompt[i // settings.num_images] for i in batch], 1
        negative = [settings.negative_prompt] * len(batch) if settings.negative_prompt else None
    return {"prompt": texts, "negative_prompt": negative or None, "num_images_per_prompt": each}


SAID = {  # of a diffusers pipeline's call: what says it here
    "prompt": "prompt", "negative_prompt": "negative_prompt", "num_images_per_prompt": "num_images", "num_inference_steps": "steps",
    "guidance_scale": "guidance", "generator": "seed", "width": "width", "height": "height", "strength": "strength",
    "callback_on_step_end": "on_step", "controlnet_conditioning_scale": "control_scale",
}  # fmt: skip


def own_options(options: dict[str, Any] | None, pipeline: Any, settings: Resolved) -> dict[str, Any]:
    """`pipeline_options` of a call, checked."""
    options = options or {}
    takes = inspect.signature(pipeline.__call__).parameters
    if unknown := [name for name in options if name not in takes]:
        raise SettingError(f"pipeline_options[{unknown[0]!r}]: a {type(pipeline).__name__} takes none{near(unknown[0], takes)}")
    if taken := [name for name in options if name in SAID]:
        raise SettingError(f"pipeline_options[{taken[0]!r}]: say it as {SAID[taken[0]]}")
    if settings.image_guidance is not None and options.get("guidance_rescale"):
        raise SettingError("image_guidance and guidance_rescale do not go together: the latter would measure another prediction")
    return options


def keep_outside(made: Image.Image, start: Image.Image, mask: Image.Image) -> Image.Image:
    """The redrawn part of `made` on the untouched rest of `start`."""
    start, mask = (picture.resize(made.size, Image.Resampling.LANCZOS) for picture in (start, mask))
    return Image.composite(made, start, mask)


def check_device(name: str) -> str:
    """The device's name; SettingError unless it computes."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # unknown, not there, or not in this build of torch
        raise SettingError(f"device {name!r} cannot be used here, {default_device()} can ({first_line(error)})") from error
    return name


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def reporter(on_step: OnStep | None, before: int, steps: int, total: int) -> Callable[..., dict[str, Any]] | None:
    """diffusers' callback after each of a round's steps, `before` of `total` being done when the round starts."""
    if on_step is None:
        return None

    def report(_pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(before + min(step + 1, steps), total)
        return tensors

    return report
