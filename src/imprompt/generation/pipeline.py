"""Make pictures from pictures: image prompts on an unchanged diffusers pipeline."""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from secrets import randbelow
from typing import Any, NamedTuple, Self, Unpack

import torch
from PIL import Image
from torch import Tensor

from imprompt.attention.image_guidance import BRANCHES
from imprompt.encoders.feature_cache import FeatureFolder, Store
from imprompt.errors import MismatchError, SettingError, first_line
from imprompt.families.base import base_of, family_of, pipeline_family
from imprompt.generation.engine import Engine, Seat
from imprompt.generation.memory import MemoryOptions
from imprompt.generation.options import (
    allow_clip_skip,
    check_image_guidance,
    check_per_picture,
    check_takes_settings,
    check_texts,
    checked_options,
    refusals,
    rows_for,
    takes_negative,
    texts_for,
    without_texts,
)
from imprompt.generation.prepare import (
    Attached,
    CallContext,
    LoadedAdapter,
    PreparedReference,
    choices,
    joined_to,
    normalise_masks,
)
from imprompt.generation.record import fingerprints
from imprompt.generation.references import AdapterChoice, Item, Reference, items_of
from imprompt.generation.schedule import check_scheduler
from imprompt.generation.settings import MAX_SIDE, Resolved, Settings, SettingValues
from imprompt.generation.tasks import InputImages, open_controlnet, task
from imprompt.images import open_image, open_mask
from imprompt.models import KnownModel, Location, find_model, open_pipeline
from imprompt.prompt import ImagePrompt, stack_items

Picture = str | Path | Image.Image
ImageInput = Picture | Reference
Choice = str | Path | AdapterChoice
OnStep = Callable[[int, int], None]  # (steps done, steps in all)


@dataclass(frozen=True)
class Result:
    """Pictures of a call, the seed of each, and the settings with every default filled in.

    Picture i of a call has seed + i. `weights` holds fingerprints of what made them.
    """

    images: list[Image.Image]
    seeds: list[int]
    settings: Resolved
    weights: dict[str, str] = field(default_factory=dict)


