"""RMS norms, a row at a time: what `ops.rms_norm` says, forward and backward one launch each."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lowrank.ops.kernels.tiles import on_its_card, rows_of, tile_of
from lowrank.ops.made_again import can_be_made

_PROGRAMS = 256
"""Of a backward pass that sums over rows, so that its sums are the same on every card."""


def norm_rows(x: torch.Tensor, weight: torch.Tensor, eps: float, rounded_first: bool, one_plus: bool) -> torch.Tensor:
    """x / √(mean x² + ε) · gain over the last dimension, in float32; x and weight are kept, and a number a row.

    Args:
        x: (..., d), of up to 32 bits.
        weight: (d,).
        eps: ε.
        rounded_first: The normed x is rounded to x's dtype before it is multiplied (as in Llama), not after (Gemma).
        one_plus: The gain is 1 + weight, in float32.

    Returns:
        (..., d); rounded first, of the dtype that x and the gain promote to, else of x's.
    """
    y = _NormRows.apply(x, weight, eps, rounded_first, one_plus)
    assert isinstance(y, torch.Tensor)
    return can_be_made(y, lambda x, weight: _normed(x, weight, eps, rounded_first, one_plus)[0], x, weight)


class _NormRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, rounded_first: bool, one_plus: bool
    ) -> torch.Tensor:
        y, scale = _normed(x, weight, eps, rounded_first, one_plus)
        ctx.save_for_backward(x, weight, scale)
        ctx.one_plus = one_plus
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x, weight, scale = ctx.saved_tensors
        d_x, d_weight = _slopes(grads[0], x, weight, scale, ctx.one_plus, *ctx.needs_input_grad[:2])
        return d_x, d_weight, None, None, None


def _normed(
    x: torch.Tensor, weight: torch.Tensor, eps: float, rounded_first: bool, one_plus: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (..., d), and what each row was multiplied by, (n,) float32."""
    rows = rows_of(x)
    gain = torch.float32 if one_plus else weight.dtype
    dtype = torch.promote_types(x.dtype, gain) if rounded_first else x.dtype
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    scale = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    if x.numel():
        height, columns, warps = tile_of(rows.shape[1])
        with on_its_card(x):
            _norm[(triton.cdiv(len(rows), height),)](
                rows, weight, y, scale, *rows.shape, rows.stride(0), weight.stride(0), eps,
                ROUNDED_FIRST=rounded_first, ONE_PLUS=one_plus, ROWS=height, COLUMNS=columns, num_warps=warps,
                enable_fp_fusion=False,
            )  # fmt: skip
    return y, scale


def _slopes(
    d_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    one_plus: bool,
    of_x: bool,
    of_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x and of weight, each if it is wanted."""
    rows, d_rows = rows_of(x), rows_of(d_y)
    height, columns, warps = tile_of(rows.shape[1])
    tiles = triton.cdiv(len(rows), height)
    programs = min(tiles, _PROGRAMS) if of_weight else tiles
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if of_x else None
    sums = torch.empty(programs, rows.shape[1], dtype=torch.float32, device=x.device) if of_weight else None
    if x.numel():
        with on_its_card(x):
            _norm_slopes[(programs,)](
                d_rows, rows, weight, scale, d_x, sums, *rows.shape, d_rows.stride(0), rows.stride(0),
                weight.stride(0), ONE_PLUS=one_plus, OF_X=of_x, OF_WEIGHT=of_weight, ROWS=height, COLUMNS=columns,
                num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    return d_x, None if sums is None else sums.sum(0).to(weight.dtype)


@triton.jit(do_not_specialize=["n"])  # every pack has another
def _norm(
    x: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    eps: tl.tensor,
    ROUNDED_FIRST: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = (row < n)[:, None] & (column < d)[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + column * weight_stride, mask=column < d, other=0.0).to(tl.float32)[None, :]
    if ONE_PLUS:
        gain += 1.0
    factor = tl.rsqrt(tl.sum(values * values, 1) / d + eps)
    normed = values * factor[:, None]
    if ROUNDED_FIRST:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    tl.store(y + row[:, None] * d + column[None, :], (normed * gain).to(y.dtype.element_ty), mask=inside)
    tl.store(scale + row, factor, mask=row < n)


@triton.jit(do_not_specialize=["n"])  # every pack has another
def _norm_slopes(
    d_y: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    d_x: tl.tensor,
    sums: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    d_y_stride: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    ONE_PLUS: tl.constexpr,
    OF_X: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    column = tl.arange(0, COLUMNS)
    gain = tl.load(weight + column * weight_stride, mask=column < d, other=0.0).to(tl.float32)[None, :]
    if ONE_PLUS:
        gain += 1.0
    total = tl.zeros((COLUMNS,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < n)[:, None] & (column < d)[None, :]
        values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(d_y + row[:, None] * d_y_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(scale + row, mask=row < n, other=0.0)[:, None]
        if OF_WEIGHT:
            total += tl.sum(slope * values * factor, 0)
        if OF_X:
            slope *= gain
            along = tl.sum(slope * values, 1)[:, None] * (factor * factor * factor) / -d
            found = slope * factor + values * along
            tl.store(d_x + row[:, None] * d + column[None, :], found.to(d_x.dtype.element_ty), mask=inside)
    if OF_WEIGHT:
        tl.store(sums + tl.program_id(0) * d + column, total, mask=column < d)
