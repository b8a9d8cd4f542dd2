"""The field's claims, tried on this machine: every method on two tasks, in one token budget.

    make claims
    python examples/claims/run.py --task toolcalls --method lora --method full --seeds 1

Each method finds its learning rate by the same search: a quarter of the budget, the loss on rows set aside from the
training rows, from the config's own rate up or down a ladder until both neighbours are worse; the next lower rate if it
does nearly as well. Then it trains in the whole budget with several seeds and answers the evaluation rows. What is
finished stands in OUT/runs.jsonl and is not run again; a run that was stopped goes on from its last checkpoint.
`table.py` makes a table and plots of what is there, also half-way.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import platform
import shutil
import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import table
import torch

import lowrank
from lowrank.config import load_config
from lowrank.errors import JobError
from lowrank.recipes.evaluate import evaluate
from lowrank.training.run import Run

HERE = Path(__file__).parent
BASE = "lora"  # whose config says what the base is
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ALIKE = 1.1  # losses of two rates; short runs favour the larger one, and in long ones the smaller catches up
SET_ASIDE = 0.04  # of the training rows, for the search
DATA = "examples/data/{task}_{split}.jsonl"
TASKS = {
    "toolcalls": ["training.exact_match=json"],
    "kinship": ["training.exact_match=text", "training.generation_max_new_tokens=8"],
}


@dataclass(frozen=True)
class Job:
    """One run: of the base as it is (stage base), for the search, or one of those that count (final)."""

    task: str
    method: str
    stage: str
    learning_rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.method}-{self.stage}-{self.learning_rate:.0e}-{self.seed}-{self.steps}"

    def rows(self) -> list[str]:
        """What it reads, and what is asked of it."""
        searching = self.stage == "search"
        return [
            f"data.train={DATA.format(task=self.task, split='train')}",
            f"data.eval={SET_ASIDE if searching else DATA.format(task=self.task, split='eval')}",
            f"training.predict_with_generate={str(not searching).lower()}",
            *TASKS[self.task],
        ]

    def overrides(self) -> list[str]:
        """What it changes in the method's config."""
        return [
            *self.rows(),
            "training.eval_on_start=false",
            f"training.learning_rate={self.learning_rate}",
            f"training.seed={self.seed}",
            f"training.max_steps={self.steps}",
            *(self.ranks_schedule() if self.method == "adalora" else ()),
        ]

    def ranks_schedule(self) -> tuple[str, str]:
        """AdaLoRA cuts ranks between a fifth and a half of the steps, however many there are."""
        return f"adapter.tinit={self.steps // 5}", f"adapter.tfinal={self.steps // 2}"


class Counted(lowrank.Callback):
    """What the model under training consists of, and what a step costs."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self.speeds: list[float] = []
        self.peak = 0

    def on_run_start(self, run: Run) -> None:
        parameters = list(run.model.named_parameters())
        trainable = sum(p.numel() for _, p in parameters if p.requires_grad)
        quantised = [p for _, p in parameters if is_quantised(p)]
        adapter = sum(p.numel() for name, p in parameters if "lora_" in name)
        self.found = {
            "trainable": trainable,
            "base_parameters": run.model.num_parameters() - adapter,
            "base_bytes": sum(held_bytes(p) for name, p in parameters if "lora_" not in name),
            "quantised_parameters": sum(p.quant_state.shape.numel() for p in quantised),
            "quantised_bytes": sum(held_bytes(p) for p in quantised),
        }

    def on_step_end(self, run: Run, metrics: Any) -> None:
        self.speeds.append(metrics.tokens / metrics.seconds)
        self.peak = metrics.peak_bytes


def is_quantised(parameter: Any) -> bool:
    """Whether it holds 4-bit codes."""
    return getattr(parameter, "quant_state", None) is not None


def held_bytes(parameter: Any) -> int:
    """Bytes of a parameter and, where it is quantised, of the scales that belong to it."""
    if not is_quantised(parameter):
        return parameter.nbytes
    state = parameter.quant_state
    scales = [state.absmax, *([state.state2.absmax] if state.nested else [])]
    return sum(tensor.nbytes for tensor in (parameter, *scales))


def measure(job: Job, folder: Path, extra: Sequence[str]) -> dict[str, Any] | None:
    """Runs in a process of its own, so that the peak of memory is this run's. None if it was stopped."""
    return measure_base(job, extra) if job.stage == "base" else measure_training(job, folder, extra)


