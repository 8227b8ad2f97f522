"""Run an evaluation: make and measure pictures chunk by chunk, on one process or many.

The same command again resumes a run that ended early.

OUT/run.json       what is run: everything that the numbers depend on
    parts/         for the chunks of every setting: the rows, the embeddings of its pictures and of
                   their targets, and the hashes of both
    images/        the pictures
    rows.jsonl     all rows
    summary.json   means and intervals

A chunk has the same items and the same batches in whichever process it is made, so neither a kill
nor the number of processes changes a number. Its rows are written last: a chunk with rows is
complete. What was deleted since is made again; what was changed since is refused.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from PIL.Image import Image
from torch import Tensor

from imprompt.checkpoints.tensors import flat, some
from imprompt.errors import ImpromptError, SettingError, first_line
from imprompt.evaluation.generator import Generator, reference_of
from imprompt.evaluation.metric_encoders import PHOTO, MetricEncoder, open_judges
from imprompt.evaluation.metrics import clip_score, cosine, diversity
from imprompt.evaluation.names import unique_names
from imprompt.evaluation.parts import is_complete, write_chunk, write_text
from imprompt.evaluation.plan import Chunk, Plan, chunks_of
from imprompt.evaluation.protocols import settings_of
from imprompt.evaluation.results import without_folders
from imprompt.evaluation.sets import EvaluationSet, Item, open_set, set_facts
from imprompt.evaluation.summary import gather
from imprompt.files import check_folder, lock_folder, refuse_inputs
from imprompt.generation.pipeline import check_device, default_device
from imprompt.generation.record import recorded_path
from imprompt.generation.settings import Settings
from imprompt.images import open_image
from imprompt.training.endings import end_of_another
from imprompt.untrusted import StoredTable, parse_json, read_json

PATIENCE = timedelta(hours=2)  # how long processes wait for the slowest
PLACES = ("path", "source", "base", "name")  # of what has a hash beside them in run.json
DIGITS = 6  # decimal places of a row's numbers
OnDone = Callable[[int, int], None]  # (finished chunks of this process, all of its chunks)


def evaluate(plan: Plan, on_done: OnDone | None = None) -> dict[str, Any]:
    """Make and measure what is missing, and return the summary.

    The first process writes the summary at the end; others return {}. Errors are raised before
    anything is made: SettingError, also if `plan.out` holds a run of other settings, ImageError,
    CheckpointError or MismatchError.
    """
    from accelerate import PartialState

    settings = settings_of(plan.protocol, plan.sweep)
    check_folder(plan.out)
    refuse_inputs(plan.out, [plan.path])
    whole = open_set(plan.path, plan.kind, plan.protocol.limit, skip_bad=plan.skip_bad)
    device_name = check_device(plan.device) if plan.device else default_device()
    ranks = PartialState(cpu=device_name == "cpu", timeout=PATIENCE)
    device = str(ranks.device) if device_name == "cuda" and ranks.num_processes > 1 else device_name
    if threads := plan.threads or (read_record(plan.out) or {}).get("threads"):
        # as the run was started: another number of threads changes the rounding of sums
        torch.set_num_threads(threads)
    sources = {"clip": plan.clip, "dino": plan.dino, "inception": plan.inception}
    judges = open_judges(sources, check_device(plan.judge_device) if plan.judge_device else device)
    if not judges:
        raise SettingError("no judge is left to measure with: give --clip, --dino or --inception")
    maker = Generator(plan, device)
    for setting in settings:
        maker.check(setting)
    run = record(plan, whole, maker, judges, device)
    check_same(plan.out, run)
    with explained_interruption(plan.out):
        ranks.wait_for_everyone()  # all processes check before the first one writes
        lock = begin(plan.out, run) if ranks.is_main_process else None
        # left-over files are removed before any process writes new ones
        ranks.wait_for_everyone()
        try:
            chunks = chunks_of(plan, settings, whole.items)
            mine = chunks[ranks.process_index :: ranks.num_processes]
            work(mine, plan, maker, Measure(judges, whole.path), on_done)
            ranks.wait_for_everyone()
            summary = gather(plan.out, chunks, run) if ranks.is_main_process else {}
            ranks.wait_for_everyone()
        finally:
            if lock is not None:
                lock.release()
    return summary


def work(
    mine: Sequence[Chunk], plan: Plan, maker: Generator, measure: "Measure", on_done: OnDone | None
) -> None:
    """Make, measure and write the chunks that are missing, grouped by adapter."""
    missing = sorted(
        (chunk for chunk in mine if not is_complete(plan.out, chunk)),
        key=lambda chunk: chunk.setting.adapter or "",
    )
    for done, chunk in enumerate(missing, len(mine) - len(missing)):
        if on_done:
            on_done(done, len(mine))
        pictures = maker.make(chunk.setting, chunk.items, chunk.first)
        rows, embeddings = measure(chunk, pictures)
        write_chunk(plan.out, chunk, rows, embeddings, pictures)
    if on_done:
        on_done(len(mine), len(mine))


class Measure:
    """Computation of rows and embeddings of chunks.

    A target is embedded once, alone, so that no number depends on what came before. Rows name image
    prompts from the set's folder `root`.
    """

    def __init__(self, judges: Mapping[str, MetricEncoder], root: Path) -> None:
        self.judges, self.root = judges, root
        self._targets: dict[tuple[str, Path], Tensor] = {}

    def __call__(
        self, chunk: Chunk, pictures: Sequence[Image]
    ) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Return the rows of a chunk's pictures, and embeddings of pictures and targets by name."""
        each = len(pictures) // len(chunk.items)
        made = {key: judge.images(pictures) for key, judge in self.judges.items()}
        targets = {key: [self.targets(key, item) for item in chunk.items] for key in self.judges}
        rows = []
        for number, item in enumerate(chunk.items):
            own = {key: embeddings[number * each :][:each] for key, embeddings in made.items()}
            columns = self.columns(item, own, {key: of[number] for key, of in targets.items()})
            for k in range(each):
                seed = chunk.setting.protocol.seed + (chunk.first + number) * each + k
                rows.append(
                    {
                        "setting": chunk.setting.name,
                        "item": item.name,
                        "group": item.group,
                        "number": k,
                        "seed": seed,
                        "caption": item.caption,
                        "image": f"images/{chunk.setting.name}/{item.name}-{seed}.png",
                        "reference": recorded_path(reference_of(item, k), self.root).as_posix(),
                        **{key: round(values[k].item(), DIGITS) for key, values in columns.items()},
                    }
                )
        return rows, made | {f"{key}.targets": torch.cat(of) for key, of in targets.items()}

    def targets(self, key: str, item: Item) -> Tensor:
        """Return the embeddings (T, E) of an item's targets."""
        for path in item.targets:
            if (key, path) not in self._targets:
                self._targets[key, path] = self.judges[key].images([open_image(path)])
        return torch.cat([self._targets[key, path] for path in item.targets])

    def columns(
        self, item: Item, made: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the metrics of an item's K pictures, (K,) each.

        A metric is left out if its encoder or the caption is missing.
        """
        scores = {}
        for name, key in (("clip_i", "clip"), ("dino", "dino")):
            if key in made:
                scores[name] = cosine(made[key][:, None], targets[key][None]).mean(1)
        clip = self.judges.get("clip")
        if clip is not None and clip.texts is not None and item.caption:
            for name, prefix in (("", ""), ("_photo", PHOTO)):
                scores[f"clip_t{name}"] = cosine(made["clip"], clip.texts([prefix + item.caption]))
                scores[f"clip_score{name}"] = clip_score(scores[f"clip_t{name}"])
        if clip is not None and len(made["clip"]) > 1:
            scores["diversity"] = diversity(made["clip"])
        return scores


def record(
    plan: Plan,
    whole: EvaluationSet,
    maker: Generator,
    judges: Mapping[str, MetricEncoder],
    device: str,
) -> dict[str, Any]:
    """Return the content of run.json: everything that the numbers depend on.

    Files and folders are named from the run's folder, or by their names alone, beside their hashes.
    """
    import diffusers
    import transformers

    from imprompt import __version__

    made = maker.facts()
    resolved = maker.pipe.resolve(
        Settings(steps=plan.protocol.steps, guidance=plan.protocol.guidance)
    )
    protocol = plan.protocol.model_dump() | {"steps": resolved.steps, "guidance": resolved.guidance}
    on_gpu = device.startswith("cuda")
    facts = {
        "imprompt": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else device,
        **({} if on_gpu else {"threads": torch.get_num_threads()}),
        "set": set_facts(whole, plan.protocol.limit),
        "protocol": {"name": plan.protocol_name, **protocol, "size": list(resolved.size)},
        "sweep": {axis: list(values) for axis, values in plan.sweep.items()},
        **made,
        "judges": [judge.facts() for judge in judges.values()],
        "features": next((key for key in ("inception", "clip") if key in judges), None),
    }
    return without_folders(facts, plan.out)


class NamedJudge(StoredTable):
    """A judge in run.json."""

    key: str


class NamedAdapter(StoredTable):
    """An adapter in run.json."""

    name: str


class RunRecord(StoredTable):
    """Content of run.json: what `comparable` needs of it."""

    judges: list[NamedJudge]
    adapters: list[NamedAdapter]


def read_record(out: Path) -> dict[str, Any] | None:
    """Return the content of run.json, or None if there is none; SettingError if it is damaged."""
    path = out / "run.json"
    if not path.exists():
        return None
    try:
        return read_json(path, RunRecord, lenient=True)
    except (OSError, SettingError) as error:
        raise SettingError(
            f"{path} is damaged ({first_line(error)}); give another --out"
        ) from error


def check_same(out: Path, run: Mapping[str, Any]) -> None:
    """Raise SettingError, naming what differs, if `out` was started with other settings."""
    stored = read_record(out)
    if stored is None:
        if (out / "parts").exists():
            raise SettingError(
                f"{out} holds parts of a run, but no run.json that describes it: give another --out"
            )
        return
    same_types = parse_json(json.dumps(run), lenient=True)
    was, now = (dict(flat(comparable(one))) for one in (stored, same_types))
    changed = [
        f"{key} = {was.get(key)!r} (now {now.get(key)!r})"
        for key in {**was, **now}
        if was.get(key) != now.get(key)
    ]
    if changed:
        raise SettingError(
            f"{out} was started with {some(changed, 3)}: give another --out, or the old values"
        )


def comparable(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of run.json must be equal for a run to go on.

    What has a hash is known by it, wherever it is. Judges and adapters are mappings by name, so
    that a difference between two records has a short name.
    """
    by_hash = without_places(run)
    names = {
        "judges": [judge["key"] for judge in run["judges"]],
        "adapters": unique_names(Path(adapter["name"]).name for adapter in run["adapters"]),
    }
    for part, known in names.items():
        by_hash[part] = dict(zip(known, by_hash[part], strict=True))
    if adapters := by_hash.get("sweep", {}).get("adapter"):
        by_hash["sweep"]["adapter"] = [Path(name).name for name in adapters]
    return by_hash


def without_places(value: Any) -> Any:
    """Return a record's values without the names and places of what has a hash."""
    if isinstance(value, list):
        return [without_places(one) for one in value]
    if not isinstance(value, dict):
        return value
    hashed = "sha256" in value or "fingerprint" in value
    return {
        name: without_places(one) for name, one in value.items() if not (hashed and name in PLACES)
    }


def begin(out: Path, run: Mapping[str, Any]) -> FileLock:
    """Lock the run's folder, remove what a killed process left there, and write run.json."""
    lock = lock_folder(out, "evaluating into", instead="--out")
    for left in out.rglob(".*.part"):  # left over from a killed process
        left.unlink()
    if read_record(out) is None:
        write_text(out / "run.json", json.dumps(run, indent=1))
    return lock


@contextmanager
def explained_interruption(out: Path) -> Iterator[None]:
    """Raise ImpromptError, with one line, if another process of the run ended."""
    try:
        yield
    except RuntimeError as error:
        if (what := end_of_another(error)) is None:
            raise
        raise ImpromptError(f"{what}. The same command goes on from what is in {out}") from error
