"""Measures of results whose scenes are known: colours, places and shapes, and similarity.

Colours, places and shapes are compared with the scenes' factors; a metric encoder measures
similarity. It has a seed and a size of its own and never conditioned anything; the classifiers were
trained separately. Shape letters: N pictures or scenes, S pixels a side, E width of an embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import ResNetForImageClassification

from imprompt.evaluation.metric_encoders import MetricEncoder, open_clip
from worlds.emoji.clip import preprocess
from worlds.emoji.edges import edges
from worlds.emoji.scenes import Scenes, background, to_image

from .paths import GLYPH_CLASSIFIER, METRIC_ENCODER, STYLE_CLASSIFIER

# a background's colour is right below this share of the mean error to another scene's
RIGHT = 0.25
FINE = 64  # blurs and widenings are whole numbers of 64ths of a picture's side


@cache
def metric_encoder() -> MetricEncoder:
    """Load the metric encoder, which embeds pictures and captions in one space."""
    return open_clip(str(METRIC_ENCODER), "cpu")


def embed_pictures(pictures: Tensor) -> Tensor:
    """Embed pictures (N, 3, S, S) in [0, 1] by the metric encoder, as unit vectors (N, E)."""
    return F.normalize(metric_encoder().images([to_image(picture) for picture in pictures]), dim=1)


def embed_texts(texts: Sequence[str]) -> Tensor:
    """Embed N captions by the metric encoder, as unit vectors (N, E)."""
    encode = metric_encoder().texts
    assert encode is not None  # it is a whole CLIP
    return F.normalize(encode(texts), dim=1)


@dataclass(frozen=True)
class Classifier:
    """A classifier of pictures by seen glyph or by drawing style.

    It was trained separately, on real scenes of one glyph, some of them blurred or noisy.
    """

    network: ResNetForImageClassification

    @classmethod
    @cache
    def load(cls, folder: Path = GLYPH_CLASSIFIER) -> "Classifier":
        """Load the classifier of glyphs, or the one in another folder."""
        return cls(ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32).eval())

    @torch.no_grad()
    def embed(self, pictures: Tensor) -> Tensor:
        """Return what the last layer reads (N, 192); pictures are (N, 3, S, S) in [0, 1]."""
        return torch.cat(
            [
                self.network.resnet(preprocess(p)).pooler_output.flatten(1)
                for p in pictures.split(64)
            ]
        )

    @torch.no_grad()
    def classify(self, pictures: Tensor) -> Tensor:
        """Return each picture's most likely label (N,); pictures are (N, 3, S, S) in [0, 1].

        A label is a seen glyph or a style.
        """
        return torch.cat(
            [self.network(preprocess(part)).logits for part in pictures.split(64)]
        ).argmax(1)


def in_style(pictures: Tensor, style: str) -> Tensor:
    """Return whether a classifier assigns pictures (N, 3, S, S) to a style: 0 or 1 (N,)."""
    classifier = Classifier.load(STYLE_CLASSIFIER)
    number = [*classifier.network.config.id2label.values()].index(style)
    return classifier.classify(pictures).eq(number).float()


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Stack N pictures into a tensor (N, 3, S, S) in [0, 1]."""
    return (
        torch.stack(
            [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
        ).float()
        / 255
    )


def retrieval(found: Tensor, prompts: Tensor) -> Tensor:
    """Return whether each result's nearest prompt, of all, is its own: 0 or 1 (N,).

    Both are given as embeddings (N, E).
    """
    return (found @ prompts.T).argmax(1).eq(torch.arange(len(found))).float()


def rims(pictures: Tensor, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Return blurred pictures and true backgrounds along the picture's edge (N, 3, places)."""
    side = pictures.shape[-1]
    width, reach = 3 * side // FINE, 2 * side // FINE
    rim = torch.ones(side, side, dtype=torch.bool)
    rim[width:-width, width:-width] = False
    there, true = (
        F.avg_pool2d(x, 2 * reach + 1, 1, reach)[..., rim]
        for x in (pictures, background(scenes, side))
    )
    return there, true


def background_error(pictures: Tensor, scenes: Scenes) -> Tensor:
    """Return the mean absolute difference, of 255, from the true background along the edge (N,).

    It is taken place by place.
    """
    there, true = rims(pictures, scenes)
    return (there - true).abs().mean((1, 2)) * 255


def colour_error(pictures: Tensor, scenes: Scenes) -> Tensor:
    """Return the difference, of 255, between the mean colours of edge and true background (N,).

    A pattern that is shifted or turned does not count as an error.
    """
    there, true = rims(pictures, scenes)
    return (there.mean(2) - true.mean(2)).abs().mean(1) * 255


def outlines(pictures: Tensor) -> Tensor:
    """Compute edge strengths by place and direction, as unit vectors (N, 8·8·8).

    This is a histogram of oriented gradients.
    """
    grey = pictures.mean(1, keepdim=True)
    dx = F.pad(grey[..., 1:] - grey[..., :-1], (0, 1, 0, 0))
    dy = F.pad(grey[..., 1:, :] - grey[..., :-1, :], (0, 0, 0, 1))
    turn = ((torch.atan2(dy, dx) / torch.pi) % 1 * 8).floor().clamp(max=7).long()
    strength = (dx**2 + dy**2).sqrt()
    bins = torch.zeros(len(pictures), 8, *grey.shape[-2:]).scatter_(1, turn, strength)
    return F.normalize(F.adaptive_avg_pool2d(bins, 8).flatten(1), dim=1)


def figure(pictures: Tensor, scenes: Scenes) -> Tensor:
    """Mark the pixels that differ from the colour along the edge: (N, S, S) of 0 and 1."""
    there, _ = rims(pictures, scenes)
    return ((pictures - there.median(2).values[:, :, None, None]).abs().amax(1) > 0.2).float()


def middle(figures: Tensor) -> Tensor:
    """Return the mean place of a figure's pixels, x and y in [-1, 1]: (N, 2)."""
    line = (torch.arange(figures.shape[-1]) + 0.5) / figures.shape[-1] * 2 - 1
    total = figures.sum((1, 2)).clamp(min=1)
    return torch.stack(
        [(figures.sum(1) * line).sum(1) / total, (figures.sum(2) * line).sum(1) / total], 1
    )


def iou(one: Tensor, other: Tensor) -> Tensor:
    """Return the intersection over union of masks (N, S, S), per picture (N,)."""
    return torch.minimum(one, other).sum((1, 2)) / torch.maximum(one, other).sum((1, 2)).clamp(
        min=1
    )


def outline_iou(pictures: Tensor, maps: Tensor) -> Tensor:
    """Return the IoU of the pictures' own edges and the given ones (N,).

    Both are widened by a 64th of a side.
    """
    reach = pictures.shape[-1] // FINE
    there, given = (
        F.max_pool2d((x[:, 0] > 0.5).float(), 2 * reach + 1, 1, reach)
        for x in (edges(pictures), maps)
    )
    return iou(there, given)


def correlation(one: Tensor, other: Tensor) -> float:
    """Return the Pearson correlation over pictures, averaged over columns; inputs (N, columns)."""
    a, b = (x - x.mean(0) for x in (one.flatten(1), other.flatten(1)))
    return round((F.cosine_similarity(a, b, dim=0)).mean().item(), 3)


def bars(pictures: Tensor) -> Tensor:
    """Return how much colour changes along x and along y in the picture's outer eighth (N, 2).

    This describes a background's pattern.
    """
    band = pictures.shape[-1] // 8
    rim = torch.ones(pictures.shape[-2:], dtype=torch.bool)
    rim[band:-band, band:-band] = False
    along_x, along_y = (
        F.pad(pictures.diff(dim=d), pad) for d, pad in ((3, (0, 1)), (2, (0, 0, 0, 1)))
    )
    return torch.stack([step.abs().amax(1)[:, rim].mean(1) for step in (along_x, along_y)], 1)


def hue(pictures: Tensor, figures: Tensor) -> Tensor:
    """Return the figure's mean colour (N, 3)."""
    return (pictures * figures[:, None]).sum((2, 3)) / figures.sum((1, 2)).clamp(min=1)[:, None]
