"""The pair of factors that every method of the family comes down to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # configs are made of methods' files, and read before torch is loaded
    import torch


@dataclass(frozen=True, slots=True)
class LowRank:
    """One adapter on one weight W (out, in): W' = gain · (W + scale · B · A), row by row.

    Attributes:
        A: (r, in).
        B: (out, r).
        scale: s of ΔW = s · B · A.
        gain: (out,), DoRA's m / ‖W + ΔW‖; None for 1.
        dropout: Probability that an input of the low-rank path is dropped; 0 outside of training.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    gain: torch.Tensor | None = None
    dropout: float = 0.0

    def dropping(self, dropout: float) -> LowRank:
        """The same with dropout."""
        return LowRank(self.A, self.B, self.scale, self.gain, dropout)

    def rows(self, rows: slice) -> LowRank:
        """The part of it that acts on some rows of W, without a gain."""
        return LowRank(self.A, self.B[rows], self.scale)

    def columns(self, columns: slice) -> LowRank:
        """The part of it that acts on some columns of W."""
        return LowRank(self.A[:, columns], self.B, self.scale)