class ImagePromptPipeline:
    """A diffusers pipeline with image-prompt adapters attached.

    >>> pipe = ImagePromptPipeline.from_pretrained("emoji")
    >>> pipe("cat.png", prompt="a rocket", scale=0.6, num_images=4, seed=7).images
    >>> left = Reference(images="cat.png", mask="left.png")
    >>> right = Reference(images="dog.png", mask="right.png")
    >>> pipe([left, right], together=True).images
    """

    def __init__(
        self,
        pipeline: Any,
        adapters: Attached | Sequence[Attached],
        *,
        model: KnownModel | None = None,
        controlnet: Any = None,
        compile: bool = False,
        savers: MemoryOptions | None = None,
    ) -> None:
        """Join a pipeline and adapters that are attached to its base model.

        compile  as in `from_pretrained`
        savers   options that were applied to the pipeline
        """
        several = [adapters] if isinstance(adapters, Attached) else list(adapters)
        self.pipeline = pipeline
        base = base_of(pipeline)
        self.family = family_of(base)
        check_takes_settings(pipeline, self.family.guidance)
        check_scheduler(pipeline.scheduler)
        self.engine = Engine(base, self.family, several[0].adapter.injection)
        self.engine.injection.timesteps = pipeline.scheduler.config.num_train_timesteps
        self.adapters = {attached.name: attached for attached in several}
        self.model = model or KnownModel("", "", Location(""))
        self.savers = savers or MemoryOptions(str(pipeline.device))
        self.controlnet = controlnet
        self.compiled = compile
        self.weights: dict[str, str] = {}  # their fingerprints, where they were loaded here
        if compile:
            if self.savers.offload:
                raise SettingError(
                    f"offload = {self.savers.offload!r} moves weights, and what is compiled needs "
                    "them in place: use one"
                )
            from imprompt.generation.compile import compile_base

            compile_base(base)

    @property
    def first(self) -> Attached:
        """Adapter for references that name none."""
        return next(iter(self.adapters.values()))

    @classmethod
    def from_pretrained(
        cls,
        model: str = "emoji",
        *,
        adapter: Choice | Sequence[Choice] | None = None,
        encoder: str | Path | None = None,
        variant: str | None = None,
        faces: Any = None,
        controlnet: str | Path | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        offload: str | None = None,
        tiling: bool = False,
        quantize: str | None = None,
        keep_features: str | Path | Store | None = None,
        **options: Any,
    ) -> Self:
        """Load a model and its adapters.

        `model` is a name ("emoji", "sd15", "sdxl"), a folder or a Hub id; `adapter` is a name, a
        file or a Hub file, an `AdapterChoice`, or a list of them for several adapters. Raise
        MismatchError before anything runs if adapter, image encoder and base model were not made
        for each other. `encoder` and `variant` are for what a single adapter does not state (files
        of fp16 weights are found by themselves where a folder has no others);
        `faces` encodes faces for FaceID (insightface if not given): see `imprompt.encoders.face`.
        `controlnet` is one that the model knows by name, a folder or a Hub id, for calls with a
        `control_image`. `compile` makes the first steps of a new size slow and all others faster
        (on a GPU). `offload` ("model", "sequential"), `tiling` and `quantize` ("int8", "fp8") save
        memory: see `imprompt.generation.memory`. `keep_features` is a folder, or a `FeatureMemory`,
        that keeps the features of image prompts, so that no picture is encoded twice. `options` go
        to the diffusers pipeline's own `from_pretrained`.
        """
        device = check_device(device) if device else default_device()
        dtype = dtype or (torch.float16 if device.startswith("cuda") else torch.float32)
        savers = MemoryOptions.check(device, offload, tiling, quantize)
        keep = store_of(keep_features)
        known = find_model(str(model))
        opened = [
            LoadedAdapter.read(choice, known, faces, device, dtype, keep, savers)
            for choice in choices(adapter, encoder, variant)
        ]
        pipeline = open_pipeline(known, savers.opens_on, dtype=dtype, **options)
        pipeline_family(type(pipeline).__name__)
        net = (
            None if controlnet is None else open_controlnet(str(controlnet), known, pipeline, dtype)
        )
        weights = fingerprints(pipeline.components, opened, net)
        savers.quantize_and_tile(pipeline)
        with joined_to(base_of(pipeline), opened, dtype) as attached:
            savers.place(pipeline, *(one.adapter for one in attached))
        if device.startswith("cuda") and offload is None:
            for part in (base_of(pipeline), pipeline.vae):
                convolve_in_channels_last(part)
        if net is not None:
            savers.to_device(net)
        made = cls(pipeline, attached, model=known, controlnet=net, compile=compile, savers=savers)
        made.weights = weights
        return made

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        adapter: Choice | Sequence[Choice] | None = None,
        *,
        model: str = "",
        encoder: str | Path | None = None,
        variant: str | None = None,
        faces: Any = None,
        keep_features: str | Path | Store | None = None,
    ) -> Self:
        """Attach adapters to a diffusers pipeline that is already loaded, such as a ControlNet one.

        `model` is the name of the base model that it was made from; it is needed to give adapters
        by name. The pipeline keeps its device and precision.
        """
        known = (
            find_model(model) if model else KnownModel(type(pipeline).__name__, "", Location(""))
        )
        keep = store_of(keep_features)
        # under offload the weights are on another device than the one that computes
        device, dtype = (str(pipeline._execution_device), base_of(pipeline).dtype)
        savers = MemoryOptions(device)
        opened = [
            LoadedAdapter.read(choice, known, faces, device, dtype, keep, savers)
            for choice in choices(adapter, encoder, variant)
        ]
        with joined_to(base_of(pipeline), opened, dtype) as attached:
            for one in attached:
                one.adapter.to(device)
        return cls(pipeline, attached, model=known, savers=savers)

    def detach(self) -> None:
        """Detach all adapters and restore the base model."""
        for attached in self.adapters.values():
            attached.adapter.detach()

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput | Sequence[ImageInput]],
        prompt: str | Sequence[str] = "",
        *,
        init_image: Picture | None = None,
        mask_image: Picture | None = None,
        control_image: Picture | None = None,
        batch_size: int = 4,
        only: int | None = None,
        on_step: OnStep | None = None,
        pipeline_options: dict[str, Any] | None = None,
        **settings: Unpack[SettingValues],
    ) -> Result:
        """Make pictures that follow `image`: a picture, a file of features, or a `Reference`.

        A list of them gives one result each (× num_images); with `together=True` they all prompt
        the same result, as do those of a list in the list. Each item has its own references,
        scales, masks and windows, and its own text if `prompt` is a list. `init_image` is a picture
        to start from (`strength` of it is redrawn); `mask_image` limits that to its white part;
        `control_image` is the picture for the ControlNet (`control_scale` is its strength). Picture
        i depends on seed and i alone: another `batch_size` changes it by rounding at most, and
        `only=i` makes picture i of the call again bit for bit (on the same machine). Other
        settings: see `Settings`; `pipeline_options` go to the call of diffusers' pipeline.
        """
        job = self.prepare(
            image,
            Settings(prompt=prompt, **settings),
            init_image,
            mask_image,
            control_image,
            batch_size,
            only,
            pipeline_options,
        )
        return self.make_all(job, on_step)

    @torch.no_grad()
    def prepare(
        self,
        image: Any,
        settings: Settings,
        init_image: Picture | None = None,
        mask_image: Picture | None = None,
        control_image: Picture | None = None,
        batch_size: int = 4,
        only: int | None = None,
        pipeline_options: dict[str, Any] | None = None,
    ) -> "Job":
        """Check a call and encode its image prompts: all work before the first step.

        Any thread may call it.
        """
        self.engine.use(base_of(self.pipeline))
        check_scheduler(self.pipeline.scheduler)
        begin, control = (
            None if picture is None else open_image(picture)
            for picture in (init_image, control_image)
        )
        start = InputImages(begin, None if mask_image is None else open_mask(mask_image), control)
        chosen = self.resolve(settings, begin or control)
        items = items_of(image, chosen.together)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise SettingError(f"batch_size = {batch_size!r}: make at least one picture at once")
        pipeline, options = task(
            self.pipeline, start, chosen, self.controlnet if control else None, self.savers
        )
        extra = checked_options(pipeline_options, pipeline, options, self.family.guidance)
        rest, texts = without_texts(extra)
        check_texts(chosen, texts, len(items), pipeline)
        total = len(items) * chosen.num_images
        check_per_picture(rest, total)
        if rest.get("clip_skip") is not None:
            allow_clip_skip(pipeline)
        guided = self.family.guided(pipeline, chosen.guidance, extra)
        if chosen.image_guidance is not None:
            check_image_guidance(chosen, pipeline, extra, guided=guided, family=self.family)
        for item in items:
            self.check(item, guided)
        call = self._call(chosen, guided)
        with self.engine.outside:
            references = [self.prepare_item(item, call) for item in items]
        batch_size = self.largest_batch(chosen, batch_size)
        rounds = [range(i, min(i + batch_size, total)) for i in range(0, total, batch_size)]
        # a smaller last batch would be compiled again
        filled = len(rounds[0]) if self.compiled else 0
        if only is not None:
            if only not in range(total):
                raise SettingError(
                    f"only = {only}: this call makes {total} pictures, the first is 0"
                )
            rounds = [chunk for chunk in rounds if only in chunk]
        return Job(
            chosen,
            pipeline,
            {**self.family.call_options(pipeline), **options, **rest},
            texts,
            start,
            references,
            rounds,
            filled,
            guided,
            only,
        )

    def make_all(self, job: "Job", on_step: OnStep | None = None) -> Result:
        """Make all pictures of a job and return them with their seeds."""
        made = dict(self.make(job, on_step))
        seeds = [job.settings.seed + number for number in made]
        return Result(list(made.values()), seeds, job.settings, self.weights)

    @torch.no_grad()
    def make(self, job: "Job", on_step: OnStep | None = None) -> Iterator[tuple[int, Image.Image]]:
        """Yield the pictures of a job, round by round, each after its number in the call."""
        chosen, begin = job.settings, job.start.init
        steps = chosen.steps if begin is None else int(chosen.steps * chosen.strength)
        for number, chunk in enumerate(job.rounds):
            before, total = number * steps, len(job.rounds) * steps

            def report(done: int, before: int = before, total: int = total) -> None:
                if on_step is not None:
                    on_step(before + min(done, steps), total)

            results = self.run(job, [*chunk, *[chunk[-1]] * (job.filled - len(chunk))], report)
            for index, picture in zip(chunk, results, strict=False):
                if job.only in (None, index):
                    yield index, keep_outside(picture, job.start)

    def run(
        self, job: "Job", batch: Sequence[int], report: Callable[[int], None]
    ) -> list[Image.Image]:
        """Make the pictures of these numbers in one batch, in diffusers' own pipeline."""
        chosen = job.settings
        order = BRANCHES if chosen.image_guidance is not None else (0, -1) if job.guided else (-1,)
        prompts = prompts_for([job.references[i // chosen.num_images] for i in batch], order)
        seat = Seat(self.engine, prompts, chosen.image_guidance)
        words = job.guided and takes_negative(job.pipeline)
        no_words = self.family.no_words if words else None
        with (
            self.engine.request(job.pipeline, seat) as pipeline,
            refusals(pipeline, lambda: seat.calls),
        ):
            result = pipeline(
                **texts_for(chosen, job.texts, batch, no_words),
                num_inference_steps=chosen.steps,
                **{self.family.guidance: chosen.guidance},
                generator=[torch.Generator().manual_seed(chosen.seed + i) for i in batch],
                **followed(job.pipeline, seat, report, chosen.steps),
                **rows_for(job.options, batch),
            )
        return images_made(result, pipeline)

    def largest_batch(self, settings: Resolved, wanted: int) -> int:
        """Return a size of batches in which no picture changes by the others' texts.

        wanted  the size that was asked for
        """
        if not self.family.one_text or isinstance(settings.prompt, str):
            return wanted
        return gcd(settings.num_images, wanted)

    def _call(self, settings: Resolved, guided: bool) -> CallContext:
        unit, timesteps = (
            self.family.latent_pixels(self.pipeline),
            self.pipeline.scheduler.config.num_train_timesteps,
        )
        size = settings.height // unit, settings.width // unit
        return CallContext(
            guided, settings.scale, settings.overlap, size, timesteps, settings.seed, {}
        )

    def check(self, item: Item, guided: bool) -> None:
        """Raise SettingError if a reference asks for what the pipeline cannot do.

        It is called before anything is encoded.

        guided  whether the call has a negative branch
        """
        for reference in item:
            if reference.negative is not None and not guided:
                raise SettingError(
                    "negative: guidance moves away from this picture, and this call of a "
                    f"{type(self.pipeline).__name__} has none: raise it, or leave negative out"
                )
            if reference.adapter is not None and reference.adapter not in self.adapters:
                raise SettingError(
                    f"no adapter {reference.adapter!r} is attached; there are "
                    f"{', '.join(map(repr, self.adapters))}"
                )
            self.adapter_for(reference).reader.check(reference)

    def adapter_for(self, reference: Reference) -> Attached:
        """Return the adapter that a reference names, or the first."""
        return self.first if reference.adapter is None else self.adapters[reference.adapter]

    def prepare_item(self, item: Item, call: CallContext) -> list[PreparedReference]:
        """Encode the references of one result.

        Inactive ones are left out, except in a compiled model, whose graph needs the same inputs.
        """
        ready = normalise_masks(
            [self.adapter_for(reference).prepare(reference, call) for reference in item],
            call.overlap,
        )
        return [one for one in ready if one.active or self.compiled]

    def resolve(self, settings: Settings, start: Image.Image | None = None) -> Resolved:
        """Return the settings with every default filled in; SettingError.

        Defaults are the scale, steps and guidance that are usual for the first adapter, the model's
        steps and guidance, else its pipeline's, its size, and a random seed.
        """
        unit = self.family.side_unit(self.pipeline)
        native = self.family.native_side(self.pipeline)
        # the native area, with the aspect ratio of the picture to start from
        ratio = 1.0 if start is None else (start.width / start.height) ** 0.5
        width, height = (
            min(max(unit, round(native * side / unit) * unit), MAX_SIDE // unit * unit)
            for side in (ratio, 1 / ratio)
        )
        usual, scales = self.first.usual, {one.usual.scale for one in self.adapters.values()}
        own = {
            "scale": usual.scale if len(scales) == 1 else None,
            "steps": usual.steps or self.model.steps,
            "guidance": self.model.guidance if usual.guidance is None else usual.guidance,
            "width": width,
            "height": height,
        }
        takes = inspect.signature(self.pipeline.__call__).parameters
        plain = {
            "seed": randbelow(2**31),
            "steps": takes["num_inference_steps"].default,
            "guidance": takes[self.family.guidance].default,
        }
        chosen: dict[str, Any] = {}
        for values in (plain, own, settings.model_dump()):
            chosen |= {name: value for name, value in values.items() if value is not None}
        resolved = Resolved.model_validate(chosen)
        for name, value in (("width", resolved.width), ("height", resolved.height)):
            if value % unit:
                near = (value // unit * unit, (value // unit + 1) * unit)
                sizes = " or ".join(str(side) for side in near if 0 < side <= MAX_SIDE)
                raise SettingError(
                    f"{name} = {value}: this model takes multiples of {unit}, such as {sizes}"
                )
        made = self.family.made_size(self.pipeline, *resolved.size)
        if made != resolved.size:
            raise SettingError(
                f"width = {resolved.width}, height = {resolved.height}: a "
                f"{type(self.pipeline).__name__} makes {made[0]} × {made[1]} of it: give these"
            )
        if resolved.steps > (most := self.pipeline.scheduler.config.num_train_timesteps):
            raise SettingError(
                f"steps = {resolved.steps}: this model's noise schedule has {most}, give fewer"
            )
        return resolved


def prompts_for(
    batch: Sequence[list[PreparedReference]], order: Sequence[int]
) -> list[ImagePrompt]:
    """Project the prompts for the items of a batch; a reference of several items only once."""
    ready = {id(one): one for item in batch for one in item}
    made = {key: one.prompt() for key, one in ready.items()}
    return stack_items([[made[id(one)] for one in item] for item in batch], order)


def images_made(result: Any, pipeline: Any) -> Any:
    """Return the pictures that a pipeline made; MismatchError if it makes something else."""
    for name in ("images", "image"):
        if hasattr(result, name):
            return getattr(result, name)
    raise MismatchError(
        f"a {type(pipeline).__name__} gives {' and '.join(result)}, not images: call it "
        "yourself in `with adapter.using(prompt):` (docs/ecosystem.md)"
    )


def keep_outside(made: Image.Image, start: InputImages) -> Image.Image:
    """Paste the redrawn part of `made` on the picture that it started from.

    Without a mask return `made` as it is.
    """
    if start.init is None or start.mask is None:
        return made
    first, mask = (
        picture.resize(made.size, Image.Resampling.LANCZOS) for picture in (start.init, start.mask)
    )
    return Image.composite(made, first, mask)


def convolve_in_channels_last(part: Any) -> None:
    """Store a model's weights of 2-D convolutions in the layout that low precision reads."""
    for weight in part.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def store_of(place: str | Path | Store | None) -> Store | None:
    """Return the store of features; a path becomes a folder that keeps them."""
    return FeatureFolder(place) if isinstance(place, str | Path) else place


def check_device(name: str) -> str:
    """Return the device's name; SettingError unless it can compute."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        # the device is unknown, missing, or not supported by this build of torch
        raise SettingError(
            f"device {name!r} cannot be used here, {default_device()} can ({first_line(error)})"
        ) from error
    return name


def default_device() -> str:
    """Return the name of the best available device: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def followed(
    pipeline: Any, seat: Seat, report: Callable[[int], None], steps: int
) -> dict[str, Any]:
    """Return the options that make a pipeline report every step, and end the seat's loop.

    They are empty if the pipeline has no callback.
    """

    def after(step: int, steps: int) -> None:
        report(step + 1)
        if step + 1 >= steps:
            seat.end_loop()

    def callback(own: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        after(step, own.num_timesteps)
        return tensors

    takes = inspect.signature(pipeline.__call__).parameters
    if "callback_on_step_end" in takes:
        return {"callback_on_step_end": callback}
    return {"callback": lambda step, *_: after(step, steps)} if "callback" in takes else {}


class Job(NamedTuple):
    """A checked call whose image prompts are encoded, ready to be run.

    options  for diffusers' pipeline, in addition to texts and numbers
    texts    encoded texts that replace words, by the pipeline's names
    rounds   numbers of the pictures that are made in one batch
    filled   size to which a round is padded
    guided   whether there is classifier-free guidance
    only     number of the one picture to make; None: all
    """

    settings: Resolved
    pipeline: Any
    options: dict[str, Any]
    texts: dict[str, Tensor]
    start: InputImages
    references: list[list[PreparedReference]]
    rounds: list[range]
    filled: int
    guided: bool
    only: int | None

    def without(self, done: Collection[int]) -> "Job":
        """Return the job without the rounds whose pictures are all done."""
        left = [
            chunk
            for chunk in self.rounds
            if any(self.only in (None, number) and number not in done for number in chunk)
        ]
        return self._replace(rounds=left)
