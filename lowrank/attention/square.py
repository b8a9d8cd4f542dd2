"""Attention under a square mask: what `segments` falls back to where a mask is not spans (decoding, custom masks).

transformers' sdpa function serves most of it. Soft-capping and sinks are beyond scaled_dot_product_attention, which
would leave them out without a word; they take the plain formula.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lowrank.attention.mask import SpansMask


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    position_bias: torch.Tensor | None,
) -> torch.Tensor:
    """query (b, h, q, d), key (b, h_kv, k, d), value (b, h_kv, k, e) -> (b, q, h, e).

    Args:
        module: The attention layer; gives `num_key_value_groups` and `is_causal` to transformers' function.
        mask: Broadcasts to (b, h, q, k): bool (True: seen) or added to the scores; None: causal if `is_causal`, the
            first query at the first key, but for a single query, which sees all keys.
        dropout: Probability with which an attention weight is dropped.
        scaling: Factor of the scores; None: 1 / sqrt(d).
        is_causal: None: as the module says.
        softcap: c in c * tanh(score / c).
        sinks: (h,) scores of a key that every query sees and that has no value.
        position_bias: Broadcasts to (b, h, q, k), added to the scores.
    """
    if isinstance(mask, SpansMask):
        mask = mask.spans.square(query.device)
    if softcap is None and sinks is None:
        out, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
        )
        return out
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal and scores.shape[-2] > 1:
        # Further keys than queries are places of a static cache that nothing fills yet: they come after all queries.
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., : key.shape[2]].to(query.dtype)
    return (torch.dropout(weights, dropout, train=dropout > 0) @ value).transpose(1, 2).contiguous()
