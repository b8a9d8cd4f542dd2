"""Gated MLPs, known by what their forward says: down(f(gate(x)) · up(x)), of two projections or one's halves."""

from __future__ import annotations

import ast
import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowrank.adapters.targeting.code.source import parameters_of, tree_of
from lowrank.ops.gated import gated
from lowrank.ops.kernels.on_card import kernels_on
from lowrank.training.transforms.activations import function_of, is_activation, kernel_of
from lowrank.training.transforms.own_forward import has_own_forward


@dataclass(frozen=True)
class Gate:
    """The names of a gated MLP's parts: `gate` and `up`, or `both`, whose first half is the gate."""

    down: str
    f: str
    gate: str | None = None
    up: str | None = None
    both: str | None = None

    def forward(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """What the module computes, which keeps gate and up alone."""
        if self.both is not None:
            gate, up = getattr(module, self.both)(x).chunk(2, dim=-1)
        else:
            gate, up = getattr(module, str(self.gate))(x), getattr(module, str(self.up))(x)
        f = getattr(module, self.f)
        return getattr(module, self.down)(gated(gate, up, function_of(f), kernel_of(f)))


def fused_gates(model: nn.Module, device: torch.device) -> int:
    """Puts the kernel into gated MLPs, on a card where it runs, of a model whose layers keep what they do.

    Args:
        model: Any.
        device: Where it will run.

    Returns:
        How many compute with it now. Left as they were are those whose forward has been replaced already, and those
        of other activations.
    """
    found = {module: gate_of(module) for module in model.modules() if has_own_forward(module)}
    fit = {module: gate for module, gate in found.items() if gate and kernel_of(getattr(module, gate.f))}
    if not fit or not kernels_on(device).used:
        return 0
    for module, gate in fit.items():
        module.__dict__["forward"] = functools.partial(gate.forward, module)
    return len(fit)


def gate_of(module: nn.Module) -> Gate | None:
    """The parts of a gated MLP; None for every other module."""
    found = _read(type(module))
    fits = found is not None and is_activation(getattr(module, found.f, None))
    return found if fits else None


@functools.cache
def _read(owner: type[nn.Module]) -> Gate | None:
    match _said(owner):
        case ast.Call(func=down, args=[ast.BinOp(op=ast.Mult(), left=left, right=right)], keywords=[]):
            pairs = (left, right), (right, left)
            found = (_gate(_own(down), activated, up) for activated, up in pairs)
            return next((gate for gate in found if gate is not None), None)
    return None


def _gate(down: str | None, activated: ast.expr, up: ast.expr) -> Gate | None:
    match activated:
        case ast.Call(func=called, args=[gate], keywords=[]):
            f = _own(called)
        case _:
            return None
    if down is None or f is None:
        return None
    match gate, up:
        case ast.Call(func=one), ast.Call(func=other) if _of_x(gate) and _of_x(up):
            return Gate(down, f, gate=_own(one), up=_own(other))
        case ast.Subscript(value=ast.Call(func=ast.Attribute(value=ast.Call(func=both) as whole))), _ if _of_x(whole):
            halves = [f"{ast.unparse(whole)}.chunk(2, dim=-1)[{half}]" for half in (0, 1)]
            return Gate(down, f, both=_own(both)) if [ast.unparse(gate), ast.unparse(up)] == halves else None
    return None


def _own(node: ast.expr) -> str | None:
    """The name of a module's own attribute."""
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return name
    return None


def _of_x(node: ast.expr) -> bool:
    """Whether it is `self.name(x)`."""
    match node:
        case ast.Call(func=called, args=[ast.Name(id="x")], keywords=[]):
            return _own(called) is not None
    return False


def _said(owner: type[nn.Module]) -> ast.expr | None:
    """What a forward of one argument gives back, as one expression of x; None where it does more than compute that."""
    tree = tree_of(owner.forward)
    if not isinstance(tree, ast.FunctionDef) or len(parameters := parameters_of(tree)[0]) != 2:
        return None
    known: dict[str, ast.expr] = {parameters[1]: ast.Name("x")}
    for statement in tree.body:
        match statement:
            case ast.Expr(value=ast.Constant()):
                pass
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                known[name] = _inlined(value, known)
            case ast.Assign(targets=[ast.Tuple(elts=[ast.Name(id=one), ast.Name(id=other)])], value=value):
                whole = _inlined(value, known)
                known |= {name: ast.Subscript(whole, ast.Constant(half)) for half, name in enumerate((one, other))}
            case ast.Return(value=ast.expr() as value):
                return _inlined(value, known)
            case _:
                return None
    return None


def _inlined(value: ast.expr, known: dict[str, ast.expr]) -> ast.expr:
    """A copy: trees are read once and stay as they are."""
    return _Inlined(known).visit(copy.deepcopy(value))


class _Inlined(ast.NodeTransformer):
    """Local names replaced by what they stand for."""

    def __init__(self, known: dict[str, ast.expr]) -> None:
        self.known = known

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.known.get(node.id, node)
