"""Memory that each thread uses again: fresh pages would cost more than the arithmetic on them."""

from __future__ import annotations

import threading

import torch


class Buffers(threading.local):
    """A thread's buffers, by name."""

    def __init__(self) -> None:
        self.held: dict[str, torch.Tensor] = {}

    def take(self, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """`count` values of the buffer of that name; what it held before is gone."""
        size = count * dtype.itemsize
        held = self.held.get(name)
        if held is None or held.numel() < size:
            held = self.held[name] = torch.empty(size, dtype=torch.uint8)
        return held[:size].view(dtype)


BUFFERS = Buffers()
