"""Cross-entropy from hidden states: the logits of a large vocabulary exist a chunk of rows at a time.

With a frozen head the gradient of the hidden states is formed chunk by chunk in the forward pass, while the chunk's
logits are there: nothing is recomputed, and what stays is one (n, d) gradient. A trained head adds one (V, d) gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

CHUNK_BYTES = 32 * 2**20
"""Memory of one chunk's float32 logits. As much again is held beside them: what the head gave, or their softmax."""


@dataclass(frozen=True, slots=True)
class LossOptions:
    """What is done to logits z and to their loss.

    Attributes:
        logit_scale: z ← logit_scale · z.
        softcap: z ← softcap · tanh(z / softcap) (Gemma 2), after the scale; None for none.
        label_smoothing: ε of (1 - ε) · CE + ε · mean over the vocabulary of -log p (Szegedy 2016).
        z_loss: Weight of log² Σ exp z, which keeps logits from drifting (PaLM).
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    options: LossOptions = LossOptions(),
) -> torch.Tensor:
    """Sum over the rows of the cross-entropy of `hidden @ weight.T + bias` against `labels`.

    Args:
        hidden: (n, d).
        weight: The head (V, d), of hidden's dtype.
        labels: (n,) token ids; every row counts, so leave unsupervised rows out.
        bias: (V,) or None.
        options: What else is done to the logits.

    Returns:
        A float32 scalar (float64 for float64 input).
    """
    loss = _LinearCrossEntropy.apply(hidden, weight, bias, labels, options)
    assert isinstance(loss, torch.Tensor)
    return loss


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    options: LossOptions = LossOptions(),
) -> torch.Tensor:
    """The same from all logits at once."""
    return cross_entropy(F.linear(hidden, weight, bias), labels, options)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """Sum over the rows of the cross-entropy of `logits` (n, V), what `options` say done to them first."""
    logits = options.logit_scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=options.label_smoothing)
    return loss + options.z_loss * torch.logsumexp(logits, dim=-1).square().sum() if options.z_loss else loss


def chunk_rows(vocabulary: int) -> int:
    """Rows of logits that make one chunk."""
    return max(1, CHUNK_BYTES // (vocabulary * 4))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        options: LossOptions,
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad
        precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=precise) if wanted[1] else None
        d_bias = torch.zeros_like(bias, dtype=precise) if bias is not None and wanted[2] else None
        loss = torch.zeros((), dtype=precise, device=hidden.device)
        rows = chunk_rows(weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            z = F.linear(hidden[part], weight, bias)
            chunk_loss, slope = _loss_and_gradient(z, labels[part], options, precise, any(wanted[:3]))
            del z
            loss += chunk_loss
            if slope is None:
                continue
            if d_bias is not None:
                d_bias += slope.sum(0)
            d_logits = slope.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[part])
            if d_weight is not None:
                d_weight += d_logits.t() @ hidden[part]
            del slope, d_logits  # before the next chunk's are made
        ctx.save_for_backward(
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(None if g is None else g * grads[0].to(g.dtype) for g in ctx.saved_tensors), None, None


def _loss_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, options: LossOptions, precise: torch.dtype, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss of one chunk, and its `gradient` by `logits` (rows, V), if wanted; both in `precise`. Takes the logits'
    memory."""
    plain = options.logit_scale == 1.0 and options.softcap is None
    z = logits if plain else _scaled_and_capped(logits.to(precise), options)
    target = labels[:, None]
    log_p = torch.log_softmax(z, dim=-1, dtype=precise)
    found = log_p.gather(1, target)
    lse = z.gather(1, target) - found
    smooth = options.label_smoothing
    loss = (smooth - 1.0) * found + options.z_loss * lse.square()
    if smooth:
        loss -= smooth * log_p.mean(dim=-1, keepdim=True)
    if not gradient:
        return loss.sum(), None
    slope = log_p.exp_()
    if options.z_loss:
        slope *= 1.0 + 2.0 * options.z_loss * lse
    if smooth:
        slope -= smooth / slope.shape[1]
    slope.scatter_add_(1, target, torch.full_like(found, smooth - 1.0))
    if options.softcap is not None:
        slope *= z.div_(options.softcap).square_().neg_().add_(1.0)  # 1 - tanh²
    if options.logit_scale != 1.0:
        slope *= options.logit_scale
    return loss.sum(), slope


def _scaled_and_capped(z: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """In place."""
    z *= options.logit_scale
    return z if options.softcap is None else z.div_(options.softcap).tanh_().mul_(options.softcap)
