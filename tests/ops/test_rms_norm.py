from __future__ import annotations

import pytest
import torch

from lowrank.ops.rms_norm import rms_norm, rms_norm_reference

ROUNDED_FIRST = pytest.mark.parametrize("rounded_first", [True, False], ids=["rounded-first", "rounded-last"])


def operands(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(2, 3, 7, dtype=dtype, requires_grad=True), torch.randn(7, dtype=dtype, requires_grad=True)


@ROUNDED_FIRST
def test_gradients_in_float64(rounded_first):
    assert torch.autograd.gradcheck(lambda x, gain: rms_norm(x, gain, 1e-5, rounded_first), operands())


@ROUNDED_FIRST
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_plain_operations(dtype, rounded_first):
    x, gain = operands(dtype)
    y, expected = rms_norm(x, gain, 1e-5, rounded_first), rms_norm_reference(x, gain, 1e-5, rounded_first)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)
    d_y = torch.randn_like(y)
    grads = (torch.autograd.grad(out, (x, gain), d_y) for out in (y, expected))
    for got, want in zip(*grads, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=8 * torch.finfo(dtype).eps, rtol=8 * torch.finfo(dtype).eps)


def test_a_gain_of_more_digits_makes_the_output_so_when_rounded_first():
    x, gain = operands(torch.bfloat16)
    assert rms_norm(x, gain.float(), 1e-5, rounded_first=True).dtype == torch.float32
    assert rms_norm(x, gain.float(), 1e-5, rounded_first=False).dtype == torch.bfloat16


def test_keeps_its_input_and_a_number_a_row():
    x, gain = operands()
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(tuple(s.shape)) or s, lambda s: s):
        rms_norm(x, gain, 1e-5, rounded_first=True)
    assert saved == [(2, 3, 7), (7,), (2, 3, 1)]
