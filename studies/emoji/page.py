"""Measure the paper's claims on this world: `python -m studies.emoji claims`.

Writes docs/reports/claims.md and its contact sheets. All measurements of the shipped weights are
repeated; those of the baselines are made where `python -m studies.emoji baselines` has trained
them.
"""

import os
import re
import threading
import time
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context, parent_process

import torch

from imprompt.evaluation.metrics import RESAMPLES
from imprompt.files import atomic_write
from worlds.emoji.scenes import moved, render
from worlds.emoji.train_utils import World

from .claims import CLAIMS, together
from .harness import (
    DIVERSE,
    FIDELITY,
    PAGE,
    SCENES,
    SEEDS,
    SHOWN,
    STEPS,
    Claim,
    Harness,
    Table,
    shown,
)
from .paths import STUDIES
from .sampler import GUIDANCE

NOTES = STUDIES / "notes.toml"  # a person's comments on results, by number and verdict
HEAD = """# The paper's claims, measured

IP-Adapter (arXiv 2308.06721) makes nine claims that can be asked of any base model. Here they are
asked of the packaged emoji world, whose scenes are known to the last factor; the weights are in the
package, the rest is a command:

    python -m worlds.emoji scenes         # with `baselines` an hour of one thread, resumable:
    python -m studies.emoji baselines     # without them rows 2 to 4 are not measured
    make claims                           # this page and its pictures again, as shipped

{budget}
Image prompts of rows 1 to 4, 6 and 8 go with an empty text at scale 1. Which weights were trained
on how much is said in rows 2 to 4 and, for the packaged ones (*base* and *plus* without a further
word), in the [model card](../../src/imprompt/weights/emoji/README.md). *decoupled* is the base
variant trained as the baselines are: one run each, on the same samples in the same order, learning
rates not searched for. Intervals speak of scenes and seeds, not of other trainings. A claim is
undecided where an interval holds what it would have to leave out.

Numbers are means with 95 % bootstrap intervals over scenes ({resamples} resamples; the seeds of a
scene are drawn together). *CLIP-I* and *CLIP-T* (to the scene's caption, which was not given) are
cosines of the metric encoder, of its own seed and size, which conditioned nothing (its scale is not
that of OpenAI's CLIP); *found again*: of {scenes} prompts the result's nearest is its own; *own
glyph* and *text's glyph*: as named by a classifier of the seen glyphs, or by the metric encoder,
whose likeliest name it is; *colour error*: of the background's mean along the picture's edge, of
255, and *background error*: place by place; *image's palette*: a colour error under a quarter of
the mean one to another scene; *both*: text's glyph in the image's palette; *outline likeness*:
cosine of oriented gradients on an 8×8 grid; *place error*: of the figure's middle, where 2 is the
picture's side, on the {plain} plain backgrounds; *outline IoU*: of edges widened by a pixel;
*diversity*: 1 − cosine likeness of a scene's pictures, of the first half of the scenes. Sheets show
the first {rows} scenes, the first seed of each; *without*: scale 0; *as flat*: the prompt drawn by
that style's hand.

| # | claim | holds here |
|---|---|---|
{verdicts}

## The rulers

What the same measures say of real pictures.

{rulers}
"""
BOLD = ("no", "undecided")


def page(harness: Harness, claims: Sequence[Claim], budget: str) -> str:
    """Write the page's Markdown from the measured claims.

    budget  what was drawn, how, and in what time
    """
    notes = tomllib.loads(NOTES.read_text())
    parts = []
    for number, claim in enumerate(claims, 1):
        tables = [table if isinstance(table, str) else table.markdown() for table in claim.tables]
        note = notes.get(str(number), {}).get(claim.verdict, "")
        parts.append(f"## {number}. {claim.title}: {claim.verdict}\n\nHolds if {claim.rule}.\n")
        if claim.decides:
            gaps = "; ".join(f"{name}: {shown(gap)}" for name, gap in claim.decides.items())
            parts.append(
                f"What decides{f', of {claim.above:g} or more' if claim.above else ''}: {gaps}.\n"
            )
        parts += [f"{table}\n" for table in tables]
        if note:
            parts.append(f"{note.strip()}\n")
        parts += [f"![{claim.title}](claims/{picture})\n" for picture in claim.pictures]
    verdicts = [
        f"**{claim.verdict}**" if claim.verdict in BOLD else claim.verdict for claim in claims
    ]
    rows = "\n".join(
        f"| {n} | [{c.title}](#{anchor(n, c)}) | {s} |"
        for n, (c, s) in enumerate(zip(claims, verdicts, strict=True), 1)
    )
    head = HEAD.format(
        budget=budget,
        resamples=RESAMPLES,
        scenes=SCENES,
        rows=SHOWN,
        plain=int((harness.scenes.pattern[::SEEDS] == 0).sum()),
        verdicts=rows,
        rulers=rulers(harness).markdown(),
    )
    return head + "\n" + "\n".join(parts)


def anchor(number: int, claim: Claim) -> str:
    """Return the anchor that GitHub derives from a claim's heading."""
    words = f"{number}. {claim.title}: {claim.verdict}".lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def measure_all(world: World) -> None:
    """Measure every claim and write the page.

    Claims run in processes of one thread: more threads hardly speed up models this small.
    """
    harness, count = Harness(world), torch.get_num_threads()
    with ProcessPoolExecutor(count, get_context("spawn"), settle) as pool:
        works = {
            claim: pool.submit(measured, world, claim)
            for claim in sorted(CLAIMS, key=lambda claim: claim is not together)
        }
        results = [works[claim].result() for claim in CLAIMS]
    drawn = {name: seconds for claim in results for name, seconds in claim.drawn.items()}
    budget = (
        f"{SCENES} scenes drawn for this, of one of the glyphs that training has, {SEEDS} seeds "
        f"each ({DIVERSE} for diversity),\n"
        f"DDIM {STEPS} steps, guidance {GUIDANCE:g}; torch {torch.__version__}, "
        f"{sum(drawn.values()) / 60:.0f} minutes of one CPU thread to draw them all."
    )
    with atomic_write(PAGE) as temporary:
        temporary.write_text(page(harness, results, budget))
    print(f"{PAGE} is written")


def settle() -> None:
    """Set up a process of the pool: one thread for the work, and one that watches its parent.

    The process ends when its parent ends, in whatever way that happens.
    """

    def follow() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    torch.set_num_threads(1)
    threading.Thread(target=follow, daemon=True).start()


def measured(world: World, claim: Callable[[Harness], Claim]) -> Claim:
    """Measure one claim, print its tables, and return it with its drawing times."""
    started = time.monotonic()
    harness = Harness(world)
    found = replace(claim(harness), drawn=harness.drawn)
    tables = [table if isinstance(table, str) else table.markdown() for table in found.tables]
    print(
        f"{found.title}: {found.verdict}  ({time.monotonic() - started:.0f} s)",
        *tables,
        sep="\n",
        flush=True,
    )
    return found


def rulers(harness: Harness) -> Table:
    """Measure real pictures: the scenes drawn again and slightly moved, and other scenes."""
    again = moved(harness.scenes, harness.world.generator(102))
    table = Table(list(FIDELITY))
    for name, scenes in (
        ("drawn again, a little moved", again),
        ("another scene", harness.another),
    ):
        table.rows[name] = harness.row(
            harness.measure(render(scenes, harness.glyphs, harness.world.side)), FIDELITY
        )
    return table
