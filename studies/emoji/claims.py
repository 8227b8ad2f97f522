"""The paper's nine claims, each a function that measures it on this world.

A claim's verdict follows from intervals by the rule that stands beside it: "yes" if each is wholly
on the right side, "no" if one is wholly on the wrong, else "undecided". Shape letters: N pictures,
S pixels a side.
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
from imprompt.training.recipe import read_recipe
from worlds.emoji.assemble import ADAPTERS, RECIPES
from worlds.emoji.edges import edges
from worlds.emoji.glyphs import CUSTOM
from worlds.emoji.scenes import render
from worlds.emoji.style import PLACE

from .baselines import Base, budget
from .harness import (
    DIVERSE,
    FIDELITY,
    SCALES,
    SCENES,
    SEEDS,
    SHEETS,
    SHOWN,
    Bench,
    Claim,
    Table,
)
from .measures import by_hand, colour_error, embed, outline_iou
from .sampler import Heard, Studio
from .sheets import draw_curves


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shares(adapter: int, base: int) -> list[Interval | float | str]:
    return [f"{adapter:,}", f"{base:,}", f"{adapter / base:.1%}"]


def parameters(bench: Bench) -> Claim:
    """1: the adapter is small; what it changes is seen beside the base alone."""
    table = Table(["adapter", "base's UNet", "share"])
    for name in ("sd15-base", "sd15-plus", "sdxl-base-512", "sdxl-plus-512"):
        recipe = read_recipe(RECIPES / f"{name}.toml")
        structure = base_structure(find_model(recipe.model))
        unet = blank_base(structure, torch.float32)
        adapter = blank_adapter(recipe, unet, sizes_of(recipe, unet, structure))
        table.rows[f"recipes/{name}.toml"] = shares(parameters_of(adapter), parameters_of(unet))
    for variant in ADAPTERS:
        studio = Studio(adapter=variant)
        table.rows[f"this world's {variant}"] = shares(
            parameters_of(studio.adapter), parameters_of(studio.pipe.unet)
        )
    small = table.rows["recipes/sd15-base.toml"][0] == "22,319,616"  # the paper's
    few = slice(SHOWN * SEEDS)
    made = {"without": bench.shipped("base")(bench.pictures[few], bench.silent[few], 0.0)}
    made |= {name: bench.shipped(name)(bench.pictures, bench.silent, 1.0) for name in ADAPTERS}
    return Claim(
        "An adapter of 22M parameters",
        "the SD 1.5 base adapter has as many; whether they suffice is what rows 2 to 8 ask",
        [table],
        bench.sheet("parameters", made),
        said="yes" if small else "no",
    )


def against(
    bench: Bench,
    title: str,
    rule: str,
    names: Sequence[str],
    sheet: str,
    *,
    above: float = 0.0,
    ours: Sequence[str] = ("decoupled",),
) -> Claim:
    """The adapter and others, image prompt alone.

    The paper's two scores and the scenes' own factors. The first of ours decides.
    """
    table, gaps = Table(list(FIDELITY)), Table(["CLIP-I", "CLIP-T", "colour error", "own glyph"])
    costs = Table(["weights trained", "samples seen"])
    absent = [name for name in (*ours, *names) if name not in bench.trained]
    ours, names = ([name for name in part if name in bench.trained] for part in (ours, names))
    if "decoupled" not in ours or not names:
        return Claim(title, rule, ["Not measured: the methods are not trained here."])
    made = {name: bench.rival(name)(bench.pictures, bench.silent, 1.0) for name in (*ours, *names)}
    measured = {name: bench.measure(pictures) for name, pictures in made.items()}
    for name, values in measured.items():
        table.rows[name] = bench.row(values, FIDELITY)
        costs.rows[name] = [f"{number:,}" for number in budget(bench.world, name)]
    for one, name in product(ours, names):
        gaps.rows[f"{one} − {name}"] = [
            bench.apart(measured[one][key], measured[name][key]) for key in gaps.columns
        ]
    decides = {
        f"{ours[0]} − {name}": bench.apart(measured[ours[0]]["CLIP-I"], measured[name]["CLIP-I"])
        for name in names
    }
    missing = [f"Not trained here: {', '.join(absent)}."] if absent else []
    return Claim(
        title, rule, [table, gaps, costs, *missing], bench.sheet(sheet, made), decides, above
    )


# of CLIP-I: what "comparable" may mean; in the paper's table 1 the adapter is above both fine-tuned
# models
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
    ours=("decoupled", "decoupled, plus"),
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


def together(bench: Bench) -> Claim:
    """5: glyph by text, palette by image."""
    keys = ("text's glyph", "text's glyph, judge", "image's palette", "both")
    tables, both = [], {}
    sheets: dict[str, Tensor] = {}
    panels: dict[str, dict[str, list[Interval]]] = {key: {} for key in keys}
    draws = {"plus": bench.shipped("plus"), "base": bench.shipped("base")}
    draws |= {
        name: bench.rival(name)
        for name in ("decoupled", "simple", "tuned")
        if name in bench.trained
    }
    for name, draw in draws.items():
        table, both[name] = Table(["scale", *keys]), []
        for scale in SCALES:
            made = draw(bench.pictures, bench.texts, scale)
            values = bench.measure(made)
            table.rows[f"{name}, {scale:g}"] = [scale, *bench.row(values, keys)]
            both[name].append(values["both"])
            for key in keys:
                panels[key].setdefault(name, []).append(bench.interval(values[key]))
            if name == "plus":
                sheets[f"scale {scale:g}"] = made
        tables.append(table)
    best = {name: max(values, key=lambda one: one.mean().item()) for name, values in both.items()}
    decides = {"both, plus − scale 0": bench.apart(best["plus"], both["plus"][0])}
    if {"decoupled", "tuned"} <= {*best}:
        decides["both, decoupled − tuned"] = bench.apart(best["decoupled"], best["tuned"])
    draw_curves(SHEETS / "scale.png", "scale", SCALES, panels)
    return Claim(
        "Text and image work together",
        "at the best scale more results have the text's glyph in the image's palette than at scale "
        "0, and more than the fine-tuned "
        "model's at its best, of as many samples",
        tables,
        ("scale.png", *bench.sheet("together", sheets, bench.texts)),
        decides,
    )


REDRAWN = (
    "drawn by the style's hand",
    "CLIP-I to the prompt redrawn",
    "CLIP-I to another redrawn",
    "colour error to the prompt",
    "colour error to another",
)


def custom(bench: Bench) -> Claim:
    """6: the same adapter on bases fine-tuned to draw otherwise."""
    tables, decides, sheets = [], {}, {}
    plain = bench.shipped("plus")(bench.pictures, bench.silent, 1.0)
    for name in CUSTOM:
        table = Table(list(REDRAWN))
        draw = bench.shipped("plus", PLACE / name)
        made, unheard = (draw(bench.pictures, bench.silent, scale) for scale in (1.0, 0.0))
        redrawn = render(bench.scenes, bench.world.glyphs(name), bench.world.side)
        wanted, seen = embed(redrawn), {}
        shown = {
            f"{name}, image prompt": made,
            "base, image prompt": plain,
            f"{name}, no prompt": unheard,
            "the prompts, redrawn": redrawn,
        }
        for label, pictures in shown.items():
            found = embed(pictures)
            seen[label] = (
                by_hand(pictures, name),
                (found * wanted).sum(1),
                (found * wanted.roll(SEEDS, 0)).sum(1),
                colour_error(pictures, bench.scenes),
                colour_error(pictures, bench.another),
            )
            table.rows[label] = [bench.interval(values) for values in seen[label]]
        custom_, base_ = seen[f"{name}, image prompt"], seen["base, image prompt"]
        decides[f"{name}: by its hand − the base's"] = bench.apart(custom_[0], base_[0])
        decides[f"{name}: CLIP-I, the prompt − another"] = bench.apart(custom_[1], custom_[2])
        tables.append(table)
        sheets |= {f"as {name}": redrawn, name: made}
    return Claim(
        "Generalises to custom models of the same base",
        "on each custom base more results are drawn by its hand than on the base, and they are "
        "nearer to their own prompt redrawn "
        "than to another's",
        tables,
        bench.sheet("custom", {"base": plain, **sheets}),
        decides,
    )


def structure(bench: Bench) -> Claim:
    """7: with an edge ControlNet that the adapter never met."""
    maps = edges(render(bench.another, bench.glyphs, bench.world.side))
    held, free = bench.shipped("plus", maps=maps), bench.shipped("plus")
    made = {
        "edges and image": held(bench.pictures, bench.silent, 1.0),
        "image alone": free(bench.pictures, bench.silent, 1.0),
        "edges alone": held(bench.pictures, bench.silent, 0.0),
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
            colour_error(pictures, bench.scenes),
            colour_error(pictures, bench.another),
        )
        table.rows[name] = [bench.interval(values) for values in seen[name]]
    own = seen["edges and image"]
    decides = {
        "outline IoU, the given − a third's": bench.apart(own[0], own[1]),
        "colour error, the outlines' scene − the prompt": bench.apart(own[3], own[2]),
    }
    return Claim(
        "Works with structural control",
        "outlines are nearer to the given ones than to a third scene's and colours nearer to the "
        "prompt's than to those of the "
        "scene that gave the outlines, at once",
        [table],
        bench.sheet("structure", {"edges": maps, **made}),
        decides,
    )


def fine_grained(bench: Bench) -> Claim:
    """8: plus against base."""
    table, gaps = Table([*FIDELITY, "diversity"]), Table([*FIDELITY, "diversity"])
    measured, sheets = {}, {}
    for name in ("base", "plus"):
        draw = bench.shipped(name)
        made = draw(bench.pictures, bench.silent, 1.0)
        values = bench.measure(made)
        few = torch.arange(0, SCENES * SEEDS, SEEDS)[: SCENES // 2].repeat_interleave(DIVERSE)
        many = embed(draw(bench.pictures[few], [""] * len(few), 1.0)).unflatten(0, (-1, DIVERSE))
        values["diversity"] = torch.stack([diversity(pictures).mean() for pictures in many])
        measured[name], sheets[name] = values, made
        table.rows[name] = [
            *bench.row(values, FIDELITY),
            bootstrap_interval(values["diversity"], torch.arange(len(many))),
        ]
    base, plus = measured["base"], measured["plus"]
    places = torch.arange(len(plus["diversity"]))
    more, less = (
        difference(a["diversity"], places, b["diversity"], places)
        for a, b in ((plus, base), (base, plus))
    )
    gaps.rows["plus − base"] = [*(bench.apart(plus[key], base[key]) for key in FIDELITY), more]
    return Claim(
        "Fine-grained features: more faithful, less diverse",
        "plus is above base in CLIP-I and below it in diversity over seeds",
        [table, gaps],
        bench.sheet("plus", sheets),
        {
            "CLIP-I, plus − base": bench.apart(plus["CLIP-I"], base["CLIP-I"]),
            "diversity, base − plus": less,
        },
    )


def untouched(bench: Bench) -> Claim:
    """9: scale 0 is the base, bit for bit."""
    texts = bench.texts[: SHOWN * SEEDS]
    studio = Studio()
    prompts = bench.pictures[: len(texts)]
    silent = studio.draw(len(texts), Heard(prompts, 0.0), texts=texts)
    studio.adapter.detach()
    plain = studio.draw(len(texts), texts=texts)
    equal = torch.equal(silent, plain)
    fresh = Base(bench.world).pipe
    same = all(
        torch.equal(a, b)
        for a, b in zip(studio.pipe.unet.parameters(), fresh.unet.parameters(), strict=True)
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
        bench.sheet("untouched", {"base alone": plain, "scale 0": silent}, texts),
        said="yes" if equal and same else "no",
    )


CLAIMS: list[Callable[[Bench], Claim]] = [
    parameters, tuned, others, simple, together, custom, structure, fine_grained, untouched,
]  # fmt: skip
