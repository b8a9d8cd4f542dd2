"""What a schedule's numbers come to in a run of so many steps, told where it is not what they say."""

from __future__ import annotations

import pytest
import torch

from lowrank.config.sections import TrainingSection
from lowrank.recipes.parts.optimisation import remarks, schedule_for


@pytest.mark.parametrize(
    ("given", "steps", "told"),
    [
        (
            {"warmup_steps": 50},
            1,
            "the warm-up of 50 steps is not over within the run's 1 step: the learning rate rises",
        ),
        ({"warmup_steps": 10, "lr_scheduler_type": "constant"}, 10, "never reaches 0.001"),
        ({"warmup_steps": 10}, 11, None),
        ({"warmup_ratio": 0.99}, 2, "the warm-up of 2 steps is not over within the run's 2 steps"),
        ({}, 1, None),
        ({}, 3, None),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_decay_ratio": 0.7, "warmup_ratio": 0.5},
            10,
            "takes the 5 that",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay", "lr_decay_ratio": 0.01}, 10, "the decay is no step long"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, 100, None),
        ({"eval_steps": 11}, 10, "there is no evaluation between: training.eval_steps is 11, more than the run's 10"),
        ({"eval_steps": 10, "save_steps": 100}, 10, None),
    ],
)
def test_numbers_that_the_run_cannot_keep(given, steps, told):
    found = remarks(TrainingSection(output_dir="out", learning_rate=1e-3, **given), steps)
    assert (told is None and not found) or (len(found) == 1 and told in found[0]), found


def test_the_rate_that_is_told_is_the_one_that_is_reached():
    training = TrainingSection(output_dir="out", learning_rate=1e-3, warmup_steps=50)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    factor = schedule_for(training, optimizer, 4).lr_lambdas[0]
    highest = max(1e-3 * factor(step) for step in range(4))
    assert f"rises to {highest:.3g} and" in remarks(training, 4)[0]
