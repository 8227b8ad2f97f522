"""Other ways to give the world's base an image prompt, trained as the adapter is.

They use the same pictures and the same number of samples. Each is a module that predicts a
velocity, so that one training and one sampling function serve all. Shape letters: N samples, T text
tokens, D their width, E width of the image embedding, P patches, W width of a patch's feature, S
pixels a side, h latent pixels a side.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.encoders.vision import VisionEncoder
from imprompt.files import atomic_write
from imprompt.images import open_image
from imprompt.projections.resampler import Resampler
from worlds.emoji.assemble import weights_in
from worlds.emoji.control import FrozenBase, build
from worlds.emoji.pool import latents_of
from worlds.emoji.scenes import to_image
from worlds.emoji.train_utils import World, fit

TOKENS = 4
DROP_TEXT, DROP_IMAGE, DROP_BOTH = 0.30, 0.05, 0.05  # as recipes/emoji-base.toml
BATCH, STEPS = 32, 1000
CHUNK = 256  # pictures encoded at once


class ImageFeatures(NamedTuple):
    """Pictures in the forms that the methods take."""

    embedding: Tensor  # (N, E) of the world's image encoder; zeros for no picture
    patches: Tensor  # (N, P, W) its last hidden states but one; zeros for no picture
    pixels: Tensor  # (N, 3, S, S) in [0, 1]; black for no picture

    def where(self, present: Tensor) -> "ImageFeatures":
        """Replace pictures by "no picture" where `present` (N,) is False."""
        return ImageFeatures(*(part * present.view(-1, *[1] * (part.ndim - 1)) for part in self))

    def __getitem__(self, index: Any) -> "ImageFeatures":  # pyright: ignore[reportIncompatibleMethodOverride]
        return ImageFeatures(*(part[index] for part in (self.embedding, self.patches, self.pixels)))


class Base(FrozenBase):
    """The frozen base model, and the image encoder that conditions every method."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.unet, self.scheduler = self.pipe.unet, self.pipe.scheduler
        self.encoder = VisionEncoder(
            self.pipe.image_encoder.to(world.device), self.pipe.feature_extractor, ""
        )

    @torch.no_grad()
    def encode_images(self, pictures: Tensor) -> ImageFeatures:
        """Encode pictures (N, 3, S, S) in [0, 1] to their features."""
        images = [to_image(picture) for picture in pictures.cpu()]
        return ImageFeatures(
            *(
                self.encoder.features(images, feature).float()
                for feature in ("pooled", "penultimate")
            ),
            pictures,
        )

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Encode N texts to states (N, T, D)."""
        ids = self.pipe.tokenizer(
            texts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return self.pipe.text_encoder(ids.to(self.world.device)).last_hidden_state


class Method(Protocol):
    """A module whose `forward` predicts a velocity.

    Takes noisy latents (N, C, h, w), timesteps (N,), text (N, T, D), pictures and the image's
    scale.
    """

    def __call__(
        self, x: Tensor, t: Tensor, text: Tensor, image: ImageFeatures, scale: float = 1.0
    ) -> Tensor:
        """Return the velocity (N, C, h, w)."""
        ...


class Conditioned(nn.Module):
    """A method that uses the base without registering it as its submodule."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        object.__setattr__(self, "base", base)

    base: Base

    def velocity(self, x: Tensor, t: Tensor, context: Tensor, **more: Any) -> Tensor:
        """Predict the velocity with the base, from a context (N, tokens, D)."""
        return self.base.unet(x, t, context, return_dict=False, **more)[0]


class Decoupled(Conditioned):
    """The paper's adapter (section 3.2.2), as `imprompt` implements it.

    With `plus` it reads the patches, as in recipes/emoji-plus.toml.
    """

    def __init__(self, base: Base, *, plus: bool = False) -> None:
        super().__init__(base)
        self.plus = plus
        size = base.encoder.feature_dim("penultimate" if plus else "pooled")
        projection = (
            Resampler(size, width(base), depth=2)
            if plus
            else ImageProjection(size, width(base), TOKENS)
        )
        self.adapter = IPAdapter.for_model(base.unet, projection).attach(base.unet)

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, image: ImageFeatures, scale: float = 1.0
    ) -> Tensor:
        """Predict the velocity with decoupled cross-attention to the image tokens."""
        prompt = self.adapter.prompt(
            self.adapter.tokens(image.patches if self.plus else image.embedding), scale=scale
        )
        return self.velocity(x, t, text, cross_attention_kwargs={"ip_hidden_states": prompt})


