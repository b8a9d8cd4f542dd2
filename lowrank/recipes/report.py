"""Several runs on one page: their curves over one another, what differs between their configs, their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.config import dump_config, load_config
from lowrank.config.loading import CONFIG
from lowrank.config.yamlcore import CoreLoader
from lowrank.errors import InputError
from lowrank.paths import expanded
from lowrank.recipes.parts.resume import flat
from lowrank.storage.whole_file import write_whole
from lowrank.training.callbacks.charts import Curve, chart
from lowrank.training.callbacks.metrics_file import FILE as METRICS
from lowrank.training.callbacks.metrics_file import read_metrics
from lowrank.training.callbacks.pages import page

MOST = 8  # curves that can be told apart
_OWN = ("training.output_dir",)


@dataclass(frozen=True)
class Past:
    """A run that has been.

    Attributes:
        name: Of its folder.
        settings: Its config by dotted keys.
        steps: Its metrics, a line a step.
        evaluations: A line each.
    """

    name: str
    settings: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]


def report(runs: Sequence[str | Path], out: str | Path = "runs.html") -> Path:
    """Writes the page of several runs.

    Args:
        runs: Their folders, two to eight.
        out: The page; an earlier one is replaced.

    Raises:
        InputError: a folder is no run's, or there are too few or too many.
    """
    if not 2 <= len(runs) <= MOST:
        raise InputError(
            f"{len(runs)} runs cannot be compared on one page; it takes from 2 to {MOST}",
            fix="The page of a single run is report.html in its folder.",
        )
    past = [_read(Path(expanded(run))) for run in runs]
    out = Path(expanded(out))
    write_whole(out, page("runs", title=_title(past), runs=past, charts=_charts(past), differences=_differences(past),
                          results=[(one.name, *_results(one)) for one in past]))  # fmt: skip
    print(f"wrote {out}: {len(past)} runs beside one another")
    return out


def _differences(runs: Sequence[Past]) -> list[tuple[str, list[str]]]:
    """The settings in which the runs differ, each with its value in every run."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in _OWN)
    values = {key: [str(run.settings.get(key, "–")) for run in runs] for key in keys}
    return [(key, of) for key, of in values.items() if len(set(of)) > 1]


def _read(folder: Path) -> Past:
    for name in (CONFIG, METRICS):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is no run's folder: it holds no {name}", fix="Name folders that train wrote.")
    settings = flat(CoreLoader(dump_config(load_config(folder))).get_single_data())
    lines = read_metrics(folder / METRICS)
    return Past(folder.name, settings, *([line for line in lines if line["kind"] == kind] for kind in ("step", "eval")))


def _title(runs: Sequence[Past]) -> str:
    return " · ".join(run.name for run in runs)


def _charts(runs: Sequence[Past]) -> list[tuple[str, str]]:
    def over(lines: str, key: str, points: bool = False) -> str:
        curves = [
            Curve(run.name, [line["step"] for line in of], [line[key] for line in of], points=points)
            for run in runs
            if (of := [line for line in getattr(run, lines) if key in line])
        ]
        return chart(curves, labelled=False) if curves else ""

    found = [
        ("Evaluation loss", over("evaluations", "eval_loss", points=True)),
        ("Exact match", over("evaluations", "eval_exact_match", points=True)),
        ("Training loss", over("steps", "loss")),
        ("Learning rate", over("steps", "learning_rate")),
    ]
    return [(name, svg) for name, svg in found if svg]


def _results(run: Past) -> tuple[str, str, str, str]:
    """Evaluation loss, exact match, steps, minutes."""
    last = run.evaluations[-1] if run.evaluations else {}
    loss, right = last.get("eval_loss"), last.get("eval_exact_match")
    seconds = sum(line["seconds"] for line in run.steps)
    return (
        "–" if loss is None else f"{loss:.4f}",
        "–" if right is None else f"{right:.1%}",
        f"{len(run.steps):,}",
        f"{seconds / 60:.1f}",
    )
