"""f(x) and f(gate) · up, of an activation f, whose backward passes need their inputs alone.

In plain operations f(gate) and often what f computes on its way are kept as well (six tensors for GPT-2's GELU).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from lowrank.ops.kernels.on_card import kernels_take
from lowrank.ops.made_again import can_be_made

Activation: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Takes each number by itself, without parameters and without chance."""


def activated(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """f(x), which can be made again of x."""
    y = _Activated.apply(x, activation)
    assert isinstance(y, torch.Tensor)
    return can_be_made(y, activation, x)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation, kernel: str | None = None) -> torch.Tensor:
    """f(gate) · up, which can be made again of both.

    Args:
        gate: Of any shape.
        up: Of the same.
        activation: f.
        kernel: What the kernels for cards call f; None where they do not have it.
    """
    if kernel is not None and gate.dtype == up.dtype and gate.shape == up.shape and kernels_take(gate, up):
        from lowrank.ops.kernels.gate_rows import gate_rows

        return gate_rows(gate, up, kernel)
    again = _Again(activation)
    y = _Gated.apply(gate, up, again)
    assert isinstance(y, torch.Tensor)
    return can_be_made(y, again.product, gate, up)


class _Again:
    """f(gate) · up made again: f(gate) is left for the gate's own backward pass, which comes next."""

    def __init__(self, activation: Activation) -> None:
        self.activation = activation
        self.left: _Recorded | None = None

    def product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        self.left = _Recorded(self.activation, gate)
        return self.left.y.detach() * up

    def taken(self, gate: torch.Tensor) -> _Recorded:
        """f(gate), which is not kept any longer."""
        left, self.left = self.left, None
        return _Recorded(self.activation, gate) if left is None else left


class _Recorded:
    """y = f(x), computed apart from the graph around it."""

    def __init__(self, activation: Activation, x: torch.Tensor) -> None:
        with torch.enable_grad():
            self.x = x.detach().requires_grad_()
            self.y = activation(self.x)

    def carried(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of x, given that of y."""
        return torch.autograd.grad(self.y, self.x, grad)[0]


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        return activation(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyrefly: ignore[bad-override]
        (x,) = ctx.saved_tensors
        return _Recorded(ctx.activation, x).carried(grads[0]), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, again: _Again) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.again = again
        return again.activation(gate) * up  # not in place: it may have given back the gate itself

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        gate, up = ctx.saved_tensors
        f = ctx.again.taken(gate)
        d_gate = f.carried(grads[0] * up) if ctx.needs_input_grad[0] else None
        d_up = grads[0] * f.y.detach() if ctx.needs_input_grad[1] else None
        return d_gate, d_up, None
