"""The kernels in whole models, interpreted on the CPU in a card's place: what they change is nothing but speed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from adapted import adapted, adapter_gradients
from architectures import MODELS, output
from tiny import tiny_llama
from torch.utils._python_dispatch import _disable_current_modes
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.modernbert import modeling_modernbert
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.phi3 import modeling_phi3
from trusted import cpu_as_card  # noqa: F401

from lowrank.ops.kernels import on_card
from lowrank.training.transforms import rotary
from lowrank.training.transforms.gates import fused_gates
from lowrank.training.transforms.keep_less import keep_less
from lowrank.training.transforms.norms import lean_norms
from lowrank.training.transforms.recompute import recompute_activations
from lowrank.training.transforms.rotary import fused_rotary

CPU = torch.device("cpu")
card = pytest.mark.usefixtures("cpu_as_card")


def _outcome(model, name):
    out = output(model, name)
    return out, torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)


def _assert_same(mine, theirs):
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(mine[1], theirs[1], strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * (1.0 + float(other.abs().max())))


ROTATING = {"llama": 2, "gemma2": 2, "qwen3": 2, "phi3": 2, "olmo2": 2, "gpt_neox": 2, "gpt2": 0, "opt": 0}


@card
@pytest.mark.parametrize(("name", "rotating"), ROTATING.items())
@pytest.mark.parametrize("kept", ["less", "as-it-was"])
def test_outputs_and_gradients_stay_what_they_were(name, rotating, kept):
    torch.manual_seed(0)
    model = MODELS[name]()
    expected = _outcome(model, name)
    lean_norms(model)
    assert fused_rotary(model, CPU) == rotating
    if kept == "less":
        assert keep_less(model) or not model._no_split_modules
    else:
        assert fused_gates(model, CPU) == (2 if name in {"llama", "gemma2", "qwen3", "phi3", "olmo2"} else 0)
    names = _functions_of(output(model, name))
    assert ("_RotatedBackward" in names) == (rotating > 0)
    assert ("_GateRowsBackward" in names) == (name in {"llama", "gemma2", "qwen3", "phi3", "olmo2"})
    assert ("_NormRowsBackward" in names) == (name not in {"gpt_neox", "gpt2", "opt"})
    _assert_same(_outcome(model, name), expected)


def _functions_of(y):
    """The names of the autograd functions that a tensor came through."""
    found, ahead = {}, [y.grad_fn]
    while ahead:
        function = ahead.pop()
        if function is not None and function not in found:
            found[function] = type(function).__name__
            ahead += [before for before, _ in function.next_functions]
    return set(found.values())


@card
def test_an_adapters_gradients_stay_what_they_were():
    model = adapted(tiny_llama())
    ids = torch.arange(40).view(2, 20)

    before = adapter_gradients(model, ids)
    lean_norms(model)
    assert fused_rotary(model, CPU) == keep_less(model) == 2
    after = adapter_gradients(model, ids)
    assert before.keys() == after.keys()
    for path, gradient in before.items():
        torch.testing.assert_close(after[path], gradient, rtol=1e-4, atol=1e-6)


@card
@pytest.mark.parametrize("mode", [True, "selective"])
def test_layers_that_are_recomputed(mode, monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def unseen(self, *of, **more):  # by dispatch modes, as launches are; the interpreter copies all arguments
        with _disable_current_modes():
            launch(self, *of, **more)

    monkeypatch.setattr(GridExecutor, "__call__", unseen)
    model = tiny_llama()
    ids = torch.arange(3, 43).view(2, 20)

    def gradients():
        loss = model(ids, labels=ids, use_cache=False).loss
        return torch.autograd.grad(loss, list(model.parameters()))

    before = gradients()
    model.train()
    lean_norms(model)
    fused_rotary(model, CPU)
    assert fused_gates(model, CPU) == 2
    recompute_activations(model, mode)
    for got, expected in zip(gradients(), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_model_on_the_cpu_is_left_alone():
    model = tiny_llama()
    assert fused_rotary(model, CPU) == fused_gates(model, CPU) == 0
    assert not any("forward" in module.__dict__ for module in model.modules())


@card
def test_a_model_beside_it_and_its_file_are_left_alone():
    one, other = tiny_llama(), tiny_llama()
    before = modeling_llama.apply_rotary_pos_emb
    assert fused_rotary(one, CPU) == 2
    assert modeling_llama.apply_rotary_pos_emb is before
    ids = torch.arange(6)[None]
    assert "_RotatedBackward" not in _functions_of(other(ids).logits)


@card
def test_a_replaced_forward_stays():
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    attention.forward = attention.forward
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward
    assert fused_rotary(model, CPU) == fused_gates(model, CPU) == 1


@card
def test_a_copy_and_a_pickle_have_weights_of_their_own():
    model = tiny_llama()
    fused_rotary(model, CPU)
    fused_gates(model, CPU)
    ids = torch.arange(6)[None]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.model.layers[0].self_attn.o_proj.weight.zero_()
            twin.model.layers[0].mlp.down_proj.weight.zero_()
            assert not torch.equal(twin(ids).logits, model(ids).logits)
            assert not twin.model.layers[0].mlp(torch.randn(1, 2, 32)).any()


@card
def test_answers_are_the_same_with_a_cache():
    model = tiny_llama()
    ids = torch.arange(3, 12)[None]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    fused_rotary(model, CPU)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


@card
@pytest.mark.parametrize(
    ("file", "rounding"),
    [
        (modeling_llama, rotary._Rounding(late=False, back=False)),
        (modeling_phi3, rotary._Rounding(late=False, back=False)),
        (modeling_gpt_neox, rotary._Rounding(late=False, back=False)),
        (modeling_olmo2, rotary._Rounding(late=False, back=True)),
        (modeling_modernbert, rotary._Rounding(late=True, back=True)),
        (modeling_cohere, None),  # pairs neighbours
        (modeling_glm, None),  # likewise
    ],
    ids=lambda file: getattr(file, "__name__", "").rpartition("_")[2] or None,
)
def test_finds_out_how_a_file_rotates(file, rounding):
    assert rotary._same(file.apply_rotary_pos_emb, CPU) == rounding


@card
def test_a_function_with_more_to_say_is_left_alone():
    def scaled(q, k, cos, sin, unsqueeze_dim=1):
        return tuple(1.01 * x for x in modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim))

    def placed(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)

    def refuses(q, k, cos, sin, unsqueeze_dim=1):
        raise RuntimeError("no")

    assert [rotary._same(each, CPU) for each in (scaled, placed, refuses)] == [None] * 3


@card
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_heads_may_stand_behind_tokens(unsqueeze_dim):
    theirs = modeling_llama.apply_rotary_pos_emb
    q, k = torch.randn(2, 3, 5, 16), torch.randn(2, 2, 5, 16)
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    cos, sin = torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    mine = rotary._rotary(
        lambda *of, **more: pytest.fail("not by the kernel"), rotary._ROUNDINGS[0], q, k, cos, sin, unsqueeze_dim
    )
    for got, expected in zip(mine, theirs(q, k, cos, sin, unsqueeze_dim), strict=True):
        assert torch.equal(got, expected)


@card
def test_what_the_kernel_is_not_for_goes_to_the_file():
    theirs = modeling_llama.apply_rotary_pos_emb
    for q, k, cos in (
        (torch.randn(2, 3, 5, 16, dtype=torch.float64),) * 2 + (torch.randn(1, 5, 16, dtype=torch.float64),),
        (torch.randn(3, 5, 16), torch.randn(3, 5, 16), torch.randn(5, 16)[None]),
        (torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16).half(), torch.randn(1, 5, 16)),
        (torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16), torch.randn(1, 5, 16)),  # dim is counted from the end
    ):
        dim = 0 if q.dim() == 3 else -3
        mine = rotary._rotary(theirs, rotary._ROUNDINGS[0], q, k, cos, cos, dim)
        for got, expected in zip(mine, theirs(q, k, cos, cos, dim), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ROTATING)
def test_on_a_card_outputs_and_gradients_stay_what_they_were(name, monkeypatch):
    device = torch.device("cuda", torch.cuda.current_device())
    assert str(on_card.kernels_on(device)) == "own: they agree with torch on this card"
    torch.manual_seed(0)
    model = MODELS[name]().to(device)
    ids = torch.arange(40, device=device).view(2, 20)

    def outcome():
        out = model(ids, use_cache=False).logits
        return out, torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)

    with monkeypatch.context() as patch:
        patch.setattr(on_card, "_DEVICE", "none")
        expected = outcome()
    lean_norms(model)
    assert fused_rotary(model, device) == ROTATING[name]
    keep_less(model)
    _assert_same(outcome(), expected)
