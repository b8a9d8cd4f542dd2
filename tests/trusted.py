"""The CPU in a card's place: the kernels, interpreted, where a card would take them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lowrank.ops.kernels import on_card


@pytest.fixture
def cpu_as_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled, for the card")
    monkeypatch.setattr(on_card, "_DEVICE", "cpu")
    monkeypatch.setattr(on_card, "_missing", lambda device: None)
    on_card.kernels_on.cache_clear()  # that they agree there is found out once
    yield
    on_card.kernels_on.cache_clear()


@pytest.fixture
def untried_card(cpu_as_card: None) -> Iterator[None]:
    on_card._tried.cache_clear()
    yield
    on_card._tried.cache_clear()
