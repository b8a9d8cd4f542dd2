"""Checkpoints: when they are due, which stay, and that a failing one harms nothing."""

from __future__ import annotations

import errno
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import tiny_llama

import lowrank
from lowrank.errors import InputError, JobError
from lowrank.storage import machine_figures
from lowrank.storage.machine_figures import figure
from lowrank.training.checkpoints.keeping import Keeping
from lowrank.training.checkpoints.snapshot import capture, restore
from lowrank.training.checkpoints.state import read_state
from lowrank.training.checkpoints.writer import Checkpoints, checkpoints_in
from lowrank.training.evaluation.best import Best
from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.optimisers.build import build_optimizer
from lowrank.training.optimisers.schedule import build_schedule
from lowrank.training.optimisers.settings import OptimizerSettings
from lowrank.training.run import Callback, Run, StepMetrics

METRICS = StepMetrics(1, 0.1, 1.0, 1e-3, 1.0, 8, 4, 0.1, 0.0, 1)


def new_run(folder, steps: int = 10, seed: int = 0) -> Run:
    torch.manual_seed(seed)
    model = lowrank.wrap(tiny_llama(), lowrank.LoraConfig(r=4, target_modules="all-linear"))
    optimizer = build_optimizer(model, OptimizerSettings(1e-2))
    schedule = build_schedule(optimizer, "linear", warmup_steps=2, total_steps=steps)
    return Run(model, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=False), folder, steps)


def take_steps(run: Run, count: int) -> None:
    for _ in range(count):
        ids = torch.randint(3, 300, (1, 8))
        run.model(ids, labels=ids).loss.backward()
        run.optimizer.step()
        run.schedule.step()
        run.optimizer.zero_grad()
        run.step += 1
        run.tell(Callback.on_step_end, METRICS)


def callback(**options) -> Checkpoints:
    keeping = Keeping(options.pop("keep", 2), options.pop("steps", None), options.pop("minutes", None))
    save = lambda folder: (folder / "weights").write_text("x")  # noqa: E731
    return Checkpoints(save, options.pop("told", print), keeping, **options)


def there(run: Run) -> list[str]:
    return [path.name for path in checkpoints_in(run.output_dir)]


def test_every_so_many_steps_and_the_newest_stay(tmp_path):
    run = new_run(tmp_path)
    run.callbacks = [callback(steps=3)]
    take_steps(run, 10)
    assert there(run) == ["step-9", "step-10"]  # the last step's is written whether or not it is a third one
    assert (tmp_path / "checkpoints" / "step-10" / "weights").exists()


