"""The kinds of module that an adapter fits, and what a method needs to know of each.

A method (LoRA, DoRA ...) thinks of one matrix W (out, in) and gives a `LowRank` term; a kind knows how its module
stores W, how it applies a term to its input, and how peft's files shape the factors. So each is written once.
A new kind is one class and one entry in `known.KINDS`.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from lowrank.adapters.kinds.factor import Factor
from lowrank.ops.lora_linear import Unpack
from lowrank.ops.low_rank import LowRank

HostModule: TypeAlias = Any
"""An `nn.Module` that carries an adapter. `nn.Module` types its attributes (`weight`, `bias`) as anything at all."""


Product: TypeAlias = tuple[torch.Tensor, Unpack]
"""A weight as it is stored, and what makes W (out, in) of it: a module that gives x·Wᵀ + b and does no more."""


class Kind(Protocol):
    """What adapters know of one kind of module; stateless."""

    linear: bool
    """Whether "all-linear" means it."""

    looked_up: bool
    """Whether the input picks columns of W (an embedding) instead of being multiplied with it."""

    def fits(self, module: HostModule) -> bool:
        """Whether `module` is of this kind."""
        ...

    def shape(self, module: HostModule) -> tuple[int, int]:
        """(out, in) of the matrix W that ΔW = s·B·A is added to."""
        ...

    def weight(self, module: HostModule) -> torch.Tensor:
        """W (out, in), dense; a view of the parameter where that is possible."""
        ...

    def write(self, module: HostModule, weight: torch.Tensor) -> None:
        """Gives the module the merged W (out, in), rounded to the parameter's dtype, as a new parameter."""
        ...

    def product(self, module: HostModule) -> Product | None:
        """What its forward multiplies with; None where that does anything else."""
        ...

    def fused(self, module: HostModule, x: torch.Tensor, term: LowRank, bias: torch.Tensor | None) -> torch.Tensor:
        """The module's output with one term, `bias` in its bias's place: the fast path."""
        ...

    def delta(self, module: HostModule, x: torch.Tensor, y: torch.Tensor, term: LowRank) -> torch.Tensor:
        """What a term adds to the module's own output y."""
        ...

    def spread(self, module: HostModule, values: torch.Tensor) -> torch.Tensor:
        """One value for each output feature (out,), in a shape that adds to the module's output."""
        ...

    def in_file(self, module: HostModule, factor: Factor, values: torch.Tensor) -> tuple[str, torch.Tensor]:
        """A factor's name and view (same storage) in peft's file."""
        ...


def is_multihead(module: HostModule) -> bool:
    """Whether it is torch's `nn.MultiheadAttention`, run by its own forward: it has a layer of its own."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def holds_weight(module: HostModule) -> bool:
    """Whether its weight is a parameter, and not what a hook computes from others before every call (pruning,
    `torch.nn.utils.weight_norm`): an adapter could not be merged there."""
    return "weight" in module._parameters or parametrize.is_parametrized(module, "weight")


def why_unfit(module: HostModule) -> str:
    """What keeps an adapter from a module that looks like one of a known kind; "" where it looks like none."""
    if not isinstance(module, nn.Linear | nn.Embedding | _ConvNd):
        return ""
    if not holds_weight(module):
        return (
            "a hook computes its weight before every call (torch.nn.utils.weight_norm, pruning); one by "
            "torch.nn.utils.parametrizations is taken"
        )
    return f"its forward is not that of a {type(module).__mro__[1].__name__}"


def groups_of(module: HostModule) -> int:
    """Into how many groups a convolution cuts its channels; 1 for every other module.

    B has r / groups columns: the outputs of a group see the ranks of that group.
    """
    return module.groups if isinstance(module, _ConvNd) else 1


def in_place_of_own(module: HostModule, bias: torch.Tensor) -> torch.Tensor:
    """What to add to the module's own output, so that `bias` stands in the place of its bias."""
    return bias if module.bias is None else bias - module.bias
