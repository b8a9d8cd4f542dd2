"""Kernels that a CPU has not, or has in another way: what their CUDA sources demand, and plain formulas in their place.

Each takes (card, operation, args and kwargs with what is held, args and kwargs as they came).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(what)


def _varlen(card: Any, func: Any, args: Any, kwargs: Any, came: Any, came_kwargs: Any) -> Any:
    """torch.nn.attention.varlen: q (tokens, h, d), k and v (tokens, h_kv, d); `offsets` where spans begin."""
    q, k, v, offsets, key_offsets, longest, longest_keys, is_causal, scale, window = args[:10]
    grouped = len(args) > 10 and args[10]
    _must(all(x.is_cuda for x in came[:5]), "varlen_attn: a tensor is on the host")
    _refuse_varlen(card.capability, q, k, v, offsets, key_offsets)
    _must(is_causal == (tuple(window) == (-1, 0)), "is_causal")
    _must(grouped or q.shape[1] == k.shape[1], "enable_gqa")
    if q.device.type != "meta":
        _must(int(offsets.diff().max()) == longest, f"the longest span is not of {longest} tokens")
        _must(int(key_offsets.diff().max()) == longest_keys, f"the most keys are not {longest_keys}")
    log_sums = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    if q.device.type == "meta":
        return torch.empty_like(q), log_sums, state
    (out,) = _spanwise(q, k, v, (offsets, key_offsets), q.shape[-1] ** -0.5 if scale is None else scale, window)
    return torch.empty_like(q).copy_(out), log_sums, state


def _varlen_backward(card: Any, func: Any, args: Any, kwargs: Any, came: Any, came_kwargs: Any) -> Any:
    grad, q, k, v, _, _, offsets, key_offsets, _, _, _, _, scale, window = args
    _must(grad.dtype == q.dtype, f"the gradient is {grad.dtype}, the query {q.dtype}")
    if q.device.type == "meta":
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return tuple(_spanwise(q, k, v, (offsets, key_offsets), scale, window, grad))


def _refuse_varlen(
    capability: tuple[int, int],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    key_offsets: torch.Tensor,
) -> None:
    """aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_varlen_fwd."""
    _must(capability >= (8, 0), "FlashAttention only supports Ampere GPUs or newer.")
    _must(q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    _must(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    _must(q.dim() == k.dim() == v.dim() == 3, "varlen takes (tokens, h, d)")
    _must(q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    _must(q.shape[-1] == k.shape[-1] == v.shape[-1], "head sizes differ")
    _must(q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, "head_size must be a multiple of 8 and at most 256")
    _must(q.shape[1] % k.shape[1] == 0 and k.shape[1] == v.shape[1], "heads of q must be a multiple of k's")
    for borders, x in ((offsets, q), (key_offsets, k)):
        _must(borders.dtype == torch.int32 and borders.is_contiguous(), "cu_seqlens must be contiguous int32")
        if borders.device.type != "meta":
            _must(int(borders[0]) == 0 and int(borders[-1]) == len(x), f"offsets {borders.tolist()} of {len(x)}")


def _spanwise(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    borders: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    window: tuple[int, int],
    grad: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """In float32, span after span; the last query is the last key's. With the output's gradient, those of q, k, v."""
    like, groups, (left, right) = (q, k, v), q.shape[1] // k.shape[1], window
    q, k, v = q.float(), *(x.float().repeat_interleave(groups, 1) for x in (k, v))
    out, d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for (first, last), (start, end) in zip(*(pairwise(each.tolist()) for each in borders), strict=True):
        at, of = slice(first, last), slice(start, end)
        behind = torch.arange(end - start - last + first, end - start)[:, None] - torch.arange(end - start)
        hidden = (behind < -right if right >= 0 else behind != behind) | ((behind > left) & (left >= 0))
        scores = torch.einsum("qhd,khd->hqk", q[at], k[of]) * scale
        p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[at] = torch.einsum("hqk,khd->qhd", p, v[of])
        if grad is not None:
            d_out = grad[at].float()
            d_p = torch.einsum("qhd,khd->hqk", d_out, v[of])
            d_scores = p * (d_p - (d_p * p).sum(-1, keepdim=True)) * scale
            d_q[at] = torch.einsum("hqk,khd->qhd", d_scores, k[of])
            d_k[of] += torch.einsum("hqk,qhd->khd", d_scores, q[at])
            d_v[of] += torch.einsum("hqk,qhd->khd", p, d_out)
    if grad is None:
        return [out]
    d_k, d_v = (x.unflatten(1, (-1, groups)).sum(2) for x in (d_k, d_v))
    return [torch.empty_like(x).copy_(d_x) for x, d_x in zip(like, (d_q, d_k, d_v), strict=True)]


def _grouped(card: Any, func: Any, args: Any, kwargs: Any, came: Any, came_kwargs: Any) -> Any:
    """torch/_meta_registrations.py, `_meta_grouped_mm_common`, which repeats the checks of Blas.cpp."""
    for label, x in (("mat_a", args[0]), ("mat_b", args[1])):
        end, whole = x.dim() - 1, 16 // x.element_size()
        strides, sizes = x.stride(), x.shape
        columns = strides[end - 1] == 1 and strides[end] >= max(1, sizes[end - 1])
        rows = strides[end] == 1 and strides[end - 1] >= max(1, sizes[end])
        _must(columns or rows, f"Invalid strides/sizes, got {strides} for strides and {sizes} for sizes ({label})")
        stride = strides[end] if columns else strides[end - 1]
        _must(stride % whole == 0, f"Expected {label} stride to be multiple of 16 bytes, got {stride}")
        _must(x.device.type != "cpu" or x.data_ptr() % 16 == 0, f"expected {label} data_ptr to be aligned to 16 bytes")
    ends = args[2] if len(args) > 2 else kwargs.get("offs")
    _must(ends is None or ends.dtype == torch.int32, "offs must be int32")
    if args[0].dtype != torch.bfloat16 or card.capability < (9, 0):
        card.waits.append("aten::_grouped_mm without a kernel of its own: the host reads the groups' ends")
    return func(*args, **kwargs)


def _unpacked(card: Any, func: Any, args: Any, kwargs: Any, came: Any, came_kwargs: Any) -> Any:
    """bitsandbytes reads through pointers, and does not look where they lead."""
    tensors = [x for x in (*came, *came_kwargs.values()) if isinstance(x, torch.Tensor)]
    _must(all(x.is_cuda for x in tensors), f"{func}: a pointer to the host's memory is read on the card")
    return func(*args, **kwargs)


def _histc(card: Any, func: Any, args: Any, kwargs: Any, came: Any, came_kwargs: Any) -> Any:
    """CUDA counts integers, a CPU floats alone."""
    x = args[0]
    return func(x, *args[1:], **kwargs) if x.is_meta else func(x.float(), *args[1:], **kwargs).to(x.dtype)


def _conj(card: Any, func: Any, args: Any, kwargs: Any, came: Any, came_kwargs: Any) -> Any:
    """The lazy conjugate is resolved above the card, so what is held is conjugated at once."""
    return torch.conj_physical(args[0])


KERNELS = {
    "torch_attn::_varlen_attn": _varlen,
    "torch_attn::_varlen_attn_backward": _varlen_backward,
    "aten::_grouped_mm": _grouped,
    "bitsandbytes::dequantize_4bit": _unpacked,
    "bitsandbytes::dequantize_blockwise": _unpacked,
    "aten::histc": _histc,
    "aten::_conj": _conj,
}
