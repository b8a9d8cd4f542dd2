"""`metrics.jsonl` on a full disk, after a death, and from a checkpoint alone."""

from __future__ import annotations

import resource
import signal

import pytest

from lowrank.training.callbacks.metrics_file import MetricsFile, read_metrics
from lowrank.training.callbacks.run_report import ReportWriter
from lowrank.training.run import Run, StepMetrics


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(None, None, None, None, tmp_path, 100)  # type: ignore[arg-type]


def step(run: Run, callback: MetricsFile) -> None:
    run.step += 1
    callback.on_step_end(run, StepMetrics(run.step, 0.1, 1.0, 1e-3, 1.0, 8, 4, 0.1, 0.0, 1))


def steps_in(path) -> list[float]:
    return [line["step"] for line in read_metrics(path)]


@pytest.fixture
def small_disk():
    """No file of this process may be longer than so many bytes: a write is cut short there, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_what_had_no_room_follows_when_there_is(tmp_path, run, small_disk):
    told = []
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, told.append)
    report = ReportWriter(tmp_path / "report.html", "title", {}, path, told=told.append)
    step(run, metrics)
    small_disk(path.stat().st_size + 50)  # in the middle of the second line
    for _ in range(3):
        step(run, metrics)
    assert steps_in(path) == [1]
    assert len(told) == 1
    assert "Make room in" in told[0]
    report.on_run_end(run)  # must not hide why a run broke off
    assert "report.html stays as it is" in told[1]
    lines = metrics.state_dict()["lines"]
    metrics.on_run_end(run)
    assert "the last 3 lines" in told[2]
    small_disk(None)
    step(run, metrics)
    assert steps_in(path) == [1, 2, 3, 4, 5]
    assert path.read_text().startswith(lines)


def test_a_checkpoint_holds_all_of_it(tmp_path, run):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for _ in range(3):
        step(run, first)
    state = first.state_dict()
    expected = path.read_bytes()
    step(run, first)
    for damage in (lambda: None, path.unlink, lambda: path.write_bytes(expected[:40])):
        damage()
        MetricsFile(path).load_state_dict(state)
        assert path.read_bytes() == expected


def test_nothing_is_written_where_nothing_happened(tmp_path, run):
    MetricsFile(tmp_path / "metrics.jsonl").on_run_end(run)
    assert not (tmp_path / "metrics.jsonl").exists()
