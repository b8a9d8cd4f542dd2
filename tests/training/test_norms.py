"""The model's norms through one function, on many architectures."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from architectures import MODELS, output
from torch import nn

from lowrank.training import lean_norms


class Plain(nn.Module):
    """What many of transformers' norms look like; what is done with the normed x is the subclasses'."""

    def __init__(self, size=6, eps=1e-5):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

    def normed(self, x):
        return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.variance_epsilon)


class LikeLlamaNorm(Plain):
    def forward(self, x):
        return self.weight * self.normed(x).to(x.dtype)


class LikeOlmoNorm(Plain):
    def forward(self, x):
        return (self.weight * self.normed(x)).to(x.dtype)


class LikeGemmaNorm(Plain):
    def forward(self, x):
        return (self.normed(x) * (1.0 + self.weight.float())).to(x.dtype)


class CentredNorm(Plain):
    def forward(self, x):
        return self.weight * self.normed(x - x.mean(-1, keepdim=True))


class ShiftedNorm(Plain):
    def forward(self, x):
        return self.weight * self.normed(x) + 1e-2


class GatedNorm(Plain):
    def forward(self, x, gate=None):
        return self.weight * self.normed(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [LikeLlamaNorm, LikeOlmoNorm, LikeGemmaNorm])
def test_finds_out_which_kind_of_norm_it_is_whatever_its_weight(norm, dtype):
    module = norm().to(dtype)  # its weight is all ones: which kind it is does not show in it
    assert lean_norms(module) == 1
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-2, 2, 6))
    x = torch.randn(50, 6, dtype=dtype)
    mine, theirs = module(x), norm.forward(module, x)
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert float((mine == theirs).float().mean()) > (0.2 if dtype == torch.float32 else 0.99)


@pytest.mark.parametrize("norm", [CentredNorm, ShiftedNorm, GatedNorm, nn.LayerNorm])
def test_leaves_others_as_they_are(norm):
    module = norm(6)
    assert lean_norms(module) == 0
    assert "forward" not in module.__dict__


def test_leaves_a_norm_whose_forward_was_replaced():
    module = LikeLlamaNorm()
    module.forward = lambda x: 2.0 * x
    assert lean_norms(module) == 0
    assert torch.equal(module(torch.ones(1, 6)), torch.full((1, 6), 2.0))


def test_a_copy_and_a_pickle_have_weights_of_their_own():
    module = LikeLlamaNorm()
    lean_norms(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            twin.weight.zero_()
        assert not twin(torch.randn(2, 6)).any()
        assert module(torch.randn(2, 6)).any()


@pytest.mark.parametrize("name", MODELS)
def test_a_models_outputs_and_gradients_stay_what_they_were(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    for path, parameter in model.named_parameters():
        if "norm" in path and parameter.dim() == 1:
            nn.init.normal_(parameter)

    def output_and_gradients():
        out = output(model, name)
        return out, torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)

    expected, gradients = output_and_gradients()
    norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    assert lean_norms(model) >= len(norms)
    got, mine = output_and_gradients()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(mine, gradients, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * (1.0 + float(other.abs().max())))
