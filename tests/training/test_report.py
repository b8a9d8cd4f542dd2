"""The report: what it holds at every stage of a run."""

from __future__ import annotations

import json
import re

import pytest
import torch

from lowrank.training.callbacks.charts import smoothed
from lowrank.training.callbacks.run_report import ReportWriter, comparison
from lowrank.training.evaluation.evaluation import Evaluation, Sample
from lowrank.training.run import Run

BEFORE = Evaluation(2.0, 10, 0.0, (Sample("ask <b>", "yes", "no & never", False),))
AFTER = Evaluation(0.5, 10, 1.0, (Sample("ask <b>", "yes", "yes", True),))


@pytest.fixture
def run(tmp_path) -> Run:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    return Run(None, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), None, tmp_path, 3)


def step_line(step: int) -> str:
    names = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "supervised_per_second", "seconds", "tokens")
    return json.dumps({"kind": "step", "step": step, "peak_bytes": 2**30, **dict.fromkeys(names, 1.0 / step)}) + "\n"


def page_of(run: Run, lines: str, *evaluations: Evaluation) -> str:
    metrics = run.output_dir / "metrics.jsonl"
    metrics.write_text(lines)
    writer = ReportWriter(run.output_dir / "report.html", "a <run>", {"model": "tiny & small"}, metrics)
    for evaluation in evaluations:
        writer.on_eval(run, evaluation)
    writer.on_run_end(run)
    return (run.output_dir / "report.html").read_text()


def test_it_is_whole_at_the_end_and_fetches_nothing(run):
    run.before, run.step = BEFORE, 3
    evaluation = json.dumps({"kind": "eval", "step": 0, "eval_loss": 2.0}) + "\n"
    page = page_of(run, evaluation + "".join(map(step_line, (1, 2, 3))), AFTER)
    assert page.count("<svg") == 4
    assert "finished, 3 steps" in page
    assert "100.0%" in page
    assert "2.0000" in page
    assert "a &lt;run&gt;" in page
    assert "no &amp; never" in page
    assert "ask <b>" not in page
    assert not re.search(r"(src|href|url)\W{1,3}https?:", page)


def test_it_opens_before_the_first_step_and_in_the_middle(run):
    assert "0 of 3 steps so far" in page_of(run, "")
    run.step = 1
    assert "1 of 3 steps so far" in page_of(run, step_line(1))
    run.interrupted = True
    assert "interrupted after 1 of 3" in page_of(run, step_line(1))


def test_steps_that_were_skipped_do_not_disturb_it(run):
    run.step = 2
    skip = json.dumps({"kind": "skip", "step": 2, "loss": "nan", "grad_norm": "inf"}) + "\n"
    assert page_of(run, step_line(1) + skip).count("<svg") == 4


def test_a_conversation_is_shown_as_turns_the_last_one_open(run):
    turns = (("system", "Be brief & kind"), ("user", "earlier"), ("assistant", "said"), ("user", "What is <i>?"))
    after = Evaluation(0.5, 10, 1.0, (Sample("<|im_start|>...", "yes", "yes", True, turns),))
    run.step = 1
    page = page_of(run, step_line(1), after)
    assert "<|im_start|>" not in page
    assert re.search(r"<details><summary>system <small>Be brief &amp; kind", page)
    assert page.count("<details>") == 3
    assert '<pre class="asked">What is &lt;i&gt;?</pre>' in page
    assert Evaluation.from_dict(after.as_dict()) == after


def test_what_was_right_and_is_wrong_now_is_shown(run):
    run.before, run.step = AFTER, 3
    page = page_of(run, step_line(1), BEFORE)
    assert "Right before, wrong now" in page
    run.before = BEFORE
    assert "Right before, wrong now" not in page_of(run, step_line(1), AFTER)


def test_files_of_the_run_are_linked(run):
    (run.output_dir / "config.yaml").write_text("model:")
    page = page_of(run, step_line(1))
    assert '<a href="config.yaml">' in page
    assert "adapter_config.json" not in page


def test_before_and_after():
    rows = {what: (first, second) for what, first, second in comparison(BEFORE, AFTER)}
    assert rows["exact match"] == ("0.0%", "100.0%")
    assert rows["loss per supervised token"] == ("2.0000", "0.5000")
    assert [what for what, *_ in comparison(None, Evaluation(1.0, 3))] == ["loss per supervised token", "perplexity"]


def test_smoothing_begins_at_the_first_value():
    assert smoothed([4.0, 4.0, 4.0]) == pytest.approx([4.0, 4.0, 4.0])
    assert smoothed([0.0, 1.0])[1] == pytest.approx(1 / 1.9)


def test_the_worst_by_loss_come_first_with_what_was_lost_before(run):
    def evaluation(losses: list[float | None]) -> Evaluation:
        samples = (Sample(f"row {i}", "yes", "no", False, (("user", f"ask {i}"),), x) for i, x in enumerate(losses))
        return Evaluation(1.0, 10, 0.0, tuple(samples))

    run.before, run.step = evaluation([9.0, 8.5, *[7.0] * 12]), 3
    page = page_of(run, step_line(1), evaluation([0.25, 3.5, *[1.0] * 11, float("nan")]))
    rows = re.findall(r"<tr><td>([\d.na]+)</td><td>([\d.]*)</td><td><span.*?<td>(ask \d+)</td>", page, re.DOTALL)
    assert rows[:3] == [("nan", "7.0000", "ask 13"), ("3.5000", "8.5000", "ask 1"), ("1.0000", "7.0000", "ask 2")]
    assert len(rows) == 10
    assert "Worst by loss" not in page_of(run, step_line(1), evaluation([None] * 14))
