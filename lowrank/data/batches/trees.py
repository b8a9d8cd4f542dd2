"""Rows of several answers to one prompt as trees: the prompt once, a branch for each answer.

What a batch holds of them beside tokens (`Batch.given`), for A answers of which P pairs are made:

    answers    (s,)  whose answer each token of an answer is        tokens     (s,)  which target it is
    chosen     (P,)  of each pair the better answer                 rejected   (P,)  the worse one
    margins    (P,)  by how much it is better                       liked      (A,)  whether an answer is wanted
    lengths    (A,)  tokens of each answer                          reference  (A,)  log-probabilities before training
    whole      (t,)  the targets of the chosen texts, prompt and all
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Self

import numpy as np
import torch

from lowrank.data.batches.batch import Batch, Holders, packed_batch, padded_batch
from lowrank.data.examples.example import Examples, IdsAndMask


@dataclass(frozen=True, slots=True)
class Verdict:
    """What belongs to a row's tokens, which are those of its answers, each behind the prompt, one after another.

    Attributes:
        lengths: Tokens of each, the prompt's too.
        liked: Whether each is wanted.
        margin: By how much the first is better than the others; None where that is not said.
    """

    lengths: tuple[int, ...]
    liked: tuple[bool, ...]
    margin: float | None = None

    def __str__(self) -> str:
        said = " ".join("chosen" if liked else "rejected" for liked in self.liked)
        return said if self.margin is None else f"{said} margin {self.margin:g}"

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Each wanted answer with each that is not."""
        wanted = [at for at, liked in enumerate(self.liked) if liked]
        return [(one, other) for one in wanted for other, liked in enumerate(self.liked) if not liked]


