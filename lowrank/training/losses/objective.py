"""What an objective is told of a batch's answers, and what it says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class Numbers:
    """An objective's numbers, by TRL's names.

    Attributes:
        beta: How strongly answers are held to the reference, or how sharply they are told apart.
        loss_type: The objective's variant; "" where it has none.
        label_smoothing: The share of labels that are taken to be wrong.
        simpo_gamma: By how much a chosen answer is to be more likely.
        cpo_alpha: Weight of the chosen answer's own cross-entropy.
        desirable_weight: Of wanted answers.
        undesirable_weight: Of unwanted ones.
    """

    beta: float
    loss_type: str = ""
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of a batch, A of them; of pairs P.

    Attributes:
        log_probs: Sum over each answer's tokens, (A,) float32 at least.
        lengths: Tokens of each, (A,).
        reference: What the reference makes of each, (A,); None for objectives without one.
        chosen: Of each pair the better answer, (P,) int64.
        rejected: The worse one, (P,) int64.
        margins: By how much it is better, (P,).
        liked: Whether each is wanted, (A,) bool.
        kl: How far the model has gone from the reference, as KTO has it, (); None for other objectives.
    """

    log_probs: torch.Tensor
    lengths: torch.Tensor
    reference: torch.Tensor | None
    chosen: torch.Tensor
    rejected: torch.Tensor
    margins: torch.Tensor
    liked: torch.Tensor
    kl: torch.Tensor | None = None

    @property
    def ratios(self) -> torch.Tensor:
        """log of how much more likely each is than under the reference, (A,)."""
        assert self.reference is not None, "the objective has no reference"
        return self.log_probs - self.reference

    @property
    def means(self) -> torch.Tensor:
        """Mean log-probability of each answer's tokens, (A,)."""
        return self.log_probs / self.lengths

    def apart(self, values: torch.Tensor) -> torch.Tensor:
        """How much larger a value is of each pair's better answer, (P,)."""
        return values[self.chosen] - values[self.rejected]


class Judgement(NamedTuple):
    """What an objective says of a batch.

    Attributes:
        losses: Of each pair, (P,), or of each answer, (A,).
        rewards: What it takes each answer to be worth, (A,); no gradient is wanted of them.
    """

    losses: torch.Tensor
    rewards: torch.Tensor


class Objective(Protocol):
    """A loss that is a function of answers' log-probabilities.

    Attributes:
        own_weight: Weight of the chosen answers' own cross-entropy, a mean over their tokens.
    """

    @property
    def own_weight(self) -> float:
        """How much the cross-entropy of what was chosen counts beside the objective's own loss."""
        ...

    def __call__(self, answers: Answers) -> Judgement:
        """What it says of a batch."""
        ...


def smoothed(logits: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """-log of the probability that labels are right, a share of which are taken to be wrong (cDPO, Mitchell 2023)."""
    right = -F.logsigmoid(logits)
    return right if not label_smoothing else (1 - label_smoothing) * right - label_smoothing * F.logsigmoid(-logits)
