"""The `flash` backend: FlashAttention 2, 3 or 4, whichever is installed and fits the card, through transformers.

transformers would fall back to kernels from a hub when no package is installed, and would leave out what a version
does not know (sinks, dropout) without a word: both are refused here. Its own search for packs works on one row alone
and waits for the device in every layer, so `packing.segments` hands it the borders, and where segments have parents the
tokens of their paths, along which each layer gathers its keys. Of a mask it takes the padding alone and drops the rest:
`flash_mask` stands before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available
from transformers.utils.import_utils import is_flash_attn_4_available

from lowrank.attention.announced import ANNOUNCED
from lowrank.attention.backend import Backend
from lowrank.attention.maskparts import BOTH_WAYS, CAUSAL, parts_of
from lowrank.attention.setting import Setting
from lowrank.attention.spans import Spans
from lowrank.attention.varlen import along
from lowrank.errors import InputError, first_line


def packing_arguments(spans: Spans, device: torch.device) -> dict[str, torch.Tensor | int]:
    """What the FlashAttention functions want to know of a pack; arguments of the model's call reach each layer."""
    queries = {"cu_seq_lens_q": spans.offsets(device), "max_length_q": spans.longest}
    if spans.parents is None:
        return {**queries, "cu_seq_lens_k": spans.offsets(device), "max_length_k": spans.longest}
    keys = {"cu_seq_lens_k": spans.key_offsets(device), "max_length_k": max(spans.ends)}
    return {**queries, **keys, "key_paths": spans.paths(device)}


def flash_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    key_paths: torch.Tensor | None = None,
    **asked: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' FlashAttention function, deterministic where torch is to be; key and value (1, h_kv, n, d) are
    gathered along the paths of a forest."""
    if torch.are_deterministic_algorithms_enabled():
        asked["deterministic"] = True  # transformers asks a variable of the environment otherwise
    if key_paths is not None:
        key, value = (along(x[0].transpose(0, 1), key_paths).transpose(0, 1)[None] for x in (key, value))
    return flash_attention_forward(module, query, key, value, attention_mask, **asked)


def _version_for(device: torch.device) -> int | None:
    """The newest FlashAttention that is installed and made for the card."""
    if device.type != "cuda" or torch.version.hip:
        return None
    major = torch.cuda.get_device_capability(device)[0]
    if major in (9, 10) and is_flash_attn_4_available():
        return 4
    if major == 9 and is_flash_attn_3_available():
        return 3
    return 2 if major >= 8 and is_flash_attn_2_available() else None


def flash_mask(*arguments: Any, mask_function: Callable[..., torch.Tensor], **more: Any) -> torch.Tensor | None:
    """transformers' mask for FlashAttention, behind a refusal of masks that the kernels cannot compute.

    Raises:
        InputError: The mask is more than causal or not causal, windows, segments and padding.
    """
    beyond = parts_of(mask_function) - CAUSAL - BOTH_WAYS
    if beyond:
        raise InputError(
            f"the attention backend `flash` cannot serve this model's mask: it knows no {', '.join(sorted(beyond))}",
            fix="Use `attention: segments`.",
        )
    told = ANNOUNCED.get(id(more.get("config")))
    if told is not None:
        told.asked = True
    return flash_attention_mask(*arguments, mask_function=mask_function, **more)


def refusal_of_kernel(setting: Setting, knows: Collection[str]) -> str | None:
    """Why FlashAttention cannot serve a setting exactly.

    Args:
        setting: The model.
        knows: The parameters of the installed version's `flash_attn_varlen_func`; transformers leaves out what is not
            among them.
    """
    if not setting.supports_flash:
        return "transformers has no FlashAttention path for this architecture"
    if setting.own_masks:
        return "its masks are more than causal, and FlashAttention would drop the rest"
    if setting.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention computes in 16 bits, the model is in {setting.dtype}".replace("torch.", "")
    if setting.head_dim is not None and setting.head_dim > 256:
        return f"heads of size {setting.head_dim} are larger than 256"
    if setting.sinks and not {"s_aux", "learnable_sink"} & set(knows):
        return "the installed version knows no attention sinks"
    if setting.softcap and "softcap" not in knows:
        return "the installed version cannot soft-cap the scores"
    if setting.window is not None and "window_size" not in knows:
        return "the installed version knows no sliding window"
    if torch.are_deterministic_algorithms_enabled() and "deterministic" not in knows:
        return "the installed version has no deterministic kernels"
    if setting.dropout > 0 and "dropout_p" not in knows:
        return f"the installed version has no dropout, the model's attention has {setting.dropout:g}"
    return None


def _refusal(setting: Setting) -> str | None:
    if setting.device.type != "cuda":
        return f"it needs a CUDA device, the model is on {setting.device.type}"
    version = _version_for(setting.device)
    if version is None:
        return "no FlashAttention package that fits this card is installed"
    try:
        kernel = import_module(_PACKAGE[version]).flash_attn_varlen_func
    except (ImportError, OSError, AttributeError, RuntimeError) as error:  # built for another torch, another driver
        return f"{_PACKAGE[version]} is installed and cannot be used: {first_line(error)}"
    return refusal_of_kernel(setting, inspect.signature(kernel).parameters)


def _implementation(setting: Setting) -> str:
    name = f"flash_attention_{_version_for(setting.device)}"
    register(name)
    return name


def register(name: str) -> None:
    """Put ours before transformers' functions of a version of FlashAttention."""
    AttentionInterface.register(name, flash_attention)
    AttentionMaskInterface.register(name, flash_mask)


_PACKAGE = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}

FLASH = Backend("flash", _refusal, _implementation, "FlashAttention kernels, which skip what the mask hides")
