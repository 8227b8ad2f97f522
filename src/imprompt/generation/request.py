"""Store requests in files and PNGs: a request is enough to repeat a picture bit for bit."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, PlainValidator, field_serializer, model_validator

from imprompt.errors import ImageError, SettingError, first_line
from imprompt.files import atomic_write, sha256, taken_names, temporary, written_new
from imprompt.generation.record import (
    find_picture,
    find_weights,
    recorded_name,
    recorded_path,
    same_result,
)
from imprompt.generation.references import (
    AdapterChoice,
    AnyItem,
    AnyPicture,
    Item,
    PictureFile,
    adapters_of,
    files_in,
    item_as_json,
    plain_picture,
    with_files,
)
from imprompt.generation.settings import (
    ADAPTER,
    EncoderName,
    ModelName,
    PrecisionName,
    Resolved,
    Settings,
    VariantName,
)
from imprompt.models import MODELS
from imprompt.untrusted import MAX_SETTINGS, parse_json, parse_toml, read_text
from imprompt.validation import Flag, Validated

if TYPE_CHECKING:
    from PIL import Image

    from imprompt.generation.pipeline import ImagePromptPipeline, Job, OnStep, Result

KEY = "imprompt"  # key of the request in the PNG's text


def one_adapter(names: list[str]) -> str:
    """Return the one adapter of a command line; SettingError if there are several."""
    if len(names) > 1:
        raise SettingError(
            "several adapters: state in a request file which adapter each picture is for "
            "(--request, docs/compose.md)"
        )
    return names[0]


class Request(Validated, frozen=True):
    """One call of `imprompt generate`.

    adapter  a name, an `AdapterChoice`, or a list of them
    images   each a picture, a reference, or a list of what one result follows together
    only     number of the one picture of the call to make
    weights  fingerprints of the weights that made a result: see `generation.record`
    """

    model: ModelName = "emoji"
    adapter: Annotated[
        Any,
        PlainValidator(adapters_of),
        Flag(type=list[str], read=one_adapter),
        Field(description=ADAPTER),
    ] = None
    encoder: EncoderName = None
    variant: VariantName = None
    images: list[AnyItem] = Field(default_factory=list, description="Image prompts.")
    init_image: Annotated[
        AnyPicture | None,
        Flag("--init", type=Path),
        Field(description="Start from this picture (image to image)."),
    ] = None
    mask_image: Annotated[
        AnyPicture | None,
        Flag("--mask", type=Path),
        Field(description="Redraw only the white part of --init (inpainting)."),
    ] = None
    controlnet: Annotated[
        str | None,
        Field(
            description="The ControlNet that reads --control: emoji's edges (white on black), "
            "a folder or a Hub id."
        ),
    ] = None
    control_image: Annotated[
        AnyPicture | None,
        Flag("--control", type=Path),
        Field(description="Keep to this picture of edges, depth or the like (ControlNet)."),
    ] = None
    batch_size: Annotated[int, Field(ge=1, description="Pictures made at once.")] = 4
    dtype: PrecisionName = None
    fast: Annotated[
        bool, Field(description="Compile the model: slow at first, then faster on a GPU.")
    ] = False
    tiling: Annotated[
        bool, Field(description="Decode pictures one by one and in tiles: less memory.")
    ] = False
    quantize: Annotated[
        Literal["int8", "fp8"] | None,
        Field(description="int8 or fp8: the base model's matrices in 8 bits."),
    ] = None
    settings: Settings = Settings()
    only: Annotated[int, Field(ge=0)] | None = None
    weights: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if not self.images or not all(self.images):
            raise SettingError("no image prompt was given: name at least one picture")
        if self.mask_image and not self.init_image:
            raise SettingError(
                "a mask marks what to redraw of a picture: give that picture too (--init)"
            )
        if bool(self.controlnet) != bool(self.control_image):
            raise SettingError(
                "a control image and a ControlNet go together: give both, or neither "
                "(--control, --controlnet)"
            )
        return self

    @field_serializer("images")
    def _images_as_json(self, images: list[Item]) -> list[Any]:
        return [item_as_json(item) for item in images]

    @property
    def numbers(self) -> range:
        """Numbers, within the call, of the pictures that the request makes."""
        if self.only is not None:
            return range(self.only, self.only + 1)
        return range((1 if self.settings.together else len(self.images)) * self.settings.num_images)

    def pictures(self) -> list[PictureFile]:
        """Return every file that the request reads."""
        return list(files_in(self))

    def inputs(self) -> list[Path]:
        """Return every path that the request may read: its pictures, and names of weights."""
        names: list[str] = []
        self.renamed(lambda file: file, lambda name: names.append(name) or name)
        return [file.path for file in self.pictures()] + list(map(Path, names))

    def changed(self, fields: dict[str, Any]) -> Self:
        """Return the request with other values of some fields, checked again; SettingError."""
        return type(self).model_validate(dict(self) | fields)

    def alone(self) -> Self:
        """Return a request that makes only picture `only`, with that picture's text and seed.

        Another batch changes the picture by rounding, and draws other noise for a noise negative.
        Raise SettingError if the request makes no such picture.
        """
        if self.only is None:
            return self
        settings = self.settings
        items = [self.images] if settings.together else [[item] for item in self.images]
        number, prompt = self.only // settings.num_images, settings.prompt
        texts = [prompt] * len(items) if isinstance(prompt, str) else list(prompt)
        if number >= min(len(items), len(texts)):
            raise SettingError(f"only = {self.only}: the request makes no such picture")
        seed = None if settings.seed is None else settings.seed + self.only
        own = {"prompt": texts[number], "num_images": 1, "seed": seed}
        return self.changed(
            {"images": items[number], "settings": dict(settings) | own, "only": None}
        )

    def load(self, **machine: Any) -> "ImagePromptPipeline":
        """Load the pipeline for the request.

        `machine` holds device, offload and keep_features: they change no pixels, so they are not
        part of the request.
        """
        import torch

        from imprompt.generation.pipeline import ImagePromptPipeline

        dtype = getattr(torch, self.dtype) if self.dtype else None
        return ImagePromptPipeline.from_pretrained(
            self.model,
            adapter=self.adapter,
            encoder=self.encoder,
            variant=self.variant,
            controlnet=self.controlnet,
            dtype=dtype,
            compile=self.fast,
            tiling=self.tiling,
            quantize=self.quantize,
            **machine,
        )

    def prepare(self, pipeline: "ImagePromptPipeline") -> "Job":
        """Check the request against a pipeline and encode its image prompts."""
        return pipeline.prepare(
            self.images,
            self.settings,
            plain_picture(self.init_image),
            plain_picture(self.mask_image),
            plain_picture(self.control_image),
            self.batch_size,
            self.only,
        )

    def run(self, pipeline: "ImagePromptPipeline", on_step: "OnStep | None" = None) -> "Result":
        """Make all pictures of the request."""
        return pipeline.make_all(self.prepare(pipeline), on_step)

    def renamed(
        self, picture: Callable[[PictureFile], PictureFile], weights: Callable[[str], str]
    ) -> Self:
        """Return the request with other names of its pictures, and of weights without a name."""
        model = MODELS.get(self.model)
        known = {*MODELS, *(() if model is None else (*model.adapters, *model.controlnets))}

        def other(name: Any) -> Any:
            if isinstance(name, list):
                return [other(one) for one in name]
            if isinstance(name, AdapterChoice):
                own = {"adapter": other(name.adapter), "encoder": other(name.encoder)}
                return name.model_copy(update=own)
            return name if name is None or name in known else weights(name)

        names = {
            field: other(getattr(self, field))
            for field in ("model", "adapter", "encoder", "controlnet")
        }
        return with_files(self, picture).model_copy(update=names)

    def located(self, folder: Path) -> Self:
        """Return the request of a file in `folder` with the paths where its files are now."""
        return self.renamed(
            lambda file: find_picture(file, folder), lambda name: find_weights(name, folder)
        )

    def recorded(self, out: Path, *, paths: bool = False) -> Self:
        """Return the request as a result in the folder `out` holds it: with names and hashes.

        paths  whether it holds the absolute paths of this machine
        """

        def picture(file: PictureFile) -> PictureFile:
            path = file.path.absolute() if paths else recorded_path(file.path, out)
            return PictureFile(path=Path(path.as_posix()), sha256=sha256(file.path))

        return self.renamed(
            picture, lambda name: find_weights(name, Path()) if paths else recorded_name(name, out)
        )

    def unchecked(self) -> Self:
        """Return the request without hashes: of pictures and weights that have changed."""
        plain = with_files(self, lambda file: PictureFile(path=file.path))
        return plain.model_copy(update={"weights": {}})

    def text_for(self, number: int | None, settings: Resolved) -> str:
        """Return the JSON for the PNG of one picture of the call, every default filled in.

        A number of None is for the grid of all.
        """
        from imprompt import __version__

        whole = self.model_copy(update={"settings": settings, "only": number})
        record = {"imprompt": __version__, **whole.model_dump(mode="json")}
        return json.dumps(record, ensure_ascii=False)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """Return the request that `text_for` wrote, or that a file holds; SettingError."""
        return cls(**{name: value for name, value in record.items() if name != "imprompt"})


def read_request(path: Path) -> Request:
    """Return the request in a TOML or JSON file or in a PNG; SettingError or ImageError.

    Paths are relative to the file: see `imprompt.generation.record`.
    """
    from imprompt.images import open_image

    if path.suffix.lower() in FORMATS:
        return request_file(path)
    open_image(path)
    text = text_in(path)
    if text is None:
        raise ImageError(
            f"{path} was not made by imprompt, or its metadata was removed: "
            "it holds no request to repeat"
        )
    try:
        request = Request.of_record(parse_json(text))
    except (AttributeError, TypeError) as error:
        raise ImageError(f"{path}: its metadata is damaged") from error
    except SettingError as error:
        raise ImageError(
            f"{path}: its metadata is damaged, or from another version of imprompt ({error})"
        ) from error
    return request.located(path.parent)


def text_in(path: Path) -> str | None:
    """Return the request in a PNG as text, or None if it holds none that can be read."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return getattr(picture, "text", {}).get(KEY)
    except (OSError, ValueError, SyntaxError):  # another file, or a damaged one
        return None


