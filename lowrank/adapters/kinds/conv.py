"""Convolutions: A is a convolution with r channels out, B a 1 x 1 one; W is the kernel flattened (out, in · k ...).

Where a convolution has groups, A sees all channels and only B is grouped (peft's shapes): B is (out, r / groups), and
the term adds a kernel that mixes the groups. It has no place in the module's own kernel, so it cannot be merged.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from lowrank.adapters.kinds.factor import Factor
from lowrank.adapters.kinds.forwards import acts_as, channels_in
from lowrank.adapters.kinds.kind import HostModule, Product, groups_of, holds_weight, in_place_of_own
from lowrank.ops.low_rank import LowRank

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvKind:
    """`torch.nn.Conv1d`, `Conv2d` and `Conv3d`, whatever their stride, padding, dilation and groups."""

    linear = False
    looked_up = False

    def fits(self, module: HostModule) -> bool:
        """Whether it is one of the three, by what its forward computes (a causal one that cuts its output is none)."""
        plain = next((cls for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, cls)), None)
        return plain is not None and holds_weight(module) and acts_as(module, plain.forward, channels_in, plain.forward)

    def shape(self, module: HostModule) -> tuple[int, int]:
        """(out_channels, in_channels · kernel size)."""
        return module.out_channels, module.in_channels * math.prod(module.kernel_size)

    def weight(self, module: HostModule) -> torch.Tensor:
        """The kernel, flattened per output channel; with groups (out, in · k ... / groups)."""
        return module.weight.flatten(1)

    def write(self, module: HostModule, weight: torch.Tensor) -> None:
        """Back in the kernel's shape."""
        merged = weight.view(module.weight.shape).to(module.weight.dtype)
        module.weight = nn.Parameter(merged, requires_grad=module.weight.requires_grad)

    def product(self, module: HostModule) -> Product | None:
        """None."""
        return None

    def fused(self, module: HostModule, x: torch.Tensor, term: LowRank, bias: torch.Tensor | None) -> torch.Tensor:
        """Three convolutions."""
        y = type(module).forward(module, x)
        if bias is not None and bias is not module.bias:
            y = y + self.spread(module, in_place_of_own(module, bias)).to(y.dtype)
        return y + self._delta(module, x, y, term, bias)

    def delta(self, module: HostModule, x: torch.Tensor, y: torch.Tensor, term: LowRank) -> torch.Tensor:
        """What the term adds to the module's own output y."""
        return self._delta(module, x, y, term, module.bias)

    def _delta(
        self, module: HostModule, x: torch.Tensor, y: torch.Tensor, term: LowRank, bias: torch.Tensor | None
    ) -> torch.Tensor:
        convolve = _CONVOLVE[len(module.kernel_size)]
        kernel = term.A.to(x.dtype).view(-1, module.in_channels, *module.kernel_size)
        dropped, padding = F.dropout(x, term.dropout) if term.dropout else x, module.padding
        if module.padding_mode != "zeros":
            dropped = F.pad(dropped, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        low = convolve(dropped, kernel, None, module.stride, padding, module.dilation)
        pointwise = term.B.to(x.dtype).view(*term.B.shape, *[1] * len(module.kernel_size))
        added = convolve(low, pointwise, groups=groups_of(module)) * term.scale
        if term.gain is None:
            return added
        base = y if bias is None else y - self.spread(module, bias)
        gain = self.spread(module, term.gain.to(y.dtype))
        return (gain - 1) * base + gain * added

    def spread(self, module: HostModule, values: torch.Tensor) -> torch.Tensor:
        """(out, 1 ...), over the positions."""
        return values.view(-1, *[1] * len(module.kernel_size))

    def in_file(self, module: HostModule, factor: Factor, values: torch.Tensor) -> tuple[str, torch.Tensor]:
        """On the inputs (r, in, k ...), on the outputs (out, r / groups, 1 ...), on the rows (1, out, 1 ...)."""
        ones = [1] * len(module.kernel_size)
        match factor.side:
            case "in":
                values = values.view(-1, module.in_channels, *module.kernel_size)
            case "out":
                values = values.view(*values.shape, *ones)
            case "row":
                values = values.view(1, -1, *ones)
        return factor.in_file, values
