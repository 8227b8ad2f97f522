"""Folders of the measuring models, the held-out set and the reports."""

from pathlib import Path

STUDIES = Path(__file__).parent
ROOT = STUDIES.parents[1]
WEIGHTS = STUDIES / "weights"
METRIC_ENCODER = WEIGHTS / "metric-encoder"
GLYPH_CLASSIFIER = WEIGHTS / "glyph-classifier"
STYLE_CLASSIFIER = WEIGHTS / "style-classifier"
HELD_OUT = STUDIES / "held-out"
DOCS = ROOT / "docs"
REPORTS = DOCS / "reports"  # files that commands write completely
