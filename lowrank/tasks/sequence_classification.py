"""A label for a text, or for two texts: one of several classes, any of them, or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from lowrank.data import Batch, Examples, padded_batch
from lowrank.data.examples.example import IdsAndMask
from lowrank.data.reading.row_error import RowError
from lowrank.errors import InputError
from lowrank.tasks.encoding import encoded_text, token_types
from lowrank.tasks.labels import MULTI, REGRESSION, SINGLE, Label, Labels, as_kind, label_of, labels_in, shown
from lowrank.tasks.measures import classification_scores
from lowrank.tasks.reading import Encoded
from lowrank.tasks.task import Prediction, SummedLoss, Wishes, labelled_answers


@dataclass(frozen=True, slots=True)
class Payload:
    """What a batch needs of a row beside its tokens.

    Attributes:
        label: As the row has it; None of a row that is asked about.
        second_from: The first token of the second of two texts; None where the model does not tell them apart.
    """

    label: Label | None
    second_from: int | None


class SequenceClassification:
    """The task before its labels are known."""

    name = "sequence_classification"

    def encoder(self, wishes: Wishes) -> Any:
        """A row with its label."""
        return partial(_labelled, wishes.problem_type)

    def learned_from(self, examples: Examples, wishes: Wishes) -> Classifier:
        """With the labels that training rows show."""
        labels = labels_in(examples, wishes.problem_type)
        return Classifier(labels, _weights(examples, labels, wishes.class_weights), wishes.label_smoothing)

    def of_config(self, config: Any) -> Classifier:
        """With those of a trained model."""
        return Classifier(Labels.of_config(config))

    def unlabelled(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, longest: int | None) -> Encoded:
        """A row that is asked about."""
        return _encoded(row, None, tokenizer, longest)


@dataclass(frozen=True)
class Classifier:
    """The task with its labels.

    Attributes:
        labels: What the outputs stand for.
        weights: Of each class in the loss, (k,); None: all alike.
        label_smoothing: So much of the probability is asked for evenly over the classes.
    """

    labels: Labels
    weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    name = SequenceClassification.name

    @property
    def settings(self) -> dict[str, Any]:
        """Of the model's config."""
        return self.labels.settings

    @property
    def told(self) -> str:
        """The labels, and their weights."""
        if self.labels.problem_type == REGRESSION:
            return "a number for each row"
        names = ", ".join(self.labels.names[:12]) + (" ..." if len(self.labels.names) > 12 else "")
        each = "any of" if self.labels.problem_type == MULTI else "one of"
        weighed = "" if self.weights is None else f"; weights {', '.join(f'{one:.3g}' for one in self.weights[:12])}"
        return f"{each} {len(self.labels.names)} labels for each row: {names}{weighed}"

    def collate(self, parts: Sequence[IdsAndMask], payloads: Sequence[Any], pad_token_id: int) -> Batch:
        """Rows padded to the longest."""
        batch = padded_batch(parts, pad_token_id)
        given = token_types(batch, [one.second_from for one in payloads])
        if all(one.label is not None for one in payloads):
            kind = torch.int64 if self.labels.problem_type == SINGLE else torch.float32
            given["labels"] = torch.tensor([self.labels.number(one.label) for one in payloads], dtype=kind)
        return replace(batch, given=given, supervised=len(parts))

    def loss(self, plain: bool = False) -> SummedLoss:
        """Cross-entropy, binary cross-entropy (mean over the classes), or the squared error."""
        names = {SINGLE: "cross-entropy", MULTI: "binary cross-entropy", REGRESSION: "squared error"}
        task = replace(self, weights=None, label_smoothing=0.0) if plain else self
        return SummedLoss(task, f"{names[self.labels.problem_type]} of each row's label")

    def outputs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(b, k)."""
        inputs = {name: tensor for name, tensor in batch.given.items() if name != "labels"}
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **inputs).logits.float()

    def losses(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(b,)."""
        labels = batch.given["labels"]
        if self.labels.problem_type == REGRESSION:
            return functional.mse_loss(outputs[:, 0], labels, reduction="none")
        weights = None if self.weights is None else torch.tensor(self.weights, device=outputs.device)
        if self.labels.problem_type == MULTI:
            wanted = labels * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing
            each = functional.binary_cross_entropy_with_logits(outputs, wanted, weight=weights, reduction="none")
            return each.mean(dim=1)
        return functional.cross_entropy(
            outputs, labels, weight=weights, reduction="none", label_smoothing=self.label_smoothing
        )

    def predictions(self, outputs: Sequence[np.ndarray]) -> list[Prediction]:
        """The likeliest class, those above one half, or the number."""
        return self._said(np.concatenate(outputs))

    def _said(self, outputs: np.ndarray) -> list[Prediction]:
        if self.labels.problem_type == REGRESSION:
            return [Prediction(f"{row[0]:.6g}", {"value": float(row[0])}) for row in outputs]
        if self.labels.problem_type == MULTI:
            return [
                Prediction(shown(tuple(name for name, p in scores.items() if p > 0.5)), scores)
                for scores in map(self._named, 1.0 / (1.0 + np.exp(-outputs)))
            ]
        exp = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        found = [self._named(row) for row in exp / exp.sum(axis=1, keepdims=True)]
        return [Prediction(max(scores, key=scores.__getitem__), scores) for scores in found]

    def _named(self, row: np.ndarray) -> dict[str, float]:
        return dict(zip(self.labels.names, row.tolist(), strict=True))

    def answers(
        self, outputs: Sequence[np.ndarray], examples: Examples, tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[str, str, str]]:
        """Each text, its labels, and those that are said."""
        return labelled_answers(self, outputs, examples, tokenizer)

    def scores(self, outputs: Sequence[np.ndarray], examples: Examples) -> dict[str, float]:
        """As scikit-learn gives them."""
        found = np.concatenate(outputs)
        wanted = np.array([self.labels.number(examples.payload(index).label) for index in range(len(examples))])
        kind = self.labels.problem_type
        said = found[:, 0] if kind == REGRESSION else (found > 0) if kind == MULTI else found.argmax(axis=1)
        return classification_scores(kind, wanted, said.astype(wanted.dtype))

    def refuse_others(self, examples: Examples) -> None:
        """A label that training rows do not show."""
        self.labels.refuse_others(examples)

    def expected(self, payload: Any) -> str:
        """The row's label."""
        return shown(payload.label)


