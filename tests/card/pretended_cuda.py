"""What torch says of itself while there is a pretended card: `torch.cuda`, autocast, sdpa, and what C++ would group."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.utils.clip_grad as clipping
import torch.optim.optimizer as optimizers
import torch.utils._foreach_utils as foreach
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

GIB = 2**30


def enter(patches: ExitStack, capability: tuple[int, int], tensors: type[torch.Tensor]) -> None:
    """Puts everything in place, until `patches` is closed; `tensors` is the class of the card's."""
    for (owner, name), value in {**_cuda(capability), **_elsewhere(tensors)}.items():
        before = getattr(owner, name)
        setattr(owner, name, value)
        patches.callback(setattr, owner, name, before)
    for types in (foreach._foreach_supported_types, optimizers._foreach_supported_types):
        types.append(tensors)
        patches.callback(types.remove, tensors)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
    patches.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
    torch._C._set_only_lift_cpu_tensors(True)
    patches.enter_context(_Autocast(tensors))
    patches.enter_context(torch.autograd.set_multithreading_enabled(False))  # its threads for a device need a card


def _cuda(capability: tuple[int, int]) -> dict[tuple[Any, str], Any]:
    """torch.cuda's answers: one card, of 80 GiB."""
    cuda = torch.cuda
    kind = {"major": capability[0], "minor": capability[1], "multi_processor_count": 132}
    properties = SimpleNamespace(name="pretended", total_memory=80 * GIB, **kind)
    answers = {
        "_lazy_init": None,
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "get_device_capability": capability,
        "get_device_properties": properties,
        "get_device_name": "pretended",
        "is_bf16_supported": capability >= (8, 0),
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "mem_get_info": (60 * GIB, 80 * GIB),
        "synchronize": None,
        "empty_cache": None,
    }
    said: dict[tuple[Any, str], Any] = {(cuda, name): _always(answer) for name, answer in answers.items()}
    return said | {
        (cuda, "get_rng_state"): lambda *device: torch.get_rng_state(),
        (cuda, "set_rng_state"): lambda state, *device: torch.set_rng_state(state),
        (cuda, "get_rng_state_all"): lambda: [torch.get_rng_state()],
        (cuda, "set_rng_state_all"): lambda states: torch.set_rng_state(states[0]),
        (cuda, "device"): _Chosen,
        (cuda, "device_of"): _Chosen,
        (cuda.amp.common, "amp_definitely_not_available"): _always(False),
    }


def _elsewhere(tensors: type[torch.Tensor]) -> dict[tuple[Any, str], Any]:
    """Pinned memory is a mark on a copy; the plain formula stands for sdpa's kernels; groups are told their device."""
    named = "_group_tensors_by_device_and_dtype"
    grouping = {(o, named): _of_cuda(getattr(o, named)) for o in (clipping, optimizers, foreach) if hasattr(o, named)}
    return {
        **grouping,
        (F, "scaled_dot_product_attention"): _sdpa(F.scaled_dot_product_attention, tensors),
        (torch.Tensor, "pin_memory"): _pinned,
        (torch.Tensor, "is_pinned"): lambda tensor, *device: getattr(tensor, "is_pretended_pinned", False),
    }


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer


def _pinned(tensor: torch.Tensor, *device: Any) -> torch.Tensor:
    copy = tensor.clone()
    copy.is_pretended_pinned = True
    return copy


class _Chosen:
    """`with torch.cuda.device(...)`."""

    def __init__(self, *args: Any) -> None: ...

    def __enter__(self) -> _Chosen:
        return self

    def __exit__(self, *error: Any) -> None: ...


def _of_cuda(group: Callable[..., Any]) -> Callable[..., Any]:
    def grouped(*args: Any, **kwargs: Any) -> Any:
        found = group(*args, **kwargs).items()
        cuda = torch.device("cuda", 0)
        return {(cuda if device and device.type == "meta" else device, dtype): of for (device, dtype), of in found}

    return grouped


class _Autocast(TorchFunctionMode):
    """What `torch.autocast("cuda")` does to products."""

    PRODUCTS = frozenset(
        {F.linear, *(getattr(torch, name) for name in ["matmul", "bmm", "mm", "addmm", "baddbmm"])}
    ) | {getattr(torch.Tensor, name) for name in ["matmul", "__matmul__", "bmm", "mm"]}

    def __init__(self, tensors: type[torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.PRODUCTS and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            args, kwargs = tree_map(
                lambda x: x.to(dtype) if isinstance(x, self.tensors) and x.is_floating_point() else x, (args, kwargs)
            )
        return func(*args, **kwargs)


def _sdpa(original: Callable[..., torch.Tensor], tensors: type[torch.Tensor]) -> Callable[..., torch.Tensor]:
    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if not isinstance(query, tensors):
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        assert query.dtype == key.dtype == value.dtype
        assert attn_mask is None or (attn_mask.is_cuda and attn_mask.dtype in (torch.bool, query.dtype))
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = (query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        return torch.dropout(torch._safe_softmax(scores, -1), dropout_p, dropout_p > 0) @ value  # 0 of no keys

    return attention
