"""In what sums are computed and adapters are kept."""

from __future__ import annotations

import torch


def precise(dtype: torch.dtype) -> torch.dtype:
    """float32; float64 beside float64. Of a sum over values of `dtype`, of an adapter's weights beside a base's."""
    return torch.float64 if dtype == torch.float64 else torch.float32
