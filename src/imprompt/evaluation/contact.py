"""The pictures of a page: which are shown, small, and inside it.

The choice follows fixed rules, which the page tells.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from imprompt.errors import ImageError
from imprompt.evaluation.results import Results, Row, Setting, label_of, mean_of
from imprompt.images import open_image

SIDE = 160  # pixels of a picture's longer side, at most
ITEMS = 24  # of a contact sheet, at most
PICTURES = 600  # of a contact sheet, at most
COLUMNS = 48  # settings of a contact sheet, at most
# best and worst items of a setting, settings, pictures of an item
EXTREMES, DETAILED, SEEDS = (4, 6, 4)
MISSING = 50  # that a page names
T = TypeVar("T")


@dataclass(frozen=True)
class CardPicture:
    """A small picture as a data URI (None where it cannot be read), its label, a number below, and
    what it shows in words.
    """

    uri: str | None
    label: str
    alt: str
    note: str = ""
    reference: bool = False


@dataclass(frozen=True)
class Card:
    """An item: the picture to prompt with, then what became of it."""

    name: str
    group: str
    caption: str
    pictures: list[CardPicture]
    note: str = ""


@dataclass
class Thumbnails:
    """Makes pictures small; `missing` holds why each that cannot be shown is not, by its path."""

    missing: dict[str, str] = field(default_factory=dict)
    made: dict[Path, str | None] = field(default_factory=dict)

    def __call__(self, path: Path) -> str | None:
        if path not in self.made:
            try:
                self.made[path] = _data_uri(path)
            except ImageError as error:
                self.made[path], self.missing[str(path)] = None, str(error)
        return self.made[path]


def _data_uri(path: Path) -> str:
    picture = open_image(path)
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=82)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def evenly_spread(things: Sequence[T], count: int) -> list[T]:
    """At most `count` of them at even distances, the first among them."""
    count = min(count, len(things))
    return [things[index * len(things) // count] for index in range(count)]


def prompt_picture(row: Row, thumbnail: Thumbnails) -> CardPicture:
    """The first picture that an item was prompted with."""
    return CardPicture(
        thumbnail(Path(row["reference"])),
        "image prompt",
        f"image prompt of {row['item']}",
        reference=True,
    )


def result_picture(results: Results, row: Row, label: str, thumbnail: Thumbnails) -> CardPicture:
    note = f"CLIP-I {row['clip_i']:.3f}" if mean_of([row], "clip_i") is not None else ""
    return CardPicture(
        thumbnail(results.folder / row["image"]),
        label,
        f"{row['item']}, {label}, seed {row['seed']}",
        note,
    )


def make_card(row: Row, pictures: Iterable[CardPicture], note: str = "") -> Card:
    """`row`: any of the item's."""
    return Card(row["item"], row.get("group") or "", row.get("caption") or "", list(pictures), note)


def sheet_items(settings: int) -> int:
    """How many items a contact sheet shows, so that it stays of a bearable size."""
    return max(1, min(ITEMS, PICTURES // (min(settings, COLUMNS) + 1)))


def sheet_seeds(settings: int) -> int:
    """How many pictures of an item it shows by each setting: more where there are few settings."""
    return max(1, 6 // settings)


def contact_sheet(results: Results, thumbnail: Thumbnails) -> list[Card]:
    """Items spread evenly over the set, by every setting with the first seeds."""
    settings = evenly_spread(results.settings, COLUMNS)
    items = list(
        dict.fromkeys(item for setting in settings for item in results.rows[setting["name"]])
    )
    return [
        _card(results, settings, item, thumbnail)
        for item in evenly_spread(items, sheet_items(len(settings)))
    ]


def _card(results: Results, settings: list[Setting], item: str, thumbnail: Thumbnails) -> Card:
    seeds = sheet_seeds(len(settings))
    picked = [
        (row, label_of(setting) if setting["axes"] or seeds == 1 else f"seed {row['seed']}")
        for setting in settings
        for row in results.rows[setting["name"]].get(item, [])[:seeds]
    ]
    first = picked[0][0]
    return make_card(
        first,
        [
            prompt_picture(first, thumbnail),
            *(result_picture(results, *one, thumbnail) for one in picked),
        ],
    )


def ranked(rows: Mapping[str, list[Row]], key: str = "clip_i") -> list[tuple[float, str]]:
    """(mean of the metric, item), the best first."""
    means = [(mean_of(of_item, key), item) for item, of_item in rows.items()]
    return sorted(
        ((mean, item) for mean, item in means if mean is not None),
        key=lambda one: (-one[0], one[1]),
    )


def extremes(
    results: Results, setting: Setting, thumbnail: Thumbnails
) -> tuple[list[Card], list[Card]]:
    """The items with the highest and with the lowest mean CLIP-I, the extreme first.

    None is in both.
    """
    rows = results.rows[setting["name"]]
    order = ranked(rows)
    count = min(EXTREMES, len(order) // 2)

    def cards(chosen: list[tuple[float, str]]) -> list[Card]:
        return [
            make_card(
                rows[item][0],
                [
                    prompt_picture(rows[item][0], thumbnail),
                    *(
                        result_picture(results, row, f"seed {row['seed']}", thumbnail)
                        for row in rows[item][:SEEDS]
                    ),
                ],
                f"mean CLIP-I {mean:.3f}",
            )
            for mean, item in chosen
        ]

    return cards(order[:count]), cards(order[::-1][:count])
