"""A tag for each word of a text: names of people and places, parts of speech."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from lowrank.tasks.encoding import encoded_words
from lowrank.tasks.labels import SINGLE, Labels, label_of, named, place_of
from lowrank.tasks.measures import tag_scores
from lowrank.tasks.reading import Encoded
from lowrank.tasks.task import Prediction, SummedLoss, Wishes, labelled_answers

_SHOWN = 12


class TokenClassification:
    """The task before its tags are known."""

    name = "token_classification"

    def encoder(self, wishes: Wishes) -> Any:
        """A row with its tags."""
        return _tagged

    def learned_from(self, examples: Examples, wishes: Wishes) -> Tagger:
        """With the tags that training rows show."""
        names = {name for index in range(len(examples)) for name in examples.payload(index)}
        if len(names) < 2:
            raise InputError(
                f"all words have the tag {next(iter(names))!r}; there is nothing to tell apart",
                where=examples.rows.name,
                fix="Add rows with other tags.",
            )
        return Tagger(named(SINGLE, names), wishes.label_smoothing)

    def of_config(self, config: Any) -> Tagger:
        """With those of a trained model."""
        return Tagger(Labels(SINGLE, tuple(config.id2label[number] for number in range(config.num_labels))))

    def unlabelled(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, longest: int | None) -> Encoded:
        """A row that is asked about: its tokens, or a text that is split at white space."""
        words = row.get("tokens")
        words = str(row["text"]).split() if words is None and row.get("text") else words
        ids, marks, cut = encoded_words(words, tokenizer, longest)
        return Encoded(ids, marks, None, cut)


@dataclass(frozen=True)
class Tagger:
    """The task with its tags.

    Attributes:
        labels: What the outputs stand for.
        label_smoothing: So much of the probability is asked for evenly over the tags.
    """

    labels: Labels
    label_smoothing: float = 0.0
    name = TokenClassification.name

    @property
    def settings(self) -> dict[str, Any]:
        """Of the model's config."""
        return {key: value for key, value in self.labels.settings.items() if key != "problem_type"}

    @property
    def told(self) -> str:
        """The tags."""
        names = self.labels.names
        return f"one of {len(names)} tags for each word: {', '.join(names[:_SHOWN])}{' ...' * (len(names) > _SHOWN)}"

    def collate(self, parts: Sequence[IdsAndMask], payloads: Sequence[Any], pad_token_id: int) -> Batch:
        """Rows padded to the longest; the tags of the marked tokens, one row's after another's."""
        batch = padded_batch(parts, pad_token_id)
        marks = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        for row, (_, mask) in enumerate(parts):
            marks[row, : len(mask)] = torch.from_numpy(mask.copy())
        given = {"marks": marks}
        if all(payload is not None for payload in payloads):
            given["labels"] = torch.tensor([self.labels.number(tag) for tags in payloads for tag in tags])
        return replace(batch, given=given, supervised=int(marks.sum()))

    def loss(self, plain: bool = False) -> SummedLoss:
        """Cross-entropy of the tags."""
        return SummedLoss(replace(self, label_smoothing=0.0) if plain else self, "cross-entropy of each word's tag")

    def outputs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Of the words' first tokens, (m, k)."""
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits[batch.given["marks"]].float()

    def losses(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(m,)."""
        labels = batch.given["labels"]
        return functional.cross_entropy(outputs, labels, reduction="none", label_smoothing=self.label_smoothing)

    def predictions(self, outputs: Sequence[np.ndarray]) -> list[Prediction]:
        """The likeliest tags; how sure the least sure of them is."""
        found = []
        for tags, row in zip(self._likeliest(outputs), outputs, strict=True):
            exp = np.exp(row - row.max(axis=1, keepdims=True))
            least = float((exp.max(axis=1) / exp.sum(axis=1)).min())
            found.append(Prediction(" ".join(tags), {"least sure": least}))
        return found

    def _likeliest(self, outputs: Sequence[np.ndarray]) -> list[list[str]]:
        return [[self.labels.names[at] for at in row.argmax(axis=1).tolist()] for row in outputs]

    def answers(
        self, outputs: Sequence[np.ndarray], examples: Examples, tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[str, str, str]]:
        """Each text, its labels, and those that are said."""
        return labelled_answers(self, outputs, examples, tokenizer)

    def scores(self, outputs: Sequence[np.ndarray], examples: Examples) -> dict[str, float]:
        """Of whole entities by seqeval, where the tags are such (B-PER, I-PER, O); else of words by scikit-learn."""
        return tag_scores([list(examples.payload(at)) for at in range(len(examples))], self._likeliest(outputs))

    def refuse_others(self, examples: Examples) -> None:
        """A tag that training rows do not show."""
        for index in range(len(examples)):
            unknown = [tag for tag in examples.payload(index) if tag not in self.labels.names]
            if unknown:
                raise InputError(
                    f"the tag {unknown[0]!r} is none of those that training shows",
                    where=place_of(examples, index),
                    fix=f"Those are {', '.join(map(repr, self.labels.names[:20]))}. Add rows with it, or mend the row.",
                )

    def expected(self, payload: Any) -> str:
        """The row's tags."""
        return " ".join(payload)


def _tagged(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, longest: int | None) -> Encoded:
    tags, words = row.get("tags"), row.get("tokens")
    if not isinstance(tags, list) or not isinstance(words, list) or len(tags) != len(words):
        counts = [len(one) if isinstance(one, list) else "no list" for one in (words, tags)]
        raise RowError(
            f"tokens and tags are not two lists of the same length: {counts[0]} and {counts[1]}",
            'Expected {"tokens": [...], "tags": [...]}.',
        )
    names = [label_of(tag) for tag in tags]
    if not all(isinstance(name, str) for name in names):
        raise RowError("a tag is neither a name nor a whole number", 'Expected {"tokens": [...], "tags": ["O", ...]}.')
    ids, marks, cut = encoded_words(words, tokenizer, longest)
    return Encoded(ids, marks, tuple(map(str, names[: int(marks.sum())])), cut)
