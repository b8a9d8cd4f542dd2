"""Kahneman-Tversky optimisation, Ethayarajh 2024: answers that are wanted or not, without pairs."""

from __future__ import annotations

import torch

from lowrank.training.losses.objective import Answers, Judgement, Numbers


class Kto:
    """An answer's worth is what it has gained on the reference, beyond what answers gain at large (the KL)."""

    own_weight = 0.0

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers

    def __call__(self, answers: Answers) -> Judgement:
        """Of each answer, (A,)."""
        numbers = self.numbers  # whose `loss_type` decides whether there is a KL
        rewards = numbers.beta * answers.ratios
        gained = rewards if answers.kl is None else rewards - numbers.beta * answers.kl
        liked = numbers.desirable_weight * torch.sigmoid(-gained)  # 1 - sigmoid
        unliked = numbers.undesirable_weight * torch.sigmoid(gained)
        return Judgement(torch.where(answers.liked, liked, unliked), rewards)
