"""References of a training sample, prepared for the models: whole pictures, or faces in them.

What is prepared has parts by name (`imprompt.variants.PARTS`): "image" for the image encoder, and
"face", an embedding. Shape letters as in `imprompt.training.features`; R pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from imprompt.encoders.face import Face, embedding_of, picture_of
from imprompt.encoders.face_sources import FaceSource
from imprompt.encoders.preparation import side_of
from imprompt.encoders.vision import preprocess
from imprompt.errors import ImageError
from imprompt.training.samples import BadSample, Opener
from imprompt.variants import Feature

Parts = dict[str, Tensor]
Opened = tuple[Opener, Image.Image]  # a picture, and what has opened it


class References(Protocol):
    """Preparation of the pictures that prompt; copies of it are sent to reading processes."""

    def prompt(self, name: str, opened: Opened) -> Image.Image | Face:
        """Return what a picture prompts with: itself, or its largest face.

        Raise BadSample, of that name, if there is no face.
        """
        ...

    def prepare(self, name: str, opened: Sequence[Opened]) -> Parts:
        """Prepare R pictures of a sample: each part is (R, …). Raise BadSample as `prompt`."""
        ...

    def blank(self) -> Parts:
        """Return zeros with the shapes of one prepared picture."""
        ...


@dataclass(frozen=True)
class PictureReferences:
    """References of which the image encoder reads the whole picture: "image" (R, 3, S, S)."""

    processor: Any

    def prompt(self, name: str, opened: Opened) -> Image.Image:  # noqa: ARG002
        """Return the picture."""
        return opened[1]

    def prepare(self, name: str, opened: Sequence[Opened]) -> Parts:  # noqa: ARG002
        """Prepare pictures for the image encoder."""
        return {"image": preprocess(self.processor, [picture for _, picture in opened])}

    def blank(self) -> Parts:
        """Return a picture of zeros."""
        side = side_of(self.processor)
        return {"image": torch.zeros(3, side, side)}


@dataclass(frozen=True)
class FaceReferences:
    """References of which the largest face is read: its embedding "face" (R, E).

    `pictures` prepares crops or squares of the faces, as "image" (R, 3, S, S); None for a variant
    that reads the embedding alone.
    """

    source: FaceSource
    feature: Feature
    pictures: PictureReferences | None

    def prompt(self, name: str, opened: Opened) -> Face:
        """Return the largest face of a picture; raise BadSample if there is none."""
        opener, picture = opened
        try:
            return self.source.face_of(picture, opener)  # pyright: ignore[reportArgumentType]
        except ImageError as error:
            raise BadSample(name, str(error), "no face") from error

    def prepare(self, name: str, opened: Sequence[Opened]) -> Parts:
        """Embed the faces of pictures, and prepare the faces' own pictures."""
        faces = [self.prompt(name, one) for one in opened]
        own = [embedding_of(face, self.feature, self.source.width) for face in faces]
        parts = {"face": torch.stack(own)}
        if self.pictures is None:
            return parts
        crops = [
            (opener, picture_of(face, self.feature))
            for (opener, _), face in zip(opened, faces, strict=True)
        ]
        return parts | self.pictures.prepare(name, crops)

    def blank(self) -> Parts:
        """Return a zero embedding, and a picture of zeros."""
        parts = {"face": torch.zeros(self.source.width)}
        return parts if self.pictures is None else parts | self.pictures.blank()
