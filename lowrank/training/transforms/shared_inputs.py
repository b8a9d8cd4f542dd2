"""Projections of one input (q, k and v; gate and up) computed by one function, where a module's source says they are.

Which of a module's linear layers are given the same input its forward's source tells: all that are called with the one
name of a parameter. The first that is called then computes the others' outputs too, which wait until they are asked for
with that very tensor. Whatever does not fit at that moment (other adapters, routing, dropout, no gradients, an input of
its own, autocast) is computed layer by layer, as before.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowrank.adapters.install import AdapterSet, Choice
from lowrank.adapters.methods.layer import LowRankLayer
from lowrank.adapters.methods.lora import Lora
from lowrank.adapters.targeting.code.source import parameters_of, tree_of
from lowrank.ops.lora_linear import wide
from lowrank.ops.lora_linears import Projection, lora_linears
from lowrank.quantisers.registry import quantiser_of


def share_inputs(model: nn.Module) -> int:
    """Puts the function in, where adapters are.

    Returns:
        How many groups of projections there are.
    """
    count = 0
    for owner in list(model.modules()):
        for names in _together(type(owner)):
            members = [getattr(owner, name, None) for name in names]
            if all(isinstance(member, nn.Linear) and _is_plain(member) for member in members):
                _Group(members)
                count += 1
    return count


@dataclass(frozen=True)
class _Waiting:
    """Outputs, by the member's place, and what they are of: the input, its version, and which adapters acted."""

    of: tuple[torch.Tensor, int, Choice]
    outputs: dict[int, torch.Tensor]

    def of_this(self, x: torch.Tensor, choice: Choice) -> bool:
        given, version, acted = self.of
        return given is x and version == x._version and acted is choice


class _Group:
    """Layers that are given one input."""

    def __init__(self, members: list[Any]) -> None:
        self.members = members
        self.waiting: _Waiting | None = None
        for place, member in enumerate(members):
            member.__dict__["forward"] = functools.partial(_forward, self, place, member.__dict__["forward"])

    def output(self, place: int, x: torch.Tensor) -> torch.Tensor | None:
        """A member's; None where it has to be computed by itself."""
        choice = self.members[place].adapters.activity.now
        waiting = self.waiting
        if waiting is not None and (y := waiting.outputs.pop(place, None)) is not None:
            self.waiting = waiting if waiting.outputs else None
            return y if waiting.of_this(x, choice) else None
        if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return None
        projections = [_projection(member, choice, x) for member in self.members]
        fit = [each for each in projections if each is not None]
        if len(fit) < len(projections) or len({each.term.A.dtype for each in fit}) > 1:
            return None
        outputs = dict(enumerate(lora_linears(x, fit)))
        y = outputs.pop(place)
        self.waiting = _Waiting((x, x._version, choice), outputs)
        return y


def _forward(group: _Group, place: int, alone: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    y = group.output(place, args[0]) if len(args) == 1 and not kwargs else None
    return alone(*args, **kwargs) if y is None else y


def _is_plain(member: nn.Linear) -> bool:
    adapted = isinstance(member._modules.get(AdapterSet.CHILD), AdapterSet) and not hasattr(member, "_hf_hook")
    return adapted and quantiser_of(member) is None and type(member).forward is nn.Linear.forward


def _projection(member: Any, choice: Choice, x: torch.Tensor) -> Projection | None:
    """What a member computes now, if that is a frozen product and one low-rank term that trains."""
    adapters = member.adapters
    if adapters.activity.now is not choice or choice.routing is not None:
        return None
    layers = adapters.acting(choice.names)
    if len(layers) != 1 or type(layers[0]) is not LowRankLayer or type(layers[0].method) is not Lora:
        return None  # of another method, what the term is may cost as much as a product
    if layers[0].training and layers[0].dropout:
        return None
    term, bias = layers[0].term(member), layers[0].acting_bias(member)
    trains = term.A.requires_grad and term.B.requires_grad and not wide(term.A, term.B, x.numel() // x.shape[-1])
    frozen = not (member.weight.requires_grad or (bias is not None and bias.requires_grad))
    return Projection(member.weight, bias, term) if trains and frozen else None


@functools.cache
def _together(owner: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Names of modules that a forward calls with one of its parameters, which stays what it was given."""
    tree = tree_of(owner.forward)
    if not isinstance(tree, ast.FunctionDef):
        return ()
    changed = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    called: dict[str, list[str]] = {name: [] for name in parameters_of(tree)[0] if name not in changed}
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="self"), attr=name), args=[ast.Name(id=given)], keywords=[]
            ) if given in called:
                called[given].append(name)
    return tuple(tuple(names) for names in called.values() if len(names) == len(set(names)) > 1)
