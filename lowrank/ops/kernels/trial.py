"""The kernels against torch's own operations, on the device at hand: before a card is trusted with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from lowrank.ops.kernels.norm_rows import norm_rows

_BITS = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-6}
"""How far a number may be off, as a part of the largest."""


def disagreement(device: torch.device) -> str | None:
    """What one of the kernels computes otherwise than torch does; None where they agree."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for name, mine, plain, shapes in _tried():
            for dtype, allowed in _BITS.items():
                error = _error(mine, plain, [_numbers(shape, seed, device, dtype) for seed, shape in enumerate(shapes)])
                if not error <= allowed:
                    return f"{name} in {str(dtype).removeprefix('torch.')} is off by {error:.1e} here"
    return None


Function = Callable[..., torch.Tensor]


def _tried() -> list[tuple[str, Function, Function, list[tuple[int, ...]]]]:
    """(name, kernel, the same in plain operations, shapes of what both take)."""
    norm = partial(norm_rows, eps=1e-5, rounded_first=True, one_plus=False)
    return [("the norm", norm, lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-5), [(2, 65, 100), (100,)])]


def _numbers(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float32)
    return drawn.to(device, dtype).requires_grad_()


def _error(mine: Function, plain: Function, of: list[torch.Tensor]) -> float:
    """The largest over values and gradients, as a part of the largest number of what it is in."""
    got = _with_gradients(mine, of)
    expected = _with_gradients(plain, [x.detach().double().requires_grad_() for x in of])
    errors = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("nan")


def _with_gradients(function: Function, of: list[torch.Tensor]) -> list[torch.Tensor]:
    y = function(*of)
    direction = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float32).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, of, direction)]
