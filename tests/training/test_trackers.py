"""Trackers get every step and evaluation; one that is not there is refused."""

from __future__ import annotations

import pytest
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lowrank.errors import InputError
from lowrank.training.callbacks import Callback, Run, StepMetrics
from lowrank.training.evaluate import Evaluation
from lowrank.training.trackers import Trackers, chosen_trackers


def test_tensorboard_gets_the_figures(tmp_path):
    config = ProjectConfiguration(str(tmp_path), logging_dir=str(tmp_path / "logs"))
    accelerator = Accelerator(cpu=True, log_with=["tensorboard"], project_config=config)
    run = Run(None, None, None, None, tmp_path, 3, callbacks=[Trackers(accelerator, "mine", {"r": 4, "list": [1, 2]})])  # type: ignore[arg-type]
    with run.underway():
        run.tell(Callback.on_eval, Evaluation(2.5, 10))
        for step in (1, 2, 3):
            run.step = step
            run.tell(Callback.on_step_end, StepMetrics(step, 0.1, 1.0 / step, 1e-3, 1.0, 80, 40, 2.0, 0.0, 1))
    events = EventAccumulator(str(tmp_path / "logs" / "mine")).Reload()
    losses = events.Scalars("train/loss")
    assert [(event.step, event.value) for event in losses] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert events.Scalars("train/tokens_per_second")[0].value == 40.0
    assert events.Scalars("eval/loss")[0].value == 2.5


def test_what_is_chosen():
    assert chosen_trackers("none") == []
    assert chosen_trackers("auto") == ["tensorboard"]
    assert chosen_trackers(["tensorboard"]) == ["tensorboard"]


def test_what_is_not_there_is_refused():
    with pytest.raises(InputError, match="there is no tracker 'tensorbord'; known are"):
        chosen_trackers("tensorbord")
    with pytest.raises(InputError, match=r"comet_ml is not installed\npip install comet_ml"):
        chosen_trackers(["comet_ml"])


class Full:
    """A tracker on a full disk: once it has failed it fails at everything."""

    name = "full"

    def log(self, values, step=None, **_):
        raise OSError(28, "No space left on device")

    def finish(self):
        raise OSError(28, "No space left on device")


def test_one_that_cannot_write_is_left_out_and_told(tmp_path):
    lines = []
    accelerator = Accelerator(cpu=True)
    run = Run(None, None, None, None, tmp_path, 3, callbacks=[Trackers(accelerator, "mine", {}, lines.append)])  # type: ignore[arg-type]
    with run.underway():
        accelerator.trackers = [Full()]
        for step in (1, 2):
            run.tell(Callback.on_step_end, StepMetrics(step, 0.1, 1.0, 1e-3, 1.0, 80, 40, 2.0, 0.0, 1))
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
