"""How busy others keep the machine, by figures that the kernel could have given; nothing is timed."""

from __future__ import annotations

import os
from types import SimpleNamespace

import psutil
import pytest
import torch

from lowrank.storage import machine_load
from lowrank.storage.machine_load import Load, Usage, load_since, usage_now


@pytest.fixture
def kernel(monkeypatch):
    """Four cores of which this process may use 0, 1 and 3; both answers move on with `pass_by`."""
    clock = SimpleNamespace(now=100.0, own=5.0, cores=[0.0] * 4)

    def times(percpu: bool) -> list[SimpleNamespace]:
        return [SimpleNamespace(user=used, system=used, idle=7.0, iowait=3.0, guest=used) for used in clock.cores]

    own = SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=clock.own, system=0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 3}, raising=False)
    monkeypatch.setattr(psutil, "cpu_times", times)
    monkeypatch.setattr(psutil, "Process", lambda: own)
    monkeypatch.setattr(machine_load.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    return clock


def test_own_work_and_other_cores_do_not_count(kernel, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(machine_load.time, "sleep", slept.append)
    began = usage_now()
    assert began == Usage(at=100.0, all=0.0, own=5.0)
    kernel.now, kernel.own = 102.0, 7.0
    kernel.cores = [1.0, 0.75, 9.0, 0.25]  # user and system each
    assert load_since(began) == Load(cores=3, busy=pytest.approx((4.0 - 2.0) / 2.0), threads=3)
    assert slept == [0.0]  # two seconds are long enough


def test_a_moment_is_waited_for(kernel, monkeypatch):
    def sleep(seconds: float) -> None:
        kernel.now += seconds
        kernel.cores[1] += seconds / 2

    monkeypatch.setattr(machine_load.time, "sleep", sleep)
    assert load_since(usage_now()).busy == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("load", "crowded", "told"),
    [
        (Load(cores=2, busy=0.3, threads=2), False, None),
        (Load(cores=2, busy=0.9, threads=2), True, "keep 0.9 of 2 cores busy"),
        (Load(cores=2, busy=0.9, threads=2), True, "OMP_NUM_THREADS=1"),
        (Load(cores=2, busy=1.0, threads=1), False, None),
        (Load(cores=2, busy=2.0, threads=1), True, None),  # no fewer threads than one
        (Load(cores=16, busy=6.2, threads=8), False, None),
        (Load(cores=16, busy=11.8, threads=8), True, "computes with 8 threads"),
        (Load(cores=16, busy=11.8, threads=8), True, "OMP_NUM_THREADS=4"),
        (Load(cores=16, busy=16.0, threads=8), True, "OMP_NUM_THREADS=1"),
    ],
)
def test_what_is_told(load, crowded, told):
    assert load.crowded == crowded
    assert (load.advice is None) == (told is None)
    assert told is None or told in load.advice


def test_this_machine_can_be_asked():
    load = load_since(usage_now())
    assert 0 <= load.busy <= load.cores + 1
    assert load.threads == torch.get_num_threads()
