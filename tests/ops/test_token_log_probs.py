from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank.ops import cross_entropy
from lowrank.ops.cross_entropy import LossOptions
from lowrank.ops.token_log_probs import token_log_probs

OPTIONS = {"plain": LossOptions(), "scaled": LossOptions(logit_scale=0.5), "capped": LossOptions(softcap=3.0)}


class Adapted(nn.Module):
    """A head that is more than a product."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(5, 11, dtype=torch.float64).requires_grad_(False)
        self.low = nn.Linear(5, 2, bias=False, dtype=torch.float64)
        self.high = nn.Linear(2, 11, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.base(x) + self.high(self.low(x))


def head_of(kind):
    torch.manual_seed(0)
    if kind == "adapted":
        return Adapted()
    return nn.Linear(5, 11, dtype=torch.float64).requires_grad_(kind == "trained")


def written_out(head, hidden, tokens, options):
    z = options.logit_scale * head(hidden)
    z = z if options.softcap is None else options.softcap * torch.tanh(z / options.softcap)
    return torch.log_softmax(z, -1).gather(1, tokens[:, None])[:, 0]


@pytest.mark.parametrize("kind", ["frozen", "trained", "adapted"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [1, 11 * 8 * 2 * 3, 10**6], ids=["row-by-row", "three-rows", "one-chunk"])
def test_equals_what_is_written_out(kind, options, chunk_bytes, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk_bytes)
    head = head_of(kind)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    tokens, weights = torch.randint(0, 11, (7,)), torch.randn(7, dtype=torch.float64)
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    found, expected = token_log_probs(head, hidden, tokens, 11, options), written_out(head, hidden, tokens, options)
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad((found.tanh() * weights).sum(), inputs)  # a function of each
    wanted = torch.autograd.grad((expected.tanh() * weights).sum(), inputs)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(lambda h: token_log_probs(head, h, tokens, 11, options), (hidden,))
    with torch.no_grad():
        torch.testing.assert_close(token_log_probs(head, hidden, tokens, 11, options), expected.detach())


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_under_autocast_products_are_short_and_sums_are_not(kind):
    head = head_of(kind).float()
    hidden = torch.randn(7, 5, requires_grad=True)
    tokens = torch.randint(0, 11, (7,))
    with torch.autocast("cpu", torch.bfloat16):
        found = token_log_probs(head, hidden, tokens, 11)
        expected = torch.log_softmax(head(hidden).float(), -1).gather(1, tokens[:, None])[:, 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    (got,), (want,) = (torch.autograd.grad(value.sum(), hidden) for value in (found, expected))
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
