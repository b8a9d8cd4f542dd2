"""The log-probability of each token, from hidden states: for losses that are a function of them.

What the loss will ask of each is not known yet when the logits of a chunk are there. But each token's is of its own
hidden state alone: under a frozen head its gradient is formed then and scaled afterwards, so nothing is computed twice.
A head that trains has one gradient for all tokens, for which the logits are made again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowrank.ops.cross_entropy import LossOptions, chunk_rows, chunks_of, each_cross_entropy, losses_of_chunk
from lowrank.ops.precision import precise

_PLAIN = LossOptions()
_COPIES = 2
"""Of a chunk's logits: the head's backward pass may copy what it is given."""


def token_log_probs(
    head: nn.Module, hidden: torch.Tensor, tokens: torch.Tensor, vocabulary: int, options: LossOptions = _PLAIN
) -> torch.Tensor:
    """log p of each token.

    Args:
        head: (n, d) -> (n, V). Its backward pass must not need what it returned, whose memory is taken.
        hidden: (n, d).
        tokens: (n,) ids.
        vocabulary: V.
        options: What else is done to the logits; label smoothing and z-loss have no place here.

    Returns:
        (n,), float32 at least; gradients flow to `hidden` and to the head.
    """
    assert options.label_smoothing == options.z_loss == 0.0, "log-probabilities are what they are"
    if not torch.is_grad_enabled():
        return -each_cross_entropy(head, hidden, tokens, vocabulary, options)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if trained:
        found = _MadeAgain.apply(hidden, head, tokens, vocabulary, options, *trained)
    else:
        found = _FormedAtOnce.apply(hidden, head, tokens, vocabulary, options)
    assert isinstance(found, torch.Tensor)
    return found


class _FormedAtOnce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: nn.Module, tokens: torch.Tensor, vocabulary: int, options: LossOptions
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        slopes = torch.empty_like(hidden) if wanted else None
        losses = torch.empty(len(hidden), dtype=precise(hidden.dtype), device=hidden.device)
        for part in chunks_of(len(hidden), chunk_rows(hidden, vocabulary, _COPIES)):
            with torch.set_grad_enabled(wanted):
                given = hidden[part].detach().requires_grad_(wanted)
                z = head(given)
            slope = z.detach()
            losses[part] = losses_of_chunk(slope, tokens[part], options, None, wanted)
            if slopes is not None:
                slopes[part] = torch.autograd.grad(z, given, slope)[0]
            del z, slope  # before the next chunk's are made
        ctx.save_for_backward(slopes)
        return -losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * -grads[0][:, None]).to(slopes.dtype), None, None, None, None


class _MadeAgain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: nn.Module,
        tokens: torch.Tensor,
        vocabulary: int,
        options: LossOptions,
        *trained: nn.Parameter,
    ) -> torch.Tensor:
        device = hidden.device.type
        ctx.head, ctx.vocabulary, ctx.options, ctx.trained = head, vocabulary, options, trained
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(hidden, tokens)
        return -each_cross_entropy(head, hidden, tokens, vocabulary, options)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, tokens = ctx.saved_tensors
        device, dtype, enabled = ctx.autocast
        wanted = ctx.needs_input_grad[0]
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_trained = [torch.zeros_like(parameter, dtype=precise(parameter.dtype)) for parameter in ctx.trained]
        for part in chunks_of(len(hidden), chunk_rows(hidden, ctx.vocabulary, _COPIES)):
            with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled):
                given = hidden[part].detach().requires_grad_(wanted)
                z = ctx.head(given)
            slope = z.detach()
            losses_of_chunk(slope, tokens[part], ctx.options, -grads[0][part], True)
            inputs = [*([given] if wanted else []), *ctx.trained]
            found = list(torch.autograd.grad(z, inputs, slope, allow_unused=True))
            if d_hidden is not None:
                d_hidden[part] = found.pop(0)
            for total, one in zip(d_trained, found, strict=True):
                if one is not None:
                    total += one
            del z, slope, found
        parts = [total.to(parameter.dtype) for total, parameter in zip(d_trained, ctx.trained, strict=True)]
        return d_hidden, None, None, None, None, *parts
