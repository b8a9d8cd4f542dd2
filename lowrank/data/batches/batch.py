"""One batch as the model takes it: a pack of segments without padding, or rows padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lowrank.data.examples.example import IdsAndMask

IGNORED = -100


@dataclass(slots=True)
class Batch:
    """Tensors of one batch; b rows of n tokens. A pack has b = 1.

    Attributes:
        input_ids: (b, n) int64.
        position_ids: (b, n) int64; in a pack they restart at 0 with every segment.
        labels: (b, n) int64, -100 where no loss is carried; not shifted. The first token of a segment is always -100.
        attention_mask: (b, n) int64, 1 for tokens and 0 for padding; None for a pack.
        segments: Tokens in each segment of a pack; None for padded rows.
        tokens: Tokens without padding.
        supervised: Labels that are not -100.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None
    segments: list[int] | None
    tokens: int
    supervised: int

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on a device."""
        mask = self.attention_mask
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            attention_mask=mask if mask is None else mask.to(device, non_blocking=True),
        )


def packed_batch(parts: Sequence[IdsAndMask]) -> Batch:
    """One pack of examples, as segments in their order.

    Args:
        parts: For each example its token ids (n,) and which of them carry loss (n,), the first never.
    """
    lengths = [len(ids) for ids, _ in parts]
    ids = np.concatenate([ids for ids, _ in parts]).astype(np.int64)
    labels = np.where(np.concatenate([mask for _, mask in parts]), ids, IGNORED)
    positions = np.concatenate([np.arange(length) for length in lengths])
    ids_n, labels_n, positions_n = (torch.from_numpy(array)[None] for array in (ids, labels, positions))
    return Batch(ids_n, positions_n, labels_n, None, lengths, len(ids), int((labels != IGNORED).sum()))


def padded_batch(parts: Sequence[IdsAndMask], pad_token_id: int) -> Batch:
    """Examples as rows, padded on the right to the longest.

    Args:
        parts: For each example its token ids (n,) and which of them carry loss (n,), the first never.
        pad_token_id: What rows are filled with; labels never depend on it.
    """
    longest = max(len(ids) for ids, _ in parts)
    ids = np.full((len(parts), longest), pad_token_id, dtype=np.int64)
    labels = np.full((len(parts), longest), IGNORED, dtype=np.int64)
    real = np.zeros((len(parts), longest), dtype=np.int64)
    for row, (tokens, mask) in enumerate(parts):
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = np.where(mask, tokens, IGNORED)
        real[row, : len(tokens)] = 1
    positions = torch.arange(longest).expand(len(parts), longest).contiguous()
    ids_bn, labels_bn, real_bn = (torch.from_numpy(array) for array in (ids, labels, real))
    return Batch(ids_bn, positions, labels_bn, real_bn, None, int(real.sum()), int((labels != IGNORED).sum()))
