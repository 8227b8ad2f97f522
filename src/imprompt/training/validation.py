"""Validation of an adapter over the steps of a run: a grid of pictures, and scores.

Image prompts, texts, scales and noise are fixed, so that steps can be compared.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

from imprompt.adapter import IPAdapter
from imprompt.checkpoints.tensors import some
from imprompt.encoders.face import SIDE, Face, FaceFeatures
from imprompt.encoders.vision import VisionEncoder, preprocess
from imprompt.errors import CheckpointError, SettingError, first_line
from imprompt.families.base import base_of
from imprompt.generation.features import Reader
from imprompt.generation.pipeline import ImagePromptPipeline
from imprompt.generation.prepare import Attached
from imprompt.generation.request import save_png
from imprompt.generation.settings import Settings
from imprompt.images import WHITE, grid, open_image
from imprompt.models import Location, find_model, load_weights
from imprompt.training.objective import prediction_type
from imprompt.training.recipe import Recipe
from imprompt.variants import Variant

PROMPTS = 4  # number of held-out pictures that are image prompts if the recipe names none
MADE_AT_ONCE = 4  # pictures
CELL = (128, 512)  # least and most pixels a side of a picture in the grid
GAP, MARGIN = 6, 12  # pixels
INK, FAINT = (20, 20, 20), (130, 130, 130)
TEXT_LINES = 3  # lines of a text above its columns
GOLDEN = (math.sqrt(5) - 1) / 2

Scores = dict[str, float]


@contextmanager
def on_device(
    modules: Iterable[nn.Module], device: torch.device, dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Move the modules to `device`, and floating-point tensors to `dtype`, temporarily.

    Afterwards they have their original tensors.
    """
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    own: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor in tensors:
            own.append((tensor, tensor.data))
            tensor.data = tensor.data.to(device, dtype if tensor.is_floating_point() else None)
        yield
    finally:
        for tensor, data in reversed(own):  # a tensor that two modules share was moved twice
            tensor.data = data


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Set the modules to eval mode temporarily; restore the mode of every submodule."""
    parts = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in parts:
            part.training = False
        yield
    finally:
        for part, training in parts:
            part.training = training


class OwnEncoder:
    """Measure of pictures by the encoder that conditions the adapter.

    It cannot measure texts, and favours the adapter.
    """

    name = "clip_i (conditioning encoder)"
    texts = None

    def __init__(self, encoder: VisionEncoder) -> None:
        self.encoder, self.model = encoder, encoder.model

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return embeddings (B, E) of pictures."""
        return self.encoder.features(pictures, "pooled")


