"""Our training loop beside the paper's: samples a second, peak memory, share of what the machine can do.

    python -m benchmarks.training                  # SD 1.5 at 512 pixels on a GPU if there is one, else on the CPU
    python -m benchmarks.training --device cuda    # and SDXL's memory at 1024 pixels

Both train on data that is in memory already. What is compared and how: README.md.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.ours import CompiledLoop, OurLoop
from benchmarks.paper import PaperLoop
from benchmarks.setting import Setting
from benchmarks.stand_ins import DTYPES, STAND_INS
from benchmarks.turns import Loop, Measured, measure
from imprompt.adapter import ImageProjection, IPAdapter
from imprompt.attention import family_of
from imprompt.errors import ImpromptError
from imprompt.files import written_whole
from imprompt.training.estimate import Sizes, blank_base, one_step

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "ip-adapter")
PAPER, OURS, COMPILED = "the paper's", "ours", "ours, compiled"
LOOPS: dict[str, Callable[[Setting], Loop]] = {PAPER: PaperLoop, OURS: OurLoop, COMPILED: CompiledLoop}


@dataclass(frozen=True)
class Bar:
    """What a number must reach."""

    what: str
    value: float
    bar: float
    most: bool = False  # the number is to be at most the bar, not at least

    @property
    def met(self) -> bool:
        return self.value <= self.bar if self.most else self.value >= self.bar

    def line(self) -> str:
        side = "at most" if self.most else "at least"
        return f"{'reached' if self.met else 'MISSED'}: {self.what}: {self.value:.2f}, {side} {self.bar:g} is asked"


@dataclass(frozen=True)
class Outcome:
    """A setting's loops, measured."""

    setting: Setting
    loops: dict[str, Measured]
    flops: float  # of a sample: the base model's and the adapter's forward pass, and backward as far as the adapter needs it
    ceiling: float  # FLOP/s of a large matrix product

    def rate(self, name: str) -> float:
        """Samples a second in the median turn."""
        return self.setting.batch / median(self.loops[name].seconds)

    def share(self, name: str) -> float:
        """Of the ceiling that the sample's own arithmetic reaches."""
        return self.rate(name) * self.flops / self.ceiling

    def ratios(self, name: str) -> list[float]:
        """How many times faster than the paper's loop, one number per round, smallest first."""
        return sorted(theirs / own for theirs, own in zip(self.loops[PAPER].seconds, self.loops[name].seconds, strict=True))


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    where = RESULTS / f"training-{args.device}.json" if args.record is None else args.record
    load = os.getloadavg()[0]
    try:
        outcomes = list(run(args))
    except ImpromptError as error:
        print(error, file=sys.stderr)
        return 1
    bars = [bar for outcome in outcomes for bar in bars_of(outcome)]
    print("\n\n".join(map(table, outcomes)), *(bar.line() for bar in bars), sep="\n")
    if bars or args.record is not None:
        write(where, record(arguments, load, outcomes, bars))
        print(f"written: {where}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").partition("\n")[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--model", choices=STAND_INS, help="sd15, and on a GPU SDXL's memory too, if not given")
    parser.add_argument("--batch", type=int, help="samples a step (8, the paper's script's own; 1 on a CPU)")
    parser.add_argument("--pixels", type=int, help="a side (the model's own)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each loop that count (5)")
    parser.add_argument("--steps", type=int, help="in a turn (10; 1 on a CPU)")
    parser.add_argument(
        "--precision", choices=DTYPES, default="bf16", help="of the frozen models and of the paper's autocast (bf16)"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="measure our loop compiled too (on a GPU: yes)")
    parser.add_argument("--checkpointing", action="store_true", help="in our loop")
    parser.add_argument("--record", type=Path, help=f"where the numbers go ({RESULTS.name}/, for the sizes that bars are set for)")
    args = parser.parse_args(arguments)
    cpu = args.device == "cpu"
    args.batch = args.batch or (1 if cpu else 8)
    args.steps = args.steps or (1 if cpu else 10)
    args.compile = not cpu if args.compile is None else args.compile
    return args


def run(args: argparse.Namespace) -> Any:
    """The comparison; on a GPU, unless a model is named, our loop on SDXL as well."""
    model = args.model or "sd15"
    setting = Setting(
        device=args.device,
        model=model,
        batch=args.batch,
        pixels=args.pixels or STAND_INS[model].base.side,
        precision=args.precision,
        checkpointing=args.checkpointing,
    )
    names = [PAPER, OURS] + [COMPILED] * args.compile
    yield outcome(setting, names, args.rounds, args.steps)
    if args.device == "cuda" and args.model is None:
        sdxl = Setting("cuda", "sdxl", 1, 1024, args.precision, args.checkpointing)
        yield outcome(sdxl, [OURS], args.rounds, args.steps)


def outcome(setting: Setting, names: list[str], rounds: int, steps: int) -> Outcome:
    def told(name: str, seconds: float) -> None:
        print(f"{time.strftime('%H:%M:%S')} {setting.model} {name}: {seconds:.3f} s a step", file=sys.stderr, flush=True)

    ceiling = matrix_rate(setting)
    return Outcome(setting, measure({name: LOOPS[name] for name in names}, setting, rounds, steps, told), flops(setting), ceiling)


def flops(setting: Setting) -> float:
    """Of one sample, whatever loop trains on it; counted on the meta device."""
    of = setting.stand_in
    base = blank_base(of.base, DTYPES[setting.precision])
    embedding, token_dim = of.vision["projection_dim"], base.config.cross_attention_dim
    with torch.device("meta"):
        adapter = IPAdapter.beside(base, family_of(base), ImageProjection(embedding, token_dim)).attach(base)
    sizes = Sizes((4, setting.side, setting.side), (of.base.text_tokens, token_dim), (embedding,), of.pooled)
    return one_step(base, adapter, sizes.batch(1), fused=True)[0]


def matrix_rate(setting: Setting, repeats: int = 10) -> float:
    """FLOP/s of a matrix product of 8192³ (2048³ on a CPU), the median of `repeats`."""
    side, wait = (8192, torch.cuda.synchronize) if setting.device == "cuda" else (2048, lambda: None)
    if setting.model == "tiny":
        side = 64
    left, right = torch.randn(2, side, side, device=setting.device).to(DTYPES[setting.precision])
    seconds = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        left @ right
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / median(seconds[1:])


def bars_of(found: Outcome) -> list[Bar]:
    """What issue 3 asks at these sizes, for each of our loops."""
    setting, ours = found.setting, [name for name in found.loops if name != PAPER]
    device, model, pixels = setting.device, setting.model, setting.pixels
    bars = []
    for name in ours:
        if (device, model, pixels) == ("cpu", "sd15", 512):
            bars.append(Bar(f"samples/s, {name} over the paper's", median(found.ratios(name)), 1.7))
        if (device, model, pixels) == ("cuda", "sd15", 512):
            memory = found.loops[name].peak / found.loops[PAPER].peak
            bars += [
                Bar(f"samples/s, {name} over the paper's", median(found.ratios(name)), 2.5),
                Bar(f"peak memory, {name} over the paper's", memory, 0.6, most=True),
                Bar(f"share of the ceiling, {name}", found.share(name), 0.45),
            ]
        if (device, model, pixels, setting.batch) == ("cuda", "sdxl", 1024, 1):
            bars.append(Bar(f"GB reserved for SDXL at batch 1, {name}", found.loops[name].reserved, 24, most=True))
    return bars


def table(found: Outcome) -> str:
    """In markdown."""
    setting = found.setting
    lines = [
        f"{setting.model}, {setting.pixels} pixels, batch {setting.batch}, {setting.precision}, {device_name(setting.device)}; "
        f"{found.flops / 1e12:.3f} TFLOP a sample, ceiling {found.ceiling / 1e12:.2f} TFLOP/s",
        "",
        "| loop | s a step (range) | samples/s | × the paper's (range) | peak GB | share of ceiling |",
        "|---|---|---|---|---|---|",
    ]
    for name, loop in found.loops.items():
        ratios = found.ratios(name) if PAPER in found.loops else []
        times = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios else "-"
        spread = f"{median(loop.seconds):.3f} ({min(loop.seconds):.3f} to {max(loop.seconds):.3f})"
        lines.append(f"| {name} | {spread} | {found.rate(name):.3f} | {times} | {loop.peak:.2f} | {found.share(name):.1%} |")
    return "\n".join(lines)


def record(arguments: list[str] | None, load: float, outcomes: list[Outcome], bars: list[Bar]) -> dict[str, Any]:
    device = outcomes[0].setting.device
    return {
        "command": " ".join(["python -m benchmarks.training", *(sys.argv[1:] if arguments is None else arguments)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "device": device_name(device),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": load,  # processes running in the minute before: beside others, a measurement is worth little
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "outcomes": [
            asdict(found)
            | {
                "samples_per_second": {name: found.rate(name) for name in found.loops},
                "share_of_ceiling": {name: found.share(name) for name in found.loops},
                "times_the_papers": {name: found.ratios(name) for name in found.loops} if PAPER in found.loops else {},
            }
            for found in outcomes
        ],
        "bars": [asdict(bar) | {"met": bar.met} for bar in bars],
    }


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} cores of {next(names, platform.machine())}"


def write(path: Path, rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as aside:
        aside.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
