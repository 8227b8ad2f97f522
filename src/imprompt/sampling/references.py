"""What a user says of an image prompt: which pictures, how they combine, how strongly they are heard, where and when.

A `Reference` is heard as one; a result can hear several. It is what a request file and the PNG's metadata hold, and it is checked
without torch, before any weights are read. Shape letters as in `imprompt.adapter`.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field, PlainValidator, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from imprompt.checked import Checked, one_line, one_of
from imprompt.encoders.noise import Kind, Noise
from imprompt.encoders.preparation import Crop
from imprompt.errors import ImageError, SettingError
from imprompt.images import open_image

FEATURES = (".safetensors", ".ipadpt")  # files of image features, which stand for pictures


class PictureFile(Checked, frozen=True):
    """A picture, or image features, by its path, and a hash of what it held, so that a changed file is noticed."""

    path: Path
    sha256: str = ""

    def check(self) -> None:
        """ImageError if the file cannot be used, or is not what it was."""
        if not is_features(self):
            open_image(self.path)
        elif not self.path.is_file():
            raise ImageError(f"{self.path}: there is no such file")
        if any("\ud800" <= letter <= "\udfff" for letter in str(self.path.absolute())):  # what Python makes of other bytes
            raise ImageError(f"{str(self.path)!r}: its name is no Unicode text, which a result must keep; rename it")
        if self.sha256 and hash_of(self.path) != self.sha256:
            raise ImageError(f"{self.path} is not the picture that it was: the result would differ from the one to repeat")

    def with_hash(self) -> "PictureFile":
        return PictureFile(path=self.path.absolute(), sha256=hash_of(self.path))


def is_features(image: Any) -> bool:
    """Whether a file holds features and no picture, by its ending."""
    return isinstance(image, PictureFile) and image.path.suffix.lower() in FEATURES


def source(picture: Any) -> Any:
    """What `images.open_image` and `open_mask` take."""
    return picture.path if isinstance(picture, PictureFile) else picture


def is_face(image: Any) -> bool:
    """Whether it is an `encoders.face.Face`, which importing here would bring torch."""
    return hasattr(image, "embedding")


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _picture(value: Any) -> Any:
    if isinstance(value, str | Path):
        return PictureFile(path=Path(value))
    if isinstance(value, dict):
        return PictureFile(**value)
    if isinstance(value, PictureFile | Image.Image) or is_face(value):
        return value
    said = f"a {type(value).__name__} is no picture: give a path, or a picture of Pillow's"
    raise PydanticCustomError("no_picture", "{said}", {"said": said})


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _pictures(value: Any) -> tuple[Any, ...]:
    if found := tuple(map(_picture, _as_list(value))):
        return found
    raise PydanticCustomError("no_picture", "name at least one picture")


def _negative(value: Any) -> Any:
    if value is None or isinstance(value, Noise):
        return value
    if value in get_args(Kind):
        return Noise.model_validate({"kind": value})
    return Noise(**value) if isinstance(value, dict) and "kind" in value else _pictures(value)


AnyPicture = Annotated[Any, PlainValidator(_picture)]  # a PictureFile, a picture of Pillow's, or a face
Pictures = Annotated[Any, PlainValidator(_pictures)]  # one or several, as a tuple
Negative = Annotated[Any, PlainValidator(_negative)]  # Noise, pictures, or None
# The names that `sampling.controls` knows; here, so that a wrong one is told before torch and weights are read.
CombineName = Literal["concat", "add", "subtract", "average", "norm-average", "max", "min"]
ScalingName = Literal["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"]
EasingName = Literal["constant", "ease in", "ease out", "ease in-out", "reverse in-out"]
Factor = Annotated[float, Field(ge=-10, le=10)]


def _blocks(value: Any) -> Any:
    if isinstance(value, str | int | float | dict) and not isinstance(value, bool):
        return value
    raise PydanticCustomError("no_blocks", "give a preset's name, a number, or a map of patterns to factors")


def _weights(value: Any) -> Any:
    return [value] if isinstance(value, int | float) else value


def _face(value: Any) -> Any:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if value in (None, "largest") or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise PydanticCustomError("no_face", 'give "largest", or a number from the left, 0 the first')


def _easing(value: Any) -> Any:
    """A known name, or points as tuples."""
    if isinstance(value, str):
        return TypeAdapter(Annotated[EasingName, one_of(EasingName)]).validate_python(value)
    return TypeAdapter(tuple[tuple[float, float], ...]).validate_python(value)


class Reference(Checked, frozen=True):
    """Pictures that are heard as one image prompt. Its mathematics, and the names that it knows, are `sampling.controls`'.

    images          one or several; a file that `imprompt embed` wrote stands for the pictures whose features it holds, and for a
                    FaceID adapter a `Face` for its picture
    combine         what several become: "concat" (all their tokens in one attention), "add", "subtract", "average", "norm-average",
                    "max" or "min" (of their features)
    weights         of the images; 2 is as if an image were given twice, 0 as if it were not
    adapter         which of the pipeline's adapters hears them; the first if not given
    scale           how strongly they are heard; the call's own if not given. A FaceID adapter's low-rank part acts on the whole
                    result, whatever scale, mask, window and blocks say; `AdapterChoice.lora_scale` is its strength
    embeds_scaling  what the scale acts on
    blocks, boost   which cross-attentions hear them: a preset, or a map of patterns to factors: `sampling.blocks`
    start, end      from which to which fraction of the noise schedule they are heard
    easing          how, between: a name, or points (progress of the schedule, factor)
    mask            where the result hears them: white in full, grey partly, black not at all
    negative        what guidance goes away from, in place of "no image": pictures, or noise made of the first image, as `Noise` or
                    by its kind alone
    crop, sharpening, ignore  how they are made ready: `encoders.preparation`
    face            of a picture with several faces: "largest", or which, by number from the left
    face_scale      for faceid-plus-v2: how much the picture of the face counts beside its embedding
    """

    images: Pictures
    combine: Annotated[CombineName, one_of(CombineName)] = "concat"
    weights: Annotated[tuple[Factor, ...] | None, BeforeValidator(_weights)] = None
    adapter: str | None = None
    scale: Factor | None = None
    embeds_scaling: Annotated[ScalingName, one_of(ScalingName)] = "V only"
    blocks: Annotated[Any, PlainValidator(_blocks)] = "linear"
    boost: Factor = 1.0
    start: Annotated[float, Field(ge=0, le=1)] = 0.0
    end: Annotated[float, Field(ge=0, le=1)] = 1.0
    easing: Annotated[Any, PlainValidator(_easing)] = "constant"
    mask: AnyPicture | None = None
    negative: Negative = None
    crop: Crop = "center"
    sharpening: Annotated[float, Field(ge=0, le=1)] = 0.0
    ignore: AnyPicture | None = None
    face: Annotated[Any, PlainValidator(_face)] = None
    face_scale: Factor = 1.0

    @model_validator(mode="after")
    def _in_order(self) -> "Reference":
        if self.start >= self.end:
            raise SettingError(f"start = {self.start}, end = {self.end}: give 0 <= start < end <= 1, fractions of the schedule")
        return self

    @model_validator(mode="after")
    def _weights_match(self) -> "Reference":
        if self.weights is not None and len(self.weights) != len(self.images) and not self.has_features:
            raise SettingError(f"{len(self.weights)} weights for {len(self.images)} pictures: give one for each")
        return self

    @property
    def timed(self) -> bool:
        """Whether time matters to it."""
        return (self.start, self.end, self.easing) != (0, 1, "constant")

    @property
    def has_features(self) -> bool:
        """Whether a file of features is among the images: how many pictures it stands for shows when it is read."""
        return any(map(is_features, self.images))


Item = tuple[Reference, ...]  # what one result hears


def _as_item(value: Any) -> Any:
    if isinstance(value, Reference | PictureFile) or not isinstance(value, list | tuple):
        value = [value]
    return [
        part if isinstance(part, Reference) or (isinstance(part, dict) and "images" in part) else {"images": part} for part in value
    ]


AnyItem = Annotated[Item, BeforeValidator(_as_item)]


class AdapterChoice(Checked, frozen=True):
    """One of a pipeline's adapters.

    adapter     one of the model's adapters by name (its first if not given), a file, a folder, or a file on the Hub
    name        by which references say that they are heard by it; the adapter's own, or its file's, if not given
    encoder     folder or Hub id of the image encoder, if the adapter does not say
    variant     what the adapter's tensors cannot tell
    lora_scale  strength of the low-rank part that FaceID adapters have
    """

    adapter: str | None = None
    name: str = ""
    encoder: str | None = None
    variant: str | None = None
    lora_scale: Factor = 1.0

    @property
    def known_as(self) -> str:
        return self.name or Path(self.adapter or "").name.removesuffix(".safetensors").removesuffix(".bin")


def adapters_said(value: Any) -> Any:
    """For a field: a name, an `AdapterChoice` or what makes one, or a list of them."""
    if isinstance(value, list | tuple):
        return [adapters_said(one) for one in value]
    if value is None or isinstance(value, str | AdapterChoice):
        return value
    if isinstance(value, dict):
        return AdapterChoice(**value)
    raise PydanticCustomError("no_adapter", "give a name, a file, or {adapter, name, encoder, variant}")


def as_told(item: Item) -> Any:
    """An item as JSON, without what is not said: a lone picture by its path and hash."""
    told = [reference.model_dump(mode="json", exclude_defaults=True) for reference in item]
    if len(told) > 1:
        return told
    return told[0]["images"][0] if told[0].keys() == {"images"} and len(told[0]["images"]) == 1 else told[0]


def joined(items: Sequence[Item]) -> Item:
    """What one result hears of all items together: plain pictures as one prompt, others each as its own."""
    plain = all(len(item) == 1 and item[0] == Reference(images=item[0].images) for item in items)
    if plain:
        return (Reference(images=tuple(image for (only,) in items for image in only.images)),)
    return tuple(reference for item in items for reference in item)


def items_of(image: Any, together: bool) -> list[Item]:
    """What a user gives as image prompts -> what each result hears; SettingError if that is nothing."""
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
    """Every file that a request, or a part of it, names."""
    if isinstance(value, PictureFile):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from files_in(getattr(value, name))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from files_in(part)


def with_files(value: Any, change: Callable[[PictureFile], PictureFile]) -> Any:
    """The same with every file changed."""
    if isinstance(value, PictureFile):
        return change(value)
    if isinstance(value, BaseModel):
        return value.model_copy(update={name: with_files(getattr(value, name), change) for name in type(value).model_fields})
    if isinstance(value, list | tuple):
        return type(value)(with_files(part, change) for part in value)
    return value
