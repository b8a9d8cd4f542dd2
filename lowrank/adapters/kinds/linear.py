"""Linear layers: torch's, bitsandbytes' 4-bit and 8-bit ones, and transformers' Conv1D (GPT-2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.kinds.forwards import acts_as, features_in
from lowrank.adapters.kinds.kind import HostModule, holds_weight, in_place_of_own
from lowrank.ops.dense import dense
from lowrank.ops.lora_linear import lora_linear
from lowrank.ops.low_rank import LowRank


def low_rank_output(x: torch.Tensor, term: LowRank) -> torch.Tensor:
    """s · drop(x)·Aᵀ·Bᵀ, (..., in) -> (..., out), in x's dtype."""
    dropped = F.dropout(x, term.dropout) if term.dropout else x
    return F.linear(F.linear(dropped, term.A.to(x.dtype)), term.B.to(x.dtype)) * term.scale


def stored_weight(module: HostModule) -> torch.Tensor:
    """The module's weight. One that was gathered from its shards has lost its 4-bit state: its module kept it."""
    weight = module.weight
    state = getattr(module, "quant_state", None)
    if state is not None and getattr(weight, "quant_state", None) is None:
        weight.quant_state = state
    return weight


def dense_int8(module: HostModule) -> torch.Tensor:
    """The matrix that bitsandbytes' 8-bit layer stands for; its first call moves the weight into `state`."""
    stored = module.weight if module.state.CB is None else module.state.CB
    scale = module.weight.SCB if module.state.SCB is None else module.state.SCB
    return stored.data.float() * (scale.float() / 127.0)[:, None]


def combine(y: torch.Tensor, added: torch.Tensor, gain: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """gain · (base + added) - base for a base output y = base + bias (last dimension out)."""
    added = added.to(y.dtype)
    if gain is None:
        return added
    base = y if bias is None else y - bias
    return (gain.to(y.dtype) - 1) * base + gain.to(y.dtype) * added


class LinearKind:
    """`torch.nn.Linear` and its subclasses, bitsandbytes' among them. W is `weight`."""

    linear = True
    looked_up = False

    def fits(self, module: HostModule) -> bool:
        """A linear layer by what its forward computes."""
        if not isinstance(module, nn.Linear) or not holds_weight(module):
            return False
        quantised = type(module).__name__ in ("Linear4bit", "Linear8bitLt")
        return quantised or acts_as(module, nn.Linear.forward, features_in, _product)

    def shape(self, module: HostModule) -> tuple[int, int]:
        """(out_features, in_features): a quantised weight's own shape says nothing."""
        return module.out_features, module.in_features

    def weight(self, module: HostModule) -> torch.Tensor:
        """W, dequantised where it is quantised."""
        if type(module).__name__ == "Linear8bitLt":
            return dense_int8(module)
        return dense(stored_weight(module))

    def write(self, module: HostModule, weight: torch.Tensor) -> None:
        """A dense weight replaces the old one. Quantised modules are made dense first (see `merging`)."""
        module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=module.weight.requires_grad)

    def fused(self, module: HostModule, x: torch.Tensor, term: LowRank, bias: torch.Tensor | None) -> torch.Tensor:
        """One autograd function, where the module's forward is the plain product."""
        if type(module).forward is nn.Linear.forward or type(module).__name__ == "Linear4bit":
            return lora_linear(x, stored_weight(module), bias, term)
        y = type(module).forward(module, x)
        if bias is not None and bias is not module.bias:
            y = y + in_place_of_own(module, bias).to(y.dtype)
        return y + self._delta(x, y, term, bias)

    def delta(self, module: HostModule, x: torch.Tensor, y: torch.Tensor, term: LowRank) -> torch.Tensor:
        """See `Kind.delta`."""
        return self._delta(x, y, term, module.bias)

    def _delta(self, x: torch.Tensor, y: torch.Tensor, term: LowRank, bias: torch.Tensor | None) -> torch.Tensor:
        return combine(y, low_rank_output(x, term), term.gain, bias)

    def spread(self, module: HostModule, values: torch.Tensor) -> torch.Tensor:
        """As they are: features come last."""
        return values

    def in_file(self, module: HostModule, name: str, factor: torch.Tensor) -> tuple[str, torch.Tensor]:
        """A (r, in) and B (out, r) under `.weight`, everything else under its bare name."""
        return _in_file(name), factor


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

    def fused(self, module: HostModule, x: torch.Tensor, term: LowRank, bias: torch.Tensor | None) -> torch.Tensor:
        """One autograd function over the transposed view."""
        return lora_linear(x, module.weight.t(), bias, term)

    def delta(self, module: HostModule, x: torch.Tensor, y: torch.Tensor, term: LowRank) -> torch.Tensor:
        """See `Kind.delta`."""
        return combine(y, low_rank_output(x, term), term.gain, module.bias)

    def spread(self, module: HostModule, values: torch.Tensor) -> torch.Tensor:
        """As they are: features come last."""
        return values

    def in_file(self, module: HostModule, name: str, factor: torch.Tensor) -> tuple[str, torch.Tensor]:
        """As for a linear layer: A (r, in), B (out, r)."""
        return _in_file(name), factor


def _product(module: HostModule, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module.weight, module.bias)


def _in_file(name: str) -> str:
    return name if name == "lora_magnitude_vector" else f"{name}.weight"
