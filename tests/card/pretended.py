"""A CUDA card without a card: `cuda:0` is a label on tensors that lie on the CPU, or on `meta`, where they have no memory.

    with Card() as card:            torch.cuda says that there is one card, and tensors made for it are `OnCard`
        on_card(model)
        model(...)                  every operation computes on what is held; mixed devices are an error
    card.launches, card.waits       what a real one would have been asked for

It knows what an operation means for the host, not whether CUDA has a kernel for it, nor its numerics, speed and memory.
The kernels that no CPU has, with what they demand of their inputs, are in `pretended_kernels`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pretended_cuda
import torch
from pretended_kernels import KERNELS
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

CUDA = torch.device("cuda", 0)


class OnCard(torch.Tensor):
    """A tensor that says it is on cuda:0 and holds another one. To C++, whose engine would ask for streams, it is meta."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnCard:
        assert not isinstance(held, OnCard)
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "layout": held.layout}
        self = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device="meta", **layout)
        self.held = held
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    __array__ = numpy

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: OnCard) -> None:
        assert isinstance(value, OnCard)
        assert (value.shape, value.dtype) == (self.shape, self.dtype)
        self.held = value.held

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OnCard({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert Card.current is not None, f"{func} of a card's tensor outside of `with Card()`"
        return Card.current.run(func, args, kwargs or {})


# The host must have the answer before it goes on.
_ASK = {
    f"aten::{name}"
    for name in [
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "equal",
        "nonzero",
        "nonzero_numpy",
        "argwhere",
        "masked_select",
        "bincount",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
    ]
}
_NO_KERNEL = {
    f"aten::{name}"
    for name in [
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "_unsafe_view",
        "detach",
        "alias",
        "lift_fresh",
        "set_",
        "resize_",
        "is_same_size",
        "_reshape_alias",
        "view",
        "sym_size",
        "_local_scalar_dense",
    ]
} | {"prim::device"}
# Copies between devices; indices on the host are copied over, which the host waits for.
_TAKE_BOTH = {
    f"aten::{name}"
    for name in [
        "copy_",
        "_to_copy",
        "set_",
        "_foreach_copy_",
        "index",
        "index_put",
        "index_put_",
        "_index_put_impl_",
        "to",
    ]
}
_INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}


class Card(TorchDispatchMode):
    """While it is entered there is one card.

    Args:
        capability: As `torch.cuda.get_device_capability` gives it.
        held_on: Where the tensors really are: `cpu`, or `meta` for shapes alone.

    Attributes:
        launches: Operations that start at least one kernel.
        waits: Where the host waited for the card: what it asked, and the line that did.
        pageable: Copies to the card out of memory that is not pinned: the host copies it once more on the way.
        operations: How often each was called.
        hook: Is told of each operation on the card: (operation, args, kwargs, what it gave).
    """

    current: Card | None = None

    def __init__(self, capability: tuple[int, int] = (9, 0), held_on: str = "cpu") -> None:
        super().__init__()
        self.capability, self.held_on = capability, torch.device(held_on)
        self.hook: Callable[..., None] | None = None
        self._depth = 0
        self.clear()

    def clear(self) -> None:
        """Counts from 0 again."""
        self.launches, self.waits, self.pageable, self.operations = 0, [], [], Counter()

    def __enter__(self) -> Card:
        if self._depth == 0:
            self._outer, Card.current = Card.current, self
            self._patches = ExitStack()
            pretended_cuda.enter(self._patches, self.capability, OnCard)
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0:
            self._patches.close()
            Card.current = self._outer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation, on the card where one of its tensors is or where its result shall be."""
        name = func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        own = next((leaf for leaf in tensors if _knows_itself(leaf)), None)
        if own is not None:
            with self:
                return type(own).__torch_dispatch__(func, tuple(map(type, tensors)), args, kwargs)
        if name == "prim::device":
            return CUDA
        cards = [leaf for leaf in tensors if isinstance(leaf, OnCard)]
        asked = kwargs.get("device")
        to = None if asked is None else torch.device(asked).type
        if name == "aten::_to_copy" and cards and to not in (None, "cpu"):
            kwargs, to = {**kwargs, "device": None}, None  # it is there already
        ends_here = bool(cards) if to is None else to != "cpu"
        if not cards and not ends_here:
            return func(*args, **kwargs)
        _refuse_mixed(name, func, cards, tensors)
        self._note(name, func, args, kwargs, cards, to)
        out = self._compute(name, func, args, kwargs, to)
        if ends_here:
            out = tree_map_only(torch.Tensor, lambda x: x if isinstance(x, OnCard) else OnCard(x), out)
            if cards and name != "aten::_conj":
                out = return_and_correct_aliasing(func, args, kwargs, out)
        if self.hook is not None:
            self.hook(func, args, kwargs, out)
        return out

    def _compute(self, name: str, func: Any, args: Any, kwargs: dict[str, Any], to: str | None) -> Any:
        plain, options = tree_map(lambda x: x.held if isinstance(x, OnCard) else x, (args, kwargs))
        if to is not None:
            options["device"] = torch.device("cpu") if to == "cpu" else self.held_on
            if to != "cpu":
                options.pop("pin_memory", None)
        if name in KERNELS:
            return KERNELS[name](self, func, plain, options, args, kwargs)
        if self.held_on.type == "meta":
            return _of_shapes(name, func, plain, options, to)
        return func(*plain, **options)

    def _note(self, name: str, func: Any, args: Any, kwargs: dict[str, Any], cards: list[Any], to: str | None) -> None:
        self.operations[str(func)] += 1
        if name not in _NO_KERNEL and not func.is_view:
            self.launches += 1
        why = name if name in _ASK and not (name == "aten::equal" and cards[0].numel() == 0) else None
        if name == "aten::repeat_interleave" and "Tensor" in func._overloadname and kwargs.get("output_size") is None:
            why = f"{name} of unknown size"
        if name in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                why = f"{name} by a mask"
            elif not all(isinstance(index, OnCard) for index in indices):
                why = f"{name} by indices of the host"
        if name in ("aten::_to_copy", "aten::copy_"):
            why = self._copied(name, args, kwargs, to)
        if why is not None:
            self.waits.append(f"{why}: {whose_line()}")

    def _copied(self, name: str, args: Any, kwargs: dict[str, Any], to: str | None) -> str | None:
        """What of a copy the host waits for."""
        source = args[1] if name == "aten::copy_" else args[0]
        lands = isinstance(args[0], OnCard) if name == "aten::copy_" or to is None else to != "cpu"
        passes = kwargs.get("non_blocking", args[2] if name == "aten::copy_" and len(args) > 2 else False)
        if isinstance(source, OnCard) == lands or source.device.type == "meta" or source.numel() == 0:
            return None
        if lands and source.numel() > 1 and not source.is_pinned():
            self.pageable.append(f"{tuple(source.shape)}: {whose_line()}")
        return None if passes else f"a copy {'to' if lands else 'from'} the card"


def _knows_itself(tensor: torch.Tensor) -> bool:
    """Tensors with a dispatch of their own, as lowrank's masks that are spans."""
    own = type(tensor).__torch_dispatch__
    plain = torch.Tensor.__torch_dispatch__, torch._C._disabled_torch_dispatch_impl
    return own not in plain and not isinstance(tensor, OnCard | torch.nn.Parameter)


def _refuse_mixed(name: str, func: Any, cards: list[Any], tensors: list[torch.Tensor]) -> None:
    host = [x for x in tensors if not isinstance(x, OnCard) and x.device.type != "meta" and x.dim() > 0]
    if cards and host and name not in _TAKE_BOTH:
        told = [(tuple(x.shape), str(x.device)) for x in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu! ({func}: {told})")


def _of_shapes(name: str, func: Any, args: Any, kwargs: dict[str, Any], to: str | None) -> Any:
    """Without memory: the host reads ones, and its own tensors join as shapes."""
    if name == "aten::_local_scalar_dense":
        return False if args[0].dtype == torch.bool else 1.0 if args[0].dtype.is_floating_point else 1
    if name == "aten::_to_copy" and to == "cpu":
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    joined = tree_map_only(
        torch.Tensor, lambda x: x.to("meta") if x.dim() and x.device.type == "cpu" else x, (args, kwargs)
    )
    return func(*joined[0], **joined[1])


def whose_line() -> str:
    """The innermost line of lowrank or transformers that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        for package in ("/lowrank/", "/transformers/", "/accelerate/"):
            _, found, rest = frame.f_code.co_filename.rpartition(package)
            if found and "/tests/" not in frame.f_code.co_filename:
                return f"{package.strip('/')}/{rest}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "autograd"


def on_card(model: torch.nn.Module, held_on: str = "cpu") -> torch.nn.Module:
    """A module's parameters and buffers on the card, those that were one still one. (`Module.to` would set `.data`.)"""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is None or isinstance(value, OnCard):
                    continue
                if id(value) not in moved:
                    there = OnCard(value.detach().to(held_on))
                    trains = value.requires_grad
                    moved[id(value)] = torch.nn.Parameter(there, trains) if table is module._parameters else there
                table[name] = moved[id(value)]
                if (state := getattr(value, "quant_state", None)) is not None:  # of bitsandbytes, what 4 bits stand for
                    state.to(CUDA)
                    moved[id(value)].quant_state = state
    return model


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor of the card, or of the host, holds."""
    return tensor.held if isinstance(tensor, OnCard) else tensor
