"""The kernels against torch's own operations, on the device at hand: before a card is trusted with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from lowrank.ops.kernels.gate_rows import gate_rows
from lowrank.ops.kernels.loss_rows import loss_rows
from lowrank.ops.kernels.norm_rows import norm_rows
from lowrank.ops.kernels.rotation import rotated

_ALLOWED = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""How far a number may be off, as a part of the largest."""

_Function: TypeAlias = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class _Trial:
    """What a kernel computes, the same in plain operations, and the shapes of what gradients flow to."""

    name: str
    kernel: _Function
    plain: _Function
    shapes: tuple[tuple[int, ...], ...]

    def error(self, device: torch.device, dtype: torch.dtype) -> float:
        """The largest over values and gradients, as a part of the largest number of what it is in."""
        of = [_numbers(shape, seed, device, dtype) for seed, shape in enumerate(self.shapes)]
        got = _with_gradients(self.kernel, of)
        expected = _with_gradients(self.plain, [x.detach().double().requires_grad_() for x in of])
        pairs = zip(got, expected, strict=True)
        return float(torch.stack([(a.double() - b).abs().max() / b.abs().max() for a, b in pairs]).max())


def disagreement(device: torch.device) -> str | None:
    """What one of the kernels computes otherwise than torch does; None where they agree."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for trial in _TRIALS:
            for dtype, allowed in _ALLOWED.items():
                error = trial.error(device, dtype)
                if not error <= allowed:  # nor is it NaN
                    return f"{trial.name} in {str(dtype).removeprefix('torch.')} are off by {error:.1e} here"
    return None


def _rotated_by_kernel(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    angles = torch.linspace(0, 6, 5 * 16, device=q.device, dtype=torch.float32).view(1, 5, 16)
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    return torch.cat(rotated(q, k, cos, sin, q.dtype, q.dtype), 1)


def _rotated_plainly(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    angles = torch.linspace(0, 6, 5 * 16, device=q.device, dtype=torch.float32).view(1, 5, 16)
    x = torch.cat((q, k), 1)
    return x * angles.cos() + torch.cat((-x[..., 8:], x[..., :8]), -1) * angles.sin()


class _Loss(torch.autograd.Function):
    """The sum of the kernel's losses, with the gradient that it leaves."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        slope = logits.clone()
        loss = loss_rows(
            slope, _labels(logits), None, logit_scale=1.0, softcap=None, label_smoothing=0.0, z_loss=0.0, gradient=True
        )
        ctx.save_for_backward(slope)
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (slope,) = ctx.saved_tensors
        return slope * grads[0].to(slope.dtype)


def _loss(logits: torch.Tensor) -> torch.Tensor:
    loss = _Loss.apply(logits)
    assert isinstance(loss, torch.Tensor)
    return loss


def _labels(logits: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(logits), device=logits.device) * 7919 % logits.shape[1]


def _gelu_plainly(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") * up


_TRIALS = [
    _Trial(
        "norms",
        partial(norm_rows, eps=1e-5, rounded_first=True, one_plus=False),
        lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-5),
        ((2, 65, 100), (100,)),
    ),
    _Trial(
        "norms around one",
        partial(norm_rows, eps=1e-5, rounded_first=False, one_plus=True),
        lambda x, weight: F.rms_norm(x, x.shape[-1:], 1 + weight, 1e-5),
        ((9, 576), (576,)),
    ),
    _Trial("gates", partial(gate_rows, name="silu"), lambda gate, up: F.silu(gate) * up, ((9, 100), (9, 100))),
    _Trial("GELU's gates", partial(gate_rows, name="gelu_tanh"), _gelu_plainly, ((9, 100), (9, 100))),
    _Trial("rotations", _rotated_by_kernel, _rotated_plainly, ((2, 3, 5, 16), (2, 2, 5, 16))),
    _Trial("losses", _loss, lambda z: F.cross_entropy(z, _labels(z), reduction="sum"), ((7, 5000),)),
]


def _numbers(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float32)
    return drawn.to(device, dtype).requires_grad_()


def _with_gradients(function: _Function, of: list[torch.Tensor]) -> list[torch.Tensor]:
    y = function(*of)
    direction = torch.linspace(0.5, 1, y.numel(), device=y.device, dtype=torch.float32).view(y.shape).to(y.dtype)
    return [y.detach().double(), *torch.autograd.grad(y, of, direction)]