FORMATS = {".toml": parse_toml, ".json": parse_json}


def request_file(path: Path) -> Request:
    """Return the request in a TOML or JSON file; SettingError."""
    try:
        record = FORMATS[path.suffix.lower()](read_text(path, MAX_SETTINGS))
    except OSError as error:
        raise SettingError(f"{path} cannot be read ({first_line(error)})") from error
    except SettingError as error:
        raise SettingError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(record, dict):
        raise SettingError(
            f"{path} does not hold a request: it should name settings, such as images = ['cat.png']"
        )
    return Request.of_record(record).located(path.parent)


class ResultFiles(NamedTuple):
    """Files of a request's results, by the pictures' numbers in the call; None is the grid.

    request   as the results hold it
    settings  with every default filled in
    named     name of the results, without ending; empty: each is named after its image prompt
    """

    request: Request
    settings: Resolved
    folder: Path
    named: str

    @classmethod
    def of(
        cls,
        request: Request,
        settings: Resolved,
        weights: dict[str, str],
        out: Path,
        *,
        paths: bool = False,
    ) -> Self:
        """Return the files that results of a request get in `out`: see `results_at`.

        weights  fingerprints of what makes the results
        paths    as in `Request.recorded`
        """
        folder, named = results_at(out)
        whole = request.recorded(folder, paths=paths).model_copy(update={"weights": weights})
        return cls(whole, settings, folder, named)

    @property
    def single(self) -> bool:
        """Whether `out` names the only result."""
        return bool(self.named) and len(self.request.numbers) == 1

    def path(self, number: int | None) -> Path:
        """Return the path that a result has if no other file has it."""
        if self.single:
            return self.folder / f"{self.named}.png"
        request, settings = self.request, self.settings
        first = 0 if number is None or settings.together else number // settings.num_images
        stem = self.named or next((file.path.stem for file in files_in(request.images[first])), "")
        seed = f"{settings.seed}-grid" if number is None else f"{settings.seed + number}"
        return self.folder / f"{stem}-{seed}.png"

    def text(self, number: int | None) -> str:
        """Return the request that a result holds."""
        return self.request.text_for(number, self.settings)

    def there(self, number: int | None) -> Path | None:
        """Return the file of a result that an earlier command has written, or None."""
        paths = taken_names(self.path(number))
        own = self.text(number)
        return next((path for path in paths if same_result(text_in(path), own)), None)

    def write(self, picture: "Image.Image", number: int | None) -> Path:
        """Write a result with its request; return the path that it got."""
        save = save_png if self.single else save_new
        self.folder.mkdir(parents=True, exist_ok=True)
        return save(picture, self.path(number), self.text(number))


