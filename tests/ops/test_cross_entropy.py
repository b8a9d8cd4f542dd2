from __future__ import annotations

import pytest
import torch

from lowrank.ops import cross_entropy
from lowrank.ops.cross_entropy import LossOptions, linear_cross_entropy, linear_cross_entropy_reference

OPTIONS = {
    "plain": LossOptions(),
    "softcap": LossOptions(softcap=2.0),
    "scaled": LossOptions(logit_scale=0.3),
    "smoothed": LossOptions(label_smoothing=0.1),
    "z-loss": LossOptions(z_loss=0.01),
    "all": LossOptions(logit_scale=0.3, softcap=2.0, label_smoothing=0.1, z_loss=0.01),
}


@pytest.fixture
def operands():
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randint(0, 11, (7,)), bias


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [1, 11 * 4 * 3, 10**6], ids=["row-by-row", "three-rows", "one-chunk"])
def test_equals_all_logits_at_once(operands, options, chunk_bytes, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk_bytes)
    hidden, weight, labels, bias = operands
    loss = linear_cross_entropy(hidden, weight, labels, bias, options)
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    expected = linear_cross_entropy_reference(hidden, weight, labels, bias, options)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(grads, torch.autograd.grad(expected, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_in_float64(operands, options):
    hidden, weight, labels, bias = operands

    def loss(h, w, b):
        return linear_cross_entropy(h, w, labels, b, options)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_a_frozen_head_keeps_only_the_gradient_of_the_hidden_states(operands):
    hidden, weight, labels, _ = operands
    weight.requires_grad_(False)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(tuple(s.shape)) or s, lambda s: s):
        loss = linear_cross_entropy(hidden, weight, labels)
    assert saved == [(7, 5)]
    (3.0 * loss).backward()
    expected = linear_cross_entropy_reference(hidden, weight, labels)
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(3.0 * expected, hidden)[0])


def test_without_gradients_no_gradient_is_formed(operands):
    hidden, weight, labels, bias = (t.detach() for t in operands)
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, labels, bias),
        linear_cross_entropy_reference(hidden, weight, labels, bias),
    )
