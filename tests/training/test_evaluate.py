"""The evaluation: each row's loss is what the row has alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_gemma2, tiny_llama, tiny_qwen2

from lowrank.attention import set_attention
from lowrank.data import Example, Examples, plan_batches
from lowrank.ops.cross_entropy import LossOptions
from lowrank.training.evaluation.evaluation import Evaluation, Sample, losses_of
from lowrank.training.losses.supervised import LogitsLoss, supervised_loss

LENGTHS = [5, 17, 9, 30, 2, 12, 23]


def examples() -> Examples:
    rng = np.random.default_rng(0)
    made = [Example(rng.integers(3, 60, n).tolist(), [False, True, *(rng.random(n - 2) < 0.6)]) for n in LENGTHS]
    return Examples.of(made)


def alone(model, example: Example) -> float:
    """transformers' mean loss over one row."""
    ids = torch.tensor([example.input_ids])
    labels = torch.where(torch.tensor([example.supervised]), ids, -100)
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels, use_cache=False).loss)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("from_logits", [False, True], ids=["hidden", "logits"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_gemma2], ids=lambda make: make.__name__)
def test_each_row_loses_what_it_loses_alone(make, from_logits, packing):
    model, rows = make().eval(), examples()
    wanted = [alone(model, row) for row in rows]
    set_attention(model, "segments")
    loss = LogitsLoss(model, LossOptions(), "") if from_logits else supervised_loss(model)
    plan = plan_batches(rows, packing=packing, batch_size=3, max_tokens=40, pad_token_id=0, seed=0, shuffle=False)
    found = losses_of(model, plan, loss)
    assert list(found.by_row(np.arange(len(rows))).values()) == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    counts = [sum(row.supervised) for row in rows]
    assert found.supervised.tolist() == counts
    assert found.mean == pytest.approx(np.average(wanted, weights=counts), rel=1e-5)
    assert len({round(value, 3) for value in wanted}) == len(rows)  # a mix-up would show


def test_a_row_of_several_examples_is_weighed_by_tokens():
    model, rows = tiny_llama().eval(), examples()
    plan = plan_batches(rows, packing=False, batch_size=2, max_tokens=None, pad_token_id=0, seed=0, shuffle=False)
    found = losses_of(model, plan, supervised_loss(model))
    by_row = found.by_row(np.array([4, 4, 1, 1, 1, 2, 2]))
    assert set(by_row) == {1, 2, 4}
    assert by_row[4] == pytest.approx(found.sums[:2].sum() / found.supervised[:2].sum())


def test_it_goes_into_a_checkpoint_and_comes_back():
    whole = Evaluation(0.5, 10, 0.0, (Sample("ask", "yes", "no", False, (), 1.25),))
    assert Evaluation.from_dict(whole.as_dict()) == whole