def save_results(result: "Result", request: Request, out: Path) -> list[Path]:
    """Write the result of `Request.run`; for names and `out` see `write_results`."""
    numbers = [seed - result.settings.seed for seed in result.seeds]
    made = zip(numbers, result.images, strict=True)
    files = ResultFiles.of(request, result.settings, result.weights, out)
    return [path for path, _ in write_results(made, files)]


def write_results(
    made: Iterable[tuple[int, "Image.Image"]],
    files: ResultFiles,
    kept: Mapping[int, Path] | None = None,
) -> Iterator[tuple[Path, int | None]]:
    """Write each picture when it is made, with its request inside, then a grid of several.

    Yield the path of each with its seed, and of the grid with None; first those that are `kept`
    from an earlier command, by their numbers. Only a file that `out` itself names is replaced: all
    others get unused names.
    """
    from imprompt.images import grid, open_image

    kept, settings = kept or {}, files.settings
    for number, path in kept.items():
        yield path, settings.seed + number
    new: dict[int, Image.Image] = {}
    for number, picture in made:
        if number not in kept:
            new[number] = picture
            yield files.write(picture, number), settings.seed + number
    if len(new) + len(kept) > 1:
        sheet = files.there(None) if kept and not new else None
        if sheet is None:
            pictures = new | {number: open_image(path) for number, path in kept.items()}
            columns = settings.num_images if len(files.request.images) > 1 else None
            sheet = files.write(
                grid([pictures[n] for n in sorted(pictures)], columns=columns), None
            )
        yield sheet, None