@dataclass(frozen=True)
class Trees:
    """The rows of a set as trees.

    Attributes:
        examples: The rows, each with its `Verdict`.
        paired: Whether a summand of the loss is a pair; otherwise it is an answer.
        prompts: Whether the chosen texts are targets with their prompts.
        shared: Whether what answers begin with in common is computed once.
        mismatched: Whether a batch has another pack beside it (`Batch.beside`), of answers to others' prompts.
        reference: What the model that training begins with makes of each answer, (answers of the whole table,); None
            where that plays no part.
        reference_beside: The same of each answer to another's prompt.
    """

    examples: Examples
    paired: bool
    prompts: bool = False
    shared: bool = True
    mismatched: bool = False
    reference: np.ndarray | None = None
    reference_beside: np.ndarray | None = None

    def without_sharing(self) -> Self:
        """Each answer with a prompt of its own."""
        return replace(self, shared=False)

    def with_reference(self, reference: np.ndarray, beside: np.ndarray | None) -> Self:
        """With what the reference makes of each answer, in the order of the table."""
        return replace(self, reference=reference, reference_beside=beside)

    @cached_property
    def first_answers(self) -> np.ndarray:
        """Where the answers of each of the table's examples begin among those of all."""
        return np.cumsum([0, *(len(one.lengths) for one in self.examples.payloads)])

    @property
    def answers(self) -> int:
        """Of the whole table."""
        return sum(len(one.lengths) for one in self.examples.payloads)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example that go through the model in a pack, (E,) int64."""
        if not self.shared:
            return self.examples.lengths
        saved = [sum(_shared([ids for ids, _ in self.branches(at)])) for at in range(len(self.examples))]
        return self.examples.lengths - np.array(saved, dtype=np.int64)

    def branches(self, index: int) -> list[IdsAndMask]:
        """The answers of an example, each behind the prompt."""
        ids, mask = self.examples.arrays(index)
        ends = np.cumsum(self.examples.payload(index).lengths)[:-1]
        return list(zip(np.split(ids, ends), np.split(mask, ends), strict=True))

    def counts(self, rows: Sequence[int]) -> tuple[int, int]:
        """Summands of the loss of some examples: pairs (or answers), and tokens of what is to become more likely."""
        summands = tokens = 0
        for row in rows:
            verdict = self.examples.payload(row)
            summands += len(verdict.pairs) if self.paired else len(verdict.liked)
            for (ids, mask), liked in zip(self.branches(row), verdict.liked, strict=True):
                tokens += liked * (len(ids) - 1 if self.prompts else int(mask.sum()))
        return summands, tokens

    def supervised(self, row: int) -> int:
        """Tokens of an example's answers."""
        return int(self.examples.arrays(row)[1].sum())

    def batch(self, rows: Sequence[int], *, packing: bool, pad_token_id: int) -> Batch:
        """Some examples as a pack, or padded: an answer a row."""
        own = self._own(rows, packing=packing, pad_token_id=pad_token_id)
        if not self.mismatched:
            return own
        parts = [part for row in rows for part in self._mismatched(row)]
        beside = packed_batch(parts) if packing else padded_batch(parts, pad_token_id)
        held = beside.holders
        given = {"answers": torch.from_numpy(held.examples), "tokens": torch.from_numpy(held.targets)}
        given["lengths"] = own.given["lengths"]
        given |= self._of_reference(self.reference_beside, rows)
        return replace(own, beside=replace(beside, given=given))

    def _own(self, rows: Sequence[int], *, packing: bool, pad_token_id: int) -> Batch:
        """The batch without what lies beside it."""
        branches = [branch for row in rows for branch in self.branches(row)]
        verdicts = [self.examples.payload(row) for row in rows]
        liked = np.array([one for verdict in verdicts for one in verdict.liked])
        targets = [
            _all_but_first(mask) if self.prompts and wanted else mask
            for (_, mask), wanted in zip(branches, liked, strict=True)
        ]
        parts = [(ids, mask) for (ids, _), mask in zip(branches, targets, strict=True)]
        if not packing:
            batch = padded_batch(parts, pad_token_id)
        elif self.shared:
            batch = packed_batch(parts, self._shared_in_pack(rows))
        else:
            batch = packed_batch(parts)
        own = [mask[1:][target[1:]] for (_, mask), target in zip(branches, targets, strict=True)]
        given = _given(batch.holders, np.concatenate(own), verdicts, liked)
        given |= self._of_reference(self.reference, rows)
        supervised = sum(map(self.supervised, rows))
        return replace(batch, given=given, summands=self.counts(rows), supervised=supervised)

    def _of_reference(self, known: np.ndarray | None, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        if known is None:
            return {}
        found = [known[at : at + len(self.examples.payload(row).liked)] for row in rows for at in [self.begins(row)]]
        return {"reference": torch.from_numpy(np.concatenate(found).astype(np.float32))}

    def begins(self, row: int) -> int:
        """Where an example's answers begin among those of the whole table."""
        return int(self.first_answers[self.examples.order[row]])

    def _mismatched(self, row: int) -> list[IdsAndMask]:
        """Each prompt of an example with the answer of the one before it in the table, no longer than any other."""
        table, at = self.examples.table, int(self.examples.order[row])
        before = at - 1 if at else len(self.examples.payloads) - 1
        other = slice(int(table.starts[before]), int(table.starts[before + 1]))
        length = self.examples.payloads[before].lengths[0]
        answer = table.ids[other][:length][table.supervised[other][:length]]
        found = []
        for ids, mask in self.branches(row):
            prompt = ids[: int(mask.argmax())]
            whole = np.concatenate([prompt, answer])[: max(self._longest, len(prompt) + 1)]
            found.append((whole, np.arange(len(whole)) >= len(prompt)))
        return found

    @cached_property
    def _longest(self) -> int:
        return max(length for verdict in self.examples.payloads for length in verdict.lengths)

    def _shared_in_pack(self, rows: Sequence[int]) -> list[int]:
        """What each answer of a pack begins with in common with the one before it."""
        return [common for row in rows for common in _shared([ids for ids, _ in self.branches(row)])]


def _given(
    holders: Holders, own: np.ndarray, verdicts: Sequence[Verdict], liked: np.ndarray
) -> dict[str, torch.Tensor]:
    """What a batch holds beside tokens; `own`: which of its holders' tokens are an answer's, and not a prompt's."""
    answers, tokens = holders.examples[own], holders.targets[own]
    begin = np.cumsum([0, *(len(verdict.liked) for verdict in verdicts)])
    pairs = [(at + a, at + b, v.margin or 0.0) for at, v in zip(begin, verdicts, strict=False) for a, b in v.pairs]
    chosen, rejected, margins = zip(*pairs, strict=True) if pairs else ((), (), ())
    return {
        "answers": torch.from_numpy(answers),
        "tokens": torch.from_numpy(tokens),
        "chosen": torch.tensor(chosen, dtype=torch.int64),
        "rejected": torch.tensor(rejected, dtype=torch.int64),
        "margins": torch.tensor(margins, dtype=torch.float32),
        "liked": torch.from_numpy(liked),
        "lengths": torch.from_numpy(np.bincount(answers, minlength=len(liked)).astype(np.float32)),
        "whole": torch.from_numpy(holders.targets[liked[holders.examples]]),
    }


def _all_but_first(mask: np.ndarray) -> np.ndarray:
    targets = np.ones_like(mask)
    targets[0] = False
    return targets


def _shared(answers: Sequence[np.ndarray]) -> list[int]:
    """What each begins with in common with the one before it; 0 for the first."""
    found = [0]
    for before, ids in pairwise(answers):
        length = min(len(before), len(ids))
        apart = np.flatnonzero(before[:length] != ids[:length])
        found.append(int(apart[0]) if len(apart) else length)
    return found
