"""The `segments` backend: packs and padded batches without computing what the mask would throw away.

Registered with transformers under one name both as attention function and as mask function (an attention function
alone gets no mask at all, and segments would see one another). The mask function says the mask as `Spans` where it is
one; wherever it is not (decoding with a cache, bidirectional or custom masks) the mask stays a square of booleans, and
`square.attend` honours it together with everything else a model may ask for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lowrank.attention import square, varlen
from lowrank.attention.announced import announced_spans
from lowrank.attention.announced_rows import ROWS
from lowrank.attention.backend import Backend
from lowrank.attention.mask import SpansMask
from lowrank.attention.maskparts import CAUSAL, CHUNKS, parts_of
from lowrank.attention.setting import Setting
from lowrank.attention.span_kernels import by_torch
from lowrank.attention.spans import Spans, from_mask_function
from lowrank.attention.stacked import StackedAttention
from lowrank.attention.strips import Rule
from lowrank.errors import InputError

IMPLEMENTATION = "lowrank_segments"

# What models hand to every attention function for others to read; none of it changes what attention is.
_HARMLESS = frozenset(
    {
        "sliding_window",  # the mask says it, and is what is obeyed
        "position_ids",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "use_cache",
        "cache_position",
        "deterministic",
    }
)


def segments_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    dtype: torch.dtype = torch.float32,
    config: PreTrainedConfig | None = None,
    device: torch.device | str = "cpu",
) -> SpansMask | torch.Tensor | None:
    """What `transformers.masking_utils` calls once per forward pass and kind of mask; arguments as `sdpa_mask`'s."""
    whole = q_length == kv_length and not isinstance(q_offset, torch.Tensor) and q_offset == kv_offset == 0
    whole = whole and (attention_mask is None or attention_mask.shape[-1] == q_length)
    if whole:
        announced = announced_spans(config, batch_size, q_length, attention_mask, mask_function, local_size)
        if announced is None and (rows := ROWS.get(id(config))) is not None:
            announced = rows.spans(batch_size, q_length, attention_mask, mask_function, local_size)
        if announced is not None:
            return SpansMask(announced, device)
    if whole and not use_vmap and not allow_is_bidirectional_skip and parts_of(mask_function) <= CAUSAL | CHUNKS:
        spans = from_mask_function(mask_function, attention_mask, batch_size, q_length, local_size, device)
        if spans is not None:
            return SpansMask(spans, device)
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        device=device,
    )


def segments_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """What a layer calls: query (b, h, q, d), key (b, h_kv, k, d), value (b, h_kv, k, e) -> (b, q, h, e), no weights.

    Raises:
        InputError: The model asks for something that this function does not know.
    """
    unknown = sorted(name for name, given in others.items() if name not in _HARMLESS and not _nothing(given))
    if unknown:
        raise InputError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which `segments` does not know",
            fix="Use `attention: eager`.",
        )
    if isinstance(attention_mask, SpansMask) and position_bias is None and dropout == 0.0:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        kind = query.device.type
        if torch.is_autocast_enabled(kind):  # as it does for scaled_dot_product_attention
            query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
        with torch.autocast(kind, enabled=False):
            return _over_spans(query, key, value, attention_mask.spans, scale, softcap, s_aux), None
    out = square.attend(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        softcap=softcap,
        sinks=s_aux,
        position_bias=position_bias,
    )
    return out, None


def _nothing(given: object) -> bool:
    return given is None or given is False


def _over_spans(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Spans,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    if key.shape[2] != spans.length:
        raise InputError(
            f"the mask covers {spans.length} tokens a row, the keys {key.shape[2]}",
            fix="Call the model with use_cache=False while training.",
        )
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    rule = Rule(scale, spans.window if spans.bounded else None, softcap)
    return attend_spans(q, k, v, sinks, spans, rule).unflatten(0, (spans.batch, spans.length))


def attend_spans(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, spans: Spans, rule: Rule
) -> torch.Tensor:
    """q (tokens, h, d), k (tokens, h_kv, d), v (tokens, h_kv, e), sinks (h,) -> (tokens, h, e), 0 at padding."""
    kernel = varlen.kernel_for(q, v, sinks, rule)
    if kernel is not None:
        return varlen.over_spans(q, k, v, spans, rule, kernel)
    if not spans.spans:
        return q.new_zeros(*q.shape[:2], v.shape[-1])
    return _over_stacks(q, k, v, sinks, spans, rule)


@torch.compiler.disable  # what it does depends on the spans' lengths: it would be compiled anew for each pack
def _over_stacks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, spans: Spans, rule: Rule
) -> torch.Tensor:
    return StackedAttention.apply(q, k, v, sinks, spans, rule, by_torch(spans, q, k, v, sinks, rule))


def _register() -> None:
    """Make the backend known to transformers, as attention function and as mask function."""
    AttentionInterface.register(IMPLEMENTATION, segments_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, segments_mask)


def _refusal(setting: Setting) -> str | None:
    return None


def _implementation(setting: Setting) -> str:
    _register()
    return IMPLEMENTATION


SEGMENTS = Backend(
    "segments", _refusal, _implementation, "computes only what the mask keeps, in O(n) memory, packed or padded"
)
