"""The paper's nine claims, each a function that measures it on this world.

A claim's verdict follows from intervals by the rule that it states: "yes" if each is completely on
the right side, "no" if one is completely on the wrong side, else "undecided". Shape letters: N
pictures, S pixels a side.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from imprompt.evaluation.metrics import Interval, bootstrap_interval, difference, diversity
from imprompt.families.published import base_structure
from imprompt.models import find_model
from imprompt.training.estimate import blank_adapter, blank_base, sizes_of
from imprompt.training.recipe import RECIPES, read_recipe
from worlds.emoji.assemble import ADAPTERS
from worlds.emoji.edges import edges
from worlds.emoji.glyphs import CUSTOM
from worlds.emoji.scenes import render
from worlds.emoji.style import STYLES_FOLDER

from .baselines import Base, budget
from .harness import (
    DIVERSE,
    FIDELITY,
    SCALES,
    SCENES,
    SEEDS,
    SHEETS,
    SHOWN,
    Claim,
    Harness,
    Table,
)
from .measures import colour_error, embed_pictures, in_style, outline_iou
from .sampler import Condition, Sampler
from .sheets import draw_curves


def parameters_of(module: nn.Module) -> int:
    """Count the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def shares(adapter: int, base: int) -> list[Interval | float | str]:
    """Return a table's row: the two counts, and the adapter's as a percentage of the base's."""
    return [f"{adapter:,}", f"{base:,}", f"{adapter / base:.1%}"]


def parameters(harness: Harness) -> Claim:
    """Measure claim 1: the adapter is small.

    The sheet shows results of the adapters next to those of the base alone.
    """
    table = Table(["adapter", "base's UNet", "share"])
    for name in ("sd15-base", "sd15-plus", "sdxl-base-512", "sdxl-plus-512"):
        recipe = read_recipe(RECIPES / f"{name}.toml")
        structure = base_structure(find_model(recipe.model))
        unet = blank_base(structure, torch.float32)
        adapter = blank_adapter(recipe, unet, sizes_of(recipe, unet, structure))
        table.rows[f"recipes/{name}.toml"] = shares(parameters_of(adapter), parameters_of(unet))
    for variant in ADAPTERS:
        sampler = Sampler(adapter=variant)
        table.rows[f"this world's {variant}"] = shares(
            parameters_of(sampler.adapter), parameters_of(sampler.pipe.unet)
        )
    small = table.rows["recipes/sd15-base.toml"][0] == "22,319,616"  # the paper's
    few = slice(SHOWN * SEEDS)
    made = {"without": harness.shipped("base")(harness.pictures[few], harness.no_texts[few], 0.0)}
    made |= {
        name: harness.shipped(name)(harness.pictures, harness.no_texts, 1.0) for name in ADAPTERS
    }
    return Claim(
        "An adapter of 22M parameters",
        "the SD 1.5 base adapter has as many; whether they suffice is what rows 2 to 8 ask",
        [table],
        harness.sheet("parameters", made),
        stated="yes" if small else "no",
    )


def against(
    harness: Harness,
    title: str,
    rule: str,
    names: Sequence[str],
    sheet: str,
    *,
    above: float = 0.0,
    variants: Sequence[str] = ("decoupled",),
) -> Claim:
    """Compare the adapter with other methods, given an image prompt alone.

    Compares the paper's two scores and the scenes' own factors. The first of the variants decides.
    """
    table, gaps = Table(list(FIDELITY)), Table(["CLIP-I", "CLIP-T", "colour error", "own glyph"])
    costs = Table(["weights trained", "samples seen"])
    absent = [name for name in (*variants, *names) if name not in harness.trained]
    variants, names = (
        [name for name in part if name in harness.trained] for part in (variants, names)
    )
    if "decoupled" not in variants or not names:
        return Claim(title, rule, ["Not measured: the methods are not trained here."])
    made = {
        name: harness.baseline(name)(harness.pictures, harness.no_texts, 1.0)
        for name in (*variants, *names)
    }
    measured = {name: harness.measure(pictures) for name, pictures in made.items()}
    for name, values in measured.items():
        table.rows[name] = harness.row(values, FIDELITY)
        costs.rows[name] = [f"{number:,}" for number in budget(harness.world, name)]
    for one, name in product(variants, names):
        gaps.rows[f"{one} − {name}"] = [
            harness.apart(measured[one][key], measured[name][key]) for key in gaps.columns
        ]
    decides = {
        f"{variants[0]} − {name}": harness.apart(
            measured[variants[0]]["CLIP-I"], measured[name]["CLIP-I"]
        )
        for name in names
    }
    missing = [f"Not trained here: {', '.join(absent)}."] if absent else []
    return Claim(
        title, rule, [table, gaps, costs, *missing], harness.sheet(sheet, made), decides, above
    )


