"""Compare two finished runs over the items that both have, with intervals of the differences."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imprompt.errors import SettingError
from imprompt.evaluation import contact
from imprompt.evaluation.contact import (
    Card,
    Thumbnails,
    evenly_spread,
    make_card,
    prompt_picture,
    result_picture,
)
from imprompt.evaluation.metrics import METRICS, Interval, bootstrap_interval, difference
from imprompt.evaluation.page import change, dotted, figures, write_page
from imprompt.evaluation.results import (
    Results,
    Row,
    Setting,
    cluster,
    known,
    label_of,
    mean_of,
    read_results,
    without_folders,
)

PICTURES_OF_ITEM = 2  # pictures of an item by each run
NOTHING = Interval(float("nan"), None, None)


@dataclass(frozen=True)
class Compared:
    """A metric of runs A and B, and B minus A."""

    key: str
    a: Interval
    b: Interval
    more: Interval

    @property
    def verdict(self) -> str:
        """Verdict for B: "better", "worse", "differs" or "".

        It is "better" or "worse" if the interval excludes 0 and the metric has a better side,
        "differs" if neither side is better, and "" if the interval includes 0 or is missing.
        """
        _, low, high = self.more
        if low is None or high is None or low <= 0 <= high:
            return ""
        wanted = METRICS[self.key].higher_is_better
        return (
            "differs"
            if wanted is None
            else "better"
            if (self.more.value > 0) == wanted
            else "worse"
        )


@dataclass(frozen=True)
class Pair:
    """A setting that both runs have: its shared items, and the metrics over them."""

    label: str
    a: Setting
    b: Setting
    items: list[str]
    metrics: list[Compared]


def write_comparison(a: Path, b: Path, out: Path, pictures: Path | None = None) -> Path:
    """Write a page that compares the finished runs in folders `a` and `b`.

    Raise SettingError if they share no setting, item or metric.

    pictures  folder of their set, if it is not where the runs name it
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise SettingError(f"--out {out}: a page is written, so give a name that ends in .html")
    first, second = read_results(a, pictures), read_results(b, pictures)
    pairs = [_pair(first, second, *both) for both in _settings(first, second)]
    pairs = [pair for pair in pairs if pair.items]
    if not pairs:
        raise SettingError(f"{a} and {b} share no item: compare two runs over the same set")
    if not any(pair.metrics for pair in pairs):
        raise SettingError(f"{a} and {b} share no metric: run both with the same judges")
    thumbnails = Thumbnails()
    folders = without_folders(str(a), out.parent), without_folders(str(b), out.parent)
    names = _names(a, b, folders)
    return write_page(
        out,
        "comparison.html.jinja",
        thumbnails,
        title=f"{names[0]} and {names[1]}",
        names=names,
        folders=folders,
        warnings=list(_warnings(first, second, pairs)),
        pairs=pairs,
        figures=figures(_merged(pairs, names)),
        differs=differs(first.run, second.run),
        most=[
            (pair.label, *_most(first, second, pair, thumbnails))
            for pair in evenly_spread(pairs, contact.DETAILED)
        ],
    )


def _settings(a: Results, b: Results) -> list[tuple[Setting, Setting]]:
    """Return the pairs of settings with the same name; SettingError if there are none.

    If each run has only one setting, these are a pair whatever their names.
    """
    others = {setting["name"]: setting for setting in b.settings}
    found = [
        (setting, others[setting["name"]]) for setting in a.settings if setting["name"] in others
    ]
    if not found and len(a.settings) == len(b.settings) == 1:
        found = [(a.settings[0], b.settings[0])]
    if not found:
        runs = " and ".join(f"{label_of(one.settings[0])!r} ({one.folder})" for one in (a, b))
        raise SettingError(
            f"the runs share no setting, such as {runs}: run both with the same --sweep"
        )
    return found


def _pair(first: Results, second: Results, a: Setting, b: Setting) -> Pair:
    ours, theirs = first.rows[a["name"]], second.rows[b["name"]]
    shared = [item for item in ours if item in theirs]
    label = label_of(a) if a["name"] == b["name"] else f"{label_of(a)} and {label_of(b)}"
    if not shared:
        return Pair(label, a, b, [], [])
    compared = [
        _compared(key, ours, theirs, shared)
        for key, metric in METRICS.items()
        if metric.per_picture
    ]
    # distances between whole sets cannot be computed for a part of the items
    whole = len(shared) == len(ours) == len(theirs)
    compared += [
        _of_sets(key, a, b) for key, metric in METRICS.items() if not metric.per_picture and whole
    ]
    return Pair(
        label, a, b, shared, [one for one in compared if known(one.a.value) and known(one.b.value)]
    )


def _compared(
    key: str, a: Mapping[str, list[Row]], b: Mapping[str, list[Row]], shared: list[str]
) -> Compared:
    (values, items, clusters), (others, other_items, other_clusters) = (
        _values(key, rows, shared) for rows in (a, b)
    )
    # items that have the metric in both
    both = torch.as_tensor(sorted({*items.tolist()} & {*other_items.tolist()}))
    if not len(both):
        return Compared(key, NOTHING, NOTHING, NOTHING)
    mine, other = torch.isin(items, both), torch.isin(other_items, both)
    return Compared(
        key,
        bootstrap_interval(values[mine], clusters[mine]),
        bootstrap_interval(others[other], other_clusters[other]),
        difference(others[other], other_clusters[other], values[mine], clusters[mine]),
    )


