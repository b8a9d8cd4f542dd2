"""Cross-entropy from hidden states: the logits of a large vocabulary exist a chunk of rows at a time.

Gradients are formed chunk by chunk in the forward pass, while the chunk's logits are there: nothing is recomputed, and
what stays with a frozen head is one (n, d) gradient. A trained head adds one (V, d) gradient, adapters add their own.

A chunk is as large as products want it; what lies between its two products goes over it block by block, each as large
as a CPU's cache, and leaves the logits' gradient where the logits were. On a card where `kernels` run it is one launch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lowrank.ops.kernels.on_card import kernels_take
from lowrank.ops.precision import precise

CHUNK_BYTES = 64 * 2**20
"""Memory of one chunk's logits, of the dtype that the head gives them."""
KERNEL_CHUNK_BYTES = 256 * 2**20
"""The same where a kernel takes a chunk, which needs nothing of that size beside it."""
BLOCK_BYTES = 4 * 2**20
"""Memory of one block's float32 logits on CPU. Elsewhere a block is a chunk."""


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
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over the rows of the cross-entropy of `hidden @ weight.T + bias` against `labels`.

    Args:
        hidden: (n, d).
        weight: The head (V, d), of hidden's dtype, or both of any under autocast.
        labels: (n,) token ids; every row counts, so leave unsupervised rows out.
        bias: (V,) or None.
        options: What else is done to the logits.
        row_weights: How often each row's loss counts, z-loss and all, (n,); None: once. No gradient flows to them.

    Returns:
        A float32 scalar (float64 for float64 input).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled():  # which the function itself is not told
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    loss = _LinearCrossEntropy.apply(hidden, weight, bias, labels, options, row_weights)
    assert isinstance(loss, torch.Tensor)
    return loss


def cross_entropy_through(
    head: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    vocabulary: int,
    options: LossOptions = LossOptions(),
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same through a head that is more than a product: with adapters, quantised, or under hooks.

    Args:
        head: (n, d) -> (n, V). Its backward pass must not need what it returned, whose memory is taken.
        hidden: (n, d).
        labels: (n,).
        vocabulary: V.
        options: What else is done to the logits.
        row_weights: How often each row counts, (n,); None: once.

    Raises:
        RuntimeError: from autograd, where the head's backward pass needs what it returned.
    """
    evaluated = not torch.is_grad_enabled()
    trained = [] if evaluated else [parameter for parameter in head.parameters() if parameter.requires_grad]
    loss = _CrossEntropyThrough.apply(
        hidden.detach() if evaluated else hidden, head, labels, vocabulary, options, row_weights, *trained
    )
    assert isinstance(loss, torch.Tensor)
    return loss


@torch.no_grad()
def each_cross_entropy(
    head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, vocabulary: int, options: LossOptions = LossOptions()
) -> torch.Tensor:
    """The cross-entropy of each row, for looking at: no gradient flows from it.

    Args:
        head: (n, d) -> (n, V).
        hidden: (n, d).
        labels: (n,).
        vocabulary: V.
        options: What else is done to the logits.

    Returns:
        (n,), float32 at least.
    """
    chunks = chunks_of(hidden.shape[0], chunk_rows(hidden, vocabulary))
    found = [losses_of_chunk(head(hidden[part]), labels[part], options, None, False) for part in chunks]
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=precise(hidden.dtype))


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    options: LossOptions = LossOptions(),
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same from all logits at once."""
    return cross_entropy(F.linear(hidden, weight, bias), labels, options, row_weights)


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    options: LossOptions,
    row_weights: torch.Tensor | None = None,
    reduction: str = "sum",
) -> torch.Tensor:
    """The cross-entropy of `logits` (n, V), what `options` say done to them first, each row as often as `row_weights`
    (n,) say: its sum, or (n,) under "none"."""
    logits = options.logit_scale * logits.to(precise(logits.dtype))
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=options.label_smoothing)
    if options.z_loss:
        loss = loss + options.z_loss * torch.logsumexp(logits, dim=-1).square()
    loss = loss if row_weights is None else loss * row_weights.to(loss.dtype)
    return loss.sum() if reduction == "sum" else loss