class Simple(Conditioned):
    """The paper's "simple adapter" (section 4.4.1).

    Image tokens are appended to the text's, in the frozen cross-attention.
    """

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.projection = ImageProjection(base.encoder.feature_dim("pooled"), width(base), TOKENS)

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, image: ImageFeatures, scale: float = 1.0
    ) -> Tensor:
        """Predict the velocity from the text's tokens with the image tokens appended."""
        return self.velocity(x, t, torch.cat([text, scale * self.projection(image.embedding)], 1))


class Tuned(Conditioned):
    """The whole base, fine-tuned to read an image embedding instead of text.

    SD Image Variations and unCLIP are trained in this way.
    """

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.projection = ImageProjection(base.encoder.feature_dim("pooled"), width(base), TOKENS)
        self.unet = deepcopy(base.unet).requires_grad_(True)

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, image: ImageFeatures, scale: float = 1.0
    ) -> Tensor:
        """Predict the velocity from the image tokens.

        Training gives no text; if a text is given, its tokens come before the image tokens.
        """
        tokens = scale * self.projection(image.embedding)
        return self.unet(
            x, t, torch.cat([text, tokens], 1) if text.shape[1] else tokens, return_dict=False
        )[0]


class Style(Conditioned):
    """T2I-Adapter's style adapter (Mou et al. 2023, arXiv 2302.08453).

    A transformer makes tokens of patches.
    """

    def __init__(self, base: Base, layers: int = 2, tokens: int = 8) -> None:
        super().__init__(base)
        wide = base.encoder.feature_dim("penultimate")
        self.norm_in, self.norm_out = nn.LayerNorm(wide), nn.LayerNorm(wide)
        self.queries = nn.Parameter(wide**-0.5 * torch.randn(1, tokens, wide))
        layer = nn.TransformerEncoderLayer(
            wide, wide // 32, 4 * wide, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.project = nn.Parameter(wide**-0.5 * torch.randn(wide, width(base)))

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, image: ImageFeatures, scale: float = 1.0
    ) -> Tensor:
        """Predict the velocity from the text's tokens with the style tokens appended."""
        queries = self.queries.expand(len(x), -1, -1)
        read = self.layers(self.norm_in(torch.cat([image.patches, queries], 1)))[
            :, -queries.shape[1] :
        ]
        return self.velocity(x, t, torch.cat([text, scale * self.norm_out(read) @ self.project], 1))


class Shuffle(Conditioned):
    """ControlNet Shuffle (Zhang et al. 2023, arXiv 2302.05543, and its 1.1 models).

    Its control is a warped picture, whose features are pooled.
    """

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.net = build(base)
        self.net.register_to_config(global_pool_conditions=True)

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, image: ImageFeatures, scale: float = 1.0
    ) -> Tensor:
        """Predict the velocity with the ControlNet's residuals for the warped pictures."""
        down, mid = self.net(
            x,
            t,
            text,
            controlnet_cond=warped(image.pixels),
            conditioning_scale=scale,
            return_dict=False,
        )
        # without a picture there is no control
        there = (image.pixels.flatten(1).amax(1) > 0).to(x)[:, None, None, None]
        return self.velocity(
            x,
            t,
            text,
            down_block_additional_residuals=[there * residual for residual in down],
            mid_block_additional_residual=there * mid,
        )


def width(base: Base) -> int:
    """Return the width of the base's text tokens, D."""
    return base.unet.config.cross_attention_dim


