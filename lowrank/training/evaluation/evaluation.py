"""How good a model is: the loss per supervised token, and what came of generated answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from lowrank.attention import segments
from lowrank.data import BatchPlan
from lowrank.training.losses.supervised import Loss
from lowrank.training.machine.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated answer.

    Attributes:
        prompt: What the model was given, decoded.
        expected: The row's own answer.
        answer: The model's.
        correct: Whether the two count as the same.
        turns: (role, text) of what stands before the answer, for a person to read.
        loss: Mean over the supervised tokens of the row; None where they were not looked at by row.
    """

    prompt: str
    expected: str
    answer: str
    correct: bool
    turns: tuple[tuple[str, str], ...] = ()
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came out.

    Attributes:
        loss: Mean over the supervised tokens.
        supervised: How many there are.
        exact_match: Share of right answers, None where none were generated.
        samples: The answers, in the order of the rows.
        scores: What a task other than the next token, or preferences, measure beside the loss, by name; None for the
            next token.
    """

    loss: float
    supervised: int
    exact_match: float | None = None
    samples: tuple[Sample, ...] = ()
    scores: Mapping[str, float] | None = None

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(min(self.loss, 700.0))

    def metrics(self) -> dict[str, float]:
        """The figures, for `metrics.jsonl`."""
        if self.scores is not None:
            figures = {"eval_loss": self.loss, **{f"eval_{name}": value for name, value in self.scores.items()}}
        else:
            figures = {"eval_loss": self.loss, "eval_perplexity": self.perplexity}
        return figures if self.exact_match is None else {**figures, "eval_exact_match": self.exact_match}

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Evaluation:
        """What `as_dict` gave."""
        samples = tuple(_sample(sample) for sample in state["samples"])
        return cls(state["loss"], state["supervised"], state["exact_match"], samples, state.get("scores"))

    def __str__(self) -> str:
        told = [f"{name} {value:.4f}" for name, value in (self.scores or {}).items()]
        told = [f"perplexity {self.perplexity:,.3f}"] if self.scores is None else told
        figures = ", ".join([f"evaluation loss {self.loss:.4f}", *told])
        return figures if self.exact_match is None else f"{figures}, exact match {self.exact_match:.1%}"


def _sample(state: dict[str, Any]) -> Sample:
    turns = tuple((role, text) for role, text in state.get("turns", ()))  # of a checkpoint, pairs come back as lists
    return Sample(state["prompt"], state["expected"], state["answer"], state["correct"], turns, state.get("loss"))


@dataclass(frozen=True, slots=True)
class ExampleLosses:
    """What each of E examples lost.

    Attributes:
        sums: Of the losses of its supervised tokens, (E,) float64.
        supervised: How many there are, (E,) int64.
    """

    sums: np.ndarray
    supervised: np.ndarray

    @property
    def mean(self) -> float:
        """Over all supervised tokens."""
        return math.fsum(self.sums) / self.count

    @property
    def count(self) -> int:
        """Supervised tokens of all examples."""
        return int(self.supervised.sum())

    def by_row(self, rows: np.ndarray) -> dict[int | None, float]:
        """For each row its mean over the supervised tokens of the examples that it gave.

        Args:
            rows: The row of each example, (E,).
        """
        found, which = np.unique(rows, return_inverse=True)
        sums, counts = (np.bincount(which, weights) for weights in (self.sums, self.supervised))
        return dict(zip(found.tolist(), (sums / counts).tolist(), strict=True))


@torch.no_grad()
def losses_of(
    model: Any,
    plan: BatchPlan,
    loss: Loss,
    on_batch: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> ExampleLosses:
    """The losses of a plan's examples, as each has them alone.

    Args:
        model: A causal language model; it is in eval mode meanwhile.
        plan: What it is measured on.
        loss: Of a batch's supervised tokens.
        on_batch: Told how many batches are done after each of them.
        ranks: The processes that share the batches; all get the whole result.
    """
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    sums, supervised = np.zeros(len(plan.examples)), np.zeros(len(plan.examples), dtype=np.int64)
    left = iter(plan.epoch(0))
    while group := list(islice(left, ranks.count)):
        mine = ranks.index < len(group)
        members = group[ranks.index if mine else 0]  # all go through the model equally often
        batch = plan.batch(members)
        with segments(model, batch.segments, batch.parents, batch.padded):
            losses = loss.each(model, batch.to(device))
        if mine:
            which = members.rows[batch.holders.examples]
            np.add.at(sums, which, losses.double().cpu().numpy()[batch.holders.targets])
            np.add.at(supervised, which, 1)
        if on_batch is not None:
            on_batch(len(group))
    model.train(was_training)
    shares, counts = zip(*ranks.all((sums, supervised)), strict=True)
    return ExampleLosses(np.sum(shares, axis=0), np.sum(counts, axis=0))