def chunk_rows(hidden: torch.Tensor, vocabulary: int, copies: int = 1) -> int:
    """Rows of logits, of hidden's dtype, that make one chunk with its copies."""
    memory = KERNEL_CHUNK_BYTES if kernels_take(hidden) else CHUNK_BYTES
    return max(1, memory // (vocabulary * hidden.element_size() * copies))


def chunks_of(n: int, most: int) -> list[slice]:
    """n rows in as few chunks as `most` rows allow, all of about one size: products of few rows are slow."""
    rows = -(-n // max(1, -(-n // most)))
    return [slice(start, start + rows) for start in range(0, n, max(1, rows))]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        options: LossOptions,
        row_weights: torch.Tensor | None,
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad
        digits = precise(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=digits) if wanted[1] else None
        d_bias = torch.zeros_like(bias, dtype=digits) if bias is not None and wanted[2] else None
        loss = torch.zeros((), dtype=digits, device=hidden.device)
        chunks = chunks_of(hidden.shape[0], chunk_rows(hidden, weight.shape[0]))
        memory = hidden.new_empty(len(hidden[chunks[0]]) if chunks else 0, weight.shape[0])  # one for all chunks
        for part in chunks:
            z = memory[: len(hidden[part])]
            if bias is None:
                torch.mm(hidden[part], weight.t(), out=z)
            else:
                torch.addmm(bias, hidden[part], weight.t(), out=z)
            loss += losses_of_chunk(z, labels[part], options, _part(row_weights, part), any(wanted[:3])).sum()
            if d_bias is not None:
                d_bias += z.sum(0, dtype=digits)
            if d_hidden is not None:
                torch.mm(z, weight, out=d_hidden[part])
            if d_weight is not None:
                d_weight += z.t() @ hidden[part]
        ctx.save_for_backward(
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(None if g is None else g * grads[0].to(g.dtype) for g in ctx.saved_tensors), None, None, None


class _CrossEntropyThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: nn.Module,
        labels: torch.Tensor,
        vocabulary: int,
        options: LossOptions,
        row_weights: torch.Tensor | None,
        *trained: nn.Parameter,
    ) -> torch.Tensor:
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_trained = [torch.zeros_like(p, dtype=precise(p.dtype)) for p in trained]
        gradients = d_hidden is not None or bool(trained)
        loss = torch.zeros((), dtype=precise(hidden.dtype), device=hidden.device)
        copies = 2  # the head's backward pass may copy what it is given
        for part in chunks_of(hidden.shape[0], chunk_rows(hidden, vocabulary, copies)):
            with torch.set_grad_enabled(gradients):
                given = hidden[part].detach().requires_grad_(d_hidden is not None)
                z = head(given)
            slope = z.detach()
            loss += losses_of_chunk(slope, labels[part], options, _part(row_weights, part), gradients).sum()
            if not gradients:
                continue
            wanted = [*([given] if d_hidden is not None else []), *trained]
            found = list(torch.autograd.grad(z, wanted, slope, allow_unused=True))
            if d_hidden is not None:
                d_hidden[part] = found.pop(0)
            for total, part_of_it in zip(d_trained, found, strict=True):
                if part_of_it is not None:
                    total += part_of_it
            del z, slope, found  # before the next chunk's are made
        ctx.save_for_backward(d_hidden, *(d.to(p.dtype) for d, p in zip(d_trained, trained, strict=True)))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, *d_trained = (None if g is None else g * grads[0].to(g.dtype) for g in ctx.saved_tensors)
        return d_hidden, None, None, None, None, None, *d_trained


def _part(row_weights: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if row_weights is None else row_weights[part]


def losses_of_chunk(
    logits: torch.Tensor, labels: torch.Tensor, options: LossOptions, weights: torch.Tensor | None, gradient: bool
) -> torch.Tensor:
    """The loss of each of some rows (rows, V), in float32 at least; their `gradient`, if wanted, takes their place."""
    if kernels_take(logits) and logits.stride(1) == 1:
        from lowrank.ops.kernels.loss_rows import loss_rows

        return loss_rows(logits, labels, weights, **asdict(options), gradient=gradient)
    rows, vocabulary = logits.shape
    at_once = max(1, BLOCK_BYTES // (vocabulary * 4)) if logits.device.type == "cpu" else rows
    blocks = [slice(start, start + at_once) for start in range(0, rows, at_once)]
    return torch.cat([_losses_of_block(logits[b], labels[b], options, _part(weights, b), gradient) for b in blocks])


def _losses_of_block(
    logits: torch.Tensor, labels: torch.Tensor, options: LossOptions, weights: torch.Tensor | None, gradient: bool
) -> torch.Tensor:
    changed = options.logit_scale != 1.0 or options.softcap is not None
    z = logits.to(precise(logits.dtype), copy=changed)
    if changed:
        _scale_and_cap(z, options)
    target = labels[:, None]
    slope = torch.softmax(z, dim=-1)
    # log p of the largest, which is 1 / V at least; of the others by their distance: nothing large is subtracted.
    largest, log_largest = z.amax(dim=-1, keepdim=True), slope.amax(dim=-1, keepdim=True).log_()
    lse = largest - log_largest
    smooth = options.label_smoothing
    loss = (smooth - 1.0) * (z.gather(1, target) - largest + log_largest) + options.z_loss * lse.square()
    if smooth:
        loss -= smooth * (z.mean(dim=-1, keepdim=True) - largest + log_largest)
    if weights is not None:
        weights = weights[:, None].to(loss.dtype)
        loss *= weights
    if not gradient:
        return loss[:, 0]
    if options.z_loss:
        slope *= 1.0 + 2.0 * options.z_loss * lse
    if smooth:
        slope -= smooth / slope.shape[1]
    slope.scatter_add_(1, target, torch.full_like(lse, smooth - 1.0))
    if options.softcap is not None:
        slope *= z.div_(options.softcap).square_().neg_().add_(1.0)  # 1 - tanh²
    if options.logit_scale != 1.0:
        slope *= options.logit_scale
    if weights is not None:
        slope *= weights
    logits.copy_(slope)
    return loss[:, 0]


def _scale_and_cap(z: torch.Tensor, options: LossOptions) -> None:
    """In place."""
    z *= options.logit_scale
    if options.softcap is not None:
        z.div_(options.softcap).tanh_().mul_(options.softcap)
