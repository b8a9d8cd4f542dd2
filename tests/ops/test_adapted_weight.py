from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.integrations import moe  # defines the operator that stands in for torch's grouped product

from lowrank.ops.adapted_weight import AdaptedWeight, adapted_weight_reference

E, N, D1, D2, R = 3, 10, 8, 4, 2
ENDS = torch.tensor([3, 3, 10], dtype=torch.int32)  # the second expert has no rows
FALLBACK = torch.ops.transformers.grouped_mm_fallback


def operands(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((E, D1, D2), (E, D1, R), (E, R, D2))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def by_group(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    starts = [0, *ENDS.tolist()[:-1]]
    return torch.cat([x[a:b] @ w for a, b, w in zip(starts, ENDS.tolist(), weight, strict=True)])


def grouped(x, w):
    return FALLBACK(x, w, offs=ENDS) if isinstance(w, AdaptedWeight) else by_group(x, w)


PRODUCTS = {
    "linear": ((N, D2), lambda x, w: F.linear(x, w[1])),
    "linear over a batch": ((2, 5, D2), lambda x, w: F.linear(x, w[1])),
    "matmul": ((N, D1), lambda x, w: x @ w[torch.tensor(2)]),
    "transposed": ((N, D2), lambda x, w: x @ w.transpose(-2, -1)[0]),
    "float": ((N, D1), lambda x, w: x.float() @ w[0].float()),
    "bmm, the weight second": ((E, N, D1), lambda x, w: torch.bmm(x, w)),
    "bmm, the weight first": ((E, D2, N), lambda x, w: torch.bmm(w, x)),
    "picked per row": ((4, D2, 1), lambda x, w: torch.bmm(w[torch.tensor([2, 0, 2, 1])], x)),
    "every expert apart": ((N, D1), lambda x, w: torch.stack([x @ w[e] for e in range(E)])),
    "grouped": ((N, D1), grouped),
    "grouped, transposed": ((N, D2), lambda x, w: grouped(x, w.transpose(1, 2))),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_and_gradients_are_those_of_the_formed_weight(product: str):
    shape, multiply = PRODUCTS[product]
    x, (base, left, right) = rows(*shape), operands()
    got = multiply(x, AdaptedWeight(base, left, right, 0.7))
    expected = multiply(x, adapted_weight_reference(AdaptedWeight(base, left, right, 0.7)))
    tolerance = 1e-5 if got.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    operand = (x, base, left, right)
    for mine, theirs in zip(
        torch.autograd.grad(got.square().sum(), operand),
        torch.autograd.grad(expected.square().sum(), operand),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("product", [name for name in PRODUCTS if name != "float"])
def test_gradients_in_float64(product: str):
    shape, multiply = PRODUCTS[product]

    def function(x, base, left, right):
        return multiply(x, AdaptedWeight(base, left, right, 0.7))

    assert torch.autograd.gradcheck(function, (rows(*shape), *operands()))


@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_grouped_product_takes_any_rank(dtype: torch.dtype, r: int):
    generator = torch.Generator().manual_seed(0)
    x, base, left, right = (torch.randn(s, generator=generator) for s in ((N, 16), (E, 16, 8), (E, 16, r), (E, r, 8)))
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, base, left, right)]
    got = F.grouped_mm(leaves[0], AdaptedWeight(*leaves[1:], 0.7), offs=ENDS)
    got.float().square().sum().backward()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = by_group(exact[0], adapted_weight_reference(AdaptedWeight(*exact[1:], 0.7)))
    expected.square().sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert got.dtype == dtype
    for mine, theirs in [(got, expected), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]:
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


def test_a_product_in_bfloat16_with_float32_factors_has_the_inputs_dtype():
    base, left, right = operands(torch.float32)
    x = rows(N, D1, dtype=torch.bfloat16)
    weight = AdaptedWeight(base.detach().bfloat16(), left, right, 0.7)
    y = torch.bmm(x.expand(E, N, D1), weight)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert left.grad is not None
    assert left.grad.dtype == torch.float32


def test_what_is_no_product_sees_the_sum():
    weight = AdaptedWeight(*operands(), 0.7)
    formed = adapted_weight_reference(weight)
    torch.testing.assert_close(torch.exp(weight), torch.exp(formed))
    torch.testing.assert_close(torch.cat([weight, weight]), torch.cat([formed, formed]))
    torch.testing.assert_close(weight.contiguous().sum(), formed.sum())
    torch.testing.assert_close(2.0 * formed - weight, formed)
    torch.testing.assert_close(weight * 2.0, formed * 2.0)
    torch.testing.assert_close(-weight[:, 1:], -formed[:, 1:])
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = weight.no_such_thing


@pytest.mark.parametrize("padding", [None, 1])
def test_rows_that_are_looked_up(padding):
    base, left, right = (operand[0].detach().requires_grad_() for operand in operands())
    ids = torch.tensor([[0, 1], [2, 0]])
    got = torch.nn.functional.embedding(ids, AdaptedWeight(base, left, right, 0.7), padding)
    got.sin().sum().backward()
    grads = [left.grad.clone(), right.grad.clone()]
    left.grad = right.grad = None
    formed = adapted_weight_reference(AdaptedWeight(base, left, right, 0.7))
    expected = torch.nn.functional.embedding(ids, formed, padding)
    torch.testing.assert_close(got, expected)
    expected.sin().sum().backward()
    torch.testing.assert_close(grads, [left.grad, right.grad])


def test_transformers_takes_the_stand_in_where_its_own_code_multiplies():
    base, left, right = operands(torch.float32)
    x = rows(N, D2, dtype=torch.float32)
    got = moe._grouped_linear(x, AdaptedWeight(base, left, right, 0.7), ENDS)
    expected = moe._grouped_linear(x, adapted_weight_reference(AdaptedWeight(base, left, right, 0.7)), ENDS)
    torch.testing.assert_close(got, expected)
