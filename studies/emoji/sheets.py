"""Contact sheets and curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from imprompt.evaluation.metrics import Interval
from imprompt.images import grid
from worlds.emoji.scenes import to_image

CELL = 112  # pixels of a cell of a sheet
LABEL = 20  # pixels of a line of labels


def draw_sheet(
    path: Path, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Tensor]]]
) -> None:
    """Draw pictures in rows under their columns' labels, and save the sheet.

    A row's own label is drawn below it, if there is one.
    """
    font, pitch = ImageFont.load_default(12), CELL + 6
    head = font.font_variant(
        size=min(12.0, 12 * (CELL - 4) / max(1.0, *map(font.getlength, columns)))
    )
    height = CELL + 6 + (LABEL if any(label for label, _ in rows) else 0)
    page = Image.new("RGB", (len(columns) * pitch - 6, LABEL + len(rows) * height - 6), "white")
    pen = ImageDraw.Draw(page)
    for column, label in enumerate(columns):
        pen.text((column * pitch + 2, 3), label, "black", head)
    for row, (label, pictures) in enumerate(rows):
        top = LABEL + row * height
        for column, picture in enumerate(pictures):
            cell = to_image(picture).resize((CELL, CELL), Image.Resampling.LANCZOS)
            page.paste(cell, (column * pitch, top))
        pen.text((2, top + CELL + 3), label, "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, quality=86, optimize=True)


def sheet(prompts: Tensor, made: Tensor, path: Path, pairs: int = 24, columns: int = 6) -> None:
    """Draw pairs of prompt and result side by side, and save the sheet."""
    cells = [
        to_image(torch.cat(pair, 2)) for pair in zip(prompts[:pairs], made[:pairs], strict=True)
    ]
    grid(cells, columns=columns, gap=6).save(path, quality=88)


def draw_curves(
    path: Path,
    along: str,
    xs: Sequence[float],
    panels: Mapping[str, Mapping[str, Sequence[Interval]]],
) -> None:
    """Draw a panel for each measure, with a line and its band of intervals for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(panels), 3.2), layout="constrained")
    for axes, (measure, lines) in zip(
        figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True
    ):
        for (name, points), marker in zip(lines.items(), "osD^vP", strict=False):
            axes.plot(xs, [point.value for point in points], marker=marker, label=name)
            lows, highs = zip(
                *((point.low or 0.0, point.high or 0.0) for point in points), strict=True
            )
            axes.fill_between(xs, lows, highs, alpha=0.18, linewidth=0)
        axes.set_title(measure)
        axes.set_xlabel(along)
        axes.set_xticks(xs)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
