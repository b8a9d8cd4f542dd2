"""Where the kernels run, and that what they are called from computes with them what it computes without."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trusted import cpu_as_card, untried_card  # noqa: F401

from lowrank.ops import cross_entropy
from lowrank.ops.cross_entropy import LossOptions, cross_entropy_through, each_cross_entropy, linear_cross_entropy
from lowrank.ops.gated import gated
from lowrank.ops.kernels import on_card
from lowrank.ops.kernels.on_card import WIDEST, kernels_on, kernels_take
from lowrank.ops.rms_norm import rms_norm

CPU = torch.device("cpu")
OPTIONS = LossOptions(logit_scale=0.5, softcap=4.0, label_smoothing=0.1, z_loss=0.01)
card = pytest.mark.usefixtures("cpu_as_card")


def trials():
    from lowrank.ops.kernels import trial

    return trial


def test_a_cpu_computes_without_them():
    assert not kernels_take(torch.ones(2))
    assert str(kernels_on(CPU)) == "none: they are made for CUDA"


@pytest.mark.parametrize(
    ("capability", "triton", "why"),
    [
        ((7, 5), True, "Triton needs a card of compute capability 8.0"),
        ((9, 0), False, "Triton is not installed"),
        ((9, 0), True, None),
    ],
)
def test_what_a_card_may_lack(capability, triton, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(on_card, "find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert on_card._missing(torch.device("cuda", 0)) == why


def test_nothing_of_the_package_imports_triton_without_a_card():
    script = (
        "import sys, torch\n"
        "from lowrank.ops.rms_norm import rms_norm\n"
        "from lowrank.ops.cross_entropy import linear_cross_entropy\n"
        "x = torch.ones(2, 2, requires_grad=True)\n"
        "linear_cross_entropy(rms_norm(x, x[0], 1e-5, True), x, torch.tensor([0, 1])).backward()\n"
        "assert not any(name.startswith('lowrank.ops.kernels.') and 'on_card' not in name for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@card
def test_a_card_is_tried_before_it_is_trusted():
    assert str(kernels_on(CPU)) == "own: they agree with torch on this card"
    assert kernels_take(torch.ones(2), nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))
    assert not kernels_take(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert not kernels_take(torch.ones(2), torch.ones(2, device="meta"))
    assert not kernels_take(torch.ones(2).as_subclass(type("Sharded", (torch.Tensor,), {})))


@pytest.mark.usefixtures("untried_card")
@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_kernels_that_say_something_else_are_not_used(which, wrong, monkeypatch):
    trial = trials()
    kernel = trial._TRIALS[which].kernel

    def off(*of):
        y = kernel(*of)
        if wrong == "value":
            return y + 0.1 * y.detach().abs().max()
        return y * float("nan") if wrong == "nan" else 1.1 * y - 0.1 * y.detach()

    monkeypatch.setattr(trial, "_TRIALS", [replace(trial._TRIALS[which], kernel=off)])
    choice = kernels_on(CPU)
    assert not choice.used
    assert choice.why.startswith(f"{trial._TRIALS[0].name} in float32 are off by")
    assert not kernels_take(torch.ones(2))


@pytest.mark.usefixtures("untried_card")
def test_kernels_that_do_not_run_are_not_used(monkeypatch):
    def fails(*of):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    trial = trials()
    monkeypatch.setattr(trial, "_TRIALS", [replace(trial._TRIALS[0], kernel=fails)])
    assert str(kernels_on(CPU)) == "none: they do not run here: Failed to find C compiler."


@pytest.mark.usefixtures("untried_card")
def test_a_triton_that_cannot_be_imported_is_not_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "lowrank.ops.kernels.trial", None)
    assert str(kernels_on(CPU)).startswith("none: they do not run here: import of lowrank.ops.kernels.trial")


@pytest.mark.usefixtures("untried_card")
def test_a_card_is_tried_whatever_mode_its_first_user_is_in():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert kernels_on(CPU).used


def outcome(compute, *of):
    y = compute(*of)
    direction = torch.linspace(0.5, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y, *torch.autograd.grad(y, of, direction)


def without_and_with(compute, of, monkeypatch):
    """(outcome without kernels, with them); the kernels are seen to run."""
    with monkeypatch.context() as patch:
        patch.setattr(on_card, "_DEVICE", "none")
        plain = outcome(compute, *of)
    return zip(plain, outcome(compute, *of), strict=True)


@card
@pytest.mark.parametrize(("rounded_first", "one_plus"), [(True, False), (False, False), (False, True)])
def test_norms(rounded_first, one_plus, monkeypatch):
    x, weight = torch.randn(5, 100, requires_grad=True), torch.randn(100, requires_grad=True)
    for plain, mine in without_and_with(
        lambda x, weight: rms_norm(x, weight, 1e-5, rounded_first, one_plus), (x, weight), monkeypatch
    ):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)
    assert type(rms_norm(x, weight, 1e-5, rounded_first).grad_fn).__name__ == "_NormRowsBackward"
    wide = torch.ones(1, WIDEST + 1, requires_grad=True)
    assert type(rms_norm(wide, wide[0], 1e-5, rounded_first).grad_fn).__name__ == "_RmsNormBackward"


@card
def test_gates(monkeypatch):
    gate, up = torch.randn(5, 100, requires_grad=True), torch.randn(5, 100, requires_grad=True)
    for plain, mine in without_and_with(lambda *of: gated(*of, F.silu, "silu"), (gate, up), monkeypatch):
        torch.testing.assert_close(mine, plain)
    assert type(gated(gate, up, F.silu, "silu").grad_fn).__name__ == "_GateRowsBackward"
    for of in ((gate, up, F.silu), (gate, up.double(), F.silu, "silu"), (gate, up[:1], F.silu, "silu")):
        assert type(gated(*of).grad_fn).__name__ == "_GatedBackward"


@card
@pytest.mark.parametrize("options", [LossOptions(), OPTIONS], ids=["plain", "all"])
def test_losses_through_a_plain_and_an_adapted_head(options, monkeypatch):
    hidden, weight, bias = torch.randn(7, 5), torch.randn(11, 5), torch.randn(11)
    of = [t.requires_grad_() for t in (hidden, weight, bias)]
    labels, weights = torch.arange(7), torch.linspace(-1, 2, 7)
    head = nn.Linear(5, 11)

    def through(hidden):
        return cross_entropy_through(head, hidden, labels, 11, options, weights)

    def linear(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, labels, bias, options, weights)

    for compute, operands in ((linear, of), (through, of[:1])):
        for plain, mine in without_and_with(compute, operands, monkeypatch):
            torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)
    (plain, mine) = next(
        without_and_with(lambda h: each_cross_entropy(head, h, labels, 11) + h[:, 0], of[:1], monkeypatch)
    )
    torch.testing.assert_close(mine, plain)


@card
def test_chunks_are_as_large_as_a_card_wants_them(monkeypatch):
    seen = []
    compute = cross_entropy.losses_of_chunk
    monkeypatch.setattr(cross_entropy, "losses_of_chunk", lambda z, *of: seen.append(len(z)) or compute(z, *of))
    monkeypatch.setattr(cross_entropy, "KERNEL_CHUNK_BYTES", 4 * 11 * 4)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 11 * 4)
    hidden, head = torch.randn(8, 5), nn.Linear(5, 11)
    labels = torch.arange(8)
    linear_cross_entropy(hidden, head.weight, labels)
    cross_entropy_through(head, hidden, labels, 11)
    assert seen == [4] * 2 + [2] * 4
    linear_cross_entropy(hidden.double(), head.weight.double(), labels)
    assert seen[6:] == [1] * 8


@card
def test_a_head_that_needs_what_it_returned_is_an_error_and_no_wrong_gradient():
    head = nn.Sequential(nn.Linear(5, 11), nn.Tanh())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy_through(head, torch.randn(7, 5), torch.arange(7), 11)
