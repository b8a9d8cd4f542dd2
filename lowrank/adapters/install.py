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

from torch import nn

from lowrank.adapters.activity import Setting
from lowrank.adapters.kinds.kind import HostModule
from lowrank.adapters.kinds.wide import own_output
from lowrank.adapters.methods.layer import JointLayer, Layer
from lowrank.adapters.modules import ADAPTERS, hosting_modules
from lowrank.adapters.recomputation import pin_recomputation
from lowrank.adapters.routing import Routing
from lowrank.errors import InputError


@dataclass
class Choice:
    """Which adapters act.

    Attributes:
        names: Their deltas add.
        routing: While `routed`: which adapter acts on which row of the batch, instead of `names`.
        silent: While `disabled`: no block inside changes that the base runs alone.
    """

    names: tuple[str, ...] = ()
    routing: Routing | None = None
    silent: bool = False


class Activity(Setting[Choice]):
    """Which adapters of a model act; one object, shared by all its modules."""

    def __init__(self, value: Choice | None = None) -> None:
        super().__init__(value or Choice())
        pin_recomputation()

    @property
    def names(self) -> tuple[str, ...]:
        """The active adapters, blocks aside."""
        return self.value.names

    @names.setter
    def names(self, names: tuple[str, ...]) -> None:
        self.value = Choice(names)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model goes on as the model is now, but not row by row: that is over with the block."""
        now = self.now
        return type(self), (self.value if now.routing is not None else Choice(now.names),)


class AdapterSet(nn.ModuleDict):
    """The adapters on one module, by name."""

    CHILD = ADAPTERS

    def __init__(self, activity: Activity) -> None:
        super().__init__()
        self.activity = activity
        # In evaluation torch's TransformerEncoderLayer reads the weights of all its modules and calls none of them,
        # unless one of them carries a hook.
        self.register_forward_pre_hook(_never_called)

    def layers(self) -> dict[str, Layer]:
        """All of them."""
        return cast("dict[str, Layer]", dict(self.items()))

    def acting(self, names: tuple[str, ...]) -> list[Layer]:
        """Those of that name, in the order of the names."""
        layers = self.layers()
        return [layers[name] for name in names if name in layers]


def _never_called(adapters: nn.Module, args: Any) -> None:
    raise AssertionError("an adapter set is not called")


def install(module: nn.Module, activity: Activity) -> AdapterSet:
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
    adapters = AdapterSet(activity).train(module.training)
    module.add_module(AdapterSet.CHILD, adapters)
    module.__dict__[_slot(module)] = functools.partial(_adapted_forward, module)
    return adapters


def bind_for_compiler(model: nn.Module) -> None:
    """Lets torch.compile serve all layers of a model with what it has compiled for one.

    It tells forwards that stand before their class's apart by identity, unless they are bound methods: those by their
    function. A model is copied with them, but no longer pickled.
    """
    for _, module, _ in hosts(model):
        module.__dict__[_slot(module)] = MethodType(_adapted_forward, module)


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
        install(to, adapters.activity).update(dict(adapters.items()))


def _slot(module: nn.Module) -> str:
    """accelerate's hooks call `_old_forward` between moving weights in and out: adapters go inside of that."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module, AdapterSet]]:
    """Every module that carries adapters: its path, itself, its adapters."""
    for path, module in hosting_modules(model):
        if isinstance(child := module._modules.get(AdapterSet.CHILD), AdapterSet):
            yield path, module, child


def _adapted_forward(module: HostModule, *args: Any, **kwargs: Any) -> Any:
    """Stands in the place of the module's own forward."""
    adapters: AdapterSet = module.adapters
    choice = adapters.activity.now
    if choice.routing is not None:
        return choice.routing.output(module, cast("dict[str, Layer]", adapters._modules), args, kwargs)
    layers = adapters.acting(choice.names)
    if len(layers) == 1:
        return layers[0].output(module, *args, **kwargs)
    if (joint := next((layer for layer in layers if isinstance(layer, JointLayer)), None)) is not None:
        return joint.output_together(module, layers, *args, **kwargs)
    y = own_output(module, *args, **kwargs)
    for_each = [layer.delta(module, args[0], y) for layer in layers]
    return sum(for_each, start=y)
