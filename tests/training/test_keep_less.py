"""What layers keep for the backward pass, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from adapted import adapted, adapter_gradients
from architectures import MODELS, output
from kept import kept_numbers
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.llama4.modeling_llama4 import Llama4TextMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP

import lowrank
from lowrank.ops.gated import activated, gated
from lowrank.ops.made_again import can_be_made, made_again
from lowrank.training.transforms.gates import gate_of
from lowrank.training.transforms.keep_less import keep_less
from lowrank.training.transforms.norms import lean_norms


def _outcome(model, name):
    out = output(model, name)
    return out, torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_the_same_to_the_bit(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    lean_norms(model)
    expected, gradients = _outcome(model, name)
    assert keep_less(model) or not model._no_split_modules
    got, mine = _outcome(model, name)
    assert torch.equal(got, expected)
    assert all((a is b) or torch.equal(a, b) for a, b in zip(mine, gradients, strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2"])
def test_an_adapters_gradients_are_the_same_to_the_bit_and_less_is_kept(name):
    model = adapted(MODELS[name](), use_dora=name == "llama")
    lean_norms(model)
    ids = torch.arange(40).view(2, 20)

    before, kept = adapter_gradients(model, ids), kept_numbers(lambda: model(ids, labels=ids, use_cache=False).loss)
    keep_less(model)
    after, less = adapter_gradients(model, ids), kept_numbers(lambda: model(ids, labels=ids, use_cache=False).loss)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[path], after[path]) for path in before)
    assert less < 0.9 * kept


def test_a_layer_of_smollm2_keeps_no_more_than_6600_numbers_for_a_token():
    def one_pass(layers):
        config = transformers.LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
            num_key_value_heads=3, vocab_size=64,
        )  # fmt: skip
        model = lowrank.wrap(transformers.AutoModelForCausalLM.from_config(config), lowrank.LoraConfig(r=16))
        lean_norms(model)
        lowrank.set_attention(model, "segments", packing=True)
        assert keep_less(model) == layers
        ids = torch.zeros(1, 256, dtype=torch.long)
        with lowrank.segments(model, [256]):
            return kept_numbers(lambda: model(ids, labels=ids, use_cache=False).loss)

    assert (one_pass(3) - one_pass(1)) / 2 / 256 <= 6_600


@pytest.mark.parametrize("owner", [LlamaMLP, GemmaMLP, Phi3MLP, Llama4TextMLP])
def test_gated_mlps_are_known_by_their_code(owner):
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2)
    config.hidden_activation = "gelu_pytorch_tanh"
    module = owner(config)
    gate = gate_of(module)
    x = torch.randn(3, 8)
    assert gate is not None
    assert torch.equal(gate.forward(module, x), module(x))


@pytest.mark.parametrize("owner", [DeepseekV4MLP, SeedOssMLP, nn.Linear, nn.SiLU])
def test_code_that_says_more_is_left_alone(owner):
    """One clamps what it multiplies, one drops out what it gives."""
    with torch.device("meta"):
        assert gate_of(owner.__new__(owner)) is None


@pytest.mark.parametrize("f", [nn.SiLU(), nn.GELU(approximate="tanh"), transformers.activations.NewGELUActivation()])
def test_gradients_of_activations_and_gates(f):
    x, gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda x: activated(x, f), x)
    assert torch.autograd.gradcheck(lambda gate, up: gated(gate, up, f), (gate, up))


def test_an_activation_that_changes_nothing_may_give_back_its_input():
    gate, up = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    before = gate.detach().clone()
    gated(gate, up, lambda x: x).sum().backward()
    assert torch.equal(gate.detach(), before)
    assert torch.equal(gate.grad, up.detach())
    assert torch.equal(up.grad, before)


def test_what_was_changed_in_place_is_told():
    x = torch.randn(4, requires_grad=True)
    with made_again():
        y = x * 2
        z = y.square()
        y.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        z.sum().backward()


def test_a_tensor_that_was_changed_after_it_was_spoken_of_is_kept_itself():
    x, W = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    with made_again():
        y = can_be_made(x * 2, lambda x: x * 2, x)
        y.add_(1)
        (y * W).sum().backward()
    torch.testing.assert_close(W.grad, x.detach() * 2 + 1)


def test_made_again_as_often_as_asked_and_not_held_in_between():
    calls = []

    def make(x):
        calls.append(1)
        return x * 3

    x, W = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    with made_again():
        y = can_be_made(make(x), make, x)
        z = (y * W).sum() + (y.view(5, 1) * W[:, None]).sum()
    calls.clear()
    z.backward(retain_graph=True)
    assert len(calls) == 1  # for two who asked
    z.backward()
    assert len(calls) == 2
    torch.testing.assert_close(W.grad, 4 * x.detach() * 3)


def test_a_lean_model_is_copied_and_pickled_whole():
    model = MODELS["llama"]()
    lean_norms(model)
    keep_less(model)
    ids = torch.arange(6)[None]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.model.layers[0].mlp.down_proj.weight.zero_()
            assert not torch.equal(twin(ids).logits, model(ids).logits)
            assert not twin.model.layers[0].mlp(torch.randn(1, 2, 32)).any()
