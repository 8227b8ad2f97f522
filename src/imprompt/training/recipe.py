"""The recipe of a training run, read from a TOML file."""

import difflib
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from imprompt.errors import SettingError, first_line
from imprompt.projections.resampler import FacePlusProjection, Perceiver
from imprompt.untrusted import MAX_SETTINGS, parse_toml, read_text
from imprompt.variants import TRAINABLE, Feature, Variant

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """A group of keys; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Columns(Part):
    """Names of a sample's parts in the training set.

    They are keys of metadata.jsonl or a JSON list, columns of a Hub dataset, or file endings in tar
    shards (several are separated by commas). None: the format's own names.
    """

    image: str | None = None
    text: str | None = None
    # picture or pictures of the image prompt; a sample without one is prompted by its target
    reference: str | None = None
    # picture that is white where an error counts more (noise.mask_weight); None: no masks
    mask: str | None = None


class Data(Part):
    """The training set and how its samples are drawn.

    `source` is one of

    folder with metadata.jsonl       a line per picture: {"file_name": "0001.png", "text": "a cat",
                                     "reference": "0002.png"}
    list.json                        the paper's list: [{"image_file": "0001.png", "text": "a cat"},
                                     …]
    shards/{0000..0099}.tar          WebDataset tar shards, local or behind a URL
    hub:owner/name                   a dataset of the Hub, its train split; hub:owner/name:split for
                                     another
    """

    source: str
    root: Path | None = None  # of a JSON list's pictures; the folder of the list if not given
    columns: Columns = Columns()
    # whether a sample without a caption is bad
    captions: Literal["required", "optional"] = "required"
    # folder of encoded features: encoded first if necessary, then read instead of the pictures
    features: Path | None = None
    # largest size of that folder in GB, 1e9 bytes; more is not encoded. None: no limit
    features_gb: Annotated[float, Field(gt=0)] | None = None
    # pixels a side, or a side of the square with a bucket's area; the model's own if not given
    size: Annotated[int, Field(ge=8)] | None = None
    # keep the aspect ratio, in steps of `bucket_step`, at the area of size × size
    buckets: bool = False
    bucket_step: Annotated[int, Field(ge=8)] = 64  # pixels
    max_aspect: Annotated[float, Field(ge=1)] = 2.0  # largest aspect ratio of a bucket
    flip: bool = False  # mirror every other draw of a picture
    drop_text: Share = 0.05  # the paper's drop rates (section 4.1): each alone, and both
    drop_image: Share = 0.05
    drop_both: Share = 0.05
    held_out: Annotated[int, Field(ge=0)] = 0  # samples for validation, never trained on
    max_bad: Share = 0.01  # share of bad samples above which training stops
    workers: Annotated[int, Field(ge=0)] = 2  # processes that read ahead, in each training process

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.drop_text + self.drop_image + self.drop_both > 1:
            total = self.drop_text + self.drop_image + self.drop_both
            raise ValueError(
                f"drop_text, drop_image and drop_both add up to {total:g}: 1 at most is allowed"
            )
        return self


class Optimization(Part):
    """How the adapter's weights are trained.

    The defaults are AdamW with the paper's settings.
    """

    steps: Count
    batch_size: Count = 8  # samples in a step, over all processes and accumulated parts
    accumulate: Count = 1  # parts into which a step's batch is divided
    # adamw8bit needs the extra 8bit; muon trains weight matrices, and AdamW all else with it
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0  # steps
    clip: Annotated[float, Field(gt=0)] = 1.0  # largest norm of the gradient
    # decay of the weights' moving average; none is kept if not given
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    # of the frozen base; auto: bf16 where the machine computes it fast
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # compute activations again instead of keeping them: less memory, a third slower
    checkpointing: bool = False
    compile: bool = False  # torch.compile the base: minutes at the start, faster steps


class NoiseSettings(Part):
    """Additions to the plain loss.

    What is predicted (noise, v or flow) depends on the base model.
    """

    # gamma (Hang et al. 2023, arXiv 2303.09556); 5 is usual
    min_snr: Annotated[float, Field(gt=0)] | None = None
    # rescale the schedule (Lin et al. 2023, arXiv 2305.08891); for v prediction
    zero_terminal_snr: bool = False
    # Above 1, noisier timesteps, which decide the layout, are drawn more often: t = 1 - u^power
    # (Mou et al. 2023, arXiv 2302.08453, section 3.4, with power 3).
    power: Annotated[float, Field(gt=0)] = 1.0
    # How timesteps are drawn: all alike, or more often in the middle (Esser et al. 2024, arXiv
    # 2403.03206, section 3.1). Flow matching draws logit-normal if not given, diffusion uniform.
    timesteps: Literal["uniform", "logit-normal"] | None = None
    logit_mean: float = 0.0  # of logit-normal; above 0 more noise
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    # Flow matching takes noisier timesteps for larger pictures, which more noise hides (the same,
    # section 5.3.2). static: as the scheduler's configuration states. dynamic: by each picture's
    # size, as the pipelines of Flux and others sample; without it their adapters see little of the
    # noise that sampling begins with.
    shift: Literal["static", "dynamic"] = "static"
    # strength of noise that is equal over a channel; 0.05 is usual
    offset: Annotated[float, Field(ge=0)] = 0.0
    # An error weighs 1 + mask_weight times as much where the mask is white as where it is black.
    mask_weight: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.timesteps == "uniform" and (self.logit_mean, self.logit_std) != (0, 1):
            raise ValueError(
                "logit_mean and logit_std are of timesteps = 'logit-normal': leave them out"
            )
        return self


class Validation(Part):
    """A grid of pictures every `every` steps, from fixed noise.

    Its rows are image prompts, its columns texts and scales.
    """

    every: Count | None = None  # steps; none is made if not given
    # steps between measurements of the loss with own and with shuffled references; 0: never
    shuffled_every: Annotated[int, Field(ge=0)] = 500
    images: tuple[Path, ...] = ()  # image prompts; the first held-out references if not given
    texts: Annotated[tuple[str, ...], Field(min_length=1)] = ("",)
    scales: Annotated[tuple[float, ...], Field(min_length=1)] = (1.0,)
    steps: Count = 25
    guidance: Annotated[float, Field(ge=0)] | None = None  # the model's own if not given
    seed: int = 0
    # folder or Hub id of a CLIP for CLIP-I and CLIP-T; else CLIP-I by the adapter's encoder
    clip: str | None = None


class Logging(Part):
    """How often the numbers of a run are logged, and to which trackers."""

    every: Count = 25  # steps
    # in addition to metrics.jsonl; wandb needs the extra of that name
    to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)


class Recipe(Part):
    """One run: what is trained, on what, how, and where its states are saved."""

    model: str
    variant: str = "base"
    tokens: Count | None = None  # the variant's own if not given
    depth: Count | None = None  # layers of the resampler (plus, faceid-plus, portrait-unnorm)
    encoder: str | None = None  # CLIP, SigLIP or DINOv2; the model's default if not given
    # what plus and full read of it: "penultimate" (if not given), "last", or several levels
    # concatenated, as "levels 7,13,26": level 0 is the first layer's input, n the nth's output
    feature: Feature | None = None
    # face encoder (FaceID): insightface's package of weights or a folder of one, or a .safetensors
    # file of embeddings as `imprompt embed` writes them; the variant's own package if not given
    faces: str | None = None
    # width of the image tokens; that of the text that the base's layers read if not given
    token_width: Count | None = None
    # whether the image's queries and keys are normed in each head, for transformers; if not given,
    # where the base does not norm its own
    qk_norm: bool | None = None
    rank: Count | None = None  # of the low-rank part (FaceID); 128, as published, if not given
    # adapter to start from: a name, file, state folder or Hub file; a new one if not given
    start: str | None = None
    output: Path
    seed: int = 0
    save_every: Count = 1000  # steps
    save_minutes: Annotated[float, Field(gt=0)] | None = 10.0  # as well; None: by steps alone
    keep: Count = 2  # newest states; the best one is kept as well
    licence: str = ""
    # refuse a base whose own loss is not below that of the best constant prediction
    check_base: bool = True
    data: Data
    optimization: Optimization
    noise: NoiseSettings = NoiseSettings()
    validation: Validation = Validation()
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.variant not in TRAINABLE:
            raise ValueError(f"unknown variant {self.variant!r}; known: {', '.join(TRAINABLE)}")
        try:
            _ = self.adapter_variant
        except SettingError as error:
            raise ValueError(str(error)) from error
        self._check_options()
        if self.tokens is not None and self.variant == "full":
            raise ValueError("the full variant has one token per patch: leave tokens out")
        if self.noise.mask_weight and not self.data.columns.mask:
            raise ValueError(
                f"noise.mask_weight = {self.noise.mask_weight:g} needs masks: data.columns.mask "
                "names the key of a picture "
                "that is white where an error counts more"
            )
        if self.optimization.batch_size % self.optimization.accumulate:
            raise ValueError(
                f"optimization.batch_size = {self.optimization.batch_size} cannot be taken in "
                f"{self.optimization.accumulate} equal parts (optimization.accumulate)"
            )
        return self

    def _check_options(self) -> None:
        """Raise ValueError for an option that only other variants have."""
        options = {
            "depth": lambda row: issubclass(row.projection, Perceiver | FacePlusProjection),
            "rank": lambda row: row.lora,
            "token_width": lambda row: not row.lora,  # which reads the text too
            "faces": lambda row: bool(row.faces),
            "encoder": lambda row: row.image_feature is not None,
        }
        for key, suits in options.items():
            if getattr(self, key) is not None and not suits(TRAINABLE[self.variant]):
                names = ", ".join(name for name, row in TRAINABLE.items() if suits(row))
                raise ValueError(f"{key} is an option of {names} only")

    @property
    def face_source(self) -> str | None:
        """Where face embeddings come from; None for a variant that reads none."""
        return self.faces or TRAINABLE[self.variant].faces or None

    @property
    def adapter_variant(self) -> Variant:
        """The row of the variant, with the feature that is asked for."""
        return TRAINABLE[self.variant].reading(self.feature)


RECIPES = Path(__file__).parents[1] / "recipes"  # the published ones, in the package


def find_recipe(path: Path) -> Path:
    """Return the file of a recipe: recipes/NAME.toml is in the package if no such file is here."""
    packaged = RECIPES / path.name
    own = path.exists() or path.parent != Path(RECIPES.name) or not packaged.exists()
    return path if own else packaged


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe in a TOML file, with `key.sub=value` overrides.

    Raise SettingError with one line that names the key.
    """
    try:
        table = parse_toml(read_text(find_recipe(path), MAX_SETTINGS))
    except OSError as error:
        raise SettingError(
            f"no recipe {path} ({first_line(error)}); give a TOML file, or one of the package: "
            + ", ".join(f"recipes/{name.name}" for name in sorted(RECIPES.glob("*.toml")))
        ) from error
    except SettingError as error:
        raise SettingError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _set(table, override)
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "recipe"
        if first["type"] == "extra_forbidden":
            raise SettingError(f"{path}: unknown key {name}{_meant(first['loc'])}") from error
        told = first["type"] in ("missing", "value_error")
        given = "" if told else f" = {reprlib.repr(first['input'])}"
        words = (
            "Input should be a path"
            if first["type"] == "path_type"
            else first["msg"].removeprefix("Value error, ")
        )
        raise SettingError(f"{path}: {name}{given}: {words}") from error


def _set(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise SettingError(f"--set {override}: write key=value, such as optimization.steps=100")
    try:
        value = parse_toml(f"v = {text}")["v"]
    except SettingError:
        value = text  # a word without quotes is a string
    groups, _, name = key.strip().rpartition(".")
    for group in filter(None, groups.split(".")):
        table = table.setdefault(group, {})
        if not isinstance(table, dict):
            raise SettingError(f"--set {override}: {group} is not a group of keys")
    table[name] = value


def _meant(loc: tuple[str | int, ...]) -> str:
    """Return a hint for an unknown key; `loc` is (key,) or (group, key) or longer."""
    group: Any = Recipe
    for name in loc[:-1]:
        group = group.model_fields[str(name)].annotation
    near = difflib.get_close_matches(str(loc[-1]), group.model_fields, 1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(group.model_fields)}"
