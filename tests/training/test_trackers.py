"""Trackers get every step and evaluation; one that is not there is refused, one that fails is left out and told."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lowrank.errors import InputError
from lowrank.training.callbacks.trackers import Trackers, chosen_trackers
from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.run import Callback, Run, StepMetrics


def tell_a_run(tmp_path, names, project="mine", told=print, config=None):
    """Three steps and an evaluation, told to the trackers of these names."""
    options = ProjectConfiguration(str(tmp_path), logging_dir=str(tmp_path / "logs"))
    accelerator = Accelerator(cpu=True, project_config=options)
    accelerator.log_with = names
    trackers = Trackers(accelerator, project, {"r": 4, "list": [1, 2]} if config is None else config, told)
    run = Run(None, None, None, None, tmp_path, 3, callbacks=[trackers])  # type: ignore[arg-type]
    with run.underway():
        run.tell(Callback.on_eval, Evaluation(2.5, 10))
        for step in (1, 2, 3):
            run.step = step
            run.tell(Callback.on_step_end, StepMetrics(step, 0.1, 1.0 / step, 1e-3, 1.0, 80, 40, 2.0, 0.0, 1))


@pytest.mark.parametrize(
    ("project", "folder"), [("mine", "mine"), ("50%: a/b", "50___a_b"), ("{x}\n", "_x__"), ("", "run"), ("ü", "ü")]
)
def test_tensorboard_gets_the_figures(tmp_path, project, folder):
    tell_a_run(tmp_path, ["tensorboard"], project)
    events = EventAccumulator(str(tmp_path / "logs" / folder)).Reload()
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
    with pytest.raises(InputError, match=r"comet_ml is not installed\nInstall it: `pip install comet_ml`\."):
        chosen_trackers(["comet_ml"])


class StandIn:
    """wandb and mlflow as accelerate calls them: what was called is noted, and `fails` of it raises."""

    def __init__(self, monkeypatch, fails: str = "", error: BaseException | None = None) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.fails, self.error = fails, error

        def noted(name: str, gives: object = None):
            def call(*given: object, **named: object) -> object:
                self.calls.append((name, {**named, "given": given}))
                if name == self.fails:
                    raise self.error  # type: ignore[misc]
                return gives

            return call

        run = SimpleNamespace(log=noted("log"), finish=noted("finish"))
        wandb = ModuleType("wandb")
        wandb.__dict__.update(init=noted("init", run), config=SimpleNamespace(update=noted("settings")))
        mlflow = ModuleType("mlflow")
        limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        mlflow.__dict__.update(
            search_experiments=noted("init", []),
            create_experiment=noted("create", "7"),
            start_run=noted("start", SimpleNamespace()),
            log_params=noted("settings"),
            log_metrics=noted("log"),
            end_run=noted("finish"),
            utils=SimpleNamespace(validation=limits),
        )
        for module in (wandb, mlflow):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for name in ("WANDB_PROJECT", "WANDB_NAME", "MLFLOW_EXPERIMENT_NAME"):
            monkeypatch.delenv(name, raising=False)

    def named(self, name: str) -> list[dict]:
        return [given for called, given in self.calls if called == name]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
@pytest.mark.parametrize("fails", ["init", "settings", "log", "finish"])
@pytest.mark.parametrize(
    "error", [RuntimeError("api_key not configured\nmore"), ConnectionError("refused"), SystemExit(1), KeyError()]
)
def test_one_that_fails_is_left_out_and_told_once(tmp_path, monkeypatch, name, fails, error):
    stand_in, lines = StandIn(monkeypatch, fails, error), []
    tell_a_run(tmp_path, [name, "tensorboard"], told=lines.append)
    assert len(lines) == 1
    assert lines[0].startswith(f"warning: {name} ")
    assert "\n" not in lines[0]
    assert len(stand_in.named("log")) == {"init": 0, "log": 1}.get(fails, 4)
    events = EventAccumulator(str(tmp_path / "logs" / "mine")).Reload()
    assert len(events.Scalars("train/loss")) == 3  # the other one has all


def test_tensorboard_where_its_folder_cannot_be(tmp_path):
    (tmp_path / "logs").write_text("a file")
    lines = []
    tell_a_run(tmp_path, ["tensorboard"], told=lines.append)
    assert len(lines) == 1
    assert "tensorboard could not be started" in lines[0]


def test_what_wandb_is_told(tmp_path, monkeypatch):
    stand_in = StandIn(monkeypatch)
    tell_a_run(tmp_path, ["wandb"], "50%: a")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    tell_a_run(tmp_path, ["wandb"], "50%: a")
    monkeypatch.setenv("WANDB_NAME", "named")
    tell_a_run(tmp_path, ["wandb"], "50%: a")
    assert stand_in.named("init") == [
        {"project": "50___a", "given": ()},
        {"project": "theirs", "name": "50___a", "given": ()},
        {"project": "theirs", "given": ()},
    ]
    assert len(stand_in.named("log")) == 12


def test_what_mlflow_is_told(tmp_path, monkeypatch):
    stand_in = StandIn(monkeypatch)
    tell_a_run(tmp_path, ["mlflow"], "it's 50%: a")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    monkeypatch.setenv("MLFLOW_TAGS", json.dumps({"a": "b"}))
    tell_a_run(tmp_path, ["mlflow"])
    assert [given["name"] for given in stand_in.named("create")] == ["it_s_50___a", "theirs"]
    assert stand_in.named("start")[1]["tags"] == {"a": "b"}


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
