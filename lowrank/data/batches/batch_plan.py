"""The order of the batches of every epoch: a function of (seed, epoch) alone, so a run resumes anywhere in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from lowrank.data.batches.batch import Batch, packed_batch, padded_batch
from lowrank.data.batches.bin_packing import pack
from lowrank.data.examples.example import Examples
from lowrank.errors import InputError

# Batches of padded rows are cut from so many batches' worth of rows sorted by length.
BUCKET_BATCHES = 64


@dataclass
class BatchPlan:
    """Which examples go into which batch, epoch by epoch; made by `plan_batches`."""

    examples: Examples
    packing: bool
    batch_size: int
    max_tokens: int | None
    pad_token_id: int
    seed: int
    shuffle: bool
    _epochs: dict[int, list[np.ndarray]] = field(default_factory=dict, repr=False)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, each an array of indices into the examples."""
        if epoch not in self._epochs:
            self._epochs = {epoch: self._planned(epoch)}
        return self._epochs[epoch]

    def batch(self, indices: np.ndarray) -> Batch:
        """The tensors of one batch."""
        parts = [self.examples.arrays(int(index)) for index in indices]
        return packed_batch(parts) if self.packing else padded_batch(parts, self.pad_token_id)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on."""
        for indices in self.epoch(epoch)[start:]:
            yield self.batch(indices)

    def tokens(self, indices: np.ndarray) -> int:
        """Tokens of one batch, padding not counted."""
        return int(self.examples.lengths[indices].sum())

    def supervised(self, indices: np.ndarray) -> int:
        """Those of them that carry loss."""
        return sum(int(self.examples.arrays(int(index))[1].sum()) for index in indices)

    def largest(self) -> Batch:
        """The batch of the first epoch with the most tokens, padding counted."""
        lengths = self.examples.lengths

        def size(indices: np.ndarray) -> int:
            return int(lengths[indices].sum() if self.packing else len(indices) * lengths[indices].max())

        return self.batch(max(self.epoch(0), key=size))

    @property
    def fingerprint(self) -> str:
        """Equal for the same examples in the same order."""
        return self.examples.fingerprint

    def fill(self, epoch: int = 0) -> float:
        """The share of an epoch's batches that is tokens and not padding (in a pack: not left empty)."""
        lengths = self.examples.lengths
        batches = self.epoch(epoch)
        if self.packing:
            assert self.max_tokens is not None
            return float(lengths.sum() / (len(batches) * self.max_tokens))
        return float(lengths.sum() / sum(len(batch) * lengths[batch].max() for batch in batches))

    def _planned(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        lengths = self.examples.lengths
        order = rng.permutation(len(lengths)) if self.shuffle else np.arange(len(lengths))
        if self.packing:
            assert self.max_tokens is not None
            batches = pack(order, lengths, self.max_tokens)
        else:
            batches = _bucketed(order, lengths, self.batch_size)
        return [batches[at] for at in rng.permutation(len(batches))] if self.shuffle else batches


def _bucketed(order: np.ndarray, lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    batches = []
    window = batch_size * BUCKET_BATCHES
    for begin in range(0, len(order), window):
        part = order[begin : begin + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
    return batches


def plan_batches(
    examples: Examples,
    *,
    packing: bool,
    batch_size: int,
    max_tokens: int | None,
    pad_token_id: int,
    seed: int,
    shuffle: bool = True,
) -> BatchPlan:
    """Plan the batches of a data set.

    Args:
        examples: The data set.
        packing: Packs of several examples without padding, one pack a batch; otherwise padded rows, bucketed by length.
        batch_size: Rows in a padded batch. A pack holds as many examples as fit.
        max_tokens: Tokens in a pack. Padded rows are as long as they are.
        pad_token_id: What padded rows are filled with.
        seed: With the epoch's number it decides the order.
        shuffle: A new order each epoch; otherwise the examples stay in their order as far as packs and buckets allow.

    Raises:
        InputError: an example is longer than a pack.
    """
    if packing:
        assert max_tokens is not None, "packs need max_tokens"
        longest = int(examples.lengths.max()) if len(examples) else 0
        if longest > max_tokens:
            raise InputError(
                f"an example of {longest} tokens does not fit into a pack of {max_tokens}",
                where="training.tokens_per_batch",
                fix="Raise it to data.max_length at least.",
            )
    return BatchPlan(examples, packing, batch_size, max_tokens, pad_token_id, seed, shuffle)
