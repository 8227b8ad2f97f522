"""Faces: a picture -> the ArcFace embedding of a face in it, its aligned crop and its box.

And what FaceID adapters read of them.

A face comes from insightface (`pip install 'imprompt[face]'`), from another `FaceEncoder`, or from
the user: `Face(embedding)`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from imprompt.encoders.clip import VisionEncoder
from imprompt.encoders.feature_cache import CachedFeatures
from imprompt.errors import CheckpointError, ImageError, MismatchError, SettingError, first_line
from imprompt.variants import BY_NAME, Feature, Variant, image_feature

SIDE = 224  # pixels of an aligned face
# a face that fills the picture is found in a smaller one
DETECTION_SIDES = (640, 576, 512, 448, 384, 320, 256)
LICENCE = (
    "non-commercial research only: insightface's packages of weights, whatever the licence of its "
    "code"
)
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
# Where ArcFace wants eyes, nose and corners of the mouth in a square of 112 pixels (Deng et al.
# 2019, arXiv 1801.07698).
TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)
TEMPLATE_SIDE = 112


@dataclass(frozen=True, eq=False)
class Face:
    """One face.

    embedding  (512,), of NumPy too, as the face encoder gives it, or of unit length if only such
               variants are to read it
    crop       the aligned face: faceid-plus reads it
    square     the square round its box: Kolors' FaceID reads it
    box        where it is in its picture
    """

    embedding: Tensor
    crop: Image.Image | None = None
    square: Image.Image | None = None
    box: Box | None = None


Which = int | str | None
Features = Tensor | tuple[Tensor, Tensor]


class FaceEncoder(Protocol):
    """What finds a face in a picture and embeds it."""

    def encode_face(self, image: Image.Image, face: Which = None) -> Face:
        """The picture's only face.

        Of several the one asked for, counted from left to right or "largest". ImageError if none.
        """
        ...


class FaceFeatures:
    """What FaceID adapters read, of pictures with a face or of faces that the user has.

    Used as `VisionEncoder` is.

    faces   finds them; not needed where all are given as `Face`
    vision  the CLIP image encoder that the plus variants need
    width   of the embeddings that the adapter reads
    """

    def __init__(
        self,
        faces: FaceEncoder | None,
        vision: VisionEncoder | CachedFeatures | None = None,
        *,
        width: int | None = 512,
        device: str | torch.device = "cpu",
    ) -> None:
        self.faces, self.vision = faces, vision
        self.width = width or 512
        self.device = torch.device(device)
        self.source = vision.source if vision is not None else ""

    @property
    def model(self) -> Any:
        """The CLIP network, None without one."""
        return self.vision.model if self.vision is not None else None

    def fingerprint(self) -> str:
        """Of the CLIP network, "" without one."""
        return self.vision.fingerprint() if self.vision is not None else ""

    def feature_dim(self, feature: Feature) -> int:
        """E; of a pair the hidden states'."""
        read = image_feature(feature)
        return self._vision().feature_dim(read) if read else self.width

    def find(self, image: Image.Image, face: Which = None) -> Face:
        """The face in an RGB picture; see `FaceEncoder.encode_face`."""
        if self.faces is None:
            raise SettingError(
                "no face encoder is here to find faces in pictures: give faces as "
                "imprompt.encoders.face.Face"
            )
        return self.faces.encode_face(image, face)

    def features(
        self, images: Sequence[Image.Image | Face], feature: Feature, face: Which = None
    ) -> Features:
        """One face per RGB picture -> (B, 512), or (B, 512) and (B, patches, E): `Variant.feature`
        says what.

        `face` chooses where a picture has several: see `FaceEncoder.encode_face`.
        """
        faces = [image if isinstance(image, Face) else self.find(image, face) for image in images]
        embeddings = torch.stack([self._embedding(face, feature) for face in faces])
        if feature in ("face", "raw face"):
            return embeddings
        return embeddings, self._vision().features(
            [picture_of(face, feature) for face in faces], "penultimate"
        ).to(self.device)

    def null_features(self, variant: Variant) -> Features:
        """What stands for "no image": a zero embedding, beside it the hidden states of a zero
        picture, or zeros (Kolors).
        """
        nothing = torch.zeros(1, self.width, device=self.device)
        if variant.image_feature is None:
            return nothing
        states = self._vision().null_features(BY_NAME["plus"]).to(self.device)
        return nothing, states if variant.null == "zero picture" else torch.zeros_like(states)

    def _embedding(self, face: Face, feature: Feature) -> Tensor:
        """(512,) as that feature wants it."""
        embedding = torch.as_tensor(
            face.embedding, dtype=torch.float32, device=self.device
        ).detach()
        if embedding.shape != (self.width,):
            raise MismatchError(
                f"this adapter reads face embeddings of {self.width} numbers; one has the shape "
                f"{list(embedding.shape)}"
            )
        if not embedding.isfinite().all():
            raise MismatchError("a face embedding holds NaN or infinite numbers")
        if not feature.startswith("raw"):
            return F.normalize(embedding, dim=0)
        if torch.isclose(embedding.norm(), embedding.new_ones(()), atol=1e-3):
            raise MismatchError(
                "this adapter reads face embeddings as the face encoder gives them; one is of unit "
                "length: "
                "give insightface's embedding, not its normed_embedding"
            )
        return embedding

    def _vision(self) -> VisionEncoder | CachedFeatures:
        if self.vision is None:
            raise MismatchError(
                "this adapter reads the picture of the face too: give the CLIP image encoder that "
                "it was trained with"
            )
        return self.vision


