"""Measure what the packaged model can do: `python -m studies.emoji STAGE`.

"all" makes the model first, by every stage of `python -m worlds.emoji`.
"""

from worlds.emoji.stages import MAKING, Stage, main
from worlds.emoji.train_utils import BUDGETS

from .paths import STUDIES

STAGES = {
    "metric-encoder": Stage("studies.emoji.metric_encoder:train", seed_offset=1000),
    "glyph-classifier": Stage("studies.emoji.classifiers:train_glyphs", seed_offset=2000),
    "style-classifier": Stage("studies.emoji.classifiers:train_styles", seed_offset=2000),
    "held-out": Stage("studies.emoji.held_out:held_out"),
    "probes": Stage("studies.emoji.probes:probe"),
    "evaluate": Stage("studies.emoji.evaluate:evaluate"),
    "transformers": Stage("studies.emoji.evaluate:evaluate_transformers", in_all=False),
    "compose": Stage("studies.emoji.compose:compose", in_all=False),
    "blind": Stage("studies.emoji.blind:blind", in_all=False),
    "optimizers": Stage("studies.emoji.optimizers:compare", in_all=False),
    "identities": Stage("studies.emoji.identities:measure", in_all=False),
    "baselines": Stage("studies.emoji.baselines:train_all", in_all=False),
    "claims": Stage("studies.emoji.page:measure_all", in_all=False),
}

if __name__ == "__main__":
    main(
        "python -m studies.emoji",
        __doc__,
        STAGES,
        before=MAKING,
        budgets=(BUDGETS, STUDIES / "budgets.toml"),
    )
