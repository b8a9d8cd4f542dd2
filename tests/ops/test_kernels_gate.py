"""The kernels of gated activations against float64, and against torch's own operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import as_float64, assert_rounded, in_dtypes, numbers, on_devices
from transformers.activations import ACT2FN

from lowrank.ops.kernels.gate_rows import gate_rows
from lowrank.ops.made_again import made_again
from lowrank.training.transforms.activations import kernel_of

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's

FUNCTIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
names = pytest.mark.parametrize("name", FUNCTIONS)


@on_devices
@in_dtypes
@names
@pytest.mark.parametrize("shape", [(1, 576), (7, 100), (2, 3, 1100), (129, 100)], ids=str)
def test_values_and_gradients_are_those_of_float64_rounded(shape, name, dtype, device):
    gate, up = (numbers(*shape, dtype=dtype, device=device, seed=seed).requires_grad_() for seed in (0, 1))
    y = gate_rows(gate, up, name)
    of = as_float64(gate, up)
    expected = FUNCTIONS[name](of[0]) * of[1]
    direction = numbers(*shape, dtype=dtype, device=device, seed=2)
    grads = torch.autograd.grad(y, (gate, up), direction)
    want = torch.autograd.grad(expected, of, direction.double())
    assert y.dtype == grads[0].dtype == grads[1].dtype == dtype
    for got, exact in zip((y, *grads), (expected, *want), strict=True):
        assert_rounded(got, exact, roundings=3)


@on_devices
@names
def test_rounds_where_plain_operations_do(name, device):
    """In float16 nearly all numbers are the same to the bit: the others are those that another exp moves."""
    gate, up, direction = (numbers(129, 100, dtype=torch.float16, device=device, seed=seed) for seed in range(3))
    gate.requires_grad_()
    up.requires_grad_()
    found = []
    for y in (gate_rows(gate, up, name), FUNCTIONS[name](gate) * up):
        found.append((y, *torch.autograd.grad(y, (gate, up), direction)))
    for got, expected in zip(*found, strict=True):
        assert float((got == expected).float().mean()) > 0.995
        torch.testing.assert_close(got, expected, rtol=2.0**-9, atol=1e-5)


@on_devices
def test_the_halves_of_one_projection_and_other_strides(device):
    whole = numbers(2, 5, 2 * 100, device=device).requires_grad_()
    pairs = [whole.chunk(2, -1), (whole[..., ::2], whole[..., 1::2]), whole.transpose(0, 1).chunk(2, -1)]
    for gate, up in pairs:
        y = gate_rows(gate, up, "silu")
        expected = F.silu(gate) * up
        assert y.is_contiguous()
        torch.testing.assert_close(y, expected)
        grads = (torch.autograd.grad(out.sum(), whole, retain_graph=True)[0] for out in (y, expected))
        torch.testing.assert_close(*grads)


@on_devices
@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_numbers(dtype, name, device):
    gate = torch.tensor([[1e4, -1e4, 30.0, -30.0, 0.0, -0.0, 1e-4]], dtype=dtype, device=device).requires_grad_()
    up = torch.full_like(gate, 3.0).detach().requires_grad_()
    y = gate_rows(gate, up, name)
    of = as_float64(gate, up)
    expected = FUNCTIONS[name](of[0]) * of[1]
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=1e-6)
    grads = torch.autograd.grad(y.sum(), (gate, up))
    want = torch.autograd.grad(expected.sum(), of)
    for got, exact in zip(grads, want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=0.02, atol=1e-6)


@on_devices
def test_nothing_is_gated(device):
    gate, up = (torch.empty(0, 8, device=device, requires_grad=True) for _ in range(2))
    gate_rows(gate, up, "silu").sum().backward()
    assert gate.grad.shape == up.grad.shape == (0, 8)


@on_devices
def test_keeps_gate_and_up_alone_and_its_product_is_made_again(device):
    gate, up, factor = (numbers(6, 100, device=device, seed=seed).requires_grad_() for seed in range(3))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s.data_ptr()) or s, lambda s: s):
        gate_rows(gate, up, "silu")
    assert saved == [gate.data_ptr(), up.data_ptr()]
    with made_again():
        y = gate_rows(gate, up, "silu")
        product = y * factor
    kept = product.grad_fn._saved_self
    assert torch.equal(kept, y)
    assert kept.data_ptr() != y.data_ptr()


@on_devices
@pytest.mark.parametrize("activation", ACT2FN)
def test_an_activation_that_has_a_kernel_computes_what_it_does(activation, device):
    try:
        module = ACT2FN[activation]
    except ImportError as error:
        pytest.skip(str(error))
    name = kernel_of(module)
    known = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    assert name == known.get(activation)
    if name is not None:
        x, ones = numbers(7, 100, device=device), torch.ones(7, 100, device=device)
        torch.testing.assert_close(gate_rows(x, ones, name), module(x))