def warped(pictures: Tensor) -> Tensor:
    """Warp pictures (N, 3, S, S): each result pixel is read where a random field points.

    Fields are smooth. There are as many as samples in a training batch, so that larger batches in
    sampling use the same ones.
    """
    fields = torch.rand(BATCH, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(pictures)
    field = fields[torch.arange(len(pictures), device=pictures.device) % BATCH]
    field = F.interpolate(field, pictures.shape[-2:], mode="bicubic", align_corners=True)
    low, high = field.amin((2, 3), keepdim=True), field.amax((2, 3), keepdim=True)
    grid = ((field - low) / (high - low) * 2 - 1).permute(0, 2, 3, 1)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=True)


@dataclass(frozen=True)
class Baseline:
    """How a method is built and trained."""

    build: Callable[[Base], Conditioned]
    lr: float = 1e-3
    reads_text: bool = True
    equal: str = ""  # name of a baseline; if given, trained for its operations, not its samples


BASELINES = {
    "decoupled": Baseline(Decoupled),
    "simple": Baseline(Simple),
    "tuned": Baseline(Tuned, lr=3e-4, reads_text=False),
    "tuned, equal compute": Baseline(Tuned, lr=3e-4, reads_text=False, equal="decoupled"),
    "T2I style": Baseline(Style),
    "ControlNet shuffle": Baseline(Shuffle),
    "decoupled, plus": Baseline(partial(Decoupled, plus=True)),
}


def file_of(world: World, name: str) -> Path:
    """Return the path of a trained baseline's weights."""
    return world.folder / "baselines" / f"{name.replace(', ', '-').replace(' ', '-')}.safetensors"


class Training(NamedTuple):
    """The adapters' training pictures, encoded once."""

    latents: Tensor  # (N, C, h, h)
    image: ImageFeatures
    texts: list[str]


def training_set(world: World, base: Base) -> Training:
    """Load the training set of the stage `scenes`, which the adapters' recipes read.

    It is encoded once, into the world's folder.
    """
    rows = [
        json.loads(line)
        for line in (world.folder / "scenes" / "metadata.jsonl").read_text().splitlines()
    ]
    cache = world.folder / "baselines" / "pictures.safetensors"
    if not cache.exists():
        parts: dict[str, list[Tensor]] = {
            "latents": [],
            "embedding": [],
            "patches": [],
            "pixels": [],
        }
        for start in range(0, len(rows), CHUNK):
            images = [
                open_image(world.folder / "scenes" / row["file_name"])
                for row in rows[start : start + CHUNK]
            ]
            bytes_ = torch.stack(
                [
                    torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(*i.size, 3)
                    for i in images
                ]
            )
            pixels = bytes_.permute(0, 3, 1, 2).float() / 255
            image = base.encode_images(pixels)
            values = (
                latents_of(base.pipe.vae, pixels.to(world.device)),
                image.embedding,
                image.patches,
                bytes_.permute(0, 3, 1, 2),
            )
            for part, value in zip(parts.values(), values, strict=True):
                part.append(value.half() if value.is_floating_point() else value)
        cache.parent.mkdir(exist_ok=True)
        with atomic_write(cache) as temporary:
            save_file(
                {name: torch.cat(values).contiguous() for name, values in parts.items()}, temporary
            )
    encoded = load_file(cache)
    return Training(
        encoded["latents"],
        ImageFeatures(encoded["embedding"], encoded["patches"], encoded["pixels"]),
        [row["text"] for row in rows],
    )


