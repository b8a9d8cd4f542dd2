"""Convolutions and embeddings beside them, against peft: outputs, gradients, files both ways, merged, routed."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoraConfig
from lowrank.adapters import adapter_tensors

IDS = torch.arange(20).view(2, 10) % 10
PREFIX = "base_model.model."


class Net(nn.Module):
    """Every kind of layer that is no linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4, padding_idx=0)
        self.conv1 = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(1, 5, (3, 2), padding="same", bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.conv1(self.embed(ids).transpose(1, 2))[:, None])


def wrapped(dora: bool, **fields: object) -> tuple[Net, Net]:
    """The base, and a copy with an adapter on all three layers."""
    torch.manual_seed(0)
    base = Net().eval()
    config = LoraConfig(r=2, target_modules=["embed", "conv1", "conv2"], use_dora=dora, **fields)
    model = lowrank.wrap(copy.deepcopy(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return base, model


def swap(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data, parameter.grad = parameter.grad, parameter.data


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_outputs_gradients_files_and_merged_weights_are_pefts(dora: bool, tmp_path):
    base, model = wrapped(dora, init_lora_weights=False)
    expected = model(IDS)
    assert (expected - base(IDS)).abs().max() > 0.1
    lowrank.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", is_trainable=True).eval()
    torch.testing.assert_close(theirs(IDS), expected, atol=1e-5, rtol=0)

    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected).sin()
    (theirs(IDS) * weights).sum().backward()
    (expected * weights).sum().backward()
    swap(model), swap(theirs)  # gradients where the values are have the file's names
    wanted = peft.get_peft_model_state_dict(theirs)
    for name, gradient in adapter_tensors(model, "default").items():
        torch.testing.assert_close(gradient, wanted[PREFIX + name], rtol=1e-4, atol=1e-5)
    swap(model), swap(theirs)

    theirs.save_pretrained(tmp_path / "theirs")
    back = lowrank.load(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(back(IDS), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(lowrank.merge(model)(IDS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_rows_are_routed(dora: bool):
    base, model = wrapped(dora, bias="lora_only", init_lora_weights=False)
    with lowrank.routed(model, [None, "default"]):
        rows = model(IDS)
    torch.testing.assert_close(rows[0], base(IDS)[0])
    torch.testing.assert_close(rows[1], model(IDS)[1])


def test_dilation_is_the_modules_own():
    """peft leaves it out, and its shapes no longer fit; the merged kernel is the oracle."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3, dilation=2), nn.Conv2d(1, 2, 2, dilation=(1, 2)))
    lowrank.wrap(model, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    x = torch.randn(2, 3, 9)
    y = model[1](model[0](x)[:, None])
    merged = lowrank.merge(model)
    torch.testing.assert_close(merged[1](merged[0](x)[:, None]), y, atol=1e-5, rtol=1e-5)
