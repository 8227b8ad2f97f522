"""Find faces in pictures: their ArcFace embeddings, aligned crops and boxes.

`FaceFeatures` encodes them to the features that FaceID adapters read. A face comes from insightface
(`pip install 'imprompt[face]'`), from another `FaceEncoder`, or from the user: `Face(embedding)`.
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

from imprompt.encoders.feature_cache import CachedFeatures
from imprompt.encoders.vision import VisionEncoder
from imprompt.errors import CheckpointError, ImageError, MismatchError, SettingError, first_line
from imprompt.variants import BY_NAME, FACE_DIM, Feature, Variant, image_feature

SIDE = 224  # pixels of an aligned face
# sides of the detector's input: a face that fills the picture is found at a smaller side
DETECTION_SIDES = (640, 576, 512, 448, 384, 320, 256)
LICENCE = (
    "non-commercial research only: insightface's packages of weights, whatever the licence of its "
    "code"
)
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
# ArcFace's eyes, nose and mouth corners in 112 × 112 pixels (Deng et al. 2019, arXiv 1801.07698).
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
    """Face of a picture, as FaceID adapters read it.

    embedding  (512,) of PyTorch or NumPy, as the face encoder gives it; of unit length only if no
               "raw" variant reads it
    crop       the aligned face, which faceid-plus reads
    square     the square around its box, which Kolors' FaceID reads
    box        its place in the picture
    """

    embedding: Tensor
    crop: Image.Image | None = None
    square: Image.Image | None = None
    box: Box | None = None


Which = int | str | None
Features = Tensor | tuple[Tensor, Tensor]


class FaceEncoder(Protocol):
    """Encoder that finds a face in a picture and embeds it."""

    def encode_face(self, image: Image.Image, face: Which = None) -> Face:
        """Return the picture's only face, or the chosen one of several.

        `face` is a number, counted from 0 at the left, or "largest". Raise ImageError if there is
        no such face.
        """
        ...


class FaceFeatures:
    """Encoder of the features that FaceID adapters read, from pictures or given faces.

    It has the interface of `VisionEncoder`.

    faces   finds faces in pictures; not needed if all are given as `Face`
    vision  CLIP image encoder that the plus variants need
    width   width of the embeddings that the adapter reads
    """

    def __init__(
        self,
        faces: FaceEncoder | None,
        vision: VisionEncoder | CachedFeatures | None = None,
        *,
        width: int | None = FACE_DIM,
        device: str | torch.device = "cpu",
    ) -> None:
        self.faces, self.vision = faces, vision
        self.width = width or FACE_DIM
        self.device = torch.device(device)
        self.source = vision.source if vision is not None else ""

    @property
    def model(self) -> Any:
        """CLIP network; None if there is none."""
        return self.vision.model if self.vision is not None else None

    def fingerprint(self) -> str:
        """Return the hash of the CLIP network's weights; "" if there is no such network."""
        return self.vision.fingerprint() if self.vision is not None else ""

    def feature_dim(self, feature: Feature) -> int:
        """Return the width E of a feature; of a pair, the width of its hidden states."""
        read = image_feature(feature)
        return self._vision().feature_dim(read) if read else self.width

    def find(self, image: Image.Image, face: Which = None) -> Face:
        """Find the face in an RGB picture: see `FaceEncoder.encode_face`.

        Raise SettingError if there is no face encoder.
        """
        if self.faces is None:
            raise SettingError(
                "there is no face encoder to find faces in pictures: give faces as "
                "imprompt.encoders.face.Face"
            )
        return self.faces.encode_face(image, face)

    def features(
        self, images: Sequence[Image.Image | Face], feature: Feature, face: Which = None
    ) -> Features:
        """Encode one face per RGB picture to (B, 512), or to (B, 512) and (B, patches, E).

        `Variant.feature` describes both. `face` chooses if a picture has several faces: see
        `FaceEncoder.encode_face`.
        """
        faces = [image if isinstance(image, Face) else self.find(image, face) for image in images]
        embeddings = torch.stack([embedding_of(face, feature, self.width) for face in faces]).to(
            self.device
        )
        if feature in ("face", "raw face"):
            return embeddings
        return embeddings, self._vision().features(
            [picture_of(face, feature) for face in faces], "penultimate"
        ).to(self.device)

    def null_features(self, variant: Variant) -> Features:
        """Return the features that stand for "no image".

        They are a zero embedding (1, 512) and, for the plus variants, hidden states
        (1, patches, E): those of a zero picture, or zeros (Kolors).
        """
        nothing = torch.zeros(1, self.width, device=self.device)
        if variant.image_feature is None:
            return nothing
        states = self._vision().null_features(BY_NAME["plus"]).to(self.device)
        return nothing, states if variant.null == "zero picture" else torch.zeros_like(states)

    def _vision(self) -> VisionEncoder | CachedFeatures:
        if self.vision is None:
            raise MismatchError(
                "this adapter reads the picture of the face too: give the CLIP image encoder that "
                "it was trained with"
            )
        return self.vision


