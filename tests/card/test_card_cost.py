"""The count of a step's cost on a card: linear layers multiply what their shapes say, and kernels take fewer launches."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import card_cost
from card_cost import MODELS, RANK, Rates, Shape, step_cost, table_of, whole_cost
from pretended import Card

SHAPE = Shape(vocabulary=320, hidden=128, intermediate=96, layers=5, heads=4, key_heads=2)
TOKENS, SEGMENT = 120, 60
RATES = Rates()


@pytest.fixture(scope="module")
def plain():
    return whole_cost(SHAPE, TOKENS, SEGMENT, RATES, own=False)


def test_products_by_hand(plain):
    """Forward, and backward for the input and, of a factor, for itself; the first layer's q, k and v have no input to
    learn."""
    q, kv, mlp = 128 * 128, 128 * 64, 128 * 96
    layer, entry = 2 * q + 2 * kv + 3 * mlp, q + 2 * kv
    assert plain["products, base"].flops == 2 * TOKENS * (2 * SHAPE.layers * layer - entry)
    widths = 2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 96)  # of A and of B, all modules
    entry_widths = 3 * 128  # A of q, k and v
    expected = 2 * TOKENS * RANK * (3 * SHAPE.layers * widths - entry_widths)
    assert plain["products, low-rank"].flops == expected
    assert plain["products, head"].flops == 2 * 2 * (TOKENS - TOKENS // SEGMENT) * 128 * 320
    attended = 2 * TOKENS * SEGMENT * 128  # two products of half a square
    assert plain["attention"].flops == SHAPE.layers * attended * 3.5


def test_kernels_take_fewer_launches_and_multiply_the_same(plain):
    own = whole_cost(SHAPE, TOKENS, SEGMENT, RATES, own=True)
    assert own["products, base"] == plain["products, base"]
    # A layer's two go forward, are made again and go backward; the first one's input is there and learns nothing.
    assert own["norms"].launches == 6 * SHAPE.layers - 2 + 2  # and the last one
    assert own["rotary"].launches < plain["rotary"].launches
    table = table_of(own, plain, TOKENS)
    assert len(table) == 2 + len(plain.keys() | own.keys()) + 3
    assert sum(cost.seconds for cost in own.values()) < sum(cost.seconds for cost in plain.values())


def test_a_step_takes_the_slowest_of_its_three_times():
    costs = [
        sum(cost.seconds for cost in step_cost(SHAPE, 1, TOKENS, SEGMENT, rates, own=False).values())
        for rates in (RATES, Rates(launch=4e-6), Rates(bytes=1.0))
    ]
    assert costs[1] == pytest.approx(2 * costs[0])  # all of a step this small is launches
    assert costs[2] > 1e3 * costs[1]


def test_launches_of_a_step_in_strips(monkeypatch):
    """Of an 8B model on a card without variable-length kernels; with a CPU's strips they were 43,296."""
    monkeypatch.setattr(card_cost, "Card", lambda **how: Card((7, 5), **how))
    costs = whole_cost(MODELS["8b"], 4096, 512, RATES, own=False)
    assert sum(cost.launches for cost in costs.values()) <= 9949