def _labelled(
    problem_type: str | None, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, longest: int | None
) -> Encoded:
    if row.get("label") is None:
        raise RowError("the row has no label", 'Expected {"text": ..., "label": ...}.')
    return _encoded(row, as_kind(label_of(row["label"]), problem_type), tokenizer, longest)


def _encoded(
    row: Mapping[str, Any], label: Label | None, tokenizer: PreTrainedTokenizerBase, longest: int | None
) -> Encoded:
    ids, second_from, cut = encoded_text(row.get("text"), row.get("text_pair"), tokenizer, longest)
    marks = np.zeros(len(ids), dtype=bool)
    marks[-1] = True
    return Encoded(ids, marks, Payload(label, second_from), cut)


def _weights(examples: Examples, labels: Labels, asked: Mapping[str, float] | str | None) -> tuple[float, ...] | None:
    """Of the classes, in their order.

    Raises:
        InputError: there is no such class, or there are no classes.
    """
    if asked is None:
        return None
    if labels.problem_type == REGRESSION:
        raise InputError("a regression has no classes to weigh", where="training.class_weights", fix="Leave it out.")
    if isinstance(asked, Mapping):
        unknown = [name for name in asked if name not in labels.names]
        if unknown:
            raise InputError(
                f"there is no label {unknown[0]!r}",
                where="training.class_weights",
                fix=f"Labels: {', '.join(labels.names)}.",
            )
        return tuple(float(asked.get(name, 1.0)) for name in labels.names)
    if labels.problem_type == MULTI:
        raise InputError(
            "balanced weighs classes that exclude one another", where="training.class_weights", fix="Name the weights."
        )
    found = [examples.payload(index).label for index in range(len(examples))]
    return tuple(len(found) / (len(labels.names) * found.count(name)) for name in labels.names)
