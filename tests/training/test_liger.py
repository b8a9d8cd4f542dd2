"""Liger's kernels: proved before they are used, and on one model alone. Liger itself needs a CUDA device."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from tiny import tiny_llama
from transformers.models.llama import modeling_llama

import lowrank
from lowrank.errors import InputError
from lowrank.training.transforms import liger

KERNELS = "liger_kernel.transformers.monkey_patch"


@pytest.fixture
def apply(monkeypatch):
    """A stand-in for Liger that doubles the last norm, and replaces the class too, as Liger does."""

    def apply_to_llama(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, model=None):
        asked.update(rope=rope, cross_entropy=cross_entropy, fused=fused_linear_cross_entropy, rms_norm=rms_norm)
        modeling_llama.LlamaRMSNorm = torch.nn.Identity
        norm = model.model.norm
        norm.forward = lambda x: asked["factor"] * type(norm).forward(norm, x)

    asked: dict = {"factor": 1.0}
    module = types.ModuleType(KERNELS)
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_to_llama}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, KERNELS, module)
    monkeypatch.setattr(liger, "find_spec", lambda name: object())
    return asked


@pytest.fixture
def on_cuda(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(type(model), "device", types.SimpleNamespace(type="cuda"))
    return model


def test_only_this_model_and_only_what_is_wanted(apply, on_cuda):
    before = modeling_llama.LlamaRMSNorm
    assert liger.use_liger(on_cuda) == ["rms_norm"]
    assert "forward" in vars(on_cuda.model.norm)
    assert modeling_llama.LlamaRMSNorm is before
    assert apply == {"factor": 1.0, "rope": False, "cross_entropy": False, "fused": False, "rms_norm": True}


def test_kernels_that_say_something_else_are_refused(apply, on_cuda):
    apply["factor"] = 1.01
    with pytest.raises(InputError, match=r"change the hidden states of LlamaForCausalLM by 1\.0%"):
        liger.use_liger(on_cuda)


def test_a_model_that_it_does_not_know(apply, on_cuda):
    on_cuda.config.model_type = "unheard-of"
    with pytest.raises(InputError, match="no kernels for LlamaForCausalLM"):
        liger.use_liger(on_cuda)


def test_the_cpu_is_refused(apply):
    with pytest.raises(InputError, match="on CUDA, and the model is on cpu"):
        liger.use_liger(tiny_llama())


def test_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="is not installed"):
        liger.use_liger(tiny_llama())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_gradients_on_a_card():
    pytest.importorskip("liger_kernel")
    gradients = []
    for kernels in (False, True):
        torch.manual_seed(0)
        model = lowrank.wrap(tiny_llama().cuda(), lowrank.LoraConfig(r=4, init_lora_weights="gaussian")).train()
        if kernels:
            assert {"rms_norm", "swiglu"} <= set(liger.use_liger(model))
        ids = torch.arange(3, 30, device="cuda")[None]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)
