"""f(gate) · up for the activations that most gated MLPs have, forward and backward one launch each."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lowrank.ops.kernels.tiles import on_its_card, rows_of
from lowrank.ops.made_again import can_be_made

_NUMBERS = 1024
"""What a program takes at once."""


def gate_rows(gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
    """f(gate) · up, with f(gate) rounded to its dtype in between, as in plain operations; gate and up alone are kept.

    Args:
        gate: Of up to 32 bits.
        up: Of its shape and dtype.
        name: Of f: silu, or gelu_tanh.

    Returns:
        Of their shape and dtype, contiguous.
    """
    y = _GateRows.apply(gate, up, name)
    assert isinstance(y, torch.Tensor)
    return can_be_made(y, lambda gate, up: _product(gate, up, name), gate, up)


class _GateRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.name = name
        return _product(gate, up, name)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        gate, up = ctx.saved_tensors
        d_gate, d_up = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
        _launch(_gate_slopes, [grads[0], gate, up], [d_gate, d_up], ctx.name)
        return d_gate, d_up, None


def _product(gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _launch(_gate, [gate, up], [y], name)
    return y


def _launch(kernel: Any, of: list[torch.Tensor], out: list[torch.Tensor], name: str) -> None:
    """Runs a kernel over tensors of one shape; those of `out` are contiguous."""
    if not out[0].numel():
        return
    rows = [rows_of(each) for each in of]
    n, d = rows[0].shape
    columns = min(_NUMBERS, triton.next_power_of_2(d))
    height = _NUMBERS // columns
    with on_its_card(out[0]):
        kernel[(triton.cdiv(n, height), triton.cdiv(d, columns))](
            *rows, *out, n, d, *(each.stride(0) for each in rows),
            NAME=name, ROWS=height, COLUMNS=columns, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _likely(x: tl.tensor, NAME: tl.constexpr) -> tl.tensor:
    """p of f(x) = x · p: the logistic function of x, or of 2 √(2/π) (x + 0.044715 x³), where GELU has ½ (1 + tanh)."""
    inner = x if NAME == "silu" else 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
    return 1.0 / (1.0 + tl.exp(-inner))


@triton.jit
def _steepness(x: tl.tensor, p: tl.tensor, NAME: tl.constexpr) -> tl.tensor:
    """f'(x)."""
    of_inner = 1.0 if NAME == "silu" else 1.5957691216057308 * (1.0 + 3 * 0.044715 * x * x)
    return p + p * (1.0 - p) * x * of_inner


@triton.jit
def _tile(
    n: tl.tensor, d: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A program's rows (ROWS, 1) and columns (1, COLUMNS), and which of the numbers there are."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < n) & (column < d)


@triton.jit
def _read(x: tl.tensor, place: tl.tensor, inside: tl.tensor) -> tl.tensor:
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n"])  # every pack has another
def _gate(
    gate: tl.tensor,
    up: tl.tensor,
    y: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    NAME: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row, column, inside = _tile(n, d, ROWS, COLUMNS)
    x = _read(gate, row * gate_stride + column, inside)
    by = _read(up, row * up_stride + column, inside)
    f = (x * _likely(x, NAME)).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(y + row * d + column, (f * by).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])  # every pack has another
def _gate_slopes(
    d_y: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    d_gate: tl.tensor,
    d_up: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    d_y_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    NAME: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row, column, inside = _tile(n, d, ROWS, COLUMNS)
    slope = _read(d_y, row * d_y_stride + column, inside)
    x = _read(gate, row * gate_stride + column, inside)
    by = _read(up, row * up_stride + column, inside)
    p = _likely(x, NAME)
    f = (x * p).to(gate.dtype.element_ty).to(tl.float32)
    of_f = (slope * by).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(d_gate + row * d + column, (of_f * _steepness(x, p, NAME)).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + row * d + column, (slope * f).to(d_up.dtype.element_ty), mask=inside)
