"""An attention mask that is spans, and turns into the square it stands for only when somebody looks.

transformers passes masks about as tensors of shape (b, 1, q, k): it asks for their shape, some models slice them, some
caches copy them. So that nothing of this meets a surprise, `SpansMask` is such a tensor. It has no memory; an attention
function that knows spans reads `mask.spans`, and any other operation on it computes the square first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from lowrank.attention.spans import Spans


class SpansMask(torch.Tensor):
    """A bool mask (batch, 1, length, length), True where a query sees a key, that is all in its `spans`."""

    spans: Spans
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyrefly: ignore[bad-override]

    @staticmethod
    def __new__(cls: type[SpansMask], spans: Spans, device: torch.device | str) -> SpansMask:
        """A mask on a device, without memory."""
        shape = (spans.batch, 1, spans.length, spans.length)
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=torch.device(device))
        mask.spans = spans
        return mask

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"SpansMask({self.spans}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore[bad-override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Any operation: on the square, but for those that only make another handle of the same mask."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].spans, args[0].device)
        args, kwargs = tree_map_only(
            cls, lambda mask: mask.spans.square(mask.device), (tuple(args), dict(kwargs or {}))
        )
        return func(*args, **kwargs)
