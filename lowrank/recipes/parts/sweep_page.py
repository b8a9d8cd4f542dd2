"""What came of a sweep: sorted, with its noise, on one page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.config.sweeping import Combination
from lowrank.storage.whole_file import write_whole
from lowrank.training.callbacks.charts import Curve, chart
from lowrank.training.callbacks.metrics_file import FILE as METRICS
from lowrank.training.callbacks.metrics_file import read_metrics
from lowrank.training.callbacks.pages import page
from lowrank.training.callbacks.run_report import FILE as REPORT

CURVES = 8
_SEED, _RATE = "training.seed", "training.learning_rate"


@dataclass(frozen=True)
class Outcome:
    """One run's.

    Attributes:
        name: Of its folder.
        settings: What was chosen for it.
        loss: On the held-out rows; None where it came to no end.
        exact_match: Share of right answers; None where none were generated.
        answers: How many were.
        steps: That it took.
        lost: Why it was given up.
    """

    name: str
    settings: Mapping[str, Any]
    loss: float | None = None
    exact_match: float | None = None
    answers: int = 0
    steps: int = 0
    lost: str | None = None

    @property
    def of_answers(self) -> float | None:
        """The standard error of the share of right answers."""
        if self.exact_match is None or not self.answers:
            return None
        return math.sqrt(self.exact_match * (1 - self.exact_match) / self.answers)


@dataclass(frozen=True)
class Averaged:
    """Runs that differ in their seed alone.

    Attributes:
        settings: Without the seed.
        loss: Their mean.
        noise: The standard error of that mean; None of a single run.
        runs: How many.
    """

    settings: Mapping[str, Any]
    loss: float
    noise: float | None
    runs: int


def sorted_outcomes(combinations: Sequence[Combination], done: Mapping[str, Mapping[str, Any]]) -> list[Outcome]:
    """The lowest loss first; those without one last."""
    found = [Outcome(one.name, one.settings, **done.get(one.name, {})) for one in combinations]
    return sorted(found, key=lambda one: _rank(one.loss))


def _rank(loss: float | None) -> float:
    return math.inf if loss is None or math.isnan(loss) else loss


def _averaged(outcomes: Sequence[Outcome]) -> list[Averaged]:
    """Over seeds; the lowest mean first."""
    alike: dict[str, list[Outcome]] = {}
    for one in outcomes:
        if one.loss is not None:
            alike.setdefault(_told(one.settings), []).append(one)
    found = []
    for group in alike.values():
        losses = [one.loss for one in group if one.loss is not None]
        noise = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None
        settings = {key: value for key, value in group[0].settings.items() if key != _SEED}
        found.append(Averaged(settings, statistics.fmean(losses), noise, len(losses)))
    return sorted(found, key=lambda one: _rank(one.loss))


def _told(settings: Mapping[str, Any]) -> str:
    """Settings in a line, the seed left out."""
    parts = [f"{key.rpartition('.')[2]} {_value(value)}" for key, value in settings.items() if key != _SEED]
    return ", ".join(parts) or "the config as it is"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def recommendation(outcomes: Sequence[Outcome]) -> str:
    """Which settings to take, in a sentence with what it rests on."""
    ranked = _averaged(outcomes)
    best = ranked[0]
    what = f"Take {_told(best.settings)}: evaluation loss {best.loss:.4f}"
    if len(ranked) == 1:
        return f"{what}; nothing else came to a result."
    second = ranked[1]
    gap, against = second.loss - best.loss, f"the next best, {_told(second.settings)}, has {second.loss:.4f}"
    if best.noise is None or second.noise is None:
        rests = "each is one run, so how much of that is chance is not known: list some values of training.seed"
    else:
        noise = math.hypot(best.noise, second.noise)
        sure = "more than" if gap > 2 * noise else "not more than"
        rests = f"the gap of {gap:.4f} is {sure} two standard errors ({noise:.4f} each, by {best.runs} seeds)"
    return f"{what}; {against}; {rests}."


def write_page(output: Path, combinations: Sequence[Combination], outcomes: Sequence[Outcome]) -> None:
    """The sweep's page."""
    known = [one for one in outcomes if one.loss is not None]
    methods = {one.name: one.config.adapter.method for one in combinations}
    rates = {one.name: one.config.training.learning_rate for one in combinations}
    keys = list(outcomes[0].settings)
    text = page(
        "sweep",
        title=output.name,
        advice=recommendation(known) if known else "No run has come to a result yet.",
        keys=keys,
        averages=[([_value(one.settings[key]) for key in keys if key != _SEED], f"{one.loss:.4f}", one.runs,
                   "–" if one.noise is None else f"± {one.noise:.4f}") for one in _averaged(known)],
        averaged_keys=[key for key in keys if key != _SEED],
        rows=[([_value(one.settings[key]) for key in keys], *_figures(one)) for one in outcomes],
        charts=_charts(output, known, methods, rates),
        best=output / "best.yaml",
    )  # fmt: skip
    write_whole(output / REPORT, text)


def _figures(one: Outcome) -> tuple[str, str, str]:
    """Loss, exact match, steps."""
    right = "–" if one.exact_match is None else f"{one.exact_match:.1%} ± {one.of_answers or 0.0:.1%}"
    loss = f"{one.loss:.4f}" if one.loss is not None else "given up" if one.lost else "not yet"
    return loss, right, f"{one.steps:,}"


def _charts(
    output: Path, known: Sequence[Outcome], methods: Mapping[str, str], rates: Mapping[str, float]
) -> list[tuple[str, str]]:
    found = []
    if len({rates[one.name] for one in known}) > 1:
        curves = []
        for method in dict.fromkeys(methods[one.name] for one in known):
            lowest: dict[float, float] = {}
            for one in known:
                if methods[one.name] == method and one.loss is not None:
                    lowest[rates[one.name]] = min(one.loss, lowest.get(rates[one.name], math.inf))
            curves.append(Curve(method, sorted(lowest), [lowest[rate] for rate in sorted(lowest)], points=True))
        found.append(("Lowest evaluation loss at each learning rate", chart(curves, over="learning rate")))
    for title, kind, key in (("Evaluation loss", "eval", "eval_loss"), ("Training loss", "step", "loss")):
        curves = []
        for one in known[:CURVES]:
            lines = [line for line in read_metrics(output / one.name / METRICS) if line["kind"] == kind]
            steps, values = [line["step"] for line in lines], [line[key] for line in lines]
            curves.append(Curve(one.name, steps, values, points=kind == "eval"))
        if curves:
            found.append((f"{title}, the best {len(curves)}", chart(curves, labelled=False)))
    return found
