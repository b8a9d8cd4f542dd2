"""Linear layers: torch's, those that a quantiser holds, and transformers' Conv1D (GPT-2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.kinds.factor import Factor
from lowrank.adapters.kinds.forwards import acts_as, features_in
from lowrank.adapters.kinds.kind import HostModule, Product, holds_weight, in_place_of_own
from lowrank.ops.lora_linear import lora_linear
from lowrank.ops.low_rank import LowRank
from lowrank.quantisers.registry import quantiser_of


def _low_rank_output(x: torch.Tensor, term: LowRank) -> torch.Tensor:
    """s · drop(x)·Aᵀ·Bᵀ, (..., in) -> (..., out), in x's dtype."""
    dropped = F.dropout(x, term.dropout) if term.dropout else x
    return F.linear(F.linear(dropped, term.A.to(x.dtype)), term.B.to(x.dtype)) * term.scale


def _combine(
    y: torch.Tensor, added: torch.Tensor, gain: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """gain · (base + added) - base for a base output y = base + bias (last dimension out)."""
    added = added.to(y.dtype)
    if gain is None:
        return added
    base = y if bias is None else y - bias
    return (gain.to(y.dtype) - 1) * base + gain.to(y.dtype) * added


class LinearKind:
    """`torch.nn.Linear` and its subclasses, those that a quantiser holds among them. W is `weight`."""

    linear = True
    looked_up = False

    def fits(self, module: HostModule) -> bool:
        """A linear layer by what its forward computes."""
        if not isinstance(module, nn.Linear) or not holds_weight(module):
            return False
        return quantiser_of(module) is not None or acts_as(module, nn.Linear.forward, features_in, _product)

    def shape(self, module: HostModule) -> tuple[int, int]:
        """(out_features, in_features): a quantised weight's own shape says nothing."""
        return module.out_features, module.in_features

    def weight(self, module: HostModule) -> torch.Tensor:
        """W, dequantised where it is quantised."""
        quantiser = quantiser_of(module)
        return module.weight if quantiser is None else quantiser.weight(module)

    def write(self, module: HostModule, weight: torch.Tensor) -> None:
        """A dense weight replaces the old one. Quantised modules are made dense first (`dense_base`)."""
        module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=module.weight.requires_grad)

    def product(self, module: HostModule) -> Product | None:
        """The stored weight, where the module's forward is the plain product with it."""
        quantiser = quantiser_of(module)
        if quantiser is not None:
            return quantiser.product(module)
        return (module.weight, torch.Tensor.to) if type(module).forward is nn.Linear.forward else None

    def fused(self, module: HostModule, x: torch.Tensor, term: LowRank, bias: torch.Tensor | None) -> torch.Tensor:
        """One autograd function, where the module's forward is the plain product."""
        if (found := self.product(module)) is not None:
            return lora_linear(x, found[0], bias, term, found[1])
        y = type(module).forward(module, x)
        if bias is not None and bias is not module.bias:
            y = y + in_place_of_own(module, bias).to(y.dtype)
        return y + self._delta(x, y, term, bias)

    def delta(self, module: HostModule, x: torch.Tensor, y: torch.Tensor, term: LowRank) -> torch.Tensor:
        """What the term adds to the module's own output y."""
        return self._delta(x, y, term, module.bias)

    def _delta(self, x: torch.Tensor, y: torch.Tensor, term: LowRank, bias: torch.Tensor | None) -> torch.Tensor:
        return _combine(y, _low_rank_output(x, term), term.gain, bias)

    def spread(self, module: HostModule, values: torch.Tensor) -> torch.Tensor:
        """As they are: features come last."""
        return values

    def in_file(self, module: HostModule, factor: Factor, values: torch.Tensor) -> tuple[str, torch.Tensor]:
        """As it is: A (r, in), B (out, r)."""
        return factor.in_file, values


class Conv1DKind:
    """transformers' Conv1D (GPT-2), a linear layer whose weight is stored (in, out)."""

    linear = True
    looked_up = False

    def fits(self, module: HostModule) -> bool:
        """Whether it is a Conv1D."""
        return isinstance(module, Conv1D) and acts_as(module, Conv1D.forward, features_in, Conv1D.forward)

    def shape(self, module: HostModule) -> tuple[int, int]:
        """(out, in)."""
        return module.weight.shape[1], module.weight.shape[0]

    def weight(self, module: HostModule) -> torch.Tensor:
        """W, the parameter transposed."""
        return module.weight.t()

    def write(self, module: HostModule, weight: torch.Tensor) -> None:
        """Stored transposed again."""
        merged = weight.t().to(module.weight.dtype).contiguous()
        module.weight = nn.Parameter(merged, requires_grad=module.weight.requires_grad)

    def product(self, module: HostModule) -> Product | None:
        """The transposed view."""
        return module.weight.t(), torch.Tensor.to

    def fused(self, module: HostModule, x: torch.Tensor, term: LowRank, bias: torch.Tensor | None) -> torch.Tensor:
        """One autograd function over the transposed view."""
        return lora_linear(x, module.weight.t(), bias, term)

    def delta(self, module: HostModule, x: torch.Tensor, y: torch.Tensor, term: LowRank) -> torch.Tensor:
        """What the term adds to the module's own output y."""
        return _combine(y, _low_rank_output(x, term), term.gain, module.bias)

    def spread(self, module: HostModule, values: torch.Tensor) -> torch.Tensor:
        """As they are: features come last."""
        return values

    def in_file(self, module: HostModule, factor: Factor, values: torch.Tensor) -> tuple[str, torch.Tensor]:
        """As for a linear layer: A (r, in), B (out, r)."""
        return factor.in_file, values


def _product(module: HostModule, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module.weight, module.bias)
