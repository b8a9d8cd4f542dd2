"""Which device a run is on: one card of several becomes the current one, and several processes share none."""

from __future__ import annotations

import pytest
import torch

from lowrank.errors import InputError
from lowrank.recipes.parts import setup
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


def test_several_processes_do_not_share_a_card(current):
    with pytest.raises(InputError, match="cuda:1 is one card, and 2 processes are to share this run"):
        own_device("cuda:1", 2)
    assert own_device("cuda", 2) == torch.device("cuda")
    assert own_device("cpu", 2) == torch.device("cpu")
    assert not current
