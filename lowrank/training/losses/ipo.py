"""Identity preference optimisation, Azar 2023."""

from __future__ import annotations

from lowrank.training.losses.objective import Answers, Judgement, Numbers


class Ipo:
    """The gain of the better answer over the worse one is to be 1 / (2 beta), per token, and no more."""

    own_weight = 0.0

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers

    def __call__(self, answers: Answers) -> Judgement:
        """Of each pair, (P,)."""
        beta = self.numbers.beta
        apart = answers.apart(answers.ratios / answers.lengths)
        return Judgement((apart - 1 / (2 * beta)).square(), beta * answers.ratios)