def picture_of(face: Face, feature: Feature) -> Image.Image:
    """What the plus variants see of a face; MismatchError if it is not there."""
    found, name = (
        (face.square, "square") if feature == "raw face and square" else (face.crop, "crop")
    )
    if found is None:
        raise MismatchError(
            "this adapter reads the picture of the face beside its embedding: give "
            f"Face(embedding, {name}=…)"
        )
    return found


class Found(NamedTuple):
    """A face that was detected."""

    box: Box
    points: Any  # (5, 2): eyes, nose, corners of the mouth; x and y in pixels


class InsightFace:
    """insightface's detection and ArcFace embeddings, loaded from its package of weights when the
    first picture is given.

    Its code is free; the weights are not: see `LICENCE`, which is logged as a warning, once, when a
    package is loaded by name.
    """

    licence = LICENCE

    def __init__(
        self,
        pack: str = "buffalo_l",
        device: str = "cpu",
        root: str | None = None,
        *,
        analysis: Any = None,
    ) -> None:
        """pack      "buffalo_l" (FaceID) or "antelopev2" (Kolors, InstantID)
        root      the folder whose models/ holds it, else insightface's own, ~/.insightface
        analysis  an `insightface.app.FaceAnalysis` that is prepared already
        """
        self.pack, self.device, self.root = pack, device, root
        self._analysis, self._lock = analysis, Lock()

    @property
    def analysis(self) -> Any:
        with self._lock:
            self._analysis = self._analysis or load(self.pack, self.device, self.root)
        return self._analysis

    def encode_face(self, image: Image.Image, face: Which = None) -> Face:
        """See `FaceEncoder`."""
        box, points = chosen(self.detect(image), face)
        held = SimpleNamespace(kps=points)
        self.analysis.models["recognition"].get(pixels_of(image), held)
        embedding = torch.from_numpy(np.array(held.embedding, np.float32))
        return Face(embedding, align(image, points), square(image, box), box)

    def detect(self, image: Image.Image) -> list[Found]:
        """All faces of an RGB picture, from left to right."""
        pixels = pixels_of(image)
        for side in DETECTION_SIDES:
            boxes, points = self.analysis.det_model.detect(pixels, input_size=(side, side))
            if len(boxes):
                found = zip(boxes, points, strict=True)
                return sorted(
                    (Found(box_of(box), np.asarray(at, float)) for box, at in found),
                    key=lambda face: face.box,
                )
        return []


def pixels_of(image: Image.Image) -> Any:
    """(height, width, 3) of bytes: blue, green, red, as insightface reads them."""
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])


def box_of(row: Any) -> Box:
    left, top, right, bottom = (float(edge) for edge in row[:4])
    return left, top, right, bottom


def load(pack: str, device: str, root: str | None) -> Any:
    """A prepared `insightface.app.FaceAnalysis`.

    SettingError without the package, CheckpointError without its weights.
    """
    try:
        from insightface.app import FaceAnalysis  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SettingError(
            "faces are found by insightface: pip install 'imprompt[face]', or give face "
            f"embeddings ({first_line(error)})"
        ) from error
    say_licence(pack)
    providers, options, context = providers_for(device)
    folder = {"root": root} if root else {}
    parts = ["detection", "recognition"]
    try:
        analysis = FaceAnalysis(
            name=pack,
            allowed_modules=parts,
            providers=providers,
            provider_options=options,
            **folder,
        )
        analysis.prepare(ctx_id=context, det_size=(DETECTION_SIDES[0],) * 2)
        if missing := [part for part in parts if part not in analysis.models]:
            raise ValueError(f"it has no {missing[0]} model")
    except Exception as error:  # a folder or a download can be wrong in any way
        where = f"{root or '~/.insightface'}/models/{pack}"
        raise CheckpointError(
            f"insightface's weights {pack} cannot be loaded: their .onnx files must be in {where} "
            f"({first_line(error)})"
        ) from error
    return analysis


