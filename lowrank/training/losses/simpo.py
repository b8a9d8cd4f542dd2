"""Simple preference optimisation, Meng 2024: without a reference."""

from __future__ import annotations

from lowrank.training.losses.objective import Answers, Judgement, Numbers, smoothed


class Simpo:
    """An answer's reward is the mean log-probability of its tokens; the better one's is to be larger by gamma.

    With `cpo_alpha` the chosen answer is learned as well (CPO-SimPO).
    """

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers
        self.own_weight = numbers.cpo_alpha

    def __call__(self, answers: Answers) -> Judgement:
        """Of each pair, (P,)."""
        rewards = self.numbers.beta * answers.means
        logits = answers.apart(rewards) - self.numbers.simpo_gamma
        return Judgement(smoothed(logits, self.numbers.label_smoothing), rewards)
