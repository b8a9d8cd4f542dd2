"""Direct preference optimisation, Rafailov 2023, and its variants of one form."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lowrank.training.losses.objective import Answers, Judgement, Numbers, smoothed


class Dpo:
    """A pair's loss is a function of how much more the better answer has gained on the reference than the worse one.

    A row's margin is what that is to be at least, in units of the reward (ODPO, Amini 2024).
    """

    own_weight = 0.0

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers
        self._loss = {
            "sigmoid": self._sigmoid,
            "hinge": self._hinge,
            "robust": self._robust,
            "apo_zero": self._apo_zero,
            "apo_down": self._apo_down,
        }[numbers.loss_type]

    def __call__(self, answers: Answers) -> Judgement:
        """Of each pair, (P,)."""
        rewards = self.numbers.beta * answers.ratios
        return Judgement(self._loss(answers, rewards), rewards)

    def _sigmoid(self, answers: Answers, rewards: torch.Tensor) -> torch.Tensor:
        return smoothed(answers.apart(rewards) - answers.margins, self.numbers.label_smoothing)

    def _hinge(self, answers: Answers, rewards: torch.Tensor) -> torch.Tensor:
        """SLiC, Zhao 2023."""
        return torch.relu(1 - answers.apart(rewards) + answers.margins)

    def _robust(self, answers: Answers, rewards: torch.Tensor) -> torch.Tensor:
        """Without bias where labels are wrong that often, Chowdhury 2024."""
        wrong, logits = self.numbers.label_smoothing, answers.apart(rewards) - answers.margins
        return (wrong * F.logsigmoid(-logits) - (1 - wrong) * F.logsigmoid(logits)) / (1 - 2 * wrong)

    def _apo_zero(self, answers: Answers, rewards: torch.Tensor) -> torch.Tensor:
        """For chosen answers that are better than the model's own, D'Oosterlinck 2024, equation 7."""
        return 1 - torch.sigmoid(rewards[answers.chosen]) + torch.sigmoid(rewards[answers.rejected])

    def _apo_down(self, answers: Answers, rewards: torch.Tensor) -> torch.Tensor:
        """For chosen answers that are worse than the model's own, equation 8."""
        return torch.sigmoid(rewards[answers.chosen]) + 1 - torch.sigmoid(answers.apart(rewards))
