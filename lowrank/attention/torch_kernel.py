"""Causal attention of a stack of spans by torch's own kernel on a CPU: it keeps no row of scores.

It knows neither windows, soft-capping, sinks nor ancestors, and is not the faster one everywhere: `span_kernels` says
where it is taken.
"""

from __future__ import annotations

import torch

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """q (n, s, h, d), k and v (n, s, h_kv, d) -> (n, s, h, d), and the logarithms of the sums of its softmax."""
    out, log_sums = _forward(*(x.transpose(1, 2) for x in (q, k, v)), 0.0, True, scale=scale)
    return out.transpose(1, 2), log_sums


def gradients(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    *,
    log_sums: torch.Tensor,
    scale: float,
) -> list[torch.Tensor]:
    """Those of `attend`'s q, k and v, given its output's (n, s, h, d)."""
    inputs = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    return [part.transpose(1, 2) for part in _backward(*inputs, log_sums, 0.0, True, scale=scale)]
