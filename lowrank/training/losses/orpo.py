"""Odds ratio preference optimisation, Hong 2024: fine-tuning and preferences at once, without a reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lowrank.training.losses.objective import Answers, Judgement, Numbers


class Orpo:
    """The chosen text is learned, prompt and all as its authors do, and its odds are to be above the rejected one's."""

    own_weight = 1.0

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers

    def __call__(self, answers: Answers) -> Judgement:
        """Of each pair, (P,)."""
        beta, means = self.numbers.beta, answers.means
        log_odds = answers.apart(means - _log1mexp(means))
        return Judgement(-beta * F.logsigmoid(log_odds), beta * means)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp x) of what is below 0, of which neither part is lost to rounding (Mächler 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -0.6931471805599453
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    )
