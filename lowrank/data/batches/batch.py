"""One batch as the model takes it: a pack of segments without padding, or rows padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from lowrank.attention.announced_rows import PaddedRows
from lowrank.data.batches.pack_forest import forest_of
from lowrank.data.examples.example import IdsAndMask
from lowrank.ops.transfer import to_device


@dataclass(frozen=True, slots=True)
class Targets:
    """What is predicted where: m tokens, each from a place before it. One place may have several next tokens.

    Attributes:
        places: Among the batch's b·n tokens, (m,) int64.
        tokens: What comes next there, (m,) int64.
        weights: How many examples hold it, (m,) float32; None where each is of one.
    """

    places: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor | None

    def to(self, device: torch.device | str) -> Targets:
        """The same on a device."""
        weights = self.weights
        return Targets(
            to_device(self.places, device),
            to_device(self.tokens, device),
            weights if weights is None else to_device(weights, device),
        )


@dataclass(frozen=True, slots=True)
class Holders:
    """Which examples hold which targets: s pairs, one for each token of an example that carries loss.

    Attributes:
        examples: The batch's example, (s,) int64.
        targets: The target, (s,) int64.
    """

    examples: np.ndarray
    targets: np.ndarray


@dataclass(slots=True)
class Batch:
    """Tensors of one batch; b rows of n tokens. A pack has b = 1.

    Attributes:
        input_ids: (b, n) int64.
        position_ids: (b, n) int64; in a pack they restart at 0 with every segment that has no parent, and go on from
            the parent's where it has one.
        targets: What carries loss.
        holders: Whose targets they are.
        attention_mask: (b, n) int64, 1 for tokens and 0 for padding; None for a pack.
        segments: Tokens in each segment of a pack; None for padded rows.
        parents: For each segment of a pack the number of the one that it goes on from, -1 for none; None where no
            segment has one.
        rows: Tokens of each padded row that are not padding, which come first; None for a pack.
        tokens: Of the examples, each with all of its own.
        supervised: Those that carry loss.
        given: What the batch of a task holds beside tokens: its labels, token types.
        summands: Of a loss that is no mean over supervised tokens, how many summands each of its sums has.
        beside: A batch that is looked at before a step, and not learned from.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: Targets
    holders: Holders
    attention_mask: torch.Tensor | None
    segments: list[int] | None
    parents: list[int] | None
    rows: list[int] | None
    tokens: int
    supervised: int
    given: dict[str, torch.Tensor] = field(default_factory=dict)
    summands: tuple[int, ...] | None = None
    beside: Batch | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """What the loss's sums are divided by."""
        return self.summands or (self.supervised,)

    @property
    def padded(self) -> PaddedRows | None:
        """What attention is told of a batch that is no pack."""
        if self.attention_mask is None or self.rows is None:
            return None
        return PaddedRows(self.attention_mask, self.rows)

    def built(self) -> Batch:
        """Itself: it is."""
        return self

    @property
    def computed(self) -> int:
        """Tokens that go through the model: padding too, and what examples share once."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on a device."""
        mask = self.attention_mask
        return replace(
            self,
            input_ids=to_device(self.input_ids, device),
            position_ids=to_device(self.position_ids, device),
            targets=self.targets.to(device),
            attention_mask=mask if mask is None else to_device(mask, device),
            given={name: to_device(tensor, device) for name, tensor in self.given.items()},
            beside=None if self.beside is None else self.beside.to(device),
        )


def packed_batch(parts: Sequence[IdsAndMask], shared: Sequence[int] | None = None) -> Batch:
    """One pack of examples, in their order.

    Args:
        parts: For each example its token ids (n,) and which of them carry loss (n,), the first never.
        shared: How many tokens each begins with in common with the one before it, which then lie in the pack once; 0
            for the first. None: each example is a segment of its own.
    """
    forest = forest_of([len(ids) for ids, _ in parts], [0] * len(parts) if shared is None else shared)
    ids = np.empty(sum(forest.segments), dtype=np.int64)
    positions = np.empty_like(ids)
    for (tokens, _), places in zip(parts, forest.rows, strict=True):
        ids[places], positions[places] = tokens, np.arange(len(tokens))
    assert all((ids[places] == tokens).all() for (tokens, _), places in zip(parts, forest.rows, strict=True))
    targets, holders = _targets(ids, [mask for _, mask in parts], forest.rows)
    return Batch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        targets=targets,
        holders=holders,
        attention_mask=None,
        segments=forest.segments,
        parents=forest.parents if max(forest.parents, default=-1) >= 0 else None,
        rows=None,
        tokens=sum(len(tokens) for tokens, _ in parts),
        supervised=len(holders.examples),
    )


def padded_batch(parts: Sequence[IdsAndMask], pad_token_id: int) -> Batch:
    """Examples as rows, padded on the right to the longest.

    Args:
        parts: For each example its token ids (n,) and which of them carry loss (n,), the first never.
        pad_token_id: What rows are filled with; what carries loss never depends on it.
    """
    longest = max(len(ids) for ids, _ in parts)
    ids = np.full((len(parts), longest), pad_token_id, dtype=np.int64)
    real = np.zeros((len(parts), longest), dtype=np.int64)
    for row, (tokens, _) in enumerate(parts):
        ids[row, : len(tokens)] = tokens
        real[row, : len(tokens)] = 1
    rows = [row * longest + np.arange(len(tokens)) for row, (tokens, _) in enumerate(parts)]
    targets, holders = _targets(ids.reshape(-1), [mask for _, mask in parts], rows)
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.arange(longest).expand(len(parts), longest).contiguous(),
        targets=targets,
        holders=holders,
        attention_mask=torch.from_numpy(real),
        segments=None,
        parents=None,
        rows=[len(tokens) for tokens, _ in parts],
        tokens=int(real.sum()),
        supervised=len(holders.examples),
    )


def _targets(ids: np.ndarray, masks: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> tuple[Targets, Holders]:
    """What carries loss in a batch of tokens (n,), from where each example's tokens lie in it."""
    held = [places[1:][mask[1:]] for places, mask in zip(rows, masks, strict=True)]
    before = [places[:-1][mask[1:]] for places, mask in zip(rows, masks, strict=True)]
    lies, first, target, counts = np.unique(
        np.concatenate(held), return_index=True, return_inverse=True, return_counts=True
    )
    weights = torch.from_numpy(counts.astype(np.float32)) if (counts > 1).any() else None
    targets = Targets(torch.from_numpy(np.concatenate(before)[first]), torch.from_numpy(ids[lies]), weights)
    return targets, Holders(np.repeat(np.arange(len(held)), [len(one) for one in held]), target)