def results_at(out: Path) -> tuple[Path, str]:
    """Return the folder of results and their name without ending; SettingError.

    `out` is a folder, then the name is empty, or a name ending in .png.
    """
    if out.is_dir() or not out.suffix:
        return out, ""
    if out.suffix.lower() != ".png":
        raise SettingError(f"{out}: results are PNG files; give a name ending in .png, or a folder")
    return out.parent, out.stem


def save_png(picture: "Image.Image", path: Path, text: str | None = None) -> Path:
    """Write a PNG atomically, with `text` as its request."""
    with writing(path), atomic_write(path) as part:
        write_png(picture, part, text)
    return path


def save_new(picture: "Image.Image", wanted: Path, text: str | None = None) -> Path:
    """Write a PNG atomically under the wanted name or the next unused one; return that name."""
    with writing(wanted), temporary(wanted) as part:
        write_png(picture, part, text)
        return written_new(part, wanted)


def write_png(picture: "Image.Image", path: Path, text: str | None) -> None:
    """Write a PNG, with `text` as its request."""
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_itxt(KEY, text)
    picture.save(path, "PNG", pnginfo=info)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise errors in writing a file as ImageError."""
    try:
        yield
    except OSError as error:
        raise ImageError(f"cannot write {path}: {first_line(error)}") from error
