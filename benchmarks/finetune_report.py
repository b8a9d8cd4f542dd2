"""The table, the JSON and the plot of `benchmarks/finetune.py`."""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from cases import CASES
from meter import machine
from rich.console import Console
from rich.table import Table
from yardstick import operations_a_token, operations_beside

PEFT = "peft + Trainer"
BARS = {  # of the case chat: tokens a second and peak memory against peft + Trainer
    ("lora", "bfloat16"): (6.0, 0.33),
    ("lora", "float32"): (3.5, 0.40),
    ("dora", "bfloat16"): (6.0, 0.30),
    ("qlora", "bfloat16"): (4.0, 0.40),
}
HEADER = (
    "contestant",
    "real tokens/s",
    "against peft",
    "supervised tokens/s",
    "peak MiB",
    "against peft",
    "first step after",
    "peft's loss after",
    "of the rate",
    "with low-rank and attention",
)


@dataclass
class Outcome:
    """What came of a contestant.

    Attributes:
        results: By the number of the repeat.
        why_not: Why it did not run, or not to the end; "" where it did.
    """

    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    why_not: str = ""

    def spread(self, key: str) -> tuple[float, float, float]:
        """Median, lowest, highest."""
        values = [result[key] for result in self.results.values()]
        return statistics.median(values), min(values), max(values)

    def median(self, key: str) -> float:
        return self.spread(key)[0]


def until_loss(outcome: Outcome, peft: Outcome) -> list[float]:
    """Seconds from the start of the process to the first step whose loss is as low as peft's last on the same rows.

    Infinite for a repeat in which it never was; the repeats that peft did not run are left out.
    """
    seconds = []
    for repeat, result in outcome.results.items():
        if repeat not in peft.results:
            continue
        level = peft.results[repeat]["losses"][-1]
        reached = zip(result["losses"], result["ended_after"], strict=True)
        seconds.append(next((after for loss, after in reached if loss <= level), float("inf")))
    return seconds


def write(stem: Path, case: str, job: Any, outcomes: dict[str, Outcome], rate: float, lengths: list[int]) -> None:
    """Table on the screen; JSON, table and plot in files.

    Args:
        stem: Of the files' paths.
        case: Its name.
        job: What all did.
        outcomes: By contestant.
        rate: Operations a second of plain products.
        lengths: Tokens of each row.
    """
    beside = operations_beside(job.model, job.r, lengths)
    rows = [_row(name, outcome, outcomes.get(PEFT), job.model, rate, beside) for name, outcome in outcomes.items()]
    lines = ["| " + " | ".join(row) + " |" for row in (HEADER, ["---"] * len(HEADER), *rows)]
    text = [
        f"# {job.method}, {job.dtype}, r = {job.r}, all-linear: {CASES[case].what}",
        "",
        _about(job, outcomes, rate),
    ]
    text += ["", *lines]
    missing = [
        f"- {name} does not run here: {outcome.why_not}" for name, outcome in outcomes.items() if outcome.why_not
    ]
    text += ["", *missing] if missing else []
    bars = BARS.get((job.method, job.dtype)) if case == "chat" and job.device == "cpu" else None
    if bars:
        speed, memory = bars
        text += ["", f"Bars against {PEFT}: {speed} times the real tokens a second, {memory} of the peak memory."]
    stem.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
    kept = {"command": _command(), "machine": _machine(job.device), "job": asdict(job), "rate": rate}
    kept["outcomes"] = {name: asdict(outcome) for name, outcome in outcomes.items()}
    stem.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    _plot({name: outcome for name, outcome in outcomes.items() if outcome.results}, stem.with_suffix(".png"))
    table = Table(*HEADER)
    for row in rows:
        table.add_row(*row)
    Console(width=170).print(table, *missing, sep="\n")


def _row(name: str, outcome: Outcome, peft: Outcome | None, model: str, rate: float, beside: float) -> list[str]:
    if not outcome.results:
        return [name, *["–"] * (len(HEADER) - 1)]
    speed, memory = outcome.median("tokens_per_second"), outcome.median("peak_mib")
    needed = operations_a_token(model, outcome.median("supervised_per_second") / speed)
    against, reached = ["–", "–"], "–"
    if peft is not None and peft.results:
        against = [f"{speed / peft.median('tokens_per_second'):.2f}", f"{memory / peft.median('peak_mib'):.2f}"]
        reached = _reached(until_loss(outcome, peft))
    return [
        name,
        _spread(outcome, "tokens_per_second", 1),
        against[0],
        _spread(outcome, "supervised_per_second", 1),
        _spread(outcome, "peak_mib", 0),
        against[1],
        f"{_spread(outcome, 'first_step_after', 1)} s",
        reached,
        f"{speed * needed / rate:.0%}",
        f"{speed * (needed + beside) / rate:.0%}",
    ]


def _spread(outcome: Outcome, key: str, digits: int) -> str:
    """Median, and lowest to highest."""
    middle, low, high = outcome.spread(key)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _reached(seconds: Sequence[float]) -> str:
    if not seconds:
        return "–"
    middle = statistics.median(seconds)
    return f"{middle:.1f} s" if middle < float("inf") else "not reached"


def _about(job: Any, outcomes: dict[str, Outcome], rate: float) -> str:
    """Machine, versions, command, and how to read the table."""
    repeats = max((len(outcome.results) for outcome in outcomes.values()), default=0)
    versions: dict[str, set[str]] = {}
    for outcome in outcomes.values():
        for result in outcome.results.values():
            for library, number in result["versions"].items():
                versions.setdefault(library, set()).add(number)
    if job.method == "qlora":
        versions["bitsandbytes"] = {_version("bitsandbytes")}
    told = ", ".join(f"{library} {' / '.join(sorted(numbers))}" for library, numbers in versions.items())
    return (
        f"{_machine(job.device)}; {told}. `{_command()}`: {repeats} repeats in alternating order, each in its own "
        f"process, {job.steps - 1} steps timed in each after one of warm-up. Medians, in brackets lowest to highest. "
        f"Times are from the start of the process; “peft's loss” is the loss of the last step of {PEFT} on the same "
        f"rows. Plain products of the model's shapes ran at {rate / 1e9:.0f} GFLOP/s; the share of that rate counts "
        "the base's products in a LoRA step, and then the low-rank products and attention's too. "
        f"{PEFT} and TRL keep the base in {job.dtype} and the adapters in float32, as lowrank does; torchtune and "
        f"LitGPT have both in {job.dtype}."
    )


def _machine(device: str) -> str:
    return f"{platform.machine()}, {machine(torch.device(device))}"


def _command() -> str:
    return f"python {' '.join(sys.argv)}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _plot(outcomes: dict[str, Outcome], path: Path) -> None:
    """Tokens a second and peak memory, a bar each, the first with its spread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.4 * len(outcomes)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, outcome in reversed(outcomes.items()):
        speed, low, high = outcome.spread("tokens_per_second")
        left.barh(name, speed, xerr=[[speed - low], [high - speed]], color="#4c8bf5")
        right.barh(name, outcome.median("peak_mib"), color="#9aa5b1")
    left.set_xlabel("real tokens a second")
    right.set_xlabel("peak memory, MiB")
    figure.savefig(path, dpi=120)
