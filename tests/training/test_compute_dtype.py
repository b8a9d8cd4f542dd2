"""Products in float32 over weights in 16 bits equal those of the float32 model with the same weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from architectures import MODELS

import lowrank
from lowrank import LoraConfig
from lowrank.attention import set_attention
from lowrank.data import packed_batch
from lowrank.training.losses.supervised import supervised_loss
from lowrank.training.transforms.compute_dtype import compute_wide, why_not_wide
from lowrank.training.transforms.norms import lean_norms
from lowrank.training.transforms.recompute import recompute_activations

DENSE = ["llama", "mistral", "qwen2", "gemma2", "gpt2", "qwen3", "gemma3", "phi3", "granite", "olmo2", "gpt_neox"]


def _batch():
    rng = np.random.default_rng(0)
    return packed_batch([(rng.integers(3, 60, n), np.arange(n) > 2) for n in (9, 14, 5)])


def _adapted(model, config):
    torch.manual_seed(1)
    lowrank.wrap(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def _trained(model, recompute=False):
    lean_norms(model)
    set_attention(model, "auto", packing=True)
    if recompute:
        recompute_activations(model, recompute)
    loss = supervised_loss(model.train())
    value = loss(model, _batch())
    value.backward()
    return value.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, loss


def _check_same(grads, expected):
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()) + 1e-7
        )


def _pair(name, config, dtype=torch.bfloat16):
    """The 16-bit model that computes in float32, and the float32 model of its weights."""
    base = MODELS[name]().to(dtype)
    narrow, wide = _adapted(copy.deepcopy(base), config), _adapted(base.float(), config)
    assert why_not_wide(narrow) is None
    compute_wide(narrow, torch.float32)
    return narrow, wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DENSE)
def test_losses_and_gradients_are_the_float32_models(name, dtype):
    narrow, wide = _pair(name, LoraConfig(r=4, target_modules="all-linear"), dtype)
    (loss, grads, _), (expected, of_wide, _) = _trained(narrow), _trained(wide)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    _check_same(grads, of_wide)
    matrices = [p for n, p in narrow.named_parameters() if p.dim() > 1 and "adapters" not in n]
    assert {p.dtype for p in matrices} == {dtype}


@pytest.mark.parametrize(
    "fields",
    [{"use_dora": True}, {"target_modules": ["q_proj", "down_proj"]}],
    ids=["dora", "few"],
)
@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_other_adapters_and_recomputation(fields, recompute):
    config = LoraConfig(**({"r": 4, "target_modules": "all-linear"} | fields))
    narrow, wide = _pair("llama", config)
    (loss, grads, _), (expected, of_wide, _) = _trained(narrow, recompute), _trained(wide, recompute)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    _check_same(grads, of_wide)


def test_without_the_adapter_and_in_answers():
    narrow, wide = _pair("qwen2", LoraConfig(r=4, target_modules="all-linear"))
    ids = torch.arange(3, 15).view(2, 6)
    for model in (narrow, wide):
        model.eval()
    torch.testing.assert_close(narrow(ids).logits, wide(ids).logits, rtol=1e-5, atol=1e-5)
    with lowrank.disabled(narrow), lowrank.disabled(wide):
        torch.testing.assert_close(narrow(ids).logits, wide(ids).logits, rtol=1e-5, atol=1e-5)
    answers = [model.generate(ids, max_new_tokens=6, do_sample=False) for model in (narrow, wide)]
    assert torch.equal(*answers)


def test_no_wide_copy_of_a_weight_is_kept():
    narrow, _ = _pair("llama", LoraConfig(r=4, target_modules=["q_proj"]))
    set_attention(narrow, "auto", packing=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        supervised_loss(narrow)(narrow, _batch()).backward()
    shapes = {tuple(p.shape) for n, p in narrow.named_parameters() if p.dim() > 1 and "adapters" not in n}
    assert not [x for x in kept if x.dtype == torch.float32 and tuple(x.shape) in shapes]


def test_what_cannot_is_named():
    moe = _adapted(MODELS["qwen3_moe"]().to(torch.bfloat16), LoraConfig(r=4, target_modules=["q_proj"]))
    assert "experts" in why_not_wide(moe)
    table = _adapted(MODELS["llama"]().to(torch.bfloat16), LoraConfig(r=4, target_modules=["embed_tokens"]))
    assert "embed_tokens" in why_not_wide(table)
    whole = _adapted(
        MODELS["llama"]().to(torch.bfloat16), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    assert "as a whole" in why_not_wide(whole)
