"""‖W + s·B·A‖, row by row, without forming B·A (DoRA, Liu 2024, equation 5)."""

from __future__ import annotations

import torch


def dora_norm(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    weight_norm2: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm of each row of W + s·B·A: ‖wᵢ + s·bᵢA‖² = ‖wᵢ‖² + 2s·bᵢ·(A·wᵢ) + s²·bᵢ·(A·Aᵀ)·bᵢᵀ.

    The products are (out, r) and (r, r). Sums are in float32 (float64 for float64 factors): with a bf16 W the products
    are W's own.

    Args:
        weight: W (out, in), dense; (out, in / groups) for a convolution with groups.
        A: (r, in).
        B: (out, r); (out, r / groups) with groups.
        scale: s.
        weight_norm2: ‖wᵢ‖² (out,) where it is known already.

    Returns:
        (out,), the dtype of A.
    """
    norm2 = row_norm2(weight, A.dtype) if weight_norm2 is None else weight_norm2
    if (groups := A.shape[1] // weight.shape[1]) > 1:
        return _grouped_norm(weight, A, B, scale, norm2, groups)
    cross = (weight @ A.to(weight.dtype).t()).to(B.dtype)  # (out, r)
    square = (B @ (A @ A.t())).mul_(scale * scale).add_(cross, alpha=2.0 * scale)
    return (norm2 + (square * B).sum(1)).clamp_min_(0.0).sqrt_()


def _grouped_norm(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, norm2: torch.Tensor, groups: int
) -> torch.Tensor:
    """peft's norm where W has groups: it reads ΔW as B (out / groups, r) · A, its values taken in W's shape.

    So row i · groups + j of "ΔW" is row i of B · A in the j-th part of A's columns. It is not the kernel that acts, but
    it is what magnitudes in files are relative to.
    """
    rows = B.view(-1, A.shape[0])  # (out / groups, r)
    parts = A.unflatten(1, (groups, -1)).transpose(0, 1)  # (groups, r, in / groups)
    own = weight.view(-1, groups, weight.shape[1]).transpose(0, 1)  # (groups, out / groups, in / groups)
    cross = (own @ parts.mT.to(own.dtype)).to(B.dtype)
    square = (rows @ (parts @ parts.mT)).mul_(scale * scale).add_(cross, alpha=2.0 * scale)
    return (norm2 + (square * rows).sum(-1).t().flatten()).clamp_min_(0.0).sqrt_()


def row_norm2(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """‖wᵢ‖² of every row, (out,), summed in `dtype`."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square_()


def dora_norm_reference(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """The same with the dense sum."""
    return torch.linalg.vector_norm(weight + scale * (B @ A), dim=1)