def embedding_of(face: Face, feature: Feature, width: int = FACE_DIM) -> Tensor:
    """Return a face's embedding (E,) in the form that the feature needs, in float32.

    Raise MismatchError if it is not of that width, not finite, or of unit length where a "raw"
    feature needs it as the face encoder gives it.
    """
    embedding = torch.as_tensor(face.embedding, dtype=torch.float32).detach()
    if embedding.shape != (width,):
        raise MismatchError(
            f"this adapter reads face embeddings of {width} numbers; one has the shape "
            f"{list(embedding.shape)}"
        )
    if not embedding.isfinite().all():
        raise MismatchError("a face embedding holds NaN or infinite numbers")
    if not feature.startswith("raw"):
        return F.normalize(embedding, dim=0)
    if torch.isclose(embedding.norm(), embedding.new_ones(()), atol=1e-3):
        raise MismatchError(
            "this adapter reads face embeddings as the face encoder gives them; one is of unit "
            "length: give insightface's embedding, not its normed_embedding"
        )
    return embedding


def picture_of(face: Face, feature: Feature) -> Image.Image:
    """Return the picture of a face that the plus variants read; MismatchError if there is none."""
    found, name = (
        (face.square, "square") if feature == "raw face and square" else (face.crop, "crop")
    )
    if found is None:
        raise MismatchError(
            "this adapter reads the picture of the face as well as its embedding: give "
            f"Face(embedding, {name}=…)"
        )
    return found


class Found(NamedTuple):
    """Detected face, not yet embedded."""

    box: Box
    points: Any  # (5, 2): eyes, nose, corners of the mouth; x and y in pixels


class InsightFace:
    """Face encoder of insightface: its detection and ArcFace embeddings.

    Its package of weights is loaded when the first picture is given. The code is free, the weights
    are not: `LICENCE` is logged as a warning, once, when a package is loaded by name.
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
        """Choose the package of weights, which is loaded later.

        pack      "buffalo_l" (FaceID) or "antelopev2" (Kolors, InstantID); or a folder with such
                  .onnx files, by its absolute path
        root      the folder whose models/ holds it; insightface's own, ~/.insightface, if not given
        analysis  an `insightface.app.FaceAnalysis` that is already prepared
        """
        self.pack, self.device, self.root = pack, device, root
        self._analysis, self._lock = analysis, Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the lock, so that reading processes can have copies."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    @property
    def analysis(self) -> Any:
        """Prepared `insightface.app.FaceAnalysis`, loaded at its first use."""
        with self._lock:
            self._analysis = self._analysis or load(self.pack, self.device, self.root)
        return self._analysis

    def encode_face(self, image: Image.Image, face: Which = None) -> Face:
        """Find, crop and embed a face; see `FaceEncoder.encode_face`."""
        box, points = chosen(self.detect(image), face)
        held = SimpleNamespace(kps=points)
        self.analysis.models["recognition"].get(pixels_of(image), held)
        embedding = torch.from_numpy(np.array(held.embedding, np.float32))
        return Face(embedding, align(image, points), square(image, box), box)

    def detect(self, image: Image.Image) -> list[Found]:
        """Return all faces of an RGB picture, from left to right."""
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
    """Return (height, width, 3) of bytes: blue, green, red, as insightface reads them."""
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])


def box_of(row: Any) -> Box:
    """Return the box in a row of the detector's output, whose fifth number is its score."""
    left, top, right, bottom = (float(edge) for edge in row[:4])
    return left, top, right, bottom


