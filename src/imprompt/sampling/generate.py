"""The façade: a picture in, pictures out, on a diffusers pipeline that stays diffusers' own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import randbelow
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from imprompt.adapter import ImagePrompt, IPAdapter
from imprompt.attention import family_of
from imprompt.checkpoint import build_adapter, read_adapter
from imprompt.encoders.vision import VisionEncoder, load_encoder
from imprompt.errors import MismatchError, SettingError
from imprompt.images import open_image, open_mask
from imprompt.models import KnownModel, Place, find_adapter, find_model
from imprompt.sampling.settings import Settings
from imprompt.variants import Variant

Picture = str | Path | Image.Image
OnStep = Callable[[int, int], None]  # (steps done, steps in all)

# Which of diffusers' pipelines does what, by the class that the model was saved with.
TASKS = {
    "StableDiffusionPipeline": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "StableDiffusionXLPipeline": ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
}
TEXT, IMAGE, INPAINT = range(3)


@dataclass(frozen=True)
class Result:
    """Pictures, the seed of each (picture i of a call has seed + i), and the settings with every default filled in."""

    images: list[Image.Image]
    seeds: list[int]
    settings: Settings


class ImagePromptPipeline:
    """A diffusers pipeline with an image-prompt adapter attached.

    >>> pipe = ImagePromptPipeline.from_pretrained("emoji")
    >>> pipe("cat.png", prompt="a rocket", scale=0.6, num_images=4, seed=7).images
    """

    def __init__(self, pipeline: Any, adapter: IPAdapter, encoder: VisionEncoder, variant: Variant, *,
                 model: KnownModel | None = None) -> None:  # fmt: skip
        """`adapter` must be attached to `pipeline.unet` already."""
        self.pipeline = pipeline
        self.adapter = adapter
        self.encoder = encoder
        self.variant = variant
        self.model = model or KnownModel("", "", Place(""))

    @classmethod
    def from_pretrained(cls, model: str = "emoji", *, adapter: str | Path | None = None, encoder: str | Path | None = None,
                        device: str | None = None, dtype: torch.dtype | None = None, **options: Any) -> Self:  # fmt: skip
        """Load a model by name ("emoji", "sd15", "sdxl"), folder or Hub id, with an adapter by name, file, folder or Hub file.

        That adapter, image encoder and base model were made for each other is checked before anything runs
        (MismatchError). `options` go to the diffusers pipeline's own `from_pretrained`.
        """
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        device = device or default_device()
        dtype = dtype or (torch.float16 if device.startswith("cuda") else torch.float32)
        known = find_model(str(model))
        path, told = find_adapter(known, str(adapter) if adapter is not None else None)
        file = read_adapter(path)
        vision = load_encoder(file, told, known, encoder, device, dtype)
        source, _ = known.base.fetch_folder()
        pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype, image_encoder=None, **options).to(device)
        if type(pipeline).__name__ not in TASKS:
            raise MismatchError(f"{model} is a {type(pipeline).__name__}; image prompts are known for {', '.join(TASKS)}")
        pipeline.set_progress_bar_config(disable=True)
        live = build_adapter(file, family_of(pipeline.unet)).to(device).attach(pipeline.unet)
        return cls(pipeline, live, vision, file.variant, model=known)

    def prompt(self, images: Sequence[Image.Image], *, guidance: bool, scale: float = 1.0, repeat: int = 1,
               together: bool = False) -> ImagePrompt:  # fmt: skip
        """Pictures -> what `cross_attention_kwargs={"ip_hidden_states": …}` takes, for one result per picture (× repeat).

        `together` makes all pictures prompt the same result: their image tokens stand side by side.
        `guidance` says whether the pipeline runs with classifier-free guidance.
        """
        tokens = self.adapter.tokens(self.encoder.features(images, self.variant.feature))  # (pictures, N, D)
        null = self.adapter.tokens(self.encoder.null_features(self.variant)) if guidance else None  # (1, N, D)
        if together:
            null = null.repeat(1, len(tokens), 1) if null is not None else None
            tokens = tokens.flatten(0, 1)[None]
        return self.adapter.prompt(tokens.repeat_interleave(repeat, 0), null, scale)

    @torch.no_grad()
    def __call__(self, image: Picture | Sequence[Picture], prompt: str = "", *, init_image: Picture | None = None,
                 mask_image: Picture | None = None, batch_size: int = 4, only: int | None = None,
                 on_step: OnStep | None = None, pipeline_options: dict[str, Any] | None = None, **settings: Any) -> Result:  # fmt: skip
        """Make pictures that follow `image`.

        A list of pictures gives one result each (× num_images); with `together=True` they all prompt the same result.
        `init_image` starts from a picture (`strength` of it is redrawn); `mask_image` redraws its white part only.
        Picture i depends on seed and i alone: another `batch_size` changes it by rounding at most, and `only=i` makes
        picture i of the call again bit for bit (on the same machine). Other settings: see `Settings`.
        """
        checked = self._fill(Settings.check(prompt=prompt, **settings), init_image)
        pictures = [open_image(p) for p in ([image] if isinstance(image, (str, Path, Image.Image)) else image)]
        if not pictures:
            raise SettingError("no image prompt was given: name at least one picture")
        groups = [pictures] if checked.together else [[p] for p in pictures]
        task, task_options = self._task(init_image, mask_image, checked)
        guided = checked.guidance > 1 and self.pipeline.unet.config.get("time_cond_proj_dim") is None  # pyright: ignore[reportOptionalOperand]
        jobs = [(group, number) for group in groups for number in range(checked.num_images)]
        seeds = [checked.seed + i for i in range(len(jobs))]  # pyright: ignore[reportOptionalOperand]
        rounds = [range(i, min(i + batch_size, len(jobs))) for i in range(0, len(jobs), batch_size)]
        if only is not None:
            rounds = [chunk for chunk in rounds if only in chunk]
        prompts = [self.prompt(group, guidance=guided, scale=checked.scale, together=checked.together) for group in groups]
        made: list[Image.Image] = []
        for number, chunk in enumerate(rounds):
            made += task(
                prompt=[checked.prompt] * len(chunk),
                negative_prompt=[checked.negative_prompt] * len(chunk) if checked.negative_prompt else None,
                num_inference_steps=checked.steps,
                guidance_scale=checked.guidance,
                generator=[torch.Generator().manual_seed(seeds[i]) for i in chunk],
                cross_attention_kwargs={"ip_hidden_states": stack(prompts, [i // checked.num_images for i in chunk], guided)},
                callback_on_step_end=_reporter(on_step, number, len(rounds), checked, init_image is not None),
                **task_options(len(chunk)),
                **(pipeline_options or {}),
            ).images
        if mask_image is not None and init_image is not None:
            made = [keep_outside(picture, open_image(init_image), open_mask(mask_image)) for picture in made]
        done = [i for chunk in rounds for i in chunk]
        kept = [i for i in done if only is None or i == only]
        return Result([made[done.index(i)] for i in kept], [seeds[i] for i in kept], checked)

    def _fill(self, settings: Settings, init_image: Picture | None) -> Settings:
        """Every default filled in: the model's steps, guidance and size, and a seed if none was given."""
        unit = self.pipeline.vae_scale_factor
        native = self.pipeline.unet.config.sample_size * unit
        width, height = native, native
        if init_image is not None:  # the native area in the first picture's shape
            start = open_image(init_image)
            ratio = (start.width / start.height) ** 0.5
            width, height = (max(unit, round(native * r / unit) * unit) for r in (ratio, 1 / ratio))
        filled = settings.model_copy(
            update={
                "steps": settings.steps or self.model.steps,
                "guidance": self.model.guidance if settings.guidance is None else settings.guidance,
                "seed": randbelow(2**31) if settings.seed is None else settings.seed,
                "width": settings.width or width,
                "height": settings.height or height,
            }
        )
        for name, value in (("width", filled.width), ("height", filled.height)):
            if value % unit:
                below = value // unit * unit
                raise SettingError(f"{name} = {value}: this model's VAE takes multiples of {unit}, such as {below} or {below + unit}")
        return filled

    def _task(self, init_image: Picture | None, mask_image: Picture | None, settings: Settings) -> tuple[Any, Callable[[int], dict[str, Any]]]:
        """The diffusers pipeline for the task, over the same components, and what it takes for a batch of n."""
        if mask_image is not None and init_image is None:
            raise SettingError("mask_image says what to redraw of a picture: give that picture as init_image")
        size = (settings.width, settings.height)
        if init_image is None:
            return self._pipeline(TEXT), lambda n: {"width": size[0], "height": size[1]}
        if int(settings.steps * settings.strength) < 1:  # pyright: ignore[reportOperatorIssue]
            raise SettingError(f"strength {settings.strength} of {settings.steps} steps leaves no step to run: raise either")
        start = open_image(init_image).resize(size, Image.Resampling.LANCZOS)  # pyright: ignore[reportArgumentType]
        if mask_image is None:
            return self._pipeline(IMAGE), lambda n: {"image": [start] * n, "strength": settings.strength}
        mask = open_mask(mask_image).resize(size, Image.Resampling.LANCZOS)  # pyright: ignore[reportArgumentType]
        return self._pipeline(INPAINT), lambda n: {
            "image": [start] * n,
            "mask_image": [mask] * n,
            "strength": settings.strength,
            "width": size[0],
            "height": size[1],
        }

    def _pipeline(self, task: int) -> Any:
        import diffusers

        name = TASKS[type(self.pipeline).__name__][task]
        if name == type(self.pipeline).__name__:
            return self.pipeline
        other = getattr(diffusers, name)(**self.pipeline.components, **_flags(self.pipeline))
        other.set_progress_bar_config(disable=True)
        return other


