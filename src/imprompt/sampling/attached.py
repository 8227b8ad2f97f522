"""An adapter attached to a base model, with its image encoder: references -> image tokens -> image prompts.

Shape letters as in `imprompt.adapter`; K pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from imprompt.adapter import ImagePrompt, IPAdapter
from imprompt.attention import family_of
from imprompt.checkpoint import AdapterFile, build_adapter, read_adapter
from imprompt.encoders.embeddings import Reads, check_embedding, load_embedding
from imprompt.encoders.kept import Store
from imprompt.encoders.noise import Noise, noise_negative
from imprompt.encoders.opening import load_encoder
from imprompt.encoders.preparation import Preparation, prepare
from imprompt.errors import SettingError
from imprompt.images import open_image, open_mask
from imprompt.models import KnownModel, find_adapter
from imprompt.projections.resampler import FacePlusV2Projection
from imprompt.sampling.controls import as_mask, combine, concat, pushed_away, regions, scale_table, scaled
from imprompt.sampling.memory import Savers
from imprompt.sampling.references import AdapterChoice, Reference, is_face, is_features, source
from imprompt.variants import Variant

Features = Tensor | tuple[Tensor, ...]  # (K, ...), of what the variant reads


class Call(NamedTuple):
    """What all references of a call share.

    scale    of references that say none
    size     rows and columns of the latents
    seed     of noise that a picture is made
    nulls    image tokens (1, N, D) of "no image", by adapter and `face_scale`: encoded once
    """

    guided: bool
    scale: float
    overlap: str
    size: tuple[int, int]
    timesteps: int
    seed: int
    nulls: dict[tuple["Attached", float], Tensor]


class Heard(NamedTuple):
    """A reference made ready: all but its keys and values, which are projected when its turn comes."""

    by: "Attached"
    tokens: Tensor  # (1, N, D)
    null: Tensor | None  # the same of what guidance goes away from; None without guidance
    bias: Tensor | None  # (1, N)
    scale: Tensor  # (sites, 1) or (sites, 1, T)
    away: Tensor  # (sites,): see `blocks.BlockMap`
    mask: Tensor | None  # (1, h, w)
    embeds_scaling: str

    def prompt(self) -> ImagePrompt:
        """For one item, its unconditional half first where there is guidance."""
        prompt = self.by.adapter.prompt(self.tokens, self.null)
        made = scaled(prompt.with_scale(self.scale.to(self.tokens.device)), self.embeds_scaling)
        bias = self.bias if self.bias is None or self.null is None else self.bias.expand(2, -1)
        mask = None if self.mask is None else self.mask.to(self.tokens.device)
        return pushed_away(made._replace(bias=bias, mask=mask), self.away, self.null is not None)


@dataclass(frozen=True, eq=False)
class Attached:
    """One adapter of a pipeline. `encoder` is an image encoder, or what gives a face's features; `name` is the user's for it."""

    adapter: IPAdapter
    encoder: Any
    variant: Variant
    name: str = ""
    reads: Reads | None = None  # what features of a file are checked against

    @property
    def sites(self) -> list[str]:
        return list(self.adapter.graft.sites)

    def hear(self, reference: Reference, call: Call) -> Heard:
        """Encode a reference."""
        tokens, bias = self.combined(self.features(reference), reference)
        null = self.away_from(reference, call, tokens.shape[1]) if call.guided else None
        block, table = scale_table(
            self.sites,
            call.scale if reference.scale is None else reference.scale,
            reference.blocks,
            reference.boost,
            reference.start,
            reference.end,
            reference.easing,
            call.timesteps,
        )
        mask = None if reference.mask is None else F.interpolate(as_mask(source(reference.mask))[None], call.size, mode="area")[0]
        return Heard(self, tokens, null, bias, table, block.away, mask, reference.embeds_scaling)

    def features(self, reference: Reference) -> Features:
        """(K, ...): of each picture, or each of its tiles, and of each row of a file of features."""
        self.check(reference)
        return beside([self.features_of(image, reference) for image in reference.images])

    def features_of(self, image: Any, reference: Reference) -> Features:
        if is_features(image):
            embedding = load_embedding(image.path)
            if self.reads is not None:
                check_embedding(embedding, self.reads, image.path)
            parts = tuple(part.to(next(self.adapter.parameters()).device) for part in embedding.parts)
            return parts[0] if len(parts) == 1 else parts
        if self.variant.faces:
            return self.encoder.features(
                [image if is_face(image) else open_image(source(image))], self.variant.feature, reference.face
            )
        ignore = None if reference.ignore is None else open_mask(source(reference.ignore))
        made_ready = Preparation(crop=reference.crop, sharpening=reference.sharpening, ignore=ignore)
        pictures = prepare(open_image(source(image)), made_ready, self.encoder)
        return self.encoder.features(pictures, self.variant.feature)

    def check(self, reference: Reference) -> None:
        """Raise SettingError if it asks what this kind of adapter has no use for."""
        if reference.face_scale != 1 and not issubclass(self.variant.projection, FacePlusV2Projection):
            raise SettingError(f"face_scale is for faceid-plus-v2; {self.name or 'the adapter'} is {self.variant.name}")
        if not self.variant.faces:
            for_faces = ["face"] * (reference.face is not None) + ["images"] * any(map(is_face, reference.images))
            if for_faces:
                raise SettingError(
                    f"{for_faces[0]}: {self.name or self.variant.name} reads whole pictures; a face is for a FaceID adapter"
                )
        elif (reference.crop, reference.sharpening, reference.ignore) != ("center", 0, None) or isinstance(
            reference.negative, Noise
        ):
            raise SettingError(
                "crop, sharpening, ignore and noise are for whole pictures; a FaceID adapter's face is aligned by itself"
            )

    def combined(self, features: Features, reference: Reference) -> tuple[Tensor, Tensor | None]:
        """Features (K, ...) -> the image tokens of one prompt (1, N, D), and their bias (1, N) if they are not heard alike."""
        left, weights = combine(features, reference.combine, reference.weights)
        return concat(self.tokens(left, reference), weights)

    def tokens(self, features: Features, reference: Reference) -> Tensor:
        """Features (K, ...) -> image tokens (K, N, D)."""
        strength = () if reference.face_scale == 1 else (torch.tensor(reference.face_scale),)
        return self.adapter.tokens((*(features if isinstance(features, tuple) else (features,)), *strength))

    def away_from(self, reference: Reference, call: Call, count: int) -> Tensor:
        """So many image tokens (1, count, D) of what guidance goes away from: "no image", or the reference's negative."""
        if reference.negative is None:
            which = self, reference.face_scale
            if which not in call.nulls:
                call.nulls[which] = self.tokens(self.encoder.null_features(self.variant), reference)
            return repeated(call.nulls[which], count)
        if isinstance(reference.negative, Noise):
            features = self.encoder.features([self.noise(reference, call.seed)], self.variant.feature)
        else:
            features = combine(self.features(Reference(images=reference.negative)), "average").features
        return repeated(self.tokens(features, reference), count)

    def noise(self, reference: Reference, seed: int) -> Image.Image:
        """Of the first image that is a picture."""
        assert isinstance(reference.negative, Noise)
        pictures = [image for image in reference.images if not is_features(image)]
        return noise_negative(open_image(source(pictures[0])) if pictures else None, reference.negative, self.encoder, seed)

    def image_tokens(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures (K) -> their image tokens (K, N, D)."""
        return self.adapter.tokens(self.encoder.features(images, self.variant.feature))

    def null_tokens(self) -> Tensor:
        """The image tokens (1, N, D) of "no image"."""
        return self.adapter.tokens(self.encoder.null_features(self.variant))


def repeated(tokens: Tensor, count: int) -> Tensor:
    """(1, N, D) -> (1, count, D): pictures together have several pictures' tokens."""
    return tokens.repeat(1, count // tokens.shape[1], 1)


def share(heard: Sequence[Heard], overlap: str) -> list[Heard]:
    """What one result hears, where their masks overlap: see `controls.regions`."""
    if overlap == "add" or all(one.mask is None for one in heard):
        return list(heard)
    masks = regions([one.mask for one in heard], overlap)
    return [one._replace(mask=mask) for one, mask in zip(heard, masks, strict=True)]


def beside(features: Sequence[Features]) -> Features:
    """Several (K, ...) -> one."""
    parts = [of if isinstance(of, tuple) else (of,) for of in features]
    joined = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    return joined if isinstance(features[0], tuple) else joined[0]


class Opened(NamedTuple):
    """An adapter's file and its image encoder, before there is a base model."""

    choice: AdapterChoice
    file: AdapterFile
    encoder: Any
    name: str

    @classmethod
    def read(cls, choice: AdapterChoice, model: KnownModel, faces: Any, device: str, dtype: torch.dtype, keep: Store | None,
             savers: Savers) -> Self:  # fmt: skip
        """See `ImagePromptPipeline.from_pretrained` for the errors."""
        path, told, variant = find_adapter(model, choice.adapter)
        file = read_adapter(path, choice.variant or variant or None)
        encoder = load_encoder(file, told, model, choice.encoder, device, dtype, keep, savers.send_away, faces)
        return cls(choice, file, encoder, choice.known_as or next(iter(model.adapters), ""))

    def attach(self, unet: Any, dtype: torch.dtype) -> Attached:
        live = build_adapter(self.file, family_of(unet)).attach(unet)
        live.image_kv.to(dtype)  # the projection stays in float32: a resampler's values leave float16's range
        if live.lora is not None:
            live.lora.to(dtype).strength = self.choice.lora_scale
        return Attached(live, self.encoder, self.file.variant, self.name, Reads.of(self.file))


def choices(adapter: Any, encoder: str | Path | None, variant: str | None) -> list[AdapterChoice]:
    """What a user says of adapters, as a list."""
    several = adapter if isinstance(adapter, list | tuple) else [adapter]
    if len(several) > 1 and (encoder or variant):
        raise SettingError("encoder and variant are for a single adapter: say them for each, with AdapterChoice(adapter=..., ...)")
    own = {"encoder": None if encoder is None else str(encoder), "variant": variant}
    return [
        one if isinstance(one, AdapterChoice) else AdapterChoice.check(adapter=None if one is None else str(one), **own)
        for one in several
    ]
