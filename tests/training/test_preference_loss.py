"""The loss of preferences against each answer alone, from the model's own logits, and a loss written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_gemma2, tiny_llama

import lowrank
from lowrank.attention import segments, set_attention
from lowrank.data import Examples
from lowrank.data.batches.trees import Trees, Verdict
from lowrank.ops.cross_entropy import LossOptions
from lowrank.training.losses.dpo import Dpo
from lowrank.training.losses.objective import Numbers
from lowrank.training.losses.preference import PreferenceLoss
from lowrank.training.losses.supervised import LogitsLoss, supervised_loss

PROMPT, SAID = [11, 12, 13, 14], [[20, 21, 22, 2], [20, 23, 2], [30, 2]]
REFERENCE, MARGIN = np.array([-20.0, -15.0, -9.0]), 0.5


@pytest.fixture
def trees():
    """One row: a chosen answer and two rejected, of which one begins as the chosen one does."""
    answers = [(np.array(PROMPT + said), np.arange(len(PROMPT + said)) >= len(PROMPT)) for said in SAID]
    example = {"input_ids": np.concatenate([ids for ids, _ in answers]).tolist()}
    mask = np.concatenate([mask for _, mask in answers]).tolist()
    held = Examples.of([lowrank.data.Example(example["input_ids"], mask)])
    verdict = Verdict(tuple(len(ids) for ids, _ in answers), (True, False, False), MARGIN)
    examples = Examples(held.table, held.rows, train_on="completion", payloads=[verdict])
    return Trees(examples, paired=True).with_reference(REFERENCE, None)


def written_out(model, beta):
    """The mean over both pairs, each answer by itself."""
    sums = []
    for said in SAID:
        logits = model(input_ids=torch.tensor([PROMPT + said])).logits[0, len(PROMPT) - 1 : -1]
        sums.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(said)[:, None]).sum())
    ratios = beta * (torch.stack(sums) - torch.from_numpy(REFERENCE).float())
    return -F.logsigmoid(ratios[0] - ratios[1:] - MARGIN).mean()


@pytest.mark.parametrize("packing", [True, False], ids=["pack", "rows"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma2], ids=["llama", "gemma2"])
@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "logits"])
def test_several_rejected_answers_and_a_margin(trees, build, hidden, packing):
    model = build()
    lowrank.wrap(model, lowrank.LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    expected = written_out(model, 0.3)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(expected, trained)
    set_attention(model, "auto", packing=packing)
    log_probs = supervised_loss(model) if hidden else LogitsLoss(model, LossOptions(), "it is asked for")
    loss = PreferenceLoss(log_probs, Dpo(Numbers(0.3, "sigmoid")), "dpo", paired=True, referenced=True)
    batch = trees.batch([0], packing=packing, pad_token_id=0)
    assert batch.counts == (2, 4)
    with segments(model, batch.segments, batch.parents):
        sums = loss(model, batch)
    torch.testing.assert_close(sums[0] / 2, expected, atol=1e-6, rtol=1e-5)
    for got, want in zip(torch.autograd.grad(sums[0] / 2, trained), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-4)
    assert loss.figures == ("accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
    told = sums.detach()
    assert float(told[3]) == pytest.approx(float(told[4] - told[5]), abs=1e-5)
    with torch.no_grad(), segments(model, batch.segments, batch.parents):
        torch.testing.assert_close(loss.each(model, batch).mean(), expected.detach(), atol=1e-6, rtol=1e-5)
