"""Base and low-rank term as one weight."""

from __future__ import annotations

import torch

from lowrank.ops.low_rank import LowRank
from lowrank.ops.precision import precise


def merged_weight(weight: torch.Tensor, term: LowRank, out: torch.Tensor | None = None) -> torch.Tensor:
    """gain · (W + scale · B · A), summed in float32 (float64 for a float64 weight).

    Args:
        weight: W (out, in), any floating dtype. It is not changed, unless it is `out`.
        out: Where the result goes, in the dtype of the sum; None for new memory.

    Returns:
        (out, in) in the dtype of the sum; the caller rounds once.
    """
    dtype = precise(weight.dtype)
    merged = torch.addmm(weight.to(dtype), term.B.to(dtype), term.A.to(dtype), alpha=term.scale, out=out)
    return merged if term.gain is None else merged.mul_(term.gain.to(dtype)[:, None])
