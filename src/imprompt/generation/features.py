"""Read the features of references: prepare and encode pictures, find faces, load feature files.

Shape letters as in `imprompt.adapter`; K pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imprompt.encoders.embedding_files import FeatureSpec, check_embedding, load_embedding
from imprompt.encoders.matching import Encoder
from imprompt.encoders.noise import Noise, noise_negative
from imprompt.encoders.preparation import Preparation, prepare
from imprompt.errors import SettingError
from imprompt.generation.combine import combine
from imprompt.generation.references import Reference, is_face, is_features, plain_picture
from imprompt.images import open_image
from imprompt.projections.resampler import FacePlusV2Projection
from imprompt.variants import Variant

Features = Tensor | tuple[Tensor, ...]  # (K, ...), as the variant reads them


@dataclass(frozen=True, eq=False)
class Reader:
    """Reader of the features that an adapter's variant takes, with an image or a face encoder.

    name   name of the adapter in messages
    reads  specification that the features of a file must match
    """

    encoder: Encoder
    variant: Variant
    name: str = ""
    reads: FeatureSpec | None = None

    def features(self, reference: Reference) -> tuple[Features, list[float] | None]:
        """Return the features (K, ...) of a reference's pictures, and their weights if it has any.

        Each picture, and each row of a file of features, is a row. If tokens are concatenated, each
        tile of a picture in tiles is a row with the picture's weight; otherwise the average of its
        tiles is one row.
        """
        self.check(reference)
        found = [self.features_of(image, reference) for image in reference.images]
        if reference.weights is None:
            return rows_of(found), None
        own = iter(reference.weights)
        weights: list[float] = []
        for image, features in zip(reference.images, found, strict=True):
            rows = count(features)
            weights += islice(own, rows) if is_features(image) else [*islice(own, 1)] * rows
        return rows_of(found), [*weights, *own]  # a wrong number is reported where they are used

    def check(self, reference: Reference) -> None:
        """Raise SettingError if a reference has options that this kind of adapter cannot use."""
        name, faces = self.name or "the adapter", bool(self.variant.faces)
        if not faces and (reference.face is not None or any(map(is_face, reference.images))):
            raise SettingError(
                f"{name} reads whole pictures ({self.variant.name}); a face is for a FaceID adapter"
            )
        if reference.face_scale != 1 and not issubclass(
            self.variant.projection, FacePlusV2Projection
        ):
            raise SettingError(f"face_scale is for faceid-plus-v2; {name} is {self.variant.name}")
        plain = reference.crop in (None, "center") and (
            (reference.sharpening, reference.ignore) == (0, None)
        )
        if not plain and any(map(is_features, reference.images)):
            raise SettingError(
                "crop, sharpening and ignore are for pictures: a file of features holds what was "
                "made of one"
            )
        if faces and (not plain or isinstance(reference.negative, Noise)):
            raise SettingError(
                f"crop, sharpening, ignore and noise are for whole pictures; {name} reads faces "
                f"({self.variant.name})"
            )

    def features_of(self, image: Any, reference: Reference) -> Features:
        """Return the features (K, ...) of one image of a reference."""
        if is_features(image):
            embedding = load_embedding(image.path)
            if self.reads is not None:
                check_embedding(embedding, self.reads, image.path)
            return embedding.features
        if is_face(image):
            return self.encoder.features([image], self.variant.feature)
        picture = open_image(plain_picture(image))
        if self.variant.faces:
            faces: Any = self.encoder
            return faces.features([picture], self.variant.feature, reference.face)
        features = self.picture_features(self.made_ready(picture, reference))
        return features if reference.combine == "concat" else combine(features, "average").features

    def made_ready(self, picture: Image.Image, reference: Reference) -> list[Image.Image]:
        """Return a picture cropped, sharpened and masked as the reference states."""
        made = Preparation(
            crop=reference.crop,
            sharpening=reference.sharpening,
            ignore=plain_picture(reference.ignore),
        )
        return prepare(picture, made, self.encoder)

    def null_features(self) -> Features:
        """Return the features (1, ...) that stand for "no image"."""
        return self.encoder.null_features(self.variant)

    def noise_features(self, reference: Reference, noise: Noise, seed: int) -> Features:
        """Return the features (1, ...) of noise made from the first image that is a picture."""
        pictures = [image for image in reference.images if not is_features(image)]
        first = (
            self.made_ready(open_image(plain_picture(pictures[0])), reference)[0]
            if pictures
            else None
        )
        return self.picture_features([noise_negative(first, noise, self.encoder, seed)])

    def picture_features(self, pictures: Sequence[Image.Image]) -> Features:
        """Encode prepared pictures to features (K, ...)."""
        return self.encoder.features(pictures, self.variant.feature)


def count(features: Features) -> int:
    """Return the number K of rows."""
    return len(features[0] if isinstance(features, tuple) else features)


def rows_of(features: Sequence[Features]) -> Features:
    """Concatenate several features (K, ...) along K.

    The result is on the first device that is not the CPU: features from a file are on the CPU.
    """
    parts = [of if isinstance(of, tuple) else (of,) for of in features]
    device = next(
        (part[0].device for part in parts if part[0].device.type != "cpu"), parts[0][0].device
    )
    joined = tuple(
        torch.cat([tensor.to(device) for tensor in part]) for part in zip(*parts, strict=True)
    )
    return joined if isinstance(features[0], tuple) else joined[0]
