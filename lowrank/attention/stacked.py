"""Attention over stacks of spans, one after the other: what is gathered for one is gone then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from lowrank.attention import strips, torch_kernel
from lowrank.attention.spans import Spans
from lowrank.attention.stacking import GRAIN, Layout, Stack, stacks_of
from lowrank.attention.strips import Rule
from lowrank.ops.precision import precise


class StackedAttention(torch.autograd.Function):
    """q (tokens, h, d), k (tokens, h_kv, d), v (tokens, h_kv, e), sinks (h,) or None -> (tokens, h, e), 0 at padding.

    For the backward pass it keeps its inputs alone, and gathers from them again; where torch's kernel computed some of
    the spans, its output too.
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
        by_torch: tuple[int, ...] = (),
    ) -> torch.Tensor:
        out, log_sums = attend((q, k, v, sinks), spans, rule, by_torch)
        ctx.save_for_backward(q, k, v, sinks, *([out, *log_sums] if by_torch else []))
        ctx.spans, ctx.rule, ctx.by_torch = spans, rule, by_torch
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, *kept = ctx.saved_tensors
        of_inputs = gradients(grads[0], (q, k, v, sinks), kept, ctx.spans, ctx.rule, ctx.by_torch)
        return (*of_inputs, None, None, None)


Inputs: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""q, k, v and the sinks."""


def attend(
    inputs: Inputs, spans: Spans, rule: Rule, by_torch: tuple[int, ...]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The spans `by_torch` in stacks of torch's kernel, and in strips what else there is.

    Returns:
        (tokens, h, e), and what torch's kernel tells of each of its stacks.
    """
    q, k, v, _ = inputs
    torchs, others = _stacks(spans, q, k, by_torch)
    whole, log_sums = _whole(q, (*q.shape[:2], v.shape[-1]), spans), []
    for stack in torchs:
        tensors = [_rows(x, stack.keys, stack) for x in (q, k, v)]
        part, of_stack = torch_kernel.attend(*tensors, scale=rule.scale)
        _write(part, stack, whole)
        log_sums.append(of_stack)
    for stack in others:
        strips.attend(*_gathered(stack, *inputs), rule, _writer(stack, whole))
    return whole[:-1], log_sums