# of CLIP-I, for "comparable"; in the paper's table 1 the adapter is above both fine-tuned models
MARGIN = 0.03

tuned = partial(
    against,
    title="Comparable to or better than a fully fine-tuned image-prompt model",
    rule=(
        f"CLIP-I at most {MARGIN} below the fine-tuned base's, at the same samples and at equal "
        "compute"
    ),
    names=("tuned", "tuned, equal compute"),
    sheet="tuned",
    above=-MARGIN,
)
others = partial(
    against,
    title="Better than other adapters",
    rule="CLIP-I of the base variant is above each of theirs",
    variants=("decoupled", "decoupled, plus"),
    names=("T2I style", "ControlNet shuffle"),
    sheet="adapters",
)
simple = partial(
    against,
    title="Decoupled cross-attention beats the simple adapter",
    rule="CLIP-I is above that of image tokens appended to the text's",
    names=("simple",),
    sheet="simple",
)


def together(harness: Harness) -> Claim:
    """Measure claim 5: text and image work together.

    The text gives the glyph, the image the palette.
    """
    keys = ("text's glyph", "text's glyph, metric encoder", "image's palette", "both")
    tables, both = [], {}
    sheets: dict[str, Tensor] = {}
    panels: dict[str, dict[str, list[Interval]]] = {key: {} for key in keys}
    draws = {"plus": harness.shipped("plus"), "base": harness.shipped("base")}
    draws |= {
        name: harness.baseline(name)
        for name in ("decoupled", "simple", "tuned")
        if name in harness.trained
    }
    for name, draw in draws.items():
        table, both[name] = Table(["scale", *keys]), []
        for scale in SCALES:
            made = draw(harness.pictures, harness.texts, scale)
            values = harness.measure(made)
            table.rows[f"{name}, {scale:g}"] = [scale, *harness.row(values, keys)]
            both[name].append(values["both"])
            for key in keys:
                panels[key].setdefault(name, []).append(harness.interval(values[key]))
            if name == "plus":
                sheets[f"scale {scale:g}"] = made
        tables.append(table)
    best = {name: max(values, key=lambda one: one.mean().item()) for name, values in both.items()}
    decides = {"both, plus − scale 0": harness.apart(best["plus"], both["plus"][0])}
    if {"decoupled", "tuned"} <= {*best}:
        decides["both, decoupled − tuned"] = harness.apart(best["decoupled"], best["tuned"])
    draw_curves(SHEETS / "scale.png", "scale", SCALES, panels)
    return Claim(
        "Text and image work together",
        "at the best scale more results have the text's glyph in the image's palette than at scale "
        "0, and more than the fine-tuned "
        "model's at its best, of as many samples",
        tables,
        ("scale.png", *harness.sheet("together", sheets, harness.texts)),
        decides,
    )


REDRAWN = (
    "drawn by the style's hand",
    "CLIP-I to the prompt redrawn",
    "CLIP-I to another redrawn",
    "colour error to the prompt",
    "colour error to another",
)


def custom(harness: Harness) -> Claim:
    """Measure claim 6: the adapter works on bases fine-tuned to other drawing styles."""
    tables, decides, sheets = [], {}, {}
    plain = harness.shipped("plus")(harness.pictures, harness.no_texts, 1.0)
    for name in CUSTOM:
        table = Table(list(REDRAWN))
        draw = harness.shipped("plus", STYLES_FOLDER / name)
        made, unprompted = (draw(harness.pictures, harness.no_texts, scale) for scale in (1.0, 0.0))
        redrawn = render(harness.scenes, harness.world.glyphs(name), harness.world.side)
        wanted, seen = embed_pictures(redrawn), {}
        shown = {
            f"{name}, image prompt": made,
            "base, image prompt": plain,
            f"{name}, no prompt": unprompted,
            "the prompts, redrawn": redrawn,
        }
        for label, pictures in shown.items():
            found = embed_pictures(pictures)
            seen[label] = (
                in_style(pictures, name),
                (found * wanted).sum(1),
                (found * wanted.roll(SEEDS, 0)).sum(1),
                colour_error(pictures, harness.scenes),
                colour_error(pictures, harness.another),
            )
            table.rows[label] = [harness.interval(values) for values in seen[label]]
        custom_, base_ = seen[f"{name}, image prompt"], seen["base, image prompt"]
        decides[f"{name}: by its hand − the base's"] = harness.apart(custom_[0], base_[0])
        decides[f"{name}: CLIP-I, the prompt − another"] = harness.apart(custom_[1], custom_[2])
        tables.append(table)
        sheets |= {f"as {name}": redrawn, name: made}
    return Claim(
        "Generalises to custom models of the same base",
        "on each custom base more results are drawn by its hand than on the base, and they are "
        "nearer to their own prompt redrawn "
        "than to another's",
        tables,
        harness.sheet("custom", {"base": plain, **sheets}),
        decides,
    )


