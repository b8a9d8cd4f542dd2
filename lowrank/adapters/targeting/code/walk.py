"""What the code of a module does with other modules: which it calls, and whose parameters it reads past their forward.

A small interpreter of syntax trees. It follows no numbers, only modules and parameters: through names, attributes of
the live objects, containers, properties, methods and the functions that they are handed to. A branch is left out where
the model's own settings decide against it (`self.config.pretraining_tp > 1`); of all others both sides count.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lowrank.adapters.targeting.code.branches import decide
from lowrank.adapters.targeting.code.source import FunctionNode, outer_name, plain_function, static_attribute, tree_of
from lowrank.adapters.targeting.code.values import (
    NOTHING,
    Read,
    Super,
    Value,
    as_value,
    bound_arguments,
    children,
    has_tensor,
    inherited,
    union,
)

_DEPTH = 16


@dataclass(frozen=True, eq=False)
class _Inner:
    """A function that is defined within another."""

    node: FunctionNode
    frame: _Frame


_SAYS_NO_VALUE = {
    "dtype", "device", "shape", "size", "ndim", "dim", "numel", "is_cuda", "requires_grad", "is_floating_point",
    "element_size", "layout", "is_meta", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "nelement",
    "stride", "is_contiguous", "get_device", "requires_grad_", "nbytes", "itemsize", "is_complex", "device_mesh",
}  # fmt: skip
_ASKS_ONLY = {isinstance, hasattr, issubclass, callable, type, len, id, print, repr, str, bool}
_PASSES_ON = {
    zip, enumerate, reversed, list, tuple, iter, next, map, filter, sorted, dict, set, partial, min, max,
}  # fmt: skip
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_TENSORS = (nn.ParameterList, nn.ParameterDict)
_OF_CONTAINERS = {"values", "items", "get", "pop", "children", "modules", "named_children", "named_modules"}


class _Frame:
    """One run of a function: what its names stand for, and what it has returned."""

    def __init__(self, function: FunctionType, names: dict[str, Value]) -> None:
        self.function: Any = function
        self.names, self.returned = names, set[Any]()


class CodeWalk:
    """The walk through one module's forward.

    Attributes:
        reads: The parameters of modules whose values the code takes, where it does not call the module for them.
        uses: The modules that it calls, or hands to somebody who may.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.reads: set[Read] = set()
        self.uses: set[nn.Module] = set()
        self._depth = 0
        self._seen: dict[object, Value] = {}

    def run(self, forward: Callable[..., Any]) -> None:
        """Walks through a forward of the module."""
        self._run(forward, [frozenset([self.module])], {})

    def _run(self, function: Callable[..., Any], args: list[Value], keywords: dict[str, Value]) -> Value:
        plain, node = plain_function(function), tree_of(function)
        if plain is None or node is None or self._depth >= _DEPTH:
            return self._hand_over([*args, *keywords.values()])
        key = (plain.__code__, tuple(args), tuple(sorted(keywords.items(), key=lambda item: item[0])))
        if key not in self._seen:
            self._seen[key] = NOTHING  # it may call itself
            frame = _Frame(plain, bound_arguments(node, args, keywords))
            self._depth += 1
            self._function(node, frame)
            self._depth -= 1
            self._seen[key] = frozenset(frame.returned)
        return self._seen[key]

    def _function(self, node: FunctionNode, frame: _Frame) -> None:
        if isinstance(node, ast.Lambda):
            frame.returned |= self._value(node.body, frame)
        else:
            self._body(node.body, frame)

    # Statements

    def _body(self, statements: Iterable[ast.stmt], frame: _Frame) -> None:
        for statement in statements:
            self._statement(statement, frame)

    def _statement(self, node: ast.stmt, frame: _Frame) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                found = self._value(value, frame)
                for target in targets:
                    self._bind(target, found, frame)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._bind(target, self._value(value, frame), frame)
            case ast.For(target=target, iter=iterated) | ast.AsyncFor(target=target, iter=iterated):
                self._bind(target, self._elements(self._value(iterated, frame)), frame)
                self._body([*node.body, *node.orelse], frame)
            case ast.With(items=items) | ast.AsyncWith(items=items):
                for item in items:
                    entered = self._value(item.context_expr, frame)
                    if item.optional_vars is not None:
                        self._bind(item.optional_vars, entered, frame)
                self._body(node.body, frame)
            case ast.If(test=test, body=body, orelse=orelse):
                decided = decide(test, frame.names)
                if decided is None:
                    self._take(self._value(test, frame))
                self._body([*(body if decided is not False else ()), *(orelse if decided is not True else ())], frame)
            case ast.Return(value=ast.expr() as value):
                frame.returned |= self._value(value, frame)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                frame.names[node.name] = frozenset([_Inner(node, frame)])
            case ast.ClassDef() | ast.Import() | ast.ImportFrom():
                pass
            case ast.Expr(value=value):
                self._value(value, frame)
            case _:
                self._parts(node, frame)

    def _parts(self, node: ast.AST, frame: _Frame) -> None:
        """Any other node: what it holds, its expressions' values taken."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                self._statement(child, frame)
            elif isinstance(child, ast.expr):
                self._take(self._value(child, frame))
            else:
                self._parts(child, frame)

    def _bind(self, target: ast.expr, value: Value, frame: _Frame) -> None:
        match target:
            case ast.Name(id=name):
                frame.names[name] = frame.names.get(name, NOTHING) | value
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part in parts:
                    self._bind(part, value, frame)
            case ast.Starred(value=inner):
                self._bind(inner, value, frame)
            case ast.Subscript(value=ast.Name(id=name)):  # a list or dict that collects
                frame.names[name] = frame.names.get(name, NOTHING) | value
            case _:
                self._hand_over([value])

    # Expressions

    def _value(self, node: ast.expr, frame: _Frame) -> Value:
        match node:
            case ast.Name(id=name):
                return frame.names[name] if name in frame.names else as_value(outer_name(frame.function, name))
            case ast.Attribute(value=owner, attr=name):
                return self._attribute(self._value(owner, frame), name)
            case ast.Subscript(value=owner, slice=index):
                self._value(index, frame)
                held = self._value(owner, frame)
                return held if isinstance(index, ast.Slice) and not has_tensor(held) else self._elements(held)
            case ast.Call():
                return self._call(node, frame)
            case ast.Lambda():
                return frozenset([_Inner(node, frame)])
            case ast.Compare(left=left, ops=ops, comparators=others):
                values = [self._value(each, frame) for each in (left, *others)]
                if not all(isinstance(op, (ast.Is, ast.IsNot, ast.In, ast.NotIn)) for op in ops):
                    self._take(*values)
                return NOTHING
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                return self._comprehension(node, frame)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                self._value(test, frame)
                decided = decide(test, frame.names)
                sides = [body] if decided is True else [orelse] if decided is False else [body, orelse]
                return union(self._value(side, frame) for side in sides)
            case ast.NamedExpr(target=target, value=value):
                found = self._value(value, frame)
                self._bind(target, found, frame)
                return found
            case ast.Tuple() | ast.List() | ast.Set() | ast.Dict() | ast.BoolOp() | ast.Starred() | ast.Await():
                inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
                return union(self._value(child, frame) for child in inner)
            case ast.Yield(value=ast.expr() as value) | ast.YieldFrom(value=ast.expr() as value):
                frame.returned |= self._value(value, frame)
                return NOTHING
            case _:
                self._parts(node, frame)
                return NOTHING

    def _comprehension(
        self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp, frame: _Frame
    ) -> Value:
        for generator in node.generators:
            self._bind(generator.target, self._elements(self._value(generator.iter, frame)), frame)
            for condition in generator.ifs:
                self._value(condition, frame)
        results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        return union(self._value(result, frame) for result in results)

    def _elements(self, value: Value) -> Value:
        """What iterating, or one index, gives."""
        found: set[Any] = set()
        for item in value:
            if isinstance(item, Read):
                self.reads.add(item)
            elif isinstance(item, _TENSORS):
                found |= {Read(item, name) for name in item._parameters}
            elif isinstance(item, _CONTAINERS):
                found |= set(children(item).values())
            else:
                found.add(item)
        return frozenset(found)

    def _attribute(self, owners: Value, name: str) -> Value:
        return union(self._attribute_of(owner, name) for owner in owners)

    def _attribute_of(self, owner: Any, name: str) -> Value:
        if isinstance(owner, Read):
            if name not in _SAYS_NO_VALUE:
                self.reads.add(owner)
            return NOTHING
        if isinstance(owner, nn.Module):
            return self._attribute_of_module(owner, name)
        if isinstance(owner, Super):
            return inherited(owner, name)
        if isinstance(owner, (ModuleType, type)):
            return as_value(getattr(owner, name, None))
        return NOTHING

    def _attribute_of_module(self, module: nn.Module, name: str) -> Value:
        if name in ("forward", "__call__"):
            return frozenset([module])
        if name == "_modules" or (isinstance(module, _CONTAINERS) and name in _OF_CONTAINERS):
            return frozenset(children(module).values())
        if module._parameters.get(name) is not None or parametrize.is_parametrized(module, name):
            return frozenset([Read(module, name)])
        if name in module._modules:
            return as_value(children(module).get(name))
        if name in module.__dict__:
            return as_value(module.__dict__[name])
        found = static_attribute(type(module), name)
        if isinstance(found, property) and found.fget is not None:
            return self._run(found.fget, [frozenset([module])], {})
        if isinstance(found, cached_property):
            return self._run(found.func, [frozenset([module])], {})
        if isinstance(found, FunctionType) and getattr(nn.Module, name, None) is not found:
            return frozenset([MethodType(found, module)])
        return as_value(plain_function(found)) if isinstance(found, staticmethod) else NOTHING

    # Calls

    def _call(self, node: ast.Call, frame: _Frame) -> Value:
        args = [self._value(each, frame) for each in node.args]
        keywords = {each.arg or "": self._value(each.value, frame) for each in node.keywords}
        if isinstance(node.func, ast.Name) and node.func.id in ("super", "getattr"):
            return _super(frame) if node.func.id == "super" else self._getattr(node, args)
        called = self._value(node.func, frame)
        if isinstance(node.func, ast.Attribute) and not called:
            holder = self._value(node.func.value, frame)
            if node.func.attr in ("append", "extend", "add", "update", "insert"):
                self._bind(node.func.value, union([*args, *keywords.values()]), frame)
                return NOTHING
            if node.func.attr in ("values", "items", "get", "pop"):  # of a dict that holds some
                return holder
        if not called:
            return self._hand_over([*args, *keywords.values()])
        return union(self._call_one(each, args, keywords) for each in called)

    def _call_one(self, called: Any, args: list[Value], keywords: dict[str, Value]) -> Value:
        given = [*args, *keywords.values()]
        if isinstance(called, nn.Module):
            self.uses.add(called)
            if any(isinstance(item, nn.Module) for value in given for item in value) and called is not self.module:
                self._run(type(called).forward, [NOTHING, *args], keywords)
            return self._hand_over(given)
        if isinstance(called, _Inner):
            return self._run_inner(called, args, keywords)
        if called in _ASKS_ONLY or getattr(called, "__name__", "").endswith("_like"):
            return NOTHING
        if called in _PASSES_ON:
            return self._elements(union(given)) if called in (zip, enumerate, iter, reversed) else union(given)
        if isinstance(called, MethodType):
            return self._run(called.__func__, [frozenset([called.__self__]), *args], keywords)
        if isinstance(called, FunctionType) and any(given) and not called.__module__.startswith("torch."):
            if hasattr(called, "__wrapped__"):  # a kernel may stand in its place, which takes all that it is given
                self._take(*given)
            return self._run(called, args, keywords)
        return self._hand_over(given)

    def _run_inner(self, called: _Inner, args: list[Value], keywords: dict[str, Value]) -> Value:
        key = (called, tuple(args), tuple(sorted(keywords.items(), key=lambda item: item[0])))
        if key not in self._seen and self._depth < _DEPTH:
            self._seen[key] = NOTHING
            frame = _Frame(called.frame.function, called.frame.names | bound_arguments(called.node, args, keywords))
            self._depth += 1
            self._function(called.node, frame)
            self._depth -= 1
            self._seen[key] = frozenset(frame.returned)
        return self._seen.get(key, NOTHING)

    def _getattr(self, node: ast.Call, args: list[Value]) -> Value:
        fallback = union(args[2:])
        if isinstance(node.args[1], ast.Constant):
            return self._attribute(args[0], str(node.args[1].value)) | fallback
        modules = [item for item in args[0] if isinstance(item, nn.Module)]
        held = [frozenset(children(module).values()) for module in modules]
        return union([*held, *(frozenset(Read(m, name) for name in m._parameters) for m in modules), fallback])

    def _hand_over(self, values: Iterable[Value]) -> Value:
        """Given to code that is not followed: it may take a parameter's value, call a module, run a function."""
        for item in union(values):
            if isinstance(item, Read):
                self.reads.add(item)
            elif isinstance(item, nn.Module):
                self.uses.add(item)
            elif isinstance(item, (_Inner, MethodType)):
                self._call_one(item, [], {})
        return NOTHING

    def _take(self, *values: Value) -> None:
        self.reads |= {item for value in values for item in value if isinstance(item, Read)}


def _super(frame: _Frame) -> Value:
    defined_in = outer_name(frame.function, "__class__")
    first = next(iter(frame.names.values()), NOTHING)
    modules = [item for item in first if isinstance(item, nn.Module)]
    return frozenset(Super(defined_in, module) for module in modules if isinstance(defined_in, type))
