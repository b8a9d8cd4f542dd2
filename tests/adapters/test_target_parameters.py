"""`target_parameters` on any parameter of two or three dimensions, against peft: outputs, gradients, files, merged."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_gpt2, tiny_qwen2
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers.pytorch_utils import Conv1D

import lowrank
from lowrank import LoraConfig
from lowrank.adapters import adapter_tensors

PREFIX = "base_model.model."
IDS = torch.arange(1, 13).view(2, 6)


class Mixer(nn.Module):
    """Parameters of its own, used in ways of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(4, 5))
        self.stack = nn.Parameter(torch.randn(3, 5, 4))
        self.gate = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("bd,de->be", x, self.left)
        z = (y[:, None] * self.stack.sum(-1)).sum(1) @ self.stack[1]
        return z * self.gate.sigmoid()[0] + x @ self.gate.t()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 4, padding_idx=0)
        self.fc = nn.Linear(4, 4)
        self.conv1d = Conv1D(4, 4)
        self.conv = nn.Conv1d(4, 4, 2)
        self.mixer = Mixer()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.conv1d(self.fc(self.emb(ids)))
        return self.mixer(self.conv(h.mT).mean(-1))


def randomised(base: nn.Module, **fields: object) -> nn.Module:
    config = LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": [], **fields})
    model = lowrank.wrap(copy.deepcopy(base), config)
    for tensor in adapter_tensors(model, "default").values():
        tensor += 0.3 * torch.randn_like(tensor)
    return model


CASES = {
    "linear": {"target_parameters": ["fc.weight"]},
    "linear-bias": {"target_parameters": ["fc.weight"], "bias": "lora_only"},
    "embedding": {"target_parameters": ["emb.weight"]},
    "conv1d": {"target_parameters": ["conv1d.weight"], "use_rslora": True},
    "conv": {"target_parameters": ["conv.weight"]},
    "two-dims": {"target_parameters": ["mixer.left"]},
    "three-dims": {"target_parameters": ["mixer.stack"]},
    "several": {"target_parameters": ["mixer.left", "mixer.stack", "mixer.gate"]},
    "beside-modules": {"target_parameters": ["mixer.gate"], "target_modules": ["fc"]},
    "bias-all": {"target_parameters": ["fc.weight", "mixer.gate"], "bias": "all"},
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_files_and_merged_weights_are_pefts(case, tmp_path):
    torch.manual_seed(0)
    base = Net().eval()
    model = randomised(base, **CASES[case])
    ids = torch.tensor([[1, 2, 0, 4], [5, 0, 7, 8]])
    expected = model(ids)
    assert (expected - base(ids)).abs().max() > 1e-3
    lowrank.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", is_trainable=True).eval()
    torch.testing.assert_close(theirs(ids), expected, atol=1e-5, rtol=1e-5)
    for net in (theirs, model):
        net(ids).sin().sum().backward()
    wanted = {n.removeprefix(PREFIX).replace(".default", ""): p.grad for n, p in theirs.named_parameters()}
    by_address = {p.data_ptr(): p for p in model.parameters()}
    for name, tensor in adapter_tensors(model, "default").items():
        gradient = by_address[tensor.data_ptr()].grad
        gradient = gradient if gradient.shape == tensor.shape and tensor.is_contiguous() else gradient.t()
        want = wanted[name]
        torch.testing.assert_close(gradient, want, atol=1e-4, rtol=1e-3, msg=name)
    theirs.save_pretrained(tmp_path / "theirs")
    back = lowrank.load(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(back(ids), expected, atol=1e-5, rtol=1e-5)
    merged = lowrank.merge(model)
    torch.testing.assert_close(merged(ids), expected, atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("make", [tiny_qwen2, tiny_gpt2])
def test_in_a_language_model(make, tmp_path):
    base = make()
    names = ["q_proj.weight", "embed_tokens.weight"] if make is tiny_qwen2 else ["c_attn.weight", "wpe.weight"]
    model = randomised(base, target_parameters=names)
    expected = model(IDS).logits
    lowrank.save(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    torch.testing.assert_close(theirs(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lowrank.merge(model)(IDS).logits, expected, atol=1e-4, rtol=1e-4)


class Doubled(nn.Module):
    def forward(self, stored: torch.Tensor) -> torch.Tensor:
        return 2.0 * stored

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2.0


@pytest.mark.parametrize("how", ["doubled", "weight_norm"])
def test_a_parametrised_weight(how, tmp_path):
    torch.manual_seed(0)
    fc = nn.Linear(4, 3)
    if how == "doubled":
        parametrize.register_parametrization(fc, "weight", Doubled())
    else:
        parametrizations.weight_norm(fc)
    base = nn.ModuleDict({"fc": fc, "out": nn.Linear(3, 2)}).eval()
    x = torch.randn(5, 4)
    model = randomised(base, target_parameters=["fc.weight"])
    layer = model["fc"].adapters["default"]["weight"]
    weight = base["fc"].weight + 1.5 * layer.lora_B.t() @ layer.lora_A
    expected = F.linear(x, weight, base["fc"].bias)
    torch.testing.assert_close(model["fc"](x), expected, atol=1e-6, rtol=1e-5)
    lowrank.save(model, tmp_path / "a")
    torch.testing.assert_close(lowrank.load(copy.deepcopy(base), tmp_path / "a")["fc"](x), expected)
    if how == "doubled":  # peft knows those with one stored tensor
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
        torch.testing.assert_close(theirs.base_model.model["fc"](x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lowrank.merge(model)["fc"](x), expected, atol=1e-5, rtol=1e-5)


def test_a_parametrised_weight_that_takes_no_other_values_becomes_a_plain_one():
    torch.manual_seed(0)
    x = torch.randn(5, 3)
    turned = nn.ModuleDict({"fc": parametrizations.orthogonal(nn.Linear(3, 3))}).eval()
    model = randomised(turned, target_parameters=["fc.weight"])
    expected = model["fc"](x)
    merged = lowrank.merge(model)
    torch.testing.assert_close(merged["fc"](x), expected, atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == {"fc.weight", "fc.bias"}


def test_several_adapters_add_and_merge():
    torch.manual_seed(0)
    base = Net().eval()
    model = randomised(base, target_parameters=["fc.weight"], bias="lora_only")
    fields = {"target_modules": [], "target_parameters": ["fc.weight"], "bias": "lora_only"}
    lowrank.wrap(model, LoraConfig(r=3, init_lora_weights=False, **fields), "other")
    lowrank.set_active(model, ["default", "other"])
    ids = torch.tensor([[1, 2, 0, 4], [5, 0, 7, 8]])
    expected = model(ids)
    torch.testing.assert_close(lowrank.merge(model)(ids), expected, atol=1e-5, rtol=1e-5)
