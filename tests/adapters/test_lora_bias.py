"""`lora_bias`, the trained bias behind B: against peft in outputs, gradients, files and merged weights."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lowrank
from lowrank import LoraConfig
from lowrank.adapters import adapter_tensors
from lowrank.errors import InputError

PREFIX = "base_model.model."


class Net(nn.Module):
    """A layer of each kind that has a bias, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.fc = nn.Linear(4, 6)
        self.conv1d = Conv1D(5, 6)
        self.bare = nn.Linear(5, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bare(self.conv1d(self.fc(self.conv(x).flatten(2).mT)))


def adapted(targets: list[str], **fields: object) -> tuple[Net, nn.Module]:
    torch.manual_seed(0)
    base = Net().eval()
    model = lowrank.wrap(copy.deepcopy(base), LoraConfig(r=2, lora_bias=True, target_modules=targets, **fields))
    for tensor in adapter_tensors(model, "default").values():
        tensor += 0.3 * torch.randn_like(tensor)
    return base, model


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_outputs_gradients_and_files_are_pefts(bias, tmp_path):
    base, model = adapted(["conv", "fc", "conv1d", "bare"], bias=bias, use_rslora=bias == "all")
    x = torch.randn(3, 2, 4, 4)
    expected = model(x)
    lowrank.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", is_trainable=True).eval()
    torch.testing.assert_close(theirs(x), expected, atol=1e-5, rtol=1e-5)
    for net in (theirs, model):
        net(x).sin().sum().backward()
    wanted = {
        name.removeprefix(PREFIX).replace(".default", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    for path in ("conv", "fc", "conv1d", "bare"):
        gradient = model.get_submodule(path).adapters["default"].lora_bias.grad
        torch.testing.assert_close(gradient, wanted[f"{path}.lora_B.bias"], atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    back = lowrank.load(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(back(x), expected, atol=1e-6, rtol=0)


def test_merged_alone_and_with_others():
    _, model = adapted(["fc", "conv1d"], bias="lora_only")
    x = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(lowrank.merge(copy.deepcopy(model))(x), model(x), atol=1e-5, rtol=1e-5)
    config = LoraConfig(r=3, lora_bias=True, target_modules=["fc"], init_lora_weights=False)
    lowrank.wrap(model, config, "other")
    nn.init.normal_(model.fc.adapters["other"].lora_bias)
    lowrank.set_active(model, ["default", "other"])
    expected = model(x)
    torch.testing.assert_close(lowrank.merge(model)(x), expected, atol=1e-5, rtol=1e-5)


def test_rows_are_routed():
    base, model = adapted(["conv", "fc", "bare"])
    x = torch.randn(2, 2, 4, 4)
    with lowrank.routed(model, ["default", None]):
        torch.testing.assert_close(model(x), torch.stack([model(x)[0], base(x)[1]]), atol=1e-5, rtol=1e-5)
        rows = model(x)
    torch.testing.assert_close(rows[0], model(x)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows[1], base(x)[1], atol=1e-5, rtol=1e-5)


def test_it_begins_at_zero_and_is_the_modules_dtypes_business():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 3)).bfloat16()
    x = torch.randn(2, 4).bfloat16()
    expected = base(x)
    model = lowrank.wrap(base, LoraConfig(r=2, lora_bias=True, target_modules=["0"]))
    torch.testing.assert_close(model(x), expected)
    model[0].adapters["default"].lora_bias.data.fill_(1.0)
    torch.testing.assert_close(model(x), expected + 4.0, atol=0.05, rtol=0)


def test_what_peft_refuses_is_refused():
    _, model = adapted(["fc", "bare"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="bare cannot be merged: lora_bias trained a bias, and it has none"):
        lowrank.merge(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="lora_bias does not go with use_dora"):
        LoraConfig(lora_bias=True, use_dora=True)
    with pytest.raises(ValueError, match="init_lora_weights: pissa"):
        LoraConfig(lora_bias=True, init_lora_weights="pissa")
    with pytest.raises(InputError, match="0: an embedding has no bias"):
        lowrank.wrap(nn.Sequential(nn.Embedding(3, 2)), LoraConfig(r=2, lora_bias=True, target_modules=["0"]))
