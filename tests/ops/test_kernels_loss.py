"""The loss's kernel against float64's cross-entropy of all logits."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from kernel_cases import assert_rounded, in_dtypes, numbers, on_devices
from loss_cases import OPTIONS

from lowrank.ops.cross_entropy import LossOptions, cross_entropy
from lowrank.ops.kernels.loss_rows import loss_rows

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered")  # numpy's

NOTHING_DONE = LossOptions()
PLAIN = asdict(NOTHING_DONE)


def exact(logits, labels, options=NOTHING_DONE, weights=None):
    """(losses, gradient of their sum) in float64."""
    z = logits.double().requires_grad_()
    losses = cross_entropy(z, labels, options, weights, "none")
    return losses.detach(), torch.autograd.grad(losses.sum(), z)[0]


def labels_for(logits):
    return torch.arange(len(logits), device=logits.device) * 7919 % logits.shape[1]


@on_devices
@in_dtypes
@pytest.mark.parametrize("weighted", [False, True], ids=["once", "weighted"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(1, 576), (7, 100), (3, 4999)], ids=str)
def test_losses_and_gradients_are_those_of_float64_rounded(shape, options, weighted, dtype, device):
    logits = 3 * numbers(*shape, dtype=dtype, device=device)
    labels, weights = labels_for(logits), numbers(shape[0], device=device, seed=1) if weighted else None
    losses, slopes = exact(logits, labels, options, weights)
    without = loss_rows(logits, labels, weights, **asdict(options), gradient=False)
    assert not torch.equal(logits.double(), slopes)
    got = loss_rows(logits, labels, weights, **asdict(options), gradient=True)
    torch.testing.assert_close(got.double(), losses, rtol=2e-6, atol=2e-6)
    assert torch.equal(got, without)
    assert_rounded(logits, slopes, roundings=2)


@on_devices
@pytest.mark.parametrize("vocabulary", [1, 4095, 4096, 4097, 8192])
def test_vocabularies_beside_the_size_of_a_block(vocabulary, device):
    logits = numbers(2, vocabulary, device=device)
    labels = labels_for(logits)
    losses, slopes = exact(logits, labels)
    torch.testing.assert_close(loss_rows(logits, labels, None, **PLAIN, gradient=True).double(), losses)
    torch.testing.assert_close(logits.double(), slopes, rtol=1e-5, atol=1e-7)


@on_devices
def test_a_row_labelled_minus_100_counts_nothing(device):
    logits = numbers(4, 100, device=device)
    logits[2] = float("nan")
    labels = torch.tensor([3, -100, -100, 99], device=device)
    losses, slopes = exact(logits[[0, 3]], labels[[0, 3]])
    got = loss_rows(logits, labels, None, **PLAIN, gradient=True)
    torch.testing.assert_close(got[[0, 3]].double(), losses)
    torch.testing.assert_close(logits[[0, 3]].double(), slopes)
    assert not got[1:3].any()
    assert not logits[1:3].any()


@on_devices
def test_all_rows_labelled_minus_100(device):
    logits = numbers(3, 100, device=device)
    got = loss_rows(logits, torch.full((3,), -100, device=device), None, **PLAIN, gradient=True)
    assert not got.any()
    assert not logits.any()


@on_devices
@pytest.mark.parametrize("label", [-1, 100, 2**40])
def test_a_label_that_is_no_token_is_no_number(label, device):
    logits = numbers(2, 100, device=device)
    got = loss_rows(logits, torch.tensor([label, 5], device=device), None, **PLAIN, gradient=True)
    assert got.isnan().tolist() == [True, False]
    assert logits.isnan().all(1).tolist() == [True, False]


@on_devices
def test_logits_that_are_ruled_out(device):
    """By minus infinity: whole blocks of them, and the target itself."""
    logits = numbers(4, 9000, device=device)
    logits[:, :4500] = float("-inf")
    logits[2, 10] = 1.0
    labels = torch.tensor([4500, 8999, 10, 11], device=device)
    losses, slopes = exact(logits, labels)
    got = loss_rows(logits, labels, None, **PLAIN, gradient=True)
    assert float(got[3]) == float("inf")
    torch.testing.assert_close(got.double(), losses)
    torch.testing.assert_close(logits.double(), slopes)


@on_devices
def test_a_row_without_a_likely_token_is_no_number(device):
    logits = torch.full((1, 100), float("-inf"), device=device)
    assert loss_rows(logits, torch.tensor([5], device=device), None, **PLAIN, gradient=True).isnan().all()


@on_devices
@in_dtypes
def test_huge_logits(dtype, device):
    logits = (1e4 * numbers(5, 300, dtype=dtype, device=device)).to(dtype)
    labels = labels_for(logits)
    losses, slopes = exact(logits, labels)
    got = loss_rows(logits, labels, None, **PLAIN, gradient=True)
    torch.testing.assert_close(got.double(), losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), slopes, rtol=1e-2, atol=1e-6)


@on_devices
def test_the_loss_of_a_token_that_is_nearly_certain_is_exact(device):
    logits = torch.tensor([[30.0, 14.0, -3.0]], device=device)
    losses, _ = exact(logits, torch.tensor([0], device=device))
    got = loss_rows(logits, torch.tensor([0], device=device), None, **PLAIN, gradient=False)
    assert abs(float(got) - float(losses)) < 1.2e-7


@on_devices
def test_rows_of_a_wider_matrix_and_no_rows(device):
    wide = numbers(3, 300, device=device)
    before, logits = wide.clone(), wide[:, 100:200]
    labels = torch.tensor([1, 9, 2, 9, 3, 9], device=device)[::2]
    losses, slopes = exact(logits, labels)
    got = loss_rows(logits, labels, None, **PLAIN, gradient=True)
    torch.testing.assert_close(got.double(), losses)
    torch.testing.assert_close(logits.double(), slopes)
    assert torch.equal(wide[:, :100], before[:, :100])
    assert torch.equal(wide[:, 200:], before[:, 200:])
    assert loss_rows(wide[:0], labels[:0], None, **PLAIN, gradient=True).shape == (0,)


@on_devices
def test_autograd_is_told_that_logits_were_overwritten(device):
    x = numbers(2, 100, device=device).requires_grad_()
    y = x.exp()
    loss_rows(y.detach(), torch.tensor([1, 2], device=device), None, **PLAIN, gradient=False)
    y.sum().backward(retain_graph=True)
    loss_rows(y.detach(), torch.tensor([1, 2], device=device), None, **PLAIN, gradient=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
