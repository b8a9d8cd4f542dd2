"""Early stopping counts evaluations in vain, and remembers them."""

from __future__ import annotations

import pytest

from lowrank.training.callbacks.early_stopping import EarlyStopping
from lowrank.training.evaluation.best import better
from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.run import Run


def new_run(tmp_path) -> Run:
    return Run(None, None, None, None, tmp_path, 100)  # type: ignore[arg-type]


def see(callback: EarlyStopping, run: Run, *losses: float) -> list[bool]:
    stopped = []
    for loss in losses:
        run.step += 1
        callback.on_eval(run, Evaluation(loss, 10))
        stopped.append(run.stop)
    return stopped


def test_it_stops_after_so_many_in_vain(tmp_path):
    run = new_run(tmp_path)
    assert see(EarlyStopping("loss", 2), run, 3.0, 2.0, 2.5, 1.0, 1.0, float("nan")) == [False] * 5 + [True]


def test_the_base_does_not_count(tmp_path):
    run, callback = new_run(tmp_path), EarlyStopping("loss", 1)
    callback.on_eval(run, Evaluation(0.1, 10))
    assert see(callback, run, 3.0, 2.0) == [False, False]


def test_it_goes_on_counting_after_a_resume(tmp_path):
    first = EarlyStopping("loss", 2)
    see(first, new_run(tmp_path), 1.0, 2.0)
    second, run = EarlyStopping("loss", 2), new_run(tmp_path)
    second.load_state_dict(first.state_dict())
    second.on_run_start(run)
    assert not run.stop
    assert see(second, run, 1.5) == [True]
    third, over = EarlyStopping("loss", 2), new_run(tmp_path)
    third.load_state_dict(second.state_dict())
    third.on_run_start(over)
    assert over.stop


@pytest.mark.parametrize(("metric", "value", "than", "is_better"), [("loss", 1, 2, True), ("exact_match", 1, 2, False)])
def test_which_is_better(metric, value, than, is_better):
    assert better(metric, value, than) is is_better