def stack(prompts: Sequence[ImagePrompt], which: Sequence[int], guided: bool) -> ImagePrompt:
    """The prompts of a batch, item by item; with guidance the unconditional half first, then the conditional one."""

    def rows(tensors: Sequence[Tensor]) -> Tensor:
        halves = range(2) if guided else range(1)
        return torch.cat([tensors[w][h : h + 1] for h in halves for w in which])

    sites = range(len(prompts[0].keys))
    keys = tuple(rows([p.keys[s] for p in prompts]) for s in sites)
    values = tuple(rows([p.values[s] for p in prompts]) for s in sites)
    return ImagePrompt(keys, values, prompts[0].scale)


def keep_outside(made: Image.Image, start: Image.Image, mask: Image.Image) -> Image.Image:
    """The redrawn part of `made` on the untouched rest of `start`."""
    return Image.composite(made, start.resize(made.size, Image.Resampling.LANCZOS), mask.resize(made.size, Image.Resampling.LANCZOS))


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _flags(pipeline: Any) -> dict[str, Any]:
    """Constructor options of a diffusers pipeline that are no components."""
    return {name: pipeline.config[name] for name in ("requires_safety_checker", "force_zeros_for_empty_prompt") if name in pipeline.config}


def _reporter(on_step: OnStep | None, number: int, rounds: int, settings: Settings, partial: bool) -> Callable[..., dict[str, Any]] | None:
    if on_step is None:
        return None
    steps = int(settings.steps * settings.strength) if partial else settings.steps  # pyright: ignore[reportOperatorIssue]

    def report(_pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(number * steps + min(step + 1, steps), rounds * steps)  # pyright: ignore[reportOperatorIssue]
        return tensors

    return report
