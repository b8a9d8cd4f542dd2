from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from loss_cases import OPTIONS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank.ops import cross_entropy
from lowrank.ops.cross_entropy import (
    CHUNK_BYTES,
    cross_entropy_through,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

ROW_WEIGHTS = {"once": None, "weighted": torch.tensor([1.0, 16.0, 0.0, 2.5, -1.0, 1.0, 3.0])}


@pytest.fixture
def operands():
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randint(0, 11, (7,)), bias


@pytest.mark.parametrize("row_weights", ROW_WEIGHTS.values(), ids=ROW_WEIGHTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("block_bytes", [1, 10**6], ids=["row-by-row", "whole"])
@pytest.mark.parametrize("chunk_bytes", [1, 11 * 8 * 3, 10**6], ids=["row-by-row", "three-rows", "one-chunk"])
def test_equals_all_logits_at_once(operands, options, row_weights, chunk_bytes, block_bytes, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", block_bytes)
    hidden, weight, labels, bias = operands
    loss = linear_cross_entropy(hidden, weight, labels, bias, options, row_weights)
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    expected = linear_cross_entropy_reference(hidden, weight, labels, bias, options, row_weights)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(grads, torch.autograd.grad(expected, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("row_weights", ROW_WEIGHTS.values(), ids=ROW_WEIGHTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_in_float64(operands, options, row_weights):
    hidden, weight, labels, bias = operands

    def loss(h, w, b):
        return linear_cross_entropy(h, w, labels, b, options, row_weights)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_row_that_counts_three_times_is_three_rows(operands, options):
    hidden, weight, labels, bias = operands
    counts = torch.tensor([1, 3, 1, 1, 0, 2, 1])
    loss = linear_cross_entropy(hidden, weight, labels, bias, options, counts.float())
    repeated = torch.arange(len(labels)).repeat_interleave(counts)
    expected = linear_cross_entropy(hidden[repeated], weight, labels[repeated], bias, options)
    torch.testing.assert_close(loss, expected)
    of = (hidden, weight, bias)
    for got, want in zip(torch.autograd.grad(loss, of), torch.autograd.grad(expected, of), strict=True):
        torch.testing.assert_close(got, want)


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


class Adapted(nn.Module):
    """A head with a low-rank term, whose factors train."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.detach(), requires_grad=False), nn.Parameter(bias.detach())
        self.A = nn.Parameter(torch.randn(2, weight.shape[1], dtype=weight.dtype))
        self.B = nn.Parameter(torch.randn(weight.shape[0], 2, dtype=weight.dtype))
        self.unused = nn.Parameter(torch.ones(1, dtype=weight.dtype))

    def forward(self, x):
        return x @ self.weight.t() + self.bias + x @ self.A.t() @ self.B.t()


@pytest.mark.parametrize("row_weights", ROW_WEIGHTS.values(), ids=ROW_WEIGHTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [1, 11 * 16 * 3, 10**6], ids=["row-by-row", "three-rows", "one-chunk"])
def test_through_an_adapted_head_equals_all_logits_at_once(operands, options, row_weights, chunk_bytes, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk_bytes)
    hidden, weight, labels, bias = operands
    head = Adapted(weight, bias)
    loss = 2.0 * cross_entropy_through(head, hidden, labels, len(weight), options, row_weights)
    expected = 2.0 * cross_entropy.cross_entropy(head(hidden), labels, options, row_weights)
    torch.testing.assert_close(loss, expected)
    of = (hidden, head.A, head.B, head.bias)
    for got, want in zip(torch.autograd.grad(loss, of), torch.autograd.grad(expected, of), strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        assert torch.equal(2.0 * cross_entropy_through(head, hidden, labels, len(weight), options, row_weights), loss)


def test_a_head_that_needs_what_it_returned_is_an_error_and_no_wrong_gradient(operands):
    hidden, weight, labels, bias = operands
    head = nn.Sequential(Adapted(weight, bias), nn.Tanh())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy_through(head, hidden, labels, len(weight))


def test_an_evaluation_forms_no_gradient_of_a_head_that_trains(operands):
    hidden, weight, labels, bias = operands
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        linear_cross_entropy(hidden, weight, labels, bias)
    assert counted.get_total_flops() == 2 * 7 * 5 * 11


def test_under_autocast_all_products_are_short_and_gradients_are_not(operands):
    hidden, weight, labels, bias = (t.detach().float() if t.is_floating_point() else t for t in operands)
    trained = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, bias)
        expected = linear_cross_entropy_reference(hidden, weight, labels, bias)
    torch.testing.assert_close(loss, expected)
    grads = (torch.autograd.grad(value, trained) for value in (loss, expected))
    for got, want in zip(*grads, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, got.bfloat16().float())
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_the_loss_of_a_token_that_is_nearly_certain_is_exact():
    logits = torch.tensor([[30.0, 14.0, -3.0]])
    exact = linear_cross_entropy(logits.double(), torch.eye(3, dtype=torch.float64), torch.tensor([0]))
    got = linear_cross_entropy(logits, torch.eye(3), torch.tensor([0]))
    assert abs(float(got) - float(exact)) < 1e-7


PEAK = """
import sys, torch
from torch import nn
import lowrank
from lowrank.ops.cross_entropy import cross_entropy_through, linear_cross_entropy
from lowrank.training.machine.memory import forget_peak, peak_bytes, resident_bytes

torch.manual_seed(0)
vocabulary, rows, size = 60_000, 1_500, 64
model = nn.ModuleDict({"head": nn.Linear(size, vocabulary, bias=False, dtype=torch.bfloat16)}).requires_grad_(False)
head = model["head"]
if sys.argv[1] == "adapted":
    lowrank.wrap(model, lowrank.LoraConfig(r=4, target_modules=["head"], task_type=None))

def loss(hidden, labels):
    hidden = hidden.detach().requires_grad_()
    if sys.argv[1] == "adapted":
        return cross_entropy_through(head, hidden, labels, vocabulary).backward()
    linear_cross_entropy(hidden, head.weight, labels).backward()

hidden, labels = torch.randn(rows, size, dtype=torch.bfloat16), torch.randint(0, vocabulary, (rows,))
loss(hidden[:8], labels[:8])
before = resident_bytes()
forget_peak(hidden.device)
loss(hidden, labels)
print(peak_bytes(hidden.device) - before)
"""


@pytest.mark.parametrize("head", ["frozen", "adapted"])
def test_its_memory_is_one_chunk_and_little_more(head):
    held_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed leaves the process
    done = subprocess.run([sys.executable, "-c", PEAK, head], env=held_back, capture_output=True, text=True, check=True)
    assert CHUNK_BYTES / 2 < int(done.stdout) < CHUNK_BYTES + 32 * 2**20
