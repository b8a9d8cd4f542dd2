"""Rotary positions (Su 2021) on queries and keys in one launch; the backward pass is the opposite rotation."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lowrank.ops.kernels.tiles import on_its_card

_NUMBERS = 1024
"""Pairs that a program rotates at once."""
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def rotated(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, products: torch.dtype, out: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x · cos + turned(x) · sin over the first r numbers of each head, with turned(x) = (-second half, first half) of
    them; the rest stays. Only cos and sin are kept.

    Args:
        q: (batch, heads, tokens, d).
        k: (batch, fewer heads, tokens, d), of q's dtype.
        cos: (batch or 1, tokens, r) for an even r <= d.
        sin: Likewise. No gradient flows to either.
        products: What each product is rounded to before they are added.
        out: What their sum is rounded to.
    """
    found = _Rotated.apply(q, k, cos, sin, products, out)
    assert isinstance(found, tuple)
    return found


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        products: torch.dtype,
        out: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = q.dtype
        return _turned(q, k, cos, sin, products, out, back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        cos, sin = ctx.saved_tensors
        d_q, d_k = _turned(grads[0], grads[1], cos, sin, ctx.dtype, ctx.dtype, back=True)
        return d_q, d_k, None, None, None, None


def _turned(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    products: torch.dtype,
    out: torch.dtype,
    back: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both by the angles, or `back` by them."""
    of = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k)]
    mine = [torch.empty_like(x, dtype=out) for x in of]
    cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in torch.broadcast_tensors(cos, sin))
    batch, _, tokens, d = q.shape
    half = cos.shape[-1] // 2
    columns = triton.next_power_of_2(half)
    height = max(1, _NUMBERS // columns)
    blocks = [triton.cdiv(batch * tokens * x.shape[1], height) for x in of]
    if sum(blocks) and d:
        with on_its_card(q):
            _rotate[(sum(blocks),)](
                *of, *mine, cos, sin, batch, tokens, q.shape[1], k.shape[1], d, half, blocks[0],
                *(stride for x in (*of, *mine) for stride in x.stride()[:3]),
                *(stride for x in (cos, sin) for stride in (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1))),
                PRODUCTS=_DTYPES[products], BACK=back, ROWS=height, COLUMNS=columns,
                REST=0 if d == 2 * half else triton.next_power_of_2(d - 2 * half), num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return mine[0], mine[1]


@triton.jit(do_not_specialize=["tokens", "q_blocks"])  # every pack has others
def _rotate(
    q: tl.tensor,
    k: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    batch: tl.tensor,
    tokens: tl.tensor,
    q_heads: tl.tensor,
    k_heads: tl.tensor,
    d: tl.tensor,
    half: tl.tensor,
    q_blocks: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    q_out_batch: tl.tensor,
    q_out_head: tl.tensor,
    q_out_token: tl.tensor,
    k_out_batch: tl.tensor,
    k_out_head: tl.tensor,
    k_out_token: tl.tensor,
    cos_batch: tl.tensor,
    cos_token: tl.tensor,
    sin_batch: tl.tensor,
    sin_token: tl.tensor,
    PRODUCTS: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    if block < q_blocks:
        row, token, head = _places(block, tokens, q_heads, ROWS)
        x = q + row * q_batch + token * q_token + head * q_head
        y = q_out + row * q_out_batch + token * q_out_token + head * q_out_head
        c = cos + row * cos_batch + token * cos_token
        s = sin + row * sin_batch + token * sin_token
        _rotate_rows(x, y, c, s, row < batch, d, half, PRODUCTS, BACK, COLUMNS, REST)
    else:
        row, token, head = _places(block - q_blocks, tokens, k_heads, ROWS)
        x = k + row * k_batch + token * k_token + head * k_head
        y = k_out + row * k_out_batch + token * k_out_token + head * k_out_head
        c = cos + row * cos_batch + token * cos_token
        s = sin + row * sin_batch + token * sin_token
        _rotate_rows(x, y, c, s, row < batch, d, half, PRODUCTS, BACK, COLUMNS, REST)


@triton.jit
def _places(
    block: tl.tensor, tokens: tl.tensor, heads: tl.tensor, ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(row of the batch, token, head) of each of a block's heads, (ROWS, 1): one token's lie side by side."""
    place = (block * ROWS + tl.arange(0, ROWS))[:, None]
    token = place // heads
    row = token // tokens
    return row.to(tl.int64), (token - row * tokens).to(tl.int64), (place - token * heads).to(tl.int64)


@triton.jit
def _rotate_rows(
    x: tl.tensor,
    y: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    there: tl.tensor,
    d: tl.tensor,
    half: tl.tensor,
    PRODUCTS: tl.constexpr,
    BACK: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    """What begins at `x` to where `y` points, by angles that begin at `cos` and `sin`; all are (ROWS, 1)."""
    column = tl.arange(0, COLUMNS)[None, :]
    inside = there & (column < half)
    c = tl.load(cos + column, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + half + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + column, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin + half + column, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        s, s2 = -s2, -s
    one = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(x + half + column, mask=inside, other=0.0).to(tl.float32)
    first = (one * c).to(PRODUCTS).to(tl.float32) - (two * s).to(PRODUCTS).to(tl.float32)
    second = (two * c2).to(PRODUCTS).to(tl.float32) + (one * s2).to(PRODUCTS).to(tl.float32)
    tl.store(y + column, first.to(y.dtype.element_ty), mask=inside)
    tl.store(y + half + column, second.to(y.dtype.element_ty), mask=inside)
    if REST:
        column = 2 * half + tl.arange(0, REST)[None, :]
        inside = there & (column < d)
        tl.store(y + column, tl.load(x + column, mask=inside, other=0.0).to(y.dtype.element_ty), mask=inside)