def load(pack: str, device: str, root: str | None) -> Any:
    """Load a prepared `insightface.app.FaceAnalysis`.

    Raise SettingError if insightface is not installed, CheckpointError if its weights cannot be
    loaded.
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
    """Log the licence of a package of weights as a warning, once per package."""
    logging.getLogger(__name__).warning("the face encoder %s is for %s", pack, LICENCE)


def providers_for(device: str) -> tuple[list[str], list[Mapping[str, Any]], int]:
    """Return onnxruntime's providers, their options and insightface's device number.

    `device` is PyTorch's name of the device; number -1 is the CPU.
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
    """Return the only face found in a picture, or the one that `face` chooses.

    Raise ImageError, one line, if there is no such face, or several and no choice; SettingError if
    `face` is not a number from 0 or "largest".
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
    """Return "1 face was" or "2 faces were", for messages."""
    return f"{number} {what} was" if number == 1 else f"{number} {what}s were"


def area(found: Found) -> float:
    """Return the area of a face's box in square pixels."""
    left, top, right, bottom = found.box
    return (right - left) * (bottom - top)


def align(image: Image.Image, points: Any, side: int = SIDE) -> Image.Image:
    """Return the face, rotated and scaled to ArcFace's template, in `side` × `side` pixels.

    `points` (5, 2) are eyes, nose and corners of the mouth. Raise ImageError if their shape is
    another one.
    """
    if points.shape != TEMPLATE.shape:
        raise ImageError(f"a face is aligned by 5 points (x, y); {list(points.shape)} were given")
    turn, shift = similarity(points.astype(float), TEMPLATE * (side / TEMPLATE_SIDE))
    middle = 0.5 + 0.5j  # of a pixel: landmarks count from it, Pillow from the pixel's corner
    # Pillow needs the inverse map, from the crop to the picture
    back, start = (1 / turn, middle - (middle + shift) / turn)
    coefficients = (back.real, -back.imag, start.real, back.imag, back.real, start.imag)
    return image.convert("RGB").transform(
        (side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )


def similarity(points: Any, targets: Any) -> tuple[complex, complex]:
    """Fit a·point + b to the targets: return a (rotation and scale) and b (shift).

    Both are complex numbers, with the least Σ |a·point + b − target|²; points and targets are
    (n, 2). This is Umeyama's method (1991) in the plane. Raise ImageError if all points coincide.
    """
    source, target = (each[:, 0] + 1j * each[:, 1] for each in (points, targets))
    away, to = source - source.mean(), target - target.mean()
    if not (spread := (np.abs(away) ** 2).sum()):
        raise ImageError("a face's landmarks lie all at one point: it cannot be aligned")
    turn = complex((away.conj() * to).sum() / spread)
    return turn, complex(target.mean()) - turn * complex(source.mean())


def square(image: Image.Image, box: Box) -> Image.Image:
    """Cut out the square around the box, black where it extends beyond the picture."""
    left, top, right, bottom = box
    half = max(right - left, bottom - top, 1) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    edges = (x - half, y - half, x + half, y + half)
    return image.convert("RGB").crop(tuple(round(edge) for edge in edges))  # pyright: ignore[reportArgumentType] - four
