"""Store requests in files and PNGs: a request is enough to repeat a picture bit for bit."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, field_serializer, model_validator

from imprompt.errors import ImageError, SettingError, first_line
from imprompt.files import atomic_write, temporary, written_new
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

    def changed(self, told: dict[str, Any]) -> Self:
        """Return the request with other values of some fields, checked again; SettingError."""
        return type(self).model_validate(dict(self) | told)

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

    def with_hashes(self) -> Self:
        """Return the request with absolute paths and hashes, to be repeated from any folder."""
        return with_files(self.resolve_paths(Path()), PictureFile.with_hash)

    def resolve_paths(self, folder: Path) -> Self:
        """Return the request with its files, and names that are paths there, in `folder`."""

        def found(name: Any) -> Any:
            if isinstance(name, list):
                return [found(one) for one in name]
            if isinstance(name, AdapterChoice):
                own = {"adapter": found(name.adapter), "encoder": found(name.encoder)}
                return name.model_copy(update=own)
            known = not isinstance(name, str) or name in MODELS or not (folder / name).exists()
            return name if known else str((folder / name).absolute())

        weights = {
            name: found(getattr(self, name))
            for name in ("model", "adapter", "encoder", "controlnet")
        }
        moved = with_files(self, lambda file: file.model_copy(update={"path": folder / file.path}))
        return moved.model_copy(update=weights)

    def text_for(self, number: int, settings: Resolved) -> str:
        """Return the JSON for the PNG of one picture of the call, every default filled in."""
        from imprompt import __version__

        whole = self.model_copy(update={"settings": settings, "only": number})
        told = {"imprompt": __version__, **whole.model_dump(mode="json")}
        return json.dumps(told, ensure_ascii=False)


def read_request(path: Path) -> Request:
    """Return the request in a TOML or JSON file or in a PNG; SettingError or ImageError.

    Paths in a TOML or JSON file are relative to it.
    """
    from PIL import Image

    from imprompt.images import open_image

    if path.suffix.lower() in FORMATS:
        return request_file(path)
    open_image(path)
    with Image.open(path) as picture:
        text = getattr(picture, "text", {}).get(KEY)
    if text is None:
        raise ImageError(
            f"{path} was not made by imprompt, or its metadata was removed: "
            "it holds no request to repeat"
        )
    try:
        told = parse_json(text)
        return Request(**{name: value for name, value in told.items() if name != "imprompt"})
    except (AttributeError, TypeError) as error:
        raise ImageError(f"{path}: its metadata is damaged") from error
    except SettingError as error:
        raise ImageError(
            f"{path}: its metadata is damaged, or from another version of imprompt ({error})"
        ) from error


FORMATS = {".toml": parse_toml, ".json": parse_json}


def request_file(path: Path) -> Request:
    """Return the request in a TOML or JSON file; SettingError."""
    try:
        told = FORMATS[path.suffix.lower()](read_text(path, MAX_SETTINGS))
    except OSError as error:
        raise SettingError(f"{path} cannot be read ({first_line(error)})") from error
    except SettingError as error:
        raise SettingError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(told, dict):
        raise SettingError(
            f"{path} does not hold a request: it should name settings, such as images = ['cat.png']"
        )
    request = Request(**{name: value for name, value in told.items() if name != "imprompt"})
    return request.resolve_paths(path.parent)


def save_results(result: "Result", request: Request, out: Path) -> list[Path]:
    """Write the result of `Request.run`; for names and `out` see `write_results`."""
    numbers = [seed - result.settings.seed for seed in result.seeds]
    made = zip(numbers, result.images, strict=True)
    return [path for path, _ in write_results(made, request, result.settings, out)]


def write_results(
    made: Iterable[tuple[int, "Image.Image"]], request: Request, settings: Resolved, out: Path
) -> Iterator[tuple[Path, int | None]]:
    """Write each picture when it is made, with its request inside, then a grid of several.

    Yield the path of each with its seed, and of the grid with None. For `out` see `results_at`.
    Only a file that `out` itself names is replaced: all others get unused names.
    """
    from imprompt.images import grid

    folder, named = results_at(out)
    stem = named or next(files_in(request.images)).path.stem
    whole = request.with_hashes()
    pictures = []
    for number, picture in made:
        folder.mkdir(parents=True, exist_ok=True)
        seed, text = settings.seed + number, whole.text_for(number, settings)
        if named and len(request.numbers) == 1:
            yield save_png(picture, folder / f"{named}.png", text), seed
        else:
            yield save_new(picture, folder / f"{stem}-{seed}.png", text), seed
        pictures.append(picture)
    if len(pictures) > 1:
        columns = settings.num_images if len(request.images) > 1 else None
        sheet = folder / f"{stem}-{settings.seed}-grid.png"
        yield save_new(grid(pictures, columns=columns), sheet), None


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
    with told(path), atomic_write(path) as part:
        write_png(picture, part, text)
    return path


def save_new(picture: "Image.Image", wanted: Path, text: str | None = None) -> Path:
    """Write a PNG atomically under the wanted name or the next unused one; return that name."""
    with told(wanted), temporary(wanted) as part:
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
def told(path: Path) -> Iterator[None]:
    """Raise errors in writing a file as ImageError."""
    try:
        yield
    except OSError as error:
        raise ImageError(f"cannot write {path}: {first_line(error)}") from error
