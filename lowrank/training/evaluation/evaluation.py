"""How good a model is: the loss per supervised token, and what came of generated answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from lowrank.attention import segments
from lowrank.data import Batch
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
    """

    prompt: str
    expected: str
    answer: str
    correct: bool
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came out.

    Attributes:
        loss: Mean over the supervised tokens.
        supervised: How many there are.
        exact_match: Share of right answers, None where none were generated.
        samples: The answers, in the order of the rows.
    """

    loss: float
    supervised: int
    exact_match: float | None = None
    samples: tuple[Sample, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(min(self.loss, 700.0))

    def metrics(self) -> dict[str, float]:
        """The figures, for `metrics.jsonl`."""
        figures = {"eval_loss": self.loss, "eval_perplexity": self.perplexity}
        return figures if self.exact_match is None else {**figures, "eval_exact_match": self.exact_match}

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Evaluation:
        """What `as_dict` gave."""
        samples = tuple(_sample(sample) for sample in state["samples"])
        return cls(state["loss"], state["supervised"], state["exact_match"], samples)

    def __str__(self) -> str:
        figures = f"evaluation loss {self.loss:.4f}, perplexity {self.perplexity:,.3f}"
        return figures if self.exact_match is None else f"{figures}, exact match {self.exact_match:.1%}"


def _sample(state: dict[str, Any]) -> Sample:
    turns = tuple((role, text) for role, text in state.get("turns", ()))  # of a checkpoint, pairs come back as lists
    return Sample(state["prompt"], state["expected"], state["answer"], state["correct"], turns)


@torch.no_grad()
def mean_loss(
    model: Any,
    batches: Iterable[Batch],
    loss: Loss,
    on_batch: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[float, int]:
    """The loss per supervised token over `batches`, and the number of these tokens.

    Args:
        model: A causal language model; it is in eval mode meanwhile.
        batches: What it is measured on.
        loss: Sums over a batch's supervised tokens.
        on_batch: Told 1 after each batch.
        ranks: The processes that share the batches; all get the whole result.
    """
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    total, supervised = 0.0, 0
    left = iter(batches)
    while group := list(islice(left, ranks.count)):
        mine = ranks.index < len(group)
        batch = group[ranks.index if mine else 0]  # all go through the model equally often
        with segments(model, batch.segments):
            value = float(loss(model, batch.to(device)))
        total += value if mine else 0.0
        supervised += batch.supervised if mine else 0
        if on_batch is not None:
            on_batch(len(group))
    model.train(was_training)
    totals, counts = zip(*ranks.all((total, supervised)), strict=True)
    return math.fsum(totals) / sum(counts), sum(counts)
