"""A request as it stands in the PNG that it made: enough to repeat the picture, and to notice when it cannot be."""

import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from PIL import Image, PngImagePlugin
from pydantic import Field, PlainValidator, field_serializer, model_validator

from imprompt.checked import Checked
from imprompt.errors import ImageError, SettingError, first_line
from imprompt.files import part_of, written_new, written_whole
from imprompt.images import grid, open_image
from imprompt.models import MODELS
from imprompt.sampling.references import (
    AdapterChoice,
    AnyItem,
    AnyPicture,
    Item,
    PictureFile,
    adapters_said,
    as_told,
    files_in,
    source,
    with_files,
)
from imprompt.sampling.settings import Precision, Settings

if TYPE_CHECKING:
    from imprompt.sampling.generate import ImagePromptPipeline, OnStep, Result

KEY = "imprompt"  # of the PNG's text


class Request(Checked, frozen=True):
    """One call of `imprompt generate`."""

    model: str = "emoji"
    adapter: Annotated[Any, PlainValidator(adapters_said)] = None  # a name, an `AdapterChoice`, or a list of them
    encoder: str | None = None
    variant: str | None = None
    images: list[AnyItem] = Field(default_factory=list)  # each a picture, a reference, or a list of what is heard together
    init_image: AnyPicture | None = None
    mask_image: AnyPicture | None = None
    controlnet: str | None = None
    control_image: AnyPicture | None = None
    batch_size: Annotated[int, Field(ge=1)] = 4
    dtype: Precision | None = None
    fast: bool = False  # compiled; like the two below it changes pixels, if little
    tiling: bool = False
    quantize: Literal["int8", "fp8"] | None = None
    settings: Settings = Settings()
    only: Annotated[int, Field(ge=0)] | None = None  # the one picture of the call to make

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if not self.images or not all(self.images):
            raise SettingError("no image prompt was given: name at least one picture")
        if self.mask_image and not self.init_image:
            raise SettingError("a mask says what to redraw of a picture: give that picture too (--init)")
        if bool(self.controlnet) != bool(self.control_image):
            raise SettingError("a control image and a ControlNet go together: give both, or neither (--control, --controlnet)")
        return self

    @field_serializer("images")
    def _told(self, images: list[Item]) -> list[Any]:
        return [as_told(item) for item in images]

    def pictures(self) -> list[PictureFile]:
        """Every file that the request reads."""
        return list(files_in(self))

    def load(self, **machine: Any) -> "ImagePromptPipeline":
        """`machine`: what is not of the request, because it changes no pixels: device, offload, keep_features."""
        import torch

        from imprompt.sampling.generate import ImagePromptPipeline

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

    def run(self, pipeline: "ImagePromptPipeline", on_step: "OnStep | None" = None) -> "Result":
        return pipeline(
            self.images,
            init_image=source(self.init_image),
            mask_image=source(self.mask_image),
            control_image=source(self.control_image),
            batch_size=self.batch_size,
            only=self.only,
            on_step=on_step,
            **self.settings.model_dump(),
        )

    def with_hashes(self) -> Self:
        """The same request, every file hashed, for any folder to repeat it from."""
        return with_files(self.beside(Path()), PictureFile.with_hash)

    def beside(self, folder: Path) -> Self:
        """The same request where it was read in `folder`: what it names and is there, weights too, by an absolute path."""

        def found(name: Any) -> Any:
            if isinstance(name, list):
                return [found(one) for one in name]
            if isinstance(name, AdapterChoice):
                return name.model_copy(update={"adapter": found(name.adapter), "encoder": found(name.encoder)})
            known = not isinstance(name, str) or name in MODELS or not (folder / name).exists()
            return name if known else str((folder / name).absolute())

        weights = {name: found(getattr(self, name)) for name in ("model", "adapter", "encoder", "controlnet")}
        moved = with_files(self, lambda file: file.model_copy(update={"path": folder / file.path}))
        return moved.model_copy(update=weights)

    def made(self, result: "Result", index: int) -> str:
        """The JSON that goes into picture `index` of the call: every default filled in."""
        from imprompt import __version__

        only = index if self.only is None else self.only
        whole = self.model_copy(update={"settings": result.settings, "only": only})
        return json.dumps({"imprompt": __version__, **whole.model_dump(mode="json")}, ensure_ascii=False)


