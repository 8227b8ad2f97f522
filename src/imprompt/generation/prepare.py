"""Prepare references: an adapter attached to a base model encodes them to image prompts.

Shape letters as in `imprompt.adapter`; K pictures.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from imprompt.adapter import IPAdapter
from imprompt.checkpoints.adapters import AdapterFile, build_adapter, read_adapter
from imprompt.encoders.embedding_files import FeatureSpec
from imprompt.encoders.feature_cache import Store
from imprompt.encoders.matching import load_encoder
from imprompt.encoders.noise import Noise
from imprompt.errors import SettingError
from imprompt.families.base import family_of
from imprompt.generation.combine import (
    as_mask,
    combine,
    concat,
    regions,
    scale_table,
    scaled,
    token_bias,
    with_negative_layers,
)
from imprompt.generation.features import Features, Reader
from imprompt.generation.memory import MemoryOptions
from imprompt.generation.references import AdapterChoice, Reference, plain_picture
from imprompt.models import KnownModel, Usual, find_adapter
from imprompt.prompt import ImagePrompt


class CallContext(NamedTuple):
    """Values that all references of a call share.

    scale    of references that give none; None: each adapter's usual one
    size     rows and columns of the latents
    seed     of noise that is made from a picture
    nulls    image tokens (1, N, D) of "no image", by adapter and `face_scale`: encoded once
    """

    guided: bool
    scale: float | None
    overlap: str
    size: tuple[int, int]
    timesteps: int
    seed: int
    nulls: dict[tuple["Attached", float], Tensor]


class PreparedReference(NamedTuple):
    """A reference that is encoded to image tokens.

    Its keys and values are projected later, when its batch is made.
    """

    by: "Attached"
    tokens: Tensor  # (1, N, D), or (1, K, P, W): see `IPAdapter.prompt`
    null: Tensor | None  # the same of what guidance moves away from; None: nothing
    bias: Tensor | None  # (1, N)
    scale: Tensor  # (layers, 1) or (layers, 1, T)
    negative: Tensor  # (layers,): see `blocks.BlockMap`
    mask: Tensor | None  # (1, h, w)
    embeds_scaling: str
    guided: bool

    @property
    def active(self) -> bool:
        """Whether the reference has any strength, in any layer at any time."""
        return bool(self.scale.any())

    def prompt(self) -> ImagePrompt:
        """Project the prompt for one item; with guidance its unconditional half comes first."""
        prompt = self.by.adapter.prompt(self.tokens, self.null)
        made = scaled(prompt.with_scale(self.scale), self.embeds_scaling)
        bias = self.bias if self.bias is None or self.null is None else self.bias.expand(2, -1)
        mask = None if self.mask is None else self.mask.to(self.tokens.device)
        made = made._replace(bias=bias, mask=mask)
        if self.guided and self.null is None:
            return made.positive_alone()
        return with_negative_layers(made, self.negative, self.guided)


@dataclass(frozen=True, eq=False)
class Attached:
    """One adapter of a pipeline, with the reader of its features and its usual settings."""

    adapter: IPAdapter
    reader: Reader
    usual: Usual = field(default_factory=Usual)

    @property
    def name(self) -> str:
        """Name by which references name the adapter."""
        return self.reader.name

    def prepare(self, reference: Reference, call: CallContext) -> PreparedReference:
        """Encode a reference after its settings are checked; SettingError."""
        block, table = scale_table(
            list(self.adapter.injection.sizes_of(self.adapter.form)),
            next(one for one in (reference.scale, call.scale, self.usual.scale) if one is not None),
            reference.blocks,
            reference.boost,
            reference.start,
            reference.end,
            reference.easing,
            call.timesteps,
        )
        mask = (
            None
            if reference.mask is None
            else F.interpolate(
                as_mask(plain_picture(reference.mask))[None], call.size, mode="area"
            )[0]
        )
        if self.adapter.keyless:
            check_without_keys(reference, self.name)
        if self.adapter.form is not None and self.adapter.form.text_rows:
            check_weight(table, self.name)
        tokens, bias = self.combined(reference)
        null = self.null_tokens(reference, call, tokens) if call.guided else None
        return PreparedReference(
            self,
            tokens,
            null,
            bias,
            table,
            block.negative,
            mask,
            reference.embeds_scaling,
            call.guided,
        )

    def combined(self, reference: Reference) -> tuple[Tensor, Tensor | None]:
        """Return the image tokens (1, N, D) of one prompt, and their bias (1, N).

        For prompts without keys they are (1, K, P, W): see `IPAdapter.prompt`. The bias is None if
        all tokens have the same weight.
        """
        features, weights = self.reader.features(reference)
        parts = features if isinstance(features, tuple) else (features,)
        left, weights = combine(tuple(part.float() for part in parts), reference.combine, weights)
        tokens = self.tokens(left, reference)
        if not self.adapter.keyless:
            return concat(tokens, weights)
        bias = token_bias(weights, getattr(self.adapter.projection, "count", tokens.shape[1]))
        return tokens[None], None if bias is None else bias.to(tokens)

    def tokens(self, features: Features, reference: Reference | None = None) -> Tensor:
        """Project features (K, ...) to image tokens (K, N, D)."""
        parts = features if isinstance(features, tuple) else (features,)
        device = next(self.adapter.projection.parameters()).device
        if reference is not None and reference.face_scale != 1:
            parts = *parts, torch.tensor(reference.face_scale)
        return self.adapter.tokens(tuple(part.to(device) for part in parts))

    def null_tokens(self, reference: Reference, call: CallContext, like: Tensor) -> Tensor | None:
        """Return as many image tokens as `like` has, that guidance moves away from.

        They are those of "no image", or of the reference's negative; None if "no image" has none.
        """
        if reference.negative is None and self.reader.variant.null == "no tokens":
            return None
        if reference.negative is None:
            which = self, reference.face_scale
            if which not in call.nulls:
                call.nulls[which] = self.tokens(self.reader.null_features(), reference)
            return repeated(call.nulls[which], like)
        if isinstance(reference.negative, Noise):
            features = self.reader.noise_features(reference, reference.negative, call.seed)
        else:
            face = "largest" if self.reader.variant.faces else None
            features = combine(
                self.reader.features(Reference(images=reference.negative, face=face))[0], "average"
            ).features
        return repeated(self.tokens(features, reference), like)


def check_without_keys(reference: Reference, name: str) -> None:
    """Raise SettingError if a reference needs keys and values before the first step."""
    if reference.embeds_scaling != "V only":
        raise SettingError(
            f"embeds_scaling = {reference.embeds_scaling!r}: {name or 'it'} has no keys and values "
            "before a step, so its scale acts on the result alone: leave it out"
        )


def check_weight(table: Tensor, name: str) -> None:
    """Raise SettingError if a scale (layers, ...) cannot be the weight of rows of the text."""
    if (table < 0).any() or (table != table[:1]).any():
        raise SettingError(
            f"{name or 'the adapter'} appends rows to the text: its weight is at least 0 and the "
            "same in all layers, so leave blocks out, and give no scale below 0"
        )


def repeated(tokens: Tensor, like: Tensor) -> Tensor:
    """Repeat tokens (1, N, D) for prompts (1, K·N, D), or (1, K, N, D), of several pictures."""
    if like.ndim == 4:
        return tokens[None].expand_as(like)
    return tokens.repeat(1, like.shape[1] // tokens.shape[1], 1)


def normalise_masks(ready: Sequence[PreparedReference], overlap: str) -> list[PreparedReference]:
    """Return the references of one result with masks that share where active ones overlap.

    See `combine.regions`.
    """
    if overlap == "add" or all(one.mask is None for one in ready):
        return list(ready)
    masks = iter(regions([one.mask for one in ready if one.active], overlap))
    return [one._replace(mask=next(masks)) if one.active else one for one in ready]


class LoadedAdapter(NamedTuple):
    """An adapter's file and its image encoder, before the base model is loaded."""

    choice: AdapterChoice
    file: AdapterFile
    encoder: Any
    name: str
    usual: Usual = Usual()

    @classmethod
    def read(
        cls,
        choice: AdapterChoice,
        model: KnownModel,
        faces: Any,
        device: str,
        dtype: torch.dtype,
        keep: Store | None,
        memory: MemoryOptions,
    ) -> Self:
        """Read the adapter's file and load its image encoder.

        `ImagePromptPipeline.from_pretrained` lists the errors.
        """
        path, location, variant, usual = find_adapter(model, choice.adapter)
        file = read_adapter(path, choice.variant or variant or None)
        encoder = load_encoder(
            file,
            location,
            model,
            choice.encoder,
            device,
            dtype,
            keep,
            memory.offload_encoder,
            faces,
        )
        name = choice.known_as or next(iter(model.adapters), "")
        return cls(choice, file, encoder, name, usual)

    def attach(self, model: Any, dtype: torch.dtype) -> Attached:
        """Build the adapter and attach it to the base model `model`, in precision `dtype`."""
        live = build_adapter(self.file, family_of(model)).attach(model)
        # the projection stays in float32: a resampler's values exceed float16's range
        live.image_kv.to(dtype)
        if live.low_rank is not None:
            live.low_rank.to(dtype).strength = self.choice.lora_scale
        reader = Reader(self.encoder, self.file.variant, self.name, FeatureSpec.of(self.file))
        return Attached(live, reader, self.usual)


