"""A short float32 run gives the losses that it gave when `loss_curve.json` was kept: a change that should not change the
numbers proves it here. One that should keeps the new curve: `pytest tests/invariants --keep-losses`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lowrank

KEPT = Path(__file__).parent / "loss_curve.json"
TOLERANCE = 1e-6


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


def test_the_losses_are_those_that_were_kept(write_config, request):
    config = write_config(data={"max_length": 64}, training={"num_train_epochs": 3})
    found = losses_of(lowrank.train(config).output_dir)
    if request.config.getoption("--keep-losses"):
        KEPT.write_text(json.dumps(found, indent=1) + "\n")
    assert found == pytest.approx(json.loads(KEPT.read_text()), rel=TOLERANCE)
