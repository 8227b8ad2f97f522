"""The façade: a picture in, pictures out, on a diffusers pipeline that stays diffusers' own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import randbelow
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from imprompt.adapter import IPAdapter
from imprompt.attention import family_of
from imprompt.attention.step import KEY
from imprompt.checkpoint import build_adapter, read_adapter
from imprompt.encoders.kept import FeatureFolder, KeptFeatures, Store
from imprompt.encoders.vision import VisionEncoder, load_encoder
from imprompt.errors import MismatchError, SettingError, first_line
from imprompt.images import open_image, open_mask
from imprompt.models import KnownModel, Place, find_adapter, find_model, open_pipeline
from imprompt.sampling.memory import Savers
from imprompt.sampling.settings import MAX_SIDE, Resolved, Settings
from imprompt.variants import Variant

Picture = str | Path | Image.Image
OnStep = Callable[[int, int], None]  # (steps done, steps in all)

# Which of diffusers' pipelines does what, by the class that the model was saved with.
TASKS = {
    "StableDiffusionPipeline": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "StableDiffusionXLPipeline": (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    ),
}
TEXT, IMAGE, INPAINT = range(3)
FLAGS = ("requires_safety_checker", "force_zeros_for_empty_prompt")  # of a pipeline's constructor, beside its components


@dataclass(frozen=True)
class Result:
    """Pictures, the seed of each (picture i of a call has seed + i), and the settings with every default filled in."""

    images: list[Image.Image]
    seeds: list[int]
    settings: Resolved


class ImagePromptPipeline:
    """A diffusers pipeline with an image-prompt adapter attached.

    >>> pipe = ImagePromptPipeline.from_pretrained("emoji")
    >>> pipe("cat.png", prompt="a rocket", scale=0.6, num_images=4, seed=7).images
    """

    def __init__(self, pipeline: Any, adapter: IPAdapter, encoder: VisionEncoder | KeptFeatures, variant: Variant, *,
                 model: KnownModel | None = None, compile: bool = False, savers: Savers | None = None) -> None:  # fmt: skip
        """`adapter` must be attached to `pipeline.unet` already; `compile` as in `from_pretrained`, `savers` were applied."""
        self.pipeline = pipeline
        self.adapter = adapter
        self.encoder = encoder
        self.variant = variant
        self.model = model or KnownModel("", "", Place(""))
        self.savers = savers or Savers(str(pipeline.device))
        self.compiled = compile
        if compile:
            if self.savers.offload:
                raise SettingError(
                    f"offload = {self.savers.offload!r} moves weights, and what is compiled needs them in place: use one"
                )
            from imprompt.sampling.compiled import compile_base

            compile_base(pipeline.unet)

    @classmethod
    def from_pretrained(cls, model: str = "emoji", *, adapter: str | Path | None = None, encoder: str | Path | None = None,
                        device: str | None = None, dtype: torch.dtype | None = None, compile: bool = False,
                        offload: str | None = None, tiling: bool = False, quantize: str | None = None,
                        keep_features: str | Path | Store | None = None, **options: Any) -> Self:  # fmt: skip
        """Load a model by name ("emoji", "sd15", "sdxl"), folder or Hub id, with an adapter by name, file, folder or Hub file.

        That adapter, image encoder and base model were made for each other is checked before anything runs
        (MismatchError). `compile` makes the first steps of a new size slow and all others faster (on a GPU). `offload` ("model",
        "sequential"), `tiling` and `quantize` ("int8", "fp8") save memory: see `imprompt.sampling.memory`. `keep_features`
        is a folder, or a `FeatureMemory`, that keeps the features of image prompts, so that no picture is encoded twice.
        `options` go to the diffusers pipeline's own `from_pretrained`.
        """
        device = check_device(device) if device else default_device()
        dtype = dtype or (torch.float16 if device.startswith("cuda") else torch.float32)
        savers = Savers.check(device, offload, tiling, quantize)
        keep = FeatureFolder(keep_features) if isinstance(keep_features, (str, Path)) else keep_features
        known = find_model(str(model))
        path, told = find_adapter(known, str(adapter) if adapter is not None else None)
        file = read_adapter(path)
        vision = load_encoder(file, told, known, encoder, device, dtype, keep, savers.send_away)
        pipeline = open_pipeline(known, savers.opens_on, dtype=dtype, **options)
        if type(pipeline).__name__ not in TASKS:
            raise MismatchError(f"{model} is a {type(pipeline).__name__}; image prompts are known for {', '.join(TASKS)}")
        savers.lighten(pipeline)
        live = build_adapter(file, family_of(pipeline.unet)).attach(pipeline.unet)
        live.image_kv.to(dtype)  # the projection stays in float32: a resampler's values leave float16's range
        savers.place(pipeline, live)
        if device.startswith("cuda") and offload is None:
            for part in (pipeline.unet, pipeline.vae):
                part.to(memory_format=torch.channels_last)  # as convolutions in low precision read it
        return cls(pipeline, live, vision, file.variant, model=known, compile=compile, savers=savers)

    def image_tokens(self, images: Sequence[Image.Image], *, together: bool = False) -> Tensor:
        """Pictures -> the image tokens of each result (results, N, D): one result per picture, or one for all `together`."""
        tokens = self.adapter.tokens(self.encoder.features(images, self.variant.feature))
        return tokens.flatten(0, 1)[None] if together else tokens

    def null_tokens(self, tokens: Tensor) -> Tensor:
        """The image tokens (1, N, D) of "no image", as many as `tokens` (B, N, D) has: what guidance goes away from."""
        null = self.adapter.tokens(self.encoder.null_features(self.variant))
        return null.repeat(1, tokens.shape[1] // null.shape[1], 1)  # pictures together have several pictures' tokens

    @torch.no_grad()
    def __call__(self, image: Picture | Sequence[Picture], prompt: str = "", *, init_image: Picture | None = None,
                 mask_image: Picture | None = None, batch_size: int = 4, only: int | None = None, on_step: OnStep | None = None,
                 pipeline_options: dict[str, Any] | None = None, **settings: Any) -> Result:  # fmt: skip
        """Make pictures that follow `image`.

        A list of pictures gives one result each (× num_images); with `together=True` they all prompt the same result.
        `init_image` starts from a picture (`strength` of it is redrawn); `mask_image` redraws its white part only.
        Picture i depends on seed and i alone: another `batch_size` changes it by rounding at most, and `only=i` makes
        picture i of the call again bit for bit (on the same machine). Other settings: see `Settings`;
        `pipeline_options` go to the call of diffusers' pipeline.
        """
        start = open_image(init_image) if init_image is not None else None
        mask = open_mask(mask_image) if mask_image is not None else None
        chosen = self.resolve(Settings.check(prompt=prompt, **settings), start)
        pictures = [open_image(p) for p in ([image] if isinstance(image, (str, Path, Image.Image)) else image)]
        if not pictures:
            raise SettingError("no image prompt was given: name at least one picture")
        if batch_size < 1:
            raise SettingError(f"batch_size = {batch_size}: make at least one picture at once")
        pipeline, options = self._task(start, mask, chosen)
        guided = chosen.guidance > 1 and self.pipeline.unet.config.time_cond_proj_dim is None  # as diffusers decides
        tokens = self.image_tokens(pictures, together=chosen.together).repeat_interleave(chosen.num_images, 0)
        null = self.null_tokens(tokens) if guided else None
        rounds = [range(i, min(i + batch_size, len(tokens))) for i in range(0, len(tokens), batch_size)]
        filled = len(rounds[0]) if self.compiled else 0  # a smaller last batch would be compiled anew,
        heard = chosen.scale != 0 or self.compiled  # and so would a call without an image prompt
        if only is not None:
            if only not in range(len(tokens)):
                raise SettingError(f"only = {only}: this call makes {len(tokens)} pictures, the first is 0")
            rounds = [chunk for chunk in rounds if only in chunk]
        steps = chosen.steps if start is None else int(chosen.steps * chosen.strength)
        made: dict[int, Image.Image] = {}
        for number, chunk in enumerate(rounds):
            batch = [*chunk, *[chunk[-1]] * (filled - len(chunk))]
            results = pipeline(
                prompt=chosen.prompt,
                negative_prompt=chosen.negative_prompt or None,
                num_images_per_prompt=len(batch),
                num_inference_steps=chosen.steps,
                guidance_scale=chosen.guidance,
                generator=[torch.Generator().manual_seed(chosen.seed + i) for i in batch],
                cross_attention_kwargs={KEY: self.adapter.prompt(tokens[batch], null, chosen.scale) if heard else None},
                callback_on_step_end=reporter(on_step, number * steps, steps, len(rounds) * steps),
                **options,
                **(pipeline_options or {}),
            ).images
            made |= dict(zip(chunk, results[: len(chunk)], strict=True))
        if start is not None and mask is not None:
            made = {i: keep_outside(picture, start, mask) for i, picture in made.items()}
        kept = [i for i in made if only is None or i == only]
        return Result([made[i] for i in kept], [chosen.seed + i for i in kept], chosen)

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

    def _task(self, start: Image.Image | None, mask: Image.Image | None, settings: Resolved) -> tuple[Any, dict[str, Any]]:
        """The pipeline of diffusers for the task, over the same components, and what it takes beside the prompts."""
        size = {"width": settings.width, "height": settings.height}
        if start is None:
            if mask is not None:
                raise SettingError("mask_image says what to redraw of a picture: give that picture as init_image")
            return self._pipeline(TEXT), size
        if int(settings.steps * settings.strength) < 1:
            raise SettingError(f"strength {settings.strength} of {settings.steps} steps leaves no step to run: raise either")
        begin = {"image": start.resize(settings.size, Image.Resampling.LANCZOS), "strength": settings.strength}
        if mask is None:
            return self._pipeline(IMAGE), begin
        return self._pipeline(INPAINT), begin | size | {"mask_image": mask.resize(settings.size, Image.Resampling.LANCZOS)}

    def _pipeline(self, task: int) -> Any:
        import diffusers

        name = TASKS[type(self.pipeline).__name__][task]
        if name == type(self.pipeline).__name__:
            return self.pipeline
        flags = {flag: value for flag, value in self.pipeline.config.items() if flag in FLAGS}
        other = getattr(diffusers, name)(**self.pipeline.components, **flags)
        other.set_progress_bar_config(disable=True)
        self.savers.again(other)
        return other


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
