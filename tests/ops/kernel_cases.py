"""What the tests of kernels share: under Triton's interpreter on CPU tensors, or compiled, on the card of a machine
that has one.

The interpreter computes as numpy does: float16 is rounded to nearest, as on a card, bfloat16 towards zero.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not _INTERPRETED, reason="kernels are compiled, for the card")),
    pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(_INTERPRETED, reason="needs a CUDA device")]),
]
on_devices = pytest.mark.parametrize("device", DEVICES)
in_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])


def numbers(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """Normally distributed, the same on every device."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(device, dtype)


def as_float64(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def assert_rounded(got: torch.Tensor, exact: torch.Tensor, roundings: int = 1) -> None:
    """`got` is what `exact` is in its dtype, after so many roundings of numbers as large as the largest of its row."""
    assert got.shape == exact.shape
    step = max(torch.finfo(got.dtype).eps, 2.0**-22)  # sums in float32
    size = exact.double().abs().amax(-1, keepdim=True) if exact.dim() else exact.double().abs()
    error = (got.double() - exact.double()).abs()
    assert bool((error <= roundings * step * size + 1e-30).all()), f"{float((error / (step * size)).max())} steps"
