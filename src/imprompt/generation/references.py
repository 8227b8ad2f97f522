"""Define image prompts: which pictures, how they combine, how strong, where and when they apply.

A `Reference` is one image prompt; a result can follow several. A request file and the PNG's
metadata hold references. A reference is checked without torch, before any weights are read. Its
fields are flags of `imprompt generate`.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from imprompt.encoders.choices import Crop, Noise, NoiseKind
from imprompt.errors import ImageError, SettingError
from imprompt.files import sha256
from imprompt.untrusted import parse_json
from imprompt.validation import Flag, Validated, one_line, one_of

FEATURES = (".safetensors", ".ipadpt")  # endings of files of image features


class PictureFile(Validated, frozen=True):
    """A picture or image features by path, with a hash that reveals a changed file."""

    path: Path
    sha256: str = ""

    def check(self) -> None:
        """Raise ImageError if the file cannot be used or has changed."""
        from imprompt.images import open_image
        from imprompt.models import refuse_url

        refuse_url(self.path)
        if not is_features(self):
            open_image(self.path)
        elif not self.path.is_file():
            raise ImageError(f"{self.path}: there is no such file")
        # Python decodes bytes that are not text as surrogates
        if any("\ud800" <= letter <= "\udfff" for letter in str(self.path.absolute())):
            raise ImageError(
                f"{str(self.path)!r}: its name is not Unicode text, so a result cannot record "
                "it; rename the file"
            )
        if self.sha256 and sha256(self.path) != self.sha256:
            raise ImageError(
                f"{self.path} is not the picture that it was: "
                "the result would differ from the one to repeat"
            )


def is_features(image: Any) -> bool:
    """Return whether a file holds features instead of a picture, by its ending."""
    return isinstance(image, PictureFile) and image.path.suffix.lower() in FEATURES


def plain_picture(picture: Any) -> Any:
    """Return a picture as `images.open_image` and `open_mask` take it."""
    return picture.path if isinstance(picture, PictureFile) else picture


def is_face(image: Any) -> bool:
    """Return whether `image` is an `encoders.face.Face`, without importing torch for its class."""
    return hasattr(image, "embedding")


def _picture(value: Any) -> Any:
    if isinstance(value, str | Path):
        return PictureFile(path=Path(value))
    if isinstance(value, dict):
        return PictureFile(**value)
    from PIL import Image

    if isinstance(value, PictureFile | Image.Image) or is_face(value):
        return value
    message = f"a {type(value).__name__} is not a picture: give a path, or a Pillow image"
    raise PydanticCustomError("no_picture", "{said}", {"said": message})


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _pictures(value: Any) -> tuple[Any, ...]:
    if found := tuple(map(_picture, _as_list(value))):
        return found
    raise PydanticCustomError("no_picture", "name at least one picture")


def _negative(value: Any) -> Any:
    if value is None or isinstance(value, Noise):
        return value
    if value in get_args(NoiseKind):
        return Noise.model_validate({"kind": value})
    return Noise(**value) if isinstance(value, dict) and "kind" in value else _pictures(value)


# A PictureFile, a Pillow image, or a face.
AnyPicture = Annotated[Any, PlainValidator(_picture)]
Pictures = Annotated[Any, PlainValidator(_pictures)]  # one or several, as a tuple
Negative = Annotated[Any, PlainValidator(_negative)]  # Noise, pictures, or None
# The names that `generation.combine` knows: a wrong one is reported before torch is imported.
CombineName = Literal["concat", "add", "subtract", "average", "norm-average", "max", "min"]
ScalingName = Literal["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"]
EasingName = Literal["constant", "ease in", "ease out", "ease in-out", "reverse in-out"]
Factor = Annotated[float, Field(ge=-10, le=10)]


def _blocks(value: Any) -> Any:
    if isinstance(value, str | int | float | dict) and not isinstance(value, bool):
        return value
    raise PydanticCustomError(
        "no_blocks", "give a preset's name, a number, or a map of patterns to factors"
    )


def parsed_blocks(given: str) -> Any:
    """Read blocks from a command line: a preset's name, a number, or a map as JSON."""
    try:
        return parse_json(given, "--blocks")
    except SettingError:
        if given.lstrip().startswith(("{", "[")):
            raise
        return given


def _weights(value: Any) -> Any:
    return [value] if isinstance(value, int | float) else value


def _face(value: Any) -> Any:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if value in (None, "largest") or (
        isinstance(value, int) and not isinstance(value, bool) and value >= 0
    ):
        return value
    raise PydanticCustomError("no_face", 'give "largest", or a number from the left, 0 the first')


