"""What names in a model's code may stand for: modules, parameters, functions; all else is not followed."""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from lowrank.adapters.modules import ADAPTERS, bare
from lowrank.adapters.targeting.code.source import FunctionNode, parameters_of

Value = frozenset[Any]
NOTHING: Value = frozenset()

_BUILT_IN = {id(thing) for thing in vars(builtins).values()}


@dataclass(frozen=True)
class Read:
    """A parameter that is at hand as a tensor."""

    module: nn.Module
    name: str


@dataclass(frozen=True)
class Super:
    """`super()` in a method of the class `after`."""

    after: type
    module: nn.Module


def bound_arguments(node: FunctionNode, args: list[Value], keywords: dict[str, Value]) -> dict[str, Value]:
    """The parameters of a function by name, with what a call gives them."""
    names, rest, others = parameters_of(node)
    bound = dict.fromkeys(names, NOTHING)
    bound |= dict(zip(names, args, strict=False))
    bound |= {name: value for name, value in keywords.items() if name in names}
    if rest is not None:
        bound[rest] = union(args[len(node.args.posonlyargs) + len(node.args.args) :])
    if others is not None:
        bound[others] = union(value for name, value in keywords.items() if name not in names)
    return bound


def union(values: Iterable[Value]) -> Value:
    """All that several values may stand for."""
    return frozenset().union(*values)


def has_tensor(value: Value) -> bool:
    """Whether a parameter is among it."""
    return any(isinstance(item, Read) for item in value)


def children(module: nn.Module) -> dict[str, nn.Module]:
    """A module\'s own, without adapters and wrappers."""
    return {name: bare(child) for name, child in module._modules.items() if child is not None and name != ADAPTERS}


def as_value(thing: Any) -> Value:
    """What is worth following: modules and functions, alone or in lists."""
    if isinstance(thing, (list, tuple, set)):
        return union(as_value(item) for item in thing if isinstance(item, (nn.Module, list, tuple)))
    if isinstance(thing, dict):
        return union(as_value(item) for item in thing.values() if isinstance(item, nn.Module))
    if isinstance(thing, partial):
        return as_value(thing.func)
    if isinstance(thing, (nn.Module, FunctionType, MethodType, ModuleType, type)) or id(thing) in _BUILT_IN:
        return frozenset([thing])
    if callable(thing) and getattr(thing, "__name__", "").endswith("_like"):
        return frozenset([thing])
    return NOTHING


def inherited(given: Super, name: str) -> Value:
    """The method that `super().name` means."""
    order = type(given.module).__mro__
    after = order[order.index(given.after) + 1 :] if given.after in order else ()
    found = next((vars(parent)[name] for parent in after if name in vars(parent)), None)
    if isinstance(found, FunctionType) and getattr(nn.Module, name, None) is not found:
        return frozenset([MethodType(found, given.module)])
    return NOTHING