def gradients(
    grad: torch.Tensor,
    inputs: Inputs,
    kept: Sequence[torch.Tensor],
    spans: Spans,
    rule: Rule,
    by_torch: tuple[int, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Those of `attend`'s inputs; keys' and values' are summed over the spans that see them in 32 bits or more.

    Args:
        grad: The output's.
        inputs: As `attend` had them.
        kept: Where torch's kernel had a part, the output and what it told.
        spans: As `attend` had them.
        rule: As well.
        by_torch: As well.
    """
    q, k, v, _ = inputs
    torchs, others = _stacks(spans, q, k, by_torch)
    wholes, add, of_sinks = [_whole(grad, x.shape, spans) for x in (q, k, v)], _write, []
    if spans.parents is not None:
        wholes[1:] = [torch.zeros_like(whole, dtype=precise(grad.dtype)) for whole in wholes[1:]]
        add = _add
    for stack, log_sums in zip(torchs, kept[1:], strict=True):
        tensors = [_rows(x, stack.keys, stack) for x in (q, k, v, kept[0])]
        of_out = _queries(grad, stack, zero_fill=True)
        parts = torch_kernel.gradients(of_out, *tensors, log_sums=log_sums, scale=rule.scale)
        for part, whole in zip(parts, wholes, strict=True):
            _write(part, stack, whole)
    for stack in others:
        gathered, of_out = _gathered(stack, *inputs), _queries(grad, stack, zero_fill=True)
        *of_keys, of_pairs = strips.gradients(of_out, *gathered, rule, _writer(stack, wholes[0]))
        for part, whole in zip(of_keys, wholes[1:], strict=True):
            add(part.unsqueeze(2), stack, whole)
        if of_pairs is not None:
            of_sinks.append(of_pairs.view(stack.count, -1).sum(0))
    of_all = torch.stack(of_sinks).sum(0) if of_sinks else None
    return *(whole[:-1].to(grad.dtype) for whole in wholes), of_all


def _stacks(
    spans: Spans, q: torch.Tensor, k: torch.Tensor, by_torch: tuple[int, ...]
) -> tuple[list[Stack], list[Stack]]:
    """Those of torch's kernel, and those of strips, which have each key head's queries side by side."""
    others = tuple(sorted(set(range(len(spans.spans))).difference(by_torch)))
    plain = Layout(q.device, q[0].numel())
    roomy = q.element_size() == 2 and q.device.type == "cpu"
    by_heads = replace(plain, heads=k.shape[1], grain=GRAIN, roomy=roomy)
    return stacks_of(spans, plain, by_torch), stacks_of(spans, by_heads, others)


def _gathered(stack: Stack, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> Inputs:
    """What `strips.attend` takes of one stack."""
    of_pairs = None if sinks is None else sinks.view(k.shape[1], -1).repeat(stack.count, 1)
    places = stack.before + stack.length
    keys, values = (_rows(x, stack.keys, stack)[:, :places, 0] for x in (k, v))
    return _queries(q, stack), keys, values, of_pairs


def _queries(x: torch.Tensor, stack: Stack, zero_fill: bool = False) -> torch.Tensor:
    """x (tokens, h, d) -> (n, length, g, d)."""
    rows = _rows(x, stack.source, stack)
    if zero_fill and len(stack.fill):
        rows.flatten(0, 1).index_fill_(0, stack.fill, 0)
    return rows[:, : stack.length]


def _rows(x: torch.Tensor, index: torch.Tensor, stack: Stack) -> torch.Tensor:
    """Of x (tokens, heads * g, d) the rows of an index (n, places) -> (n, places, g, d), of a run as they lie."""
    heads = len(index) // stack.count
    rows = x.reshape(len(x) * heads, -1, x.shape[2])
    chosen = rows[slice(*stack.run)] if stack.run else rows.index_select(0, index.flatten())
    return chosen.unflatten(0, index.shape)


def _whole(like: torch.Tensor, shape: Sequence[int], spans: Spans) -> torch.Tensor:
    """Room for a shape and one token more, which fills are written to; 0 if not all of it is written."""
    whole = like.new_empty(shape[0] + 1, *shape[1:])
    return whole if spans.full else whole.zero_()


def _writer(stack: Stack, whole: torch.Tensor) -> strips.Write:
    """Puts what `strips` makes of a stack's queries to their tokens (tokens + 1, h, d)."""

    def write(pairs: slice, queries: slice, part: torch.Tensor) -> None:
        _copy(part, stack.target[pairs, queries], whole)

    return write


def _write(part: torch.Tensor, stack: Stack, whole: torch.Tensor) -> None:
    """What a stack's tokens (n, length, g, d) have, and no other span's, to its rows of (tokens + 1, heads * g, d)."""
    if stack.run:
        rows = whole.view(-1, *part.shape[2:])[slice(*stack.run)]
        rows.unflatten(0, part.shape[:2]).copy_(part)
    else:
        _copy(part, stack.target, whole)


def _copy(part: torch.Tensor, target: torch.Tensor, whole: torch.Tensor) -> None:
    rows = whole.view(-1, *part.shape[2:])
    rows.index_copy_(0, target.flatten(), part.flatten(0, 1).to(whole.dtype))


def _add(part: torch.Tensor, stack: Stack, whole: torch.Tensor) -> None:
    """Add the gradients of keys (n, before + length, 1, d) to their tokens'; what nobody sees has none."""
    rows = whole.view(-1, *part.shape[2:])
    rows.index_add_(0, stack.keys[:, : part.shape[1]].flatten(), part.flatten(0, 1))
