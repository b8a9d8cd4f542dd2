"""The `flex` backend: FlexAttention under block masks, so that blocks which a mask hides whole are never computed.

transformers says every mask as a function of two positions (segments of a pack, padding, sliding windows, prefixes,
chunks); FlexAttention compiles that function, and soft-capping, into its kernel. It has no backward pass on CPU.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flex_attention_mask

from lowrank.attention.backend import Backend
from lowrank.attention.setting import Setting
from lowrank.errors import InputError

IMPLEMENTATION = "lowrank_flex"
LEAST_HEAD = 16  # torch's kernels on CUDA: "NYI: embedding dimension ... must be at least 16"


def flex_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **asked: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' FlexAttention function, behind refusals of what it would get wrong.

    Raises:
        InputError: Dropout; gradients on CPU; a causal layer without a mask, which would be computed as not causal.
    """
    if dropout > 0:
        raise _refused(module, f"it has no dropout, this model's attention has {dropout:g}")
    if query.device.type == "cpu" and torch.is_grad_enabled() and (query.requires_grad or value.requires_grad):
        raise _refused(module, "it has no backward pass on CPU")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        raise _refused(module, "the model gave a causal layer no mask")
    mask = cast("BlockMask", attention_mask)  # transformers annotates no None, and takes it
    return flex_attention_forward(module, query, key, value, mask, **asked)


def _refused(module: nn.Module, why: str) -> InputError:
    return InputError(
        f"the attention backend `flex` cannot serve {type(module).__name__}: {why}",
        fix="Use `attention: auto`, which takes the fastest backend that is exact for this model.",
    )


def _refusal(setting: Setting) -> str | None:
    if not setting.supports_flex:
        return "transformers has no FlexAttention path for this architecture"
    if setting.dropout > 0:
        return f"it has no dropout, the model's attention has {setting.dropout:g}"
    if setting.sinks and setting.device.type == "cpu":
        return "it knows no attention sinks on CPU"
    if setting.packing and setting.device.type == "cpu":
        return "it has no backward pass on CPU"
    if setting.device.type == "cuda" and setting.head_dim is not None and setting.head_dim < LEAST_HEAD:
        return f"its kernels take heads of {LEAST_HEAD} and wider, the model's are {setting.head_dim} wide"
    return None


def _implementation(setting: Setting) -> str:
    AttentionInterface.register(IMPLEMENTATION, flex_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, flex_attention_mask)
    return IMPLEMENTATION


FLEX = Backend("flex", _refusal, _implementation, "computes any mask block by block, and only the blocks it keeps")
