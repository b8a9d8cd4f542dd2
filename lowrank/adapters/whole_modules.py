"""What adapters train besides factors: whole modules (`modules_to_save`) and biases (`bias: all`)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lowrank.adapters.install import hosts, remove
from lowrank.adapters.kinds.kind import HostModule, Kind
from lowrank.ops.precision import precise


class WholeCopy(nn.Module):
    """A trained copy of a module that stands in its place (`modules_to_save`)."""

    replaces = True

    def __init__(self, module: HostModule) -> None:
        super().__init__()
        self.module = copy.deepcopy(module)
        for _, inner, _ in list(hosts(self.module)):
            remove(inner)
        for parameter in self.module.parameters():
            parameter.data = parameter.data.clone()  # a tied weight is untied here
            parameter.requires_grad_(parameter.is_floating_point())

    def output(self, module: HostModule, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The copy's output."""
        return self.module(*args, **kwargs)

    def delta(self, module: HostModule, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What it is beside the module's own output y."""
        return self.module(x) - y

    def in_file(self, module: HostModule) -> dict[str, torch.Tensor]:
        """The module's own names."""
        return self.module.state_dict(keep_vars=True)

    @torch.no_grad()
    def merge_into(self, module: HostModule) -> None:
        """New parameters and buffers: what was tied to the old ones keeps those, and what is tied inside stays so."""
        made: dict[int, nn.Parameter] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            path, _, last = name.rpartition(".")
            old = module.get_parameter(name)
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(parameter.to(old.dtype), requires_grad=old.requires_grad)
            setattr(module.get_submodule(path), last, made[id(parameter)])
        for name, buffer in self.module.named_buffers():
            path, _, last = name.rpartition(".")
            setattr(module.get_submodule(path), last, buffer.to(module.get_buffer(name).dtype))


class BiasCopy(nn.Module):
    """A trained bias in the place of a module's own, where the module is not adapted otherwise (`bias: all`)."""

    replaces = False

    def __init__(self, module: HostModule, kind: Kind | None) -> None:
        super().__init__()
        self.kind = kind
        self.bias = nn.Parameter(module.bias.detach().clone().to(precise(module.bias.dtype)))

    def output(self, module: HostModule, x: torch.Tensor) -> torch.Tensor:
        """The module's output with this bias in the place of its own."""
        y = type(module).forward(module, x)
        return y + self.delta(module, x, y)

    def delta(self, module: HostModule, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The difference of the two biases, in a shape that adds to y."""
        difference = (self.bias - module.bias).to(y.dtype)
        return difference if self.kind is None else self.kind.spread(module, difference)

    def in_file(self, module: HostModule) -> dict[str, torch.Tensor]:
        """`bias`."""
        return {"bias": self.bias}

    @torch.no_grad()
    def merge_into(self, module: HostModule) -> None:
        """Into a new parameter of the module."""
        module.bias = nn.Parameter(self.bias.to(module.bias.dtype), requires_grad=module.bias.requires_grad)