@contextmanager
def joined_to(
    model: Any, opened: Sequence[LoadedAdapter], dtype: torch.dtype
) -> Iterator[list[Attached]]:
    """Yield the adapters attached to `model`; detach them again if anything fails inside.

    Raise SettingError if two have the same name.
    """
    name, often = Counter(one.name for one in opened).most_common(1)[0]
    if often > 1:
        raise SettingError(
            f"two adapters are called {name!r}: give each its own name, by "
            "AdapterChoice(adapter=..., name=...)"
        )
    with ExitStack() as undo:
        attached = []
        for one in opened:
            attached.append(one.attach(model, dtype))
            undo.callback(attached[-1].adapter.detach)
        yield attached
        undo.pop_all()


def choices(adapter: Any, encoder: str | Path | None, variant: str | None) -> list[AdapterChoice]:
    """Return the adapters that a user gave as a list; SettingError."""
    several = adapter if isinstance(adapter, list | tuple) else [adapter]
    if not several:
        raise SettingError("adapter = []: name at least one, or leave it out for the model's first")
    if len(several) > 1 and (encoder or variant):
        raise SettingError(
            "encoder and variant are for a single adapter: give them for each, with "
            "AdapterChoice(adapter=..., ...)"
        )
    own: dict[str, Any] = {"encoder": None if encoder is None else str(encoder), "variant": variant}
    return [
        one
        if isinstance(one, AdapterChoice)
        else AdapterChoice(adapter=None if one is None else str(one), **own)
        for one in several
    ]
