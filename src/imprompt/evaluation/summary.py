"""Write rows.jsonl and summary.json from all chunks: means, intervals, distances."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from imprompt.evaluation.metrics import (
    METRICS,
    SUBSET_SIZE,
    Interval,
    bootstrap_interval,
    frechet_distance,
    kernel_distances,
)
from imprompt.evaluation.parts import damaged, lines_of_json, read_rows, write_text
from imprompt.evaluation.plan import Chunk
from imprompt.evaluation.results import Row, Setting, cluster, without_folders


def gather(out: Path, chunks: Sequence[Chunk], run: dict[str, Any]) -> dict[str, Any]:
    """Write rows.jsonl and summary.json of a run whose chunks are complete; return the summary.

    They are in the order of the run's settings.
    """
    rows, settings, notes = [], [], {}
    for setting, group in groupby(chunks, key=lambda chunk: chunk.setting):
        own = list(group)
        mine = [row for chunk in own for row in read_rows(chunk)]
        metrics = {name: interval._asdict() for name, interval in of_rows(mine)}
        if run["features"] is not None:
            real, made = features_of(own, run["features"])
            if apart := dict(distances(real, made)):
                metrics |= {name: interval._asdict() for name, interval in apart.items()}
                notes |= dict.fromkeys(notes_on(real, made, run["features"]))
        rows += mine
        items = len({row["item"] for row in mine})
        settings.append(
            {
                "name": setting.name,
                "axes": without_folders(setting.axes, out),
                "count": len(mine),
                "items": items,
                "metrics": metrics,
            }
        )
    number_equal(settings)
    text = lines_of_json(rows)
    hashes = {"rows.jsonl": sha256(text.encode()).hexdigest()}
    summary = {"run": run, "settings": settings, "notes": [*notes], "sha256": hashes}
    write_text(out / "rows.jsonl", text)
    write_text(out / "summary.json", json.dumps(summary, indent=1))
    return summary


def number_equal(settings: Sequence[Setting]) -> None:
    """Tell adapters of equal names apart, by a number, in the axes of settings."""
    often: Counter[str] = Counter()
    for one in settings:
        axes = json.dumps(one["axes"])
        often[axes] += 1
        if often[axes] > 1:
            one["axes"]["adapter"] += f" ({often[axes]})"


def of_rows(rows: Sequence[Row]) -> Iterable[tuple[str, Interval]]:
    """Yield the mean of every metric of single pictures, over the pictures that have it."""
    number = {name: index for index, name in enumerate(dict.fromkeys(map(cluster, rows)))}
    for name, metric in METRICS.items():
        scored = [(row[name], number[cluster(row)]) for row in rows if name in row]
        if metric.per_picture and scored:
            values, items = zip(*scored, strict=True)
            yield (
                name,
                bootstrap_interval(torch.tensor(values, dtype=torch.float64), torch.tensor(items)),
            )


def features_of(chunks: Sequence[Chunk], key: str) -> tuple[Tensor, Tensor]:
    """Return features of all targets (R, D), of each file once, and of all pictures (N, D)."""
    real: dict[Path, Tensor] = {}
    made = []
    for chunk in chunks:
        try:
            held = load_file(chunk.embeddings)
            targets = [path for item in chunk.items for path in item.targets]
            real |= zip(targets, held[f"{key}.targets"], strict=True)
            made.append(held[key])
        except (OSError, SafetensorError, LookupError, ValueError) as error:
            raise damaged(chunk.embeddings, chunk) from error
    return torch.stack([*real.values()]), torch.cat(made)


def distances(real: Tensor, made: Tensor) -> Iterable[tuple[str, Interval]]:
    """Yield FID and KID × 1000, if there are two pictures of each.

    FID has no interval, because resampling would raise it. KID's is where 95 % of its subsets'
    values lie.
    """
    if min(len(real), len(made)) < 2:
        return
    yield "fid", Interval(frechet_distance(real, made), None, None)
    apart = 1000 * kernel_distances(real, made)
    whole = min(len(real), len(made)) <= SUBSET_SIZE  # a subset is then a whole set
    low, high = (None, None) if whole else apart.quantile(apart.new_tensor([0.025, 0.975])).tolist()
    yield "kid", Interval(apart.mean().item(), low, high)


def notes_on(real: Tensor, made: Tensor, key: str) -> Iterable[str]:
    """Yield notes on how FID and KID may be read."""
    if key != "inception":
        yield (
            f"FID and KID are of {key.upper()}'s features: not to be compared with published "
            "numbers, which are of Inception's"
        )
    count, width = min(len(real), len(made)), made.shape[1]
    if count <= width:
        yield (
            f"FID of {count:,} pictures is far too high, as a feature has {width:,} dimensions; "
            "KID only scatters"
        )
