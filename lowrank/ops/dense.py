"""A weight as an ordinary matrix, whatever it is stored as."""

from __future__ import annotations

import torch


def dense(weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`weight` (out, in) itself, or what a bitsandbytes 4-bit weight stands for.

    A 4-bit weight comes back in the dtype that it was quantised from, unless `dtype` says otherwise.
    """
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, state)
    return weight if dtype is None else weight.to(dtype)