def structure(harness: Harness) -> Claim:
    """Measure claim 7: the adapter works with an edge ControlNet it was not trained with."""
    maps = edges(render(harness.another, harness.glyphs, harness.world.side))
    held, free = harness.shipped("plus", maps=maps), harness.shipped("plus")
    made = {
        "edges and image": held(harness.pictures, harness.no_texts, 1.0),
        "image alone": free(harness.pictures, harness.no_texts, 1.0),
        "edges alone": held(harness.pictures, harness.no_texts, 0.0),
    }
    table = Table(
        [
            "outline IoU",
            "outline IoU, a third scene's",
            "colour error",
            "colour error, the outlines' scene",
        ]
    )
    seen = {}
    for name, pictures in made.items():
        seen[name] = (
            outline_iou(pictures, maps),
            outline_iou(pictures, maps.roll(SEEDS, 0)),
            colour_error(pictures, harness.scenes),
            colour_error(pictures, harness.another),
        )
        table.rows[name] = [harness.interval(values) for values in seen[name]]
    own = seen["edges and image"]
    decides = {
        "outline IoU, the given − a third's": harness.apart(own[0], own[1]),
        "colour error, the outlines' scene − the prompt": harness.apart(own[3], own[2]),
    }
    return Claim(
        "Works with structural control",
        "outlines are nearer to the given ones than to a third scene's and colours nearer to the "
        "prompt's than to those of the "
        "scene that gave the outlines, at once",
        [table],
        harness.sheet("structure", {"edges": maps, **made}),
        decides,
    )


def fine_grained(harness: Harness) -> Claim:
    """Measure claim 8: the plus variant is more faithful and less diverse than base."""
    table, gaps = Table([*FIDELITY, "diversity"]), Table([*FIDELITY, "diversity"])
    measured, sheets = {}, {}
    for name in ("base", "plus"):
        draw = harness.shipped(name)
        made = draw(harness.pictures, harness.no_texts, 1.0)
        values = harness.measure(made)
        few = torch.arange(0, SCENES * SEEDS, SEEDS)[: SCENES // 2].repeat_interleave(DIVERSE)
        many = embed_pictures(draw(harness.pictures[few], [""] * len(few), 1.0)).unflatten(
            0, (-1, DIVERSE)
        )
        values["diversity"] = torch.stack([diversity(pictures).mean() for pictures in many])
        measured[name], sheets[name] = values, made
        table.rows[name] = [
            *harness.row(values, FIDELITY),
            bootstrap_interval(values["diversity"], torch.arange(len(many))),
        ]
    base, plus = measured["base"], measured["plus"]
    items = torch.arange(len(plus["diversity"]))
    more, less = (
        difference(a["diversity"], items, b["diversity"], items)
        for a, b in ((plus, base), (base, plus))
    )
    gaps.rows["plus − base"] = [*(harness.apart(plus[key], base[key]) for key in FIDELITY), more]
    return Claim(
        "Fine-grained features: more faithful, less diverse",
        "plus is above base in CLIP-I and below it in diversity over seeds",
        [table, gaps],
        harness.sheet("plus", sheets),
        {
            "CLIP-I, plus − base": harness.apart(plus["CLIP-I"], base["CLIP-I"]),
            "diversity, base − plus": less,
        },
    )


def untouched(harness: Harness) -> Claim:
    """Measure claim 9: at scale 0 results equal those of the base, bit for bit."""
    texts = harness.texts[: SHOWN * SEEDS]
    sampler = Sampler()
    prompts = harness.pictures[: len(texts)]
    silent = sampler.sample(len(texts), Condition(prompts, 0.0), texts=texts)
    sampler.adapter.detach()
    plain = sampler.sample(len(texts), texts=texts)
    equal = torch.equal(silent, plain)
    fresh = Base(harness.world).pipe
    same = all(
        torch.equal(a, b)
        for a, b in zip(sampler.pipe.unet.parameters(), fresh.unet.parameters(), strict=True)
    )
    table = Table(["pictures", "pictures that differ", "weights of the base as loaded"])
    table.rows["scale 0 against the base alone"] = [
        str(len(texts)),
        str(int((silent != plain).flatten(1).any(1).sum())),
        "equal" if same else "changed",
    ]
    return Claim(
        "The base is untouched",
        "no text-only picture differs at scale 0, in any of its 8-bit values",
        [table],
        harness.sheet("untouched", {"base alone": plain, "scale 0": silent}, texts),
        stated="yes" if equal and same else "no",
    )


CLAIMS: list[Callable[[Harness], Claim]] = [
    parameters, tuned, others, simple, together, custom, structure, fine_grained, untouched,
]  # fmt: skip
