"""The loss from hidden states against the model's own logits, on many heads."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from tiny import VOCAB, build, tiny_gemma2, tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2

import lowrank
from lowrank import LoraConfig, data
from lowrank.data import Batch
from lowrank.ops.cross_entropy import LossOptions
from lowrank.training.losses.supervised import HiddenLoss, LogitsLoss, supervised_loss


def tiny_cohere():
    return build(
        transformers.CohereConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, logit_scale=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def tiny_granite():
    return build(
        transformers.GraniteConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, logits_scaling=3.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


MODELS = [tiny_llama, tiny_mistral, tiny_qwen2, tiny_gpt2, tiny_gemma2, tiny_cohere, tiny_granite]


def padded_batch() -> Batch:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(3, VOCAB, n), (rng.random(n) < 0.5) & (np.arange(n) > 0)) for n in (12, 9, 5)]
    return data.padded_batch(rows, pad_token_id=0)


def next_tokens(batch: Batch) -> torch.Tensor:
    """For each place of a batch in which no place has several next tokens the one that carries loss, (b·n,); -100."""
    tokens = torch.full_like(batch.input_ids, -100).flatten()
    tokens[batch.targets.places] = batch.targets.tokens
    return tokens


def reference(model, batch: Batch) -> torch.Tensor:
    """transformers' own loss, a sum instead of a mean."""
    out = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.attention_mask, use_cache=False
    )
    return torch.nn.functional.cross_entropy(
        out.logits.flatten(0, 1).float(), next_tokens(batch), ignore_index=-100, reduction="sum"
    )


@pytest.mark.parametrize("target", ["all-linear", ["lm_head"]], ids=["frozen-head", "adapted-head"])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_is_the_models_own_loss_and_so_are_its_gradients(make, target):
    model = lowrank.wrap(make(), LoraConfig(r=4, init_lora_weights=False, target_modules=target))
    batch = padded_batch()
    loss = supervised_loss(model)
    assert isinstance(loss, HiddenLoss)
    trained = [p for p in model.parameters() if p.requires_grad]
    value, expected = loss(model, batch), reference(model, batch)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(torch.autograd.grad(value, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_trained_head_gets_its_gradient():
    model = tiny_llama()
    batch = padded_batch()
    supervised_loss(model)(model, batch).backward()
    got = model.lm_head.weight.grad.clone()
    model.zero_grad()
    reference(model, batch).backward()
    torch.testing.assert_close(got, model.lm_head.weight.grad, rtol=1e-4, atol=1e-5)


def test_a_model_that_does_more_to_its_logits_keeps_them():
    model = tiny_llama()
    forward = type(model).forward

    class Odd(type(model)):
        def forward(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            out.logits = out.logits**3
            return out

    model.__class__ = Odd
    loss = supervised_loss(model)
    assert isinstance(loss, LogitsLoss)
    assert "Odd changes its head's output" in loss.why
    torch.testing.assert_close(loss(model, padded_batch()), reference(model, padded_batch()))


def test_smoothing_and_z_loss():
    model, batch = tiny_qwen2(), padded_batch()
    value = supervised_loss(model, LossOptions(label_smoothing=0.1, z_loss=0.01))(model, batch)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    rows = logits.flatten(0, 1)[batch.targets.places].float()
    expected = torch.nn.functional.cross_entropy(rows, batch.targets.tokens, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(value, expected + 0.01 * torch.logsumexp(rows, -1).square().sum(), rtol=1e-5, atol=1e-5)


def test_the_random_state_and_the_mode_stay(monkeypatch):
    model = tiny_llama().train()
    before = torch.get_rng_state()
    supervised_loss(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert "forward" not in model.lm_head.__dict__


def test_the_head_is_itself_again_after_a_failure():
    model = copy.deepcopy(tiny_llama())
    loss = supervised_loss(model)
    batch = padded_batch()
    batch.input_ids = torch.full_like(batch.input_ids, VOCAB + 5)
    with pytest.raises(IndexError):
        loss(model, batch)
    assert "forward" not in model.lm_head.__dict__