def _values(
    key: str, rows: Mapping[str, list[Row]], shared: list[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a metric of every picture of the shared items, and its item and cluster, (N,) each.

    Items and clusters are given by their numbers.
    """
    number = {
        name: n
        for n, name in enumerate(
            dict.fromkeys(cluster(row) for item in shared for row in rows[item])
        )
    }
    found = [
        (row[key], place, number[cluster(row)])
        for place, item in enumerate(shared)
        for row in rows[item]
        if known(row.get(key))
    ]
    values, items, clusters = zip(*found, strict=True) if found else ((), (), ())
    return (
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(items, dtype=torch.long),
        torch.tensor(clusters).long(),
    )


def _of_sets(key: str, a: Setting, b: Setting) -> Compared:
    """Compare a distance between sets of pictures.

    It belongs to no single picture, so items cannot be paired and there is no interval.
    """
    ours, theirs = (
        Interval(**one["metrics"][key]) if key in one["metrics"] else NOTHING for one in (a, b)
    )
    if not known(ours.value) or not known(theirs.value):
        return Compared(key, NOTHING, NOTHING, NOTHING)
    return Compared(key, ours, theirs, Interval(theirs.value - ours.value, None, None))


def _warnings(a: Results, b: Results, pairs: list[Pair]) -> Iterator[str]:
    judges = [
        {judge.get("key"): judge.get("sha256") for judge in one.run.get("judges") or []}
        for one in (a, b)
    ]
    changed = [
        str(key) for key in judges[0] if key in judges[1] and judges[0][key] != judges[1][key]
    ]
    if changed:
        which = ", ".join(changed)
        yield f"The judges are not the same ({which}): what they measured cannot be compared."
    if (a.run.get("set") or {}).get("sha256") != (b.run.get("set") or {}).get("sha256"):
        yield "The sets are not the same: items are matched by their names."
    if any(len(pair.items) < max(pair.a["items"], pair.b["items"]) for pair in pairs):
        counts = ", ".join(sorted({f"{len(pair.items):,}" for pair in pairs}))
        yield (
            f"Only the {counts} items that both have are compared; distances between whole sets "
            "are left out."
        )
    yield from dict.fromkeys(filter(None, (a.unseen, b.unseen)))


def _names(a: Path, b: Path, shown: tuple[str, str]) -> tuple[str, str]:
    """Return the folders' names, or the paths that are shown if the names are equal."""
    names = a.resolve().name, b.resolve().name
    return names if names[0] != names[1] else shown


def _merged(pairs: list[Pair], names: tuple[str, str]) -> list[Setting]:
    """Return the settings of both runs as those of one sweep, with the run as a further axis."""
    return [
        {
            "name": f"{pair.label} {name}",
            "axes": {**(setting["axes"] if len(pairs) > 1 else {}), "run": f"{side} {name}"},
            "metrics": {one.key: getattr(one, side.lower())._asdict() for one in pair.metrics},
        }
        for side, name in zip("AB", names, strict=True)
        for pair in pairs
        for setting in (pair.a,)
    ]


def differs(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (dotted name, A's value, B's value) of what differs between two run.json."""
    ours, theirs = dotted(a), dotted(b)
    return [
        (key, ours.get(key, "–"), theirs.get(key, "–"))
        for key in dict.fromkeys((*ours, *theirs))
        if ours.get(key) != theirs.get(key)
    ]


def _most(
    first: Results, second: Results, pair: Pair, thumbnail: Thumbnails
) -> tuple[str, list[Card], list[Card]]:
    """Return (metric, items where B is most above A, items where B is most below A).

    The items with the greatest difference come first.
    """
    ours, theirs = first.rows[pair.a["name"]], second.rows[pair.b["name"]]
    key = next((one.key for one in pair.metrics if METRICS[one.key].per_picture), "clip_i")
    both = ((item, mean_of(ours[item], key), mean_of(theirs[item], key)) for item in pair.items)
    apart = sorted(
        (other - mine, item) for item, mine, other in both if mine is not None and other is not None
    )

    def cards(chosen: list[tuple[float, str]]) -> list[Card]:
        return [
            make_card(
                ours[item][0],
                [
                    prompt_picture(first, ours[item][0], thumbnail),
                    *(
                        result_picture(first, row, f"A, seed {row['seed']}", thumbnail)
                        for row in ours[item][:PICTURES_OF_ITEM]
                    ),
                    *(
                        result_picture(second, row, f"B, seed {row['seed']}", thumbnail)
                        for row in theirs[item][:PICTURES_OF_ITEM]
                    ),
                ],
                f"{METRICS[key].title} {change(gap, key)}",
            )
            for gap, item in chosen
        ]

    above, below = [one for one in apart[::-1] if one[0] > 0], [one for one in apart if one[0] < 0]
    return METRICS[key].title, cards(above[: contact.EXTREMES]), cards(below[: contact.EXTREMES])
