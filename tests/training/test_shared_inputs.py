"""Projections of one input as one function: what they give and what they learn is what each gives by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_gemma2, tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2
from torch import nn

import lowrank
from lowrank.ops.lora_linear import lora_linear_reference
from lowrank.ops.lora_linears import Projection, lora_linears
from lowrank.ops.low_rank import LowRank
from lowrank.training.transforms import shared_inputs
from lowrank.training.transforms.keep_less import keep_less
from lowrank.training.transforms.recompute import recompute_activations
from lowrank.training.transforms.shared_inputs import share_inputs

MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "mistral": tiny_mistral, "gemma2": tiny_gemma2}
CONFIG = {"r": 4, "init_lora_weights": False, "target_modules": "all-linear"}
IDS = torch.arange(3, 27).view(2, 12)


def wrapped(build=tiny_llama, **options):
    torch.manual_seed(0)
    return lowrank.wrap(build(), lowrank.LoraConfig(**{**CONFIG, **options})).train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def groups(monkeypatch) -> list[int]:
    """How many layers each call of the function computed."""
    sizes: list[int] = []
    whole = lora_linears

    def counted(x, projections):
        sizes.append(len(projections))
        return whole(x, projections)

    monkeypatch.setattr(shared_inputs, "lora_linears", counted)
    return sizes


def waits(layer) -> bool:
    return layer.self_attn.q_proj.__dict__["forward"].args[0].waiting is not None


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)


def test_the_function_is_the_formula():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    of = []
    for out, r, scale, bias in ((6, 2, 0.5, True), (3, 4, 2.0, False)):
        A, B = (torch.randn(n, m, dtype=torch.float64, requires_grad=True) for n, m in ((r, 8), (out, r)))
        b = torch.randn(out, dtype=torch.float64) if bias else None
        of.append(Projection(torch.randn(out, 8, dtype=torch.float64), b, LowRank(A, B, scale)))
    trained = [x, *(factor for each in of for factor in (each.term.A, each.term.B))]
    expected = [lora_linear_reference(x, each.weight, each.bias, each.term) for each in of]
    found = lora_linears(x, of)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    slopes = [torch.randn_like(y) for y in expected]
    for one, other in zip(*(torch.autograd.grad(ys, trained, slopes) for ys in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_gradients(name, groups):
    model = wrapped(MODELS[name])
    keep_less(model)
    twin = copy.deepcopy(model)
    assert share_inputs(model) == 4
    same(gradients(model), gradients(twin))
    assert groups == [3, 2, 3, 2]


def test_recomputed_layers(groups):
    model, twin = wrapped(), wrapped()
    share_inputs(model)
    for each in (model, twin):
        recompute_activations(each, True)
    same(gradients(model), gradients(twin))
    assert sorted(groups) == [2] * 4 + [3] * 4


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"lora_dropout": 0.5}, {"target_modules": ["q_proj", "o_proj"]}, {"bias": "all"}],
    ids=["dora", "dropout", "only q", "biases train"],
)
def test_what_does_not_fit_is_computed_layer_by_layer(options, groups):
    build = tiny_qwen2 if "bias" in options else tiny_llama
    model, twin = wrapped(build, **options), wrapped(build, **options)
    share_inputs(model)
    same(gradients(model), gradients(twin))
    assert 3 not in groups


def test_what_acts_is_asked_at_every_call(groups):
    model = wrapped()
    twin = copy.deepcopy(model)
    share_inputs(model)
    for each in (model, twin):
        torch.manual_seed(2)
        lowrank.wrap(each, lowrank.LoraConfig(**CONFIG), adapter="other")
    for block in (
        lowrank.disabled,
        lambda m: lowrank.using(m, ["default", "other"]),
        lambda m: lowrank.routed(m, ["default", "other"]),
    ):
        with block(model), block(twin):
            torch.testing.assert_close(model(IDS).logits, twin(IDS).logits)
    with torch.no_grad():
        model(IDS)
    assert not groups
    with lowrank.using(model, "other"), lowrank.using(twin, "other"):
        torch.testing.assert_close(model(IDS).logits, twin(IDS).logits)
    assert groups == [3, 2, 3, 2]


def test_an_input_that_a_hook_changes_is_computed_by_itself():
    model, twin = wrapped(), wrapped()
    share_inputs(model)
    for each in (model, twin):
        each.model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        each.model.layers[1].self_attn.v_proj.register_forward_pre_hook(lambda module, args: (args[0].mul(3),))
    same(gradients(model), gradients(twin))
    assert [waits(layer) for layer in model.model.layers] == [False, False]


def test_nothing_waits_after_a_pass_and_unwrapping_leaves_nothing():
    model, plain = wrapped(), tiny_llama()
    share_inputs(model)
    gradients(model)
    assert not waits(model.model.layers[0])
    lowrank.unwrap(model)
    assert "forward" not in model.model.layers[0].self_attn.q_proj.__dict__
    torch.testing.assert_close(model.eval()(IDS).logits, plain(IDS).logits)


def test_models_without_such_projections_stay():
    assert share_inputs(wrapped(tiny_gpt2)) == 0
