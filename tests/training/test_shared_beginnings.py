"""Beginnings that are computed once: losses and gradients are those of each example alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import MODELS
from tiny import VOCAB, tiny_llama
from torch import nn

from lowrank import LoraConfig, set_attention, wrap
from lowrank.attention import check_sharing, segments
from lowrank.data import Batch, packed_batch
from lowrank.data.batches.beginnings import beginnings_of
from lowrank.ops.cross_entropy import LossOptions
from lowrank.training.losses.supervised import HiddenLoss, LogitsLoss, supervised_loss

NAMES = ["llama", "mistral", "qwen2", "gemma2", "gpt2", "qwen3", "gemma3", "phi3", "granite", "olmo2", "gpt_neox"]
NAMES += ["qwen3_moe"]
OPTIONS = {"plain": LossOptions(), "smoothed": LossOptions(label_smoothing=0.1, z_loss=0.01)}


def examples() -> list[tuple[np.ndarray, np.ndarray]]:
    """Two conversations of two turns, each with several ends, one of them inside of another, and one of its own: loss
    lies before, on and behind the places where they part."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(3, VOCAB, count)

    system, other = tokens(18), tokens(20)
    first, second = np.concatenate([system, tokens(16)]), np.concatenate([system, tokens(17)])
    rows = [np.concatenate([start, tokens(n)]) for start in (first, second) for n in (5, 1, 9)]
    rows += [first, np.concatenate([other, tokens(3)]), np.concatenate([other, tokens(4)]), tokens(7)]
    parts = [(row, (np.arange(len(row)) > 5) & (rng.random(len(row)) < 0.7)) for row in rows]
    parts[6][1][:] = parts[0][1][: len(first)]
    return parts


def shared_pack(parts) -> Batch:
    alike = beginnings_of([ids.astype(np.int32) for ids, _ in parts])
    return packed_batch([parts[at] for at in alike.order], alike.shared.tolist())


def adapted(name: str):
    """With weights large enough that attention is far from uniform, and both factors of the adapters random."""
    model = MODELS[name]()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    wrap(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, std=0.1)
    set_attention(model, "auto", packing=True)
    return model


def result(model, loss, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """The sum of the batches' losses, and its gradients."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        with segments(model, batch.segments, batch.parents):
            value = loss(model, batch)
            value.backward()
        total += float(value.detach())
    return total, {path: p.grad for path, p in model.named_parameters() if p.grad is not None}


def assert_the_same(found, expected) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    off = {path: float((found[1][path] - grad).norm() / grad.norm()) for path, grad in expected[1].items()}
    assert max(off.values()) < 1e-5, off


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_those_of_the_examples_apart(name):
    model, parts = adapted(name), examples()
    check_sharing(model)
    loss = supervised_loss(model)
    batch = shared_pack(parts)
    assert batch.computed < 0.6 * batch.tokens
    assert batch.targets.weights is not None
    apart = [packed_batch([part]) for part in parts]
    assert (batch.tokens, batch.supervised) == (sum(b.tokens for b in apart), sum(b.supervised for b in apart))
    assert_the_same(result(model, loss, [batch]), result(model, loss, apart))


@pytest.mark.parametrize("kind", [HiddenLoss, LogitsLoss])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_whatever_the_loss(kind, options):
    model, parts = adapted("qwen2"), examples()
    loss = HiddenLoss(model.lm_head, options) if kind is HiddenLoss else LogitsLoss(model, options, "asked for")
    apart = [packed_batch([part]) for part in parts]
    assert_the_same(result(model, loss, [shared_pack(parts)]), result(model, loss, apart))


@pytest.mark.parametrize("kind", [HiddenLoss, LogitsLoss])
def test_each_target_is_looked_at_once_and_known_to_its_examples(kind):
    model, parts = adapted("llama"), examples()
    options = LossOptions()
    loss = HiddenLoss(model.lm_head, options) if kind is HiddenLoss else LogitsLoss(model, options, "asked for")
    parts = [parts[at] for at in beginnings_of([ids.astype(np.int32) for ids, _ in parts]).order]
    batch = shared_pack(parts)
    with segments(model, batch.segments, batch.parents):
        each = loss.each(model, batch)
    assert each.shape == batch.targets.tokens.shape
    sums = np.zeros(len(parts))
    np.add.at(sums, batch.holders.examples, each.double().numpy()[batch.holders.targets])
    alone = [float(loss(model, packed_batch([part])).detach()) for part in parts]
    assert sums == pytest.approx(alone, rel=1e-5, abs=1e-5)


def test_an_adapted_head_takes_targets_that_count_more_than_once():
    model = tiny_llama()
    wrap(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["lm_head", "q_proj"]))
    set_attention(model, "auto", packing=True)
    parts = examples()
    loss = supervised_loss(model)
    assert_the_same(
        result(model, loss, [shared_pack(parts)]), result(model, loss, [packed_batch([part]) for part in parts])
    )
