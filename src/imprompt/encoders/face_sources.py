"""Face encoders by name: insightface's packages of weights, and files of stored embeddings."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor

from imprompt.encoders.embedding_files import SUFFIX, Embedding, load_embedding
from imprompt.encoders.face import Face, FaceEncoder, InsightFace, Which
from imprompt.errors import ImageError, MismatchError, SettingError
from imprompt.files import sha256
from imprompt.variants import BESIDE_A_FACE, FACE_DIM, PACKS, Feature

KNOWN = f"one of insightface's packages of weights ({', '.join(PACKS)}), or a folder of such files"


class HashedFile(Protocol):
    """A picture whose file is at hand."""

    def sha256(self) -> str:
        """Return the SHA-256 of the file."""
        ...


class FaceSource(Protocol):
    """Where the faces of a training set's pictures come from."""

    @property
    def name(self) -> str:
        """Name that a recipe states."""
        ...

    @property
    def encoder(self) -> str:
        """Face encoder, by the name that adapter files state."""
        ...

    @property
    def width(self) -> int:
        """Width E of the embeddings."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of stored embeddings; "" where they are computed."""
        ...

    def face_of(self, picture: Image.Image, file: HashedFile) -> Face:
        """Return the largest face of an RGB picture; raise ImageError if there is none."""
        ...


@dataclass(frozen=True, eq=False)
class FoundFaces:
    """Faces that a face encoder finds: it runs in the processes that read the pictures."""

    name: str
    finder: FaceEncoder
    width: int = FACE_DIM
    fingerprint: str = ""

    @property
    def encoder(self) -> str:
        """Name of the face encoder."""
        return self.name

    def face_of(self, picture: Image.Image, file: HashedFile) -> Face:  # noqa: ARG002
        """Return the largest face of an RGB picture; raise ImageError if there is none."""
        return self.finder.encode_face(picture, "largest")


@dataclass(frozen=True, eq=False)
class StoredFaces:
    """Embeddings in a file, found by the SHA-256 of each picture's file.

    The picture itself stands for the crop and the square of its face.
    """

    name: str
    embedding: Embedding

    @cached_property
    def rows(self) -> dict[str, int]:
        """Number of a picture's row in the file."""
        return {digest: row for row, digest in enumerate(self.embedding.pictures)}

    @property
    def encoder(self) -> str:
        """Name of the face encoder as the file states it; "" if it names that of crops."""
        return self.embedding.encoder if len(self.embedding.parts) == 1 else ""

    @property
    def faces(self) -> Tensor:
        """Embeddings (K, E)."""
        return self.embedding.parts[0]

    @property
    def width(self) -> int:
        """Width E of the embeddings."""
        return self.faces.shape[-1]

    @property
    def fingerprint(self) -> str:
        """Hash of the file."""
        return sha256(Path(self.name))[:16]

    def face_of(self, picture: Image.Image, file: HashedFile) -> Face:
        """Return the face of a picture; raise ImageError if the file holds no embedding of it."""
        row = self.rows.get(file.sha256())
        if row is None:
            raise ImageError(f"{self.name} holds no face embedding of it")
        return Face(self.faces[row], crop=picture, square=picture)


def open_face_source(name: str, feature: Feature) -> FaceSource:
    """Return the faces that a recipe names, for a variant that reads `feature`.

    Raise SettingError if it names none, CheckpointError or MismatchError if a file cannot be used.
    """
    if not name.endswith(SUFFIX):
        finder = face_encoder(name, "cpu")
        if finder is None:
            raise SettingError(f"faces = {name!r}: give {KNOWN}, or a {SUFFIX} file of embeddings")
        return FoundFaces(name, finder)
    embedding = load_embedding(name)
    faces, count = embedding.parts[0], len(embedding.parts[0])
    if embedding.feature not in BESIDE_A_FACE or faces.ndim != 2:
        raise MismatchError(
            f"{name} holds {embedding.feature} features, not face embeddings: imprompt embed "
            "writes those of a FaceID adapter"
        )
    if len(set(embedding.pictures)) != count or len(embedding.pictures) != count:
        raise MismatchError(
            f"{name} holds {count:,} face embeddings and the hashes of "
            f"{len(set(embedding.pictures)):,} pictures: it must name one picture for each"
        )
    if feature.startswith("raw") and not embedding.feature.startswith("raw"):
        raise MismatchError(
            f"{name} holds face embeddings of unit length; this variant reads them as the face "
            'encoder gives them: store them as feature "raw face"'
        )
    return StoredFaces(name, embedding)


def face_encoder(name: str, device: str) -> FaceEncoder | None:
    """Return the face encoder of that name, or None if no such one is known.

    Its weights are loaded with the first picture.
    """
    if Path(name).is_dir():
        return InsightFace(str(Path(name).absolute()), device)
    return InsightFace(name, device) if name in PACKS else None


@dataclass(frozen=True, eq=False)
class UnknownFaces:
    """Stands for a face encoder that an adapter states and that is not known here."""

    name: str

    def encode_face(self, image: Image.Image, face: Which = None) -> Face:  # noqa: ARG002
        """Raise SettingError, which says how to give the face."""
        raise SettingError(
            f"this adapter reads faces as {self.name} embeds them, which is not "
            f"{KNOWN}: give that face encoder as faces=, or faces as imprompt.Face"
        )
