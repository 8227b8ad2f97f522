"""Draw plots as SVG for a page, one panel each, so that the page can arrange them.

Colours and font are the page's (CSS variables), so a plot follows its light and dark look; text
stays text.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

from imprompt.errors import SettingError
from imprompt.evaluation.metrics import METRICS
from imprompt.evaluation.results import Setting, axes_of, axis_values, known, label_of, word

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 4.4, 3.3  # inches of 72 units; the page scales it to its column
# matplotlib's colours -> the page's
INK, FAINT = "#010101", "#020202"
LINES = [f"#0{number}0{number}0{number}" for number in range(3, 9)]
COLORS = {INK: "var(--ink)", FAINT: "var(--line)"} | {
    line: f"var(--plot-{number})" for number, line in enumerate(LINES)
}
# offsets of labels, as lines are often close to each other
CORNERS = [{"xytext": (5, 4), "ha": "left"}, {"xytext": (-5, -11), "ha": "right"}]
DASHES, MARKERS = ("-", "--", ":", "-."), "osD^vP"
STYLE: Any = {
    "font.family": ["DejaVu Sans"],  # matplotlib's own, with which it measures text
    "font.size": 10,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with dollar signs is not a formula
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "grid.color": FAINT,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
Line = tuple[str, list[Setting]]  # its name, its settings along the axis


def curve(settings: list[Setting], key: str, axis: str) -> str:
    """Draw a metric over a numeric axis, with the band of its intervals, as SVG.

    There is a line for each combination of the other axes' values.
    """

    def draw(axes: "Axes") -> None:
        for number, (name, line) in enumerate(_lines(settings, axis)):
            points = [
                (setting["axes"][axis], setting["metrics"][key])
                for setting in line
                if _has(setting, key)
            ]
            color = LINES[number % len(LINES)]
            axes.plot(
                [x for x, _ in points],
                [y["value"] for _, y in points],
                **_stroke(number),
                label=name,
            )
            banded = [
                (x, y["low"], y["high"]) for x, y in points if known(y["low"]) and known(y["high"])
            ]
            if banded:
                xs, lows, highs = zip(*banded, strict=True)
                axes.fill_between(xs, lows, highs, color=color, alpha=0.18, linewidth=0)
        axes.set_xlabel(axis)
        _ticks(axes, axis_values(settings, axis))

    return _panel(METRICS[key].title, f"{METRICS[key].title} over {axis}", draw)


def trade(settings: list[Setting], across: str, up: str, axis: str) -> str:
    """Draw one metric against another, with both intervals, as SVG.

    The points are joined and labelled along a numeric axis.
    """

    def draw(axes: "Axes") -> None:
        for number, (name, line) in enumerate(_lines(settings, axis)):
            line = [setting for setting in line if _has(setting, across) and _has(setting, up)]
            xs, ys = (
                [setting["metrics"][key]["value"] for setting in line] for key in (across, up)
            )
            axes.plot(xs, ys, **_stroke(number), label=name)
            axes.errorbar(
                xs,
                ys,
                xerr=_reaches(line, across),
                yerr=_reaches(line, up),
                fmt="none",
                ecolor=LINES[number % len(LINES)],
                elinewidth=1,
                alpha=0.5,
            )
            corner: dict[str, Any] = CORNERS[number % 2]
            for x, y, setting in zip(xs, ys, line, strict=True) if number < 2 else ():
                # labels of more lines would overlap
                axes.annotate(
                    word(setting["axes"][axis]),
                    (x, y),
                    textcoords="offset points",
                    fontsize=9,
                    **corner,
                )
        axes.set_xlabel(METRICS[across].title)
        axes.set_ylabel(METRICS[up].title)
        axes.margins(0.12)

    title = f"{METRICS[up].title} against {METRICS[across].title}"
    return _panel(title, f"{title}; points labelled by {axis}", draw)


def dots(settings: list[Setting], key: str) -> str:
    """Draw a metric of every setting as a dot with its interval, the first on top, as SVG."""
    having = [setting for setting in settings if _has(setting, key)]

    def draw(axes: "Axes") -> None:
        rows = range(len(having))
        axes.errorbar(
            [setting["metrics"][key]["value"] for setting in having],
            rows,
            xerr=_reaches(having, key),
            fmt="o",
            color=LINES[0],
            elinewidth=2,
        )
        axes.set_yticks(rows, [word(_short(setting), 28) for setting in having])
        axes.invert_yaxis()
        axes.margins(0.1, 0.5 / max(1, len(having)))
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=4)

    def _short(setting: Setting) -> str:
        varied = axes_of(settings)
        return " · ".join(word(setting["axes"].get(name), 28) for name in varied) or label_of(
            setting
        )

    return _panel(
        METRICS[key].title,
        f"{METRICS[key].title} by setting",
        draw,
        height=max(1.6, 1 + 0.3 * len(having)),
    )


def drawable(settings: list[Setting], key: str) -> bool:
    """Return whether at least one setting has the metric."""
    return any(_has(setting, key) for setting in settings)


def _has(setting: Setting, key: str) -> bool:
    return known(setting["metrics"].get(key, {}).get("value"))


def _lines(settings: list[Setting], axis: str) -> Iterator[Line]:
    """Yield the settings along an axis, in its order, for each combination of the other axes."""
    others = [name for name in axes_of(settings) if name != axis]
    for values in product(*(axis_values(settings, name) for name in others)):
        wanted = dict(zip(others, values, strict=True))
        line = [
            one
            for one in settings
            if all(one["axes"].get(name) == value for name, value in wanted.items())
        ]
        if line:
            name = " · ".join(f"{name} {word(value, 24)}" for name, value in wanted.items())
            yield name, sorted(line, key=lambda setting: setting["axes"][axis])


def _stroke(number: int) -> dict[str, Any]:
    """Return colour, dash and marker of a line, so that lines also differ without colours."""
    return {
        "color": LINES[number % len(LINES)],
        "linestyle": DASHES[number // len(LINES) % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def _reaches(settings: list[Setting], key: str) -> list[list[float]]:
    """Return how far the interval reaches below and above each value, (2, settings).

    It is 0 if there is no interval.
    """
    found = [setting["metrics"][key] for setting in settings]
    bounds = [(one["value"], one["low"], one["high"]) for one in found]
    return [
        [max(0.0, value - low) if known(low) else 0.0 for value, low, _ in bounds],
        [max(0.0, high - value) if known(high) else 0.0 for value, _, high in bounds],
    ]


def _ticks(axes: "Axes", values: list[float]) -> None:
    """Put a tick at every value that was run, if they are few and not crowded."""
    values = sorted(values)
    closest = min(after - before for before, after in pairwise(values))
    if len(values) <= 11 and closest >= (values[-1] - values[0]) / 14:
        axes.set_xticks(values, [word(value) for value in values])


def _panel(
    title: str, description: str, draw: "Callable[[Axes], None]", height: float = HEIGHT
) -> str:
    """Return what `draw` draws as an SVG that the page colours.

    `description` is its text for readers who cannot see it.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingError(
            "plots are drawn by matplotlib: pip install 'imprompt[evaluate]'"
        ) from error

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": description}), warnings.catch_warnings():
        # an emoji in a name: the browser has a font for it, matplotlib has none
        warnings.filterwarnings("ignore", "Glyph")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(title=title)
        draw(axes)
        if any(axes.get_legend_handles_labels()[1]):
            figure.legend(loc="outside lower left", ncols=2)
            figure.set_figheight(
                height + 0.19 * max(0, (len(axes.get_legend_handles_labels()[1]) - 3) // 2)
            )
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    return _for_page(file.getvalue(), description)


def _for_page(svg: str, description: str) -> str:
    """Adapt an SVG to the page: remove its size, ids and font, and use the page's colours."""
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r'(<svg [^>]*?) height="[\d.]+pt"',
        r"\1",
        re.sub(r'(<svg [^>]*?) width="[\d.]+pt"', r"\1", svg),
    )
    # a style element would apply to the whole page
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # the same in every plot: figure_1, axes_1, …
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)
    svg = re.sub("|".join(COLORS), lambda found: COLORS[found[0]], svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
