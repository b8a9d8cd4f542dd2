"""Contrastive preference optimisation, Xu 2024: without a reference, held by the chosen answer's own likelihood."""

from __future__ import annotations

import torch

from lowrank.training.losses.objective import Answers, Judgement, Numbers, smoothed


class Cpo:
    """DPO under a reference to which all answers are alike, and the chosen answer's cross-entropy beside it."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers
        self.own_weight = numbers.cpo_alpha

    def __call__(self, answers: Answers) -> Judgement:
        """Of each pair, (P,)."""
        rewards = self.numbers.beta * answers.log_probs
        apart = answers.apart(rewards)
        if self.numbers.loss_type == "hinge":
            return Judgement(torch.relu(1 - apart), rewards)
        return Judgement(smoothed(apart, self.numbers.label_smoothing), rewards)
