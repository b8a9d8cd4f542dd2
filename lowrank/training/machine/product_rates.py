"""How fast this machine multiplies matrices, in each dtype: asked once, and kept."""

from __future__ import annotations

import time

import torch

from lowrank.storage.machine_figures import figure

_TOKENS, _WIDTH, _TRIES = 256, 1024, 5


def times_as_fast(dtype: torch.dtype, than: torch.dtype) -> float:
    """How many times as many products of a projection's shape a second the processor makes in one dtype."""
    return _seconds(than) / _seconds(dtype)


def _seconds(dtype: torch.dtype) -> float:
    """Of one product (256, 1024) · (1024, 1024) on the processor; kept for the processes to come."""
    name = str(dtype).removeprefix("torch.")
    return figure(f"seconds of a product of 256 x 1024 x 1024 in {name}", lambda: _measured(dtype))


def _measured(dtype: torch.dtype) -> float:
    """The shortest of some tries: others on the machine only make it longer."""
    numbers = torch.Generator().manual_seed(0)  # a run's own draws are the same whether it measures or not
    x, W = (torch.randn(rows, _WIDTH, generator=numbers).to(dtype) for rows in (_TOKENS, _WIDTH))
    taken = []
    for _ in range(_TRIES + 1):  # the first compiles
        began = time.perf_counter()
        torch.mm(x, W)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])
