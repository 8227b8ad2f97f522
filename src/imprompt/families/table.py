"""Table of base-model families, and of diffusers' pipelines that use them.

Pipelines are found by walking diffusers: a new one appears in the table by itself.
"""

import inspect
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

from imprompt.families.base import Family, families
from imprompt.families.refusals import MODELS, NOT_RUN, PIPELINES

HEAD = (
    *("family", "class", "guidance", "train", "compiles", "ImagePromptPipeline"),
    *("with adapter.using", "not run", "refused"),
)
KINDS = ("text", "image", "inpaint")


class FamilyLine(NamedTuple):
    """What can be done with one family, in words.

    guidance  how its pipelines run the branches of guidance
    train     whether `imprompt train` makes adapters for it
    compiles  what `torch.compile` makes one graph of
    whole     pipelines that `ImagePromptPipeline` takes
    attached  pipelines of the class that are called by the user, in `with adapter.using(...)`
    not_run   those of them that no test runs
    refused   pipelines of the class that do not go with image prompts
    """

    family: str
    model: str
    guidance: str
    train: str
    compiles: str
    whole: tuple[str, ...]
    attached: tuple[str, ...]
    not_run: tuple[str, ...]
    refused: tuple[str, ...]


def family_lines() -> Iterator[FamilyLine]:
    """Yield a line for every class of base models."""
    found = pipelines_by_model()
    for family in families():
        whole = tuple(whole_pipelines(family))
        for model in family.classes:
            others = [name for name in found.get(model, ()) if name not in whole]
            refused = tuple(name for name in others if name in PIPELINES)
            not_run = tuple(name for name in others if name in NOT_RUN or family.name == "unet")
            yield FamilyLine(
                family.name,
                model,
                guidance_of(family),
                "yes" if family.trains and model == family.classes[0] else "not yet",
                family.compiles,
                tuple(name for name in whole if name in found.get(model, ())),
                tuple(name for name in others if name not in (*refused, *not_run)),
                not_run,
                refused,
            )


def guidance_of(family: Family) -> str:
    """Return how the family's pipelines run the branches of guidance."""
    if family.separate_branches:
        return "two calls"
    return "one call, positive first" if family.positive_first else "one call"


def whole_pipelines(family: Family) -> Iterator[str]:
    """Yield the names of the pipelines that `ImagePromptPipeline` takes, without repetition."""
    tables = family.pipelines.values()
    tasks = (own for table in tables for own in (table.plain, table.controlled) if own)
    yield from dict.fromkeys(name for own in tasks for name in own if name)


def pipelines_by_model() -> dict[str, list[str]]:
    """Return the names of diffusers' pipelines by the class of base model that they take."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what diffusers' modules say of themselves when imported
        return walked(import_module("diffusers"))


def walked(diffusers: Any) -> dict[str, list[str]]:
    """Return the names of that package's pipelines by the class of base model that they take."""
    base: Any = diffusers.DiffusionPipeline
    known = {model for family in families() for model in family.classes}
    found: dict[str, list[str]] = {}
    for name in sorted(dir(diffusers)):
        kind = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if not (inspect.isclass(kind) and issubclass(kind, base)):
            continue
        for parameter in inspect.signature(kind.__init__).parameters.values():
            for model in models_of(parameter.annotation) & known:
                found.setdefault(model, []).append(name)
    return {model: list(dict.fromkeys(names)) for model, names in found.items()}


def models_of(annotation: Any) -> set[str]:
    """Return the names of the classes in an annotation, such as a union or a list."""
    parts = getattr(annotation, "__args__", None) or (annotation,)
    return {part if isinstance(part, str) else getattr(part, "__name__", "") for part in parts}


def as_markdown() -> str:
    """Return the table in Markdown."""
    rows = [
        (
            line.family,
            f"`{line.model}`",
            line.guidance,
            line.train,
            line.compiles,
            named(line.whole),
            named(line.attached),
            named(line.not_run),
            named(line.refused),
        )
        for line in family_lines()
    ]
    head = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    reasons = "\n".join(f"| {name} | {why} |" for name, why in refusal_lines())
    table = "\n".join([*head, *("| " + " | ".join(row) + " |" for row in rows)])
    return f"{table}\n\n| no image prompts, or not run | why |\n|---|---|\n{reasons}\n"


def refusal_lines() -> Iterator[tuple[str, str]]:
    """Yield the name of each class of models and pipelines that is refused or not run, and why."""
    yield from ((f"`{name}`", why) for name, why in MODELS.items())
    for name, why in PIPELINES.items():
        yield name.removesuffix("Pipeline"), f"refused: {why}"
    for name, why in NOT_RUN.items():
        yield name.removesuffix("Pipeline"), f"not run: {why}"


def named(pipelines: tuple[str, ...]) -> str:
    """Return the names of pipelines without their common ending."""
    return ", ".join(name.removesuffix("Pipeline") for name in pipelines) or "-"
