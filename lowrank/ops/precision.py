"""In what sums are computed."""

from __future__ import annotations

import torch


def precise(x: torch.Tensor) -> torch.dtype:
    """float32, or x's own dtype where that has more digits."""
    return torch.promote_types(x.dtype, torch.float32)