class Clip:
    """Measure of pictures and texts by a complete CLIP.

    It is loaded to the CPU in float32 from a folder or the Hub.
    """

    name = "clip_i"

    def __init__(self, source: str) -> None:
        """Load the model; raise CheckpointError if there is none or it is incomplete."""
        from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        try:
            folder, _ = Location(source).fetch_folder()
            if (kind := CLIPConfig.get_config_dict(folder)[0].get("model_type", "clip")) != "clip":
                raise ValueError(f"it holds a {kind}, not a whole CLIP")
            loaded: Any = load_weights(
                folder,
                lambda variant: CLIPModel.from_pretrained(
                    folder, dtype=torch.float32, variant=variant, output_loading_info=True
                ),
            )
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder)
        except Exception as error:  # a damaged folder may raise any error
            raise CheckpointError(
                f"validation.clip = {source!r}: no CLIP can be loaded ({first_line(error)})"
            ) from error
        self.model, report = loaded
        words, vocabulary = len(self.tokenizer), self.model.config.text_config.vocab_size
        # transformers loads an empty tokenizer if its files are missing
        absent = [] if vocabulary // 2 < words <= vocabulary else ["the tokenizer"]
        if missing := sorted(report["missing_keys"]) + absent:
            raise CheckpointError(
                f"validation.clip = {source!r} is not a complete CLIP: {some(missing, 3)} missing"
            )
        self.model.eval().requires_grad_(False)
        side = self.model.config.vision_config.image_size
        shortest: Any = {"shortest_edge": side}
        square: Any = {"height": side, "width": side}
        self.processor = CLIPImageProcessorPil(size=shortest, crop_size=square)

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return embeddings (B, E) of pictures."""
        return self.model.get_image_features(
            preprocess(self.processor, pictures).to(self.model.device)
        ).pooler_output

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings (B, E) of texts."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=longest,
            truncation=True,
            return_tensors="pt",
        )
        return self.model.get_text_features(**tokens.to(self.model.device)).pooler_output


def own_measure(encoder: VisionEncoder | FaceFeatures) -> OwnEncoder | None:
    """Return the measure by the adapter's image encoder; None if that reads faces.

    What is in a face's crop is not comparable with a whole picture.
    """
    return None if isinstance(encoder, FaceFeatures) else OwnEncoder(encoder)


def shown_by(prompt: Image.Image | Face) -> Image.Image:
    """Return the picture that shows an image prompt: of a face its crop."""
    if isinstance(prompt, Image.Image):
        return prompt
    return prompt.crop or Image.new("RGB", (SIDE, SIDE), FAINT)


def similarities(
    measure: Clip | OwnEncoder,
    prompts: Sequence[Image.Image],
    columns: Sequence[Settings],
    made: Sequence[Sequence[Image.Image]],
) -> Scores:
    """Return mean cosines of results with their image prompts (CLIP-I) and their texts (CLIP-T).

    Each is the mean of all and, if there are several scales, of each scale. `made` holds every
    column's results, one per prompt. Columns without a text have no CLIP-T.
    """
    wanted = unit(measure.images(prompts))
    got = torch.stack([unit(measure.images(column)) for column in made])  # (columns, prompts, E)
    scales = [1.0 if column.scale is None else column.scale for column in columns]
    scores = by_scale(
        measure.name, scales, (got @ wanted.mT).diagonal(dim1=1, dim2=2).mean(1).tolist()
    )
    worded = [number for number, column in enumerate(columns) if column.prompt]
    if measure.texts is None or not worded:
        return scores
    text_features = unit(measure.texts([columns[number].prompt for number in worded]))
    return scores | by_scale(
        "clip_t",
        [scales[number] for number in worded],
        (got[worded] @ text_features[..., None]).mean((1, 2)).tolist(),
    )


def unit(embeddings: Tensor) -> Tensor:
    """Scale embeddings (…, E) to length 1, in float32."""
    return F.normalize(embeddings.float(), dim=-1)


def by_scale(name: str, scales: Sequence[float], values: Sequence[float]) -> Scores:
    """Return the columns' mean and, if there are several scales, the mean of each."""
    groups: dict[float, list[float]] = {}
    for scale, value in zip(scales, values, strict=True):
        groups.setdefault(scale, []).append(value)
    each = {
        f"{name} at scale {scale:g}": sum(group) / len(group) for scale, group in groups.items()
    }
    return {name: sum(values) / len(values)} | (each if len(each) > 1 else {})


