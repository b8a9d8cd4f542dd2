"""`report.html`: figures, curves and answers of a run in one file that opens offline, also while it trains."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.storage.whole_file import write_whole
from lowrank.training.callbacks.charts import Curve, chart
from lowrank.training.callbacks.metrics_file import read_metrics
from lowrank.training.callbacks.pages import page
from lowrank.training.callbacks.progress import spoken
from lowrank.training.evaluation.evaluation import Evaluation, Sample
from lowrank.training.run import Callback, Run, StepMetrics

FILE = "report.html"
FILES = ("config.yaml", "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl")
MOST_LOST, MOST_WORST = 10, 10
_SECONDS, _SHARE = 60.0, 0.01
Pair = dict[str, Sample | None]
"""The answers to one row, "before" and "after" training."""


class ReportWriter(Callback):
    """Writes the page after each evaluation, once a minute (less often if that takes over 1 % of the time), at the end.

    Args:
        path: The page.
        title: Its heading.
        plan: What the run does, line by line.
        metrics_file: The run's `metrics.jsonl`; the curves are drawn from it.
        samples: Answers shown.
        told: Shows a person a line; where the page cannot be written, the run goes on with the one that is there.
    """

    def __init__(
        self,
        path: Path,
        title: str,
        plan: Mapping[str, str],
        metrics_file: Path,
        samples: int = 3,
        told: Callable[[str], object] = print,
    ) -> None:
        self.path, self.title, self.plan, self.metrics_file, self.samples = path, title, plan, metrics_file, samples
        self.told = told
        self._after: Evaluation | None = None
        self._due = 0.0

    def on_step_end(self, run: Run, metrics: StepMetrics) -> None:
        """Writes when it is time."""
        if time.monotonic() >= self._due:
            self._write(run)

    def on_eval(self, run: Run, evaluation: Evaluation) -> None:
        """Keeps it, and writes, unless the run's end comes next, which does."""
        if run.step > 0:
            self._after = evaluation
        if run.step < run.total_steps and not run.stop:
            self._write(run)

    def on_run_end(self, run: Run) -> None:
        """Writes, if there is anything to tell."""
        if self.metrics_file.exists():
            self._write(run)

    def _write(self, run: Run) -> None:
        began = time.monotonic()
        try:
            write_whole(self.path, self._page(run))
        except OSError as error:
            self.told(f"warning: {error}; {self.path} stays as it is. Make room in {self.path.parent}.")
        now = time.monotonic()
        self._due = now + max(_SECONDS, (now - began) / _SHARE)

    def _page(self, run: Run) -> str:
        lines = read_metrics(self.metrics_file)
        steps = [line for line in lines if line["kind"] == "step"]
        evaluations = [line for line in lines if line["kind"] == "eval"]
        return page(
            "report",
            title=self.title,
            status=_status(run),
            cards=_cards(steps, run.before, self._after),
            plan=self.plan,
            charts=_charts(steps, evaluations),
            comparison=comparison(run.before, self._after),
            samples=_samples(run.before, self._after)[: self.samples],
            worst=_worst(run.before, self._after),
            lost=[pair for pair in _samples(run.before, self._after) if _lost(pair)][:MOST_LOST],
            files=[name for name in FILES if (self.path.parent / name).exists()],
        )


def comparison(before: Evaluation | None, after: Evaluation | None) -> list[tuple[str, str, str]]:
    """(what, before, after), a line each; empty texts where one is missing."""
    if any(one is not None and one.scores is not None for one in (before, after)):
        return _of_task(before, after)
    rows = [
        ("loss per supervised token", _number(before, "loss", ".4f"), _number(after, "loss", ".4f")),
        ("perplexity", _number(before, "perplexity", ",.3f"), _number(after, "perplexity", ",.3f")),
        ("exact match", _number(before, "exact_match", ".1%"), _number(after, "exact_match", ".1%")),
    ]
    return [row for row in rows if row[1:] != ("", "")]


def _of_task(before: Evaluation | None, after: Evaluation | None) -> list[tuple[str, str, str]]:
    """The loss and the scores of a task."""
    names = dict.fromkeys(name for one in (before, after) if one is not None for name in one.scores or {})
    rows = [("loss", _number(before, "loss", ".4f"), _number(after, "loss", ".4f"))]
    rows += [(name, _score(before, name), _score(after, name)) for name in names]
    answered = ("exact match", _number(before, "exact_match", ".1%"), _number(after, "exact_match", ".1%"))
    return rows if answered[1:] == ("", "") else [*rows, answered]


