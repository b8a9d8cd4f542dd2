"""The source of a function as a syntax tree, and what the names in it stand for."""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections.abc import Callable
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def plain_function(given: Any) -> FunctionType | None:
    """The function of Python underneath decorators, bindings and partials; None where there is none."""
    while True:
        if isinstance(given, partial):
            given = given.func
        elif isinstance(given, (MethodType, staticmethod, classmethod)):
            given = given.__func__
        elif hasattr(given, "__wrapped__"):
            given = inspect.unwrap(given)
        else:
            return given if isinstance(given, FunctionType) else None


def tree_of(function: Callable[..., Any]) -> FunctionNode | None:
    """The definition; None where no source is to be had (written in C, made by `exec`)."""
    plain = plain_function(function)
    return None if plain is None else _tree(plain.__code__)


@lru_cache(maxsize=4096)
def _tree(code: CodeType) -> FunctionNode | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    return next((node for node in ast.walk(tree) if isinstance(node, FunctionNode)), None)


def parameters_of(node: FunctionNode) -> tuple[list[str], str | None, str | None]:
    """Names of the parameters that take one argument each, in order; of `*args`; of `**kwargs`."""
    given = node.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    rest, others = given.vararg, given.kwarg
    return names, None if rest is None else rest.arg, None if others is None else others.arg


def outer_name(function: FunctionType, name: str) -> Any:
    """What a name that is not local stands for in a function: of its closure, its module, or built in; else None."""
    if name in function.__code__.co_freevars and function.__closure__ is not None:
        cell = function.__closure__[function.__code__.co_freevars.index(name)]
        try:
            return cell.cell_contents
        except ValueError:
            return None
    if name in function.__globals__:
        return function.__globals__[name]
    return getattr(builtins, name, None)


def static_attribute(owner: type, name: str) -> Any:
    """A class's attribute as it is written there (a property, a function), without running anything; else None."""
    try:
        return inspect.getattr_static(owner, name)
    except AttributeError:
        return None
