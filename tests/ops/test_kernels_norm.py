"""The norm's kernels against float64, and bit for bit against transformers' modules where the interpreter can be."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import as_float64, assert_rounded, in_dtypes, numbers, on_devices
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from lowrank.ops.kernels import norm_rows as norm_rows_module
from lowrank.ops.kernels.norm_rows import norm_rows
from lowrank.ops.made_again import made_again
from lowrank.ops.rms_norm import rms_norm_reference

CONVENTIONS = {"llama": (True, False), "olmo": (False, False), "gemma": (False, True)}
conventions = pytest.mark.parametrize("convention", CONVENTIONS)
EPS = 1e-5


def exact(x, weight, convention):
    return rms_norm_reference(x, 1.0 + weight if convention == "gemma" else weight, EPS, rounded_first=False)


@on_devices
@in_dtypes
@conventions
@pytest.mark.parametrize("shape", [(1, 576), (7, 100), (2, 3, 5, 64), (129, 100)], ids=str)
def test_values_and_gradients_are_those_of_float64_rounded(shape, convention, dtype, device):
    x = numbers(*shape, dtype=dtype, device=device).requires_grad_()
    weight = numbers(shape[-1], dtype=dtype, device=device, seed=1).requires_grad_()
    y = norm_rows(x, weight, EPS, *CONVENTIONS[convention])
    of = as_float64(x, weight)
    expected = exact(*of, convention)
    direction = numbers(*shape, dtype=dtype, device=device, seed=2)
    d_x, d_weight = torch.autograd.grad(y, (x, weight), direction)
    want_x, want_weight = torch.autograd.grad(expected, of, direction.double())
    assert y.dtype == d_x.dtype == d_weight.dtype == dtype
    assert_rounded(y, expected, roundings=3)
    assert_rounded(d_x, want_x, roundings=3)
    assert_rounded(d_weight, want_weight, roundings=3)


@on_devices
@pytest.mark.parametrize(
    ("convention", "module"), [("llama", LlamaRMSNorm), ("olmo", Olmo2RMSNorm), ("gemma", Gemma2RMSNorm)]
)
def test_rounds_where_transformers_module_does(convention, module, device):
    """In float16 nearly all numbers are the same to the bit: the others are those that a sum in another order moves."""
    norm = module(100, eps=EPS).to(device, torch.float16)
    x = numbers(129, 100, dtype=torch.float16, device=device)
    with torch.no_grad():
        norm.weight.copy_(numbers(100, seed=1))
        y, expected = norm_rows(x, norm.weight, EPS, *CONVENTIONS[convention]), norm(x)
    assert float((y == expected).float().mean()) > 0.998
    torch.testing.assert_close(y, expected, rtol=2.0**-9, atol=1e-6)


@on_devices
@pytest.mark.parametrize("convention", ["llama", "gemma"])
def test_a_gain_of_more_digits_makes_the_output_so_when_rounded_first(convention, device):
    x, weight = numbers(3, 8, dtype=torch.bfloat16, device=device), numbers(8, device=device)
    y = norm_rows(x, weight, EPS, *CONVENTIONS[convention])
    assert y.dtype == (torch.float32 if convention == "llama" else torch.bfloat16)


@on_devices
def test_rows_that_do_not_lie_side_by_side(device):
    wide = numbers(2, 9, 4, 100, device=device)
    for x in (wide[..., :60], wide[:, ::2], wide.transpose(1, 2), wide.transpose(2, 3), wide[:, :, 1]):
        x = x.detach().requires_grad_()
        weight = numbers(2 * x.shape[-1], device=device, seed=1)[::2]
        y = norm_rows(x, weight, EPS, True, False)
        of = as_float64(x, weight)
        expected = exact(*of, "llama")
        assert_rounded(y, expected, roundings=3)
        (d_x,) = torch.autograd.grad(y.sum(), x)  # a direction of one number, without strides
        assert_rounded(d_x, torch.autograd.grad(expected.sum(), of[0])[0], roundings=64)  # of which little may be left


@on_devices
def test_nothing_is_normed(device):
    x = torch.empty(2, 0, 8, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    y = norm_rows(x, weight, EPS, True, False)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@on_devices
@pytest.mark.parametrize("size", [1e4, 1e-4, 0.0])
def test_huge_and_tiny_numbers(size, device):
    x = (size * numbers(5, 100, dtype=torch.bfloat16, device=device)).requires_grad_()
    weight = numbers(100, dtype=torch.bfloat16, device=device, seed=1)
    y = norm_rows(x, weight, EPS, True, False)
    of = as_float64(x, weight)
    expected = exact(*of, "llama")
    assert_rounded(y, expected, roundings=3)
    direction = numbers(5, 100, dtype=torch.bfloat16, device=device, seed=2)
    (d_x,) = torch.autograd.grad(y, x, direction)
    assert_rounded(d_x, torch.autograd.grad(expected, of[0], direction.double())[0], roundings=3)


@on_devices
@pytest.mark.parametrize("trained", ["x", "weight"])
def test_forms_the_gradients_that_are_wanted_alone(trained, device):
    x = numbers(9, 100, device=device).requires_grad_(trained == "x")
    weight = numbers(100, device=device, seed=1).requires_grad_(trained == "weight")
    norm_rows(x, weight, EPS, True, False).square().sum().backward()
    of = as_float64(x, weight)
    wanted = {"x": x, "weight": weight}[trained]
    (expected,) = torch.autograd.grad(exact(*of, "llama").square().sum(), of[["x", "weight"].index(trained)])
    assert_rounded(wanted.grad, expected, roundings=12)


@on_devices
def test_programs_that_sum_over_many_tiles(device, monkeypatch):
    monkeypatch.setattr(norm_rows_module, "_PROGRAMS", 3)
    x, weight = numbers(301, 100, device=device).requires_grad_(), numbers(100, device=device, seed=1).requires_grad_()
    grads = torch.autograd.grad(norm_rows(x, weight, EPS, True, False).square().sum(), (x, weight))
    of = as_float64(x, weight)
    for got, want in zip(grads, torch.autograd.grad(exact(*of, "llama").square().sum(), of), strict=True):
        assert_rounded(got, want, roundings=12)


@on_devices
def test_keeps_its_input_and_a_number_a_row_and_its_output_is_made_again(device):
    x, weight = numbers(6, 100, device=device).requires_grad_(), numbers(100, device=device, seed=1)
    factor = numbers(6, 100, device=device, seed=2).requires_grad_()
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(tuple(s.shape)) or s, lambda s: s):
        norm_rows(x, weight, EPS, True, False)
    assert saved == [(6, 100), (100,), (6,)]
    with made_again():
        y = norm_rows(x, weight, EPS, True, False)
        product = y * factor
    kept = [product.grad_fn._saved_other, product.grad_fn._saved_self]
    assert any(torch.equal(each, y) and each.data_ptr() != y.data_ptr() for each in kept)