def _score(evaluation: Evaluation | None, name: str) -> str:
    value = None if evaluation is None else (evaluation.scores or {}).get(name)
    return "" if value is None else f"{value:.4f}"


def _number(evaluation: Evaluation | None, name: str, form: str) -> str:
    value = None if evaluation is None else getattr(evaluation, name)
    return "" if value is None else format(value, form)


def _status(run: Run) -> str:
    steps = f"{run.step:,} of {run.total_steps:,} steps"
    if run.interrupted or run.stop:
        return f"{'interrupted' if run.interrupted else 'stopped early'} after {steps}"
    return f"finished, {run.step:,} steps" if run.step >= run.total_steps else f"{steps} so far"


def _cards(
    steps: Sequence[Mapping[str, Any]], before: Evaluation | None, after: Evaluation | None
) -> list[tuple[str, str, str]]:
    """(what, figure, remark) of what is looked for first."""
    cards = []
    if after is not None and after.exact_match is not None:
        cards.append(("exact match", f"{after.exact_match:.1%}", f"from {_number(before, 'exact_match', '.1%')}"))
    for name in list(after.scores or {})[:1] if after is not None else ():
        cards.append((name, _score(after, name), f"from {_score(before, name)}"))
    if after is not None:
        cards.append(("evaluation loss", f"{after.loss:.4f}", f"from {_number(before, 'loss', '.4f')}"))
    if steps:
        seconds = sum(line["seconds"] for line in steps)
        cards.append(("training time", spoken(seconds), f"{seconds / len(steps):.2f} s a step"))
        cards.append(("tokens seen", f"{sum(line['tokens'] for line in steps):,}", "padding not counted"))
        speed = statistics.median(line["tokens_per_second"] for line in steps)
        supervised = statistics.median(line["supervised_per_second"] for line in steps)
        cards.append(("tokens a second", f"{speed:,.0f}", f"{supervised:,.0f} of them supervised"))
        cards.append(("peak memory", f"{steps[-1]['peak_bytes'] / 2**30:.2f} GiB", ""))
    return cards


def _samples(before: Evaluation | None, after: Evaluation | None) -> list[Pair]:
    first, second = (evaluation.samples if evaluation else () for evaluation in (before, after))
    return [
        {"before": first[i] if i < len(first) else None, "after": second[i] if i < len(second) else None}
        for i in range(max(len(first), len(second)))
    ]


def _worst(before: Evaluation | None, after: Evaluation | None) -> list[Pair]:
    """Where the row's loss is largest now, worst first; of rows whose loss is known."""
    known = [(_rank(pair["after"]), pair) for pair in _samples(before, after)]
    ranked = sorted(((rank, pair) for rank, pair in known if rank is not None), key=lambda one: -one[0])
    return [pair for _, pair in ranked[:MOST_WORST]]


def _rank(sample: Sample | None) -> float | None:
    """The row's loss; what is no number is worse than any."""
    loss = None if sample is None else sample.loss
    return math.inf if loss is not None and math.isnan(loss) else loss


def _lost(pair: Pair) -> bool:
    """Whether what was answered right before is answered wrong now."""
    before, after = pair["before"], pair["after"]
    return before is not None and after is not None and before.correct and not after.correct


def _charts(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    if not steps:
        return []
    x = [line["step"] for line in steps]

    def of(key: str, name: str = "", noisy: bool = True) -> Curve:
        return Curve(name, x, [line[key] for line in steps], noisy)

    at = [line["step"] for line in evaluations]
    evaluation = Curve("evaluation", at, [line["eval_loss"] for line in evaluations], points=True)
    losses = [of("loss", "training"), evaluation] if evaluations else [of("loss")]
    return [
        ("Loss" if "margin" in steps[0] else "Loss per supervised token", chart(losses)),
        *_of_preferences(steps, of),
        ("Learning rate", chart([of("learning_rate", noisy=False)], from_zero=True)),
        ("Supervised tokens a second", chart([of("supervised_per_second")], from_zero=True)),
        ("Gradient norm", chart([of("grad_norm")], from_zero=True)),
    ]


def _of_preferences(steps: Sequence[Mapping[str, Any]], of: Callable[..., Curve]) -> list[tuple[str, str]]:
    """What a run that learns from preferences tells of its steps; of other runs nothing."""
    found = []
    if "reward_chosen" in steps[0]:
        found.append(("Rewards", chart([of("reward_chosen", "chosen"), of("reward_rejected", "rejected")])))
    if "margin" in steps[0]:
        found.append(("Share of answers told apart", chart([of("accuracy")], from_zero=True)))
        found.append(("Margin of rewards", chart([of("margin")])))
    return found
