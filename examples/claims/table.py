"""A table and plots of what examples/claims/run.py has measured so far.

python examples/claims/table.py runs/claims    # claims.md and claims.png in the same folder
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RUNS = "runs.jsonl"
METHODS = ("full", "lora", "rslora", "dora", "adalora", "qlora", "pissa")
EVALUATION = Path(__file__).parents[1] / "data"
COLUMNS = (
    "method",
    "learning rate",
    "trained",
    "share",
    "eval loss",
    "exact match (lowest-highest)",
    "base in memory",
    "peak memory",
    "tokens/s",
    "on disk",
)
Runs = list[dict[str, Any]]


def read(file: Path) -> Runs:
    """The runs that are finished."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def write(folder: Path) -> str:
    """Writes claims.md and claims.png; returns the text.

    Raises:
        SystemExit: nothing in the folder counts yet.
    """
    finished = read(folder / RUNS)
    finals = [run for run in finished if run["stage"] == "final"]
    bases = {run["task"]: run for run in finished if run["stage"] == "base"}
    if not finals:
        raise SystemExit(f"{folder / RUNS} holds no finished run yet")
    tasks = {task: by_method(finals, task) for task in dict.fromkeys(run["task"] for run in finals)}
    parts = [head(finals)]
    for task, methods in tasks.items():
        base = bases[task]
        before = f"The base answers {base['exact_match']:.1%} as expected; its loss is {base['eval_loss']:.4f}."
        steps = ", ".join(sorted({str(run["steps"]) for runs in methods.values() for run in runs}))
        tokens = f"Every method trained for {steps} steps of up to 640 tokens."
        lines = [f"## {task}", "", f"{before} {tokens} {precision(task)}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(row(method, runs))} |" for method, runs in methods.items()]
        parts.append("\n".join([*lines, "", *claims(methods)]).rstrip())
    text = "\n\n".join(parts) + "\n"
    (folder / "claims.md").write_text(text, encoding="utf-8")
    plot(tasks, folder / "claims.png")
    return text


def by_method(finals: Runs, task: str) -> dict[str, Runs]:
    """A task's runs, each method's together."""
    mine = [run for run in finals if run["task"] == task]
    tried = {run["method"] for run in mine}
    return {method: [run for run in mine if run["method"] == method] for method in METHODS if method in tried}


def precision(task: str) -> str:
    """How far a score can be trusted."""
    rows = len((EVALUATION / f"{task}_eval.jsonl").read_text(encoding="utf-8").splitlines())
    return (
        f"Of {rows} rows one is {100 / rows:.1f} points; the standard error of a score is up to {50 / rows**0.5:.1f}."
    )


def head(finals: Runs) -> str:
    """Where and with what this was measured."""
    where = sorted({run["machine"] + ", " + ", ".join(" ".join(v) for v in run["versions"].items()) for run in finals})
    return (
        f"# The claims, tried\n\n{'; '.join(where)}. `make claims`, or examples/claims/run.py with the steps and "
        "seeds below; learning rates from the same search. Means over the seeds; speeds are medians.\n\n"
        "![exact match and trained parameters](claims.png)"
    )


def row(method: str, runs: Runs) -> list[str]:
    """A method's line of the table."""
    one, match = runs[0], [100 * run["exact_match"] for run in runs]
    return [
        f"{method} ({len(runs)} seed{'s' if len(runs) > 1 else ''})",
        ", ".join(f"{rate:.0e}" for rate in sorted({run["learning_rate"] for run in runs})),
        f"{one['trainable']:,}",
        f"{one['trainable'] / one['base_parameters']:.2%}",
        f"{statistics.mean(run['eval_loss'] for run in runs):.4f}",
        f"{statistics.mean(match):.1f} % ({min(match):.1f}-{max(match):.1f})",
        f"{one['base_bytes'] / 2**20:.0f} MiB",
        f"{max(run['peak_bytes'] for run in runs) / 2**20:.0f} MiB",
        f"{statistics.median(run['tokens_per_second'] for run in runs):.0f}",
        f"{one['file_bytes'] / 2**20:.1f} MiB",
    ]


def claims(methods: dict[str, Runs]) -> list[str]:
    """What is claimed, and what was found."""
    match = {name: 100 * statistics.mean(run["exact_match"] for run in runs) for name, runs in methods.items()}
    found = []
    if {"lora", "full"} <= set(methods):
        fewer = 1 - methods["lora"][0]["trainable"] / methods["full"][0]["trainable"]
        found.append(
            f"- LoRA within one point of full fine-tuning with at least 99 % fewer trained parameters: "
            f"{match['lora'] - match['full']:+.1f} points with {fewer:.1%} fewer."
        )
    if {"lora", "qlora"} <= set(methods):
        lora, qlora = methods["lora"][0], methods["qlora"][0]
        share, layers = (f"{part / whole:.0%}" for part, whole in memory_shares(lora, qlora))
        found.append(
            f"- QLoRA within one point of LoRA at a third of the base's memory: {match['qlora'] - match['lora']:+.1f} "
            f"points at {share}: the layers that are in 4 bits take {layers} of what they took, the rest (embeddings "
            f"above all) is as it was."
        )
    return found


def memory_shares(lora: dict[str, Any], qlora: dict[str, Any]) -> list[tuple[float, float]]:
    """Bytes of the quantised base and of the plain one: of all of it, and of the layers that are quantised."""
    a_value = lora["base_bytes"] / lora["base_parameters"]
    return [
        (qlora["base_bytes"], lora["base_bytes"]),
        (qlora["quantised_bytes"], qlora["quantised_parameters"] * a_value),
    ]


def plot(tasks: dict[str, dict[str, Runs]], path: Path) -> None:
    """For each task the exact match of each method over its trained parameters, a point a seed."""
    figure = Figure(figsize=(5 * len(tasks), 3.5), layout="constrained")
    for axes, (task, methods) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        for method, runs in methods.items():
            trained = [math.log10(run["trainable"]) for run in runs]
            axes.scatter(trained, [100 * run["exact_match"] for run in runs], label=method, alpha=0.7)
        axes.set(title=task, xlabel="log10 of the trained parameters", ylabel="exact match, %")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
