"""What a task says of itself, once its labels are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lowrank.data import Batch, Examples
from lowrank.data.examples.example import IdsAndMask
from lowrank.tasks.reading import Encoded


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a config asks of a task's loss.

    Attributes:
        problem_type: transformers' name of the problem, where it is not to be found by the labels.
        class_weights: By the class's name; "balanced" weighs each as much as it is rare; None: all alike.
        label_smoothing: So much of the probability is asked for evenly over the classes.
    """

    problem_type: str | None = None
    class_weights: Mapping[str, float] | str | None = None
    label_smoothing: float = 0.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says to one row.

    Attributes:
        said: In words: the label.
        scores: By class, or under "value" a number.
        vector: Of a text, (d,); None of tasks that give none.
    """

    said: str
    scores: dict[str, float] = field(default_factory=dict)
    vector: list[float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a line of JSON."""
        return {"embedding": self.vector} if self.vector else {"prediction": self.said, "scores": self.scores}


class SummedLoss:
    """The sum of the losses that a task finds in its outputs."""

    figures: tuple[str, ...] = ()

    def __init__(self, task: Task, why: str) -> None:
        self.task, self.why = task, why

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """A scalar that gradients flow from."""
        return self.task.losses(self.task.outputs(model, batch), batch).sum()

    @torch.no_grad()
    def each(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(m,)."""
        return self.task.losses(self.task.outputs(model, batch), batch)


class Task(Protocol):
    """A task whose labels are known."""

    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of a model's config that say what its outputs stand for."""
        ...

    @property
    def told(self) -> str:
        """What is learned, in a line."""
        ...

    def collate(self, parts: Sequence[IdsAndMask], payloads: Sequence[Any], pad_token_id: int) -> Batch:
        """A padded batch."""
        ...

    def loss(self, plain: bool = False) -> SummedLoss:
        """Its loss; a plain one is without weights and smoothing, for evaluations."""
        ...

    def outputs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """What the model gives for each mark of a batch, (m, ...) float32."""
        ...

    def losses(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The plain loss of each of the batch's marks, from its outputs, (m,)."""
        ...

    def predictions(self, outputs: Sequence[np.ndarray]) -> list[Prediction]:
        """In words, a row each, from what the model gives for its marks."""
        ...

    def answers(
        self, outputs: Sequence[np.ndarray], examples: Examples, tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[str, str, str]]:
        """Of each example what was asked, what is right and what was said, for a person to read."""
        ...

    def scores(self, outputs: Sequence[np.ndarray], examples: Examples) -> dict[str, float]:
        """The figures of outputs for all examples, in their order."""
        ...

    def refuse_others(self, examples: Examples) -> None:
        """Raises InputError where an example has a label that is none of the task's."""
        ...

    def expected(self, payload: Any) -> str:
        """What a row's label is, for a person to read."""
        ...


def labelled_answers(
    task: Task, outputs: Sequence[np.ndarray], examples: Examples, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str, str]]:
    """`answers` of a task whose rows are one text with labels."""
    found = []
    for index, one in enumerate(task.predictions(outputs)):
        text = str(tokenizer.decode(examples.arrays(index)[0], skip_special_tokens=True))
        found.append((text, task.expected(examples.payload(index)), one.said))
    return found


class TaskClass(Protocol):
    """A task before its labels are known."""

    name: str

    def encoder(self, wishes: Wishes) -> Any:
        """From a row to tokens, as `read_task_rows` takes it."""
        ...

    def learned_from(self, examples: Examples, wishes: Wishes) -> Task:
        """The task with the labels of training rows; InputError: they do not make one."""
        ...

    def of_config(self, config: Any) -> Task:
        """The task with the labels that a trained model's config names."""
        ...

    def unlabelled(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, longest: int | None) -> Encoded:
        """A row that is asked about, without a label; RowError: it cannot be used."""
        ...
