"""A training run as a TOML file."""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from imprompt.errors import SettingError, first_line
from imprompt.variants import TRAINABLE, Feature, Variant

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Columns(Part):
    """What the parts of a sample are called: keys of metadata.jsonl or a JSON list, columns of a
    Hub dataset, or file endings in tar shards (several with commas). None: the format's own
    names.
    """

    image: str | None = None
    text: str | None = None
    reference: str | None = (
        # the image prompt's picture, or a list of them; the target picture itself where there is
        # none
        None
    )
    mask: str | None = (
        # a picture that is white where an error counts more: noise.mask_weight; None: there are no
        # masks
        None
    )


class Data(Part):
    """What is trained on. `source` is one of

    a folder with metadata.jsonl     a line per picture: {"file_name": "0001.png", "text": "a cat",
    "reference": "0002.png"}
    list.json                        the paper's list: [{"image_file": "0001.png", "text": "a cat"},
                                     …]
    shards/{0000..0099}.tar          WebDataset tar shards, local or behind a URL
    hub:owner/name                   a dataset of the Hub, its train split; hub:owner/name:split for
                                     another
    """

    source: str
    root: Path | None = None  # where the pictures of a JSON list are; beside the list if not given
    columns: Columns = Columns()
    captions: Literal["required", "optional"] = (
        "required"  # whether a sample without a caption is a bad one
    )
    features: Path | None = (
        # folder of encoded features: filled first if it is not, then read in place of the pictures
        None
    )
    size: Annotated[int, Field(ge=8)] | None = (
        None  # pixels a side, or of a bucket's square; the model's own if not given
    )
    buckets: bool = (
        False  # keep the aspect ratio, in steps of `bucket_step`, at the area of size × size
    )
    bucket_step: Annotated[int, Field(ge=8)] = 64  # pixels
    max_aspect: Annotated[float, Field(ge=1)] = 2.0  # of a bucket
    flip: bool = False  # mirror every other draw of a picture
    drop_text: Share = 0.05  # the paper's drops (section 4.1): each alone, and both
    drop_image: Share = 0.05
    drop_both: Share = 0.05
    held_out: Annotated[int, Field(ge=0)] = 0  # samples kept for measuring, never trained on
    max_bad: Share = 0.01  # of the samples; with more that cannot be read, training stops
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
    """How the adapter's weights are changed.

    AdamW with the paper's settings if nothing is given.
    """

    steps: Count
    batch_size: Count = 8  # samples a step, over all processes and accumulated parts
    accumulate: Count = 1  # parts that a step's batch is taken in
    # adamw8bit needs the extra 8bit; muon is for weight matrices, under it AdamW for all else:
    # `imprompt.training.muon`.
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0  # steps
    clip: Annotated[float, Field(gt=0)] = 1.0  # largest norm of the gradient
    ema: Annotated[float, Field(gt=0, lt=1)] | None = (
        None  # decay of the weights' moving average; none is kept if not given
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = (
        "auto"  # of the frozen base; auto: bf16 where the machine is fast at it
    )
    checkpointing: bool = (
        False  # compute activations again instead of keeping them: less memory, a third slower
    )
    compile: bool = False  # torch.compile the base: minutes at the start, faster steps


class NoiseSettings(Part):
    """Beyond the plain loss; what is predicted (noise, v or flow) is the base model's affair."""

    min_snr: Annotated[float, Field(gt=0)] | None = (
        None  # gamma (Hang et al. 2023, arXiv 2303.09556); 5 is usual
    )
    zero_terminal_snr: bool = (
        False  # rescale the schedule (Lin et al. 2023, arXiv 2305.08891); for v prediction
    )
    # Above 1, noisier timesteps are drawn more often, t = 1 - u^power: there it is decided what is
    # where (Mou et al. 2023,
    # arXiv 2302.08453, section 3.4, with power 3).
    power: Annotated[float, Field(gt=0)] = 1.0
    offset: Annotated[float, Field(ge=0)] = (
        0.0  # strength of noise that is equal over a channel; 0.05 is usual
    )
    # Where the mask (data.columns.mask) is white, an error weighs 1 + mask_weight times what it
    # weighs where it is black.
    mask_weight: Annotated[float, Field(ge=0)] = 0.0


class Validation(Part):
    """A grid of pictures every `every` steps: every image prompt (row) with every text and scale
    (columns), from fixed noise.
    """

    every: Count | None = None  # steps; none is made if not given
    images: tuple[Path, ...] = ()  # image prompts; the first held-out references if not given
    texts: Annotated[tuple[str, ...], Field(min_length=1)] = ("",)
    scales: Annotated[tuple[float, ...], Field(min_length=1)] = (1.0,)
    steps: Count = 25
    guidance: Annotated[float, Field(ge=0)] = 7.5
    seed: int = 0
    clip: str | None = (
        # folder or Hub id of a whole CLIP for CLIP-I and CLIP-T; else CLIP-I by the adapter's
        # encoder
        None
    )


class Logging(Part):
    every: Count = 25  # steps
    # beside metrics.jsonl; wandb needs the extra of that name
    to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)


class Recipe(Part):
    """One run: what is trained, on what, how, and where its states go."""

    model: str
    variant: str = "base"
    tokens: Count | None = None  # the variant's own if not given
    depth: Count | None = None  # layers of the resampler (plus)
    encoder: str | None = None  # CLIP, SigLIP or DINOv2; the model's default if not given
    # what plus and full read of it: "penultimate" (if not given), "last", or several levels side by
    # side, as "levels 7,13,26": level 0 is what the first layer reads, level n what layer n gives
    feature: Feature | None = None
    start: str | None = (
        None  # adapter to go on from: a name, file, state folder or Hub file; fresh if not given
    )
    output: Path
    seed: int = 0
    save_every: Count = 1000  # steps
    keep: Count = 2  # states, beside the best
    licence: str = ""
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
        if self.depth is not None and self.variant != "plus":
            raise ValueError("depth is of the plus variant's resampler")
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

    @property
    def adapter_variant(self) -> Variant:
        """The row of the variant, with the feature that is asked for."""
        return TRAINABLE[self.variant].reading(self.feature)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with `key.sub=value` overrides.

    SettingError with one line that names the key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        for override in overrides:
            _set(table, override)
        return Recipe.model_validate(table)
    except OSError as error:
        raise SettingError(
            f"no recipe {path} ({first_line(error)}); give a TOML file such as those in recipes/"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is no TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "recipe"
        if first["type"] == "extra_forbidden":
            raise SettingError(f"{path}: unknown key {name}{_meant(first['loc'])}") from error
        given = f" = {first['input']!r}" if first["type"] not in ("missing", "value_error") else ""
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
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a text
    groups, _, name = key.strip().rpartition(".")
    for group in filter(None, groups.split(".")):
        table = table.setdefault(group, {})
        if not isinstance(table, dict):
            raise SettingError(f"--set {override}: {group} is no group of keys")
    table[name] = value


def _meant(loc: tuple[str | int, ...]) -> str:
    """What an unknown key was probably meant to be; `loc` is (key,) or (group, key) or longer."""
    group: Any = Recipe
    for name in loc[:-1]:
        group = group.model_fields[str(name)].annotation
    near = difflib.get_close_matches(str(loc[-1]), group.model_fields, 1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(group.model_fields)}"
