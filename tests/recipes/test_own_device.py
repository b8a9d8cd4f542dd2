"""Which device a run is on: one card of several becomes the current one, and several processes share none."""

from __future__ import annotations

import sys

import pytest
import torch

import lowrank
from lowrank.errors import InputError
from lowrank.recipes.check import check
from lowrank.recipes.parts import beginning, setup
from lowrank.recipes.parts.setup import own_device


@pytest.fixture
def current(monkeypatch):
    """The cards that were made current, on a machine that seems to have some."""
    made: list[torch.device] = []
    monkeypatch.setattr(setup, "usable_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    return made


def test_a_card_by_its_number_is_the_current_one(current):
    assert own_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]


def test_where_no_number_is_named_it_is_whichever_is_current(current, monkeypatch):
    """Several processes are each given a card only as they join."""
    for available, found in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert own_device(None) == torch.device(found)
    assert not current


@pytest.mark.parametrize("start", [lowrank.train, check])
def test_a_run_asks_for_its_device_once(start, write_config, monkeypatch):
    asked = []
    for module in (setup, beginning, sys.modules["lowrank.recipes.check"]):
        monkeypatch.setattr(module, "own_device", lambda *named: asked.append(named) or torch.device("cpu"))
    start(write_config(training={"max_steps": 1}))
    assert len(asked) == 1


def test_several_processes_do_not_share_a_card(current):
    with pytest.raises(InputError, match="cuda:1 is one card, and 2 processes are to share this run"):
        own_device("cuda:1", 2)
    assert own_device("cuda", 2) == torch.device("cuda")
    assert own_device("cpu", 2) == torch.device("cpu")
    assert not current
