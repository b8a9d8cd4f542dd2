"""The padded rows that `packing.segments` announces: the host knows their lengths, and need not ask a card for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import nn

from lowrank.attention.maskparts import WINDOW, parts_of
from lowrank.attention.spans import Spans


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """Rows that are padded on the right.

    Attributes:
        mask: (b, n), what the model is given as its attention_mask.
        lengths: Tokens of each row that are not padding.
    """

    mask: torch.Tensor
    lengths: Sequence[int]


class AnnouncedRows:
    """The rows of one batch, while a model is called with them.

    Models may change the attention_mask before they make masks of it. So until a model has passed one on as it was, the
    card is asked, and of a model that has not it always is.
    """

    def __init__(self, model: nn.Module, rows: PaddedRows) -> None:
        self.model, self.rows = model, rows
        self.called = False  # whether the model's latest call was given the rows' mask

    def spans(
        self,
        batch: int,
        length: int,
        attention_mask: torch.Tensor | None,
        mask_function: Callable[..., torch.Tensor],
        window: int | None,
    ) -> Spans | None:
        """Those of a mask that is asked for, if it is causal within the rows and `window` and no more than that."""
        lengths, parts = self.rows.lengths, parts_of(mask_function)
        if not self.called or attention_mask is None or attention_mask.shape != self.rows.mask.shape:
            return None
        if (batch, length) != self.rows.mask.shape or not parts <= _PARTS or (WINDOW in parts) != (window is not None):
            return None
        if not self._passes_on(attention_mask):
            return None
        spans = ((row * length, row * length + real) for row, real in enumerate(lengths) if real)
        return Spans(batch, length, tuple(spans), window)

    def _passes_on(self, attention_mask: torch.Tensor) -> bool:
        if self.model not in _PASS_ON and self.model not in _CHANGE:
            place = torch.arange(attention_mask.shape[1])
            expected = place < torch.tensor(self.rows.lengths)[:, None]
            (_PASS_ON if torch.equal(attention_mask.cpu() != 0, expected) else _CHANGE).add(self.model)
        return self.model in _PASS_ON


_PARTS = {"causal_mask_function", "and_masks", WINDOW}
_PASS_ON: WeakSet[nn.Module] = WeakSet()
_CHANGE: WeakSet[nn.Module] = WeakSet()

# By id of the config that transformers hands to the mask function.
ROWS: dict[int, AnnouncedRows] = {}