def _easing(value: Any) -> Any:
    """Check an easing: return a known name, or points as tuples."""
    if isinstance(value, str):
        return TypeAdapter(Annotated[EasingName, one_of(EasingName)]).validate_python(value)
    return TypeAdapter(tuple[tuple[float, float], ...]).validate_python(value)


class Reference(Validated, frozen=True):
    """Pictures that are one image prompt; `generation.combine` defines the mathematics.

    images          can also be files that `imprompt embed` wrote, each for the pictures whose
                    features it holds, and for a FaceID adapter a `Face` each
    weights         2 is as if an image were given twice, 0 as if it were not
    adapter, scale  the pipeline's first and the call's own if not given; a FaceID adapter's
                    low-rank part acts on the whole result, independent of scale, mask, window
                    and blocks: `AdapterChoice.lora_scale` is its strength
    blocks, boost   a preset, or a map of patterns to factors: see `generation.blocks`
    easing          a name, or points (progress of the noise schedule, factor)
    mask            white where the image prompt counts in full, grey in part, black not at all
    negative        pictures, or noise made of the first image, as `Noise` or by its kind alone
    crop, sharpening, ignore  as in `encoders.preparation`
    """

    images: Annotated[Pictures, Field(description="One picture or several.")]
    combine: Annotated[
        CombineName,
        one_of(CombineName),
        Flag(type=str),
        Field(
            description="Make one image prompt of several: concat, add, subtract, average, "
            "norm-average, max or min."
        ),
    ] = "concat"
    weights: Annotated[
        tuple[Factor, ...] | None,
        BeforeValidator(_weights),
        Flag("--weight", type=list[float]),
        Field(description="Weight of each image prompt in turn, where they are combined."),
    ] = None
    adapter: Annotated[
        str | None, Field(description="Which of the pipeline's adapters it is for; else the first.")
    ] = None
    scale: Annotated[Factor | None, Field(description="Strength; else the call's scale.")] = None
    embeds_scaling: Annotated[
        ScalingName, one_of(ScalingName), Field(description="What the scale acts on.")
    ] = "V only"
    blocks: Annotated[
        Any,
        PlainValidator(_blocks),
        Flag(read=parsed_blocks),
        Field(
            description="Which cross-attentions it conditions: 'style transfer' or the like, or a "
            "map as JSON; see `imprompt blocks`."
        ),
    ] = "linear"
    boost: Annotated[Factor, Field(description="Factor of the second group of such blocks.")] = 1.0
    start: Annotated[
        float,
        Field(ge=0, le=1, description="Fraction of the noise schedule from which it counts."),
    ] = 0.0
    end: Annotated[float, Field(ge=0, le=1, description="Fraction up to which it counts.")] = 1.0
    easing: Annotated[
        Any,
        PlainValidator(_easing),
        Field(description="How its strength changes in between, such as 'ease out'."),
    ] = "constant"
    mask: Annotated[
        AnyPicture | None,
        Flag("--region", type=list[Path]),
        Field(description="Mask: where in the result it counts; or one for each image prompt."),
    ] = None
    negative: Annotated[
        Negative,
        Flag(
            "--noise",
            help="Noise of the image prompt to keep away from: fade, dissolve, gaussian or "
            "shuffle.",
            read=lambda kind: {"kind": kind},
        ),
        Flag(
            "--negative-image",
            type=list[Path],
            help="Picture to keep away from, in place of no image.",
        ),
        Field(description="What to keep away from."),
    ] = None
    crop: Annotated[
        Crop | None,
        Field(
            description="Which part of it is used: center, top, bottom, left, right, pad, "
            "'pad black', squash or tiles; as the image encoder does it."
        ),
    ] = None
    sharpening: Annotated[
        float, Field(ge=0, le=1, description="Sharpen the image prompt: 0 to 1.")
    ] = 0.0
    ignore: Annotated[
        AnyPicture | None,
        Flag(type=Path),
        Field(description="Mask: parts of the image prompt that are white in it are left out."),
    ] = None
    face: Annotated[
        Any,
        PlainValidator(_face),
        Field(description="Of several faces (FaceID): largest, or a number from the left."),
    ] = None
    face_scale: Annotated[
        Factor, Field(description="For faceid-plus-v2: how much the picture of the face counts.")
    ] = 1.0

    @model_validator(mode="after")
    def _in_order(self) -> "Reference":
        if self.start >= self.end:
            raise SettingError(
                f"start = {self.start}, end = {self.end}: "
                "give 0 <= start < end <= 1, fractions of the schedule"
            )
        return self

    @model_validator(mode="after")
    def _weights_match(self) -> "Reference":
        if self.weights is None or self.has_features:
            return self
        if len(self.weights) != len(self.images):
            raise SettingError(
                f"{len(self.weights)} weights for {len(self.images)} pictures: give one for each"
            )
        return self

    @property
    def timed(self) -> bool:
        """Whether the strength changes with time."""
        return (self.start, self.end, self.easing) != (0, 1, "constant")

    @property
    def has_features(self) -> bool:
        """Whether a file of features is among the images.

        How many pictures it stands for is known when it is read.
        """
        return any(map(is_features, self.images))


