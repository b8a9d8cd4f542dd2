"""How rows are cut into the tiles that a program of a kernel takes."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import triton

NUMBERS = 2048
"""What a program takes at once, where a row is shorter."""


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as (n, d), each row in one piece; a view where there is one."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return rows if rows.stride(-1) == 1 or not rows.numel() else rows.contiguous()


def tile_of(width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile that holds whole rows of `width` numbers."""
    columns = triton.next_power_of_2(width)
    return max(1, NUMBERS // columns), columns, min(16, max(4, columns // 512))


def on_its_card(x: torch.Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current card: while this lasts it is the one where `x` lies."""
    return torch.cuda.device_of(x)
