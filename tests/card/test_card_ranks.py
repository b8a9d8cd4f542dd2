"""What processes on cards tell one another in every step."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from pretended import Card

from lowrank.training.machine.ranks import Ranks


@pytest.mark.parametrize("here", [True, False])
def test_agreeing_waits_once_and_pickles_nothing(here, monkeypatch):
    sent = []
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op: sent.append((tensor.numel(), tensor.is_cuda, op)))
    with Card() as card:
        assert Ranks(0, 2).any(here) is here
    assert sent == [(1, True, dist.ReduceOp.MAX)]
    assert len(card.waits) == 1, card.waits


def test_gradients_are_added_up_without_a_wait(monkeypatch):
    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: sent.append(tensor.dtype) or tensor.mul_(2))
    with Card() as card:
        sizes = [(3, 4), (5,), (2, 2)]
        kept = [torch.nn.Parameter(torch.ones(size, device="cuda:0")) for size in sizes]
        for parameter in kept[:2]:
            parameter.grad = torch.ones(parameter.shape, device="cuda:0")
        Ranks(0, 2).add_up_gradients(kept)
        assert not card.waits
        assert sent == [torch.float32]  # one message
        assert [float(parameter.grad.sum()) for parameter in kept] == [24.0, 10.0, 0.0]