def train(world: World, name: str) -> None:
    """Train one baseline, resumed from its last state; do nothing if its file exists."""
    torch.manual_seed(world.seed + 9)
    if file_of(world, name).exists():
        return
    baseline, base = BASELINES[name], Base(world)
    method, data = baseline.build(base), training_set(world, base)
    none = base.encode_texts([""])

    def losses(step: int) -> dict[str, Tensor]:
        generator = world.generator(95, step)
        rows = torch.randint(len(data.texts), (BATCH,), generator=generator)
        coin = torch.rand(BATCH, generator=generator)
        no_text = coin < DROP_TEXT + DROP_BOTH
        no_image = (coin >= DROP_TEXT) & (coin < DROP_TEXT + DROP_BOTH + DROP_IMAGE)
        image = ImageFeatures(
            data.image.embedding[rows].float(),
            data.image.patches[rows].float(),
            data.image.pixels[rows].float() / 255,
        )
        image = ImageFeatures(*(part.to(world.device) for part in image.where(~no_image)))
        text = base.encode_texts(
            [
                "" if drop else data.texts[i]
                for i, drop in zip(rows.tolist(), no_text.tolist(), strict=True)
            ]
        )
        x = data.latents[rows].float().to(world.device)
        noise = torch.randn(x.shape, generator=generator).to(x)
        t = torch.randint(
            base.scheduler.config.num_train_timesteps, (BATCH,), generator=generator
        ).to(x.device)
        noisy, target = (
            base.scheduler.add_noise(x, noise, t),
            base.scheduler.get_velocity(x, noise, t),
        )
        v = method(
            noisy, t, text if baseline.reads_text else none[:, :0].expand(BATCH, -1, -1), image
        )
        return {"v": F.mse_loss(v.float(), target)}

    steps = (
        STEPS
        if not baseline.equal
        else round(STEPS * operations(base, BASELINES[baseline.equal]) / operations(base, baseline))
    )
    fit(
        world,
        f"baseline-{file_of(world, name).stem}",
        nn.ModuleDict({"method": method}),
        losses,
        steps=steps,
        lr=baseline.lr,
        batch=BATCH,
    )
    with atomic_write(file_of(world, name)) as temporary:
        save_file(
            {key: value.half().contiguous() for key, value in method.state_dict().items()},
            temporary,
            {"steps": str(steps)},
        )


def operations(base: Base, baseline: Baseline) -> int:
    """Count the floating-point operations of one training sample.

    They are those of the forward pass, and of the backward pass to the trained weights.
    """
    method = baseline.build(base)
    none = base.encode_texts([""])
    image = base.encode_images(torch.rand(1, 3, base.world.side, base.world.side))
    x = torch.randn(
        1, base.unet.config.in_channels, base.unet.config.sample_size, base.unet.config.sample_size
    )
    with FlopCounterMode(display=False) as counter:
        method(
            x, torch.tensor([500]), none if baseline.reads_text else none[:, :0], image
        ).sum().backward()
    return counter.get_total_flops()


def load(world: World, base: Base, name: str) -> Conditioned:
    """Build a baseline and load its trained weights."""
    method = BASELINES[name].build(base)
    method.load_state_dict(
        {key: value.float() for key, value in load_file(file_of(world, name)).items()}
    )
    return method.eval()


def budget(world: World, name: str) -> tuple[int, int]:
    """Return the number of trained weights, and of the samples used for training."""
    with safe_open(file_of(world, name), "pt") as file:
        return weights_in(file_of(world, name)), BATCH * int(file.metadata()["steps"])


@torch.no_grad()
def sample(
    base: Base,
    method: Method,
    text: Tensor,
    image: ImageFeatures,
    *,
    scale: float = 1.0,
    guidance: float = 3.0,
    steps: int = 25,
    seed: int = 0,
) -> Tensor:
    """Sample pictures (N, 3, S, S) in [0, 1] by DDIM with classifier-free guidance.

    Picture i has seed + i.
    """
    count, side = len(image.embedding), base.unet.config.sample_size
    shape = base.unet.config.in_channels, side, side
    x = torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed + i))
            for i in range(count)
        ]
    )
    none = base.encode_texts([""])[:, : text.shape[1]].expand(count, -1, -1)
    nothing = image.where(torch.zeros(count, dtype=torch.bool))
    both = ImageFeatures(*(torch.cat(pair) for pair in zip(nothing, image, strict=True)))
    context = torch.cat([none, text])
    base.scheduler.set_timesteps(steps)
    for t in base.scheduler.timesteps:
        without, with_ = method(torch.cat([x, x]), t.expand(2 * count), context, both, scale).chunk(
            2
        )
        x = base.scheduler.step(without + guidance * (with_ - without), t, x).prev_sample
    return (base.pipe.vae.decode(x / base.pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(
        0, 1
    )


def train_all(world: World) -> None:
    """Train all baselines."""
    for name in BASELINES:
        train(world, name)
