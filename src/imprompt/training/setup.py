"""Setup of a training run by its recipe.

Shape letters as in `imprompt.training.features`.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from PIL import Image

from imprompt.adapter import IPAdapter
from imprompt.checkpoints.adapters import Origin
from imprompt.encoders.face import Face
from imprompt.errors import ImpromptError, SettingError
from imprompt.families.base import base_of, family_of
from imprompt.files import check_folder
from imprompt.generation.record import recorded_location, recorded_name
from imprompt.training.augmented import SampleReader
from imprompt.training.batches import Composer, RankSlice
from imprompt.training.data_pipeline import (
    DataPipeline,
    encode_features,
    have_features,
    read_features,
    read_pictures,
    refuse_edited,
)
from imprompt.training.endings import locked_features
from imprompt.training.features import FeatureEncoder
from imprompt.training.model import (
    AdaptedModel,
    best_device,
    measure_model,
    open_base,
    open_frozen,
    precision,
    prepare_base,
    start_adapter,
)
from imprompt.training.objective import Objective
from imprompt.training.recipe import Recipe
from imprompt.training.samples import BadSample, PictureOpener, Source
from imprompt.training.sources import open_source
from imprompt.training.state import State, load_state
from imprompt.training.step import Trainer
from imprompt.training.validation import Validator
from imprompt.variants import PARTS

# how long processes wait for one that works alone: it validates, or has more to encode
PATIENCE = timedelta(hours=2)
OnEncoded = Callable[[int, int], None]  # (samples done, samples in all)


@dataclass
class Setup:
    """The parts of a run.

    state      the state that it resumes from; None: it starts
    frozen     the models around the base, as far as this run needs them
    base       the frozen model that is adapted
    cpu_copy   an adapter on the CPU: the copy that is saved, and that validation uses
    layers     names of the base's cross-attention layers
    validator  None where this process does not validate
    """

    recipe: Recipe
    state: State | None
    accelerator: Any
    frozen: FeatureEncoder | None
    base: Any
    cpu_copy: IPAdapter
    layers: list[str]
    trainer: Trainer
    data_pipeline: DataPipeline
    origin: Origin
    validator: Validator | None

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """Device of the training."""
        return self.accelerator.device


def set_up(recipe: Recipe, on_encoded: OnEncoded) -> Setup:
    """Assemble a run; raise what is wrong with the recipe, the cheapest checks first."""
    check_folder(recipe.output)
    measured = measure_model(recipe)
    # errors in the set are raised before the models are loaded
    refuse_edited(recipe)
    source = None if have_features(recipe) else open_source(recipe.data)
    state = load_state(recipe.output, recipe)
    accelerator = open_accelerator(recipe)
    share = share_of(recipe, accelerator)
    pipeline, frozen = open_models(recipe, source, accelerator, share, on_encoded)
    reader: SampleReader
    if recipe.data.features is not None:
        reader = read_features(recipe, measured)
        nulls, identity, online = reader.nulls, reader.identity, None
    else:
        assert frozen is not None
        assert source is not None
        reader = read_pictures(recipe, source, measured, frozen)
        nulls, identity, online = frozen.nulls(), frozen.identity(recipe.data), frozen
    base, device = base_of(pipeline), accelerator.device
    widths = {part: nulls[part].shape[-1] for part in PARTS if part in nulls}
    adapter = start_adapter(recipe, base, widths)
    cpu_copy = deepcopy(adapter)
    objective = Objective(pipeline.scheduler, recipe.noise, family_of(base).mu)
    model = AdaptedModel(prepare_base(base, recipe.optimization, device), adapter)
    compose = Composer(nulls, device, measured.normalization, online)
    data_pipeline = DataPipeline(
        reader, recipe.data, recipe.seed, share, recipe.optimization.batch_size, compose
    )
    origin = Origin(
        base=recorded_name(recipe.model, recipe.output),
        encoder=recorded_location(identity["encoder"], recipe.output),
        encoder_fingerprint=identity["encoder_fingerprint"],
        faces=identity.get("face_encoder", ""),
        prediction_type=objective.prediction_type,
        licence=recipe.licence,
    )
    validator = None
    if recipe.validation.every is not None and accelerator.is_main_process:
        assert frozen is not None
        opened = source or open_source(recipe.data)
        held_out = prompts(recipe, frozen, opened, data_pipeline.held_out.tolist())
        validator = Validator(
            recipe, pipeline, frozen.reader(device), frozen.variant, cpu_copy.attach(base), held_out
        )
    trainer = Trainer(accelerator, model, objective, recipe.optimization)
    layers = list(family_of(base).layers(base))
    return Setup(
        recipe,
        state,
        accelerator,
        frozen,
        base,
        cpu_copy,
        layers,
        trainer,
        data_pipeline,
        origin,
        validator,
    )


def open_accelerator(recipe: Recipe) -> Any:
    """Open accelerate's Accelerator, which coordinates the processes.

    Raise SettingError for an engine that does not fit.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    kind = precision(recipe, best_device())
    accelerator = Accelerator(
        mixed_precision="fp16" if kind == "fp16" else "no",
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    # a process that ended earlier, because of a wrong recipe, would break the start of the others
    accelerator.wait_for_everyone()
    check_engine(accelerator)
    return accelerator


def check_engine(accelerator: Any) -> None:
    """Raise SettingError for a launcher's engine whose states could not be gathered here."""
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM") or (kind == "FSDP" and not accelerator.is_fsdp2):
        raise SettingError(
            f"the launcher asks for {kind}: training runs on DDP (the default) or FSDP2 "
            "(accelerate launch --use_fsdp "
            "--fsdp_version 2); an adapter's weights and optimizer are small enough for either"
        )


def share_of(recipe: Recipe, accelerator: Any) -> RankSlice:
    """Return this process's share of every batch.

    Raise ImpromptError if the batch cannot be divided equally.
    """
    plan, ranks = recipe.optimization, accelerator.num_processes
    if plan.batch_size % (ranks * plan.accumulate):
        raise ImpromptError(
            f"optimization.batch_size = {plan.batch_size} cannot be shared by {ranks} processes in "
            f"{plan.accumulate} "
            f"parts each: give a multiple of {ranks * plan.accumulate}"
        )
    return RankSlice(accelerator.process_index, ranks, plan.accumulate)


def open_models(recipe: Recipe, source: Source | None, accelerator: Any, share: RankSlice,
                on_encoded: OnEncoded) -> tuple[Any, FeatureEncoder | None]:  # fmt: skip
    """Open the base model's pipeline, and the frozen models around it that this run needs.

    Encode the features that are not encoded yet.
    """
    device, cached = accelerator.device, recipe.data.features is not None
    if recipe.data.features is not None and any(gathered([source is not None])):
        encoders = open_frozen(recipe, open_base(recipe, device, whole=True))
        with locked_features(recipe.data.features, accelerator):
            encode_features(recipe, source or open_source(recipe.data), encoders, share, on_encoded)
    around = not cached or recipe.validation.every is not None
    pipeline = open_base(recipe, torch.device("cpu") if cached else device, whole=around)
    return pipeline, open_frozen(recipe, pipeline) if around else None


def gathered(mine: list[Any]) -> list[Any]:
    """Return the lists of all processes, joined."""
    from accelerate.utils import gather_object

    return gather_object(mine)


def prompts(
    recipe: Recipe, frozen: FeatureEncoder, source: Source, numbers: list[int]
) -> Iterator[Image.Image | Face]:
    """Yield image prompts for validation: the recipe's pictures, or those of held-out samples.

    These are the first references of the samples that can be read. Of a picture, its largest face
    prompts if the adapter reads faces; raise BadSample if there is none in one of the recipe's.
    """
    for path in recipe.validation.images:
        opener = PictureOpener(str(path), "the file", path)
        yield frozen.references.prompt(str(path), (opener, opener()))
    for index in () if recipe.validation.images else numbers:
        try:
            opener = source.read(index).references[0]
            yield frozen.references.prompt(source.name(index), (opener, opener()))
        except BadSample:
            continue