class Validator:
    """Validation of the current adapter, on the models that training uses.

    The models that only validation needs may stay on the CPU: while a grid is made they are on the
    base model's device, the pipeline's in its precision. Afterwards, modes, weights, processors,
    scheduler and random state are as before.
    """

    def __init__(
        self,
        recipe: Recipe,
        pipeline: Any,
        encoder: VisionEncoder | FaceFeatures,
        variant: Variant,
        adapter: IPAdapter,
        held_out: Iterable[Image.Image | Face] = (),
    ) -> None:
        """Check all settings of the validation.

        Raise SettingError, ImageError or CheckpointError if one is wrong.

        `adapter` must be attached to the pipeline's base model. `held_out` are pictures to prompt
        with if the recipe names none; for an adapter that reads faces, the faces of those that it
        names, or of others.
        """
        plan, side, training = recipe.validation, recipe.data.size, recipe.optimization
        self.folder = recipe.output / "validation"
        own_pictures = () if variant.faces else plan.images
        self.prompts: Any = [open_image(path) for path in own_pictures] or list(
            islice(held_out, len(plan.images) or PROMPTS)
        )
        if not self.prompts:
            raise SettingError(
                "validation has no image prompts: name pictures in validation.images, or set "
                "data.held_out"
            )
        own = copy.copy(pipeline)  # the same models, with another scheduler
        own.scheduler = sampling_scheduler(pipeline.scheduler, recipe.noise.zero_terminal_snr)
        self.pipe = ImagePromptPipeline(
            own, Attached(adapter, Reader(encoder, variant)), model=find_model(recipe.model)
        )
        common = {
            "steps": plan.steps,
            "guidance": plan.guidance,
            "seed": plan.seed,
            "width": side,
            "height": side,
        }
        self.columns = [
            Settings(prompt=text, scale=scale, **common)
            for text in plan.texts
            for scale in plan.scales
        ]
        for column in self.columns:
            self.pipe.resolve(column)
        self.measure = Clip(plan.clip) if plan.clip else own_measure(encoder)
        # no more than training, which fits into memory
        self.at_once = min(MADE_AT_ONCE, training.batch_size // training.accumulate)
        self.compiled = training.compile

    def grid(self, step: int) -> tuple[Path, Scores]:
        """Make RUN/validation/step-N.png: a row per image prompt, a column per text and scale.

        Row i starts from noise of seed + i. Return the path and the scores.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._models_ready():
            fields = [column.model_dump(exclude_unset=True) for column in self.columns]
            made = [
                self.pipe(self.prompts, batch_size=self.at_once, **settings).images
                for settings in fields
            ]
            shown = [shown_by(prompt) for prompt in self.prompts]
            scores = similarities(self.measure, shown, self.columns, made) if self.measure else {}
        return save_png(
            sheet(shown, self.columns, made, step), self.folder / f"step-{step:07d}.png"
        ), scores

    @contextmanager
    def _models_ready(self) -> Iterator[None]:
        base = base_of(self.pipe.pipeline)
        parts = [
            part
            for part in self.pipe.pipeline.components.values()
            if isinstance(part, nn.Module) and part is not base
        ]
        encoders = (self.pipe.first.reader.encoder, self.measure)
        measuring = [one.model for one in encoders if one is not None and one.model is not None]
        # Compiling for batch sizes that differ from training's would take minutes.
        stance = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with (
            stance,
            torch.no_grad(),
            evaluating([base, self.pipe.first.adapter, *parts, *measuring]),
            on_device(parts, base.device, base.dtype),
            on_device(measuring, base.device),
        ):
            yield


def sampling_scheduler(scheduler: Any, zero_terminal_snr: bool) -> Any:
    """Return a new scheduler like the pipeline's.

    After training of v prediction with zero terminal SNR, return DDIM that starts at pure noise
    (arXiv 2305.08891).
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    if zero_terminal_snr and prediction_type(scheduler) == "v_prediction":
        return DDIMScheduler.from_config(
            scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )
    return type(scheduler).from_config(scheduler.config)


def sheet(
    prompts: Sequence[Image.Image],
    columns: Sequence[Settings],
    made: Sequence[Sequence[Image.Image]],
    step: int,
) -> Image.Image:
    """Arrange the pictures in a grid with captions.

    Image prompts are in the first column, then the columns `made` under their text and scale.
    """
    size = cell_size(made[0][0].size)
    originals = [
        ImageOps.pad(prompt, made[0][0].size, Image.Resampling.LANCZOS, color=WHITE)
        for prompt in prompts
    ]
    cells = [cell(picture, size) for row in zip(originals, *made, strict=True) for picture in row]
    body = grid(cells, 1 + len(columns), GAP)
    font: Any = ImageFont.load_default(max(12, size[0] // 18))
    line = round(1.3 * font.size)
    spans = [
        (text, len(list(group))) for text, group in groupby(column.prompt for column in columns)
    ]
    captions = [
        wrapped(text or "no text", count * (size[0] + GAP) - 2 * GAP, font) for text, count in spans
    ]
    high = (max(map(len, captions)) + 1) * line + 3 * GAP
    canvas = Image.new("RGB", (body.width + 2 * MARGIN, body.height + high + 2 * MARGIN), WHITE)
    canvas.paste(body, (MARGIN, MARGIN + high))
    draw = ImageDraw.Draw(canvas)
    lefts = [MARGIN + number * (size[0] + GAP) for number in range(len(columns) + 1)]
    scales_at = MARGIN + high - GAP - line
    draw.text((lefts[0], MARGIN), f"step {step}", FAINT, font)
    draw.text((lefts[0], scales_at), "image prompt", INK, font)
    for left, column in zip(lefts[1:], columns, strict=True):
        draw.text((left, scales_at), f"scale {column.scale:g}", FAINT, font)
    first = 1
    for (text, count), lines in zip(spans, captions, strict=True):
        left, rule = lefts[first], scales_at - GAP
        draw.multiline_text(
            (left, rule - GAP - len(lines) * line),
            "\n".join(lines),
            INK if text else FAINT,
            font,
            spacing=line // 4,
        )
        # a line over all columns of the text
        draw.line((left, rule, left + count * (size[0] + GAP) - GAP, rule), FAINT)
        first += count
    return canvas


def cell_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return a picture's size in the grid.

    Small ones are enlarged by a whole number, so that no pixel is interpolated; large ones are
    shrunk.
    """
    least, most = CELL
    factor = max(1, -(-least // max(size))) if max(size) <= most else most / max(size)
    return round(size[0] * factor), round(size[1] * factor)


def cell(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize a picture to `size`; when enlarging it, repeat pixels."""
    return picture.resize(
        size, Image.Resampling.LANCZOS if picture.width > size[0] else Image.Resampling.NEAREST
    )


def wrapped(text: str, width: int, font: Any) -> list[str]:
    """Break the text into at most TEXT_LINES lines of `width` pixels; leave out the rest."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > TEXT_LINES:
        lines[TEXT_LINES - 1 :] = [f"{lines[TEXT_LINES - 1]} …"]
    return [shortened(line, width, font) for line in lines]


def shortened(line: str, width: int, font: Any) -> str:
    """Return the line, with an ellipsis in place of what exceeds `width` pixels."""
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix("…").rstrip()
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"


# (batch, u (B,)) -> plain losses of its samples, without those that cannot be read
Losses = Callable[[Any, Tensor], Tensor]


@torch.no_grad()
def held_out_loss(batches: Iterable[tuple[Tensor, Any]], losses: Losses, draws: int = 4,
                  together: Callable[[Tensor], Tensor] = lambda sums: sums) -> float:  # fmt: skip
    """Return the mean plain loss over held-out samples, comparable over steps.

    Each sample is measured at `draws` fixed places of the noise schedule. NaN if there are no
    samples.

    batches   (numbers (B,) of the samples among the held-out ones, what `losses` takes); its noise
              must be fixed too
    losses    u in [0, 1) selects the timestep, as in training
    together  sums a tensor over processes, each of which has different batches
    """
    sums = torch.zeros(2, dtype=torch.float64)  # of losses, and how many
    for numbers, batch in batches:
        for u in schedule_places(numbers, draws).unbind(1):
            each = losses(batch, u).double().cpu()
            sums += torch.stack([each.sum(), each.new_tensor(len(each))])
    total, count = together(sums).tolist()
    return total / count if count else math.nan


def schedule_places(numbers: Tensor, draws: int) -> Tensor:
    """Return u (B, draws) in [0, 1) for sample numbers (B,).

    One lies in each of `draws` equal parts of the schedule. Within the parts, multiples of the
    golden ratio spread any run of samples evenly, however many there are.
    """
    within = (numbers.double().cpu() * GOLDEN + 0.5) % 1
    return (within[:, None] + torch.arange(draws, dtype=torch.float64)) / draws
