"""Variable-length kernels for `segments` on CUDA: torch's own, or flash-attn's if it is installed.

Both take all spans end to end in one tensor, with the places where they begin, and compute no pair across a border. Of
spans with ancestors they take the whole paths' keys end to end: the last query is the last key's, and the others stand
before it. What they cannot do exactly (float32, soft-capping without flash-attn, sinks, values of another size than
keys) is left to `strips`, which can, on any device.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from lowrank.attention.spans import Spans
from lowrank.attention.strips import Rule
from lowrank.ops.precision import precise

# (q (tokens, h, d), k, v (keys, h_kv, d), spans, rule) -> (tokens, h, d)
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Spans, Rule], torch.Tensor]


def kernel_for(q: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, rule: Rule) -> Kernel | None:
    """The variable-length kernel that computes this exactly, or None."""
    if q.device.type != "cuda" or torch.version.hip or q.dtype not in (torch.float16, torch.bfloat16):
        return None
    fits = q.shape[-1] == v.shape[-1] and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    if not fits or sinks is not None or torch.cuda.get_device_capability(q.device) < (8, 0):
        return None
    if rule.softcap is None and _torch_varlen() is not None:
        return torch_kernel
    return flash_attn_kernel if _flash_attn_varlen() is not None else None


def over_spans(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, rule: Rule, kernel: Kernel
) -> torch.Tensor:
    """q (tokens, h, d), k and v (tokens, h_kv, d) -> (tokens, h, d), 0 at padding."""
    if spans.parents is not None:
        k, v = (along(x, spans.paths(x.device)) for x in (k, v))
    if spans.full:
        return kernel(q, k, v, spans, rule)
    real = spans.tokens(q.device)
    real_q, real_k, real_v = q.index_select(0, real), k.index_select(0, real), v.index_select(0, real)
    out = kernel(real_q, real_k, real_v, spans, rule)
    return out.new_zeros(q.shape).index_copy(0, real, out)


def along(x: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
    """x (tokens, h, d), `Spans.paths` (keys,) -> (keys, h, d): of each span its ancestors' rows and its own."""
    return _Along.apply(x, paths)


class _Along(torch.autograd.Function):
    """`index_select`, whose gradients are summed in 32 bits or more: in 16 many small ones would be lost."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """x (tokens, h, d), index (keys,) -> (keys, h, d)."""
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyrefly: ignore[bad-override]
        """(keys, h, d) -> (tokens, h, d)."""
        sums = precise(grads[0].dtype)
        whole = grads[0].new_zeros(ctx.shape, dtype=sums)
        return whole.index_add_(0, ctx.saved_tensors[0], grads[0].to(sums)).to(grads[0].dtype), None


def torch_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, rule: Rule) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn` (torch 2.11 and later), which needs no extra package; its backward pass
    asks torch itself whether it is to be deterministic."""
    attend, groups = _torch_varlen(), q.shape[1] // k.shape[1]
    assert attend is not None
    asked = {"scale": rule.scale, "window_size": (-1 if rule.window is None else rule.window - 1, 0)}
    if groups == 1 or not _takes(attend, "enable_gqa"):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    else:
        asked["enable_gqa"] = True
    return attend(q, k, v, *_borders(spans, q.device), **asked)


def flash_attn_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, rule: Rule) -> torch.Tensor:
    """flash-attn 2's `flash_attn_varlen_func`, which can soft-cap."""
    attend = _flash_attn_varlen()
    assert attend is not None
    return attend(
        q,
        k,
        v,
        *_borders(spans, q.device),
        softmax_scale=rule.scale,
        causal=True,
        window_size=(-1, -1) if rule.window is None else (rule.window - 1, 0),
        softcap=rule.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _borders(spans: Spans, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Where the queries and the keys of each span begin, and how many there are at most."""
    if spans.parents is None:
        return spans.offsets(device), spans.offsets(device), spans.longest, spans.longest
    return spans.offsets(device), spans.key_offsets(device), spans.longest, max(spans.ends)


def _torch_varlen() -> Callable[..., torch.Tensor] | None:
    try:
        attend = import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    # The first releases of it knew no window, and took `is_causal` instead.
    return attend if _takes(attend, "window_size") else None


def _flash_attn_varlen() -> Callable[..., torch.Tensor] | None:
    try:
        attend = import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, AttributeError):
        return None
    return attend if _takes(attend, "softcap") else None


@functools.cache
def _takes(attend: Callable[..., torch.Tensor], argument: str) -> bool:
    """Looked up once: every layer asks in every pass, and a signature takes a tenth of a millisecond to read."""
    return argument in inspect.signature(attend).parameters
