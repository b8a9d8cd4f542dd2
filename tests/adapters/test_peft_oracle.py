"""Against peft: the same weights give the same outputs and gradients, on many architectures, whole life long."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from architectures import MODELS, output

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.adapters import adapter_tensors

PREFIX = "base_model.model."

METHODS = {
    "lora": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "adalora": {"init_r": 4, "target_r": 2, "lora_alpha": 3},
}


def pair(name: str, fields: dict, targets=None):
    """The same adapter with the same random weights on two copies of a model: ours and peft's."""
    mine = MODELS[name]()
    theirs = copy.deepcopy(mine)
    ada = "init_r" in fields
    targets = {} if targets is None else {"target_modules": targets}
    lowrank.wrap(mine, (AdaLoraConfig if ada else LoraConfig)(**fields, **targets))
    # peft is told the very modules, so that what is compared is the maths.
    modules = list(lowrank.describe(mine)["default"].modules) if not targets else targets["target_modules"]
    config = peft.AdaLoraConfig(**fields, total_step=10, target_modules=modules) if ada else None
    config = config or peft.LoraConfig(**fields, target_modules=modules)
    wrapped = peft.get_peft_model(theirs, config)
    generator = torch.Generator().manual_seed(1)
    given = {
        key: 0.2 * torch.randn(tensor.shape, generator=generator) + (1.0 if "magnitude" in key else 0.0)
        for key, tensor in sorted(adapter_tensors(mine, "default").items())
    }
    expected = {key.removeprefix(PREFIX) for key in peft.get_peft_model_state_dict(wrapped)}
    assert set(given) == expected
    for key, tensor in adapter_tensors(mine, "default").items():
        tensor.copy_(given[key])
    peft.set_peft_model_state_dict(wrapped, {PREFIX + key: tensor for key, tensor in given.items()})
    return mine, wrapped.eval()


def gradients(model, name: str) -> dict[str, torch.Tensor]:
    out = output(model, name)
    # Not the mean square: behind a final LayerNorm that is a constant, and its gradient is noise.
    (out * torch.linspace(-1, 1, out.numel()).view_as(out).sin()).sum().backward()
    return {
        key.removeprefix(PREFIX).replace(".default", "").replace(".adapters", ""): p.grad
        for key, p in model.named_parameters()
        if p.grad is not None
    }


def bare(key: str) -> str:
    for ending in (".weight", ".modules_to_save"):
        key = key.replace(ending, "")
    return key.replace("base_layer.", "")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_and_merged(name, method):
    mine, theirs = pair(name, METHODS[method])
    expected = output(theirs, name)
    got = output(mine, name)
    scale = expected.abs().max()
    torch.testing.assert_close(got / scale, expected / scale, atol=1e-5, rtol=0)
    want = {bare(key): grad for key, grad in gradients(theirs, name).items()}
    have = {bare(key): grad for key, grad in gradients(mine, name).items()}
    assert have
    for key, grad in have.items():
        size = want[key].abs().max().clamp_min(1e-6)
        torch.testing.assert_close(grad.view_as(want[key]) / size, want[key] / size, atol=2e-4, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(output(lowrank.merge(mine), name) / scale, expected / scale, atol=2e-5, rtol=0)


OPTIONS = {
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}, "alpha_pattern": {"v_proj": 16}},
    "bias-lora_only": {"r": 4, "bias": "lora_only"},
    "modules_to_save": {"r": 4, "modules_to_save": ["lm_head"]},
    "layers": {"r": 4, "layers_to_transform": [1]},
    "layers-pattern": {"r": 4, "layers_to_transform": 0, "layers_pattern": "layers"},
    "exclude": {"r": 4, "exclude_modules": ["q_proj"]},
    "exclude-regex": {"r": 4, "exclude_modules": r".*\.0\..*"},
    "exclude-dora": {"r": 4, "exclude_modules": ["k_proj"], "use_dora": True},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_options(name, option):
    mine, theirs = pair(name, OPTIONS[option], targets=["q_proj", "k_proj", "v_proj", "up_proj"])
    torch.testing.assert_close(output(mine, name), output(theirs, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["embed_tokens", "q_proj"], ["lm_head"], r".*self_attn\.[qv]_proj"]
)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_embeddings_heads_and_regular_expressions(name, dora, targets):
    if name == "gemma2" and "lm_head" in targets:
        pytest.skip("tied: see test_tied.py")
    mine, theirs = MODELS[name](), MODELS[name]()
    lowrank.wrap(mine, LoraConfig(r=4, use_dora=dora, target_modules=targets, init_lora_weights=False))
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, use_dora=dora, target_modules=targets))
    state = {PREFIX + key: tensor.clone() for key, tensor in adapter_tensors(mine, "default").items()}
    result = peft.set_peft_model_state_dict(wrapped, state)
    assert not result.unexpected_keys
    torch.testing.assert_close(output(mine, name), output(wrapped.eval(), name), atol=1e-4, rtol=1e-4)


def test_all_linear_names_what_peft_names_without_routers_and_heads():
    for name in ("llama", "gpt2", "opt", "phi3", "bloom"):
        mine = lowrank.wrap(MODELS[name](), LoraConfig(r=2))
        theirs = peft.get_peft_model(MODELS[name](), peft.LoraConfig(r=2, target_modules="all-linear"))
        named = {
            key.removeprefix(PREFIX) for key, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
        }
        assert set(lowrank.describe(mine)["default"].modules) == named
