"""The loss of preferences: a function of the log-probabilities of answers, which come from hidden states in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowrank.attention import segments
from lowrank.data import Batch
from lowrank.training.losses.objective import Answers, Judgement, Objective
from lowrank.training.losses.supervised import LogProbs
from lowrank.training.machine.ranks import ALONE, Ranks

FIGURES = ("accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
"""What is told of pairs: means over them."""
UNPAIRED = ("accuracy", "margin", "kl")
"""What is told of answers without pairs; the margin is the reward of the wanted, less that of the others."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a batch's answers have come to.

    Attributes:
        answers: Their log-probabilities, and what was known of them.
        judgement: What the objective says.
        own: Sum of the cross-entropy of what is to become more likely, ().
    """

    answers: Answers
    judgement: Judgement
    own: torch.Tensor


class PreferenceLoss:
    """Sums over a batch's pairs (or answers), the cross-entropy of its chosen answers, and figures for a person.

    Attributes:
        kl: How far the model is from the reference, as it was estimated before a step; None where nothing needs it.
    """

    def __init__(self, log_probs: LogProbs, objective: Objective, name: str, *, paired: bool, referenced: bool) -> None:
        """Learn from preferences.

        Args:
            log_probs: Of a batch's targets.
            objective: Of the answers.
            name: What it is called.
            paired: Whether a summand is a pair, and not an answer.
            referenced: Whether batches are to say what a reference makes of their answers.
        """
        self.log_probs, self.objective, self.paired, self.referenced = log_probs, objective, paired, referenced
        self.why = f"{name}, {log_probs.why}"
        self.figures = FIGURES if paired else UNPAIRED
        self.kl: torch.Tensor | None = None

    def __call__(self, model: Any, batch: Batch) -> torch.Tensor:
        """(2 + figures,): the objective's sum, the weighted cross-entropy's, and the figures', which are sums too."""
        seen = self.seen(model, batch)
        sums = [seen.judgement.losses.sum(), self.objective.own_weight * seen.own]
        return torch.stack([*sums, *self._figures(seen)])

    @torch.no_grad()
    def each(self, model: Any, batch: Batch) -> torch.Tensor:
        """Of each pair (or answer), its objective's loss."""
        return self.seen(model, batch).judgement.losses

    def seen(self, model: Any, batch: Batch) -> Seen:
        """A batch's answers, judged."""
        found = self.log_probs.log_probs(model, batch)
        answers = self._answers(found, batch)
        own = -found.index_select(0, batch.given["whole"]).sum() if self.objective.own_weight else found.new_zeros(())
        return Seen(answers, self.objective(answers), own)

    @torch.no_grad()
    def prepare(self, model: Any, batches: Sequence[Batch], idle: int = 0, ranks: Ranks = ALONE) -> None:
        """Estimates how far the model is from the reference, where batches have answers to others' prompts beside them.

        Args:
            model: As it is before a step, or an evaluation.
            batches: Of the step (or evaluation), those of this process.
            idle: So many of the last count for nothing.
            ranks: The processes that share the step.
        """
        found = []
        was_training = model.training
        model.eval()
        for number, batch in enumerate(batches):
            if batch.beside is not None:
                with segments(model, batch.beside.segments, padded=batch.beside.padded):
                    gained = self.answer_log_probs(model, batch.beside) - batch.beside.given["reference"]
                sums = torch.stack([gained.sum(), gained.new_full((), float(len(gained)))])
                found.append(sums if number < len(batches) - idle else torch.zeros_like(sums))
        model.train(was_training)
        if found:
            total, count = ranks.total(torch.stack(found).sum(0))
            self.kl = (total / count).clamp(min=0.0)

    def answer_log_probs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Sum over the tokens of each of a batch's answers, (A,)."""
        return _by_answer(self.log_probs.log_probs(model, batch), batch)

    def _answers(self, found: torch.Tensor, batch: Batch) -> Answers:
        given = batch.given
        rest = {name: given[name] for name in ("lengths", "chosen", "rejected", "margins", "liked")}
        return Answers(_by_answer(found, batch), reference=given.get("reference"), kl=self.kl, **rest)

    def _figures(self, seen: Seen) -> list[torch.Tensor]:
        """Sums over pairs, or over answers without."""
        rewards = seen.judgement.rewards.detach()
        if self.paired:
            return _paired_figures(seen.answers, rewards)
        apart = torch.where(seen.answers.liked, rewards, -rewards)
        kl = torch.zeros_like(apart) if self.kl is None else self.kl.expand_as(apart)
        return [(apart > 0).to(rewards.dtype).sum(), apart.sum(), kl.sum()]


def _paired_figures(answers: Answers, rewards: torch.Tensor) -> list[torch.Tensor]:
    """Sums over pairs, in the order of `FIGURES`."""
    apart, log_probs = answers.apart(rewards), answers.log_probs.detach()
    sides = [values[side].sum() for values in (rewards, log_probs) for side in (answers.chosen, answers.rejected)]
    return [(apart > 0).to(rewards.dtype).sum(), apart.sum(), *sides]


def _by_answer(log_probs: torch.Tensor, batch: Batch) -> torch.Tensor:
    given = batch.given
    sums = log_probs.new_zeros(len(given["lengths"]))
    return sums.index_add(0, given["answers"], log_probs.index_select(0, given["tokens"]))
