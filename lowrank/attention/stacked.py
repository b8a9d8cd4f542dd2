"""Attention over stacks of spans and over long ones, one after the other: what is gathered for one is gone then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lowrank.attention import long_spans, strips
from lowrank.attention.spans import Spans
from lowrank.attention.stacking import Stack, stacks_of
from lowrank.attention.strips import Rule
from lowrank.ops.precision import precise


class StackedAttention(torch.autograd.Function):
    """q (tokens, h, d), k (tokens, h_kv, d), v (tokens, h_kv, e), sinks (h,) or None -> (tokens, h, e), 0 at padding.

    For the backward pass it keeps its inputs alone, and gathers from them again; beside long spans its output too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        spans: Spans,
        rule: Rule,
    ) -> torch.Tensor:
        """Long spans one by one, and stack by stack what else there is."""
        apart = long_spans.apart(spans, q, k, v, sinks, rule)
        stacks, log_sums = stacks_of(spans, q.device, q[0].numel(), apart), []
        whole = _whole(q, (*q.shape[:2], v.shape[-1]), _written(stacks, spans, apart))
        for span in (slice(*spans.spans[n]) for n in apart):
            whole[span], of_span = long_spans.attend(q[span], k[span], v[span], rule.scale)
            log_sums.append(of_span)
        for stack in stacks:
            _write(strips.attend(*_inputs(stack, q, k, v, sinks), rule), stack, whole)
        out = whole[:-1]
        ctx.save_for_backward(q, k, v, sinks, *([out, *log_sums] if apart else []))
        ctx.spans, ctx.rule, ctx.apart = spans, rule, apart
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Keys' and values' gradients are summed over the spans that see them in 32 bits or more."""
        (q, k, v, sinks, *kept), grad = ctx.saved_tensors, grads[0]
        stacks = stacks_of(ctx.spans, grad.device, q[0].numel(), ctx.apart)
        written = _written(stacks, ctx.spans, ctx.apart)
        wholes = [_whole(grad, x.shape, written) for x in (q, k, v)]
        add = _write
        if ctx.spans.parents is not None:
            wholes[1:] = [torch.zeros_like(whole, dtype=precise(grad.dtype)) for whole in wholes[1:]]
            add = _add
        for number, of_span in zip(ctx.apart, kept[1:], strict=True):
            span = slice(*ctx.spans.spans[number])
            out, scale = kept[0][span], ctx.rule.scale
            parts = long_spans.gradients(grad[span], q[span], k[span], v[span], out, of_span, scale)
            for part, whole in zip(parts, wholes, strict=True):
                whole[span] = part
        of_sinks = []
        for stack in stacks:
            inputs = _inputs(stack, q, k, v, sinks)
            of_out = _queries(grad, stack, k.shape[1], zero_fill=True)
            of_q, of_k, of_v, of_pairs = strips.gradients(of_out, *inputs, ctx.rule)
            _write(of_q, stack, wholes[0])
            for part, whole in ((of_k, wholes[1]), (of_v, wholes[2])):
                add(part.unsqueeze(2), stack, whole)
            if of_pairs is not None:
                of_sinks.append(of_pairs.view(stack.count, -1).sum(0))
        of_all = torch.stack(of_sinks).sum(0) if of_sinks else None
        return (*(whole[:-1].to(grad.dtype) for whole in wholes), of_all, None, None)


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def _inputs(stack: Stack, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> Inputs:
    """What `strips.attend` takes of one stack."""
    of_pairs = None if sinks is None else sinks.view(k.shape[1], -1).repeat(stack.count, 1)
    return _queries(q, stack, k.shape[1]), _keys(k, stack), _keys(v, stack), of_pairs


def _queries(x: torch.Tensor, stack: Stack, key_heads: int, zero_fill: bool = False) -> torch.Tensor:
    """x (tokens, h, d) -> (count * key_heads, length, h / key_heads, d)."""
    rows = x[stack.run[0] : stack.run[1]] if stack.run else x.index_select(0, stack.source)
    if zero_fill and len(stack.fill):
        rows.index_fill_(0, stack.fill, 0)
    return _parted(rows, stack.count, key_heads)


def _keys(x: torch.Tensor, stack: Stack) -> torch.Tensor:
    """x (tokens, key_heads, d) -> (count * key_heads, before + length, d)."""
    rows = x[stack.run[0] : stack.run[1]] if stack.run else x.index_select(0, stack.keys)
    return _parted(rows, stack.count, x.shape[1]).squeeze(2)


def _parted(rows: torch.Tensor, count: int, key_heads: int) -> torch.Tensor:
    """(count * length, h, d) -> (count * key_heads, length, h / key_heads, d), with strides of few values."""
    rows = rows.unflatten(0, (count, -1)).unflatten(2, (key_heads, -1)).transpose(1, 2)
    length = rows.shape[2]
    part = rows.new_empty(count, key_heads, _capacity(length), *rows.shape[3:])[:, :, :length]
    return part.copy_(rows).flatten(0, 1)


def _capacity(length: int) -> int:
    """Room for `length` tokens of which the strides take few values: a power of two."""
    return max(256, 1 << (length - 1).bit_length())


def _written(stacks: list[Stack], spans: Spans, apart: Sequence[int]) -> int:
    """How many tokens the stacks and the spans apart have."""
    stacked = sum(stack.count * stack.length - len(stack.fill) for stack in stacks)
    return stacked + sum(spans.lengths[number] for number in apart)


def _whole(like: torch.Tensor, shape: Sequence[int], written: int) -> torch.Tensor:
    """Room for a shape and one row more, which fills are written to; 0 if not all of it is written."""
    whole = like.new_empty(shape[0] + 1, *shape[1:])
    return whole.zero_() if written < shape[0] else whole


def _write(part: torch.Tensor, stack: Stack, whole: torch.Tensor) -> None:
    """The inverse of `_queries`."""
    rows = part.unflatten(0, (stack.count, -1)).transpose(1, 2)
    if stack.run:
        whole[stack.run[0] : stack.run[1]].view(rows.shape).copy_(rows)
    else:
        whole.index_copy_(0, stack.target, rows.reshape(-1, *whole.shape[1:]).to(whole.dtype))


def _add(part: torch.Tensor, stack: Stack, whole: torch.Tensor) -> None:
    """Add the gradients of keys to their tokens'; what nobody sees has none."""
    rows = part.unflatten(0, (stack.count, -1)).transpose(1, 2)
    whole[:-1].index_add_(0, stack.keys, rows.reshape(-1, *whole.shape[1:]))
