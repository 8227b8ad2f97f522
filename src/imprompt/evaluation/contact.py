"""Choose the pictures of a page and embed them in it as thumbnails.

The choice follows fixed rules, which the page states.
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

SIDE = 160  # most pixels of a picture's longer side
ITEMS = 24  # most items of a contact sheet
PICTURES = 600  # most pictures of a contact sheet
COLUMNS = 48  # most settings of a contact sheet
# best and worst items of a setting, settings, pictures of an item
EXTREMES, DETAILED, SEEDS = (4, 6, 4)
MISSING = 50  # most missing pictures that a page names
T = TypeVar("T")


@dataclass(frozen=True)
class CardPicture:
    """A thumbnail as a data URI, with its label, a note below, and a description in words.

    `uri` is None if the picture cannot be read.
    """

    uri: str | None
    label: str
    alt: str
    note: str = ""
    reference: bool = False


@dataclass(frozen=True)
class Card:
    """An item: its image prompt, then the pictures that were made from it."""

    name: str
    group: str
    caption: str
    pictures: list[CardPicture]
    note: str = ""


@dataclass
class Thumbnails:
    """Thumbnails of files, each made once; `missing` holds, by path, why one cannot be shown."""

    missing: dict[str, str] = field(default_factory=dict)
    made: dict[Path, str | None] = field(default_factory=dict)

    def __call__(self, path: Path) -> str | None:
        """Return the thumbnail of a file as a data URI, or None if it cannot be read."""
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
    """Return at most `count` of the things at even distances, including the first."""
    count = min(count, len(things))
    return [things[index * len(things) // count] for index in range(count)]


def prompt_picture(results: Results, row: Row, thumbnail: Thumbnails) -> CardPicture:
    """Return the first image prompt of an item."""
    return CardPicture(
        thumbnail(results.pictures / row["reference"]),
        "image prompt",
        f"image prompt of {row['item']}",
        reference=True,
    )


def result_picture(results: Results, row: Row, label: str, thumbnail: Thumbnails) -> CardPicture:
    """Return the picture of a row under a label, with its CLIP-I as a note."""
    note = f"CLIP-I {row['clip_i']:.3f}" if mean_of([row], "clip_i") is not None else ""
    return CardPicture(
        thumbnail(results.folder / row["image"]),
        label,
        f"{row['item']}, {label}, seed {row['seed']}",
        note,
    )


def make_card(row: Row, pictures: Iterable[CardPicture], note: str = "") -> Card:
    """Return the card of an item; `row` is any of its rows."""
    return Card(row["item"], row.get("group") or "", row.get("caption") or "", list(pictures), note)


def sheet_items(settings: int) -> int:
    """Return how many items a contact sheet shows, so that its size stays limited."""
    return max(1, min(ITEMS, PICTURES // (min(settings, COLUMNS) + 1)))


def sheet_seeds(settings: int) -> int:
    """Return how many pictures of an item each setting shows: more if there are few settings."""
    return max(1, 6 // settings)


def contact_sheet(results: Results, thumbnail: Thumbnails) -> list[Card]:
    """Return items spread evenly over the set, with every setting's pictures of the first seeds."""
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
            prompt_picture(results, first, thumbnail),
            *(result_picture(results, *one, thumbnail) for one in picked),
        ],
    )


def ranked(rows: Mapping[str, list[Row]], key: str = "clip_i") -> list[tuple[float, str]]:
    """Return (mean of the metric, item) of all items that have the metric, the highest first."""
    means = [(mean_of(of_item, key), item) for item, of_item in rows.items()]
    return sorted(
        ((mean, item) for mean, item in means if mean is not None),
        key=lambda one: (-one[0], one[1]),
    )


def extremes(
    results: Results, setting: Setting, thumbnail: Thumbnails
) -> tuple[list[Card], list[Card]]:
    """Return the items with the highest and those with the lowest mean CLIP-I, extremes first.

    No item is in both.
    """
    rows = results.rows[setting["name"]]
    order = ranked(rows)
    count = min(EXTREMES, len(order) // 2)

    def cards(chosen: list[tuple[float, str]]) -> list[Card]:
        return [
            make_card(
                rows[item][0],
                [
                    prompt_picture(results, rows[item][0], thumbnail),
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
