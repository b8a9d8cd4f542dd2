from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lowrank.ops.dora_norm import dora_norm, dora_norm_reference, row_norm2
from lowrank.ops.lora_linear import lora_linear, lora_linear_reference
from lowrank.ops.low_rank import LowRank
from lowrank.ops.merged import merged_weight

SHAPE = {"x": (2, 5, 6), "weight": (4, 6), "bias": (4,), "A": (3, 6), "B": (4, 3), "gain": (4,)}


def operands(dtype: torch.dtype = torch.float64, grad: bool = True, **shapes: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
        for name, shape in {**SHAPE, **shapes}.items()
    }


@pytest.mark.parametrize("gain", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_gradients_in_float64(gain: bool, bias: bool):
    t = operands()

    def layer(x, weight, b, A, B, g):
        return lora_linear(x, weight, b if bias else None, LowRank(A, B, 0.7, g if gain else None))

    assert torch.autograd.gradcheck(layer, (t["x"], t["weight"], t["bias"], t["A"], t["B"], t["gain"]))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "A", "B", "gain"])
def test_a_frozen_operand_gets_no_gradient_and_the_others_keep_theirs(frozen: str):
    t = operands()
    t[frozen].requires_grad_(False)
    term = LowRank(t["A"], t["B"], 0.7, t["gain"])
    lora_linear(t["x"], t["weight"], t["bias"], term).square().sum().backward()
    got = {name: tensor.grad for name, tensor in t.items()}
    for tensor in t.values():
        tensor.grad = None
    lora_linear_reference(t["x"], t["weight"], t["bias"], term).square().sum().backward()
    for name, tensor in t.items():
        if name == frozen:
            assert got[name] is None
        else:
            torch.testing.assert_close(got[name], tensor.grad)


@pytest.mark.parametrize(("rows", "r", "wide"), [(10, 3, False), (40, 9, True), (4, 9, False)])
def test_the_order_of_products_is_the_one_with_fewer_operations(rows: int, r: int, wide: bool):
    t = operands(x=(rows, 6), A=(r, 6), B=(4, r))
    term = LowRank(t["A"], t["B"], 0.7, t["gain"])
    with FlopCounterMode(display=False) as counter:
        loss = lora_linear(t["x"], t["weight"], None, term).sum()
        loss.backward()
    low, product = 2 * rows * r, 2 * rows * 6 * 4  # of one thin product, for each of the width that it has; of x · Wᵀ
    through_rank, through_product = low * (6 + 4), product + 2 * 2 * r * 6 * 4
    assert wide == (through_product < through_rank)
    rest = 3 * product + low * (6 + 4)  # the shape of W's; low and d_low (what is added in place is not counted)
    assert counter.get_total_flops() == rest + min(through_rank, through_product)


@pytest.mark.parametrize("r", [3, 9], ids=["narrow", "wide"])
def test_dropout_is_the_reference_with_the_same_mask(r: int):
    t = operands(x=(40, 6), A=(r, 6), B=(4, r))
    torch.manual_seed(1)
    y = lora_linear(t["x"], t["weight"], t["bias"], LowRank(t["A"], t["B"], 0.7, dropout=0.5))
    y.square().sum().backward()
    got = {name: tensor.grad for name, tensor in t.items()}
    torch.manual_seed(1)
    keep = torch.empty_like(t["x"], dtype=torch.bool).bernoulli_(0.5) * 2.0
    for tensor in t.values():
        tensor.grad = None
    expected = lora_linear_reference(t["x"], t["weight"], t["bias"], LowRank(t["A"], t["B"], 0.7), keep)
    expected.square().sum().backward()
    assert 0 < keep.count_nonzero() < keep.numel()
    torch.testing.assert_close(y, expected)
    for name in ("x", "weight", "bias", "A", "B"):
        torch.testing.assert_close(got[name], t[name].grad)


def test_saves_one_input_and_one_rank_r_product():
    t = operands(torch.float32)
    t["weight"].requires_grad_(False)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        lora_linear(t["x"], t["weight"], None, LowRank(t["A"], t["B"], 0.7))
    given = {t[name].data_ptr() for name in ("x", "weight", "A", "B")}
    extra = [tuple(s.shape) for s in saved if s.data_ptr() not in given]
    assert extra == [(10, 3)]


def test_bf16_inputs_with_float32_factors_give_bf16_and_float32_gradients():
    t = operands(torch.float32)
    x = t["x"].detach().bfloat16().requires_grad_()
    y = lora_linear(x, t["weight"].detach().bfloat16(), None, LowRank(t["A"], t["B"], 0.7))
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype, t["A"].grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_autocast_computes_in_its_dtype():
    t = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(t["x"], t["weight"].detach(), t["bias"].detach(), LowRank(t["A"], t["B"], 0.7))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert t["x"].grad.dtype == torch.float32


def test_dora_norm_is_the_dense_norm():
    t = operands(grad=False)
    norm = dora_norm(t["weight"], t["A"], t["B"], 0.7)
    torch.testing.assert_close(norm, dora_norm_reference(t["weight"], t["A"], t["B"], 0.7))
    known = dora_norm(t["weight"], t["A"], t["B"], 0.7, row_norm2(t["weight"], torch.float64))
    torch.testing.assert_close(known, norm)


def test_merged_weight_does_what_the_layer_does():
    t = operands(grad=False)
    for gain in (None, t["gain"]):
        term = LowRank(t["A"], t["B"], 0.7, gain)
        merged = merged_weight(t["weight"], term)
        torch.testing.assert_close(t["x"] @ merged.t(), lora_linear(t["x"], t["weight"], None, term))
