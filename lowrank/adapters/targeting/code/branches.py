"""Which way a branch goes, where a module's own settings decide it: `if self.config.pretraining_tp > 1`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

_UNKNOWN = object()
_COMPARES: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_PLAIN = (bool, int, float, str, type(None), tuple, list)


def decide(test: ast.expr, names: Mapping[str, frozenset[Any]]) -> bool | None:
    """Whether a test holds; None where it depends on more than settings.

    Args:
        test: The condition.
        names: The local names, with the modules that they may stand for.
    """
    value = _value(test, names)
    return bool(value) if isinstance(value, _PLAIN) else None


def _value(node: ast.expr, names: Mapping[str, frozenset[Any]]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if len(names.get(name, ())) == 1:
            return next(iter(names[name]))
        case ast.Attribute(value=owner, attr=name):
            return _setting(_value(owner, names), name)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            held = decide(operand, names)
            return _UNKNOWN if held is None else not held
        case ast.BoolOp(op=op, values=parts):
            stops = isinstance(op, ast.Or)
            sides = [decide(part, names) for part in parts]
            return stops if stops in sides else _UNKNOWN if None in sides else not stops
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _compared(op, _value(left, names), _value(right, names))
    return _UNKNOWN


def _setting(owner: Any, name: str) -> Any:
    """A plain attribute of a module or a config. `training` changes, and parameters are no settings."""
    if owner is _UNKNOWN or owner is None or name == "training":
        return _UNKNOWN
    if isinstance(owner, nn.Module):
        if name in owner._parameters:
            return None if owner._parameters[name] is None else _UNKNOWN
        return owner.__dict__.get(name, _UNKNOWN)
    held = getattr(owner, "__dict__", {})
    return held.get(name, _UNKNOWN) if isinstance(held, dict) else _UNKNOWN


def _compared(op: ast.cmpop, left: Any, right: Any) -> Any:
    if not isinstance(left, _PLAIN) or not isinstance(right, _PLAIN):
        return _UNKNOWN
    try:
        return _COMPARES[type(op)](left, right)
    except (TypeError, KeyError):
        return _UNKNOWN
