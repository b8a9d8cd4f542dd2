"""How a module gets adapters and loses them again.

The module stays the object that it was. It gains one child, `adapters`, with a layer for each adapter, and a `forward`
of its own that stands before its class's. Removing both gives the module back untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import nn

from lowrank.adapters.kinds import HostModule, Kind
from lowrank.adapters.method import JointLayer, Layer
from lowrank.errors import InputError


@dataclass
class Activity:
    """Which adapters act; one object, shared by all modules of a model.

    Attributes:
        names: The active adapters; their deltas add.
        rows: While `routed`: an adapter (or None) for each row of the batch, instead of `names`.
    """

    names: tuple[str, ...] = ()
    rows: tuple[str | None, ...] | None = None


class AdapterSet(nn.ModuleDict):
    """The adapters on one module, by name."""

    CHILD = "adapters"

    def __init__(self, kind: Kind | None, activity: Activity) -> None:
        super().__init__()
        self.kind, self.activity = kind, activity
        # In evaluation torch's TransformerEncoderLayer reads the weights of all its modules and calls none of them,
        # unless one of them carries a hook.
        self.register_forward_pre_hook(_never_called)

    def layers(self) -> dict[str, Layer]:
        """All of them."""
        return cast("dict[str, Layer]", dict(self.items()))

    def acting(self) -> list[Layer]:
        """Those that are active, in the order of activation."""
        layers = self.layers()
        return [layers[name] for name in self.activity.names if name in layers]


def _never_called(adapters: nn.Module, args: Any) -> None:
    raise AssertionError("an adapter set is not called")


def install(module: nn.Module, kind: Kind | None, activity: Activity) -> AdapterSet:
    """The module's adapter set, a new one if it has none yet."""
    present = module._modules.get(AdapterSet.CHILD)
    if isinstance(present, AdapterSet):
        return present
    if hasattr(module, AdapterSet.CHILD):
        raise InputError(
            f"a {type(module).__name__} has an attribute named {AdapterSet.CHILD!r} already; lowrank needs that name"
        )
    if _slot(module) == "forward" and "forward" in module.__dict__:
        raise InputError(
            f"a {type(module).__name__} has had its forward replaced, which an adapter in its place would undo",
            fix="Patch the class instead of the module.",
        )
    adapters = AdapterSet(kind, activity).train(module.training)
    module.add_module(AdapterSet.CHILD, adapters)
    module.__dict__[_slot(module)] = functools.partial(adapted_forward, module)
    return adapters


def bind_for_compiler(model: nn.Module) -> None:
    """Lets torch.compile serve all layers of a model with what it has compiled for one.

    It tells forwards that stand before their class's apart by identity, unless they are bound methods: those by their
    function. A model is copied with them, but no longer pickled.
    """
    for _, module, _ in hosts(model):
        module.__dict__[_slot(module)] = MethodType(adapted_forward, module)


def remove(module: nn.Module) -> None:
    """Takes the adapters off: the module is as it was."""
    delattr(module, AdapterSet.CHILD)
    slot = _slot(module)
    if slot == "forward":
        del module.__dict__[slot]
    else:
        module.__dict__[slot] = functools.partial(type(module).forward, module)


def move(module: nn.Module, to: nn.Module) -> None:
    """Hands a module's adapters, if it has any, on to the one that takes its place."""
    adapters = module._modules.get(AdapterSet.CHILD)
    if isinstance(adapters, AdapterSet):
        remove(module)
        install(to, adapters.kind, adapters.activity).update(dict(adapters.items()))


def _slot(module: nn.Module) -> str:
    """accelerate's hooks call `_old_forward` between moving weights in and out: adapters go inside of that."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module, AdapterSet]]:
    """Every module that carries adapters: its path, itself, its adapters."""
    for path, module in model.named_modules():
        if isinstance(child := module._modules.get(AdapterSet.CHILD), AdapterSet):
            yield path, module, child


def adapted_forward(module: HostModule, *args: Any, **kwargs: Any) -> Any:
    """Stands in the place of the module's own forward."""
    adapters: AdapterSet = module.adapters
    if adapters.activity.rows is not None:
        return _routed(module, adapters, adapters.activity.rows, *args, **kwargs)
    layers = adapters.acting()
    if len(layers) == 1:
        return layers[0].output(module, adapters.kind, *args, **kwargs)
    if (joint := next((layer for layer in layers if isinstance(layer, JointLayer)), None)) is not None:
        return joint.output_together(module, layers, *args, **kwargs)
    y = type(module).forward(module, *args, **kwargs)
    for_each = [layer.delta(module, adapters.kind, args[0], y) for layer in layers]
    return sum(for_each, start=y)


def _routed(module: nn.Module, adapters: AdapterSet, rows: tuple[str | None, ...], *args: Any, **kwargs: Any) -> Any:
    """The base for the whole batch at once, then each adapter that is present in it for its rows alone."""
    y = type(module).forward(module, *args, **kwargs)
    layers = adapters.layers()
    if not any(name in layers for name in rows):
        return y
    x = args[0]
    if x.shape[0] != len(rows):
        raise InputError(
            f"routed() was given {len(rows)} rows, and a {type(module).__name__} sees a batch of {x.shape[0]}",
            fix="Give one adapter (or None) for each row. Layers that mix rows cannot be routed.",
        )
    for name in dict.fromkeys(rows):
        if name is not None and name in layers:
            index = torch.tensor([i for i, row in enumerate(rows) if row == name], device=y.device)
            delta = layers[name].delta(module, adapters.kind, x[index], y[index])
            y = y.index_add(0, index, delta.to(y.dtype))
    return y
