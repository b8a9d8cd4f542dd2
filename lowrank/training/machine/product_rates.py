"""How fast this machine multiplies matrices of a model's shapes, in each dtype: asked once, and kept."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from lowrank.adapters.kinds.known import kind_of
from lowrank.storage.machine_figures import figure

_TOKENS, _WIDEST = 256, 1024
_TRIES, _LONG_ENOUGH = 5, 0.1  # seconds

Shapes: TypeAlias = Mapping[tuple[int, int], int]
"""(out, in) of matrices, and how many there are of each."""

ANY_MODEL: Shapes = {(_WIDEST, _WIDEST): 1}
"""Where nothing is known of the model."""


def shapes_of(model: nn.Module) -> Shapes:
    """The matrices of a model's linear layers. Longer sides than 1,024 are taken for 1,024: the rate is the same."""
    found: Counter[tuple[int, int]] = Counter()
    for module in model.modules():
        kind = kind_of(module)
        if kind is not None and kind.linear:
            rows, columns = kind.shape(module)
            found[min(rows, _WIDEST), min(columns, _WIDEST)] += 1
    return found or ANY_MODEL


def times_as_fast(dtype: torch.dtype, than: torch.dtype, shapes: Shapes) -> float:
    """How many times as fast as in another dtype the processor multiplies by some matrices in one."""
    one, other = (sum(count * _seconds(*shape, each) for shape, count in shapes.items()) for each in (dtype, than))
    return other / one


def _seconds(rows: int, columns: int, dtype: torch.dtype) -> float:
    """Of one product of 256 tokens on the processor; kept for the processes to come."""
    name = str(dtype).removeprefix("torch.")
    what = f"seconds of a product of {_TOKENS} x {columns} x {rows} in {name}"
    return figure(what, lambda: _measured(rows, columns, dtype))


def _measured(rows: int, columns: int, dtype: torch.dtype) -> float:
    """The shortest of some tries: others on the machine only make it longer."""
    numbers = torch.Generator().manual_seed(0)  # a run's own draws are the same whether it measures or not
    x, W = (torch.randn(length, columns, generator=numbers).to(dtype) for length in (_TOKENS, rows))
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) <= _TRIES and sum(taken) < _LONG_ENOUGH):  # the first compiles
        began = time.perf_counter()
        F.linear(x, W)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])