Item = tuple[Reference, ...]  # what one result follows


def _as_item(value: Any) -> Any:
    if isinstance(value, Reference | PictureFile) or not isinstance(value, list | tuple):
        value = [value]
    return [_as_reference(part) for part in value]


def _as_reference(value: Any) -> Any:
    whole = isinstance(value, Reference) or (isinstance(value, dict) and "images" in value)
    return value if whole else {"images": value}


AnyItem = Annotated[Item, BeforeValidator(_as_item)]


class AdapterChoice(Validated, frozen=True):
    """One of a pipeline's adapters.

    adapter     one of the model's adapters by name (its first if not given), a file, a folder, or a
                file on the Hub
    name        by which references name it; the adapter's own, or its file's, if not given
    encoder     folder or Hub id of the image encoder, if the adapter does not name it
    variant     variant of the adapter, if its tensors do not determine it
    lora_scale  strength of the low-rank part that FaceID adapters have
    """

    adapter: str | None = None
    name: str = ""
    encoder: str | None = None
    variant: str | None = None
    lora_scale: Factor = 1.0

    @property
    def known_as(self) -> str:
        """Name by which references name the adapter."""
        file = Path(self.adapter or "").name
        return self.name or file.removesuffix(".safetensors").removesuffix(".bin")


def adapters_of(value: Any) -> Any:
    """Check a field: a name, an `AdapterChoice` or its fields, or a list of them."""
    if isinstance(value, list | tuple):
        return [adapters_of(one) for one in value]
    if value is None or isinstance(value, str | AdapterChoice):
        return value
    if isinstance(value, dict):
        return AdapterChoice(**value)
    raise PydanticCustomError(
        "no_adapter", "give a name, a file, or {adapter, name, encoder, variant}"
    )


def item_as_json(item: Item) -> Any:
    """Return an item as JSON without defaults.

    A single picture without settings is only its path and hash.
    """
    given = [reference.model_dump(mode="json", exclude_defaults=True) for reference in item]
    if len(given) > 1:
        return given
    (only,) = given
    plain = only.keys() == {"images"} and len(only["images"]) == 1
    return only["images"][0] if plain else only


def joined(items: Sequence[Item]) -> Item:
    """Join items to one: plain pictures as one image prompt, others each as its own."""
    plain = all(len(item) == 1 and item[0] == Reference(images=item[0].images) for item in items)
    if plain:
        return (Reference(images=tuple(image for (only,) in items for image in only.images)),)
    return tuple(reference for item in items for reference in item)


def items_of(image: Any, together: bool) -> list[Item]:
    """Return the references of each result; SettingError for none, or invalid ones."""
    given = list(image) if isinstance(image, list | tuple) else [image]
    try:
        items = TypeAdapter(list[AnyItem]).validate_python(given)
    except ValidationError as error:
        raise SettingError(one_line(error, Reference.model_fields)) from error
    if not items or not all(items):
        raise SettingError("no image prompt was given: name at least one picture")
    items = [joined([(reference,) for reference in item]) for item in items]
    return [joined(items)] if together else items


def files_in(value: Any) -> Iterator[PictureFile]:
    """Yield every file that a request, or a part of it, names."""
    if isinstance(value, PictureFile):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from files_in(getattr(value, name))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from files_in(part)


def with_files(value: Any, change: Callable[[PictureFile], PictureFile]) -> Any:
    """Return a request, or a part of it, with `change` applied to every file."""
    if isinstance(value, PictureFile):
        return change(value)
    if isinstance(value, BaseModel):
        fields = {name: with_files(part, change) for name, part in value}
        return value.model_copy(update=fields)
    if isinstance(value, list | tuple):
        return type(value)(with_files(part, change) for part in value)
    return value
