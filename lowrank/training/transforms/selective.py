"""Selective recomputation: products and attention are kept, everything that is cheap is computed again.

Of a layer's activations the norms, rotations, gates and casts are the greater part, and cost next to nothing. While the
layer runs forward each of its operations is noted; when the backward pass runs it again, those that are kept answer
with what they gave the first time (Korthikanti 2022, "selective activation recomputation", turned round: there it is
attention that is recomputed).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._flash_attention_forward.default,
}
# Those that some versions of torch have, or that are defined when they are first used.
_KEPT_BY_NAME = {"torch_attn::_varlen_attn", "aten::_grouped_mm", "transformers::grouped_mm_fallback"}

_UNLIKE = (
    "a layer's products were others when it was run again, and gradient_checkpointing: selective needs them to "
    "be the same; set it to true"
)
_VIEWS = {torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default}  # whether or not they say so


@dataclass
class _Record:
    """What a layer's first run gave, product by product in their order.

    Attributes:
        products: (operation, shapes and dtypes of its inputs, what it gave).
        storages: Of what they gave. It is held, so that an address stands for nothing else meanwhile.
    """

    products: list[tuple[Any, Any, Any]] = field(default_factory=list)
    storages: set[int] = field(default_factory=set)


def selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For `torch.utils.checkpoint.checkpoint(context_fn=..., early_stop=False)`: for the first run and for the second.

    What a layer does in its first run alone (filling a cache) may be no product. Its products must be the same in both:
    it is an error where they differ in number, kind or shape.
    """
    record = _Record()
    return _Keep(record), _Replay(record)


class _Keep(TorchDispatchMode):
    def __init__(self, record: _Record) -> None:
        super().__init__()
        self.record = record
        self.read: set[int] = set()  # what is kept and has been seen by an operation that will run again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        kept = self.record.storages
        changed = _storages(_changed(func, args, given)) & kept
        if changed & self.read:
            raise RuntimeError(
                f"{func} changes in place what a product gave and what has been read since: with "
                "training.gradient_checkpointing: selective that cannot be computed again"
            )
        out = func(*args, **given)
        if _is_kept(func, args, given):
            self.record.products.append((func, _shapes(args), _detached(out)))
            kept |= _storages(out)
        elif not changed and not func.is_view and func not in _VIEWS:
            self.read |= _storages((args, given)) & kept
        return out


class _Replay(TorchDispatchMode):
    def __init__(self, record: _Record) -> None:
        super().__init__()
        self.record = record
        self.done = 0

    def __enter__(self) -> Any:
        self.done = 0
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        if exc_type is None and self.done < len(self.record.products):
            raise RuntimeError(_UNLIKE)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if _is_kept(func, args, given):
            if self.done == len(self.record.products):
                raise RuntimeError(_UNLIKE)
            noted, shapes, out = self.record.products[self.done]
            if noted is not func or shapes != _shapes(args):
                raise RuntimeError(_UNLIKE)
            self.done += 1
            return _detached(out)
        changed = _changed(func, args, given)
        if _storages(changed) & self.record.storages:  # is as the first run left it
            return changed[0]
        return func(*args, **given)


def _is_kept(func: Any, args: Any, kwargs: Any) -> bool:
    """Not where it draws random numbers: what comes after it would get others in the second run."""
    return (func in _KEPT or func._schema.name in _KEPT_BY_NAME) and not _named(func, args, kwargs).get(
        "dropout_p", 0.0
    )


def _changed(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that an operation writes to."""
    if not func._schema.is_mutable:
        return []
    written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    return [
        leaf for name, value in _named(func, args, kwargs).items() if name in written for leaf in tree_leaves(value)
    ]


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs


def _shapes(args: Any) -> list[Any]:
    return [(leaf.shape, leaf.dtype) for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]


def _detached(out: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.Tensor.detach, out)


def _storages(tensors: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor)}
