"""Fifty steps of lowrank on packs give the losses of fifty steps of peft on the same rows padded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import tiny_llama

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def loss_curves(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "contestants"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import loss_curves

    yield loss_curves
    for name in ("loss_curves", "job"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_every_loss_of_fifty_steps(loss_curves, dora):
    job = loss_curves.Job("tiny", r=4, rows=4, steps=50, mean_length=24, longest=60, learning_rate=1e-2)
    ours, theirs = loss_curves.curves(lambda: tiny_llama(initializer_range=0.1), job, dora=dora)
    assert len(ours) == 50
    assert ours[-1] < 0.97 * ours[0], "something was learnt"
    assert loss_curves.largest_difference(ours, theirs) <= 1e-5