def measure_base(job: Job, extra: Sequence[str]) -> dict[str, Any]:
    """What the base can do before any training."""
    found = evaluate(HERE / f"{job.method}.yaml", overrides=[*job.rows(), *extra])
    return {**asdict(job), "eval_loss": found.loss, "exact_match": found.exact_match}


def measure_training(job: Job, folder: Path, extra: Sequence[str]) -> dict[str, Any] | None:
    """What came of a run, and what it took. None if it was stopped."""
    counted = Counted()
    try:
        done = lowrank.train(
            HERE / f"{job.method}.yaml",
            [*job.overrides(), f"training.output_dir={folder}", *extra],
            resume=(folder / "config.yaml").exists(),
            callbacks=[counted],
        )
        if done.interrupted:
            return None
        assert done.after is not None, "every job evaluates"
        result: dict[str, Any] = {"eval_loss": done.after.loss, "exact_match": done.after.exact_match}
    except JobError as error:  # diverged: no result is a result too
        result = {"eval_loss": math.inf, "exact_match": 0.0, "error": str(error)}
    return {
        **asdict(job),
        **result,
        **counted.found,
        "tokens_per_second": statistics.median(counted.speeds) if counted.speeds else None,
        "peak_bytes": counted.peak,
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {library.__name__: library.__version__ for library in (lowrank, torch)},
    }


class Runs:
    """The runs that are finished, and the way to another one."""

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.file: Path = options.out / table.RUNS
        self.file.parent.mkdir(parents=True, exist_ok=True)

    def result(self, job: Job) -> dict[str, Any]:
        """What a job gave; it runs if it has not yet."""
        for run in table.read(self.file):
            if all(run[key] == value for key, value in asdict(job).items()):
                return run
        print(f"\n=== {job.name}", flush=True)
        folder = self.options.out / job.name
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            run = process.submit(measure, job, folder, self.options.set).result()
        if run is None:
            raise KeyboardInterrupt
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        shutil.rmtree(folder if job.stage == "search" else folder / "checkpoints", ignore_errors=True)
        return run

    def learning_rate(self, task: str, method: str) -> float:
        """The rung of the ladder whose neighbours are both worse, or the one below it that does nearly as well."""

        def loss(rung: int) -> float:
            return self.result(Job(task, method, "search", LADDER[rung], 0, self.options.steps // 4))["eval_loss"]

        at, best = -1, LADDER.index(load_config(HERE / f"{method}.yaml").training.learning_rate)
        while at != best:
            at = best
            best = min(range(max(at - 1, 0), min(at + 2, len(LADDER))), key=loss)
        lower = max(best - 1, 0)
        return LADDER[lower if loss(lower) <= ALIKE * loss(best) else best]


def main() -> None:
    parser = ArgumentParser(description="Try the field's claims on this machine; hours. Run again, it goes on.")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="default: both")
    parser.add_argument("--method", action="append", choices=table.METHODS, help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="runs that count, for each method and task (default: 3)")
    parser.add_argument("--steps", type=int, default=200, help="of up to 640 tokens each (default: 200)")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="default: runs/claims")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for every run")
    options = parser.parse_args()
    try:
        run_all(options)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    print(table.write(options.out))


def run_all(options: Namespace) -> None:
    """Every method on every task, and the table after each."""
    runs = Runs(options)
    for seed in range(options.seeds):  # one seed of everything first: half-way there is a whole table already
        for task in options.task or TASKS:
            runs.result(Job(task, BASE, "base", 0.0, 0, 0))
            for method in options.method or table.METHODS:
                rate = runs.learning_rate(task, method)
                runs.result(Job(task, method, "final", rate, seed, options.steps))
                table.write(options.out)


if __name__ == "__main__":
    main()