def test_after_so_many_minutes(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    run = new_run(tmp_path)
    run.callbacks = [callback(minutes=1.0)]
    for second in (30, 59, 61, 100, 122):
        clock[0] = second
        take_steps(run, 1)
    assert there(run) == ["step-3", "step-5"]


def test_none_without_a_reason(tmp_path):
    run = new_run(tmp_path)
    run.callbacks = [callback()]
    take_steps(run, 10)
    assert there(run) == []


def test_the_best_stays(tmp_path):
    run = new_run(tmp_path)
    checkpoints = callback(steps=2, keep=1, best=Best("loss"))
    run.callbacks = [checkpoints]
    for step, loss in enumerate([3.0, 2.0, 2.5, 2.0, float("nan"), 4.0], start=1):
        run.step = step
        checkpoints.on_eval(run, Evaluation(loss, 10))
        checkpoints.on_step_end(run, METRICS)
    assert there(run) == ["step-2", "step-6"]
    assert checkpoints.best.value == 2.0


def test_a_best_one_that_could_not_be_kept_is_not_the_best(tmp_path, monkeypatch):
    """Its weights are gone: the best is the one before, and its checkpoint is still there."""

    def full(folder, state):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = new_run(tmp_path)
    checkpoints = callback(keep=1, best=Best("loss"), told=lambda line: None)
    run.callbacks = [checkpoints]

    def evaluated(step: int, loss: float) -> tuple[int | None, list[str]]:
        run.step = step
        checkpoints.on_eval(run, Evaluation(loss, 10))
        checkpoints.on_step_end(run, METRICS)
        return checkpoints.best.step, there(run)

    with monkeypatch.context() as patch:
        patch.setattr("lowrank.training.checkpoints.writer.write_state", full)
        assert evaluated(1, 3.0) == (None, [])
    assert evaluated(2, 3.5) == (2, ["step-2"])
    with monkeypatch.context() as patch:
        patch.setattr("lowrank.training.checkpoints.writer.write_state", full)
        assert evaluated(3, 1.0) == (2, ["step-2"])
    assert evaluated(4, 2.0) == (4, ["step-4"])
    monkeypatch.setattr("lowrank.training.checkpoints.writer.write_state", full)
    assert evaluated(10, 1.5) == (10, ["step-4"])  # the last step's weights are in the model


def test_other_names_and_what_a_death_left(tmp_path):
    run = new_run(tmp_path)
    run.callbacks = [callback(steps=1)]
    take_steps(run, 1)
    for name in ("step-7.broken", "step-x", ".step-9.incomplete-abc"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert there(run) == ["step-1"]
    run.tell(Callback.on_run_start)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-1", "step-7.broken", "step-x"}


def test_a_full_disk_stops_nothing(tmp_path, monkeypatch):
    lines = []

    def full(folder, state):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = new_run(tmp_path)
    run.callbacks = [callback(steps=2, told=lines.append)]
    take_steps(run, 2)
    with monkeypatch.context() as patch:
        patch.setattr("lowrank.training.checkpoints.writer.write_state", full)
        take_steps(run, 2)
    assert there(run) == ["step-2"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert "step-2 is the newest" in lines[0]
    assert "the disk is full" in lines[0]
    take_steps(run, 2)
    assert there(run) == ["step-2", "step-6"]
    monkeypatch.setattr("lowrank.training.checkpoints.writer.write_state", full)
    run.step += 1
    with pytest.raises(JobError, match="disk is full"):
        run.callbacks[0].write(run)


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    lines = []
    run = new_run(tmp_path)
    run.callbacks = [callback(steps=1, told=lines.append)]
    (tmp_path / "checkpoints").write_text("a file is in the way")
    take_steps(run, 1)
    assert "no checkpoint after step 1" in lines[0]
    assert (tmp_path / "checkpoints").read_text() == "a file is in the way"


def test_a_restored_run_goes_on_to_the_bit(tmp_path):
    straight = new_run(tmp_path / "a")
    take_steps(straight, 6)

    first = new_run(tmp_path / "b")
    first.callbacks = [callback(steps=3)]
    take_steps(first, 3)
    second = new_run(tmp_path / "b", seed=99)
    restore(second, read_state(tmp_path / "b" / "checkpoints" / "step-3"))
    take_steps(second, 3)

    expected, found = capture(straight), capture(second)
    assert expected["schedule"] == found["schedule"]
    assert torch.equal(expected["random"][0]["torch"], found["random"][0]["torch"])
    for part in ("model",):
        for name, tensor in expected[part].items():
            assert torch.equal(tensor, found[part][name]), name
    for name, kept in expected["optimizer"]["state"].items():
        for key, tensor in kept.items():
            assert torch.equal(tensor, found["optimizer"]["state"][name][key]), (name, key)


def test_a_resumed_run_rests_on_the_figures_that_it_began_with(tmp_path, monkeypatch):
    """On a machine that others use they are measured anew in each process, and may come out otherwise."""
    known = {}
    monkeypatch.setattr(machine_figures, "_known", known)
    monkeypatch.setattr(machine_figures, "_write", lambda file, found: None)
    figure("which kernel", lambda: 0.5)
    state = capture(new_run(tmp_path))
    known.clear()
    figure("which kernel", lambda: 2.0)
    restore(new_run(tmp_path), state)
    assert figure("which kernel", lambda: 3.0) == 0.5


def test_another_adapter_is_refused(tmp_path):
    run = new_run(tmp_path)
    run.callbacks = [callback(steps=1)]
    take_steps(run, 1)
    state = read_state(tmp_path / "checkpoints" / "step-1")
    other = new_run(tmp_path)
    other.model = lowrank.wrap(tiny_llama(), lowrank.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="only in the checkpoint"):
        restore(other, state)
    wider = new_run(tmp_path)
    wider.model = lowrank.wrap(tiny_llama(), lowrank.LoraConfig(r=8, target_modules="all-linear"))
    with pytest.raises(InputError, match=r"is \[4, 32\] there and \[8, 32\] here"):
        restore(wider, state)


class Thread:
    """A process of a run, as a thread: they wait for one another, and say things."""

    def __init__(self, index: int, barrier: threading.Barrier, box: dict[int, object]) -> None:
        self.index, self.main, self.count, self.barrier, self.box = index, index == 0, 2, barrier, box

    def all(self, value):
        self.box[self.index] = value
        self.barrier.wait()
        values = [self.box[index] for index in range(self.count)]
        self.barrier.wait()
        return values

    def first(self, value):
        return self.all(value)[0]

    def any(self, here):
        return any(self.all(here))


def test_all_processes_learn_that_it_could_not_be_written(tmp_path, monkeypatch):
    """Else the others would wait for the first one, or take another best than it."""

    def full(folder, state):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lowrank.training.checkpoints.writer.write_state", full)
    barrier, box = threading.Barrier(2, timeout=20), {}
    runs = [new_run(tmp_path) for _ in range(2)]

    def work(index: int) -> tuple[bool, int | None]:
        run = runs[index]
        checkpoints = callback(steps=1, best=Best("loss"), told=lambda _: None, ranks=Thread(index, barrier, box))
        run.callbacks, run.step = [checkpoints], 1
        checkpoints.on_eval(run, Evaluation(1.0, 10))
        checkpoints.on_step_end(run, METRICS)
        with pytest.raises(JobError, match="disk is full"):
            checkpoints.write(run)
        return run.stop, checkpoints.best.step

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [(False, None)] * 2
    assert there(runs[0]) == []