@cache
def say_licence(pack: str) -> None:
    logging.getLogger(__name__).warning("the face encoder %s is for %s", pack, LICENCE)


def providers_for(device: str) -> tuple[list[str], list[Mapping[str, Any]], int]:
    """onnxruntime's providers and their options for a device of PyTorch, and insightface's number
    of it: -1 is the CPU.
    """
    kind, _, number = device.partition(":")
    own: dict[str, tuple[str, dict[str, Any]]] = {
        "cuda": ("CUDAExecutionProvider", {"device_id": int(number or 0)}),
        "mps": ("CoreMLExecutionProvider", {}),
    }
    if kind not in own:
        return ["CPUExecutionProvider"], [{}], -1
    name, options = own[kind]
    return [name, "CPUExecutionProvider"], [options, {}], int(number or 0)


def chosen(faces: Sequence[Found], face: Which) -> Found:
    """One of the faces found in a picture.

    ImageError, one line, if there is none or none is chosen of several.
    """
    if not (face in (None, "largest") or (isinstance(face, int) and face >= 0)):
        raise SettingError(
            f"face = {face!r}: give a number, counted from 0 at the left, or 'largest'"
        )
    if not faces:
        raise ImageError(
            "no face was found in the picture: give one with an upright face, seen from the front, "
            "with room round it"
        )
    if face == "largest":
        return max(faces, key=area)
    if face is None and len(faces) == 1:
        return faces[0]
    if isinstance(face, int) and face < len(faces):
        return faces[face]
    boxes = "; ".join(
        f"{number}: {', '.join(f'{edge:.0f}' for edge in found.box)}"
        for number, found in enumerate(faces)
    )
    there = (
        f"{counted(len(faces), 'face')} found in the picture (left, top, right, bottom of {boxes})"
    )
    raise ImageError(
        f"face = {face}: {there}"
        if face is not None
        else f"{there}: choose with face=, a number or 'largest'"
    )


def counted(number: int, what: str) -> str:
    return f"{number} {what} was" if number == 1 else f"{number} {what}s were"


def area(found: Found) -> float:
    left, top, right, bottom = found.box
    return (right - left) * (bottom - top)


def align(image: Image.Image, points: Any, side: int = SIDE) -> Image.Image:
    """The face turned and scaled so that its eyes, nose and corners of the mouth (5, 2) lie as
    ArcFace's template says.
    """
    if points.shape != TEMPLATE.shape:
        raise ImageError(f"a face is aligned by 5 points (x, y); {list(points.shape)} were given")
    turn, shift = similarity(points.astype(float), TEMPLATE * (side / TEMPLATE_SIDE))
    middle = 0.5 + 0.5j  # of a pixel: landmarks count from it, Pillow from the pixel's corner
    # Pillow asks where in the picture a pixel of the crop is
    back, start = (1 / turn, middle - (middle + shift) / turn)
    coefficients = (back.real, -back.imag, start.real, back.imag, back.real, start.imag)
    return image.convert("RGB").transform(
        (side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )


def similarity(points: Any, targets: Any) -> tuple[complex, complex]:
    """The rotation and scale a and shift b, as complex numbers, with the least Σ |a·point + b −
    target|²; both (n, 2).

    It is Umeyama's (1991) for the plane. ImageError if all points are one.
    """
    source, target = (each[:, 0] + 1j * each[:, 1] for each in (points, targets))
    away, to = source - source.mean(), target - target.mean()
    if not (spread := (np.abs(away) ** 2).sum()):
        raise ImageError("a face's landmarks lie all at one point: it cannot be aligned")
    turn = complex((away.conj() * to).sum() / spread)
    return turn, complex(target.mean()) - turn * complex(source.mean())


def square(image: Image.Image, box: Box) -> Image.Image:
    """The picture inside the square round the box, black where it reaches over the edge."""
    left, top, right, bottom = box
    half = max(right - left, bottom - top, 1) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    edges = (x - half, y - half, x + half, y + half)
    return image.convert("RGB").crop(tuple(round(edge) for edge in edges))  # pyright: ignore[reportArgumentType] - four
