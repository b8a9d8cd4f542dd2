"""Cross-entropy of a chunk of logits in one launch: each row's loss, and its gradient where the logits were."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.graph import increment_version

from lowrank.ops.kernels.tiles import on_its_card

_COLUMNS = 4096
"""Logits that a program holds at once."""


def loss_rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    logit_scale: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    gradient: bool,
) -> torch.Tensor:
    """The loss of each of some rows, (n,) float32, by one pass over their logits; a second leaves their gradient.

    Args:
        logits: (n, V) of up to 32 bits, each row in one piece; their `gradient`, if wanted, takes their place.
        labels: (n,) token ids. A row labelled -100 counts nothing; one whose label is no token becomes NaN.
        weights: How often each row counts, (n,); None: once.
        logit_scale: As in `cross_entropy.LossOptions`, like the next three.
        softcap: None for none.
        label_smoothing: ε.
        z_loss: Weight of log² Σ exp z.
        gradient: Whether it is wanted.
    """
    n, vocabulary = logits.shape
    losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    if n:
        columns = min(_COLUMNS, triton.next_power_of_2(vocabulary))
        with on_its_card(logits):
            _loss[(n,)](
                logits, labels.contiguous(), None if weights is None else weights.contiguous(), losses, vocabulary,
                logits.stride(0), logit_scale, softcap or 1.0, label_smoothing, z_loss, SCALED=logit_scale != 1.0,
                CAPPED=softcap is not None, SMOOTHED=label_smoothing != 0.0, Z_LOSS=z_loss != 0.0,
                WEIGHTED=weights is not None, GRADIENT=gradient, COLUMNS=columns, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
        if gradient:
            increment_version(logits)  # autograd is told, as by an operation in place
    return losses


@triton.jit
def _changed(z: tl.tensor, scale: tl.tensor, cap: tl.tensor, SCALED: tl.constexpr, CAPPED: tl.constexpr) -> tl.tensor:
    """Logits after their scale and their soft cap."""
    z = z.to(tl.float32)
    if SCALED:
        z *= scale
    if CAPPED:  # cap · tanh(z / cap)
        e = tl.exp(-2.0 * tl.abs(z) / cap)
        z = tl.where(z < 0, -cap, cap) * ((1.0 - e) / (1.0 + e))
    return z


@triton.jit
def _steepness(z: tl.tensor, scale: tl.tensor, cap: tl.tensor, SCALED: tl.constexpr, CAPPED: tl.constexpr) -> tl.tensor:
    """The derivative of what `_changed` gives: 1 - tanh² as what it is without a difference."""
    steepness = scale if SCALED else 1.0
    if CAPPED:
        e = tl.exp(-2.0 * tl.abs(z.to(tl.float32) * steepness) / cap)
        steepness *= 4.0 * e / ((1.0 + e) * (1.0 + e))
    return steepness


@triton.jit
def _loss(
    logits: tl.tensor,
    labels: tl.tensor,
    weights: tl.tensor,
    losses: tl.tensor,
    vocabulary: tl.tensor,
    stride: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    smoothing: tl.tensor,
    z_loss: tl.tensor,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GRADIENT: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    label = tl.load(labels + row)
    ignored = label == -100
    known = (label >= 0) & (label < vocabulary)
    # Before any gradient is stored: the sums over the row, which all warps wait for, lie in between.
    target = _changed(tl.load(logits + label, mask=known, other=0.0), scale, cap, SCALED, CAPPED)
    weight = tl.load(weights + row).to(tl.float32) if WEIGHTED else 1.0
    weight = tl.where(known, weight, float("nan"))

    largest, mass, total = _sums(logits, vocabulary, scale, cap, SCALED, CAPPED, SMOOTHED, COLUMNS)
    log_mass = tl.log(mass)
    lse = largest + log_mass
    loss = (1.0 - smoothing) * (largest - target + log_mass)
    if SMOOTHED:
        loss += smoothing * (largest - total / vocabulary + log_mass)
    if Z_LOSS:
        loss += z_loss * lse * lse
    tl.store(losses + row, tl.where(ignored, 0.0, loss * weight))

    if GRADIENT:
        column = tl.arange(0, COLUMNS)
        for start in range(0, vocabulary, COLUMNS):
            place = start + column
            z = tl.load(logits + place, mask=place < vocabulary, other=0.0)
            slope = tl.exp(_changed(z, scale, cap, SCALED, CAPPED) - largest) / mass
            if Z_LOSS:
                slope *= 1.0 + 2.0 * z_loss * lse
            if SMOOTHED:
                slope -= smoothing / vocabulary
            slope -= tl.where(place == label, 1.0 - smoothing, 0.0)
            slope *= _steepness(z, scale, cap, SCALED, CAPPED)
            slope = tl.where(ignored, 0.0, slope * weight)
            tl.store(logits + place, slope.to(logits.dtype.element_ty), mask=place < vocabulary)


@triton.jit
def _sums(
    logits: tl.tensor,
    vocabulary: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The largest logit of a row, Σ exp(z - largest), and Σ z where it is needed (0 else)."""
    column = tl.arange(0, COLUMNS)
    largest = float("-inf")
    mass = 0.0
    total = 0.0
    for start in range(0, vocabulary, COLUMNS):
        inside = start + column < vocabulary
        z = _changed(tl.load(logits + start + column, mask=inside, other=0.0), scale, cap, SCALED, CAPPED)
        if SMOOTHED:
            total += tl.sum(tl.where(inside, z, 0.0), 0)
        z = tl.where(inside, z, float("-inf"))
        larger = tl.maximum(largest, tl.max(z, 0))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # all of them so far: nothing is added
        mass = mass * tl.exp(largest - base) + tl.sum(tl.exp(z - base), 0)
        largest = larger
    return largest, mass, total
