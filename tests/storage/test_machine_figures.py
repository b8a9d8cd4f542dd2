"""What was measured once on a machine is not measured again."""

from __future__ import annotations

import json

import pytest
import torch

from lowrank.storage import machine_figures
from lowrank.storage.machine_figures import figure, figures_known, processor, take_up_figures
from lowrank.storage.machine_load import Load


@pytest.fixture(autouse=True)
def _a_new_process(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path))
    monkeypatch.setattr(machine_figures, "_known", {})
    monkeypatch.setattr(machine_figures, "load_since", lambda began: Load(cores=4, busy=0.4, threads=4))


def _never() -> float:
    raise AssertionError("measured again")


def test_is_measured_once(monkeypatch, tmp_path):
    assert figure("speed", lambda: 3.5) == 3.5
    assert figure("speed", _never) == 3.5
    monkeypatch.setattr(machine_figures, "_known", {})
    assert figure("other", lambda: 2.0) == 2.0
    assert figure("speed", _never) == 3.5
    (file,) = (tmp_path / "machines").iterdir()
    assert processor().replace("/", " ") in file.name
    assert f"torch {torch.__version__}" in file.name
    assert json.loads(file.read_text()) == {"speed": 3.5, "other": 2.0}


def test_what_another_process_knew_is_taken_up(monkeypatch):
    figure("speed", lambda: 3.5)
    known = figures_known()
    monkeypatch.setattr(machine_figures, "_known", {})
    figure("speed", lambda: 9.0)
    take_up_figures({**known, "other": 1.0})
    assert figure("speed", _never) == 3.5
    assert figure("other", _never) == 1.0


def test_other_threads_are_another_machine(monkeypatch):
    figure("speed", lambda: 3.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert figure("speed", lambda: 9.0) == 9.0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"speed": "fast"}', '{"speed": null}'])
def test_a_file_that_is_none_is_measured_anew(text, tmp_path, monkeypatch):
    figure("speed", lambda: 3.5)
    (file,) = (tmp_path / "machines").iterdir()
    file.write_text(text)
    monkeypatch.setattr(machine_figures, "_known", {})
    assert figure("speed", lambda: 4.5) == 4.5
    assert json.loads(file.read_text()) == {"speed": 4.5}


def test_a_cache_that_cannot_be_written_keeps_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "file"))
    assert figure("speed", lambda: 3.5) == 3.5


def test_what_was_measured_beside_other_programs_serves_this_process_alone(monkeypatch, tmp_path):
    figure("speed", lambda: 3.5)
    monkeypatch.setattr(machine_figures, "load_since", lambda began: Load(cores=4, busy=0.6, threads=4))
    assert figure("other", lambda: 70.0) == 70.0
    assert figure("other", _never) == 70.0
    (file,) = (tmp_path / "machines").iterdir()
    assert json.loads(file.read_text()) == {"speed": 3.5}
    monkeypatch.setattr(machine_figures, "_known", {})
    monkeypatch.setattr(machine_figures, "load_since", lambda began: Load(cores=4, busy=2.9, threads=1))
    assert figure("speed", _never) == 3.5
    assert figure("other", lambda: 2.0) == 2.0  # with the threads that have cores for themselves
    assert json.loads(file.read_text()) == {"speed": 3.5, "other": 2.0}
