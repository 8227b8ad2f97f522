"""A request as it stands in the PNG that it made: enough to repeat the picture, and to notice when it cannot be."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from PIL import Image, PngImagePlugin
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from imprompt.errors import ImageError, SettingError, first_line
from imprompt.files import written_whole
from imprompt.images import grid, open_image
from imprompt.sampling.settings import Settings, one_line

if TYPE_CHECKING:
    from imprompt.sampling.generate import ImagePromptPipeline, OnStep, Result

KEY = "imprompt"  # of the PNG's text


class PictureFile(BaseModel):
    """A picture by its path, and a hash of what it held, so that a changed file is noticed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path
    sha256: str = ""

    def check(self) -> None:
        """ImageError if the file cannot be used, or is not what it was."""
        open_image(self.path)
        if any("\ud800" <= letter <= "\udfff" for letter in str(self.path.absolute())):  # what Python makes of other bytes
            raise ImageError(f"{str(self.path)!r}: its name is no Unicode text, which a result must keep; rename it")
        if self.sha256 and hash_of(self.path) != self.sha256:
            raise ImageError(f"{self.path} is not the picture that it was: the result would differ from the one to repeat")

    def with_hash(self) -> "PictureFile":
        return PictureFile(path=self.path.absolute(), sha256=hash_of(self.path))


def _as_picture(value: Any) -> Any:
    return {"path": value} if isinstance(value, (str, Path)) else value


AnyPicture = Annotated[PictureFile, BeforeValidator(_as_picture)]


class Request(BaseModel):
    """One call of `imprompt generate`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "emoji"
    adapter: str | None = None
    encoder: str | None = None
    images: list[AnyPicture] = Field(default_factory=list)
    init_image: AnyPicture | None = None
    mask_image: AnyPicture | None = None
    batch_size: Annotated[int, Field(ge=1)] = 4
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    fast: bool = False  # compiled; like the two below it changes pixels, if little
    tiling: bool = False
    quantize: Literal["int8", "fp8"] | None = None
    settings: Settings = Settings()
    only: Annotated[int, Field(ge=0)] | None = None  # the one picture of the call to make

    @classmethod
    def check(cls, **values: Any) -> Self:
        """The request, or SettingError with one line."""
        try:
            request = cls.model_validate(values)
        except ValidationError as error:
            raise SettingError(one_line(error)) from error
        if not request.images:
            raise SettingError("no image prompt was given: name at least one picture")
        if request.mask_image and not request.init_image:
            raise SettingError("a mask says what to redraw of a picture: give that picture too (--init)")
        return request

    def pictures(self) -> list[PictureFile]:
        """Every file that the request reads."""
        return [*self.images, *(p for p in (self.init_image, self.mask_image) if p is not None)]

    def load(self, **machine: Any) -> "ImagePromptPipeline":
        """`machine`: what is not of the request, because it changes no pixels: device, offload, keep_features."""
        import torch

        from imprompt.sampling.generate import ImagePromptPipeline

        dtype = getattr(torch, self.dtype) if self.dtype else None
        return ImagePromptPipeline.from_pretrained(
            self.model,
            adapter=self.adapter,
            encoder=self.encoder,
            dtype=dtype,
            compile=self.fast,
            tiling=self.tiling,
            quantize=self.quantize,
            **machine,
        )

    def run(self, pipeline: "ImagePromptPipeline", on_step: "OnStep | None" = None) -> "Result":
        return pipeline(
            [p.path for p in self.images],
            init_image=self.init_image.path if self.init_image else None,
            mask_image=self.mask_image.path if self.mask_image else None,
            batch_size=self.batch_size,
            only=self.only,
            on_step=on_step,
            **self.settings.model_dump(),
        )

    def with_hashes(self) -> Self:
        """The same request, every file hashed."""
        return self.model_copy(
            update={
                "images": [p.with_hash() for p in self.images],
                "init_image": self.init_image.with_hash() if self.init_image else None,
                "mask_image": self.mask_image.with_hash() if self.mask_image else None,
            }
        )

    def made(self, result: "Result", index: int) -> str:
        """The JSON that goes into picture `index` of the call: every default filled in."""
        from imprompt import __version__

        only = index if self.only is None else self.only
        whole = self.model_copy(update={"settings": result.settings, "only": only})
        return json.dumps({"imprompt": __version__, **whole.model_dump(mode="json")}, ensure_ascii=False)


def read_request(path: Path) -> Request:
    """The request that made a PNG of ours; ImageError if it is none."""
    open_image(path)
    with Image.open(path) as picture:
        text = getattr(picture, "text", {}).get(KEY)
    if text is None:
        raise ImageError(f"{path} was not made by imprompt, or its metadata was removed: it does not say how to repeat it")
    try:
        told = json.loads(text)
        return Request.check(**{name: value for name, value in told.items() if name != "imprompt"})
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ImageError(f"{path}: its metadata is damaged") from error
    except SettingError as error:
        raise ImageError(f"{path}: its metadata is damaged, or of another imprompt ({error})") from error


def save_results(result: "Result", request: Request, out: Path) -> list[Path]:
    """Write every picture with its request inside, and a grid of several; for `out` see `results_at`."""
    folder, named = results_at(out)
    stem = named or request.images[0].path.stem
    folder.mkdir(parents=True, exist_ok=True)
    request = request.with_hashes()
    several = len(result.images) > 1
    paths = []
    for index, (picture, seed) in enumerate(zip(result.images, result.seeds, strict=True)):
        name = f"{stem}-{seed}" if several or not named else stem
        paths.append(save_png(picture, free_name(folder, name, reuse=bool(named)), request.made(result, index)))
    if several:
        sheet = grid(result.images, columns=result.settings.num_images if len(request.images) > 1 else None)
        paths.append(save_png(sheet, free_name(folder, f"{stem}-{result.seeds[0]}-grid", reuse=bool(named))))
    return paths


def results_at(out: Path) -> tuple[Path, str]:
    """(folder, name without its ending) of results: `out` is a folder, then the name is empty, or a name ending in .png."""
    if out.is_dir() or not out.suffix:
        return out, ""
    if out.suffix.lower() != ".png":
        raise SettingError(f"{out}: results are PNG files; give a name ending in .png, or a folder")
    return out.parent, out.stem


def free_name(folder: Path, stem: str, *, reuse: bool) -> Path:
    """A path that overwrites nothing, unless the user named the file."""
    path, number = folder / f"{stem}.png", 2
    while path.exists() and not reuse:
        path, number = folder / f"{stem}-{number}.png", number + 1
    return path


def save_png(picture: Image.Image, path: Path, text: str | None = None) -> Path:
    """Write a PNG whole or not at all."""
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_itxt(KEY, text)
    try:
        with written_whole(path) as aside:
            picture.save(aside, "PNG", pnginfo=info)
    except OSError as error:
        raise ImageError(f"cannot write {path}: {first_line(error)}") from error
    return path


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
