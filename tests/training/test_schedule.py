"""Schedules: after the warm-up they are transformers' own, step by step."""

from __future__ import annotations

import pytest
import torch
import transformers

from lowrank.training.optimisers.schedule import SCHEDULES, build_schedule

WARMUP, TOTAL = 7, 50
THEIRS = {
    "cosine": ("cosine", {}),
    "cosine_with_min_lr": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    "linear": ("linear", {}),
    "constant": ("constant_with_warmup", {}),
    "inverse_sqrt": ("inverse_sqrt", {}),
    "warmup_stable_decay": ("warmup_stable_decay", {"num_decay_steps": 12, "min_lr_ratio": 0.1}),
}


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)


def rates(schedule, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_after_the_warm_up_it_is_transformers(name):
    theirs, options = THEIRS[name]
    mine = build_schedule(optimizer(), name, warmup_steps=WARMUP, total_steps=TOTAL, min_lr_ratio=0.1, decay_steps=12)
    expected = transformers.get_scheduler(
        theirs,
        optimizer(),
        num_warmup_steps=WARMUP,
        num_training_steps=TOTAL,
        scheduler_specific_kwargs=options or None,
    )
    assert rates(mine, TOTAL)[WARMUP:] == pytest.approx(rates(expected, TOTAL)[WARMUP:], abs=1e-9)


def test_the_warm_up_rises_evenly_and_wastes_no_step():
    found = rates(build_schedule(optimizer(), "constant", warmup_steps=4, total_steps=10), 6)
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])


@pytest.mark.parametrize("name", SCHEDULES)
def test_runs_of_one_step_and_without_warm_up(name):
    assert rates(build_schedule(optimizer(), name, warmup_steps=0, total_steps=1), 1)[0] == pytest.approx(0.5)