def read_request(path: Path) -> Request:
    """The request in a TOML or JSON file, or that made a PNG of ours; SettingError or ImageError if it is none.

    Paths in a TOML or JSON file are relative to it.
    """
    if path.suffix.lower() in FORMATS:
        return request_file(path)
    open_image(path)
    with Image.open(path) as picture:
        text = getattr(picture, "text", {}).get(KEY)
    if text is None:
        raise ImageError(f"{path} was not made by imprompt, or its metadata was removed: it does not say how to repeat it")
    try:
        told = json.loads(text)
        return Request(**{name: value for name, value in told.items() if name != "imprompt"})
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ImageError(f"{path}: its metadata is damaged") from error
    except SettingError as error:
        raise ImageError(f"{path}: its metadata is damaged, or of another imprompt ({error})") from error


FORMATS = {".toml": tomllib.loads, ".json": json.loads}


def request_file(path: Path) -> Request:
    """The request in a TOML or JSON file; SettingError."""
    try:
        told = FORMATS[path.suffix.lower()](path.read_text("utf-8"))
    except OSError as error:
        raise SettingError(f"{path} cannot be read ({first_line(error)})") from error
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{path} is no {path.suffix[1:].upper()}: {first_line(error)}") from error
    if not isinstance(told, dict):
        raise SettingError(f"{path} holds no request: it is to name settings, such as images = ['cat.png']")
    request = Request(**{name: value for name, value in told.items() if name != "imprompt"})
    return request.beside(path.parent)


def save_results(result: "Result", request: Request, out: Path) -> list[Path]:
    """Write every picture with its request inside, and a grid of several; for `out` see `results_at`.

    Only a file that `out` names itself is replaced: all others get names that are free.
    """
    folder, named = results_at(out)
    stem = named or next(files_in(request.images)).path.stem
    folder.mkdir(parents=True, exist_ok=True)
    request = request.with_hashes()
    if named and len(result.images) == 1:
        return [save_png(result.images[0], folder / f"{named}.png", request.made(result, 0))]
    paths = [
        save_new(picture, folder / f"{stem}-{seed}.png", request.made(result, index))
        for index, (picture, seed) in enumerate(zip(result.images, result.seeds, strict=True))
    ]
    if len(result.images) > 1:
        sheet = grid(result.images, columns=result.settings.num_images if len(request.images) > 1 else None)
        paths.append(save_new(sheet, folder / f"{stem}-{result.seeds[0]}-grid.png"))
    return paths


def results_at(out: Path) -> tuple[Path, str]:
    """(folder, name without its ending) of results: `out` is a folder, then the name is empty, or a name ending in .png."""
    if out.is_dir() or not out.suffix:
        return out, ""
    if out.suffix.lower() != ".png":
        raise SettingError(f"{out}: results are PNG files; give a name ending in .png, or a folder")
    return out.parent, out.stem


def save_png(picture: Image.Image, path: Path, text: str | None = None) -> Path:
    """Write a PNG whole or not at all."""
    with told(path), written_whole(path) as part:
        write_png(picture, part, text)
    return path


def save_new(picture: Image.Image, wanted: Path, text: str | None = None) -> Path:
    """Write a PNG whole under the wanted name, or the next that is free; the name that it got."""
    with told(wanted), part_of(wanted) as part:
        write_png(picture, part, text)
        return written_new(part, wanted)


def write_png(picture: Image.Image, path: Path, text: str | None) -> None:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_itxt(KEY, text)
    picture.save(path, "PNG", pnginfo=info)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """What keeps a file from being written, as ImageError."""
    try:
        yield
    except OSError as error:
        raise ImageError(f"cannot write {path}: {first_line(error)}") from error
